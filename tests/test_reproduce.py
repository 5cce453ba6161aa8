"""scripts/reproduce runs through on folders of the exact layouts, goes on, and says how far it is."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import layouts
import pytest
from tiny import TINY

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", ["sysu", "regdb", "llcm"])
def test_it_runs_through_on_the_exact_layouts(name, tmp_path):
    make = {"sysu": layouts.sysu, "regdb": layouts.regdb, "llcm": layouts.llcm}[name]
    root = make(tmp_path / "data", images=4, size=(32, 16))
    command = [sys.executable, str(ROOT / "scripts" / "reproduce"), name, str(root), "--trials", "1-2"]
    command += ["--output", str(tmp_path / "runs"), "--option", "subset=true", "--methods", "mbccm"]
    for field, value in {**TINY, "epochs_cross": 0, "eps": 0.9}.items():
        command += ["--set", f"{field}={json.dumps(value)}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "runs" / f"{name}.json").read_text())
    rows = saved["rows"]["mbccm"]
    lines = done.stdout.splitlines()
    told = [line for line in lines if line.startswith("| mbccm | ")]
    assert len(told) == len(rows) == {"sysu": 2, "regdb": 2, "llcm": 3}[name]
    assert lines[-1].startswith("Here: not ") and lines[-1].endswith("'s own test set.")
    mode = rows[0]["mode"] if name == "sysu" else rows[0]["direction"]
    (line,) = [line for line in told if line.startswith(f"| mbccm | {mode}")][:1]
    assert f"| {rows[0]['rank1']:.2f} / {rows[0]['mAP']:.2f} |" in line
    if name != "llcm":
        assert f"| {rows[0]['rank1'] - {'sysu': 53.14, 'regdb': 83.79}[name]:+.2f} /" in line
    if name == "regdb":
        assert rows[0]["trials"] == 2 and (tmp_path / "runs" / "regdb-mbccm-2" / "log.jsonl").is_file()


def test_a_row_without_figures_stays_empty():
    table = runpy.run_path(str(ROOT / "scripts" / "reproduce"))["table"]
    row = {"mode": "all", "rank1": None, "mAP": None, "caution": ""}
    assert "| mbccm | all | 53.14 / 48.16 |  |  |" in table("sysu", {"mbccm": [row]})
