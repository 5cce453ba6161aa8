"""Training without identity labels, from images to a model, in one loop.

    images - extract -> features (N, D), cameras, modalities
           - emcc -> labels per modality, joint labels          (N,)  -1 = outlier
           - match_clusters -> visible <-> infrared cluster pairs
           - memories -> prototypes (C, D), instance slots (N, D)
    per batch: augment -> model -> losses -> backward -> step -> memory.update

ECUL: https://arxiv.org/abs/2412.19134, MBCCM: https://arxiv.org/abs/2305.12673
"""

import logging
import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

from ecul import MODALITIES
from ecul.batches import augmented, identity, load_piles
from ecul.common import distributed
from ecul.common.logs import logging_to_stderr
from ecul.common.names import shorten
from ecul.config import Config
from ecul.data.dataset import Dataset
from ecul.features import embed_pixels
from ecul.losses import agreement_loss
from ecul.optim import build_model, build_optimizer, set_lr, trainable, uses_bf16, warn_of_start
from ecul.run.checkpoint import load_run, run_directory, save_run
from ecul.run.log import LEGEND, describe, label_scores, monitors
from ecul.stages import assign_labels, make_batches, make_terms, share_labels, usable

log = logging.getLogger("ecul")


@dataclass(repr=False)
class Run:
    """What `train` returns: the model (in eval mode), a dict per epoch, the run directory or None."""

    model: torch.nn.Module
    history: list
    output: object

    def __repr__(self):
        where = "no directory" if self.output is None else str(self.output)
        return f"Run({type(self.model).__name__}, {len(self.history)} epochs, {where})"


@dataclass
class State:
    """All that an epoch changes, and all that a run needs to go on."""

    model: torch.nn.Module
    forward: torch.nn.Module  # the model as the batches see it: compiled, or one of several processes
    optimizer: torch.optim.Optimizer
    history: list = field(default_factory=list)
    labels: dict | None = None  # of the last epoch, for the stability score
    best: dict | None = None  # weights of the best score so far, when these are kept
    kept: int | None = None  # the epochs behind the weights, once the best were put back


@logging_to_stderr()
def train(dataset, config=None, *, output=None, resume=False, device=None, on_epoch=None, model=None):
    """Train a visible-infrared model on unlabelled images.

    dataset: a `Dataset` (`open_dataset`, `Dataset.from_arrays`, `Dataset.from_folders`); its identities, if
    any, are read by the monitors of the log alone. config: a `Config`, by default `Config()`. output: the
    run directory, None for none; resume: go on with the run that is there. device: by default the GPU when
    there is one. on_epoch(row): called with each epoch's dict. model: a backbone of one's own, any module
    with `num_features` that maps (N, 3, H, W) to (N, num_features), or one with `embed` like
    `TwoStreamResNet`. Under torchrun the processes share one run. Returns a `Run`: the last epoch's weights,
    or those of the best label-free score with `keep="score"`.

    Errors, all before any work: an incomplete data set, an output directory that cannot be used or holds
    another run, weights of another architecture. An epoch without two clusters a modality is skipped with a
    warning; a loss that is not finite ends the run with a RuntimeError that names the last good checkpoint.
    Source: ECUL and MBCCM.
    """
    config = config or Config()
    if on_epoch is not None and not callable(on_epoch):
        raise TypeError(f"on_epoch must be a function of a row, got {on_epoch!r}")
    _check(dataset, config)
    device = distributed.start(device)
    with run_directory(output, hold=distributed.rank() == 0) as directory:
        goes_on = directory is not None and (directory / "resume.safetensors").exists()
        if resume and directory is not None and not goes_on:
            log.info("there is no run in %s yet: starting anew", output)
        if goes_on and not resume:
            raise ValueError(
                f"output: {directory} holds a run; resume it (--resume, resume=True) or choose another"
            )
        if model is None and not goes_on:
            warn_of_start(config, device)
        model = build_model(config.replace(weights=None) if goes_on else config, device, model)
        state = State(model, trainable(model, config), build_optimizer(model, config))
        data, source = identity(dataset), {"root": dataset.root, "options": dataset.options}
        distributed.require_same(data["names_and_cameras"], "the data set's images and cameras")
        if goes_on:
            load_run(directory, state, config, data)
            log.info("going on after epoch %d of %d", len(state.history), config.epochs)
        distributed.wait()
        if config.epochs == 0 and directory is not None and distributed.rank() == 0:
            save_run(directory, state, config, data, source)
        piles = load_piles(dataset, config.size, device)
        log.info(LEGEND)
        for epoch in tqdm(range(len(state.history), config.epochs), desc="epochs", disable=_quiet()):
            row = _guarded_epoch(state, piles, config, epoch, directory)
            if distributed.rank() == 0:
                log.info(describe(row))
                if directory is not None:
                    save_run(directory, state, config, data, source)
                if on_epoch is not None:
                    on_epoch(row)
        if config.keep == "score" and config.epochs and state.kept is None:
            _finish_with_best(state, piles, config, data, directory, source)
        if state.history and all(row.get("skipped") for row in state.history):
            log.warning("every epoch was skipped: this model has learned nothing")
        distributed.wait()
        return Run(model.eval(), state.history, directory)


