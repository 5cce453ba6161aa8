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
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from .augment import train_view
from .checkpoint import load_run, run_directory, save_run
from .config import Config
from .features import embed_pixels
from .losses import agreement_loss
from .model import TwoStreamResNet
from .scores import adjusted_rand
from .stages import MODALITIES, assign_labels, make_batches, make_terms, usable

log = logging.getLogger("ecul")


@dataclass
class Run:
    """What `train` returns: the model (in eval mode), a dict per epoch, the run directory or None."""

    model: torch.nn.Module
    history: list
    output: object


@dataclass(frozen=True)
class Pile:
    """One modality's training images: pixels uint8 (N, 3, H, W), cameras (N,), identities (monitors)."""

    pixels: torch.Tensor
    cameras: torch.Tensor
    identities: np.ndarray | None

    def take(self, index, device):
        """The images at this index, on the device that trains."""
        return self.pixels[index.to(self.pixels.device)].to(device, non_blocking=True)


def train(dataset, config=None, *, output=None, resume=False, device=None, on_epoch=None):
    """Train a visible-infrared model on unlabelled images.

    dataset: a `Dataset` (`open_dataset`, `Dataset.from_arrays`, `Dataset.from_folders`); its identities, if
    any, are read by the monitors of the log alone. config: a `Config`, by default `Config()`. output: the
    run directory, None for none; resume: go on with the run that is there. device: by default the GPU when
    there is one. on_epoch(row): called with each epoch's dict. Returns a `Run`; the last epoch is the result.

    Errors, all before any work: an incomplete data set, an output directory that cannot be used or holds
    another run, weights of another architecture. An epoch without two clusters a modality is skipped with a
    warning; a loss that is not finite ends the run with a RuntimeError that names the last good checkpoint.
    Source: ECUL and MBCCM, METHOD sections 3 to 6.
    """
    config = config or Config()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    _check(dataset)
    with run_directory(output) as directory:
        model = build_model(config, device)
        optimizer = build_optimizer(model, config)
        identity = {"dataset": dataset.name, **{f"{m}_images": len(getattr(dataset, m)) for m in MODALITIES}}
        history = []
        if directory is not None:
            if resume:
                history = load_run(directory, model, optimizer, config, identity)
            elif (directory / "resume.safetensors").exists():
                raise ValueError(
                    f"output: {directory} already holds a run; pass resume=True or another directory"
                )
        piles = load_piles(dataset, config.size, device)
        for epoch in tqdm(range(len(history), config.epochs), desc="epochs", disable=None):
            try:
                row = run_epoch(model, optimizer, piles, config, epoch)
            except ValueError as e:
                _require_finite(epoch, {}, model, directory)
                raise e
            _require_finite(epoch, row, model, directory)
            history.append(row)
            log.info(describe(row))
            if directory is not None:
                metadata = {"method": config.method, "dataset": dataset.name, "epoch": epoch + 1}
                save_run(directory, model, optimizer, config, history, identity, metadata)
            if on_epoch is not None:
                on_epoch(row)
        return Run(model.eval(), history, directory)


def run_epoch(model, optimizer, piles, config, epoch):
    """One epoch: extract, cluster, match, remember, learn. Returns its row of the log."""
    began = time.perf_counter()
    device = next(model.parameters()).device
    rng = np.random.default_rng([config.seed, epoch])
    generators = {d: torch.Generator(d).manual_seed(int(rng.integers(2**62))) for d in {"cpu", device.type}}
    autocast = uses_bf16(config, device)
    set_lr(optimizer, config, epoch)
    cross = epoch >= config.epochs_intra
    row = {"epoch": epoch, "stage": 2 if cross else 1, "lr": optimizer.param_groups[0]["lr"]}

    features = {
        m: embed_pixels(model, piles[m].pixels, m, config.batch_extract, autocast=autocast)
        for m in MODALITIES
    }
    cameras = {m: piles[m].cameras for m in MODALITIES}
    labels = assign_labels(features, cameras, config, cross)
    row |= labels.counts() | monitors(labels, piles)
    prepared = time.perf_counter()
    row["seconds_labels"] = prepared - began
    if not usable(labels.own):
        log.warning(
            "epoch %d skipped: fewer than two clusters in a modality; loosen eps or min_samples", epoch
        )
        return row | {"skipped": True, "seconds": prepared - began}

    terms = make_terms(features, labels, config, epoch, generators["cpu"])
    batches = make_batches(labels, cameras, config, rng)
    row |= learn(model, optimizer, piles, terms, batches, config, generators, autocast)
    ended = time.perf_counter()
    images = row.pop("images")
    return row | {"seconds": ended - began, "images_per_second": images / (ended - prepared)}


