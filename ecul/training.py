"""Training without identity labels, from images to a model, in one loop.

    images - extract -> features (N, D), cameras, modalities
           - emcc -> labels per modality, joint labels          (N,)  -1 = outlier
           - match_clusters -> visible <-> infrared cluster pairs
           - memories -> prototypes (C, D), instance slots (N, D)
    per batch: augment -> model -> losses -> backward -> step -> term.update

ECUL: https://arxiv.org/abs/2412.19134, MBCCM: https://arxiv.org/abs/2305.12673
"""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ecul.batches import Batch, make_batches
from ecul.common import distributed, logs
from ecul.common.logs import logging_to_stderr
from ecul.config import Config
from ecul.data.dataset import Dataset
from ecul.features import embed_pixels
from ecul.labels import assign_labels
from ecul.optim import set_lr, uses_bf16
from ecul.run.log import fell_apart, label_score, monitors
from ecul.run.saved import State
from ecul.run.session import open_run
from ecul.stages import Term, make_terms
from ecul.trainset import TrainImages

log = logging.getLogger("ecul")


@dataclass
class Run:
    """What `train` returns: the model (in eval mode), a dict per epoch, the run directory or None."""

    model: torch.nn.Module = field(repr=False)
    history: list[dict] = field(repr=False)
    output: Path | None


@logging_to_stderr()
def train(
    dataset: Dataset,
    config: Config | None = None,
    *,
    output: str | Path | None = None,
    resume: bool = False,
    device: str | torch.device | None = None,
    on_epoch: Callable[..., object] | None = None,
    model: torch.nn.Module | None = None,
    validate: int = 0,
) -> Run:
    """Train a visible-infrared model on unlabelled images.

    dataset: a `Dataset` (`open_dataset`, `Dataset.from_arrays`, `Dataset.from_folders`); its identities, if
    any, are read by the monitors of the log only. config: a `Config`, by default `Config()`. output: the
    run directory, None for none; resume: go on with the run that is there (`ecul.run.saved.load_run`
    says what may change). device: by default the GPU when there is one. on_epoch(row) or
    on_epoch(row, model): called after each epoch with a copy of its dict, and with the model where it takes
    two; by `raise StopIteration` it ends the run here, as if these had been all epochs. model: a backbone of
    one's own: any module with `num_features` that maps (N, 3, H, W) to (N, num_features), or one with `embed`
    like `TwoStreamResNet`. validate: every so many epochs evaluate the test images of a data set opened with
    `validation`, or of one's own; the log has the figures, and nothing is selected by them. Under torchrun
    the processes share one run. Returns a `Run` with the last epoch's weights.

    Errors, before any work: an incomplete data set, an output directory that cannot be used or holds another
    run, weights of another architecture, more processes than two clusters have images in a batch. Later: an
    epoch without two clusters a modality is skipped with a warning; a loss that is not finite ends the run
    with a RuntimeError that names the last good checkpoint.
    Source: ECUL and MBCCM.
    """
    config = config or Config()
    with open_run(dataset, config, output, resume, device, on_epoch, model, validate) as run:
        for epoch in run.epochs():
            with run.guarded(epoch):
                row = run_epoch(run.state, run.images, config, epoch)
            run.finish(row)
    return Run(run.state.model.eval(), run.state.history, run.directory)


