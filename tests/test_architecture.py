"""The house of DESIGN: floors, lazy public names, no heavy or optional import on the way in."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import ecul

ROOT = Path(ecul.__file__).resolve().parent
LAYERS = (  # rooms and files of `ecul/` itself: each imports from its own layer and those before it
    {"kernels"},
    {"common"},
    {"data"},
    {"config", "trainset", "labels", "clustering", "estimator", "matching", "memory", "stages", "batches"}
    | {"augment", "model", "streams", "optim", "features"},  # the method
    {"evaluation", "run"},
    {"training"},
    {"tools", "report", "synthetic", "importers", "cli", "shell", "__main__"},
)
LAYER = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}


def modules():
    """Every file of the library by its module's name, the kernels' as installed."""
    named = {
        ".".join(file.relative_to(ROOT.parent).with_suffix("").parts): file for file in ROOT.rglob("*.py")
    }
    kernels = {f"ecul.kernels.{file.stem}": file for file in (ROOT.parent / "kernels").glob("*.py")}
    return {name.removesuffix(".__init__"): file for name, file in (named | kernels).items()}


MODULES = modules()


def imported(name):
    """The project's own modules that this one imports, anywhere in it; for a lazy name its home."""
    package = name if MODULES[name].stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                if source == "ecul" and alias.name in ecul._HOMES:
                    inner = f"ecul.{ecul._HOMES[alias.name]}"
                yield from (m for m in [inner if inner in MODULES else source] if m in MODULES)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


def room(name):
    return (name + ".").split(".")[1]


def test_a_lazy_name_counts_as_the_module_it_lives_in(tmp_path, monkeypatch):
    (tmp_path / "memory.py").write_text("from ecul import MODALITIES, train\n")
    monkeypatch.setitem(MODULES, "ecul.memory", tmp_path / "memory.py")
    assert list(imported("ecul.memory")) == ["ecul", "ecul.training"]
    with pytest.raises(AssertionError, match="ecul.memory imports ecul.training, which stands above it"):
        test_imports_go_down_or_sideways("ecul.memory")


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"ecul"}))
def test_imports_go_down_or_sideways(name):
    for other in set(imported(name)) - {"ecul"}:
        assert LAYER[room(other)] <= LAYER[room(name)], f"{name} imports {other}, which stands above it"


def test_every_room_has_a_layer():
    assert LAYER.keys() == {room(name) for name in MODULES.keys() - {"ecul"}}


def test_no_file_imports_in_a_circle():
    graph = {name: set(imported(name)) - {"ecul", name} for name in MODULES}
    TopologicalSorter(graph).prepare()


def test_the_method_imports_no_tool():
    """Not even through others."""
    needed, todo = set(), {"ecul.training"}
    while todo:
        needed |= todo
        todo = {other for name in todo for other in imported(name)} - needed - {"ecul"}
    assert len(needed) > 30 and not {room(name) for name in needed} & LAYERS[-1]


def test_packages_are_all_shipped():
    packages = re.search(r"^packages = \[(.*?)\]", (ROOT.parent / "pyproject.toml").read_text(), re.M | re.S)
    listed = re.findall(r'"(.+?)"', packages[1])
    found = {name for name, file in MODULES.items() if file.stem == "__init__"}
    assert set(listed) == found


def test_kernels_import_nothing_of_the_library():
    for file in (ROOT.parent / "kernels").glob("*.py"):
        text = file.read_text()
        assert "from ecul" not in text and "import ecul" not in text, file.name


def test_every_public_name_is_there_with_a_docstring():
    for name in ecul.__all__:
        assert getattr(ecul, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = ecul.trian


def test_everything_imports_without_what_is_optional():
    code = """
import sys
sys.modules |= dict.fromkeys(["triton", "PIL", "matplotlib", "sklearn", "torchvision"])
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
