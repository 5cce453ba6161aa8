"""Short lists that hold the k best columns of every row: the first two steps of `topk_similarity` on a CPU.

`_shortlist` explains the steps and their bounds. Here a strip of rows is multiplied with a block of columns
at a time. If the processor multiplies bfloat16, products are rounded to it, and the bounds allow for that. If
bfloat16 cannot separate the neighbours of many rows, the search runs again in float32.

The products of a strip with the first columns give the bounds of its rows. If y is x, half of the matrix is
enough: the columns end with the strip, and a product of two rows enters the lists of both. Comparing every
product with its bound is slow, so the maximum of each group of 16 is compared first.
"""

import torch
from torch import Tensor

from ._shortlist import ALONE, Search, Shortlist, Team, whole

PRODUCTS = 2**22  # computed at a time
PART = 4  # the first bound comes from one column in so many
HEIGHT, EVEN = 1024, 128  # rows of a strip: at most HEIGHT, and a multiple of EVEN if columns are many
STRIPS = 8  # of each process, or more: so that all have almost equally many products
HALVINGS = 4  # a group has 2**4 products
GROUP = 2**HALVINGS
LEFT = 1 / 32  # if bfloat16 leaves a larger share of the rows to the reference, float32 takes all rows
BRAIN = any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))


def product_dtype() -> torch.dtype:
    """bfloat16 where the processor has instructions for it, or where torch may use it for float32."""
    exact = torch.get_float32_matmul_precision() == "highest"
    return torch.float32 if exact and not BRAIN else torch.bfloat16


def shortlist(x: Tensor, y: Tensor, k: int, team: Team = ALONE) -> Shortlist:
    """The short lists of the rows of x; those of a team hold what this process found."""
    coarse = product_dtype() == torch.bfloat16
    coarse = bool(team.join(torch.tensor([int(coarse)])).amax())  # one dtype on processors of any kind
    lists, short = _shortlist(x, y, k, team, torch.bfloat16 if coarse else torch.float32)
    if coarse and torch.get_float32_matmul_precision() == "highest" and short.float().mean() > LEFT:
        return _shortlist(x, y, k, team, torch.float32)
    return lists, short


def _shortlist(x: Tensor, y: Tensor, k: int, team: Team, dtype: torch.dtype) -> Shortlist:
    search, symmetric = Search(x, y, k, team, dtype, GROUP), x is y
    (M, N), (rows, columns) = (len(x), len(y)), (len(search.x), len(search.y))
    part = min(columns, whole(max(N // PART, 2 * k), GROUP))
    height = min(HEIGHT, part, whole(PRODUCTS // part, EVEN), whole(M // (STRIPS * team.turns), EVEN))
    part = min(columns, whole(part, height))
    width = whole(PRODUCTS // height, GROUP)
    buffer = search.x.new_empty(max(part, width) * height)  # fresh memory is slower than products

    def multiply(start: int, first: int, last: int) -> Tensor:
        strip = search.x[start : start + height].T
        products = buffer[: (last - first) * strip.shape[1]].view(last - first, -1)
        torch.mm(search.y[first:last], strip, out=products)
        products[max(0, N - first) :] = -torch.inf  # the padding
        products[:, max(0, M - start) :] = -torch.inf
        return products

    turns = team.turn, 2 * team.turns - 1 - team.turn  # later strips have more products: go to and fro
    own = [start for n, start in enumerate(range(0, rows, height)) if n % (2 * team.turns) in turns]
    early = [start for start in own if start < part]
    for strips in (early, own[len(early) :]):
        for start in strips:
            products = multiply(start, 0, part)
            search.bound(slice(start, start + height), products)
            _list(search, products, start, 0)
            if symmetric and start >= part:
                _list(search, products.T, 0, start)
        search.join()
        if not search.bounds[: min(part, M)].isfinite().any():  # rows are shuffled: the first are a sample
            search.bounds.fill_(torch.inf)
            return search.shortest()
    for start in own:
        end = min(start + height, rows) if symmetric else columns
        for first in range(part, end, width):
            last = min(first + width, end)
            products = multiply(start, first, last)
            _list(search, products, start, first)
            if symmetric and first < start:
                _list(search, products[: start - first].T, first, start)
    return search.shortest()


def _list(search: Search, products: Tensor, first_row: int, first_column: int) -> None:
    """List the products, (columns, rows), that reach the bounds of their rows. A full list takes no more."""
    least, maxima = search.bounds[first_row : first_row + products.shape[1]], products
    for _ in range(HALVINGS):
        maxima = torch.maximum(*maxima.chunk(2))
    row, group = (maxima >= least).T.nonzero().unbind(1)
    members = products.unflatten(0, (GROUP, -1)).permute(1, 2, 0)[group, row]
    which, member = (members >= least[row, None]).nonzero().unbind(1)
    row, column = first_row + row[which], first_column + group[which] + member * len(maxima)
    owners, found = row.unique_consecutive(return_counts=True)
    before = search.counts[owners] - (found.cumsum(0) - found)
    slot = (before.repeat_interleave(found) + torch.arange(len(row))).clamp_max(search.room - 1)
    search.lists[row, slot] = column.int()
    search.scores[row, slot] = members[which, member]
    search.counts[owners] += found
    search.bounds[owners[search.counts[owners] > search.room]] = torch.inf
