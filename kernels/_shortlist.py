"""Short lists that hold the k best columns of every row: the first two steps of `topk_similarity`.

Every pair needs a product. Selecting the k best in every tile would take longer than the products, so lists
are made in three steps, on rows rounded to float16 (on CPUs: to bfloat16, or not at all):
  1. Multiply every row with a part of the columns, and keep the maximum of each group of columns. The k-th
     largest maximum is b: at least k columns reach it.
  2. Multiply all pairs, and list the columns that reach the bound: a few times k for each row. The k-th
     largest product in the list is a better b.
  3. For the columns that reach the better bound, a few more than k, compute the products in float64 from the
     original rows. The k best, rounded to float32 once, are the result.
Rounding must not lose a neighbour. Let x = x' + dx, where x' is the rounded row, and y = y' + dy. Then
    |x.y - x'.y'| = |dx.y + x'.dy| <= |dx||y| + |x'||dy| =: m,
so k columns have x.y >= b - m, and each of the k best has x'.y' >= b - 2m. This is the bound in both steps.
The errors |dx| and |dy| are measured. m includes what a sum of D products in float32 may lose.
Rows and columns are shuffled, in every run alike. In the caller's order, neighbours are often side by side:
they would share one maximum, and a part would not represent the whole.
If more columns reach the bound than the list of a row holds (many equal rows), the reference ranks this row.
If y is x, the product is symmetric: a tile above the diagonal also serves the rows of its columns.
Processes can share the symmetric product: each makes its part of the tiles, and lists what it finds there for
all rows. `Team` says what they tell each other: bounds, and the best products and values of each row.
From compute capability 9.0 on, TMA loads the tiles. After ordinary loads an asynchronous product needs a
fence, and Triton 3.6 omits it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._triton import TensorDescriptor, has_tma, jit, product, tl


@jit
def _append(s, bounds, lists, scores, counts, owner, first, room, BLOCK: tl.constexpr, AXIS: tl.constexpr):
    """Append the products that reach the bound of their owner to its list; each turn takes the best of each.

    Products of one owner lie along AXIS of `s`, from number `first` on. A full list only counts them.
    """
    none = -float("inf")
    left = tl.where(s >= tl.expand_dims(tl.load(bounds + owner), AXIS), s, none)
    best, at = tl.max(left, AXIS, return_indices=True)
    while tl.max(best, 0) > none:
        slot = tl.atomic_add(counts + owner, 1, mask=best > none, sem="relaxed")
        place, fits = owner.to(tl.int64) * room + slot, (best > none) & (slot < room)
        tl.store(lists + place, first + at, mask=fits)
        tl.store(scores + place, best, mask=fits)
        taken = tl.expand_dims(tl.arange(0, BLOCK), 1 - AXIS) == tl.expand_dims(at, AXIS)
        left = tl.where(taken, none, left)
        best, at = tl.max(left, AXIS, return_indices=True)


@jit
def _candidates_kernel(
    x, y, bounds, lists, scores, counts, M, N, m_tiles, n_tiles, room, turn, turns,
    SYMMETRIC: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    band = tl.program_id(0) // (TALL * n_tiles)  # TALL row tiles share the column tiles in the cache
    height = tl.minimum(m_tiles - band * TALL, TALL)
    within = tl.program_id(0) % (TALL * n_tiles)
    m, n = band * TALL + within % height, within // height
    if (m + n) % turns == turn and (not SYMMETRIC or n >= m):
        row, column = m * BLOCK + tl.arange(0, BLOCK), n * BLOCK + tl.arange(0, BLOCK)
        s = tl.zeros((BLOCK, BLOCK), tl.float32)
        if not TMA:
            features = tl.arange(0, BLOCK_D)
            x_rows = x + row.to(tl.int64)[:, None] * D + features[None, :]
            y_rows = y + column.to(tl.int64)[:, None] * D + features[None, :]
        for start in range(0, D, BLOCK_D):
            if TMA:
                s = tl.dot(x.load([m * BLOCK, start]), y.load([n * BLOCK, start]).T, s)
            else:
                s = tl.dot(tl.load(x_rows + start), tl.load(y_rows + start).T, s)
        s = tl.where((row < M)[:, None] & (column < N)[None, :], s, -float("inf"))
        _append(s, bounds, lists, scores, counts, row, n * BLOCK, room, BLOCK, 1)
        if SYMMETRIC and n > m:
            _append(s, bounds, lists, scores, counts, column, m * BLOCK, room, BLOCK, 0)


OPTIONS = {"BLOCK": 128, "BLOCK_D": 64, "TALL": 8, "num_warps": 8}
PART = 8  # the first bound comes from one column in so many
MAXIMA = 8  # and from so many times k maxima a row, or more
PRODUCTS = 2**27  # of these columns, held at a time
ROOM = 256  # columns that a list holds at least; 16 * k if that is more
PORTION = {"cpu": 512, "cuda": 16384}  # rows that are rounded, and lists that are shortened, at a time
LOWEST = torch.finfo(torch.float32).min  # a bound below all products, and above minus infinity
COARSE = {torch.bfloat16: 2.0**-8, torch.float32: 0.0}  # the share of a product that rounding may change
Shortlist = tuple[Tensor, Tensor]  # (M, few) int32 columns, -1 for none; (M,) whether a list was too short


class Team(NamedTuple):
    """The processes that share a search."""

    turn: int = 0  # the number of this process
    turns: int = 1  # how many there are
    join: Callable[[Tensor], Tensor] = lambda rows: rows  # the rows of all, in the order of the processes

    def largest(self, best: Tensor) -> Tensor:
        """The largest values of each row among those of all processes, as many as each gives: (rows, k)."""
        if self.turns == 1:
            return best
        return self.join(best[None]).movedim(0, 1).flatten(1).topk(best.shape[1]).values


ALONE = Team()


class Search:
    """Rounded rows; for each row of x a bound, and a list of the columns that reach it.

    Rows and columns are shuffled. Zeros fill them up to whole blocks. A list has room for `room` columns, and
    counts all that reach the bound. If x is y, rows are rounded once.
    """

    def __init__(
        self, x: Tensor, y: Tensor, k: int, team: Team, dtype: torch.dtype, block: int, block_d: int = 1
    ):
        self.k, self.team, self.columns = k, team, len(y)
        self.x_order, self.y_order = (random_order(len(matrix), matrix.device) for matrix in (x, y))
        self.y, *y_norms = round_rows(y, self.y_order, dtype, block, block_d)
        self.x, *x_norms = self.y, *y_norms
        if x is not y:
            self.x, *x_norms = round_rows(x, self.x_order, dtype, block, block_d)
        (x_sizes, x_errors), (y_sizes, y_errors) = x_norms, y_norms
        unit = 2.0**-22 if dtype == torch.float16 else 2.0**-23  # what a sum may lose for each product
        lost = (x.shape[1] + 64) * unit * (y_sizes + y_errors).amax()
        self.margin = x_errors * y_sizes.amax() + (x_sizes + x_errors) * (y_errors.amax() + lost)
        self.room = min(len(y), max(ROOM, 4 * k + 12 * k // team.turns))
        shape, kind = (len(self.x), self.room), dtype if dtype in COARSE else torch.float32
        self.bounds = self.margin.new_full(shape[:1], LOWEST).to(kind)
        self.lists, self.scores = (x.new_empty(shape, dtype=each) for each in (torch.int32, kind))
        self.counts = x.new_zeros(shape[:1], dtype=torch.int32)

    def bound(self, rows: Tensor | slice, products: Tensor) -> None:
        """Bound these rows by their products, (columns, rows), with a part of the columns.

        The bound is infinite if more columns would reach it than a list holds.
        """
        fold = max(1, len(products) // (MAXIMA * self.k))
        maxima = products[: len(products) // fold * fold].unflatten(0, (fold, -1)).amax(0).T.contiguous()
        best = maxima.topk(self.k).values.float()  # of different columns
        bound = bounds(best, self.margin[rows], products.dtype)
        reached = (maxima >= bound[:, None]).sum(1) * (self.columns / len(products))
        self.bounds[rows] = bound.masked_fill(reached > self.room, torch.inf)

    def join(self) -> None:
        """Take the best bounds of all processes."""
        self.bounds.copy_(self.team.largest(self.bounds.float()[:, None])[:, 0])

    def shortest(self) -> Shortlist:
        """The columns of each list that reach the bound of its scores, in the order of the caller's rows."""
        found, entries = [], torch.arange(self.room, device=self.x.device)
        for rows in self.x_order.argsort().split(PORTION[self.x.device.type]):
            counts, scores = self.counts[rows], self.scores[rows]
            scores = scores.float().masked_fill_(entries >= counts[:, None], -torch.inf)
            best, order = scores.topk(min(self.room, max(128, 4 * self.k)))
            kth = self.team.largest(best[:, : self.k])
            within = best >= bounds(kth, self.margin[rows], self.scores.dtype)[:, None]
            short = (counts > self.room) | (within[:, -1] & (counts > best.shape[1]))
            columns = torch.where(within, self.lists[rows].gather(1, order), 0)
            columns = torch.where(within, self.y_order[columns], -1)
            found.append((columns, short | self.bounds[rows].isposinf(), within.sum(1)))
        columns, short, lengths = map(torch.cat, zip(*found, strict=True))
        longest = int(self.team.largest(lengths.amax().reshape(1, 1)))
        return columns[:, : max(self.k, longest)], self.team.largest(short.int()[:, None])[:, 0] > 0