def learn(model, optimizer, piles, terms, batches, config, generators, autocast=False):
    """Run the epoch's batches; returns the mean of each loss and the number of images seen."""
    device = next(model.parameters()).device
    model.train()
    totals, steps, images = {}, 0, 0
    for pair in tqdm(batches, total=config.iterations, desc="batches", disable=None, leave=False):
        index = {
            m: torch.from_numpy(i).to(device, non_blocking=True)
            for m, i in zip(MODALITIES, pair, strict=True)
        }
        views = augment(piles, index, config, generators[device.type], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            embedded = model(views["visible"], views["infrared"])
        sizes = [len(views[m]) for m in MODALITIES]
        features = dict(zip(MODALITIES, embedded.float().split(sizes), strict=True))
        losses = {t.name: t.weight * t.loss(features, index) for t in terms}
        losses |= consistency(terms, features, config)
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        for term in terms:
            term.update(features, index, generators["cpu"])
        for name, loss in losses.items():
            totals[name] = totals.get(name, 0) + loss.detach()
        steps, images = steps + 1, images + sum(sizes)
    return {f"loss_{name}": float(total) / steps for name, total in totals.items()} | {"images": images}


def augment(piles, index, config, generator, device):
    """The batch's views: visible view 1 then view 2 (channel exchange), and infrared."""
    visible = piles["visible"].take(index["visible"], device)
    infrared = piles["infrared"].take(index["infrared"], device)
    views = [
        train_view(visible, "visible", config.pad, generator, config.linear_transform),
        train_view(visible, "exchanged", config.pad, generator),
        train_view(infrared, "infrared", config.pad, generator),
    ]
    visible, infrared = torch.cat(views[:2]), views[2]
    return {
        "visible": visible.contiguous(memory_format=torch.channels_last),
        "infrared": infrared.contiguous(memory_format=torch.channels_last),
    }


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


def build_model(config, device):
    """The network of this configuration, initialised from its seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = TwoStreamResNet(config.depth, config.width, config.non_local, config.size)
    if config.weights is not None:
        model.load_backbone(config.weights)
    return model.to(device, memory_format=torch.channels_last)


def build_optimizer(model, config):
    """Adam over every parameter that learns."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.Adam(parameters, config.lr, weight_decay=config.weight_decay, fused=True)


def set_lr(optimizer, config, epoch):
    """Step decay: the rate is multiplied by lr_gamma at each milestone reached."""
    lr = config.lr * config.lr_gamma ** sum(epoch >= m for m in config.lr_milestones)
    for group in optimizer.param_groups:
        group["lr"] = lr


def load_piles(dataset, size, device):
    """Both modalities' images as uint8 tensors on the device."""
    piles = {}
    for m in MODALITIES:
        images = getattr(dataset, m)
        cameras = torch.as_tensor(images.camids, device=device)
        piles[m] = Pile(images.load(size).to(device), cameras, images.pids)
    return piles


def uses_bf16(config, device):
    """Whether the forward pass runs under bf16 autocast: asked for, or "auto" on a GPU that has it."""
    if config.precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return config.precision == "bf16"


def monitors(labels, piles):
    """Adjusted Rand index of the labels with the identities, where they are known: for the reader alone."""
    row = {}
    for m in MODALITIES:
        if piles[m].identities is not None:
            row[f"monitor_ari_{m}"] = adjusted_rand(labels.own[m].cpu().numpy(), piles[m].identities)
    if labels.joint is not None and len(row) == len(MODALITIES):
        joint = torch.cat([labels.joint[m] for m in MODALITIES]).cpu().numpy()
        row["monitor_ari_joint"] = adjusted_rand(
            joint, np.concatenate([piles[m].identities for m in MODALITIES])
        )
    return row


def describe(row):
    """One line of text for one epoch."""
    clusters = "/".join(str(v) for k, v in row.items() if k.startswith("clusters_"))
    outliers = "/".join(str(v) for k, v in row.items() if k.startswith("outliers_"))
    loss = sum(v for k, v in row.items() if k.startswith("loss_"))
    text = f"epoch {row['epoch']:3d} stage {row['stage']} clusters {clusters} outliers {outliers}"
    text += f" loss {loss:.3f}"
    if "images_per_second" in row:
        text += f" {row['seconds']:.1f} s {row['images_per_second']:.0f} images/s"
    monitored = "/".join(f"{v:.2f}" for k, v in row.items() if k.startswith("monitor_"))
    return text + (f" (monitor: ARI {monitored})" if monitored else "")


def _require_finite(epoch, row, model, directory):
    """End a diverged run before it overwrites the last good checkpoint."""
    bad = [k for k, v in row.items() if k.startswith("loss_") and not math.isfinite(v)]
    bad += [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
    if bad:
        kept = (
            f"the last good checkpoint is {directory}, epoch {epoch}"
            if directory and epoch
            else "nothing was saved"
        )
        named = ", ".join(bad[:4]) + (" ..." if len(bad) > 4 else "")
        raise RuntimeError(
            f"epoch {epoch} diverged: {named} not finite; {kept}. Lower lr, or set precision='fp32'"
        )


def _check(dataset):
    report = dataset.check()
    if not report.ok:
        raise ValueError(f"the data set is not what it should be:\n{report}")
    for warning in report.warnings:
        log.warning("%s", warning)
