"""Short lists that hold the k best columns of every row: the first two steps of `topk_similarity` on a CPU.

The steps and their bounds are those of `_shortlist`, with strips of rows and columns in place of tiles. Where
the processor multiplies bfloat16, products come rounded to it, by a 256th at most: the bounds allow for that,
and rows whose neighbours bfloat16 cannot tell apart are looked at again in float32.
"""

import math

import torch

from ._shortlist import Shortlist, bounds, closest, largest_error, power_of_two, random_order

ROWS, COLUMNS = 512, 16384  # of x and of y at a time
ROOM = 256  # columns that a list holds at least
PART = 4  # the first bound comes from one column in so many
BRAIN = any(
    getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile")
)  # whether the processor has such instructions
DTYPE = torch.bfloat16 if BRAIN else torch.float32
COARSE = {torch.bfloat16: 2.0**-8, torch.float32: 0.0}


def shortlist(x: torch.Tensor, y: torch.Tensor, k: int, exclude_self: bool, symmetric: bool) -> Shortlist:
    """The short lists of the rows of x."""
    itself = torch.arange(len(x)) if exclude_self else None
    lists, overflowed = _shortlist(x, y, k, itself, symmetric, DTYPE)
    if torch.float32 != DTYPE and overflowed.any():
        again = overflowed.nonzero()[:, 0]
        itself = again if exclude_self else None
        more, overflowed[again] = _shortlist(x[again], y, k, itself, False, torch.float32)
        lists[again] = -1
        lists[again, : more.shape[1]] = more
    longest = max(k, int((lists >= 0).sum(1).max()))
    return lists[:, :longest], overflowed


def _shortlist(
    x: torch.Tensor,
    y: torch.Tensor,
    k: int,
    itself: torch.Tensor | None,
    symmetric: bool,
    dtype: torch.dtype,
) -> Shortlist:
    """`itself`, where given, names the row of y to leave out for each row of x."""
    (M, D), N, coarse = x.shape, y.shape[0], COARSE[dtype]
    y_rounded, *y_norms = round_rows(y, dtype)
    x_rounded, *x_norms = (y_rounded, *y_norms) if symmetric else round_rows(x, dtype)
    margin = largest_error(x_norms, y_norms, D, 2.0**-23)
    least = _bounds(x_rounded, y_rounded, k, itself, margin, coarse).to(dtype)

    room = min(N, max(ROOM, 4 * PART * k))
    lists, scores = torch.empty((M, room), dtype=torch.int32), torch.empty((M, room), dtype=dtype)
    counts = torch.zeros(M, dtype=torch.int64)
    found = []
    for start in range(0, M, ROWS):
        rows = slice(start, min(start + ROWS, M))
        for first in range(start if symmetric else 0, N, COLUMNS):  # those before had this row among theirs
            columns = slice(first, min(first + COLUMNS, N))
            products = x_rounded[rows] @ y_rounded[columns].T
            if itself is not None:
                _leave_out(products, itself[rows] - first, torch.nan)  # which no comparison finds
            near = products >= least[rows, None]
            _append(products, near, lists[rows], scores[rows], counts[rows], first)
            if symmetric and columns.stop > rows.stop:
                beyond = slice(max(rows.stop, first), columns.stop)
                across = products[:, beyond.start - first :].T
                near = (across >= least[beyond, None]).contiguous()
                _append(across, near, lists[beyond], scores[beyond], counts[beyond], start)
        found.append(closest(lists[rows], scores[rows].float(), counts[rows], k, margin[rows], coarse))
    shortest, overflowed = zip(*found, strict=True)
    return torch.cat(shortest), torch.cat(overflowed)


def _leave_out(products: torch.Tensor, columns: torch.Tensor, value: float) -> None:
    """Put the value in each row's column, where that is one of these."""
    rows = ((columns >= 0) & (columns < products.shape[1])).nonzero()[:, 0]
    products[rows, columns[rows]] = value


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
    x: torch.Tensor, y: torch.Tensor, k: int, itself: torch.Tensor | None, margin: torch.Tensor, coarse: float
) -> torch.Tensor:
    """The bound of each row from the products with a part of the columns, drawn at random."""
    count = min(len(y), max(len(y) // PART, 2 * k))
    chosen = random_order(len(y))[:count].long()
    place = torch.full((len(y),), -1)
    place[chosen] = torch.arange(count)
    width = max(1, count // (8 * k))  # the k-th largest of the maxima of so many columns is a bound, too
    part, least = y[chosen[: count // width * width]], []
    for start in range(0, len(x), ROWS):
        rows = slice(start, start + ROWS)
        products = x[rows] @ part.T
        if itself is not None:
            _leave_out(products, place[itself[rows]], -torch.inf)
        maxima = products.unflatten(1, (-1, width)).amax(2)
        best = maxima.topk(min(k, maxima.shape[1])).values.float()
        least.append(bounds(best, k, margin[rows], coarse))
    return torch.cat(least)


def round_rows(matrix: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows in this dtype, their norms and those of the errors; a power of two keeps products within range."""
    scale = float(power_of_two(matrix))
    if abs(math.log2(scale)) < 32:
        scale = 1.0
    as_it_is = matrix.dtype == dtype and scale == 1
    rounded = matrix if as_it_is else torch.empty(matrix.shape, dtype=dtype)
    sizes, errors = torch.zeros(2, len(matrix), dtype=torch.float32)
    for start in range(0, len(matrix), 8192):
        strip = slice(start, start + 8192)
        rows = matrix[strip].float() * scale
        sizes[strip] = rows.norm(dim=1)
        if not as_it_is:
            rounded[strip] = rows
            errors[strip] = rows.sub_(rounded[strip]).norm(dim=1)
    return rounded, sizes, errors
