"""Extended modality-camera clustering: labels from features, in memory linear in their number.

ECUL, arXiv 2412.19134. `emcc` is a few sparse steps, each a public function of its own: `rank_neighbors`,
`reciprocal_encodings`, `extend_encodings`, `neighbor_graph`, `dbscan`. Sparse matrices are plain CSR arrays:
`indptr` (N + 1,) and `indices` (nnz,) int64, columns ascending in a row, and `values`. Every function takes
torch tensors on any device, or NumPy arrays, and returns the same kind.

Labels are the same on every device, in any number of threads or processes: all is summed exactly
(`common/exact.py`).
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from ecul.common import distributed, logs
from ecul.common.exact import unit_rows
from ecul.common.sparse import CSR
from ecul.encodings import encode, extend, rank_rows
from ecul.kernels import jaccard_neighbors
from ecul.kernels._checks import check_csr
from ecul.kernels.jaccard import graph_of, jaccard_pairs

# What `emcc` holds on a GPU at N = 1,000,000, D = 2048, k1 = k3 = 40 and 300 non-zeros an extended row, in GB
# beyond the features: 22 at most, while neighbours are found.
#   points, float32, until the encodings are made          N * D * 4        8.2
#   neighbours: rounded rows, float16                      N * D * 2        4.1
#     maxima of a part of the columns, 320 a row           N * 320 * 4      1.3   gone before the lists come
#     lists with scores, 1,024 a row                       N * 1,024 * 8    8.2
#     cut short, 160 a row                                 N * 160 * 4      0.6
#   ranks, 40 a row                                        N * 40 * 8       0.3
#   encodings, 60 a row, columns and values                N * 60 * 16      1.0
#   extended, 300 a row                                    N * 300 * 12     3.6
#   graph: renumbered columns and units                    N * 300 * 8      2.4
#     first entries, 100 a row, by row and by column       N * 100 * 48     4.8
#     listed pairs, 128 a row                              N * 128 * 16     2.0
#     overlaps of a few rows                               2**25 * 4        0.1
# Joining strips of encodings or extended rows takes their room twice; a strip itself takes 0.5 GB at most.


def _same_kind(function: Callable) -> Callable[..., Any]:
    """Let a function of tensors take NumPy arrays too; where no argument is a tensor, NumPy comes back."""

    def as_tensor(argument: Any) -> Any:
        return torch.as_tensor(argument) if isinstance(argument, np.ndarray) else argument

    @functools.wraps(function)
    def wrapper(*args: Any, **options: Any) -> Any:
        result = function(*map(as_tensor, args), **{name: as_tensor(a) for name, a in options.items()})
        if any(isinstance(argument, torch.Tensor) for argument in (*args, *options.values())):
            return result
        return tuple(part.numpy() for part in result) if isinstance(result, tuple) else result.numpy()

    return wrapper


@_same_kind
def emcc(
    features: torch.Tensor,
    cameras: torch.Tensor | None = None,
    modalities: torch.Tensor | None = None,
    *,
    k1: int = 30,
    k2: int = 6,
    k3: int | None = 12,
    eps: float = 0.6,
    min_samples: int = 4,
    together: bool = False,
) -> torch.Tensor:
    """Cluster features across cameras and modalities; -1 marks outliers.

    DBSCAN(eps, min_samples) on the Jaccard distance between the extended k-reciprocal encodings of the
    features: Wu et al., arXiv 2412.19134, on Zhong et al., CVPR 2017.

    Args:
        features: (N, D) floating point, a point a row; rows are normalised here.
        cameras: (N,) integers >= 0, the camera of each point; None: one camera.
        modalities: (N,) integers, 0 visible and 1 infrared; None: one modality.
        k1: size of the neighbourhoods that must be mutual.
        k2: members of each camera that an encoding is averaged over.
        k3: size of the range they are taken from, at least k2; None: plain local query expansion over the k2
            nearest, cameras and modalities unused, which is the standard clustering.
        eps: the largest Jaccard distance between neighbours, in (0, 1].
        min_samples: neighbours, the point among them, that make a core point.
        together: share the work with the other processes of torch.distributed's group: all of them call, with
            equal arguments, and all get the same labels, those of one process.

    Returns:
        (N,) int64 labels; clusters count from 0 in the order of their smallest core point. A tensor for
        tensors: code that goes on with `set(labels)` or `centers[labels[i]]` needs `labels.cpu().numpy()`, as
        these tell a tensor's elements apart by identity, and would make a cluster of every image.

    Neighbourhoods hold the point itself first, even before its duplicates; ties go to the lower index; sizes
    beyond N mean N. Similarities are exact for the normalised rows, which are rounded to multiples of 2**-26;
    neighbours rank by their float32 values. The same labels come on every device. [R] The averaging in the
    extension is a reconstruction, see `extend_encodings`.

    Choosing eps and k1: `ecul tune` shows clusters, outliers and a label-free score for
    each eps, from one product. Take the top of the score: below it people fall into outliers, above it they
    merge.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range; a row of features that is not
            finite, or all zeros.
    """
    _check_sizes(k1=k1, k2=k2, min_samples=min_samples)
    _check_range(k2, k3)
    if not 0 < eps <= 1:
        raise ValueError(f"eps must lie in (0, 1], got {eps}")
    points = unit_rows(features)
    cameras = _check_codes("cameras", cameras, points)
    modalities = _check_codes("modalities", modalities, points, largest=1)
    size, together = len(points), together and distributed.size() > 1
    if eps == 1:  # no distance is larger
        return torch.full((size,), 0 if size >= min_samples else -1, device=points.device)
    with logs.progress(5, "emcc", "step", not together or distributed.rank() == 0) as bar:

        def done(result: Any) -> Any:
            bar.update()
            return result

        ranks = done(rank_rows(points, max(k1, k2, k3 or 0), together))
        encodings = done(encode(points, ranks, k1, together))
        del points
        encodings = done(extend(encodings, ranks, cameras, modalities, k2, k3, together))
        turn, turns = (distributed.rank(), distributed.size()) if together else (0, 1)
        indptr, indices, values = encodings
        pairs = jaccard_pairs(indptr, indices, values, eps, turn, turns)
        graph = done(graph_of(distributed.join(pairs.T).T if together else pairs, size))
        return done(dbscan(*graph, min_samples=min_samples))


@_same_kind
def rank_neighbors(features: torch.Tensor, k: int) -> torch.Tensor:
    """The k nearest points of every point by cosine similarity, the point itself first: (N, min(k, N)) int64.

    `(x @ x.T).float().fill_diagonal_(inf).topk(k).indices`, ties to the lower index, for `x =
    normalize(features)` on the grid, in float64. Raises TypeError and ValueError as `emcc` does.
    """
    _check_sizes(k=k)
    return rank_rows(unit_rows(features), k)


@_same_kind
def reciprocal_encodings(features: torch.Tensor, ranks: torch.Tensor, k1: int = 30) -> CSR:
    """Encode each point by its expanded k-reciprocal neighbours: CSR (N, N) float64, rows sum to 1.

    Row i is `softmax(2 * cos(f_i, f_j) - 2)` over j in E(i): the points R(i, k1) that hold i among their own
    k1 nearest, and R(j, round(k1 / 2) + 1) of every j in R(i, k1) that has more than two thirds of it in
    R(i, k1) already (Zhong et al., CVPR 2017).

    Args:
        features: (N, D) floating point; rows are normalised.
        ranks: (N, >= min(k1, N)) int64 from `rank_neighbors`.
        k1: size of the neighbourhoods that must be mutual.

    Returns:
        indptr, indices, values.
    """
    _check_sizes(k1=k1)
    points = unit_rows(features)
    _check_ranks(ranks, len(points), k1)
    return encode(points, ranks, k1)


@_same_kind
def extend_encodings(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    ranks: torch.Tensor,
    cameras: torch.Tensor | None = None,
    modalities: torch.Tensor | None = None,
    k2: int = 6,
    k3: int | None = 12,
) -> CSR:
    """Average encodings over the first k2 members of every camera within the k3 nearest: CSR (N, N) float32.

    `V'_i = mean over modalities (mean over their cameras (mean over the camera's members j of V_j))`, over
    those present among the k3 nearest of i; k3=None: the mean over the k2 nearest, cameras unused.
    [P] Two sizes, aware of cameras and modalities. [R] This averaging of them.

    Args:
        indptr, indices, values: encodings, CSR (N, N).
        ranks: (N, >= min(k3 or k2, N)) int64 from `rank_neighbors`.
        cameras, modalities, k2, k3: as in `emcc`.

    Returns:
        indptr, indices, values; sums are float64, rounded once.
    """
    _check_range(k2, k3)
    check_csr(indptr, indices, values)
    cameras = _check_codes("cameras", cameras, ranks)
    modalities = _check_codes("modalities", modalities, ranks, largest=1)
    _check_ranks(ranks, len(indptr) - 1, k3 or k2)
    return extend((indptr, indices, values), ranks, cameras, modalities, k2, k3)


@_same_kind
def neighbor_graph(
    indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, eps: float = 0.6
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs of points whose encodings have Jaccard distance d <= eps: CSR (N, N) without values.

    Symmetric, and every point lists itself; see `ecul.kernels.jaccard_neighbors`.
    """
    return jaccard_neighbors(indptr, indices, values, eps)


