"""The similarity of listed pairs, to the last bit: neighbourhoods and encodings take their values here."""

import warnings

import torch

from ._checks import check_device, check_matrix, check_vector
from ._triton import Config, jit, rows_contiguous, tl, triton, use_triton

STRIP, BLOCK = 8192, 4096  # rows of x and of y that the reference widens to float64 at a time


def pair_similarity(
    x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """The inner product of each listed row of `x` with its row of `y`, summed in float64.

    `(x[rows].double() * y[columns].double()).sum(1)`. Products are exact, and so are their sums, in whatever
    order, on every device, where they are multiples of 2**-52 below 2: for unit rows on a grid of 2**-26.

    Args:
        x: (M, D) float32, bfloat16 or float16.
        y: (N, D), the same dtype; may be `x` itself.
        rows: (P,) int64, rows of `x`, ascending.
        columns: (P,) int64, rows of `y`, no pair twice; where negative, nothing is computed.

    Returns:
        (P,) float64; minus infinity at negative columns.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
    """
    check_matrix("x", x)
    check_matrix("y", y, columns=x.shape[1], dtypes=(x.dtype,))
    check_vector("rows", rows)
    check_vector("columns", columns, length=len(rows))
    for name, tensor in (("y", y), ("rows", rows), ("columns", columns)):
        check_device(name, tensor, x.device)
    return _pair_similarity(x.detach(), y.detach(), rows, columns)


@torch.no_grad()
def pair_similarity_reference(
    x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """`pair_similarity` in sampled products, a block of rows and columns at a time: the CPU path."""
    if x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride():  # each pair once
        size, live = max(1, len(x)), columns >= 0
        key = torch.minimum(rows, columns) * size + torch.maximum(rows, columns)
        key, place = torch.where(live, key, -1).unique(return_inverse=True)
        once = _by_blocks(x, y, key.clamp_min(0) // size, torch.where(key < 0, -1, key % size))
        return once[place]
    return _by_blocks(x, y, rows, columns)


def _by_blocks(x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    out = torch.full(rows.shape, -torch.inf, dtype=torch.float64, device=rows.device)
    blocks = -(-y.shape[0] // BLOCK)
    key = torch.where(columns < 0, -1, rows // STRIP * blocks + columns // BLOCK)
    key, order = key.sort(stable=True)
    sizes = key[key >= 0].bincount(minlength=-(-x.shape[0] // STRIP) * blocks).tolist()
    ends = torch.tensor(sizes).cumsum(0) + int((key < 0).sum())
    held, wide = -1, x.new_empty((min(STRIP, x.shape[0]), x.shape[1]), dtype=torch.float64)
    narrow = x.new_empty((min(BLOCK, y.shape[0]), x.shape[1]), dtype=torch.float64)
    for number, (size, end) in enumerate(zip(sizes, ends.tolist(), strict=True)):
        if size == 0:
            continue
        strip, block = number // blocks, number % blocks
        x_part = x[strip * STRIP : (strip + 1) * STRIP]
        y_part = y[block * BLOCK : (block + 1) * BLOCK]
        if held != strip:
            held = strip
            wide[: len(x_part)] = x_part
        narrow[: len(y_part)] = y_part
        part = order[end - size : end]
        counts = (rows[part] - strip * STRIP).bincount(minlength=len(x_part))
        sampled = wide[: len(x_part)], narrow[: len(y_part)]
        out[part] = _sampled(*sampled, counts, columns[part] - block * BLOCK)
    return out


def _sampled(x: torch.Tensor, y: torch.Tensor, counts: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """The products of each row of `x` with the next `counts` of the listed rows of `y`, float64."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse", category=UserWarning)  # CSR is said to be in beta
        pattern = torch.sparse_csr_tensor(
            torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            columns,
            torch.zeros_like(columns, dtype=x.dtype),
            (len(x), len(y)),
            check_invariants=False,
        )
        return torch.sparse.sampled_addmm(pattern, x, y.T, beta=0.0).values()


@jit
def _pairs_kernel(
    x, y, rows, columns, out, P, D, x_stride, y_stride, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.load(columns + pair, mask=pair < P, other=-1)
    listed = column >= 0
    row = tl.load(rows + pair, mask=listed, other=0)
    products = tl.zeros((BLOCK, BLOCK_D), tl.float64)
    if tl.max(column, 0) >= 0:
        for start in range(0, D, BLOCK_D):
            features = start + tl.arange(0, BLOCK_D)
            live = listed[:, None] & (features < D)[None, :]
            a = tl.load(x + row[:, None] * x_stride + features[None, :], mask=live, other=0.0)
            b = tl.load(y + column[:, None] * y_stride + features[None, :], mask=live, other=0.0)
            products += a.to(tl.float64) * b.to(tl.float64)
    tl.store(out + pair, tl.where(listed, tl.sum(products, 1), -float("inf")), mask=pair < P)


PAIRS = Config({"BLOCK": 16, "BLOCK_D": 128}, warps=4, stages=2, shared=2048)


def _launch(x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    x, y, rows, columns = rows_contiguous(x), rows_contiguous(y), rows.contiguous(), columns.contiguous()
    out = torch.empty(rows.shape, dtype=torch.float64, device=x.device)
    if len(rows):
        grid = (triton.cdiv(len(rows), PAIRS.blocks["BLOCK"]),)
        sizes = len(rows), x.shape[1], x.stride(0), y.stride(0)
        PAIRS.launch(_pairs_kernel, grid, x, y, rows, columns, out, *sizes)
    return out


@torch.library.custom_op("ecul::pair_similarity", mutates_args=())
def _pair_similarity(
    x: torch.Tensor, y: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    if use_triton(x):
        with torch.cuda.device_of(x):
            return _launch(x, y, rows, columns)
    return pair_similarity_reference(x, y, rows, columns)


@_pair_similarity.register_fake
def _(x, y, rows, columns):
    return torch.empty_like(rows, dtype=torch.float64)
