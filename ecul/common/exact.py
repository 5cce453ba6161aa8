"""Arithmetic that gives the same bits on every device and with any number of threads.

Features, encodings and weights are multiples of 2**-26 (`on_grid`). Their products are multiples of 2**-52
and sums stay below 2, so float64 holds every sum exactly, in any order. All other steps work entry by entry.
"""

import torch

from ecul.common.arrays import same_kind

FEATURE_ROWS = 1024  # rows of features that are widened to float64 at a time


@same_kind
def unit_rows(features: torch.Tensor) -> torch.Tensor:
    """`F.normalize(features, dim=1)` on the grid: (N, D) float32, from real numbers of any dtype.

    Errors: TypeError for another kind; ValueError for another shape, a row that is not finite or all zeros.
    """
    if not isinstance(features, torch.Tensor):
        raise TypeError(f"features must be a tensor or an array of (N, D) numbers, got {features!r}")
    if features.is_complex():
        raise TypeError(f"features must be real numbers, got {features.dtype}")
    if features.ndim != 2:
        raise ValueError(f"features must have shape (N, D), got {tuple(features.shape)}")
    strips = features.detach().split(FEATURE_ROWS)
    norms = torch.cat([_row_sums(rows.float().double().square_()).sqrt().float()[:, None] for rows in strips])
    for bad, what in ((~norms.isfinite(), "not finite"), (norms == 0, "all zeros")):
        if bad.any():
            row, count = int(bad.flatten().nonzero()[0]), int(bad.sum())
            raise ValueError(f"features must be finite, no row zero; row {row} is {what} ({count} such rows)")
    points = torch.empty(features.shape, dtype=torch.float32, device=features.device)
    for rows, part, sizes in zip(strips, points.split(FEATURE_ROWS), norms.split(FEATURE_ROWS), strict=True):
        part.copy_(on_grid(rows.float() / sizes))
    return points


def on_grid(values: torch.Tensor) -> torch.Tensor:
    """The nearest multiples of 2**-26."""
    return (values * 2.0**26).round_().div_(2.0**26)


def exp(x: torch.Tensor) -> torch.Tensor:
    """exp of float64 values in [-4, 0], to 12 digits. Every device rounds each step in the same way."""
    x = x / 64
    power = torch.ones_like(x)
    for n in range(8, 0, -1):
        power = 1 + x * power / n
    for _ in range(6):
        power = power * power
    return power


def _row_sums(values: torch.Tensor) -> torch.Tensor:
    """The sum of each row. It adds halves, in the same order on every device, and overwrites `values`."""
    while values.shape[1] > 1:
        half = (values.shape[1] + 1) // 2
        rest = values[:, half:]
        values = values[:, :half]
        values[:, : rest.shape[1]] += rest
    return values.sum(1)