@_same_kind
def dbscan(indptr: torch.Tensor, indices: torch.Tensor, min_samples: int = 4) -> torch.Tensor:
    """DBSCAN labels from the graph of the pairs within eps: scikit-learn's, -1 = outlier; (N,) int64.

    Clusters count from 0 in the order of their smallest core point; a point that is no core joins the
    lowest-numbered cluster that reaches it.

    Args:
        indptr, indices: CSR of a symmetric graph, (N + 1,) and (nnz,) integers, no pair twice. A point counts
            as its own neighbour whether or not the graph says so.
        min_samples: neighbours, the point among them, that make a core point.

    A graph on a device is copied to the host and the labels back: it is small, and finding connected
    components is sequential work.
    """
    _check_sizes(min_samples=min_samples)
    check_csr(indptr, indices)
    size = len(indptr) - 1
    rows, cols = np.repeat(np.arange(size), indptr.diff().cpu().numpy()), indices.cpu().numpy()
    rows, cols = rows[rows != cols], cols[rows != cols]
    core = np.bincount(rows, minlength=size) + 1 >= min_samples
    inner = core[rows] & core[cols]
    links = csr_matrix((np.ones(inner.sum(), bool), (rows[inner], cols[inner])), shape=(size, size))
    component = connected_components(links, directed=False)[1][core]
    _, first, which = np.unique(component, return_index=True, return_inverse=True)
    labels = np.full(size, -1)
    labels[core] = np.argsort(np.argsort(first))[which]  # SciPy promises no order of the components
    border = ~core[rows] & core[cols]
    reached = np.full(size, size)
    np.minimum.at(reached, rows[border], labels[cols[border]])
    labels = np.where(reached < size, reached, labels)
    return torch.from_numpy(labels.astype(np.int64)).to(indptr.device)


