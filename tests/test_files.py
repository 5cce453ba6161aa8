"""Files of others, files of a bad disk: nothing passes for what it is not, and each error names its file."""

import errno
import hashlib
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ecul import Config, TwoStreamResNet
from ecul.cli import main
from ecul.common.files import hash_file, read_json, write_file
from ecul.common.names import printable, shorten
from ecul.common.weights import read_metadata, read_tensors, read_weights, write_tensors
from ecul.features import extract_files
from ecul.importers import import_checkpoint
from ecul.model import load_model
from ecul.tools.search import save_features
from ecul.tools.threshold import Threshold, measure_threshold

SMALL = {"depth": 10, "width": 2, "input_size": (32, 16)}


def saved(folder, **metadata):
    """A small model saved in a folder, its metadata changed to this, without a checksum; returns its file."""
    TwoStreamResNet(**SMALL).save_pretrained(folder)
    file = folder / "model.safetensors"
    known = {**read_metadata(file), "checksum": None, **metadata}
    save_file(load_file(file), file, {k: v for k, v in known.items() if v is not None})
    return file


def test_one_flipped_bit_of_a_file_of_tensors_is_an_error(tmp_path):
    tensors = {"a": torch.arange(7.0), "b": torch.arange(5), "c": torch.ones(2, 3).half()}
    write_tensors(tmp_path / "t.safetensors", tensors, {"epoch": 3})
    found, metadata, sha256 = read_tensors(tmp_path / "t.safetensors")
    assert metadata["epoch"] == "3" and all(torch.equal(found[k], v) for k, v in tensors.items())
    content = (tmp_path / "t.safetensors").read_bytes()
    assert sha256 == hashlib.sha256(content).hexdigest()
    header = 8 + int.from_bytes(content[:8], "little")
    assert len(content[header:]) == 7 * 4 + 5 * 8 + 6 * 2
    for place in [*range(header, len(content)), content.index(b'"3"') + 1, content.index(b"F32") + 1]:
        flipped = bytearray(content)
        flipped[place] ^= 1
        (tmp_path / "t.safetensors").write_bytes(flipped)
        with pytest.raises(ValueError, match="t.safetensors is damaged"):
            read_tensors(tmp_path / "t.safetensors")


@pytest.mark.parametrize("wild", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_wherever_they_are_read(tmp_path, wild):
    model = TwoStreamResNet(**SMALL)
    with torch.no_grad():
        model.layer2[0].conv1.weight[0, 0, 0, 0] = wild
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model.safetensors is damaged: .* NaN .*layer2.0.conv1"):
        TwoStreamResNet.from_pretrained(tmp_path)
    state = {k.removeprefix("visible."): v for k, v in model.state_dict().items() if "infrared" not in k}
    torch.save({k: v for k, v in state.items() if "bottleneck" not in k}, tmp_path / "start.pth")
    with pytest.raises(ValueError, match="start.pth is damaged: it holds NaN"):
        TwoStreamResNet(**SMALL).load_backbone(tmp_path / "start.pth")


@pytest.mark.parametrize(
    ("claims", "message"),
    [
        ({"width": "50000"}, "is damaged: its width is 50000"),
        ({"width": "4000"}, r"does not fit this .*conv1.weight is \(2,"),
        ({"width": "2.0"}, "its width is 2.0"),
        ({"width": None}, "'width' is missing"),
        ({"depth": "101"}, "does not fit this TwoStreamResNet"),
        ({"depth": "11"}, "its depth is 11"),
        ({"stem_stride": "3"}, "its stem_stride is 3"),
        ({"non_local": "1\x1b[2J"}, r"its non_local is 1\\x1b"),
        ({"gem": "true"}, "its gem is true"),
        ({"input_size": "[100000, 64]"}, r"its input_size is \[100000, 64"),
        ({"input_size": "[" * 100_000}, "is damaged"),
        ({"input_size": "[9999, 64]"}, r"its input_size is \[9999, 64"),
        ({"input_size": "[" + "9" * 5000 + ", 64]"}, r"its input_size is \[999"),
        ({"architecture": "\x1b[2J"}, r"holds \\x1b\[2J, not TwoStreamResNet"),
    ],
)
def test_what_metadata_claim_is_bounded_and_costs_no_memory(tmp_path, claims, message, monkeypatch):
    file = saved(tmp_path, **claims)
    drawn = torch.nn.init, "kaiming_normal_"
    monkeypatch.setattr(*drawn, lambda weight, **_: weight.is_meta or pytest.fail("built"))
    with pytest.raises(ValueError, match=f"model.safetensors.*{message}") as error:
        TwoStreamResNet.from_pretrained(file)
    assert len(str(error.value)) < 1500


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_checkpoint_holds_what_it_claims_and_no_more(tmp_path):
    small = torch.zeros(1)
    cases = {
        "no weights": {"state_dict": {}},
        "wide, no tensors": {"wide": small.expand(10**9)},
        "sparse, no tensors": {"sparse": torch.zeros(9, 9).to_sparse()},
        "meta, no tensors": {"meta": torch.zeros(9, device="meta")},
        "nested, no tensors": {"nested": torch.nested.nested_tensor([small, small])},
        r"\('a', 'b'\), no tensors": {("a", "b"): small},
    }
    for message, content in cases.items():
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(ValueError, match=f"odd.pth.*({message})"):
            import_checkpoint(tmp_path / "odd.pth")


def test_a_checkpoint_that_grows_in_memory_is_refused(tmp_path):
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "plain.pth")
    plain = zipfile.ZipFile(tmp_path / "plain.pth")
    with plain, zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert (tmp_path / "packed.pth").stat().st_size < 20_000
    assert read_weights(tmp_path / "plain.pth")["a"].shape == (10**6,)
    with pytest.raises(ValueError, match="packed.pth is damaged: it grows to 4,0"):
        read_weights(tmp_path / "packed.pth")


