"""The contrastive loss against a memory bank, with its gradient: ECUL and MBCCM's `L_C` and `L_I`.

Source: arXiv 2412.19134 (ECUL) and arXiv 2305.12673 (MBCCM). One function serves cluster banks
(`bank_labels = arange(C)`), instance banks and joint banks.
"""

import torch
from torch import Tensor

from ._checks import LABELS, check_device, check_number, check_tensor
from ._triton import jit, product, tl, use_triton

HOTTEST = 1e6  # above this temperature float32 gives every slot the same weight


def memory_contrast(
    x: Tensor, bank: Tensor, bank_labels: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """Negative log of the softmax mass that each sample gives to the slots of its own label.

    `s = x @ bank.T / temperature; loss = s.logsumexp(1) - s[:, own].logsumexp(1)`, where `own` are the slots
    with `bank_labels == label`: positives are summed, every slot is in the denominator. Scores, sums and the
    loss are float32. The bank is multiplied in the dtype of `x`. Under autocast on a GPU, both are multiplied
    in the dtype of autocast.

    Args:
        x: (B, D) float32, bfloat16 or float16; unit rows.
        bank: (C, D) float32, bfloat16 or float16, C >= 1; unit rows. It takes no gradient.
        bank_labels: (C,) int64, the label of every slot.
        labels: (B,) int64, the label of every sample; -1 (any negative) means loss 0 and no gradient.
        temperature: divides the cosine similarities; above 0, at most 1e6.

    Returns:
        (B,) float32, the loss of each sample. It has a first derivative, in `x` alone.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range; on CPU tensors
            also a label that no slot carries, and features that are NaN or infinite. On CUDA the host does
            not wait: a device-side assertion reports such a label, and such features make the loss NaN.
    """
    check_tensor("x", x, None, None)
    check_tensor("bank", bank, None, x.shape[1])
    check_tensor("bank_labels", bank_labels, bank.shape[0], dtypes=LABELS)
    check_tensor("labels", labels, x.shape[0], dtypes=LABELS)
    check_device(x.device, bank=bank, bank_labels=bank_labels, labels=labels)
    if bank.shape[0] == 0:
        raise ValueError("bank has no rows: there is nothing to contrast with")
    check_temperature(temperature)
    temperature = float(temperature)
    if use_triton(x):
        with_gradient = x.requires_grad and torch.is_grad_enabled()
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        loss, *_ = _memory_contrast(x, bank.detach(), bank_labels, labels, temperature, with_gradient)
    else:
        loss = memory_contrast_reference(x, bank, bank_labels, labels, temperature)
    if not loss.is_cuda and not torch.compiler.is_compiling():
        _require_finite(loss, labels)
    return loss


def check_temperature(temperature: float) -> None:
    check_number("temperature", temperature)
    if not 0 < temperature <= HOTTEST:
        raise ValueError(f"temperature must be above 0 and at most {HOTTEST}; got {temperature}")


def memory_contrast_reference(
    x: Tensor, bank: Tensor, bank_labels: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """`memory_contrast` in plain torch, differentiable by autograd: the specification and the CPU path."""
    with torch.autocast(x.device.type, enabled=False):
        scores = x.float() @ bank.detach().float().T / temperature
    # An ignored sample owns every slot: both terms are the same number, so loss and gradient are exactly 0.
    own = (labels[:, None] == bank_labels) | (labels < 0)[:, None]
    return scores.logsumexp(1) - scores.masked_fill(~own, -torch.inf).logsumexp(1)


def _require_finite(loss: Tensor, labels: Tensor) -> None:
    """Raise the error of the first loss that is not finite: infinite if no slot has the label, else NaN."""
    wrong = (~loss.detach().isfinite()).nonzero()
    if len(wrong) == 0:
        return
    first = int(wrong[0])
    if loss[first].isnan():
        raise ValueError(f"x or bank holds NaN or infinite features (the loss of sample {first} is NaN)")
    raise ValueError(
        f"labels[{first}] = {int(labels[first])} is carried by no slot of bank_labels; "
        "give such samples the label -1, or a slot of their own"
    )


# The kernel. Let s_ij = x_i . b_j / tau. Let P_i be the sum of exp(s_ij) over the own slots of sample i, and
# Q_i the sum over the others. Let p be the softmax over the own slots, and q that over the others. Then
#
#     loss_i = log(P_i + Q_i) - log P_i = log(1 + Q_i / P_i)
#     d loss_i / d x_i = r_i / tau (sum_others q_ij b_j - sum_own p_ij b_j),    r_i = Q_i / (P_i + Q_i).
#
# The bank takes no gradient, so the forward pass computes all of this: a product; a kernel that turns a row
# of scores into the loss, r / tau and the weights q and -p; and a second product. The weights lie in [-1, 1],
# so half precision keeps their relative precision, even if the loss is small. The scores stay float32: half
# precision would change the gradient by 5 % at tau = 0.05. Own and other slots have separate maxima, so the
# own slots never underflow. A sample with label -1 owns every slot: Q = 0, loss and gradient are exactly 0.


@jit
def _weights_kernel(
    scores, weights, bank_labels, labels, loss, factors, C, scale,
    WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    label = tl.load(labels + row)
    own_top, own_sum = tl.full((BLOCK,), -float("inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
    other_top, other_sum = own_top, own_sum
    place = row.to(tl.int64) * C + tl.arange(0, BLOCK)
    for start in range(0, C, BLOCK):  # each lane sums relative to its largest score so far, by kind
        slots = start + tl.arange(0, BLOCK)
        live = slots < C
        own = (tl.load(bank_labels + slots, mask=live, other=0) == label) | (label < 0)
        s = tl.load(scores + place + start, mask=live, other=0.0) * scale
        above = s - tl.where(own, own_top, other_top)
        p = tl.exp(-tl.abs(above))
        kind_sum = tl.where(own, own_sum, other_sum)
        kind_sum = tl.where(above > 0, kind_sum * p + 1.0, kind_sum + p)
        own_sum = tl.where(live & own, kind_sum, own_sum)
        other_sum = tl.where(live & (own == 0), kind_sum, other_sum)
        own_top = tl.where(live & own, tl.maximum(own_top, s), own_top)
        other_top = tl.where(live & (own == 0), tl.maximum(other_top, s), other_top)
    log_p, log_q = _log_sum(own_top, own_sum), _log_sum(other_top, other_sum)
    tl.device_assert(log_p != -float("inf"), "a label is carried by no slot of bank_labels")
    excess = log_q - log_p
    value = tl.maximum(excess, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(excess)))
    tl.store(loss + row, value)
    tl.store(factors + row, tl.exp(excess - value) * scale)
    if WEIGHTS:
        for start in range(0, C, BLOCK):
            slots = start + tl.arange(0, BLOCK)
            live = slots < C
            own = (tl.load(bank_labels + slots, mask=live, other=0) == label) | (label < 0)
            s = tl.load(scores + place + start, mask=live, other=0.0) * scale
            w = tl.exp(s - tl.where(own, log_p, log_q))
            w = tl.where(own, -w, w).to(weights.dtype.element_ty)
            tl.store(weights + place + start, w, mask=live)


@jit
def _log_sum(tops, sums):
    """log sum_t sums[t] exp(tops[t]); minus infinity if nothing was summed."""
    highest = tl.max(tops, 0)
    return highest + tl.log(tl.sum(tl.where(sums == 0.0, 0.0, sums * tl.exp(tops - highest)), 0))


OPTIONS = {"BLOCK": 1024, "num_warps": 4, "num_stages": 2}
SCORES = 2**26  # held at a time, in float32; at least one row


def _launch(
    x: Tensor, bank: Tensor, bank_labels: Tensor, labels: Tensor, temperature: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (B,), and its gradient as factors (B,) and rows, (B, D) or (0, D) if unwanted; all float32."""
    (B, D), C = x.shape, bank.shape[0]
    bank = bank.to(x.dtype)
    bank_labels, labels = bank_labels.contiguous(), labels.contiguous()
    loss, factors = (x.new_empty(B, dtype=torch.float32) for _ in range(2))
    gradient = x.new_empty((B if with_gradient else 0, D), dtype=torch.float32)
    rows = max(1, SCORES // C)
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        for start in range(0, B, rows):
            strip = slice(start, min(start + rows, B))
            scores = product(x[strip], bank.T)
            weights = scores if x.dtype == torch.float32 else torch.empty_like(scores, dtype=x.dtype)
            _weights_kernel[(strip.stop - start,)](
                scores, weights, bank_labels, labels[strip], loss[strip], factors[strip], C, 1 / temperature,
                WEIGHTS=with_gradient, debug=True, sanitize_overflow=False, **OPTIONS,
            )  # fmt: skip
            if with_gradient:
                gradient[strip] = product(weights, bank)
    return loss, factors, gradient


_memory_contrast = torch.library.custom_op("ecul::memory_contrast", _launch, mutates_args=())


@_memory_contrast.register_fake
def _(x, bank, bank_labels, labels, temperature, with_gradient):
    rows = x.shape[0] if with_gradient else 0
    vector = x.new_empty(x.shape[0], dtype=torch.float32)
    return vector, torch.empty_like(vector), x.new_empty((rows, x.shape[1]), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(*output[1:])


def _backward(ctx, loss_gradient, *_):
    factors, gradient = ctx.saved_tensors
    return ((loss_gradient * factors)[:, None] * gradient).to(ctx.dtype), None, None, None, None, None


_memory_contrast.register_autograd(_backward, setup_context=_setup_context)
