"""Short lists that hold the k best columns of every row: the first two steps of `topk_similarity`.

Every pair needs a product. Selecting the k best in every tile would take longer than the products, so lists
are made in three steps, on rows rounded to float16 (on CPUs: to bfloat16, or not at all):
  1. Multiply every row with a part of the columns, and keep the maximum of each group of W columns. The k-th
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

from ._triton import TensorDescriptor, has_tma, jit, tl, triton


@jit
def _place(m_tiles, n_tiles, TALL: tl.constexpr):
    """Tile (m, n) of this program. TALL row tiles at a time share the column tiles in the cache."""
    band = tl.program_id(0) // (TALL * n_tiles)
    height = tl.minimum(m_tiles - band * TALL, TALL)
    within = tl.program_id(0) % (TALL * n_tiles)
    return band * TALL + within % height, within // height


@jit
def _original(order, position, count):
    """The caller's numbers of the rows at these positions, or `count` in the padding."""
    return tl.load(order + position, mask=position < count, other=count)


@jit
def _similarities(
    x, y, m, n, row, column, M, N, D: tl.constexpr, EXCLUDE: tl.constexpr, TMA: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of products of the rounded rows; -inf in the padding, and for a row with itself if EXCLUDE."""
    s = tl.zeros((BLOCK, BLOCK), tl.float32)
    if not TMA:
        features = tl.arange(0, BLOCK_D)
        x_rows = x + (m * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None] * D + features[None, :]
        y_rows = y + (n * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None] * D + features[None, :]
    for start in range(0, D, BLOCK_D):
        if TMA:
            s = tl.dot(x.load([m * BLOCK, start]), y.load([n * BLOCK, start]).T, s)
        else:
            s = tl.dot(tl.load(x_rows + start), tl.load(y_rows + start).T, s)
    valid = (row < M)[:, None] & (column < N)[None, :]
    if EXCLUDE:
        valid &= row[:, None] != column[None, :]
    return tl.where(valid, s, -float("inf"))


@jit
def _maxima_kernel(
    x, y, maxima, m_tiles, n_tiles, first, M, N, x_order, y_order, turn, turns,
    D: tl.constexpr, EXCLUDE: tl.constexpr, TMA: tl.constexpr, W: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    m, n = _place(m_tiles, n_tiles, TALL)
    if m % turns == turn:
        row = _original(x_order, m * BLOCK + tl.arange(0, BLOCK), M)
        column = _original(y_order, (first + n) * BLOCK + tl.arange(0, BLOCK), N)
        s = _similarities(x, y, m, first + n, row, column, M, N, D, EXCLUDE, TMA, BLOCK, BLOCK_D)
        top = tl.max(tl.reshape(s, (BLOCK, BLOCK // W, W)), 2)
        group = n * (BLOCK // W) + tl.arange(0, BLOCK // W)
        place = row.to(tl.int64)[:, None] * (n_tiles * (BLOCK // W)) + group[None, :]
        tl.store(maxima + place, top, mask=(row < M)[:, None])


@jit
def _append(
    s, bounds, lists, scores, counts, owner, count, entries,
    ROOM: tl.constexpr, BLOCK: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Append the products that reach the bound of their owner to its list; each turn takes the best of each.

    Products of one owner lie along AXIS of `s`; `entries` are their numbers. A full list only counts them.
    """
    none = -float("inf")
    bound = tl.load(bounds + owner, mask=owner < count, other=float("inf"))
    left = tl.where(s >= tl.expand_dims(bound, AXIS), s, none)
    best, at = tl.max(left, AXIS, return_indices=True)
    while tl.max(best, 0) > none:
        slot = tl.atomic_add(counts + owner, 1, mask=best > none, sem="relaxed")
        place, room = owner.to(tl.int64) * ROOM + slot, (best > none) & (slot < ROOM)
        tl.store(lists + place, tl.load(entries + at, mask=room, other=0), mask=room)
        tl.store(scores + place, best, mask=room)
        taken = tl.expand_dims(tl.arange(0, BLOCK), 1 - AXIS) == tl.expand_dims(at, AXIS)
        left = tl.where(taken, none, left)
        best, at = tl.max(left, AXIS, return_indices=True)


@jit
def _candidates_kernel(
    x, y, bounds, lists, scores, counts, m_tiles, n_tiles, M, N, x_order, y_order, turn, turns,
    ROOM: tl.constexpr, SYMMETRIC: tl.constexpr,
    D: tl.constexpr, EXCLUDE: tl.constexpr, TMA: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    m, n = _place(m_tiles, n_tiles, TALL)
    if (m + n) % turns == turn and (not SYMMETRIC or n >= m):
        row = _original(x_order, m * BLOCK + tl.arange(0, BLOCK), M)
        column = _original(y_order, n * BLOCK + tl.arange(0, BLOCK), N)
        s = _similarities(x, y, m, n, row, column, M, N, D, EXCLUDE, TMA, BLOCK, BLOCK_D)
        _append(s, bounds, lists, scores, counts, row, M, y_order + n * BLOCK, ROOM, BLOCK, 1)
        if SYMMETRIC and n > m:
            _append(s, bounds, lists, scores, counts, column, N, x_order + m * BLOCK, ROOM, BLOCK, 0)


OPTIONS = {"BLOCK": 128, "BLOCK_D": 64, "TALL": 8, "num_warps": 8}
PART = {"cpu": 4, "cuda": 8}  # the first bound comes from one column in so many
MAXIMA = 8  # and from so many times k maxima a row at a time
ROOM = 256  # columns that a list holds at least; 16 * k if that is more
ROUNDED = {"cpu": 512, "cuda": 8192}  # rows that are rounded at a time; few stay in the cache of a processor
CLOSEST = {"cpu": 512, "cuda": 65536}  # lists that are shortened at a time
LOWEST = torch.finfo(torch.float32).min  # a bound below all products, and above minus infinity
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


def random_order(count: int, device: torch.device | str = "cpu") -> Tensor:
    """(count,) int32, the same in every run."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randperm(count, generator=generator, device=device).int()


def power_of_two(matrix: Tensor) -> Tensor:
    """The power of two that scales the largest entry to 1 at most. Multiplying by it rounds nothing."""
    largest = torch.stack(torch.aminmax(matrix)).float().abs().amax()
    return torch.exp2(-largest.clamp_min(1e-30).log2().ceil())


def round_rows(
    matrix: Tensor, order: Tensor, dtype: torch.dtype, block: int = 1, block_d: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows times `power_of_two`, in this order and dtype, with zeros up to whole blocks.

    Also the norms of the rows and of their errors, in the order of `matrix`.
    """
    count, D = matrix.shape
    shape = -(-count // block) * block, -(-D // block_d) * block_d
    rounded = torch.zeros(shape, dtype=dtype, device=matrix.device)
    sizes, errors = torch.empty(2, count, dtype=torch.float32, device=matrix.device)
    scale = power_of_two(matrix)
    portion = ROUNDED[matrix.device.type]
    for index, part in zip(order.split(portion), rounded.split(portion), strict=False):
        rows = matrix[index].float().mul_(scale)
        sizes[index] = rows.norm(dim=1)
        errors[index] = rows.sub_(part[: len(rows), :D].copy_(rows)).norm(dim=1)
    return rounded, sizes, errors


def largest_error(x_norms: list[Tensor], y_norms: list[Tensor], D: int, unit: float) -> Tensor:
    """The largest difference between products of rounded and of original rows, for each row of x.

    Norms: of the rows and of their errors, in float32, which loses squares of entries below 2**-63.
    unit: what the sum may lose for each of D products.
    """
    lost = D**0.5 * 2.0**-63
    (x_sizes, x_errors), (y_sizes, y_errors) = ([norm + lost for norm in m] for m in (x_norms, y_norms))
    rounded_size = x_sizes + x_errors
    margin = x_errors * y_sizes.amax() + rounded_size * y_errors.amax()
    return margin + (D + 64) * unit * rounded_size * (y_sizes + y_errors).amax()


def bounds(best: Tensor, k: int, margin: Tensor, coarse: float = 0.0) -> Tensor:
    """The bound of each row, from its best products in descending order: the k best columns reach it.

    coarse: the share that a product or the bound may lose when it is rounded to bfloat16 after its sum.
    """
    if best.shape[1] < k:
        return best.new_full(best.shape[:1], LOWEST)
    kth = best[:, k - 1].clamp_min(LOWEST)  # minus infinity if groups hold fewer than k columns
    return (kth - 2 * margin - 3 * (coarse * kth.abs()) - 4 * coarse * margin).clamp_min(LOWEST)


def closest(
    lists: Tensor, scores: Tensor, counts: Tensor, k: int, margin: Tensor, team: Team, coarse: float = 0.0
) -> Shortlist:
    """The columns of each list, (M, room) with `counts` entries, that reach the bound of the row's scores."""
    room, portion, found = scores.shape[1], CLOSEST[scores.device.type], []
    for start in range(0, len(scores), portion):
        rows = slice(start, start + portion)
        empty = torch.arange(room, device=scores.device) >= counts[rows, None]
        best, order = scores[rows].float().masked_fill_(empty, -torch.inf).topk(min(room, max(128, 4 * k)))
        within = best >= bounds(team.largest(best[:, :k]), k, margin[rows], coarse)[:, None]
        overflowed = (counts[rows] > room) | (within[:, -1] & (counts[rows] > best.shape[1]))
        found.append((torch.where(within, lists[rows].gather(1, order), -1), overflowed))
    columns, overflows = map(torch.cat, zip(*found, strict=True))
    return columns, team.largest(overflows.int()[:, None])[:, 0] > 0


def shortlist(
    x: Tensor, y: Tensor, k: int, exclude_self: bool, symmetric: bool, team: Team | None = None
) -> Shortlist:
    """The short lists of the rows of x; those of a team hold what this process found.

    Without a team the host does not wait for the device.
    """
    (M, D), N, team = x.shape, y.shape[0], team or Team()
    width = next((w for w in (128, 32) if 2 * k * w <= N // PART[x.device.type]), 4)
    x_order, y_order = random_order(M, x.device), random_order(N, x.device)
    block, block_d = tile = OPTIONS["BLOCK"], OPTIONS["BLOCK_D"]
    y_rounded, *y_norms = round_rows(y, y_order, torch.float16, *tile)
    x_rounded, *x_norms = (y_rounded, *y_norms) if symmetric else round_rows(x, x_order, torch.float16, *tile)
    margin = largest_error(x_norms, y_norms, D, 2.0**-22)
    tiles = x_rounded.shape[0] // block, y_rounded.shape[0] // block
    shapes = (M, N, x_order, y_order, team.turn, team.turns)
    rows, tma = [x_rounded, y_rounded], has_tma()
    if tma:
        rows = [TensorDescriptor.from_tensor(matrix, [block, block_d]) for matrix in rows]
    options = {"D": x_rounded.shape[1], "EXCLUDE": exclude_self, "TMA": tma, **OPTIONS}
    options["num_stages"] = 2 if torch.version.hip else 3

    best = margin.new_empty((M, 0))
    part = min(tiles[1], triton.cdiv(max(N // PART[x.device.type], 2 * k * width), block))
    step = triton.cdiv(MAXIMA * k * width, block)
    for first in range(0, part, step):
        some = min(step, part - first)
        maxima = margin.new_full((M, some * block // width), -torch.inf)
        sizes = tiles[0], some, first
        _maxima_kernel[(tiles[0] * some,)](*rows, maxima, *sizes, *shapes, W=width, **options)
        best = torch.cat([best, maxima], 1)
        best = best.topk(min(k, best.shape[1])).values

    room = triton.next_power_of_2(max(ROOM, 4 * k + 12 * k // team.turns))
    lists, scores = x.new_empty((M, room), dtype=torch.int32), margin.new_empty((M, room))
    counts = x.new_zeros(M, dtype=torch.int32)
    kept = (team.largest(bounds(best, k, margin)[:, None])[:, 0], lists, scores, counts)
    options |= {"ROOM": room, "SYMMETRIC": symmetric}
    _candidates_kernel[(tiles[0] * tiles[1],)](*rows, *kept, *tiles, *shapes, **options)
    return closest(lists, scores, counts, k, margin, team)
