"""Neighbours under the Jaccard distance of sparse encodings, without a matrix of all pairs.

Step 7 of EMCC (arXiv 2412.19134): d_ij = 1 - s / (2 - s), s = sum_l min(v_il, v_jl).
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.sparse import csr_matrix

UNIT = 2**30  # overlaps are counted in whole units of 2**-30, so that no order of summation matters
BLOCK = 2048


def jaccard_neighbors(
    indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs of rows with Jaccard distance d <= eps, as a graph.

    Equals, for the dense matrix `v` of the encodings and without ever holding one,
    `s = torch.minimum(v[:, None], v[None]).sum(-1); (1 - s / (2 - s) <= eps).to_sparse_csr()`.

    Args:
        indptr, indices, values: the encodings in CSR form, (N + 1,) int64, (nnz,) int64 and
            (nnz,) float32. Columns lie in 0..N-1 and do not repeat within a row; values are
            finite, not negative, and a row sums to 1 at most.
        eps: the largest distance kept, in (0, 1]. At eps = 1 every pair qualifies: N * N of them.

    Returns:
        (indptr, indices), int64: row i lists the rows within eps of row i, ascending. It is
        symmetric, and every row lists itself.

    Values are rounded to multiples of 2**-30 and summed as integers, so the result does not depend
    on the order of summation and is the same on every device.

    Raises:
        ValueError: eps outside (0, 1], or arrays that are not such a CSR matrix.
    """
    return jaccard_neighbors_reference(indptr, indices, values, eps)


def jaccard_neighbors_reference(
    indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on the host, in sparse products: the specification of `jaccard_neighbors`.

    min(a, b) <= sqrt(a * b), so the product of the square roots bounds every overlap from above;
    the few pairs whose bound reaches the overlap that eps asks for are then measured exactly.
    """
    _check(indptr, indices, values, eps)
    size = len(indptr) - 1
    if eps == 1:
        everyone = torch.arange(size, device=indptr.device)
        return torch.arange(size + 1, device=indptr.device) * size, everyone.repeat(size)
    counts = torch.round(values.float() * UNIT).to(torch.int32)
    encodings = csr_matrix(
        (counts.cpu().numpy(), indices.cpu().numpy(), indptr.cpu().numpy()), shape=(size, size)
    )
    starts = range(0, size, BLOCK)
    roots = [encodings[start : start + BLOCK].astype(np.float32).sqrt() for start in starts]
    columns = [block.T.tocsr() for block in roots]

    def search(first: int, second: int):
        bound = (roots[first] @ columns[second]).tocoo()
        enough = bound.data >= (2 * (1 - eps) / (2 - eps) - 1e-3) * UNIT
        one, other = bound.row[enough] + first * BLOCK, bound.col[enough] + second * BLOCK
        one, other = one[one < other], other[one < other]
        overlap = np.asarray(encodings[one].minimum(encodings[other]).sum(axis=1)).ravel() / UNIT
        close = 1 - overlap / (2 - overlap) <= eps
        return one[close], other[close]

    blocks = [(first, second) for first in range(len(starts)) for second in range(first, len(starts))]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        found = list(pool.map(lambda pair: search(*pair), blocks))
    one = np.concatenate([np.empty(0, np.int64), *(pair[0] for pair in found)])
    other = np.concatenate([np.empty(0, np.int64), *(pair[1] for pair in found)])
    itself = np.arange(size)
    rows, cols = np.concatenate([one, other, itself]), np.concatenate([other, one, itself])
    graph = csr_matrix((np.ones(len(rows), bool), (rows, cols)), shape=(size, size))
    graph.sort_indices()
    return tuple(
        torch.from_numpy(part.astype(np.int64)).to(indptr.device) for part in (graph.indptr, graph.indices)
    )


def _check(indptr, indices, values, eps):
    if not 0 < eps <= 1:
        raise ValueError(f"eps must lie in (0, 1], got {eps}")
    if indptr.ndim != 1 or len(indptr) == 0:
        raise ValueError(f"indptr must be a vector of N + 1 offsets, got shape {tuple(indptr.shape)}")
    if indices.ndim != 1 or indices.shape != values.shape:
        raise ValueError(
            "indices and values must be vectors of one length, "
            f"got shapes {tuple(indices.shape)} and {tuple(values.shape)}"
        )
    if not values.is_floating_point():
        raise ValueError(f"values must be floating point, got {values.dtype}")
    if indptr[0] != 0 or indptr[-1] != len(indices) or bool((indptr[1:] < indptr[:-1]).any()):
        raise ValueError(f"indptr must rise from 0 to the number of entries, {len(indices)}")
    if len(indices) == 0:
        return
    if indices.min() < 0 or indices.max() >= len(indptr) - 1:
        raise ValueError(
            f"indices must lie in 0..{len(indptr) - 2}, got {int(indices.min())}..{int(indices.max())}"
        )
    if not bool((values >= 0).all()) or not bool((values <= 1).all()):
        raise ValueError("values must be finite and lie in [0, 1]: each row is a distribution")
