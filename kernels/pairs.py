"""The similarity of listed pairs, to the last bit: neighbourhoods and encodings take their values here."""

import warnings

import torch
from torch import Tensor

from ._checks import LABELS, check_device, check_tensor
from ._triton import jit, rows_contiguous, same_rows, tl, triton, use_triton

X_PART, Y_PART = 2**23, 2**21  # entries of x and of y that the reference converts to float64 at a time


def pair_similarity(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The inner product of each listed row of `x` with its row of `y`, summed in float64.

    `(x[rows].double() * y[columns].double()).sum(1)`. For unit rows on a grid of 2**-26 all products and sums
    are multiples of 2**-52 below 2: the result is exact, in any order and on every device.

    Args:
        x: (M, D) float32, bfloat16 or float16.
        y: (N, D), the same dtype; may be `x` itself.
        rows: (P,) int64, rows of `x`, ascending unless y is x.
        columns: (P,) int64, rows of `y`, no pair twice unless y is x. Negative ones are skipped.

    Returns:
        (P,) float64; minus infinity at negative columns.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
    """
    check_tensor("x", x, None, None)
    check_tensor("y", y, None, x.shape[1], dtypes=(x.dtype,))
    check_tensor("rows", rows, None, dtypes=LABELS)
    check_tensor("columns", columns, len(rows), dtypes=LABELS)
    check_device(x.device, y=y, rows=rows, columns=columns)
    return _pair_similarity(x.detach(), y.detach(), rows, columns)


@torch.no_grad()
def pair_similarity_reference(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`pair_similarity` in sampled products, a block of rows and columns at a time: the CPU path."""
    if not same_rows(x, y):
        return _by_blocks(x, y, rows, columns)
    key, size = torch.minimum(rows, columns) * len(x) + torch.maximum(rows, columns), max(1, len(x))
    once, place = torch.where(columns < 0, -1, key).unique(return_inverse=True)  # (i, j) and (j, i) once
    return _by_blocks(x, y, once // size, torch.where(once < 0, -1, once % size))[place]


def _by_blocks(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    out = torch.full(rows.shape, -torch.inf, dtype=torch.float64, device=rows.device)
    x_rows, y_rows = (max(1, part // max(1, x.shape[1])) for part in (X_PART, Y_PART))
    x_buffer = x.new_empty(min(x_rows, len(x)), x.shape[1], dtype=torch.float64)
    y_buffer = y.new_empty(min(y_rows, len(y)), y.shape[1], dtype=torch.float64)
    shared = same_rows(x, y)  # then rows of x that are wide already serve as rows of y
    for x_first in range(0, len(x), x_rows):
        wide = x_buffer[: len(x) - x_first].copy_(x[x_first : x_first + x_rows])
        offsets = torch.arange(x_first, x_first + len(wide) + 1, device=rows.device)
        start, stop = torch.searchsorted(rows, offsets[[0, -1]]).tolist()
        block = columns[start:stop].div(y_rows, rounding_mode="floor")
        for number in block[block >= 0].unique().tolist():
            part = start + (block == number).nonzero()[:, 0]
            y_first = number * y_rows
            y_part = y[y_first : y_first + y_rows]
            listed = torch.searchsorted(rows[part], offsets), columns[part] - y_first, part.double()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse", UserWarning)  # torch calls CSR beta
                pattern = torch.sparse_csr_tensor(*listed, (len(wide), len(y_part)), check_invariants=False)
                inside = wide[y_first - x_first :][: len(y_part) if shared and y_first >= x_first else 0]
                y_wide = inside if len(inside) == len(y_part) else y_buffer[: len(y_part)].copy_(y_part)
                out[part] = torch.sparse.sampled_addmm(pattern, wide, y_wide.T, beta=0.0).values()
    return out


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


OPTIONS = {"BLOCK": 16, "BLOCK_D": 128, "num_warps": 4, "num_stages": 2}


def _launch(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    x, y, rows, columns = rows_contiguous(x), rows_contiguous(y), rows.contiguous(), columns.contiguous()
    out = torch.empty(rows.shape, dtype=torch.float64, device=x.device)
    sizes = len(rows), x.shape[1], x.stride(0), y.stride(0)
    grid = (triton.cdiv(len(rows), OPTIONS["BLOCK"]),)
    _pairs_kernel[grid](x, y, rows, columns, out, *sizes, **OPTIONS)
    return out


@torch.library.custom_op("ecul::pair_similarity", mutates_args=())
def _pair_similarity(x: Tensor, y: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    if use_triton(x):
        with torch.cuda.device_of(x):
            return _launch(x, y, rows, columns)
    return pair_similarity_reference(x, y, rows, columns)


@_pair_similarity.register_fake
def _(x, y, rows, columns):
    return torch.empty_like(rows, dtype=torch.float64)