def run_epoch(state, piles, config, epoch):
    """One epoch: extract, cluster, match, remember, learn. Returns its row of the log."""
    began = time.perf_counter()
    device = next(state.model.parameters()).device
    rng = np.random.default_rng([config.seed, epoch])
    seed = int(rng.integers(2**62))
    generators = {d: torch.Generator(d).manual_seed(seed) for d in dict.fromkeys(("cpu", device.type))}
    set_lr(state.optimizer, config, epoch)

    features, labels, row = look(state, piles, config, epoch)
    looked = time.perf_counter()
    if not usable(labels.own):
        scattered = any(2 * row[f"outliers_{m}"] > len(features[m]) for m in MODALITIES)
        advice = "raise eps or lower min_samples" if scattered else "lower eps or k1, or start from weights"
        log.warning("epoch %d skipped: fewer than two clusters in a modality; %s", epoch + 1, advice)
        return row | {"skipped": True, "seconds": looked - began}

    cameras = {m: piles[m].cameras for m in MODALITIES}
    terms = make_terms(features, labels, config, epoch, generators["cpu"])
    for term in terms:
        distributed.broadcast(term.memory.features)
    batches = make_batches(labels, cameras, config, rng)
    row |= learn(state.forward, state.optimizer, piles, terms, batches, config, generators)
    ended = time.perf_counter()
    row |= {"seconds_train": ended - looked, "seconds": ended - began}
    return row | {"images_per_second": row.pop("images") / row["seconds_train"]}


def look(state, piles, config, epoch):
    """Extract and label with the current weights; returns features, labels and what the log says of them."""
    cross = config.epochs_intra <= epoch
    row = {"epoch": epoch, "stage": 2 if cross else 1, "lr": state.optimizer.param_groups[0]["lr"]}
    began = time.perf_counter()
    features = {m: extract_shared(state.model, piles[m].pixels, m, config) for m in MODALITIES}
    distributed.finish(features["visible"].device)
    extracted = time.perf_counter()
    cameras = {m: piles[m].cameras for m in MODALITIES}
    labels = assign_labels(features, cameras, config, cross) if distributed.rank() == 0 else None
    labels = share_labels(labels, features)
    row |= {"seconds_extract": extracted - began, "seconds_labels": time.perf_counter() - extracted}
    row |= labels.counts() | label_scores(features, labels, state.labels) | monitors(labels, piles)
    state.labels = labels.own
    best = max((r["score"] for r in state.history[1:]), default=-math.inf)  # epoch 0 rates untrained weights
    if config.keep == "score" and state.history and row["score"] > best:
        state.best = {k: v.clone() for k, v in state.model.state_dict().items()}
    return features, labels, row


def extract_shared(model, pixels, modality, config):
    """Every image's features on every process, each process embedding its share."""
    own = pixels[distributed.share(len(pixels))]
    autocast = uses_bf16(config, next(model.parameters()).device)
    rows = embed_pixels(model, own, modality, config.batch_extract, progress=not _quiet(), autocast=autocast)
    return distributed.gather(rows, len(pixels))


