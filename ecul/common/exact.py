"""Arithmetic that every device, processor and number of threads rounds alike.

Features, encodings and weights are multiples of 2**-26 (`on_grid`): what is summed then are multiples of
2**-52, the sums are below 2, and float64 holds them exactly, in whatever order they come. All else treats
each entry by itself.
"""

import torch

ROWS = 8192  # rows that are widened to float64 at a time


def unit_rows(features: torch.Tensor) -> torch.Tensor:
    """`F.normalize(features, dim=1)` on the grid: (N, D) float32, from floating point of any kind.

    Errors: TypeError for anything else; ValueError for another shape, a row that is not finite or all zeros.
    """
    if not isinstance(features, torch.Tensor):
        raise TypeError(f"features must be a torch tensor or a NumPy array, got {type(features).__name__}")
    if not features.is_floating_point():
        raise TypeError(f"features must be floating point, got {features.dtype}: try features.float()")
    if features.ndim != 2:
        raise ValueError(f"features must have shape (N, D), got {tuple(features.shape)}")
    strips = features.detach().split(ROWS)
    norms = torch.cat([_row_sums(rows.float().double().square_()).sqrt().float()[:, None] for rows in strips])
    for bad, what in ((~norms.isfinite(), "not finite"), (norms == 0, "all zeros")):
        if bad.any():
            row, count = int(bad.flatten().nonzero()[0]), int(bad.sum())
            raise ValueError(f"features must be finite, no row zero; row {row} is {what} ({count} such rows)")
    points = torch.empty(features.shape, dtype=torch.float32, device=features.device)
    for rows, part, sizes in zip(strips, points.split(ROWS), norms.split(ROWS), strict=True):
        part.copy_(on_grid(rows.float() / sizes))
    return points


def on_grid(values: torch.Tensor) -> torch.Tensor:
    """The nearest multiples of 2**-26."""
    return torch.round(values * 2.0**26) / 2.0**26


def exp(x: torch.Tensor) -> torch.Tensor:
    """exp of float64 from -4 to 0, to 12 digits, in steps that every device rounds alike."""
    x = x / 64
    power = torch.ones_like(x)
    for n in range(8, 0, -1):
        power = 1 + x * power / n
    for _ in range(6):
        power = power * power
    return power


def _row_sums(values: torch.Tensor) -> torch.Tensor:
    """The sum of each row, in an order of its own, which no device changes; overwrites `values`."""
    while values.shape[1] > 1:
        half = (values.shape[1] + 1) // 2
        rest = values[:, half:]
        values = values[:, :half]
        values[:, : rest.shape[1]] += rest
    return values.sum(1)
