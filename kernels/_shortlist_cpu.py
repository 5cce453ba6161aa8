"""Short lists that hold the k best columns of every row: the first two steps of `topk_similarity` on a CPU.

`_shortlist` explains the steps and their bounds. Here a strip of rows is multiplied with a block of columns
at a time. If the processor multiplies bfloat16, products are rounded to it, and the bounds allow for that. If
bfloat16 cannot separate the neighbours of many rows, the search runs again in float32.

The products of a strip with the first columns give the bounds of its rows. If y is x, half of the matrix is
enough: the columns end with the strip, and a product of two rows enters the lists of both. Comparing every
product with its bound is slow, so the maximum of each group of 16 is compared first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._shortlist import MAXIMA, PART, ROOM, Team, bounds, closest, largest_error, random_order, round_rows

PRODUCTS = 2**22  # computed at a time
HEIGHT, EVEN = 1024, 128  # rows of a strip: at most HEIGHT, and a multiple of EVEN if columns are many
STRIPS = 8  # of each process, or more: so that all have almost equally many products
HALVINGS = 4  # a group has 2**4 products
GROUP = 2**HALVINGS
LEFT = 1 / 32  # if bfloat16 leaves a larger share of the rows to the reference, float32 takes all rows
TRIED = 256  # if it can: so many of these rows are tried first
COARSE = {torch.bfloat16: 2.0**-8, torch.float32: 0.0}  # the share of a product that rounding may change
BRAIN = any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))


def product_dtype() -> torch.dtype:
    """bfloat16 where the processor has instructions for it, or where torch may use it for float32."""
    return torch.float32 if _has_float32() and not BRAIN else torch.bfloat16


def _has_float32() -> bool:
    """Whether torch multiplies float32 in float32, and not in bfloat16."""
    return torch.get_float32_matmul_precision() == "highest"


def shortlist(
    x: Tensor, y: Tensor, k: int, exclude_self: bool, symmetric: bool, team: Team | None = None
) -> tuple[Tensor, Tensor]:
    """The short lists of the rows of x; those of a team hold what this process found."""
    team = team or Team()
    coarse = product_dtype() == torch.bfloat16
    coarse = bool(team.join(torch.tensor([int(coarse)])).amax())  # one dtype on processors of any kind
    arguments = x, y, k, exclude_self, symmetric, team
    lists, overflowed = _search(*arguments, torch.bfloat16 if coarse else torch.float32)
    again = overflowed.nonzero()[:, 0]
    if coarse and _has_float32() and len(again) > LEFT * len(x):
        some = again[:: len(again) // TRIED + 1]
        if _search(x[some], y, k, False, False, Team(), torch.float32)[1].float().mean() < 0.5:
            return _search(*arguments, torch.float32)
    return lists, overflowed


def _search(
    x: Tensor, y: Tensor, k: int, exclude_self: bool, symmetric: bool, team: Team, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    M, N, D = len(x), *y.shape
    x_order, y_order = random_order(M).long(), random_order(N)
    y_rounded, *y_norms = round_rows(y, y_order, dtype, GROUP)
    x_rounded, *x_norms = (y_rounded, *y_norms) if symmetric else round_rows(x, x_order, dtype, GROUP)
    rows, columns = len(x_rounded), len(y_rounded)
    margin = F.pad(largest_error(x_norms, y_norms, D, 2.0**-23)[x_order], (0, rows - M))
    part = min(columns, _whole(max(N // PART["cpu"], 2 * k), GROUP))
    height = min(HEIGHT, part, _whole(PRODUCTS // part, EVEN), _whole(M // (STRIPS * team.turns), EVEN))
    part = min(columns, _whole(part, height))
    width = _whole(PRODUCTS // height, GROUP)
    lists = _Lists(rows, min(N, max(ROOM, 4 * k + 12 * k // team.turns)), dtype)
    buffer = x_rounded.new_empty(max(part, width) * height)  # fresh memory is slower than products

    def multiply(start: int, first: int, last: int) -> Tensor:
        strip = x_rounded[start : start + height].T
        products = buffer[: (last - first) * strip.shape[1]].view(last - first, -1)
        torch.mm(y_rounded[first:last], strip, out=products)
        products[max(0, N - first) :] = -torch.inf  # the padding
        products[:, max(0, M - start) :] = -torch.inf
        if exclude_self:
            products.diagonal(first - start).fill_(-torch.inf)
        return products

    turns = team.turn, 2 * team.turns - 1 - team.turn  # later strips have more products: go to and fro
    own = [start for n, start in enumerate(range(0, rows, height)) if n % (2 * team.turns) in turns]
    early = [start for start in own if start < part]
    for strips in (early, own[len(early) :]):
        for start in strips:
            products, within = multiply(start, 0, part), slice(start, start + height)
            lists.bounds[within] = _first_bounds(products, k, margin[within], N / part, lists.room)
            lists.add(products, start, 0)
            if symmetric and start >= part:
                lists.add(products.T, 0, start)
        lists.bounds = team.largest(lists.bounds.float()[:, None])[:, 0].to(dtype)
    crowded = lists.bounds.isposinf()
    for start in own:
        end = min(start + height, rows) if symmetric else columns
        for first in range(part, end, width):
            last = min(first + width, end)
            if (
                symmetric
                and min(lists.bounds[start:end].amin(), lists.bounds[first:last].amin()) == torch.inf
            ):
                continue
            products = multiply(start, first, last)
            lists.add(products, start, first)
            if symmetric and first < start:
                lists.add(products[: start - first].T, first, start)
    kept = lists.columns, lists.scores, lists.counts
    found, overflowed = closest(*kept, k, margin, team, COARSE[dtype])
    longest = max(k, int((found[:M] >= 0).sum(1).max()))
    found = torch.where(found < 0, -1, y_order[found])[:, :longest]
    place = x_order.argsort()
    return found[place], (overflowed | crowded)[place]


def _first_bounds(products: Tensor, k: int, margin: Tensor, share: float, room: int) -> Tensor:
    """The bounds of rows from their products with a part of the columns; infinity if the room is too small.

    share: how many times as many all columns are.
    """
    coarse, fold = COARSE[products.dtype], max(1, len(products) // (MAXIMA * k))
    maxima = products[: len(products) // fold * fold].unflatten(0, (fold, -1)).amax(0).T.contiguous()
    best = maxima.topk(min(k, maxima.shape[1])).values.float()  # of different columns
    bound = bounds(best, k, margin, coarse)
    return bound.masked_fill((maxima >= bound[:, None]).sum(1) * share > room, torch.inf)


class _Lists:
    """For each row a bound, and a list of the columns that reach it. A list that is full takes no more."""

    def __init__(self, rows: int, room: int, dtype: torch.dtype):
        self.room = room
        self.bounds = torch.full((rows,), -torch.inf, dtype=dtype)
        self.columns = torch.empty((rows, room), dtype=torch.int32)
        self.scores = torch.empty((rows, room), dtype=dtype)
        self.counts = torch.zeros(rows, dtype=torch.int64)

    def add(self, products: Tensor, first_row: int, first_column: int) -> None:
        """List the products, (columns, rows), that reach the bounds of their rows."""
        least, maxima = self.bounds[first_row : first_row + products.shape[1]], products
        for _ in range(HALVINGS):
            maxima = torch.maximum(*maxima.chunk(2))
        row, group = (maxima >= least).T.nonzero().unbind(1)
        members = products.unflatten(0, (GROUP, -1))[:, group, row].T
        which, member = (members >= least[row, None]).nonzero().unbind(1)
        row, column = first_row + row[which], first_column + group[which] + member * len(maxima)
        owners, found = row.unique_consecutive(return_counts=True)
        before = self.counts[owners] - (found.cumsum(0) - found)
        slot = (before.repeat_interleave(found) + torch.arange(len(row))).clamp_max(self.room - 1)
        self.columns[row, slot] = column.int()
        self.scores[row, slot] = members[which, member]
        self.counts[owners] += found
        self.bounds[owners[self.counts[owners] > self.room]] = torch.inf


def _whole(count: int, size: int) -> int:
    """The smallest multiple of size that is not below count, and one at least."""
    return max(1, -(-count // size)) * size
