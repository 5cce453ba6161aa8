"""The command line does what the functions do, says what it takes, and fails in one line."""

import argparse
import io
import json
import re
import shlex
import subprocess
import sys

import layouts
import numpy as np
import pytest
import torch
from PIL import Image
from test_importers import published
from tiny import TINY

import ecul
from ecul import MODALITIES, TwoStreamResNet, evaluation, extract, kernels
from ecul.cli import main, parser
from ecul.features import extract_files
from ecul.tools.search import image_files, load_features

COMMANDS = {"train", "config", "evaluate", "compare", "report", "extract", "search", "import", "export"}
COMMANDS |= {"tune", "threshold", "check", "synthesize", "demo"}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = TwoStreamResNet(10, 4, False, (32, 16))
    model(torch.randn(8, 3, 32, 16), torch.randn(8, 3, 32, 16))
    return model.eval()


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def photos(tmp_path):
    """Six readable images in folders, and two files that only look like images."""
    files = ("a/1.png", "a/2.jpg", "a/3.png", "b/c/4.png", "b/5.bmp", "6.png")
    whole = [layouts.picture(tmp_path / "photos" / name, (40, 20)) for name in files]
    (tmp_path / "photos" / "a" / "broken.jpg").write_bytes(b"not an image")
    (tmp_path / "photos" / "b" / "cut.png").write_bytes(whole[0].read_bytes()[:99])
    return tmp_path / "photos"


def settings(**overrides):
    """The tiny recipe as arguments of `train`."""
    return [part for k, v in {**TINY, **overrides}.items() for part in ("--set", f"{k}={json.dumps(v)}")]


