"""Training steps and epochs, ours beside the plain loop.

The plain loop is our restatement of the field's training script: fp32, a data loader that decodes and
augments one image after the other in its own processes, eager cross-entropy, a Python loop over samples to
move the memory.
"""

import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from benchmarks.clustering import peak_memory, reset_peak_memory, seconds
from benchmarks.table import table_row
from ecul import MODALITIES, Config, open_dataset, synthesize
from ecul.augment import ERASED, MEAN, STD
from ecul.journal import PARTS
from ecul.memory import cluster_means
from ecul.stages import Labels, make_batches, make_terms
from ecul.training import State, build_model, build_optimizer, learn, load_piles, run_epoch, trainable


def rows(device, quick):
    """Rows for the table: `ours` and `published` in `unit`, the median of n; peak memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        for work, overrides, steps in _sizes(device, quick):
            yield _step(Path(folder), work, Config.preset("demo", **overrides), device, steps)
        yield from _epoch(Path(folder), device, quick)
        if device == "cpu":
            for work in (
                "training step, 384 images 288×144, ResNet-50, one GPU",
                "SYSU-scale epoch, one GPU",
            ):
                yield table_row(work, "not measured: needs a GPU", "images/s")


def _sizes(device, quick):
    small = {"method": "mbccm", "linear_transform": False, "identities": 8, "instances": 4}
    if quick:
        return [("training step, depth 10", small, 2)]
    published = {**small, "depth": 50, "width": 64, "size": (288, 144), "pad": 10}
    if device == "cpu":
        few = {**published, "identities": 2, "instances": 2}
        return [("training step, depth 10", small, 10), ("training step, ResNet-50", few, 2)]
    return [("training step, ResNet-50", {**published, "instances": 16}, 20)]


def _open(folder, config):
    root = synthesize(folder / f"world-{config.size[0]}", identities=16, size=config.size, progress=False)
    return open_dataset("sysu", root)


def _labels(dataset):
    """Identities as labels: the benchmark times the step, whatever the clusters are."""
    ids = np.unique(dataset.visible.pids)
    return {m: torch.from_numpy(np.searchsorted(ids, getattr(dataset, m).pids)) for m in MODALITIES}


def _step(folder, work, config, device, steps):
    """Images per second of stage 1 steps: both views, losses, backward, optimiser, memory update."""
    dataset, device = _open(folder, config), torch.device(device)
    labels = _labels(dataset)
    batches = list(_batches(dataset, labels, config, steps))
    images = steps * 3 * len(batches[0][1])
    ours, plain = _ours(dataset, labels, config, device), _plain(dataset, labels, config, device)
    reset_peak_memory(device.type)
    ours(batches[:1])
    per_second = images / seconds(lambda: ours(batches), device.type)[0]
    memory = peak_memory(device.type)
    plain(batches[:1])
    per_second_plain = images / seconds(lambda: plain(batches), device.type)[0]
    h, w = config.size
    sizes = f"{images // steps} images {h}×{w}"
    return table_row(work, sizes, "images/s", per_second, per_second_plain, n=steps, peak_memory=memory)


def _batches(dataset, labels, config, steps):
    cameras = {m: torch.from_numpy(getattr(dataset, m).camids) for m in MODALITIES}
    config = config.replace(iterations=steps)
    return make_batches(Labels(labels), cameras, config, np.random.default_rng(0))


def _ours(dataset, labels, config, device):
    model = build_model(config, device)
    piles = load_piles(dataset, config.size, device)
    features = {
        m: F.normalize(torch.randn(len(labels[m]), model.num_features), dim=1).to(device) for m in MODALITIES
    }
    own = Labels({m: labels[m].to(device) for m in MODALITIES})
    generators = {d: torch.Generator(d).manual_seed(0) for d in {"cpu", device.type}}
    terms = make_terms(features, own, config, 0, generators["cpu"])
    forward, optimizer = trainable(model, config), build_optimizer(model, config)
    return lambda batches: learn(forward, optimizer, piles, terms, batches, config, generators)


class _Plain(torch.utils.data.Dataset):
    """One image after the other: decode, resize, pad-crop, flip, normalise, erase."""

    def __init__(self, dataset, batches, config):
        self.root, self.size, self.pad = Path(dataset.root), config.size, config.pad
        self.names = [
            names[i]
            for pair in batches
            for names, index, views in zip(
                (dataset.visible.names, dataset.infrared.names), pair, (2, 1), strict=True
            )
            for _ in range(views)
            for i in index
        ]

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


def _plain(dataset, labels, config, device):
    model = build_model(config, device).to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.Adam(model.parameters(), config.lr, weight_decay=config.weight_decay)
    banks = {
        m: cluster_means(torch.randn(len(labels[m]), model.num_features), labels[m]).to(device)
        for m in MODALITIES
    }

    def run(batches):
        loader = torch.utils.data.DataLoader(
            _Plain(dataset, batches, config), 3 * len(batches[0][1]), num_workers=2
        )
        for x, pair in zip(loader, batches, strict=True):
            y = {m: labels[m][torch.from_numpy(i)].to(device) for m, i in zip(MODALITIES, pair, strict=True)}
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
        for f, c in zip(features[m].detach(), y[m], strict=True):
            banks[m][c] = F.normalize(config.momentum * banks[m][c] + (1 - config.momentum) * f, dim=0)


def _epoch(folder, device, quick):
    """The share of each stage in an epoch of the demo recipe, from the log's own clock."""
    config = Config.preset("demo", **({"iterations": 2} if quick else {}))
    root = synthesize(folder / "world-epoch", identities=16 if quick else 96, progress=False)
    device = torch.device(device)
    model = build_model(config, device)
    state = State(model, trainable(model, config), build_optimizer(model, config))
    piles = load_piles(open_dataset("sysu", root), config.size, device)
    for stage, epoch in ((1, 1), (2, config.epochs_intra)):
        began = time.perf_counter()
        row = run_epoch(state, piles, config, epoch)
        whole = time.perf_counter() - began
        shares = ", ".join(f"{100 * row[f'seconds_{part}'] / whole:.0f} % {part}" for part in PARTS)
        sizes = f"{sum(len(p.pixels) for p in piles.values())} images: {shares}"
        yield table_row(f"epoch of stage {stage}, demo recipe", sizes, "s", whole, n=1)
