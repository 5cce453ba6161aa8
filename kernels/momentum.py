"""The memory update of a batch: rows of a bank move towards the samples that carry their label.

Source: arXiv 2305.12673 (MBCCM: `sequential`) and arXiv 2412.19134 (ECUL's two-stage memory; the rules
`instance` and `mean` are a reconstruction of it).
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ._checks import LABELS, check_device, check_number, check_tensor
from ._triton import jit, rows_contiguous, tl, triton, use_triton

RULES = ("sequential", "instance", "mean", "hard")


@torch.no_grad()
def momentum_update_(
    bank: Tensor, x: Tensor, labels: Tensor, momentum: float, rule: str, generator: Generator | None = None
) -> Tensor:
    """Move row `y` of `bank`, in place, towards the samples with label `y`; other rows stay as they are.

    `bank[y] = normalize(momentum * bank[y] + (1 - momentum) * f)`, where `f` is

    - `sequential`: each sample of the label in batch order, one update after the other;
    - `instance`: one of them, drawn uniformly;
    - `mean`: their mean;
    - `hard`: the one least similar to the row (the earliest of equals).

    Computed in float32 and rounded to the bank's dtype once, at the end; deterministic on every device.

    Args:
        bank: (C, D) float32, bfloat16 or float16, unit rows; updated in place.
        x: (B, D) float32, bfloat16 or float16, unit rows; takes no gradient.
        labels: (B,) int64, rows of `bank`; -1 (any negative) updates nothing.
        momentum: the share kept from the old row, from 0 to 1.
        rule: one of the four above.
        generator: draws the samples of `instance`, on its own device: a CPU generator picks the same samples
            for banks on CPU and on CUDA. None draws from the default generator of the bank's device.

    Returns:
        bank itself.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range; on CPU tensors
            also a label beyond the bank. On CUDA the kernel asserts this, because the host does not wait.
    """
    check_tensor("bank", bank, None, None)
    check_tensor("x", x, None, bank.shape[1])
    check_tensor("labels", labels, x.shape[0], dtypes=LABELS)
    check_device(bank.device, x=x, labels=labels)
    check_rule(momentum, rule)
    priority = None
    if rule == "instance":  # the sample with the smallest number of its label is a uniform draw
        device = labels.device if generator is None else generator.device
        priority = torch.rand(len(labels), device=device, dtype=torch.float32, generator=generator)
        priority = priority.to(labels.device, non_blocking=True)
    _momentum_update_(bank, x.detach(), labels, float(momentum), rule, priority)
    return bank


def check_rule(momentum: float, rule: str) -> None:
    check_number("momentum", momentum)
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be from 0 to 1; got {momentum}")
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}; got {rule!r}")


@torch.no_grad()
def momentum_update_reference(
    bank: Tensor, x: Tensor, labels: Tensor, momentum: float, rule: str, priority: Tensor | None = None
) -> Tensor:
    """`momentum_update_` as a plain loop over the labels: the specification and the CPU path.

    `priority`, (B,) float32, stands for the generator of `instance`: the sample of a label with the smallest
    number is drawn. The other rules do not read it.
    """
    for label in labels[labels >= 0].unique().tolist():
        own = (labels == label).nonzero()[:, 0]
        row, samples = bank[label].float(), x[own].float()
        if rule == "instance":
            samples = samples[priority[own].argmin()][None]  # type: ignore[index]
        elif rule == "mean":
            samples = samples.mean(0, keepdim=True)
        elif rule == "hard":
            samples = samples[(samples * row).sum(1).argmin()][None]
        for sample in samples:
            row = F.normalize(momentum * row + (1 - momentum) * sample, dim=0, eps=1e-12)
        bank[label] = row
    return bank


# The kernel: one launch, one program for each sample of the batch. The program of the first sample of a label
# updates the row of this label; the others do nothing. It keeps the row in registers, goes through the batch
# in order, and loads the next sample while it uses the present one. No atomics: all runs give equal bits.


@jit
def _next(labels, label, start, B, BLOCK_B: tl.constexpr):
    """The first slot from `start` on that carries `label`, or B."""
    start, found = tl.full((), start, tl.int32), tl.full((), B, tl.int32)
    while (start < B) & (found == B):
        slots = start + tl.arange(0, BLOCK_B)
        same = tl.load(labels + slots, mask=slots < B, other=-1) == label
        found = tl.min(tl.where(same & (slots < B), slots, B), 0)
        start += BLOCK_B
    return found


@jit
def _sample(x, slot, x_stride, features, live):
    return tl.load(x + slot.to(tl.int64) * x_stride + features, mask=live, other=0.0).to(tl.float32)


@jit
def _moved(row, sample, momentum):
    moved = momentum * row + (1.0 - momentum) * sample
    return moved / tl.maximum(tl.sqrt(tl.sum(moved * moved, 0)), 1e-12)


@jit
def _update_kernel(
    bank, x, labels, priority, B, C, D, bank_stride, x_stride, momentum,
    RULE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    label = tl.load(labels + slot)
    tl.device_assert(label < C, "a label is beyond the rows of bank")
    if (label >= 0) & (label < C) & (_next(labels, label, 0, B, BLOCK_B) == slot):
        features = tl.arange(0, BLOCK_D)
        live = features < D
        place = bank + label * bank_stride + features
        row = tl.load(place, mask=live, other=0.0).to(tl.float32)
        sample = _sample(x, slot, x_stride, features, live)
        chosen, least = slot, float("inf")
        total, count = tl.zeros((BLOCK_D,), tl.float32), 0.0
        while slot < B:
            after = _next(labels, label, slot + 1, B, BLOCK_B)
            upcoming = _sample(x, after, x_stride, features, live & (after < B))
            if RULE == "sequential":
                row = _moved(row, sample, momentum)
            elif RULE == "mean":
                total, count = total + sample, count + 1.0
            else:
                key = tl.sum(row * sample, 0) if RULE == "hard" else tl.load(priority + slot)
                chosen = tl.where(key < least, slot, chosen)
                least = tl.minimum(key, least)
            slot, sample = after, upcoming
        if RULE == "mean":
            row = _moved(row, total / count, momentum)
        elif RULE != "sequential":
            row = _moved(row, _sample(x, chosen, x_stride, features, live), momentum)
        tl.store(place, row.to(bank.dtype.element_ty), mask=live)


SLOTS = 256  # labels of the batch that a program reads at a time
WIDEST = 16384  # features that a program can keep in registers; wider rows take the reference


def _launch(
    bank: Tensor, x: Tensor, labels: Tensor, momentum: float, rule: str, priority: Tensor | None
) -> None:
    x, labels = rows_contiguous(x), labels.contiguous()
    (C, D), B = bank.shape, x.shape[0]
    block = triton.next_power_of_2(D)
    _update_kernel[(B,)](
        bank, x, labels, priority, B, C, D, bank.stride(0), x.stride(0), momentum,
        RULE=rule, BLOCK_B=SLOTS, BLOCK_D=block,
        num_warps=4 if block <= 2048 else 8, debug=True, sanitize_overflow=False,
    )  # fmt: skip


@torch.library.custom_op("ecul::momentum_update_", mutates_args=("bank",))
def _momentum_update_(
    bank: Tensor, x: Tensor, labels: Tensor, momentum: float, rule: str, priority: Tensor | None
) -> None:
    if not labels.is_cuda and labels.numel() and int(labels.max()) >= bank.shape[0]:
        raise ValueError(f"labels must be below the {bank.shape[0]} rows of bank; got {int(labels.max())}")
    if use_triton(bank) and bank.shape[1] <= WIDEST and bank.stride(1) == 1:
        with torch.cuda.device_of(bank):
            _launch(bank, x, labels, momentum, rule, priority)
    else:
        momentum_update_reference(bank, x, labels, momentum, rule, priority)


@_momentum_update_.register_fake
def _(bank, x, labels, momentum, rule, priority):
    return None
