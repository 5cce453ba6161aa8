"""Hostile files by the hundred, drawn from one seed: each is an error that names it, or does no harm.

What is an error is a ValueError (or a file that is not there); no other exception, no network built from a
claim, no number that is not finite, no path outside the data set, no message that fills the screen.
"""

import copy
import json
import shutil
from functools import partial

import layouts
import numpy as np
import pytest
import torch
from test_resume import CONFIG, DATASET, resume

from ecul import TwoStreamResNet, open_dataset, train
from ecul.common.weights import read_tensors, write_tensors
from ecul.importers import import_checkpoint
from ecul.run.saved import find_run

TRIED = {"json": 150, "bytes": 60, "lists": 120}
JUNK = [
    None, True, False, -1, 0, 3, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "x", "9" * 5000, "\x1b[2J", "../../etc", "\udc80", [], {}, [[]], {"a": {}}, [None] * 3, "[" * 5000,
]  # fmt: skip
TOKENS = [
    "Visible/1/male_front_v_00000_1.bmp", "Thermal/2/x.bmp", "../outside.bmp", "/etc/passwd", "a\0b", "..",
    "0", "-1", "1.5", "9" * 19, "9" * 5000, "²", "cam" + "9" * 30 + "/x.bmp", "x_c" + "7" * 40 + ".jpg", "",
    "Visible//1", "Visible/../../x", "\x1b[2J", "\udcff", "link/outside.bmp", " ", "\t", "Visible",
]  # fmt: skip


def held(call, *names):
    """The call's result, or None after an error that names one of these, in at most a screen of text."""
    try:
        return call()
    except (ValueError, FileNotFoundError) as error:
        told = str(error)
        assert any(name in told for name in names) and len(told) < 3000 and "\x1b" not in told, told[:500]


def places(value, here=()):
    """The path of every member of nested objects and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in inner:
        yield (*here, key)
        yield from places(member, (*here, key))


def mutated(value, rng):
    """A copy in which one to three members are gone or junk."""
    value = copy.deepcopy(value)
    for _ in range(rng.integers(1, 4)):
        found = list(places(value))
        *way, last = found[rng.integers(len(found))]
        inner = value
        for key in way:
            inner = inner[key]
        if rng.random() < 0.3:
            del inner[last]
        else:
            inner[last] = JUNK[rng.integers(len(JUNK))]
    return value


def damaged(content, rng):
    """Bytes with bits flipped, cut, doubled or with junk inside."""
    content, place = bytearray(content), int(rng.integers(len(content)))
    kind = rng.integers(4)
    if kind == 0:
        for at in rng.integers(len(content), size=rng.integers(1, 9)):
            content[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del content[place:]
    elif kind == 2:
        content[place:place] = content[: int(rng.integers(1, 2000))]
    else:
        content[place : place + 8] = rng.bytes(8)
    return bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(DATASET, CONFIG, output=tmp_path_factory.mktemp("r") / "run").output


def test_what_a_run_says(whole, tmp_path):
    rng, file = np.random.default_rng(1), tmp_path / "resume.safetensors"
    tensors, metadata, _ = read_tensors(whole / file.name)
    about, tensors = json.loads(metadata["run"]), dict(list(tensors.items())[:1])
    for _ in range(TRIED["json"]):
        text = json.dumps(mutated(about, rng)).replace('"' + "[" * 5000 + '"', "[" * 50_000)
        write_tensors(file, tensors, {"run": text})
        found = held(lambda: find_run(tmp_path), file.name)
        for row in found.history if found else []:
            assert row["stage"] in (1, 2) and all(map(np.isfinite, row.values()))


def test_the_bytes_of_every_file(whole, tmp_path):
    rng, run = np.random.default_rng(2), shutil.copytree(whole, tmp_path / "run")
    state = {"net": {"module.bottleneck.weight": torch.zeros(3)}, "mAP": np.float64(0.5), "x": np.zeros(2)}
    readers = {run / "resume.safetensors": lambda: resume(run)}
    readers[run / "model.safetensors"] = lambda: TwoStreamResNet.from_pretrained(run)
    for new in (True, False):
        torch.save(state, tmp_path / f"{new}.pth", _use_new_zipfile_serialization=new)
        readers[tmp_path / f"{new}.pth"] = partial(import_checkpoint, tmp_path / f"{new}.pth")
    for file, read in readers.items():
        content = file.read_bytes()
        for _ in range(TRIED["bytes"]):
            file.write_bytes(damaged(content, rng))
            assert held(read, file.name) is None  # three numbers are no model
        file.write_bytes(content)


@pytest.mark.parametrize("name", ["regdb", "llcm"])
def test_lists_of_images(name, tmp_path):
    rng = np.random.default_rng(5)
    root = getattr(layouts, name)(tmp_path / "root")
    layouts.picture(tmp_path / "outside.bmp")
    (root / "link").symlink_to(tmp_path)
    file = root / ("idx/train_visible_1.txt" if name == "regdb" else "idx/train_vis.txt")
    ids, lines = root / "idx/test_id.txt", file.read_text().splitlines()
    known = ids.read_text() if ids.exists() else None
    for _ in range(TRIED["lists"] // 2):
        odd = [" ".join(rng.choice(TOKENS, rng.integers(1, 4))) for _ in range(rng.integers(1, 3))]
        text = "\n".join([*lines[:2], *odd, *lines[2:]])
        file.write_text(text, errors="surrogateescape")
        if known is not None and rng.random() < 0.3:
            ids.write_text(",".join([known, *rng.choice(TOKENS, 2)]), errors="surrogateescape")
        dataset = held(lambda: open_dataset(name, root, subset=True, pack=False), file.name, "test_id.txt")
        if dataset is not None:
            assert "\x1b" not in str(dataset.check())
            assert all((root / path).resolve().is_relative_to(root) for path in dataset.visible.names)
        if known is not None:
            ids.write_text(known)
