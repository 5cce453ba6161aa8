"""The k most similar rows, without ever storing the matrix of similarities: the neighbourhoods of EMCC."""

import torch

from ._checks import check_device, check_matrix
from ._triton import Config, jit, rows_contiguous, tl, triton, use_triton


def topk_similarity(
    x: torch.Tensor, y: torch.Tensor, k: int, exclude_self: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """For every row of `x` the `k` rows of `y` with the largest inner product, best first.

    `(x.float() @ y.float().T).topk(k)`, where equal similarities rank the lower index first. The M x N matrix
    never exists: memory is O((M + N) * (D + k)).

    Args:
        x: (M, D) float32, bfloat16 or float16.
        y: (N, D), the same dtype; may be `x` itself.
        k: neighbours a row, 1 <= k <= N.
        exclude_self: leave out row i of `y` for row i of `x` (then M = N and k <= N - 1).

    Returns:
        values (M, k) float32 and indices (M, k) int64.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, k out of range, features
            that are NaN or infinite.
    """
    _check(x, y, k, exclude_self)
    return _topk_similarity(x.detach(), y.detach(), k, exclude_self)


@torch.no_grad()
def topk_similarity_reference(
    x: torch.Tensor, y: torch.Tensor, k: int, exclude_self: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`topk_similarity` in plain torch, a strip of rows at a time: the specification and the CPU path."""
    itself = torch.arange(x.shape[0], device=x.device) if exclude_self else None
    return _by_strips(x, y, k, itself)


def _by_strips(
    x: torch.Tensor, y: torch.Tensor, k: int, itself: torch.Tensor | None, rows: int = 512
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best for every row of `x`; `itself`, where given, names the row of `y` to leave out for each."""
    values = torch.empty(x.shape[0], k, device=x.device)
    indices = torch.empty(x.shape[0], k, dtype=torch.int64, device=x.device)
    wide = torch.float64 if x.is_cuda else torch.float32  # where float32 products may be set to be TF32
    y = y.to(wide)
    for start in range(0, x.shape[0], rows):
        strip = slice(start, start + rows)
        with torch.autocast(x.device.type, enabled=False):
            scores = (x[strip].to(wide) @ y.T).float()
        if itself is not None:
            scores.scatter_(1, itself[strip, None], -torch.inf)
        values[strip], indices[strip] = _topk(scores, k)
    return values, indices


def _topk(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`scores.topk(k)` with the lower index first among equals, which `torch.topk` leaves open."""
    values, indices = scores.topk(min(k + 1, scores.shape[1]))
    cut = (values[:, k - 1 : k] == values[:, k:]).any(1).nonzero()[:, 0]  # a tie across the k-th place
    indices = indices[:, :k].sort().values
    indices[cut] = _lowest(scores[cut], values[cut, k - 1 : k], k)
    values, order = scores.gather(1, indices).sort(dim=1, descending=True, stable=True)
    return values, indices.gather(1, order)


def _lowest(scores: torch.Tensor, bound: torch.Tensor, k: int) -> torch.Tensor:
    """Each row's columns above `bound` and the lowest of those at it: k a row, in ascending order."""
    above, equal = scores > bound, scores == bound
    room = k - above.sum(1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(1) <= room))
    return chosen.nonzero()[:, 1].view(-1, k)


def _check(x: torch.Tensor, y: torch.Tensor, k: int, exclude_self: bool) -> None:
    check_matrix("x", x)
    check_matrix("y", y, columns=x.shape[1], dtypes=(x.dtype,))
    check_device("y", y, x.device)
    if exclude_self and x.shape[0] != y.shape[0]:
        raise ValueError(
            f"exclude_self needs as many rows in y as in x, row i being the same point; "
            f"got {y.shape[0]} and {x.shape[0]}"
        )
    most = y.shape[0] - bool(exclude_self)
    if not 1 <= k <= most:
        raise ValueError(f"k must be from 1 to {most}, the rows of y to choose from; got {k}")


def _check_finite(x: torch.Tensor, y: torch.Tensor) -> None:
    for name, tensor in (("x", x), ("y", y)):
        if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite features")


# The kernels. A product per pair is needed, a sorted list per tile is not: selecting in every tile costs more
# than its product. Instead, for rows rounded to float16,
#   1. a program per tile computes the products and keeps one number per row and group of W columns, the
#      largest. At least k columns reach b, the k-th largest of these: a lower bound of the k-th value;
#   2. a program per tile computes the products again and lists the columns that reach the bound;
#   3. a program per row computes the products of its listed columns, a few more than k, anew in float32, from
#      the rows as they came and always in the same order. The k best of those are the result.
# Rounding must not lose a neighbour. With x = x' + dx, where x' is the rounded row, and likewise y,
#     |x.y - x'.y'| = |dx.y + x'.dy| <= |dx||y| + |x'||dy| =: m,
# so k columns have x.y >= b - m, and one of the k best has x'.y' >= b - 2m: that is the bound of step 2.
# The errors |dx| and |dy| are measured, and m includes what summing D products in float32 may lose.
# A group takes every (N / W)-th column, for neighbours often lie side by side and would share one maximum.
# For a row with more columns at the bound than its list holds (many equal rows, say) the reference decides.
# Where y is x the product is symmetric: a tile above the diagonal also serves the rows of its columns.
# A candidate's key is the float32 value, in bits that sort as integers do, above the complement of its index:
# a plain top-k then ranks the lower index first among equals.


@jit
def _place(m_tiles, n_tiles, TALL: tl.constexpr):
    """Tile (m, n) of this program: TALL row tiles at a time share the column tiles in the cache."""
    band = tl.program_id(0) // (TALL * n_tiles)
    height = tl.minimum(m_tiles - band * TALL, TALL)
    within = tl.program_id(0) % (TALL * n_tiles)
    return band * TALL + within % height, within // height


@jit
def _original(tile, groups, BLOCK: tl.constexpr, W: tl.constexpr):
    """The rows that a tile holds, W of each group side by side, in the numbering of the caller."""
    position = tile * BLOCK + tl.arange(0, BLOCK)
    return (position % W) * groups + position // W


@jit
def _similarities(
    x, y, m, n, row, column, M, N, D, offset,
    EXCLUDE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of products of the rounded rows, which are padded to whole blocks; -inf in the padding."""
    features = tl.arange(0, BLOCK_D)
    a = x + (m * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None] * D + features[None, :]
    b = y + (n * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[None, :] * D + features[:, None]
    s = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, D, BLOCK_D):
        s = tl.dot(tl.load(a + start), tl.load(b + start), s)
    valid = (row < M)[:, None] & (column < N)[None, :]
    if EXCLUDE:
        valid &= (row + offset)[:, None] != column[None, :]
    return tl.where(valid, s, -float("inf"))


@jit
def _maxima_kernel(
    x, y, maxima, m_tiles, n_tiles, M, N, D, x_groups, y_groups, offset,
    SYMMETRIC: tl.constexpr, EXCLUDE: tl.constexpr, W: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    m, n = _place(m_tiles, n_tiles, TALL)
    if not SYMMETRIC or n >= m:
        row, column = _original(m, x_groups, BLOCK, W), _original(n, y_groups, BLOCK, W)
        s = _similarities(x, y, m, n, row, column, M, N, D, offset, EXCLUDE, BLOCK, BLOCK_D)
        group = tl.arange(0, BLOCK // W)
        top = tl.max(tl.reshape(s, (BLOCK, BLOCK // W, W)), 2)
        place = row.to(tl.int64)[:, None] * y_groups + n * (BLOCK // W) + group[None, :]
        tl.store(maxima + place, top, mask=(row < M)[:, None])
        if SYMMETRIC and n > m:
            top_across = tl.max(tl.reshape(s, (BLOCK // W, W, BLOCK)), 1)
            place_across = column.to(tl.int64)[None, :] * y_groups + m * (BLOCK // W) + group[:, None]
            tl.store(maxima + place_across, top_across, mask=(column < N)[None, :])


@jit
def _append(s, bounds, lists, counts, owner, entry, count, ROOM: tl.constexpr, AXIS: tl.constexpr):
    """Add the entries that reach their owner's bound to its list, one an owner and turn, the lowest first.

    Entries run along AXIS of `s`. Where a list is full, its count alone goes on.
    """
    none = 2**31 - 1
    live = owner < count
    bound = tl.load(bounds + owner, mask=live, other=float("inf"))
    left = tl.where(s >= tl.expand_dims(bound, AXIS), tl.expand_dims(entry, 1 - AXIS), none)
    lowest = tl.min(left, AXIS)
    while tl.min(lowest, 0) < none:
        slot = tl.atomic_add(counts + owner, 1, mask=lowest < none, sem="relaxed")
        place = lists + owner.to(tl.int64) * ROOM + slot
        tl.store(place, lowest, mask=(lowest < none) & (slot < ROOM))
        left = tl.where(left == tl.expand_dims(lowest, AXIS), none, left)
        lowest = tl.min(left, AXIS)


@jit
def _candidates_kernel(
    x, y, bounds, lists, counts, m_tiles, n_tiles, M, N, D, x_groups, y_groups, offset,
    ROOM: tl.constexpr, SYMMETRIC: tl.constexpr, EXCLUDE: tl.constexpr, W: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    m, n = _place(m_tiles, n_tiles, TALL)
    if not SYMMETRIC or n >= m:
        row, column = _original(m, x_groups, BLOCK, W), _original(n, y_groups, BLOCK, W)
        s = _similarities(x, y, m, n, row, column, M, N, D, offset, EXCLUDE, BLOCK, BLOCK_D)
        _append(s, bounds, lists, counts, row, column, M, ROOM, 1)
        if SYMMETRIC and n > m:
            _append(s, bounds, lists, counts, column, row, N, ROOM, 0)


@jit
def _keys_kernel(
    x, y, lists, counts, keys, D, x_stride, y_stride,
    ROOM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    count = tl.minimum(tl.load(counts + row), ROOM)
    for first in range(0, count, BLOCK):
        slots = row * ROOM + first + tl.arange(0, BLOCK)
        listed = first + tl.arange(0, BLOCK) < count
        column = tl.load(lists + slots, mask=listed, other=0).to(tl.int64)
        products = tl.zeros((BLOCK, BLOCK_D), tl.float32)
        for start in range(0, D, BLOCK_D):
            features = start + tl.arange(0, BLOCK_D)
            a = tl.load(x + row * x_stride + features, mask=features < D, other=0.0)
            live = listed[:, None] & (features < D)[None, :]
            b = tl.load(y + column[:, None] * y_stride + features[None, :], mask=live, other=0.0)
            products += a.to(tl.float32)[None, :] * b.to(tl.float32)
        bits = (tl.sum(products, 1) + 0.0).to(tl.int32, bitcast=True)  # + 0.0 makes -0 a 0
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        tl.store(keys + slots, (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - column), mask=listed)


PRODUCT = Config({"BLOCK": 128, "BLOCK_D": 64, "TALL": 8}, warps=8, stages=3, shared=98304)
KEYS = Config({"BLOCK": 32, "BLOCK_D": 128}, warps=4, stages=2, shared=1024)
STRIP = 65536  # rows of x at a time: bounds the memory of the maxima, a number per row and group


def _round(matrix: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float16 rows, W of each group side by side, zeros in the padding; norms of the rows and of the errors.

    A power of two brings the entries into float16's range: it rescales all products alike.
    """
    (count, D), device = matrix.shape, matrix.device
    block, block_d = PRODUCT.blocks["BLOCK"], PRODUCT.blocks["BLOCK_D"]
    shape = (triton.cdiv(count, block) * block, triton.cdiv(D, block_d) * block_d)
    rounded = torch.zeros(shape, dtype=torch.float16, device=device)
    groups = shape[0] // width
    sizes, errors = torch.empty(2, count, device=device)
    largest = torch.stack(torch.aminmax(matrix)).float().abs().amax()
    scale = torch.exp2(-largest.clamp_min(1e-30).log2().ceil())
    for start in range(0, count, 8192):
        index = torch.arange(start, min(start + 8192, count), device=device)
        scaled = matrix[index].float() * scale
        half = scaled.half()
        rounded[index % groups * width + index // groups, :D] = half
        sizes[index], errors[index] = scaled.norm(dim=1), (scaled - half).norm(dim=1)
    return rounded, sizes, errors


def _bounds(
    maxima: torch.Tensor,
    k: int,
    D: int,
    x_sizes: torch.Tensor,
    x_errors: torch.Tensor,
    y_sizes: torch.Tensor,
    y_errors: torch.Tensor,
) -> torch.Tensor:
    """Below these no column can be among the row's k best: the k-th largest maximum less twice the error."""
    lowest = torch.finfo(torch.float32).min  # above the padding's minus infinity
    if maxima.shape[1] < k:
        return maxima.new_full(maxima.shape[:1], lowest)
    rounded_size = x_sizes + x_errors
    margin = x_errors * y_sizes.amax() + rounded_size * y_errors.amax()
    margin += (D + 64) * 2.0**-22 * rounded_size * (y_sizes + y_errors).amax()
    return (maxima.topk(k).values[:, -1] - 2 * margin).clamp_min(lowest)


def _best(keys: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices of the k largest keys."""
    best = keys.topk(k).values
    ordered = (best >> 32).int()
    values = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return values, 0xFFFFFFFF - (best & 0xFFFFFFFF)


def _launch(
    x: torch.Tensor, y: torch.Tensor, k: int, exclude_self: bool, offset: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best for rows `offset` and on; the one wait on the host asks which lists overflowed."""
    if x.shape[0] > STRIP:
        starts = range(0, x.shape[0], STRIP)
        strips = [_launch(x[start : start + STRIP], y, k, exclude_self, start) for start in starts]
        values, indices = (torch.cat(parts) for parts in zip(*strips, strict=True))
        return values, indices
    if x.shape[0] == 0:
        return x.new_empty((0, k), dtype=torch.float32), x.new_empty((0, k), dtype=torch.int64)
    symmetric = x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()
    x, y = rows_contiguous(x), rows_contiguous(y)
    (M, D), N = x.shape, y.shape[0]
    width = next((w for w in (128, 32) if 2 * k * w <= N), 4)
    y_rounded, *y_norms = _round(y, width)
    x_rounded, *x_norms = (y_rounded, *y_norms) if symmetric else _round(x, width)
    block, groups = PRODUCT.blocks["BLOCK"], y_rounded.shape[0] // width
    m_tiles, n_tiles = x_rounded.shape[0] // block, y_rounded.shape[0] // block
    shapes = (m_tiles, n_tiles, M, N, x_rounded.shape[1], x_rounded.shape[0] // width, groups, offset)
    grid, options = (m_tiles * n_tiles,), {"SYMMETRIC": symmetric, "EXCLUDE": exclude_self, "W": width}

    maxima = x.new_empty((M, groups), dtype=torch.float32)
    PRODUCT.launch(_maxima_kernel, grid, x_rounded, y_rounded, maxima, *shapes, **options)
    bounds = _bounds(maxima, k, D, *x_norms, *y_norms)

    room = max(256, 4 * k)
    lists = x.new_empty((M, room), dtype=torch.int32)
    counts = x.new_zeros(M, dtype=torch.int32)
    kept = (bounds, lists, counts)
    PRODUCT.launch(_candidates_kernel, grid, x_rounded, y_rounded, *kept, *shapes, ROOM=room, **options)

    keys = x.new_full((M, room), torch.iinfo(torch.int64).min, dtype=torch.int64)
    KEYS.launch(_keys_kernel, (M,), x, y, lists, counts, keys, D, x.stride(0), y.stride(0), ROOM=room)
    values, indices = _best(keys, k)
    overflowed = (counts > room).nonzero()[:, 0]
    if len(overflowed):
        itself = overflowed + offset if exclude_self else None
        values[overflowed], indices[overflowed] = _by_strips(x[overflowed], y, k, itself)
    return values, indices


@torch.library.custom_op("ecul::topk_similarity", mutates_args=())
def _topk_similarity(
    x: torch.Tensor, y: torch.Tensor, k: int, exclude_self: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_finite(x, y)
    if use_triton(x):
        with torch.cuda.device_of(x):
            return _launch(x, y, k, exclude_self)
    return topk_similarity_reference(x, y, k, exclude_self)


@_topk_similarity.register_fake
def _(x, y, k, exclude_self):
    return (
        x.new_empty((x.shape[0], k), dtype=torch.float32),
        x.new_empty((x.shape[0], k), dtype=torch.int64),
    )
