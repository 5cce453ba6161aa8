"""Weights of other code bases: the state dict in a file, out of whatever wraps it.

{"epoch": 3, "state_dict": {"module.encoder_q.conv1.weight": ...}}     # is taken as conv1.weight, ...
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ecul.common.names import shorten
from ecul.common.pretrained import Pretrained, weights_file
from ecul.common.weights import read_weights, require_tensors

log = logging.getLogger("ecul")
CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "network", "teacher")


class _Ignored:
    """Takes the place of NumPy values and of argparse's options beside the weights: nothing of them is read.

    NumPy's own constructors would trust the file about their memory.
    """

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


NUMPY = [
    f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")
]
BESIDE: list[Any] = [(_Ignored, n) for n in ("numpy.ndarray", "numpy.dtype", "argparse.Namespace", *NUMPY)]


def read_foreign(path: str | os.PathLike, wanted: Iterable[str]) -> dict[str, Tensor]:
    """The weights in a file, without the dicts around them and the prefix before their names.

    path: `.safetensors`, or what `torch.save` wrote, read with weights only; or a directory of ours. wanted:
    names that the weights should have. The prefix is the one that leaves most of them: `module.`,
    `backbone.`, `module.encoder_q.` and so on. A log line says what was unwrapped and what was left out.
    Errors: FileNotFoundError; ValueError naming the file when it holds no state dict.
    """
    path = weights_file(path)
    with torch.serialization.safe_globals(BESIDE):
        content = read_weights(path)
    inside: list[str] = []
    while len(inside) < 4 and (name := _container(content)) is not None:
        inside.append(repr(name))
        content = content[name]
    require_tensors(content, path)
    wanted = set(wanted)
    hits = Counter(prefix for name in content for prefix, rest in _splits(name) if rest in wanted)
    prefix = hits.most_common(1)[0][0] if hits else ""
    others = [name for name in content if not name.startswith(prefix)]
    if inside or prefix:
        told = [f"in {' in '.join(inside[::-1])}"] * bool(inside) + [f"behind {prefix!r}"] * bool(prefix)
        left = f"; left out: {shorten(others, 3)}" if others else ""
        log.info("%s: the weights are %s%s", path, " ".join(told), left)
    return {name.removeprefix(prefix): v for name, v in content.items() if name.startswith(prefix)}


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """ "a.b.c" as ("", "a.b.c"), ("a.", "b.c"), ("a.b.", "c")."""
    parts = name.split(".", 5)
    for i in range(len(parts)):
        yield ".".join([*parts[:i], ""]), ".".join(parts[i:])


def _container(content: Mapping) -> str | None:
    """The name under which a dict holds a state dict, by custom or because it is the only one."""
    inner = {name: part for name, part in content.items() if isinstance(part, dict)}
    states = [k for k, v in inner.items() if v and all(isinstance(value, Tensor) for value in v.values())]
    return next((name for name in (*CONTAINERS, *states) if name in inner), None)


def load_foreign(
    model: Pretrained,
    path: str | os.PathLike,
    homes: Mapping[str, tuple[str, ...]],
    classifier: tuple[str, ...],
    fit: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> None:
    """Start a model from the weights of its plain backbone, or from all weights of a trained model like it.

    homes: the backbone's names, and the model's names that each becomes; a stem's weights become two.
    classifier: beginnings of the names to leave out. fit: what else the backbone's weights need.
    Errors: those of `read_foreign`; ValueError that lists what is missing, unknown or of another shape.
    """
    own = model.state_dict()
    state = read_foreign(path, [*homes, *own])
    if any(name in state for name in own if name not in homes and not name.startswith("bottleneck.")):
        log.info("%s: a trained model; all its weights are taken, its neck too", path)
        return model.load(state, path)
    try:
        state = fit(state)
    except Exception as e:  # a library's own filter, of a file that is not for this network
        raise ValueError(f"{path} does not fit {model.described()}: {e}") from e
    renamed = {name: state[plain] for plain, names in homes.items() if plain in state for name in names}
    unknown = {k: v for k, v in state.items() if k not in homes and not k.startswith(classifier)}
    beside = tuple(set(own) - {name for names in homes.values() for name in names})
    return model.load({**renamed, **unknown}, path, own=beside)
