"""Short lists that hold the k best columns of every row: the first two steps of `topk_similarity`."""

import torch
from torch import Tensor

from ._triton import Launch, TensorDescriptor, has_tma, jit, tl, triton

# A product per pair is needed, a sorted list per tile is not: selecting in every tile costs more than its
# product. Instead, for rows rounded to float16 (on a CPU: to bfloat16 where it has the instructions),
#   1. products of every row with a part of the columns give one number per row and group of W columns, the
#      largest. At least k columns reach b, the k-th largest of these;
#   2. products of all pairs list the columns that reach the bound, a few times k a row, and keep the values,
#      whose own k-th largest is a better b;
#   3. of the columns that reach that bound, a few more than k, the products are summed anew in float64, from
#      the rows as they came. Rounded to float32 once, the k best of those are the result.
# Rounding must not lose a neighbour. With x = x' + dx, where x' is the rounded row, and likewise y,
#     |x.y - x'.y'| = |dx.y + x'.dy| <= |dx||y| + |x'||dy| =: m,
# so k columns have x.y >= b - m, and one of the k best has x'.y' >= b - 2m: that is the bound, both times.
# The errors |dx| and |dy| are measured, and m includes what summing D products in float32 may lose.
# Rows and columns stand in a random order, the same in every run: in the caller's, neighbours often lie side
# by side, would share one maximum, and no part stands for the whole.
# For a row with more columns at the bound than its list holds (many equal rows, say) the reference decides.
# Where y is x the product is symmetric: a tile above the diagonal also serves the rows of its columns.
# From compute capability 9.0 on, tiles come by TMA: what threads load needs a fence before an asynchronous
# product reads it, and Triton 3.6 leaves that out.


@jit
def _place(m_tiles, n_tiles, TALL: tl.constexpr):
    """Tile (m, n) of this program: TALL row tiles at a time share the column tiles in the cache."""
    band = tl.program_id(0) // (TALL * n_tiles)
    height = tl.minimum(m_tiles - band * TALL, TALL)
    within = tl.program_id(0) % (TALL * n_tiles)
    return band * TALL + within % height, within // height


@jit
def _original(order, position, count):
    """The caller's numbers of the rows at these positions, `count` beyond the last."""
    return tl.load(order + position, mask=position < count, other=count)


