"""The kernels beside eager torch, compiled torch, the published loops, and flashlib where it is installed.

On a GPU a time is the median of n launches, each with a cold L2 cache. The rows give TFLOP/s or TB/s beside
the rate of a large bfloat16 product or a large copy on the same card. On a CPU the references are measured,
since the library runs them there.
"""

import statistics
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.table import seconds, table_row
from ecul.kernels import memory_contrast, momentum_update_, topk_similarity

TEMPERATURE, MOMENTUM, NEIGHBOURS, CHUNK = 0.05, 0.1, 40, 512


class Case(NamedTuple):
    work: str
    sizes: str
    ours: Any
    rivals: dict[str, Any]
    flops: float = 0
    traffic: float = 0


def rows(device, quick):
    """Rows for the table, one for every rival; peak memory in bytes beyond the inputs, on a GPU."""
    if device == "cpu":
        for case in cases("cpu", torch.float32, quick):
            yield from measured(case, cpu_times, 1 if quick else 3)
        yield table_row("these three on a GPU", "not measured: no GPU", "us")
        return
    reached = gpu_ceilings()
    for dtype in (torch.bfloat16, torch.float32):
        for case in cases("cuda", dtype, quick):
            yield from measured(case, gpu_times, 20 if quick else 100, reached)


def cases(device, dtype, quick):
    name = str(dtype).removeprefix("torch.")
    dim = 256 if quick else 2048
    size, batch = (2_000, 64) if quick else (16_000 if device == "cpu" else 34_167, 384)
    points = _unit_rows(size, dim, dtype, device, 0)
    rivals = {"eager": lambda: eager_topk(points)}
    if device == "cuda":
        compiled_topk = torch.compile(eager_topk)
        rivals["torch.compile"] = lambda: compiled_topk(points)
    if find_spec("flashlib"):
        from flashlib import flash_knn

        rivals["flashlib"] = lambda: flash_knn(points, points, NEIGHBOURS, return_distances=False)
    yield Case(
        f"topk_similarity, {name}",
        f"N={size}, D={dim}, k={NEIGHBOURS}",
        lambda: topk_similarity(points, points, NEIGHBOURS),
        rivals,
        flops=2 * size * size * dim,
    )
    bank_labels = torch.arange(size, device=device) % (size // 40)
    x = _unit_rows(batch, dim, dtype, device, 1).requires_grad_()
    labels = bank_labels[torch.randperm(size, generator=_generator(2))[:batch].to(device)]
    losses = {"eager": eager_contrast, "loop": published_contrast}
    if device == "cuda":
        losses["torch.compile"] = torch.compile(eager_contrast)

    def gradient(loss):
        return torch.autograd.grad(loss(x, points, bank_labels, labels, TEMPERATURE).mean(), x)

    yield Case(
        f"memory_contrast, forward + backward, {name}",
        f"B={batch}, C={size}, D={dim}",
        lambda: gradient(memory_contrast),
        {rival: partial(gradient, loss) for rival, loss in losses.items()},
        flops=4 * batch * size * dim,
    )
    clusters = 16
    bank = _unit_rows(clusters, dim, dtype, device, 3)
    slots = torch.arange(batch, device=device) % clusters
    sample = x.detach()
    yield Case(
        f"momentum_update_, sequential, {name}",
        f"B={batch}, {clusters} labels, D={dim}",
        lambda: momentum_update_(bank, sample, slots, MOMENTUM, "sequential"),
        {"loop": lambda: published_update(bank, sample, slots)},
        traffic=batch * dim * bank.element_size(),
    )


def eager_topk(points):
    """A strip of products at a time, then `topk`, whose ties are left open."""
    return [(points[i : i + CHUNK] @ points.T).topk(NEIGHBOURS) for i in range(0, len(points), CHUNK)]


def eager_contrast(x, bank, bank_labels, labels, temperature):
    """Logits, a mask, two log-sums: what autograd makes of it."""
    scores = (x @ bank.T).float() / temperature
    own = labels[:, None] == bank_labels
    return scores.logsumexp(1) - scores.masked_fill(~own, -torch.inf).logsumexp(1)


def published_contrast(x, bank, bank_labels, labels, temperature):
    """The instance loss as the published scripts write it: a loop over the samples, a mask for each."""
    scores = (x @ bank.T).float() / temperature
    losses = []
    for row, label in zip(scores, labels, strict=True):
        losses.append(row.logsumexp(0) - row[bank_labels == label].logsumexp(0))
    return torch.stack(losses)


def published_update(bank, x, labels):
    """The memory update as the published scripts write it: a loop over the samples."""
    for row, label in zip(x, labels.tolist(), strict=True):
        moved = MOMENTUM * bank[label] + (1 - MOMENTUM) * row
        bank[label] = moved / moved.norm()


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def _unit_rows(size, dim, dtype, device, seed):
    return F.normalize(torch.randn(size, dim, generator=_generator(seed))).to(device, dtype)


def measured(case, timer, n, ceilings=None):
    measured = timer({"ours": case.ours, **case.rivals}, n)
    ours, peak = measured.pop("ours")
    reached = ""
    if ceilings:
        achieved = (case.flops or case.traffic) / ours / 1e12
        unit, ceiling = ("TFLOP/s", ceilings[0]) if case.flops else ("TB/s", ceilings[1])
        reached = f"; {achieved:.3g} {unit} of {ceiling:.3g}"
    for rival, (theirs, their_peak) in measured.items():
        memory = f"; {rival} peak {their_peak / 2**30:.2f} GiB" if their_peak else ""
        sizes = f"{case.sizes}; against {rival}{reached}{memory}"
        yield table_row(case.work, sizes, "us", ours * 1e6, theirs * 1e6, n=n, peak_memory=peak)


def cpu_times(works, n):
    """Median seconds of n for each work, in turns, so that a busy moment falls on all; one run uncounted."""
    rounds = [{name: seconds(work)[0] for name, work in works.items()} for _ in range(n + 1)]
    return {name: (statistics.median(times[name] for times in rounds[1:]), None) for name in works}


def gpu_times(works, n):
    """For each work the median seconds of n by the device's own clock, the L2 cache cold; peak bytes."""
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")
    return {name: _gpu_time(work, n, flush) for name, work in works.items()}


def _gpu_time(work, n, flush):
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    peak = torch.cuda.max_memory_allocated() - before
    events = []
    for _ in range(n):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3, peak


def gpu_ceilings():
    """TFLOP/s of a large bfloat16 product, TB/s of a large copy (bytes read plus bytes written)."""
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    times = gpu_times({"product": lambda: square @ square, "copy": source.clone}, 20)
    return 2 * 8192**3 / times["product"][0] / 1e12, 2 * 2**30 / times["copy"][0] / 1e12
