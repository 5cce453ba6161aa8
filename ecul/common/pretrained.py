"""Networks in a directory: safetensors with complete metadata, and back."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ecul import __version__
from ecul.common.files import reading, write_json
from ecul.common.names import clipped
from ecul.common.weights import read_metadata, read_tensors, require_fit, write_tensors

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixels in [0, 1]
SIDE = range(1, 2049)  # pixels; a file that asks for more asks for too much memory
WIDTH = range(1, 4097)  # channels of a network's first stage, likewise
Network = TypeVar("Network", bound="Pretrained")


def weights_file(path: str | os.PathLike) -> Path:
    """The weights' file of a directory, or the file itself."""
    path = Path(path)
    return path / "model.safetensors" if path.is_dir() else path


class Saved(NamedTuple):
    """A network's file: its weights, its metadata, the settings in it that build the network, its SHA-256."""

    file: Path
    state: dict[str, Tensor]
    metadata: dict[str, str]
    about: dict[str, Any]
    sha256: str | None = None


class Pretrained(nn.Module):
    """A network saved as `model.safetensors` and `config.json`, with the `settings` that build it again.

    sha256: that of the file from which these weights were read; None for other weights, as after training.
    """

    settings: dict
    sha256: str | None = None

    def described(self) -> str:
        """What network this is, for an error message."""
        return f"this {type(self).__name__}"

    def train(self: Network, mode: bool = True) -> Network:
        """Training mode, in which the weights change; or eval mode."""
        self.sha256 = None if mode else self.sha256
        return super().train(mode)

    def save_pretrained(
        self,
        directory: str | os.PathLike,
        metadata: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Write `model.safetensors` and `config.json` into a directory.

        metadata: more values for the first file, beside architecture, settings, mean, std and version.
        config: more values for the second, beside the settings under "model".
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        own = {"architecture": type(self).__name__, "version": __version__, "mean": MEAN, "std": STD}
        about = {**own, **self.settings, **(metadata or {})}
        write_tensors(directory / "model.safetensors", self.state_dict(), about)
        write_json(directory / "config.json", {**(config or {}), "model": self.settings})

    @classmethod
    def holds(cls, path: str | os.PathLike) -> bool:
        """Whether a network of this class was saved at this path. Errors: those of `reading`."""
        return read_metadata(weights_file(path)).get("architecture") == cls.__name__

    @classmethod
    def _read(cls, path: str | os.PathLike, settings: Mapping[str, Any]) -> Saved:
        """What is saved in a directory, or in a file.

        settings: each setting by name, with a container of its known values; two of `SIDE` for (H, W).
        Errors: those of `reading`; ValueError for another network.
        """
        file = weights_file(path)
        state, metadata, sha256 = read_tensors(file)
        found = metadata.get("architecture")
        if found != cls.__name__:
            home = {"TwoStreamResNet": "model", "Backbone": "model", "TwoStream": "streams"}.get(str(found))
            told = f"in Python ecul.{home}.{found} loads it" if home else "give a model of this library"
            raise ValueError(f"{file} holds {clipped(found or 'no network', 60)}, not {cls.__name__}; {told}")
        with reading(file):
            about = {name: _setting(name, metadata[name], known) for name, known in settings.items()}
        return Saved(file, state, metadata, about, sha256)

    @classmethod
    def _build(cls: type[Network], saved: Saved) -> Network:
        """The network of these settings with these weights, in eval mode.

        It takes memory only when every weight is known to fit: a file costs no more than it holds.
        """
        with reading(saved.file), torch.device("meta"):
            network = cls(**saved.about)
        return network._filled(saved)

    def _filled(self: Network, saved: Saved) -> Network:
        """This network with these weights, ready to embed."""
        self.load(saved.state, saved.file)
        self.eval().sha256 = saved.sha256
        return self

    def load(self, state: Mapping[str, Tensor], path: str | os.PathLike, own: tuple[str, ...] = ()) -> None:
        """Take these weights, read from `path`; own: beginnings of names that they need not hold.

        Errors: those of `require_fit`.
        """
        require_fit(self.state_dict(), state, path, self.described(), own)
        if any(value.is_meta for value in self.state_dict().values()):
            for value in self.to_empty(device="cpu").state_dict().values():
                value.zero_()
        self.load_state_dict(state, strict=False)
        self.sha256 = None


def _setting(name: str, text: str, known: Any) -> Any:
    """The value among these that is written so; a list of them where `known` is (SIDE, SIDE)."""
    if known == (SIDE, SIDE):
        height, width = text.strip("[]").split(", ")
        return [_setting(name, height, SIDE), _setting(name, width, SIDE)]
    for value in known:
        if str(value) == text:
            return value
    raise ValueError(f"its {name} is {clipped(text, 60)}")
