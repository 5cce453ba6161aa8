"""Short lists that hold the k best columns of every row: the first two steps of `topk_similarity` on a CPU.

The steps and their bounds are those of `_shortlist`, a strip of rows at a time in place of tiles. Where the
processor multiplies bfloat16, products come rounded to it, by a 256th at most: the bounds allow for that.
"""

import torch

from ._shortlist import PART, Shortlist, bounds, closest, largest_error, power_of_two, random_order

ROWS = 512  # of x at a time
BRAIN = any(
    getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile")
)  # whether the processor has such instructions
DTYPE = torch.bfloat16 if BRAIN else torch.float32
COARSE = {torch.bfloat16: 2.0**-8, torch.float32: 0.0}


def shortlist(x: torch.Tensor, y: torch.Tensor, k: int, exclude_self: bool, symmetric: bool) -> Shortlist:
    """The short lists of the rows of x."""
    (M, D), N = x.shape, y.shape[0]
    y_rounded, *y_norms = _round(y)
    x_rounded, *x_norms = (y_rounded, *y_norms) if symmetric else _round(x)
    margin = largest_error(x_norms, y_norms, D, 2.0**-23)
    least = _bounds(x_rounded, y_rounded, k, exclude_self, margin).to(DTYPE)

    room = min(N, max(256, 2 * PART * k))
    lists, scores = torch.empty((M, room), dtype=torch.int32), torch.empty((M, room), dtype=DTYPE)
    counts = torch.zeros(M, dtype=torch.int64)
    found = []
    for start in range(0, M, ROWS):
        stop = min(start + ROWS, M)
        first = start if symmetric else 0  # the columns before it had this row among theirs
        products = x_rounded[start:stop] @ y_rounded[first:].T
        if exclude_self:
            products.diagonal(start - first).fill_(torch.nan)  # which no comparison finds
        near = products >= least[start:stop, None]
        _append(products, near, lists[start:stop], scores[start:stop], counts[start:stop], first)
        if symmetric:
            across = products[:, stop - start :].T
            near = (across >= least[stop:, None]).contiguous()
            _append(across, near, lists[stop:], scores[stop:], counts[stop:], start)
        kept = (lists[start:stop], scores[start:stop].float(), counts[start:stop])
        found.append(closest(*kept, k, margin[start:stop], COARSE[DTYPE]))
    columns, overflowed = zip(*found, strict=True)
    return torch.cat(columns), torch.cat(overflowed)


def _append(
    products: torch.Tensor,
    near: torch.Tensor,
    lists: torch.Tensor,
    scores: torch.Tensor,
    counts: torch.Tensor,
    first: int,
) -> None:
    """Add the marked columns, which count from `first`, to the lists of their rows; full lists only count."""
    row, column = near.nonzero().unbind(1)
    found = row.bincount(minlength=len(counts))
    slot = (counts - (found.cumsum(0) - found))[row] + torch.arange(len(row))
    counts += found
    fits = slot < lists.shape[1]
    row, column, slot = row[fits], column[fits], slot[fits]
    lists[row, slot] = (column + first).int()
    scores[row, slot] = products[row, column]


def _bounds(
    x: torch.Tensor, y: torch.Tensor, k: int, exclude_self: bool, margin: torch.Tensor
) -> torch.Tensor:
    """The bound of each row from the products with a part of the columns, drawn at random."""
    count = min(len(y), max(len(y) // PART, 2 * k))
    chosen = random_order(len(y))[:count].long().sort().values
    place = torch.full((len(y),), -1)
    place[chosen] = torch.arange(count)
    part, least = y[chosen], []
    for start in range(0, len(x), ROWS):
        row = torch.arange(start, min(start + ROWS, len(x)))
        products = x[row] @ part.T
        if exclude_self:
            met = row[place[row] >= 0]
            products[met - start, place[met]] = -torch.inf
        best = products.topk(min(k, count)).values.float()
        least.append(bounds(best, k, margin[row], COARSE[DTYPE]))
    return torch.cat(least)


def _round(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows in DTYPE, their norms and those of the errors; a power of two keeps products within range."""
    scale = float(power_of_two(matrix))
    if 2.0**-32 < scale < 2.0**32:
        scale = 1.0
    as_it_is = matrix.dtype == DTYPE and scale == 1
    rounded = matrix if as_it_is else torch.empty(matrix.shape, dtype=DTYPE)
    sizes, errors = torch.zeros(2, len(matrix))
    for start in range(0, len(matrix), 8192):
        strip = slice(start, start + 8192)
        rows = matrix[strip].float() * scale
        sizes[strip] = rows.norm(dim=1)
        if not as_it_is:
            rounded[strip] = rows
            errors[strip] = rows.sub_(rounded[strip]).norm(dim=1)
    return rounded, sizes, errors