def random_order(count: int, device: torch.device | str = "cpu") -> Tensor:
    """(count,) int32, the same in every run."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randperm(count, generator=generator, device=device).int()


def whole(count: int, size: int) -> int:
    """The smallest multiple of size that is not below count, and one at least."""
    return max(1, -(-count // size)) * size


def round_rows(
    matrix: Tensor, order: Tensor, dtype: torch.dtype, block: int, block_d: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in this order and dtype, with zeros up to whole blocks.

    A power of two scales the largest entry to 1 at most, which rounds nothing. Also returns the norms of the
    rows before they are rounded, and of their errors; float32 loses squares of entries below 2**-63.
    """
    count, D = matrix.shape
    shape = whole(count, block), whole(D, block_d)
    rounded = torch.zeros(shape, dtype=dtype, device=matrix.device)
    sizes, errors = torch.full((2, shape[0]), D**0.5 * 2.0**-63, device=matrix.device, dtype=torch.float32)
    largest = torch.stack(torch.aminmax(matrix)).float().abs().amax()
    scale = torch.exp2(-largest.clamp_min(1e-30).log2().ceil())
    portion = PORTION[matrix.device.type]
    for start in range(0, count, portion):
        rows = matrix[order[start : start + portion]].float().mul_(scale)
        part = slice(start, start + len(rows))
        sizes[part] += rows.norm(dim=1)
        errors[part] += rows.sub_(rounded[part, :D].copy_(rows)).norm(dim=1)
    return rounded, sizes, errors