RECONSTRUCT, SCALAR = np.zeros(1).__reduce__()[0], np.float64(1).__reduce__()[0]


class Malformed:
    """What a pickle says to make a NumPy object of nonsense."""

    def __init__(self, *parts):
        self.parts = parts

    def __reduce__(self):
        return self.parts


@pytest.mark.parametrize(
    "parts",
    [
        (RECONSTRUCT, (np.ndarray, (0,), b"b"), (1, (10**9,), "nonsense", False, b"x")),
        (SCALAR, (np.dtype("f8"), b"short")),
        (SCALAR, ("f8",)),
        (np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 63)),
    ],
)
def test_malformed_numpy_objects_beside_the_weights_are_never_made(tmp_path, parts):
    torch.save({"net": {"odd.weight": torch.zeros(1)}, "mAP": Malformed(*parts)}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="odd.pth: nothing was imported, for no known layout"):
        import_checkpoint(tmp_path / "odd.pth")
    torch.save({"net": {"odd.weight": Malformed(*parts)}}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="odd.weight, no tensors"):
        import_checkpoint(tmp_path / "odd.pth")


def test_a_disk_that_cannot_be_written_is_told_with_the_name_of_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fixed(path, missing_ok=False):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "fsync", full)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left on device: .*model.safetensors'") as error:
            write_file(tmp_path / "model.safetensors", b"x")
        assert error.value.errno == errno.ENOSPC
        monkeypatch.setattr(Path, "unlink", fixed)  # a disk that became read-only
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    write_file(tmp_path / ("x" * 255), b"y")  # a name may be as long as the file system takes


def test_names_that_are_not_utf_8_are_written_and_read(tmp_path):
    place = tmp_path / os.fsdecode(b"caf\xe9")
    TwoStreamResNet(**SMALL).save_pretrained(place, {"imported_from": place.name})
    assert load_model(place).input_size == (32, 16)
    assert read_metadata(place / "model.safetensors")["imported_from"] == r"caf\udce9"


def test_a_file_is_whole_while_others_take_its_place(tmp_path):
    """One opened file gives header, tensors and hash: under a writer, no load mixes two files."""
    known = {}
    for width in (2, 3):
        TwoStreamResNet(**{**SMALL, "width": width}).save_pretrained(tmp_path / str(width))
        content = (tmp_path / str(width) / "model.safetensors").read_bytes()
        known[hashlib.sha256(content).hexdigest()] = width, content
    place, found = tmp_path / "model.safetensors", []
    write_file(place, content)
    with ThreadPoolExecutor() as pool:
        writing = pool.submit(lambda: [write_file(place, c) for _ in range(150) for _, c in known.values()])
        while not writing.done():
            found.append(TwoStreamResNet.from_pretrained(tmp_path))
    assert len(found) > 10
    assert all(known[model.sha256][0] == model.settings["width"] for model in found)


