"""Unsupervised visible-infrared person re-identification.

ECUL (arXiv 2412.19134) and MBCCM (arXiv 2305.12673) in one small package.
Public names are imported on first use, so that `import ecul` stays quick.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
MODALITIES = ("visible", "infrared")

_HOMES = {
    "train": "training",
    "evaluate": "evaluation",
    "extract": "features",
    "open_dataset": "data",
    "Dataset": "data",
    "load_pixels": "data",
    "synthesize": "synthetic",
    "emcc": "clustering",
    "EMCC": "estimator",
    "match_clusters": "matching",
    "ClusterMemory": "memory",
    "InstanceMemory": "memory",
    "TwoStreamResNet": "model",
    "Config": "config",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ecul' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = found = getattr(importlib.import_module(f"ecul.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
