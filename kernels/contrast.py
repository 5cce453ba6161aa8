"""The contrastive loss against a memory bank, with its gradient: ECUL and MBCCM's `L_C` and `L_I`.

Source: arXiv 2412.19134 (ECUL) and arXiv 2305.12673 (MBCCM). One function serves cluster banks
(`bank_labels = arange(C)`), instance banks and joint banks.
"""

import torch

from ._checks import check_device, check_matrix, check_vector


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
        (B,) float32, one loss a sample, differentiable in `x` alone.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device; on CPU tensors also a
            sample whose label no slot carries, and features that are NaN or infinite.
    """
    _check(x, bank, bank_labels, labels, temperature)
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


def _check(x, bank, bank_labels, labels, temperature):
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


def _check_finite(loss, labels):
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
