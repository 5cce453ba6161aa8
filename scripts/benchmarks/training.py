"""Training steps and epochs, ours beside the plain loop.

The plain loop is our version of the field's training script: fp32, a data loader that decodes and augments
one image after the other in its own processes, eager cross-entropy, a Python loop over samples that moves the
memory.
"""

import random
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.kernels import published_update
from benchmarks.sysu import in_memory
from benchmarks.table import peak_memory, reset_peak_memory, seconds, table_row
from ecul import MODALITIES, Config, open_dataset, synthesize
from ecul.augment import ERASED, MEAN, STD
from ecul.batches import draw_batches, make_batches
from ecul.labels import Labels
from ecul.optim import build_model, build_optimizer, trainable, uses_bf16
from ecul.stages import make_terms
from ecul.training import State, run_epoch, train_batches
from ecul.trainset import load_images


def rows(device, quick):
    """Rows for the table: `ours` and `published` in `unit`, the median of n; peak memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        for work, overrides, steps in sizes(device, quick):
            yield step(Path(folder), work, Config.preset("demo", **overrides), device, steps)
        root = synthesize(Path(folder) / "world", identities=16 if quick else 96, progress=False)
        demo = Config.preset("demo", **({"iterations": 2} if quick else {}))
        yield from epochs("demo recipe", open_dataset("sysu", root), demo, device)
    if device == "cuda" or quick:
        yield from epochs("SYSU-MM01's numbers", *of_sysu_size(quick), device)
    else:
        work = "training step and epoch of SYSU-MM01's numbers, ResNet-50, GPU"
        yield table_row(work, "not measured: no GPU", "s")


def sizes(device, quick):
    small = {"method": "mbccm", "linear_transform": False, "identities": 8, "instances": 4}
    if quick:
        return [("training step, depth 10", small, 2)]
    published = {**small, "depth": 50, "width": 64, "size": (288, 144), "pad": 10}
    if device == "cpu":
        few = {**published, "identities": 2, "instances": 2}
        return [("training step, depth 10", small, 10), ("training step, ResNet-50", few, 2)]
    recipe = {**published, "instances": 16}
    compiled = {**recipe, "compile": True}
    return [("training step, ResNet-50", recipe, 20), ("training step, ResNet-50, compiled", compiled, 20)]


def _open(folder, config):
    root = synthesize(folder / f"world-{config.size[0]}", identities=16, size=config.size, progress=False)
    return open_dataset("sysu", root)


def _labels(dataset, width, device):
    """Random features, and identities as labels: only the time of a step is measured."""
    people = np.unique(dataset.visible.pids)
    own = [
        torch.from_numpy(np.searchsorted(people, side.pids)) for side in (dataset.visible, dataset.infrared)
    ]
    sides = [F.normalize(torch.randn(len(y), width), dim=1) for y in own]
    features = torch.cat(sides).to(device)
    return features, Labels.from_own(features, torch.cat(own).to(device), len(own[0]))


def step(folder, work, config, device, steps):
    """Images per second of stage 1 steps: both views, losses, backward, optimiser, memory update."""
    dataset, device = _open(folder, config), torch.device(device)
    images = load_images(dataset, config.size, device)
    _, labels = _labels(dataset, 1, device)
    drawn = list(draw_batches(labels, images, config.replace(iterations=steps), np.random.default_rng(0)))
    count = steps * 3 * len(drawn[0][1])
    ours, plain = _ours(dataset, images, config, device), _plain(dataset, config, device)
    reset_peak_memory(device.type)
    ours(2)
    per_second = count / seconds(lambda: ours(steps), device.type)[0]
    memory = peak_memory(device.type)
    with FlopCounterMode(display=False) as counted:
        _ours(dataset, images, config.replace(compile=False), device)(1)
    reached = counted.get_total_flops() * steps * per_second / count / _product_rate(config, device)
    plain(drawn[:1])
    per_second_plain = count / seconds(lambda: plain(drawn), device.type)[0]
    h, w = config.size
    sizes = f"{count // steps} images {h}×{w}; {100 * reached:.0f} % of the rate of a large matrix product"
    return table_row(work, sizes, "images/s", per_second, per_second_plain, n=steps, peak_memory=memory)


def _ours(dataset, images, config, device):
    model = build_model(config, device)
    features, labels = _labels(dataset, model.num_features, device)
    terms = make_terms(features, labels, config, 0, torch.Generator().manual_seed(0))
    forward, optimizer = trainable(model, config), build_optimizer(model, config)

    def run(steps):
        generator = torch.Generator(device.type).manual_seed(0)
        few = config.replace(iterations=steps)
        batches = make_batches(labels, images, few, 1, np.random.default_rng(0), generator)
        train_batches(forward, optimizer, terms, batches, few)

    return run


class _Plain(torch.utils.data.Dataset):
    """One image after the other: decode, resize, pad-crop, flip, normalise, erase."""

    def __init__(self, dataset, batches, config):
        self.root, self.size, self.pad = Path(dataset.root), config.size, config.pad
        names = [*dataset.visible.names, *dataset.infrared.names]
        self.names = [names[i] for v, r in batches for index in (v, v, r) for i in index]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        h, w = self.size
        image = Image.open(self.root / self.names[i]).convert("RGB").resize((w, h))
        image = ImageOps.expand(image, self.pad)
        left, top = random.randint(0, 2 * self.pad), random.randint(0, 2 * self.pad)
        image = image.crop((left, top, left + w, top + h))
        if random.random() < 0.5:
            image = ImageOps.mirror(image)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        x = (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        if random.random() < 0.5:
            top, left = random.randint(0, h // 2), random.randint(0, w // 2)
            x[:, top : top + h // 3, left : left + w // 3] = torch.tensor(ERASED)[:, None, None]
        return x


def _plain(dataset, config, device):
    model = build_model(config, device).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.Adam(model.parameters(), config.lr, weight_decay=config.weight_decay)
    _, labels = _labels(dataset, model.num_features, device)
    banks = dict(zip(MODALITIES, labels.centers, strict=True))

    def run(batches):
        loader = torch.utils.data.DataLoader(
            _Plain(dataset, batches, config), 3 * len(batches[0][1]), num_workers=2
        )
        for x, pair in zip(loader, batches, strict=True):
            y = {m: labels.own[torch.from_numpy(i)] for m, i in zip(MODALITIES, pair, strict=True)}
            _plain_step(model, optimizer, banks, x.to(device), y, config)

    return run


def _plain_step(model, optimizer, banks, x, y, config):
    n = len(y["infrared"])
    visible, infrared = x.split([2 * n, n])
    features = dict(zip(MODALITIES, model(visible, infrared).split([2 * n, n]), strict=True))
    y["visible"] = y["visible"].repeat(2)
    loss = sum(F.cross_entropy(features[m] @ banks[m].T / config.temp, y[m]) for m in MODALITIES)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for m in MODALITIES:
        published_update(banks[m], features[m].detach(), y[m])


def _product_rate(config, device):
    """Operations a second of a large square product in the precision that the step runs in."""
    dtype = torch.bfloat16 if uses_bf16(config, device) else torch.float32
    size = 8192 if device.type == "cuda" else 2048
    square = torch.randn(size, size, device=device, dtype=dtype)
    seconds(lambda: square @ square, device.type)
    return 2 * size**3 / seconds(lambda: square @ square, device.type, n=9)[0]


def epochs(work, dataset, config, device):
    """Seconds of an epoch of each stage, and the share of its parts from the log's own clock."""
    device = torch.device(device)
    model = build_model(config, device)
    state = State(model, trainable(model, config), build_optimizer(model, config))
    images = load_images(dataset, config.size, device)
    for stage, epoch in ((1, 1), (2, config.epochs_intra)):
        row = run_epoch(state, images, config, epoch)
        shares = {
            part: row.get(f"seconds_{part}", 0) / row["seconds"] for part in ("extract", "labels", "train")
        }
        parts = ", ".join(f"{share:.0%} {part}" for part, share in shares.items())
        sizes = f"{len(images)} images: {parts}"
        if row.get("skipped"):
            sizes += "; skipped, for want of clusters"
        yield table_row(f"epoch of stage {stage}, {work}", sizes, "s", row["seconds"], n=1)


def of_sysu_size(quick):
    """A data set of as many images, people and cameras as SYSU-MM01 trains on, and its settings."""
    small = {"depth": 10, "width": 16, "size": (64, 32), "iterations": 2, "identities": 4, "instances": 2}
    config = Config.preset("sysu", **(small if quick else {}))
    return in_memory(0.02 if quick else 1, config.size), config