def test_a_hash_is_that_of_the_weights_that_were_loaded(tmp_path, dataset):
    file, config = saved(tmp_path), Config.preset("demo")
    model, sha256 = load_model(tmp_path), hash_file(file)
    TwoStreamResNet(**{**SMALL, "width": 3}).save_pretrained(tmp_path)  # as a run writes its next epoch
    assert hash_file(file) != sha256
    Image.new("RGB", (16, 32)).save(tmp_path / "1.png")
    found = extract_files(model, [tmp_path / "1.png"], "visible")
    save_features(tmp_path / "f.safetensors", found, tmp_path)
    assert read_metadata(tmp_path / "f.safetensors")["model_sha256"] == sha256
    measure_threshold(model, dataset, config).save(tmp_path)
    assert Threshold.load(tmp_path) is None and Threshold.load(tmp_path, sha256) is not None
    assert model.train().sha256 is None  # weights that learn are no file's


@pytest.mark.parametrize(
    "header",
    [
        b"[1]",
        b"[" * 100_000,
        b"\xff",
        b'{"__metadata__": [1]}',
        b'{"a": {"dtype": "F32", "shape": [4611686018427387904], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_headers_that_lie_are_named(header, tmp_path):
    file = tmp_path / "x.safetensors"
    for size in (len(header), 2**63):
        file.write_bytes(size.to_bytes(8, "little") + header + b"1234")
        for read in (load_model, import_checkpoint, read_tensors):
            with pytest.raises(ValueError, match="x.safetensors "):
                read(file)


def test_a_folder_a_link_to_nothing_and_a_pipe_are_no_files(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name in ("folder", "link", "pipe"):
        for read in (load_model, read_tensors, read_json, import_checkpoint):
            with pytest.raises(FileNotFoundError, match=f"there is no file .*{name}.safetensors"):
                read(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "9" * 5000, '"\\ud800', b"\xff\xfe"])
def test_what_is_no_json_is_told_with_its_file(text, tmp_path):
    (tmp_path / "x.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="x.json is damaged: ") as error:
        read_json(tmp_path / "x.json")
    assert len(str(error.value)) < 400


def test_foreign_text_does_not_steer_the_terminal(tmp_path, capsys):
    escaped = r"a\x1b[2J\x9b\n\u202e\x00\udc9bé監" + "\udce9"
    assert printable("a\x1b[2J\x9b\n\u202e\x00\udc9bé監\udce9") == escaped
    assert printable("a\nb\r", keep="\n") == "a\nb\\r"
    assert shorten(["\x1b]0;x\x07", "b\nc"], 1) == r"\x1b]0;x\x07 and 1 more"
    for modality in ("visible", "infrared"):
        (tmp_path / modality).mkdir()
        for name in ("fine", "\x1b[2J"):
            Image.fromarray(np.zeros((64, 32, 3), np.uint8)).save(tmp_path / modality / f"{name}.png")
        (tmp_path / modality / "\x1b[31mbad.png").write_bytes(b"\x1b[2J")
        (tmp_path / modality / "\x9bextra").write_bytes(b"")
    saved(tmp_path / "m")
    sides = "--query-modality infrared --gallery-modality visible --skip-unreadable"
    for command in (
        f"check folders {tmp_path}",
        f"search {tmp_path}/m --query {tmp_path}/infrared --gallery {tmp_path}/visible {sides}",
        f"extract {tmp_path}/m {tmp_path}/visible --modality visible -o {tmp_path}/x.safetensors",
        f"evaluate sysu {tmp_path}/\x1b[2J --model {tmp_path}/m",
    ):
        main(command.split())
        told = "".join(capsys.readouterr())
        assert "\\x1b[" in told and "\x1b" not in told and "\x9b" not in told, command
