"""README as its readers use it: every block runs, every command parses, the wheel installs elsewhere."""

import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from tiny import TINY

import ecul
from ecul import Config, synthesize
from ecul.cli import parser

ROOT = Path(ecul.__file__).resolve().parent.parent
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\s*)?```(?P<language>\w+)\n(?P<code>.*?)```", re.S)
SMALL = {**TINY, "weights": None, "precision": "fp32", "identities": 3}


def blocks(text, language):
    """(code, reason not to run or None) of each block of a language."""
    return [(m["code"], m["reason"]) for m in BLOCK.finditer(text) if m["language"] == language]


def commands(text):
    """The arguments of every `ecul` command in bash blocks; continued lines are joined, comments dropped."""
    for code, _ in blocks(text, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "-m" in words:  # python -m ecul, torchrun ... -m ecul
                words = words[words.index("-m") + 1 :]
            if words[:1] == ["ecul"]:
                yield words[1:]


def run_python_blocks(text, directory, monkeypatch):
    """Run each block by itself, in one directory that holds small data; returns the names of each."""
    synthesize(directory / "SYSU-MM01", identities=8, images=3, size=(32, 16), progress=False)
    for modality, cameras in (("visible", "1245"), ("infrared", "36")):
        folder = directory / "photos" / modality
        folder.mkdir(parents=True)
        for image in sorted((directory / "SYSU-MM01").glob(f"cam[{cameras}]/*/*.jpg")):
            (folder / f"{image.parent.parent.name}-{image.parent.name}-{image.name}").symlink_to(image)
        (folder / "1.jpg").write_bytes(image.read_bytes())
    preset = Config.preset.__func__
    monkeypatch.setattr(
        Config, "preset", classmethod(lambda cls, *a, **k: preset(cls, *a, **k).replace(**SMALL))
    )
    monkeypatch.chdir(directory)
    found = []
    for number, (code, reason) in enumerate(blocks(text, "python")):
        if reason is None:
            found.append({"__name__": "readme"})
            exec(compile(code, f"README block {number}", "exec"), found[-1])
    return found


def test_every_python_block_of_the_readme_runs(tmp_path, monkeypatch):
    torch.manual_seed(0)
    run_python_blocks((ROOT / "README.md").read_text(), tmp_path, monkeypatch)


def test_every_command_of_the_readme_parses():
    for words in commands((ROOT / "README.md").read_text()):
        parser().parse_args(words)


def test_no_line_of_prose_is_longer_than_the_code():
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.S)
    assert [line for line in text.splitlines() if len(line) > 110 and line[0] != "|"] == []


NAMED = {"README.md": r"\]\((?!http|#)([^)#]+)"}
NAMED["CONTRIBUTING.md"] = r"(?:ecul|tests|scripts|kernels)/[\w./-]*\w"


@pytest.mark.parametrize("page", NAMED)
def test_every_file_that_a_page_names_is_there(page):
    named = re.findall(NAMED[page], (ROOT / page).read_text())
    assert len(named) > 3 and [name for name in named if not (ROOT / name).exists()] == []


def run(command, **options):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_the_wheel_is_complete_and_works_outside_the_repository(tmp_path):
    """It is built from a copy without the files that git ignores."""
    source = tmp_path / "source"
    for name in ("ecul", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = "from setuptools.build_meta import *; build_wheel('../dist'); build_sdist('../dist')"
    run(["-c", build], cwd=source)
    (wheel,) = (tmp_path / "dist").glob(f"ecul-{ecul.__version__}-*.whl")
    assert len(list(wheel.parent.glob("*.tar.gz"))) == 1
    names = zipfile.ZipFile(wheel).namelist()
    expected = {f.relative_to(ROOT).as_posix() for f in (ROOT / "ecul").rglob("*.py")} | {"ecul/py.typed"}
    expected |= {f"ecul/kernels/{f.name}" for f in (ROOT / "kernels").glob("*.py")}
    assert expected == {n for n in names if ".dist-info/" not in n}
    assert any(n.endswith("entry_points.txt") for n in names)
    run(f"-m pip install --quiet --no-deps --no-index --target lib {wheel}".split(), cwd=tmp_path)
    code = """
import sys
sys.path.insert(0, "lib")
sys.modules.update(dict.fromkeys(("PIL", "matplotlib", "onnx", "sklearn")))
import ecul, ecul.kernels, torch
assert ecul.__file__.startswith(sys.argv[1]) and ecul.kernels.__file__.startswith(sys.argv[1])
for name in ecul.__all__:
    getattr(ecul, name)
from ecul import importers, report
from ecul.tools import export, search
from ecul.report import page, pictures
print(ecul.emcc(torch.eye(5)).tolist())
try:
    pictures.prepare_picture("x.png")
except ImportError as e:
    print(e)
"""
    told = ["[0, 0, 0, 0, 0]", "pictures need matplotlib: pip install 'ecul[plots]'"]
    assert run(["-c", code, str(tmp_path)], cwd=tmp_path) == told


@pytest.mark.skipif(not (ROOT / ".venv/bin/python").exists(), reason="set up by scripts/setup")
@pytest.mark.parametrize("name", ["ablation", "benchmark", "gpu-proof", "rehearse", "reproduce"])
def test_scripts_run_in_the_environment_that_setup_made(name, tmp_path):
    """Whatever python3 is on the path: the first line finds it, from any folder."""
    fake = tmp_path / "python3"
    fake.write_text("#!/bin/sh\nexit 3\n")
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}
    script = ROOT / "scripts" / name
    done = subprocess.run(
        [script, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {name}"), done.stderr