def subparsers():
    (choices,) = [a.choices for a in parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return choices


def test_every_command_is_there_and_every_option_has_help():
    assert set(subparsers()) == COMMANDS
    for name, inner in subparsers().items():
        assert inner.description, name
        for action in inner._actions:
            assert action.help and len(action.help) > 5, f"{name} {action.option_strings or action.dest}"
        assert inner.format_help()


def test_help_needs_no_docstrings():
    done = subprocess.run([sys.executable, "-OO", "-m", "ecul", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and all(name in done.stdout for name in COMMANDS), done.stderr
    assert "Train without identity labels; the run" in done.stdout and "ecul demo" in done.stdout


SIDES = ["--query-modality", "infrared", "--gallery-modality", "visible"]
WITH_MODEL = ["extract MODEL folder --modality visible -o x", "export MODEL --modality visible -o x"]
WITH_MODEL += [f"search MODEL --query q --gallery g {' '.join(SIDES)}", "evaluate sysu root MODEL"]


@pytest.mark.parametrize("line", [*WITH_MODEL, "tune sysu root MODEL", "threshold sysu root MODEL"])
def test_a_model_is_given_alike_in_every_command(line, capsys):
    for given in ("--model run", "run"):
        args = parser().parse_args(line.replace("MODEL", given).split())
        assert args.model == (["run"] if args.command == "evaluate" else "run")
    assert main(line.replace("MODEL", "").split()) == 2
    assert "--model is missing: a run directory" in capsys.readouterr().err


def test_config_lists_every_field_with_its_value_and_meaning(capsys):
    assert main(["config", "--preset", "regdb", "--method", "mbccm"]) == 0
    lines = re.findall(r"^(\w+)=(.*?): (.{5,})\. It must (.{5,})\.$", capsys.readouterr().out, re.M)
    values = {name: json.loads(value) for name, value, *_ in lines}
    assert values == ecul.Config.preset("regdb", "mbccm").to_dict()


def test_errors_are_one_line_and_code_two(capsys, tmp_path):
    assert main(["demo", "-o", str(tmp_path / "demo"), "--device", "gpu"]) == 2
    assert "expected cpu, cuda or cuda:0, cuda:1 ..., got 'gpu'" in capsys.readouterr().err
    assert main(["evaluate", "sysu", str(tmp_path / "absent"), "--model", "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ecul evaluate: ") and error.count("\n") == 1 and "Traceback" not in error
    with pytest.raises(FileNotFoundError):
        main(["--traceback", "evaluate", "sysu", str(tmp_path / "absent"), "--model", "x"])
    with pytest.raises(SystemExit):
        main(["train", "sysu", "x", "-o", "y", "--set", "no-value"])
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"{ecul.__version__}\n"


def test_a_world_is_rendered_and_checked(tmp_path, capsys):
    root = str(tmp_path / "world")
    assert main(["synthesize", root, "--identities", "8", "--images", "3", "--size", "32", "16"]) == 0
    assert capsys.readouterr().out == f"{root}\n"
    assert main(["check", "sysu", root, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["visible"]["identities"] == 8


def test_search_ranks_as_a_plain_sort_does(photos, model, saved, tmp_path, capsys):
    query = str(photos / "a" / "1.png")
    command = ["search", saved, "--query", query, "--gallery", str(photos), "--top", "4", *SIDES]
    command += ["--skip-unreadable"]
    assert main([*command, "-o", str(tmp_path / "found.png")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    names = extract_files(model, image_files(photos), "visible", skip_unreadable=True, progress=False).paths
    row = extract(model, [query], "infrared", progress=False)[0]
    scores = (extract(model, names, "visible", progress=False) @ row).tolist()
    expected = sorted(zip(scores, names, strict=True), reverse=True)[:4]
    assert [line[2] for line in lines[1:]] == [name for _, name in expected]
    assert np.allclose([float(line[1]) for line in lines[1:]], [s for s, _ in expected], atol=6e-4)
    assert main([*command, "--json"]) == 0
    (answers,) = json.loads(capsys.readouterr().out).values()
    assert [answer["path"] for answer in answers] == [name for _, name in expected]
    assert lines[0] == [query] and [line[0] for line in lines[1:]] == ["1", "2", "3", "4"]
    assert np.asarray(Image.open(tmp_path / "found.png")).std() > 5


def test_import_names_what_it_leaves_out(model, saved, tmp_path, capsys):
    torch.save(published(model) | {"classifier.weight": torch.zeros(2, 2)}, tmp_path / "agw.pth")
    out = tmp_path / "imported"
    command = ["import", str(tmp_path / "agw.pth"), "-o", str(out), "--size", "32", "16"]
    assert main(command) == 2
    assert "--pooling must be gem, or avg for AGW's base" in capsys.readouterr().err
    assert main([*command, "--pooling", "gem"]) == 0
    assert "left out, what only training uses: classifier.weight\n" in capsys.readouterr().out
    pixels = torch.zeros(2, 3, 32, 16, dtype=torch.uint8)
    models = (model, TwoStreamResNet.from_pretrained(out))
    assert torch.equal(*(extract(m, pixels, "infrared", progress=False) for m in models))


def test_two_folders_from_training_to_a_search(tmp_path, capsys, caplog, monkeypatch):
    """Unreadable images are left out by one flag. The run remembers it, and where its images are."""
    for modality in MODALITIES:
        for i in range(12):
            layouts.picture(tmp_path / "own" / modality / f"{i}.png", (16, 16))
        (tmp_path / "own" / modality / "broken.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "ecul")
    train = ["train", "folders", "own", "-o", "run", "--preset", "demo"]
    train += settings(epochs_cross=0, size=[16, 16])

    def refused(*command):
        assert main(command) == 2
        return capsys.readouterr().err

    assert "skip_unreadable=True (--skip-unreadable) leaves such" in refused(*train)
    assert main(["check", "folders", "own"]) == 1
    assert main(["check", "folders", "own", "--skip-unreadable"]) == 0
    assert main([*train, "--skip-unreadable"]) == 0
    capsys.readouterr()
    assert main(["extract", "run", "own/visible", "--modality", "visible", "-o", "f.safetensors"]) == 0
    assert "12 features are in" in capsys.readouterr().out and "skipped, cannot be read" in caplog.text
    found, model = load_features("f.safetensors"), TwoStreamResNet.from_pretrained("run")
    assert found.modality == "visible" and len(found.unreadable) == 1 and found.model_sha256 == model.sha256
    assert torch.allclose(found.features, extract(model, found.paths, "visible", progress=False))
    look = ["search", "run", "--query", "own/visible", "--gallery", "own/infrared", "--top", "2"]
    assert main([*look, *SIDES, "--rerank"]) == 0 and len(capsys.readouterr().out.splitlines()) == 37
    for work in ("tune", "threshold"):
        assert main([work, "folders", "own", "--model", "run"]) == 0
    again = ["train", "folders", "own", "--skip-unreadable", "-o", "again", "--config", "run/config.json"]
    assert "--config has the fields of method united" in refused(*again, "--method", "ecul")
    assert main([*again, "--set", "weights=run"]) == 0
    assert "run: a trained model; all its weights are taken" in caplog.text
    resume = ["train", "folders", "own", "-o", "run", "--resume"]
    assert main([*resume, "--set", "epochs_intra=2"]) == 0  # the run's own settings, but for this one
    assert "the model after epoch 2 is run/model.safetensors" in capsys.readouterr().out
    assert "cannot be continued with other settings" in refused(*resume, "--preset", "demo")
    monkeypatch.chdir("/")
    report = ["report", str(tmp_path / "run"), "--queries", "1", "--top", "2"]
    assert main(report) == 0 and (tmp_path / "run" / "report" / "ranked.png").is_file()
    (tmp_path / "own").rename(tmp_path / "moved")
    assert "--root (root=) names their folder" in refused(*report)
    assert main([*report, "--root", str(tmp_path / "moved")]) == 0
    assert "is not a folder" in refused(*report, "--root", str(tmp_path / "nowhere"))


def test_outputs_are_looked_at_before_any_work(photos, saved, tmp_path, capsys, monkeypatch):
    folder = str(photos)
    search_it = ["search", saved, "--query", folder, "--gallery", folder, *SIDES, "--skip-unreadable"]
    assert main([*search_it, "-o", str(tmp_path / "new" / "folder" / "found.png")]) == 0
    assert (tmp_path / "new" / "folder" / "found.png").is_file()

    def work(path):
        raise AssertionError("work began before the output was looked at")

    monkeypatch.setattr(TwoStreamResNet, "from_pretrained", work)
    (tmp_path / "a.png").mkdir()
    extract_it = ["extract", saved, folder, "--modality", "visible"]
    for command, output, told in (
        (search_it, "found.jpg", "must end in .png"),
        (search_it, "new", "must end in .png"),
        (search_it, "a.png", "cannot write"),
        (extract_it, "f.pt", "must end in .safetensors"),
    ):
        assert main([*command, "-o", str(tmp_path / output)]) == 2
        assert told in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*search_it, "-o", str(tmp_path / "b.png")]) == 2
    assert "pip install 'ecul[plots]'" in capsys.readouterr().err


def test_a_reader_that_stops_early_is_no_error(world):
    command = [sys.executable, "-m", "ecul", "check", "sysu", world, "--quick"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 141


@pytest.mark.filterwarnings("ignore:Glyph")  # where no font has them
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_narrow_encoding_gets_escapes(encoding, saved, tmp_path, monkeypatch):
    for odd in ("行人", "a$_$b", "$\\frac{"):  # Chinese, and what LaTeX would read
        layouts.picture(tmp_path / "people" / f"{odd}.png")
    folder, raw = str(tmp_path / "people"), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    command = ["search", saved, "--query", folder, "--gallery", folder, *SIDES]
    assert main([*command, "-o", str(tmp_path / "drawn.png")]) == 0
    name, told = "行人" if encoding == "utf-8" else r"\u884c\u4eba", raw.getvalue().decode(encoding)
    assert told.count(f"{name}.png") == told.count("$_$") == 4 and (tmp_path / "drawn.png").is_file()


def test_closed_streams_are_no_error(world, capsys, monkeypatch):
    shell = f"exec {sys.executable} -m ecul check sysu {shlex.quote(world)} --quick >&-"
    done = subprocess.run(shell, shell=True, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["check", "sysu", "absent"]) == 2
    assert capsys.readouterr().out == ""  # where print would write what stderr cannot take


def test_a_package_that_is_missing_is_named(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "ecul.common.logs")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["check", "sysu", "absent"]) == 2
    assert capsys.readouterr().err == "ecul check: needs tqdm: pip install tqdm\n"


PUBLIC = [getattr(room, name) for room in (ecul, kernels, evaluation) for name in room.__all__]
ELSEWHERE = "Results average"  # which check nothing, as the references of kernels
SOURCES = "train extract emcc EMCC match_clusters ClusterMemory InstanceMemory TwoStreamResNet"


@pytest.mark.parametrize("case", PUBLIC, ids=lambda case: case.__name__)
def test_docstrings_say_errors_and_source(case):
    name = case.__name__
    if name not in ELSEWHERE.split() and not name.endswith("_reference"):
        assert re.search(r"[Ee]rrors?\b|Raises", case.__doc__)
    assert name not in SOURCES.split() or re.search(r"Source|arXiv", case.__doc__)
