"""Start weights in place of ImageNet's: trained with identities on visible images alone.

The images are those of a world that no line runs on; nothing infrared is ever seen. The file holds
torchvision's names, as `Config(weights=...)` reads them.
"""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tqdm import tqdm

from ecul import Config, open_dataset, synthesize
from ecul.augment import train_view
from ecul.common.weights import write_tensors
from ecul.optim import build_model

SEED = 900


def make_start(
    path: Path, folder: Path, render: dict, preset: str, steps: int = 1500, batch: int = 96
) -> Path:
    """Train on the visible images of world SEED, rendered in `folder`, and write the weights.

    An existing file is kept if it was made with the same settings, else ValueError.
    """
    world = {**render, "identities": 480, "test_identities": 1, "images": 2}
    made = {"world": json.dumps(world), "preset": preset, "steps": str(steps), "batch": str(batch)}
    if path.exists():
        with safe_open(path, "pt") as file:
            if {k: v for k, v in file.metadata().items() if k in made} != made:
                raise ValueError(f"{path} holds weights made in another way; remove it to make them anew")
        return path
    images = open_dataset("sysu", synthesize(folder, seed=SEED, **world)).visible
    config = Config.preset(preset, seed=SEED)
    pixels, generator = images.load(config.size), torch.Generator().manual_seed(SEED)
    labels = torch.from_numpy(np.unique(images.pids, return_inverse=True)[1])
    model = build_model(config, torch.device("cpu")).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        head = torch.nn.Linear(model.num_features, int(labels.max()) + 1, bias=False)
    learned = [p for p in (*model.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.Adam(learned, 2e-3, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc="start weights", disable=None):
        drawn = torch.randint(len(pixels), (batch,), generator=generator)
        x = train_view(pixels[drawn], "visible", config.pad, generator)
        x = model.embed(x.contiguous(memory_format=torch.channels_last), "visible")
        loss = F.cross_entropy(x @ F.normalize(head.weight, dim=1).T / 0.07, labels[drawn])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    state = {k.removeprefix("visible."): v for k, v in model.state_dict().items()}
    kept = {k: v for k, v in state.items() if not k.startswith(("infrared.", "bottleneck."))}
    write_tensors(path, {k: v.half() if v.is_floating_point() else v for k, v in kept.items()}, made)
    return path
