"""Two processes on the CPU are one run: labels as of one process, equal banks, a clear end when one dies."""

import json
import subprocess
import sys
from pathlib import Path

from tiny import tiny

from ecul import open_dataset, train
from ecul.run.saved import read_run

CONFIG = tiny(weight_joint=0.5, epochs_cross=2, iterations=3)


def torchrun(world, output, *more):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    worker = Path(__file__).with_name("worker.py")
    arguments = [str(worker), str(world), json.dumps(CONFIG.to_dict()), str(output), *more]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)


def test_two_processes_hold_equal_banks_label_as_one_and_end_together(world, tmp_path):
    done = torchrun(world, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "equal banks in 2 epochs" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    alone = train(open_dataset("sysu", world), CONFIG, device="cpu").history
    same = [k for k in alone[0] if k.startswith(("clusters_", "outliers_", "monitor_"))]
    assert len(same) >= 6 and {k: rows[0][k] for k in same} == {k: alone[0][k] for k in same}
    losses = {k: v for k, v in alone[0].items() if k.startswith("loss_")}
    assert losses.keys() <= rows[0].keys()


def test_a_killed_process_ends_the_job_with_a_message(world, tmp_path):
    done = torchrun(world, tmp_path / "killed", "kill")
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr or "resume=True" in done.stderr
    assert [row["epoch"] for row in read_run(tmp_path / "killed").history] == [0]
