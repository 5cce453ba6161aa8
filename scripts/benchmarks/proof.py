"""The parts of scripts/gpu-proof: `python -m benchmarks.proof PART [quick]` prints results as JSON lines."""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import kernels as kernel_times
from benchmarks.clustering import DBSCAN, NOISE, SIZES, world
from benchmarks.table import as_line, peak_memory, reset_peak_memory, seconds
from ecul.kernels import memory_contrast, topk_similarity

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).resolve().parents[2]


def say(what, result):
    print(json.dumps({"what": what, "result": result}), flush=True)


def repeats(quick):
    """Equal bits, however often: atomics put the candidates into lists in another order each time."""
    size, times = (500, 3) if quick else (34_167, 100)
    x = world(size, 2048, size // 40, NOISE["typical"])[0].to(DEVICE)
    first = topk_similarity(x, x, 40, exclude_self=True)
    for _ in range(times - 1):
        again = topk_similarity(x, x, 40, exclude_self=True)
        if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
            raise AssertionError("topk_similarity gave other bits")
    say(f"topk_similarity, N={size}, {times} times", "equal bits")


def broken(quick):
    """A NaN passes through, a label without a slot ends the process with a message."""
    x, bank = torch.randn(9, 64, device=DEVICE), torch.randn(300, 64, device=DEVICE)
    labels = torch.arange(300, device=DEVICE)
    if DEVICE == "cuda":
        x[3] = torch.nan
        loss = memory_contrast(x, bank, labels, labels[:9], 0.05)
        if loss.isnan().nonzero().flatten().tolist() != [3]:
            raise AssertionError(f"only the loss of sample 3 should be NaN, got {loss}")
        say("a NaN feature", "a NaN loss, the device goes on")
    done = python(
        "import torch; from ecul.kernels import memory_contrast\n"
        f"x = torch.randn(9, 64, device='{DEVICE}'); y = torch.arange(9, device='{DEVICE}')\n"
        "print(memory_contrast(x, x, y, y + 1, 0.05))"
    )
    if done.returncode == 0 or "carried by no slot" not in done.stderr + done.stdout:
        raise AssertionError(f"a label without a slot: exit status {done.returncode}, {done.stderr[-300:]}")
    say("a label without a slot", "an error that names it")


def python(code, *tool):
    """Run this code in a process of its own, under a tool where one is given."""
    return subprocess.run([*tool, sys.executable, "-c", code], capture_output=True, text=True)


def search(quick):
    """topk_similarity and the momentum update beside their rivals, flashlib's among them if installed."""
    _cases(quick, ("topk_similarity", "momentum_update_"))


def contrast(quick):
    """The loss with its gradient beside eager and compiled torch, in float32 and bfloat16."""
    _cases(quick, ("memory_contrast",))


def _cases(quick, names):
    dtypes = (torch.bfloat16, torch.float32) if DEVICE == "cuda" else (torch.float32,)
    timer = kernel_times.gpu_times if DEVICE == "cuda" else kernel_times.cpu_times
    ceilings = kernel_times.gpu_ceilings() if DEVICE == "cuda" else None
    for case in (case for dtype in dtypes for case in kernel_times.cases(DEVICE, dtype, quick)):
        if case.work.startswith(names):
            for row in kernel_times.measured(case, timer, 2 if quick else 50, ceilings):
                say(case.work, as_line(row, quick))


def clustering(quick):
    """emcc at 34,167, typical and hard, and at 200,000 images; flashlib's DBSCAN where it is installed."""
    for kind in NOISE:
        _cluster(600 if quick else 34_167, kind, 3)
    if not quick:
        _cluster(200_000, "typical", 1)
    if DEVICE == "cuda" and find_spec("flashlib"):
        from flashlib import flash_dbscan

        x = world(34_167, 2048, 843, NOISE["typical"], device=DEVICE)[0]
        flash_dbscan(x[:500], 0.9, 4)
        spent = seconds(lambda: flash_dbscan(x, 0.9, 4), DEVICE, 3)[0]
        say("flashlib's DBSCAN of the features themselves, N=34167", f"{spent:.3g} s, median of 3")


def million(quick):
    """emcc of a million images, features in half precision."""
    _cluster(1_000 if quick else 1_000_000, "typical", 1)


def _cluster(size, kind, n):
    from ecul import emcc

    dtype = torch.bfloat16 if size > 100_000 else torch.float32
    features, *codes = world(size, 2048, size // 40, NOISE[kind], device=DEVICE, dtype=dtype)
    emcc(features[:500], *(c[:500] for c in codes), **SIZES, **DBSCAN)
    held = features.numel() * features.element_size()
    reset_peak_memory(DEVICE)
    spent, labels = seconds(lambda: emcc(features, *codes, **SIZES, **DBSCAN), DEVICE, n)
    peak = (peak_memory(DEVICE) - (held if DEVICE == "cuda" else 0)) / 2**30
    beyond = "beyond the features" if DEVICE == "cuda" else "in all"
    found = f"{int(labels.max()) + 1} clusters, {int((labels < 0).sum())} outliers"
    say(f"emcc, {kind}, N={size}", f"{spent:.3g} s, median of {n}; {peak:.1f} GiB {beyond}; {found}")


def waits(quick):
    """No step of a method's loop may wait for the device."""
    from ecul import Config, open_dataset, synthesize, training

    original = training.make_batches
    few = {"k1": 6, "k2": 2, "k3": 4, "k1_joint": 8, "k2_joint": 2, "k3_joint": 6}

    def guarded(*arguments):
        for batch in original(*arguments):  # drawing a batch copies it to the device
            if DEVICE == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            yield batch
            if DEVICE == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    training.make_batches = guarded
    with tempfile.TemporaryDirectory() as folder:
        root = synthesize(Path(folder) / "world", identities=12, progress=False)
        for method in ("united", "ecul", "mbccm"):
            config = Config.preset("demo", method=method, epochs_intra=1, epochs_cross=1, iterations=2, **few)
            history = training.train(open_dataset("sysu", root), config, device=DEVICE).history
            if any(row.get("skipped") for row in history):
                raise AssertionError("an epoch was skipped, for want of clusters: it has shown nothing")
            say(f"{method}, both stages", "no wait in four batches")


def tests(quick):
    """The tests that need a GPU; without a GPU a few of the others."""
    chosen = ["-m", "gpu"] if DEVICE == "cuda" else ["tests/kernels/test_pairs.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    summary = (done.stdout.strip().splitlines() or ["nothing ran"])[-1]
    if done.returncode:
        raise AssertionError(f"{summary} {done.stderr[-300:]}")
    say(" ".join(chosen), summary)


def training(quick):
    """A ResNet-50 step of 384 images, an epoch of each stage at SYSU-MM01's numbers, and all 75 epochs."""
    from benchmarks import training as steps
    from ecul import Config

    spent = []
    with tempfile.TemporaryDirectory() as folder:
        for work, overrides, count in steps.sizes(DEVICE, quick)[:1]:
            config = Config.preset("demo", **overrides)
            say(work, as_line(steps.step(Path(folder), work, config, DEVICE, count)))
    for row in steps.epochs("SYSU-MM01's numbers", *steps.of_sysu_size(quick), DEVICE):
        spent.append(row["ours"])
        say(row["work"], as_line(row))
    whole = (25 * spent[0] + 50 * spent[1]) / 60
    say("75 epochs, from these two", f"{whole:.1f} min; median epoch {statistics.median(spent):.3g} s")


def sanitizer(quick):
    """Small calls of every kernel under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or DEVICE == "cpu":
        say("compute-sanitizer", "not present" if tool is None else "needs a GPU")
        return
    done = python(
        "import torch; from ecul import emcc; from ecul.kernels import memory_contrast, momentum_update_\n"
        "x = torch.nn.functional.normalize(torch.randn(300, 64, device='cuda'))\n"
        "y = torch.arange(300, device='cuda') % 9\n"
        "emcc(x, k1=8, k2=3, k3=6)\n"
        "memory_contrast(x.requires_grad_(), x.detach().clone(), y, y, 0.05).sum().backward()\n"
        "momentum_update_(x.detach()[:9].clone(), x.detach(), y, 0.1, 'sequential')\n"
        "torch.cuda.synchronize()\n",
        *(tool, "--error-exitcode", "9"),
    )
    if done.returncode:
        raise AssertionError((done.stdout + done.stderr)[-400:])
    say("every kernel under memcheck", done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2:] == ["quick"])
