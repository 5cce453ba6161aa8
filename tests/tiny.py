"""The recipe that most tests train with: two epochs of two steps, of a network of 8 channels."""

import json

import torch

from ecul import Config
from ecul.common.weights import read_tensors, write_tensors

TINY = {"depth": 10, "width": 8, "size": (32, 16), "pad": 2, "identities": 4, "instances": 2}
TINY |= {"epochs_intra": 1, "epochs_cross": 1, "iterations": 2, "tsmem_switch": 1, "min_samples": 2}
TINY |= {"k1": 6, "k2": 2, "k3": 4, "k1_joint": 8, "k2_joint": 2, "k3_joint": 6}


def tiny(**overrides):
    """The demo's preset made tiny, with these fields changed."""
    return Config.preset("demo", **{**TINY, **overrides})


class Pooled(torch.nn.Module):
    """A network of one's own."""

    def __init__(self, features=8, kernel=5, dropout=0.0):
        super().__init__()
        self.stem, self.num_features = torch.nn.Conv2d(3, features, kernel, 4), features
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.stem(x).relu().mean((2, 3)))


def rewrite(file, change):
    """Change what a run's resume.safetensors says, and its tensors, in place: change(about, tensors)."""
    tensors, metadata, _ = read_tensors(file)
    about = json.loads(metadata["run"])
    change(about, tensors)
    write_tensors(file, tensors, {"run": json.dumps(about)})


def same(a, b):
    """Whether two models have equal weights."""
    return all(
        torch.equal(*pair) for pair in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )
