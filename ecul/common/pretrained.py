"""Networks in a directory: safetensors with complete metadata, and back; and the weights of other code bases.

{"epoch": 3, "state_dict": {"module.encoder_q.conv1.weight": ...}}     # is taken as conv1.weight, ...
"""

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from ecul import __version__
from ecul.common.files import reading, write_json
from ecul.common.names import clipped, shorten
from ecul.common.weights import Content, is_weight, read_tensors, read_weights, require_fit, write_tensors

log = logging.getLogger("ecul")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of pixels in [0, 1]
COUNT = r"[1-9]\d{0,3}"  # in metadata; a file that asks for more asks for too much memory
SIDE = r"([1-9]\d{0,2}|1\d{3}|20[0-4]\d)"  # pixels, below 2050: no tensor of the file bounds them
SIZE = rf"\[{SIDE}, {SIDE}\]"
CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "network", "teacher")
Network = TypeVar("Network", bound="Pretrained")


def weights_file(path: str | os.PathLike) -> Path:
    """The weights' file of a directory, or the file itself."""
    path = Path(path)
    return path / "model.safetensors" if path.is_dir() else path


class Pretrained(nn.Module):
    """A network saved as `model.safetensors` and `config.json`, with the `settings` that build it again.

    sha256: that of the file from which these weights were read; None for other weights, as after training.
    forms: of the settings that are read from a file, as regular expressions.
    """

    settings: dict
    sha256: str | None = None
    forms: ClassVar[dict[str, str]]

    def described(self) -> str:
        """What network this is, for an error message."""
        return f"this {self.settings.get('network', type(self).__name__)}"

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
    def _read(cls, path: str | os.PathLike) -> tuple[Path, Content, dict[str, Any]]:
        """The file of a saved network, its content, and the settings that build the network.

        Errors: those of `reading`; ValueError for a network of another class.
        """
        file = weights_file(path)
        content = read_tensors(file)
        found = content.metadata.get("architecture", "no network")
        if found != cls.__name__:
            advice = "give a model of this library, or load it by from_pretrained of its own class"
            raise ValueError(f"{file} holds {clipped(found, 60)}, not {cls.__name__}; {advice}")
        settings = {}
        with reading(file):
            for name, form in cls.forms.items():
                text = content.metadata[name]
                if not re.fullmatch(form, text):
                    raise ValueError(f"its {name} is {clipped(text, 60)}")
                settings[name] = json.loads(text.lower())
        return file, content, settings

    def load(
        self: Network, state: Mapping[str, Tensor], path: str | os.PathLike, sha256: str | None = None
    ) -> Network:
        """This network with these weights, read from the file `path` of this hash.

        A network on "meta" takes memory only now, when every weight is known to fit: a file costs no more
        than it holds. Errors: those of `require_fit`.
        """
        require_fit(self.state_dict(), state, path, self.described())
        if any(value.is_meta for value in self.state_dict().values()):
            for value in self.to_empty(device="cpu").state_dict().values():
                value.zero_()
        self.load_state_dict(state, strict=False)
        self.sha256 = sha256
        return self

    def start_from(
        self,
        path: str | os.PathLike,
        homes: Mapping[str, tuple[str, ...]],
        classifier: tuple[str, ...],
        fit: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    ) -> None:
        """Take the weights of the plain backbone, or all weights of a trained model like this one.

        homes: the backbone's names, and our names that each becomes; a stem's weights become two.
        classifier: beginnings of the names to leave out. fit: what else the backbone's weights need.
        Errors: those of `read_foreign`; ValueError that lists what is missing, unknown or of another shape.
        """
        own = self.state_dict()
        state = read_foreign(path, [*homes, *own])
        if any(name in state for name in own if name not in homes and not name.startswith("bottleneck.")):
            log.info("%s: a trained model; all its weights are taken, its neck too", path)
            self.load(state, path)
            return
        try:
            state = fit(state)
        except Exception as e:  # a library's own filter, of a file that is not for this network
            raise ValueError(f"{path} does not fit {self.described()}: {e}") from e
        wanted = {name: own[name] for names in homes.values() for name in names}
        renamed = {name: state[plain] for plain, names in homes.items() if plain in state for name in names}
        unknown = {k: v for k, v in state.items() if k not in homes and not k.startswith(classifier)}
        require_fit(wanted, {**renamed, **unknown}, path, self.described())
        self.load_state_dict(renamed, strict=False)
        self.sha256 = None


def read_foreign(path: str | os.PathLike, wanted: Iterable[str]) -> dict[str, Tensor]:
    """The weights in a file, without the dicts around them and the prefix before their names.

    path: `.safetensors`, or what `torch.save` wrote, read with weights only; or a directory of ours. wanted:
    names that the weights should have. The prefix is the one that leaves most of them: `module.`,
    `backbone.`, `module.encoder_q.` and so on. A log line says what was unwrapped and what was left out.
    Errors: those of `read_weights`; ValueError naming the file when it holds no state dict.
    """
    path, place = weights_file(path), ""
    content = read_weights(path)
    for _ in range(4):
        inner = {name: part for name, part in content.items() if isinstance(part, dict)}
        states = [k for k, v in inner.items() if v and all(isinstance(value, Tensor) for value in v.values())]
        if found := [name for name in (*CONTAINERS, *states) if name in inner]:
            content, place = inner[found[0]], f"{place}{found[0]}."
    with reading(path):
        odd = [str(name) for name, value in content.items() if not is_weight(name, value)]
        if odd or not content:
            raise ValueError(f"it holds {f'{shorten(odd)}, no tensors of weights' if odd else 'no weights'}")
    wanted, hits = set(wanted), Counter({"": 0})
    for name in content:
        parts = name.split(".", 5)
        for i in range(len(parts)):
            hits[".".join([*parts[:i], ""])] += ".".join(parts[i:]) in wanted
    prefix = hits.most_common(1)[0][0]
    others = [name for name in content if not name.startswith(prefix)]
    if place + prefix:
        left = shorten(others, 3) or "nothing"
        log.info("%s: the weights are behind %r; left out: %s", path, place + prefix, left)
    return {name.removeprefix(prefix): v for name, v in content.items() if name.startswith(prefix)}