def bounds(best: Tensor, margin: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The bound of each row from its k best products, (rows, k), in descending order: k columns reach it.

    dtype: what products and bounds are rounded to after their sums.
    """
    coarse, kth = COARSE[dtype], best[:, -1].clamp_min(LOWEST)  # minus infinity if there are fewer than k
    return (kth - 2 * margin - 3 * (coarse * kth.abs()) - 4 * coarse * margin).clamp_min(LOWEST)


def shortlist(x: Tensor, y: Tensor, k: int, team: Team = ALONE) -> Shortlist:
    """The short lists of the rows of x; those of a team hold what this process found."""
    block, block_d = OPTIONS["BLOCK"], OPTIONS["BLOCK_D"]
    search = Search(x, y, k, team, torch.float16, block, block_d)
    rows, part = len(search.x), min(len(y), max(len(y) // PART, MAXIMA * k))
    own = torch.arange(rows, device=x.device).tensor_split(team.turns)[team.turn]
    for strip in own.split(max(1, PRODUCTS // part)):
        search.bound(strip, product(search.y[:part], search.x[strip].T))
    search.join()
    matrices, tma = [search.x, search.y], has_tma()
    if tma:
        matrices = [TensorDescriptor.from_tensor(matrix, [block, block_d]) for matrix in matrices]
    tiles = rows // block, len(search.y) // block
    _candidates_kernel[(tiles[0] * tiles[1],)](
        *matrices, search.bounds, search.lists, search.scores, search.counts,
        len(x), len(y), *tiles, search.room, team.turn, team.turns,
        SYMMETRIC=x is y, D=search.x.shape[1], TMA=tma,
        num_stages=2 if torch.version.hip else 3, **OPTIONS,
    )  # fmt: skip
    return search.shortest()
