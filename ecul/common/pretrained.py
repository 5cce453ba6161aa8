"""Networks in a directory: safetensors with complete metadata, and back."""

import base64
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ecul import __version__
from ecul.common.files import write_json, write_tensors
from ecul.common.names import shorten

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixels in [0, 1]


def weights_file(path: str | os.PathLike) -> Path:
    """The weights' file of a directory, or the file itself."""
    path = Path(path)
    return path / "model.safetensors" if path.is_dir() else path


Network = TypeVar("Network", bound="Pretrained")


class Pretrained(nn.Module):
    """A network saved as `model.safetensors` and `config.json`, with the `settings` that build it again.

    trained_on: (N,) uint64, the fingerprints of the images that it was trained on, None where not known.
    """

    settings: dict
    trained_on: np.ndarray | None = None

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
        if self.trained_on is not None:
            own["trained_on"] = base64.b64encode(self.trained_on.astype("<u8").tobytes()).decode()
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
    def _find(cls, path: str | os.PathLike) -> tuple[Path, dict[str, str]]:
        """The weights file in a directory, or itself, and its metadata; a ValueError for another network."""
        file = weights_file(path)
        if not file.is_file():
            raise FileNotFoundError(
                f"there is no model file {file}; give a directory that save_pretrained or train wrote"
            )
        try:
            with safe_open(file, framework="pt") as f:
                metadata = f.metadata() or {}
        except SafetensorError as e:
            raise ValueError(f"{file} cannot be read as safetensors: {e}") from e
        found = metadata.get("architecture")
        if found != cls.__name__:
            home = {"TwoStreamResNet": "model", "Backbone": "model", "TwoStream": "streams"}.get(str(found))
            hint = (
                f"in Python ecul.{home}.{found} loads it" if home else "give a model that this library wrote"
            )
            raise ValueError(f"{file} holds {found or 'no named network'}, not {cls.__name__}; {hint}")
        return file, metadata

    def _filled(self: Network, file: Path, metadata: Mapping[str, str]) -> Network:
        """This network with the weights of a file that has this metadata, ready to embed."""
        self.load(load_file(file), file)
        if "trained_on" in metadata:
            self.trained_on = np.frombuffer(base64.b64decode(metadata["trained_on"]), "<u8")
        return self.eval()

    def load(self, state: Mapping[str, Tensor], path: str | os.PathLike, own: tuple[str, ...] = ()) -> None:
        """Take these weights, read from `path`; own: beginnings of names that they need not hold.

        Errors: ValueError that lists what is missing, unknown or of another shape.
        """
        mine = self.state_dict()
        wanted = {k for k in mine if not k.startswith(own)} if own else set(mine)
        wrong = [f"missing {k}" for k in sorted(wanted - set(state)) if not k.endswith("num_batches_tracked")]
        wrong += [f"unknown {k}" for k in sorted(set(state) - wanted)]
        wrong += [
            f"{k} is {tuple(state[k].shape)}, expected {tuple(mine[k].shape)}"
            for k in sorted(wanted & set(state))
            if state[k].shape != mine[k].shape
        ]
        if wrong:
            raise ValueError(
                f"{path} does not fit {self.described()}; keys that differ: {len(wrong)}: "
                f"{shorten(wrong, between='; ')}"
            )
        self.load_state_dict({**mine, **state})