def learn(forward, optimizer, piles, terms, batches, config, generators):
    """Run the epoch's batches; returns the mean of each loss and the number of views embedded."""
    device = next(forward.parameters()).device
    autocast = uses_bf16(config, device)
    forward.train()
    totals: dict[str, torch.Tensor | int] = {}
    steps, images = 0, 0
    for pair in tqdm(batches, total=config.iterations, desc="batches", disable=_quiet(), leave=False):
        drawn = {m: torch.from_numpy(i) for m, i in zip(MODALITIES, pair, strict=True)}
        index = {m: i.to(device, non_blocking=True) for m, i in drawn.items()}
        views = augmented(piles, drawn, config, generators[device.type], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            features = embed_batch(forward, views)
        losses = {t.name: t.weight * t.loss(features, index) for t in terms}
        losses |= consistency(terms, features, config)
        optimizer.zero_grad(set_to_none=True)
        total = torch.stack(list(losses.values())).sum()
        (total * distributed.size()).backward()  # gradients are averaged over processes
        optimizer.step()
        for term in terms:
            term.update(features, index, generators["cpu"])
        for name, loss in losses.items():
            totals[name] = totals.get(name, 0) + loss.detach()
        steps, images = steps + 1, images + sum(map(len, views.values()))
    for buffer in forward.buffers():
        distributed.broadcast(buffer)
    return {f"loss_{name}": float(total) / steps for name, total in totals.items()} | {"images": images}


def embed_batch(forward, views):
    """The features of a batch's views by modality; each process embeds its share, all get all."""
    own = {m: views[m][distributed.share(len(views[m]))] for m in MODALITIES}
    embedded = forward(own["visible"], own["infrared"]).float().split([len(own[m]) for m in MODALITIES])
    return {m: distributed.gather(f, len(views[m])) for m, f in zip(MODALITIES, embedded, strict=True)}


def consistency(terms, features, config):
    """MBCCM's consistency constraint between specific and agnostic memories, summed over the three views."""
    memories = {t.name: t.memory for t in terms}
    if config.weight_consistency == 0 or "agnostic_visible" not in memories:
        return {}
    specific, agnostic = (
        {m: memories[f"{kind}_{m}"] for m in MODALITIES} for kind in ("cluster", "agnostic")
    )
    views = [*features["visible"].chunk(2), features["infrared"]]
    return {
        "consistency": config.weight_consistency * sum(agreement_loss(specific, agnostic, v) for v in views)
    }


def _guarded_epoch(state, piles, config, epoch, directory):
    """`run_epoch`, added to the history unless the weights diverged: the last good checkpoint then stays."""
    row = {}
    try:
        row = run_epoch(state, piles, config, epoch)
    except ValueError as error:
        _require_finite(epoch, row, state.model, directory)
        raise error
    except torch.OutOfMemoryError as error:
        advice = "set checkpointing=True, or fewer identities or instances (a smaller batch, other negatives)"
        raise RuntimeError(
            f"epoch {epoch + 1}: the device's memory is too small for this recipe; {advice}"
        ) from error
    except RuntimeError as error:
        if distributed.size() == 1:
            raise
        raise RuntimeError(
            f"epoch {epoch + 1} failed in process {distributed.rank()} of {distributed.size()}, maybe "
            f"because another ended: {error}. Start again with "
            "resume=True: it goes on from the last finished epoch"
        ) from error
    _require_finite(epoch, row, state.model, directory)
    state.history.append(row)
    return row


def _require_finite(epoch, row, model, directory):
    bad = [k for k, v in row.items() if k.startswith("loss_") and not math.isfinite(v)]
    bad += [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
    if bad:
        kept = (
            f"the last good checkpoint is {directory}, after epoch {epoch}"
            if directory and epoch
            else "nothing was saved"
        )
        raise RuntimeError(
            f"epoch {epoch + 1} diverged: {shorten(bad, 4)} not finite; {kept}. "
            "Lower lr, or set precision='fp32'"
        )


def _finish_with_best(state, piles, config, data, directory, source):
    """Rate the last weights too, then put the best ones back."""
    row = look(state, piles, config, config.epochs - 1)[2]
    scores = [r["score"] for r in (*state.history[1:], row)]  # of the weights after 1, 2, ... epochs
    state.kept = 1 + scores.index(max(scores))
    if distributed.rank() == 0:
        kept = (state.kept, config.epochs, max(scores))
        log.info("the weights after %d of %d epochs are kept: score %.3f", *kept)
    state.model.load_state_dict(state.best)
    if directory is not None and distributed.rank() == 0:
        save_run(directory, state, config, data, source)


def _check(dataset, config):
    for name, value, kind in (("dataset", dataset, Dataset), ("config", config, Config)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
    report = dataset.check()
    if report.unreadable:  # then all of them are named at once
        report = dataset.check(decode=True)
    if not report.ok:
        raise ValueError(f"the data set is not what it should be:\n{report}")
    for warning in report.warnings:
        log.warning("%s", warning)


def _quiet():
    """tqdm's `disable`: another process speaks, or (None) stderr is not a terminal."""
    return True if distributed.rank() else None