def run_epoch(state: State, images: TrainImages, config: Config, epoch: int) -> dict:
    """One epoch: extract, cluster, match, remember, learn. Returns its row of the log."""
    began, rng = _now(images.device), np.random.default_rng([config.seed, epoch])
    seed, device = int(rng.integers(2**62)), images.device
    on_host = torch.Generator().manual_seed(seed)  # on a CPU the draws of both take turns
    on_device = on_host if device.type == "cpu" else torch.Generator(device.type).manual_seed(seed)
    stage = 1 if epoch < config.epochs_intra else 2
    set_lr(state.optimizer, config, epoch)

    features = extract_all(state.model, images, config)
    exchanged = extract_exchanged(state.model, images, config, stage)
    extracted = _now(device)
    labels = assign_labels(features, images, config, stage, exchanged)  # emcc, match_clusters
    row = {"epoch": epoch, "stage": stage, "lr": state.optimizer.param_groups[0]["lr"]}
    labelled = _now(device)
    row |= {"seconds_extract": extracted - began, "seconds_labels": labelled - extracted}
    row |= labels.counts() | {"score": label_score(features, labels)}
    row |= monitors(labels, images.identities) | fell_apart(row, state.history, len(images))
    if not labels.enough:
        scattered = any(2 * int((side < 0).sum()) > len(side) for side in labels.sides.values())
        advice = "raise eps or lower min_samples" if scattered else "lower eps or k1, or start from weights"
        log.warning("epoch %d skipped: fewer than two clusters in a modality; %s", epoch + 1, advice)
        return row | {"skipped": True, "seconds": _now(device) - began}

    terms = make_terms(features, labels, config, epoch, on_host)
    batches = make_batches(labels, images, config, stage, rng, on_device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed + distributed.rank())  # for layers that draw, such as dropout
        row |= train_batches(state.forward, state.optimizer, terms, batches, config)
    ended = _now(device)
    row |= {"seconds_train": ended - labelled, "seconds": ended - began}
    return row | {"images_per_second": row.pop("images") / row["seconds_train"]}


def _now(device: torch.device) -> float:
    """The time in seconds, when the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def extract_all(model: torch.nn.Module, images: TrainImages, config: Config) -> torch.Tensor:
    """Unit features (N, D) of every image on every process, each process embedding its share."""
    visible, infrared = images.pixels
    found = [_extract(model, visible, "visible", config), _extract(model, infrared, "infrared", config)]
    return torch.cat(found)


def extract_exchanged(
    model: torch.nn.Module, images: TrainImages, config: Config, stage: int
) -> torch.Tensor | None:
    """Unit features (3, num_visible, D) of the visible images' three channels through the infrared stem.

    Each channel is given like a grey image: copied into all three, then normalised. None where exchanged
    views do not pass that stem in training, or where no loss reads mutual matches.
    """
    if not (config.exchanged_crosses(stage) and config.matching == "mutual" and config.reads_matches):
        return None
    views = [channel.expand(-1, 3, -1, -1) for channel in images.pixels[0].split(1, dim=1)]
    return torch.stack([_extract(model, view, "infrared", config, flip=False) for view in views])


def _extract(
    model: torch.nn.Module, pixels: torch.Tensor, modality: str, config: Config, flip: bool = True
) -> torch.Tensor:
    own, shown = pixels[distributed.share(len(pixels))], not distributed.rank()
    autocast = uses_bf16(config, next(model.parameters()).device)
    found = embed_pixels(model, own, modality, config.batch_extract, flip, shown, autocast)
    return distributed.join(found, len(pixels))


def train_batches(
    forward: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    terms: list[Term],
    batches: Iterable[Batch],
    config: Config,
) -> dict:
    """Run the epoch's batches; returns the mean of each loss and the number of views embedded.

    Under autocast the losses take the products of half precision, as the network does: `memory_contrast`.
    """
    device = next(forward.parameters()).device
    totals: dict[str, torch.Tensor] = {}
    steps, views = 0, 0
    forward.train()
    for batch in logs.progress(config.iterations, "batches", "step", not distributed.rank(), batches):
        with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(config, device)):
            x = embed_batch(forward, batch)
            losses = {term.name: term.loss(x, batch) for term in terms}
        optimizer.zero_grad(set_to_none=True)
        total = torch.stack(list(losses.values())).sum()
        (total * distributed.size()).backward()  # gradients are averaged over processes
        optimizer.step()
        for term in terms:
            term.update(x, batch)
        for name, loss in losses.items():
            totals[name] = totals.get(name, 0) + loss.detach()
        steps, views = steps + 1, views + len(x)
    for buffer in forward.buffers():
        distributed.broadcast(buffer)
    return {f"loss_{name}": float(value) / steps for name, value in totals.items()} | {"images": views}


def embed_batch(forward: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The features (2V + R, D) float32 of a batch; each process embeds its share of both modalities."""
    shares = [v[distributed.share(len(v))] for v in batch.views]
    parts = forward(*shares).float().split([len(v) for v in shares])
    return torch.cat([distributed.join(part, len(v)) for part, v in zip(parts, batch.views, strict=True)])
