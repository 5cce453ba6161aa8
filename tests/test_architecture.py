"""The house of DESIGN: floors, lazy public names, no heavy or optional import on the way in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ecul

ROOT = Path(ecul.__file__).resolve().parent
FLOORS = {
    "kernels": 0,
    **dict.fromkeys(
        (
            "files",
            "parallel",
            "config",
            "data",
            "readers",
            "pack",
            "decode",
            "folders",
            "checks",
            "figures",
            "synthetic",
            "augment",
        ),
        1,
    ),
    **dict.fromkeys(("model", "pretrained", "metrics", "rerank", "galleries", "console"), 1),
    **dict.fromkeys(
        ("clustering", "matching", "memory", "losses", "sampling", "scores", "stages", "journal"), 2
    ),
    **dict.fromkeys(("features", "evaluation", "checkpoint", "piles", "building"), 3),
    **dict.fromkeys(("search", "importers", "export"), 3),
    "training": 4,
    **dict.fromkeys(("report", "pictures", "page", "__main__"), 5),
    "__init__": 5,
}
FILES = sorted(ROOT.glob("*.py"))


def imported(file):
    """The project's own files that this file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level == 1 or name.split(".")[0] == "ecul":
                parts = name.split(".") if node.level == 1 else name.split(".")[1:]
                yield from (
                    [parts[0]] if parts and parts[0] else [a.name for a in node.names if a.name in FLOORS]
                )
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("ecul."))


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_imports_go_down_or_sideways(file):
    floor = FLOORS[file.stem]
    for name in imported(file):
        assert FLOORS[name] <= floor, f"{file.name} (floor {floor}) imports {name} (floor {FLOORS[name]})"


def test_kernels_import_nothing_of_the_library():
    for file in (ROOT.parent / "kernels").glob("*.py"):
        text = file.read_text()
        assert "from ecul" not in text and "import ecul" not in text, file.name


def test_every_public_name_is_there_with_a_docstring():
    for name in ecul.__all__:
        assert getattr(ecul, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = ecul.trian


@pytest.mark.parametrize("absent", ["triton", "PIL", "matplotlib", "sklearn", "torchvision"])
def test_everything_imports_without(absent):
    code = f"""
import sys
sys.modules[{absent!r}] = None
import ecul
for name in ecul.__all__:
    getattr(ecul, name)
import ecul.kernels, torch
print(ecul.emcc(torch.eye(5)).tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "[0, 0, 0, 0, 0]", done.stderr


def test_importing_the_package_imports_no_torch():
    code = "import sys, ecul; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