@jit
def _similarities(
    x, y, m, n, row, column, M, N, D: tl.constexpr, EXCLUDE: tl.constexpr, TMA: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of products of the rounded rows, which are padded to whole blocks; -inf in the padding."""
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
    x, y, maxima, m_tiles, n_tiles, first, M, N, x_order, y_order,
    D: tl.constexpr, EXCLUDE: tl.constexpr, TMA: tl.constexpr, W: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    m, n = _place(m_tiles, n_tiles, TALL)
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
    """Add the entries that reach their owner's bound to its list, one an owner and turn, the best first.

    The entries, numbers in memory, run along AXIS of `s`. Where a list is full, its count alone goes on.
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
    x, y, bounds, lists, scores, counts, m_tiles, n_tiles, M, N, x_order, y_order,
    ROOM: tl.constexpr, SYMMETRIC: tl.constexpr,
    D: tl.constexpr, EXCLUDE: tl.constexpr, TMA: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    m, n = _place(m_tiles, n_tiles, TALL)
    if not SYMMETRIC or n >= m:
        row = _original(x_order, m * BLOCK + tl.arange(0, BLOCK), M)
        column = _original(y_order, n * BLOCK + tl.arange(0, BLOCK), N)
        s = _similarities(x, y, m, n, row, column, M, N, D, EXCLUDE, TMA, BLOCK, BLOCK_D)
        _append(s, bounds, lists, scores, counts, row, M, y_order + n * BLOCK, ROOM, BLOCK, 1)
        if SYMMETRIC and n > m:
            _append(s, bounds, lists, scores, counts, column, N, x_order + m * BLOCK, ROOM, BLOCK, 0)


LAUNCH = Launch({"BLOCK": 128, "BLOCK_D": 64, "TALL": 8}, warps=8, stages=3, shared=131072)
PART = 8  # the first bound comes from one column in so many
MAXIMA = 8  # and from so many times k maxima a row at a time
ROOM = 256  # columns that a list holds at least
CLOSEST = 65536  # rows whose lists are cut short at a time


def random_order(count: int, device: torch.device | str = "cpu") -> Tensor:
    """(count,) int32, the same in every run."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randperm(count, generator=generator, device=device).int()


def round_rows(
    matrix: Tensor, order: Tensor, dtype: torch.dtype, block: int = 1, block_d: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in this order and dtype, padded with zeros to whole blocks; their norms and those of the errors.

    A power of two brings the entries into the range of the dtype: it rescales all products alike. The norms
    stay in the order of `matrix`.
    """
    count, D = matrix.shape
    shape = -(-count // block) * block, -(-D // block_d) * block_d
    rounded = torch.zeros(shape, dtype=dtype, device=matrix.device)
    sizes, errors = torch.empty(2, count, dtype=torch.float32, device=matrix.device)
    scale = power_of_two(matrix)
    for start in range(0, count, 8192):
        index = order[start : start + 8192]
        rows = matrix[index].float().mul_(scale)
        sizes[index] = rows.norm(dim=1)
        part = rounded[start : start + len(rows), :D].copy_(rows)
        errors[index] = rows.sub_(part).norm(dim=1)
    return rounded, sizes, errors


def power_of_two(matrix: Tensor) -> Tensor:
    """The scale that brings the largest entry to 1 at most: exact, and the same for all products."""
    largest = torch.stack(torch.aminmax(matrix)).float().abs().amax()
    return torch.exp2(-largest.clamp_min(1e-30).log2().ceil())


def largest_error(x_norms: list[Tensor], y_norms: list[Tensor], D: int, unit: float) -> Tensor:
    """What a product of rounded rows may differ by from that of the rows, for each row of x.

    Norms: of the rows and of their errors, in float32, where squares of entries below 2**-63 are lost. unit:
    what adding one of D products in float32 may lose.
    """
    lost = D**0.5 * 2.0**-63
    (x_sizes, x_errors), (y_sizes, y_errors) = ([norm + lost for norm in m] for m in (x_norms, y_norms))
    rounded_size = x_sizes + x_errors
    margin = x_errors * y_sizes.amax() + rounded_size * y_errors.amax()
    return margin + (D + 64) * unit * rounded_size * (y_sizes + y_errors).amax()


LOWEST = torch.finfo(torch.float32).min  # above the padding's minus infinity


def bounds(best: Tensor, k: int, margin: Tensor, coarse: float = 0.0) -> Tensor:
    """Below these no column can be among the row's k best, given its best products, in descending order.

    coarse: the share of itself by which rounding may have changed a product, after its sum, and the bound.
    """
    if best.shape[1] < k:
        return best.new_full(best.shape[:1], LOWEST)
    kth = best[:, k - 1].clamp_min(LOWEST)  # minus infinity where groups hold fewer than k columns
    return (kth - 2 * margin - 3 * (coarse * kth.abs()) - 4 * coarse * margin).clamp_min(LOWEST)


# (M, few) int32 columns, -1 for none, and (M,) whether a list was too short for its row
Shortlist = tuple[Tensor, Tensor]


def closest(
    lists: Tensor,
    scores: Tensor,
    counts: Tensor,
    k: int,
    margin: Tensor,
    coarse: float = 0.0,
) -> Shortlist:
    """Of each list, (M, room) with `counts` entries, those that reach the bound of its own scores."""
    room = scores.shape[1]
    scores.masked_fill_(torch.arange(room, device=scores.device) >= counts[:, None], -torch.inf)
    best, order = scores.topk(min(room, max(128, 4 * k)))
    within = best >= bounds(best, k, margin, coarse)[:, None]
    overflowed = (counts > room) | (within[:, -1] & (counts > best.shape[1]))
    return torch.where(within, lists.gather(1, order), -1), overflowed


def shortlist(x: Tensor, y: Tensor, k: int, exclude_self: bool, symmetric: bool) -> Shortlist:
    """The short lists of the rows of x, without a wait on the host."""
    (M, D), N = x.shape, y.shape[0]
    width = next((w for w in (128, 32) if 2 * k * w <= N // PART), 4)
    x_order, y_order = random_order(M, x.device), random_order(N, x.device)
    block, block_d = LAUNCH.blocks["BLOCK"], LAUNCH.blocks["BLOCK_D"]
    rounding = torch.float16, block, block_d
    y_rounded, *y_norms = round_rows(y, y_order, *rounding)
    x_rounded, *x_norms = (y_rounded, *y_norms) if symmetric else round_rows(x, x_order, *rounding)
    margin = largest_error(x_norms, y_norms, D, 2.0**-22)
    tiles = x_rounded.shape[0] // block, y_rounded.shape[0] // block
    shapes = (M, N, x_order, y_order)
    options = {"D": x_rounded.shape[1], "EXCLUDE": exclude_self, "TMA": has_tma()}
    rows = [x_rounded, y_rounded]
    if options["TMA"]:
        rows = [TensorDescriptor.from_tensor(matrix, [block, block_d]) for matrix in rows]

    best = margin.new_empty((M, 0))
    part = min(tiles[1], triton.cdiv(max(N // PART, 2 * k * width), block))
    step = triton.cdiv(MAXIMA * k * width, block)
    for first in range(0, part, step):
        some = min(step, part - first)
        maxima = margin.new_empty((M, some * block // width))
        LAUNCH.start(
            _maxima_kernel, (tiles[0] * some,),
            *rows, maxima, tiles[0], some, first, *shapes, W=width, **options,
        )  # fmt: skip
        best = torch.cat([best, maxima], 1)
        best = best.topk(min(k, best.shape[1])).values

    room = triton.next_power_of_2(max(ROOM, 2 * PART * k))
    lists, scores = x.new_empty((M, room), dtype=torch.int32), margin.new_empty((M, room))
    counts = x.new_zeros(M, dtype=torch.int32)
    kept = (bounds(best, k, margin), lists, scores, counts)
    options |= {"ROOM": room, "SYMMETRIC": symmetric}
    LAUNCH.start(_candidates_kernel, (tiles[0] * tiles[1],), *rows, *kept, *tiles, *shapes, **options)
    parts = [slice(start, start + CLOSEST) for start in range(0, M, CLOSEST)]
    found = [closest(lists[rows], scores[rows], counts[rows], k, margin[rows]) for rows in parts]
    columns, overflowed = zip(*found, strict=True)
    return torch.cat(columns), torch.cat(overflowed)
