"""The losses, as pure functions of unit features and a bank of unit rows.

ECUL: https://arxiv.org/abs/2412.19134, MBCCM: https://arxiv.org/abs/2305.12673
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from ecul.kernels import memory_contrast


class Bank(Protocol):
    """A memory that gives logits (B, C) of features (B, D)."""

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """The similarities to each of the C rows, divided by the temperature."""
        ...


def contrastive_loss(
    x: torch.Tensor, bank: torch.Tensor, bank_labels: torch.Tensor, labels: torch.Tensor, temp: float = 0.05
) -> torch.Tensor:
    """Mean over the labelled samples of the memory-bank contrastive loss with summed positives.

        s = x @ bank.T / temp
        for i with labels[i] >= 0:
            loss_i = logsumexp(s[i]) - logsumexp(s[i, bank_labels == labels[i]])

    With `bank_labels = arange(C)` this is `F.cross_entropy(s, labels, ignore_index=-1)`: the cluster-level
    loss. With a row per image it is the instance-level loss. The bank gets no gradient.
    x: (B, D) unit rows; bank: (C, D) unit rows; bank_labels: (C,) int64; labels: (B,) int64, -1 (any
    negative) = no loss. Returns a scalar float32; 0 when no sample is labelled.
    Source: ECUL, cluster-level and instance-level contrast.
    """
    loss = memory_contrast(x, bank, bank_labels, labels, temp)
    return loss.sum() / (labels >= 0).sum().clamp(min=1)


def consistency_loss(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Symmetric KL divergence of two sets of logits (already divided by the temperature), batch mean.

        (F.kl_div(log_softmax(a), softmax(b)) + F.kl_div(log_softmax(b), softmax(a))) / 2

    a, b: (B, C) logits, both differentiable. Returns a scalar. Source: MBCCM, consistency constraint.
    """
    log_a, log_b = F.log_softmax(a.float(), dim=1), F.log_softmax(b.float(), dim=1)
    return 0.5 * ((log_a.exp() - log_b.exp()) * (log_a - log_b)).sum(dim=1).mean()


def agreement_loss(specific: Sequence[Bank], agnostic: Sequence[Bank], x: torch.Tensor) -> torch.Tensor:
    """Consistency constraint: specific and agnostic memories must give the same soft assignment.

        sum(consistency_loss(s.logits(x), a.logits(x)) for s, a in zip(specific, agnostic))

    specific, agnostic: the visible and the infrared cluster memory of each kind, with equal numbers of rows;
    x: (B, D) features of one view. Source: MBCCM, L_CC: the sum of this over view 1, view 2 and infrared.
    """
    pairs = zip(specific, agnostic, strict=True)
    return torch.stack([consistency_loss(s.logits(x), a.logits(x)) for s, a in pairs]).sum()
