"""What stands around the epochs of a run: its lock, state, files, log, validation and hook."""

import inspect
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ecul.common import distributed, logs
from ecul.common.names import shorten
from ecul.config import Config
from ecul.data.dataset import Dataset
from ecul.evaluation.protocols import check_validation, validation_figures
from ecul.features import out_of_memory
from ecul.optim import build_model, build_optimizer, trainable, warn_about_start
from ecul.run.log import LEGEND, describe
from ecul.run.saved import State, dataset_fingerprint, holds_run, load_run, run_directory, save_run
from ecul.trainset import TrainImages, load_images

log = logging.getLogger("ecul")
Hook = Callable[[dict, torch.nn.Module], object]


@dataclass
class Session:
    """An open run. An epoch works on `state` and `images`; all else is done here, between the epochs."""

    dataset: Dataset
    data: dict  # what its files say of the data set
    config: Config
    directory: Path | None
    hook: Hook
    validate: int
    state: State
    images: TrainImages
    stopped: bool = False

    def epochs(self) -> Iterator[int]:
        """The numbers of the epochs that are left, until on_epoch ends the run."""
        log.info(LEGEND)
        left = range(len(self.state.history), self.config.epochs)
        shown = distributed.rank() == 0
        for epoch in logs.progress(len(left), "epochs", "epoch", shown, left, lines=False):
            yield epoch
            if self.stopped:
                log.info("on_epoch ended the run after epoch %d of %d", epoch + 1, self.config.epochs)
                return

    @contextmanager
    def guarded(self, epoch: int) -> Iterator[None]:
        """In here the errors of an epoch say what to do."""
        try:
            yield
        except ValueError:
            self._require_finite(epoch, {})
            raise
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            advice = "train anew with fewer identities or instances"
            if getattr(self.state.model, "checkpointing", None) is False:
                advice = f"set checkpointing=True and resume, or {advice}"
            told = f"epoch {epoch + 1} does not fit the memory of {self.images.device}; {advice}"
            raise RuntimeError(told) from error

    def finish(self, row: dict) -> None:
        """Save an epoch; then validate it, log it and call on_epoch with a copy of its row."""
        self._require_finite(row["epoch"], row)
        history, stop = self.state.history, False
        history.append(row)
        self.save()
        if distributed.rank() == 0:
            if self.validate and len(history) % self.validate == 0:
                row |= validation_figures(self.state.model, self.dataset)
                self.save()
            log.info(describe(history, self.config.epochs))
            try:
                self.hook(dict(row), self.state.model)
            except StopIteration:
                stop = True
        self.stopped = bool(distributed.broadcast(torch.tensor(int(stop), device=self.images.device)))

    def save(self) -> None:
        """Write the run's files after an epoch; nothing without a directory."""
        if self.directory is not None and distributed.rank() == 0:
            save_run(self.directory, self.state, self.config, self.data)

    def _require_finite(self, epoch: int, row: dict) -> None:
        bad = [k for k, v in row.items() if k.startswith("loss_") and not math.isfinite(v)]
        bad += [k for k, v in self.state.model.state_dict().items() if not torch.isfinite(v).all()]
        if bad:
            last = f"the last good checkpoint is {self.directory}, after epoch {epoch}"
            kept = last if self.directory and epoch else "nothing was saved"
            advice = "Lower lr, or set precision='fp32'"
            raise RuntimeError(f"epoch {epoch + 1} diverged: {shorten(bad, 4)} not finite; {kept}. {advice}")


@contextmanager
def open_run(
    dataset: Dataset,
    config: Config,
    output: str | Path | None,
    resume: bool,
    device: str | torch.device | None,
    on_epoch: Callable[..., object] | None,
    model: torch.nn.Module | None,
    validate: int,
) -> Iterator[Session]:
    """A run that is checked, locked and ready for its epochs; arguments and errors are those of `train`."""
    hook, place = as_hook(on_epoch), distributed.start(device)
    _check(dataset, config)
    check_validation(dataset, validate)
    distributed.require_shares(2 * config.instances, "raise instances, or start fewer processes")
    # off for the caller's autocast, and for the cache of every autocast in here: it would keep old weights
    plain = torch.autocast(place.type, enabled=False, cache_enabled=False)
    with run_directory(output) as directory, plain:
        goes_on = directory is not None and holds_run(directory)
        if goes_on and not resume:
            told = "resume it (--resume, resume=True) or choose another directory"
            raise ValueError(f"output: {directory} holds a run; {told}")
        if model is None and not goes_on:
            warn_about_start(config, place)
        model = build_model(config.replace(weights=None) if goes_on else config, place, model)
        state = State(model, trainable(model, config), build_optimizer(model, config))
        data = {**dataset_fingerprint(dataset), "root": dataset.root, "options": dataset.options}
        distributed.require_same(data["names_and_cameras"], "the data set's images and cameras")
        if goes_on:
            load_run(directory, state, config, dataset)
            log.info("going on after epoch %d of %d", len(state.history), config.epochs)
        distributed.wait()
        images = load_images(dataset, config.size, place)
        run = Session(dataset, data, config, directory, hook, validate, state, images)
        lost = directory is not None and not (directory / "model.safetensors").exists()
        if lost and len(state.history) >= config.epochs:  # else its hash, by which it is known, would change
            run.save()
        yield run
        if state.history and all(row.get("skipped") for row in state.history):
            log.warning("every epoch was skipped: this model has learned nothing")
        distributed.wait()


def as_hook(on_epoch: Callable[..., object] | None) -> Hook:
    """on_epoch as a function of a row and the model. Errors: TypeError unless it takes a row, or both."""
    if on_epoch is None:
        return lambda row, model: None
    for given in ((None,), (None, None)):
        with suppress(TypeError):
            with suppress(ValueError):  # a built-in function without a signature takes the row
                inspect.signature(on_epoch).bind(*given)
            return lambda *both: on_epoch(*both[: len(given)])
    raise TypeError(f"on_epoch must be a function of a row, or of a row and the model, got {on_epoch!r}")


def _check(dataset: Any, config: Any) -> None:
    for name, value, kind in (("dataset", dataset, Dataset), ("config", config, Config)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
    first = distributed.rank() == 0
    found = dataset.check(progress=first)
    if found.unreadable:  # then all of them are named at once
        found = dataset.check(decode=True, progress=first)
    if not found.ok:
        raise ValueError(f"the data set is not what it should be:\n{found}")
    for warning in found.warnings:
        log.warning("%s", warning)
