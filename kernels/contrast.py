"""The contrastive loss against a memory bank, with its gradient: ECUL and MBCCM's `L_C` and `L_I`.

Source: arXiv 2412.19134 (ECUL) and arXiv 2305.12673 (MBCCM). One function serves cluster banks
(`bank_labels = arange(C)`), instance banks and joint banks.
"""

import torch

from ._checks import check_device, check_matrix, check_vector
from ._triton import Config, jit, rows_contiguous, tl, triton, use_triton


def memory_contrast(
    x: torch.Tensor,
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Negative log of the softmax mass that each sample gives to the slots of its own label.

    `s = x @ bank.T / temperature; loss = s.logsumexp(1) - s[:, own].logsumexp(1)`, where `own` are the slots
    with `bank_labels == label`: positives are summed, every slot is in the denominator. Scores, sums and the
    loss are float32 whatever the dtype of `x`.

    Args:
        x: (B, D) float32, bfloat16 or float16; unit rows.
        bank: (C, D) float32, bfloat16 or float16, C >= 1; unit rows. It takes no gradient.
        bank_labels: (C,) int64, the label of every slot.
        labels: (B,) int64, the label of every sample; -1 (any negative) means loss 0 and no gradient.
        temperature: divides the cosine similarities, > 0.

    Returns:
        (B,) float32, one loss a sample, differentiable in `x` alone, and once.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device; on CPU tensors also a
            sample whose label no slot carries, and features that are NaN or infinite. CUDA tensors are not
            waited for: a device-side assertion reports such a label, broken features make the loss NaN.
    """
    _check(x, bank, bank_labels, labels, temperature)
    if use_triton(x):
        with_gradient = x.requires_grad and torch.is_grad_enabled()
        loss, _ = _memory_contrast(x, bank.detach(), bank_labels, labels, temperature, with_gradient)
    else:
        loss = memory_contrast_reference(x, bank, bank_labels, labels, temperature)
    if not loss.is_cuda and not torch.compiler.is_compiling():
        _check_finite(loss, labels)
    return loss


def memory_contrast_reference(
    x: torch.Tensor,
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """`memory_contrast` in plain torch, differentiable by autograd: the specification and the CPU path."""
    with torch.autocast(x.device.type, enabled=False):
        scores = x.float() @ bank.detach().float().T / temperature
    # An ignored sample owns every slot: both terms are the same number, so loss and gradient are exactly 0.
    own = (labels[:, None] == bank_labels) | (labels < 0)[:, None]
    return scores.logsumexp(1) - scores.masked_fill(~own, -torch.inf).logsumexp(1)


def _check(
    x: torch.Tensor, bank: torch.Tensor, bank_labels: torch.Tensor, labels: torch.Tensor, temperature: float
) -> None:
    check_matrix("x", x)
    check_matrix("bank", bank, columns=x.shape[1])
    check_vector("bank_labels", bank_labels, length=bank.shape[0])
    check_vector("labels", labels, length=x.shape[0])
    for name, tensor in (("bank", bank), ("bank_labels", bank_labels), ("labels", labels)):
        check_device(name, tensor, x.device)
    if bank.shape[0] == 0:
        raise ValueError("bank has no rows: there is nothing to contrast with")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0; got {temperature}")


def _check_finite(loss: torch.Tensor, labels: torch.Tensor) -> None:
    """A label without a slot gives an infinite loss, a broken feature a NaN: one look at (B,) finds both."""
    wrong = ~loss.detach().isfinite()
    if not wrong.any():
        return
    first = int(wrong.nonzero()[0])
    if loss[first].isnan():
        raise ValueError(f"x or bank holds NaN or infinite features (the loss of sample {first} is NaN)")
    raise ValueError(
        f"labels[{first}] = {int(labels[first])} is carried by no slot of bank_labels; "
        "give such samples the label -1, or a slot of their own"
    )


# The kernels. Let s_ij = x_i . b_j / tau, and sum exp(s_ij) over the own slots of sample i to P_i, over the
# others to Q_i, over all of them to Z_i = P_i + Q_i. Then
#
#     loss_i = log Z_i - log P_i = log(1 + Q_i / P_i)
#     d loss_i / d x_i = 1/tau sum_j w_ij b_j,    w_ij = exp(s_ij) / Z_i              for another's slot,
#                                                 w_ij = -exp(s_ij) / P_i * Q_i / Z_i  for an own slot.
#
# The bank takes no gradient, so this is all there is to the backward pass, and the forward pass computes it:
# two products, and no logits kept. P and Q are only known when the whole row is, so
#   1. a program per tile of s (T tiles along the bank) computes it once. Per row it stores the tile's maximum
#      and sum of exponentials, apart for own and other slots, and per element exp(s - that maximum). This
#      lies in [0, 1] and keeps its relative precision in bfloat16; s itself, rounded, would cost 5 % of the
#      gradient at tau = 0.05. With a maximum for each kind, no loss is so large that own slots underflow;
#   2. a program per sample folds the T maxima and sums into log P and log Q: the loss;
#   3. a program per tile of the gradient turns exp(s - maximum) into w, by one factor per row, tile and kind
#      of slot, and multiplies with the bank. The bank is split over several programs and their parts summed
#      afterwards: no atomics, the same bits in every run.
# A sample with label -1 owns every slot: Q = 0, so its loss and its gradient are exactly 0.


@jit
def _scores_kernel(
    x, bank, bank_labels, labels, weights, stats, B, C, D, T, size, x_stride, bank_stride, scale,
    WEIGHTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    slots = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    row_live, slot_live = rows < B, slots < C
    x_rows = x + tl.minimum(rows, B - 1).to(tl.int64)[:, None] * x_stride
    bank_rows = bank + tl.minimum(slots, C - 1).to(tl.int64)[None, :] * bank_stride
    s = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    for start in range(0, D, BLOCK_D):
        features = start + tl.arange(0, BLOCK_D)
        a = tl.load(x_rows + features[None, :], mask=features[None, :] < D, other=0.0)
        b = tl.load(bank_rows + features[:, None], mask=features[:, None] < D, other=0.0)
        s = tl.dot(a, b.to(a.dtype), s, input_precision=PRECISION)
    s = tl.where(slot_live[None, :], s * scale, -float("inf"))

    label = tl.load(labels + rows, mask=row_live, other=-1)
    slot_label = tl.load(bank_labels + slots, mask=slot_live, other=-1)
    own = (label[:, None] == slot_label[None, :]) | (label < 0)[:, None]
    own_top = tl.max(tl.where(own, s, -float("inf")), 1)
    other_top = tl.max(tl.where(own, -float("inf"), s), 1)
    p = tl.where(s == -float("inf"), 0.0, tl.exp(s - tl.where(own, own_top[:, None], other_top[:, None])))
    out = stats + rows.to(tl.int64) * T + tile
    tl.store(out, own_top, mask=row_live)
    tl.store(out + size, tl.sum(tl.where(own, p, 0.0), 1), mask=row_live)
    tl.store(out + 2 * size, other_top, mask=row_live)
    tl.store(out + 3 * size, tl.sum(tl.where(own, 0.0, p), 1), mask=row_live)
    if WEIGHTS:
        out = weights + rows.to(tl.int64)[:, None] * (T * BLOCK_C) + slots[None, :]
        tl.store(out, p.to(weights.dtype.element_ty), mask=row_live[:, None])


@jit
def _log_sum(tops, sums, tiles, T):
    """log sum_t sums[t] exp(tops[t]), minus infinity where nothing was summed."""
    top = tl.load(tops + tiles, mask=tiles < T, other=-float("inf"))
    part = tl.load(sums + tiles, mask=tiles < T, other=0.0)
    highest = tl.max(top, 0)
    return highest + tl.log(tl.sum(tl.where(part == 0.0, 0.0, part * tl.exp(top - highest)), 0))


@jit
def _fold_kernel(stats, loss, totals, B, T, size, BLOCK_T: tl.constexpr):
    row = tl.program_id(0)
    tiles = tl.arange(0, BLOCK_T)
    first = stats + row.to(tl.int64) * T
    log_p = _log_sum(first, first + size, tiles, T)
    log_q = _log_sum(first + 2 * size, first + 3 * size, tiles, T)
    tl.device_assert(log_p > -float("inf"), "a label is carried by no slot of bank_labels")
    excess = log_q - log_p
    value = tl.maximum(excess, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(excess)))
    tl.store(loss + row, value)
    tl.store(totals + row, log_p)
    tl.store(totals + B + row, log_p + value)  # log Z
    tl.store(totals + 2 * B + row, tl.exp(excess - value))  # Q / Z


@jit
def _gradient_kernel(
    weights, bank, bank_labels, labels, stats, totals, parts, B, C, D, T, size, bank_stride, scale,
    tiles_each, PRECISION: tl.constexpr, TILE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    features = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_live, feature_live = rows < B, features < D
    label = tl.load(labels + rows, mask=row_live, other=-1)
    log_p = tl.load(totals + rows, mask=row_live, other=0.0)
    log_z = tl.load(totals + B + rows, mask=row_live, other=0.0)
    share = tl.load(totals + 2 * B + rows, mask=row_live, other=0.0)
    rows_there = tl.minimum(rows, B - 1).to(tl.int64)
    tops = stats + rows_there * T
    weight_rows = weights + rows_there[:, None] * (T * TILE)
    gradient = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    first = tl.program_id(2) * tiles_each * TILE
    for start in range(first, tl.minimum(first + tiles_each * TILE, C), BLOCK_C):
        slots = start + tl.arange(0, BLOCK_C)
        slots_there = tl.minimum(slots, C - 1)
        p = tl.load(weight_rows + slots[None, :]).to(tl.float32)
        bank_rows = bank + slots_there.to(tl.int64)[:, None] * bank_stride
        b = tl.load(bank_rows + features[None, :], mask=feature_live[None, :], other=0.0)
        own = (label[:, None] == tl.load(bank_labels + slots_there)[None, :]) | (label < 0)[:, None]
        own_factor = -tl.exp(tl.load(tops + start // TILE) - log_p) * share
        other_factor = tl.exp(tl.load(tops + 2 * size + start // TILE) - log_z)
        w = p * tl.where(own, own_factor[:, None], other_factor[:, None])
        operand = weights.dtype.element_ty
        gradient = tl.dot(w.to(operand), b.to(operand), gradient, input_precision=PRECISION)
    out = parts + (tl.program_id(2).to(tl.int64) * B + rows)[:, None] * D + features[None, :]
    tl.store(out, gradient * scale, mask=row_live[:, None] & feature_live[None, :])


PROGRAMS = 264  # the bank is split until the gradient has two programs for each multiprocessor of an H100
HALF = (  # the products of _scores_kernel and of _gradient_kernel, for bfloat16 and float16 samples
    Config({"BLOCK_B": 128, "BLOCK_C": 128, "BLOCK_D": 64}, warps=8, stages=3, shared=131072),
    Config({"BLOCK_B": 64, "BLOCK_C": 64, "BLOCK_D": 128}, warps=8, stages=3, shared=100352),
)
FULL = (  # for float32 samples: three TF32 products give float32 precision
    Config({"BLOCK_B": 64, "BLOCK_C": 128, "BLOCK_D": 32}, warps=8, stages=3, shared=81920),
    Config({"BLOCK_B": 64, "BLOCK_C": 32, "BLOCK_D": 128}, warps=8, stages=3, shared=83456),
)


def _launch(x, bank, bank_labels, labels, temperature, with_gradient):
    """The loss (B,) and its gradient (B, D), float32; without a gradient (0, D)."""
    (B, D), C = x.shape, bank.shape[0]
    x, bank = rows_contiguous(x), rows_contiguous(bank)
    bank_labels, labels = bank_labels.contiguous(), labels.contiguous()
    loss = x.new_empty(B, dtype=torch.float32)
    if B == 0:
        return loss, x.new_empty((0, D), dtype=torch.float32)
    scores, gradient = FULL if x.dtype == torch.float32 else HALF
    tile, block_b = scores.blocks["BLOCK_C"], scores.blocks["BLOCK_B"]
    T = triton.cdiv(C, tile)
    stats = x.new_empty((4, B, T), dtype=torch.float32)
    totals = x.new_empty((3, B), dtype=torch.float32)
    weights = x.new_empty((B if with_gradient else 0, T * tile))
    precision = "ieee" if torch.version.hip else "tf32x3"
    scores.launch(
        _scores_kernel, (triton.cdiv(B, block_b), T),
        x, bank, bank_labels, labels, weights, stats, B, C, D, T, B * T, x.stride(0), bank.stride(0),
        1 / temperature, WEIGHTS=with_gradient, PRECISION=precision,
    )  # fmt: skip
    _fold_kernel[(B,)](
        stats, loss, totals, B, T, B * T, BLOCK_T=triton.next_power_of_2(T),
        num_warps=4, debug=True, sanitize_overflow=False,
    )  # fmt: skip
    if not with_gradient:
        return loss, x.new_empty((0, D), dtype=torch.float32)
    grid = (triton.cdiv(B, gradient.blocks["BLOCK_B"]), triton.cdiv(D, gradient.blocks["BLOCK_D"]))
    tiles_each = triton.cdiv(T, max(1, min(T, PROGRAMS // (grid[0] * grid[1]))))
    parts = x.new_empty((triton.cdiv(T, tiles_each), B, D), dtype=torch.float32)
    gradient.launch(
        _gradient_kernel, (*grid, parts.shape[0]),
        weights, bank, bank_labels, labels, stats, totals, parts, B, C, D, T, B * T, bank.stride(0),
        1 / temperature, tiles_each, PRECISION=precision, TILE=tile,
    )  # fmt: skip
    return loss, parts.sum(0)


@torch.library.custom_op("ecul::memory_contrast", mutates_args=())
def _memory_contrast(
    x: torch.Tensor,
    bank: torch.Tensor,
    bank_labels: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    with_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.cuda.device_of(x):
        return _launch(x, bank, bank_labels, labels, temperature, with_gradient)


@_memory_contrast.register_fake
def _(x, bank, bank_labels, labels, temperature, with_gradient):
    rows = x.shape[0] if with_gradient else 0
    return (
        x.new_empty(x.shape[0], dtype=torch.float32),
        x.new_empty((rows, x.shape[1]), dtype=torch.float32),
    )


def _setup_context(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])


def _backward(ctx, loss_gradient, _):
    (gradient,) = ctx.saved_tensors
    return (loss_gradient[:, None] * gradient).to(ctx.dtype), None, None, None, None, None


_memory_contrast.register_autograd(_backward, setup_context=_setup_context)
