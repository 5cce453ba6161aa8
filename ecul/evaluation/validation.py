"""Figures of people who were held out of training, for the reader of a log: nothing selects by them."""

from typing import Any

from ecul.data.dataset import Dataset
from ecul.evaluation.protocols import evaluate


def check_validation(dataset: Dataset, every: Any) -> None:
    """Errors: ValueError for no number of epochs, no images to evaluate on, or the published test images."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 0:
        raise ValueError(f"validate: expected a number of epochs, got {every!r}")
    tested = [dataset.test_visible, dataset.test_infrared]
    if dataset.protocol is None or any(images is None or images.pids is None for images in tested):
        raise ValueError("validate: the data set has no images with identities and a protocol to evaluate on")
    if dataset.root is not None and not dataset.options.get("validation"):
        raise ValueError(
            "validate: these are the published test images, which no choice may depend on; open the data set "
            "with validation=0.2 (--option validation=0.2), which holds out a fifth of the training people"
        )


def validation_figures(model: Any, dataset: Dataset) -> dict[str, float]:
    """Rank-1 and mAP of the first row of the data set's protocol, by the names that they have in the log."""
    row = evaluate(model, dataset, progress=False).rows[0]
    return {f"validation_{name}": row[name] for name in ("rank1", "mAP")}