def _check_codes(name: str, codes: Any, points: torch.Tensor, largest: int | None = None) -> torch.Tensor:
    if codes is None:
        return torch.zeros(len(points), dtype=torch.int64, device=points.device)
    codes = torch.as_tensor(codes, device=points.device)
    if codes.is_floating_point() or codes.is_complex():
        raise TypeError(f"{name} must be integers, got {codes.dtype}")
    if codes.shape != (len(points),):
        raise ValueError(f"{name} must have one entry a point, ({len(points)},), got {tuple(codes.shape)}")
    codes = codes.long()
    if len(codes) and (codes.min() < 0 or (largest is not None and codes.max() > largest)):
        expected = "not be negative" if largest is None else f"lie in 0..{largest}"
        raise ValueError(f"{name} must {expected}, got {int(codes.min())}..{int(codes.max())}")
    return codes


def _check_sizes(**sizes: Any) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer):
            raise TypeError(f"{name} must be an integer, got {size!r}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _check_range(k2: int, k3: int | None) -> None:
    _check_sizes(k2=k2, **({} if k3 is None else {"k3": k3}))
    if k3 is not None and k3 < k2:
        raise ValueError(f"k3 must be at least k2 = {k2}, or None for plain query expansion, got {k3}")


def _check_ranks(ranks: torch.Tensor, size: int, k: int) -> None:
    if ranks.ndim != 2 or len(ranks) != size or ranks.shape[1] < min(k, size):
        raise ValueError(f"ranks must have shape ({size}, {min(k, size)} or more), got {tuple(ranks.shape)}")
    if ranks.dtype != torch.int64 or ranks.numel() and not 0 <= int(ranks.min()) <= int(ranks.max()) < size:
        raise ValueError(f"ranks must be int64 rows of points, 0..{size - 1}, got {ranks.dtype} beyond them")
