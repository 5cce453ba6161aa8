"""Networks in a directory: safetensors with complete metadata, and back."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ecul import __version__
from ecul.common.files import write_json
from ecul.common.names import clipped
from ecul.common.records import Schema, parse_json, require
from ecul.common.weights import load_weights, read_tensors, require_fit, write_tensors

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixels in [0, 1]
SIDE = range(1, 2049)  # pixels; a file that asks for more asks for too much memory
WIDTH = range(1, 4097)  # channels of a network's first stage, likewise
Network = TypeVar("Network", bound="Pretrained")


def weights_file(path: str | os.PathLike) -> Path:
    """The weights' file of a directory, or the file itself."""
    path = Path(path)
    return path / "model.safetensors" if path.is_dir() else path


class Saved(NamedTuple):
    """A network's file: its weights, its metadata, and of these the settings that build it."""

    file: Path
    state: dict[str, Tensor]
    metadata: dict[str, str]
    about: dict[str, Any]


class Pretrained(nn.Module):
    """A network saved as `model.safetensors` and `config.json`, with the `settings` that build it again."""

    settings: dict

    def described(self) -> str:
        """What network this is, for an error message."""
        return f"this {type(self).__name__}"

    def save_pretrained(
        self,
        directory: str | os.PathLike,
        metadata: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Write `model.safetensors` and `config.json` into a directory.

        metadata: a dict for the former's header, beside architecture, sizes, mean, std and version; config: a
        dict for the latter, beside the model's own settings under "model".
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        own = {"architecture": type(self).__name__, "version": __version__, "mean": MEAN, "std": STD}
        write_tensors(
            directory / "model.safetensors", self.state_dict(), {**own, **self.settings, **(metadata or {})}
        )
        write_json(directory / "config.json", {**(config or {}), "model": self.settings})

    @classmethod
    def holds(cls, path: str | os.PathLike) -> bool:
        """Whether a network of this class was saved at this path."""
        try:
            with safe_open(weights_file(path), framework="pt") as f:
                return (f.metadata() or {}).get("architecture") == cls.__name__
        except (OSError, SafetensorError):
            return False

    @classmethod
    def _read(
        cls,
        path: str | os.PathLike,
        settings: Mapping[str, Schema],
        optional: Mapping[str, Schema] = MappingProxyType({}),
    ) -> "Saved":
        """What is saved in a directory, or in a file, with these settings of its metadata.

        Errors: FileNotFoundError; ValueError for another network, and for a file that is damaged.
        """
        file = weights_file(path)
        if not file.is_file():
            raise FileNotFoundError(
                f"there is no model file {file}; give a directory that save_pretrained or train wrote"
            )
        state, metadata = read_tensors(file)
        found = metadata.get("architecture")
        if found != cls.__name__:
            home = {"TwoStreamResNet": "model", "Backbone": "model", "TwoStream": "streams"}.get(str(found))
            hint = (
                f"in Python ecul.{home}.{found} loads it" if home else "give a model that this library wrote"
            )
            told = clipped(found, 60) if found else "no named network"
            raise ValueError(f"{file} holds {told}, not {cls.__name__}; {hint}")
        require(metadata, dict.fromkeys(settings, str), f"{file} is damaged")
        known = {**settings, **{k: v for k, v in optional.items() if k in metadata}}
        about = {
            name: parse_json(metadata[name].lower(), schema, f"{file}: its {name}")  # False is written so
            for name, schema in known.items()
        }
        return Saved(file, state, metadata, about)

    @classmethod
    def _build(cls: type[Network], saved: "Saved") -> Network:
        """The network of these settings with these weights, in eval mode.

        It takes no memory before every weight is known to fit: what a file claims costs what it holds.
        """
        with torch.device("meta"):
            shapes = cls(**saved.about)
        require_fit(shapes.state_dict(), saved.state, saved.file, shapes.described())
        return cls(**saved.about)._filled(saved)

    def _filled(self: Network, saved: "Saved") -> Network:
        """This network with these weights, ready to embed."""
        self.load(saved.state, saved.file)
        return self.eval()

    def load(self, state: Mapping[str, Tensor], path: str | os.PathLike, own: tuple[str, ...] = ()) -> None:
        """Take these weights, read from `path`; own: beginnings of names that they need not hold.

        Errors: ValueError that lists what is missing, unknown, of another shape or not finite.
        """
        load_weights(self, state, path, self.described(), own)
