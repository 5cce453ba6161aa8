"""Extended modality-camera clustering: labels from features, in memory linear in their number.

ECUL, arXiv 2412.19134. `emcc` is a few sparse steps, each a public function of its own: `rank_neighbors`,
`reciprocal_encodings`, `extend_encodings`, `neighbor_graph`, `dbscan`. Sparse matrices are plain CSR arrays:
`indptr` (N + 1,) and `indices` (nnz,) int64, columns ascending in a row, and `values`. Every function takes
torch tensors on any device, or NumPy arrays, and returns the same kind.

Labels are the same on every device, in any number of threads or processes. Features, encodings and weights
are rounded to multiples of 2**-26 (`_on_grid`): what is summed then are multiples of 2**-52, the sums are
below 2, and float64 holds them exactly, in whatever order they come. All else treats each entry by itself.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import distributed as dist

from ecul.common import distributed, logs
from ecul.kernels import jaccard_neighbors, pair_similarity, topk_similarity
from ecul.kernels._checks import check_csr
from ecul.kernels.jaccard import graph_of, jaccard_pairs

CSR = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # indptr, indices, values
ROWS = 8192  # rows handled at a time by the steps that need more than O(k) room a row

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


@contextlib.contextmanager
def _beta_allowed() -> Iterator[None]:
    """Without torch's notice that its CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR", category=UserWarning)
        yield


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

    Choosing eps and k1: `ecul.tuning.tune` (`ecul tune`) tells clusters, outliers and a label-free score for
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
    points = _normalize(features)
    cameras = _check_codes("cameras", cameras, points)
    modalities = _check_codes("modalities", modalities, points, largest=1)
    size, together = len(points), together and distributed.size() > 1
    if eps == 1:  # no distance is larger
        return torch.full((size,), 0 if size >= min_samples else -1, device=points.device)
    with logs.progress(5, "emcc", "step", not together or distributed.rank() == 0) as bar:

        def done(result: Any) -> Any:
            bar.update()
            return result

        ranks = done(_rank(points, max(k1, k2, k3 or 0), together))
        encodings = done(_encode(points, ranks, k1, together))
        del points
        encodings = done(_extend(encodings, ranks, cameras, modalities, k2, k3, together))
        turn, turns = (distributed.rank(), distributed.size()) if together else (0, 1)
        indptr, indices, values = encodings
        pairs = jaccard_pairs(indptr, indices, values, eps, turn, turns)
        graph = done(graph_of(_joined(pairs.T, together).T, size))
        return done(dbscan(*graph, min_samples=min_samples))


@_same_kind
def rank_neighbors(features: torch.Tensor, k: int) -> torch.Tensor:
    """The k nearest points of every point by cosine similarity, the point itself first: (N, min(k, N)) int64.

    `(x @ x.T).float().fill_diagonal_(inf).topk(k).indices`, ties to the lower index, for `x =
    normalize(features)` on the grid, in float64. Raises TypeError and ValueError as `emcc` does.
    """
    _check_sizes(k=k)
    return _rank(_normalize(features), k)


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
    points = _normalize(features)
    _check_ranks(ranks, len(points), k1)
    return _encode(points, ranks, k1)


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
    return _extend((indptr, indices, values), ranks, cameras, modalities, k2, k3)


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


def _rank(points: torch.Tensor, k: int, together: bool = False) -> torch.Tensor:
    itself = torch.arange(len(points), device=points.device)[:, None]
    k = min(k, len(points))
    if k <= 1:
        return itself[:, :k]
    if not together:
        return torch.cat([itself, topk_similarity(points, points, k - 1, exclude_self=True)[1]], 1)
    own = itself[distributed.share(len(points))]
    near = topk_similarity(points[own[:, 0]], points, k)[1]
    others = near.gather(1, (near == own).int().sort(dim=1, stable=True).indices)[:, : k - 1]
    return _joined(torch.cat([own, others], 1), together)


def _encode(points: torch.Tensor, ranks: torch.Tensor, k1: int, together: bool = False) -> CSR:
    near, mutual = _reciprocal(ranks, k1)
    near_half, mutual_half = _reciprocal(ranks, round(k1 / 2) + 1)
    half = _stacked([(mutual_half.sum(1), near_half[mutual_half], mutual_half[mutual_half].double())])
    parts = [_no_rows(points, torch.float64)]
    for rows in _strips(points, together):
        own = _sparse(*_entries(near[rows], mutual[rows].double()), (len(rows), len(points)))
        inside = (_times(near[rows], mutual[rows], half) * own).coalesce()  # |H(j) & R(i)| for j in R(i)
        i, j = inside.indices()
        grow = 3 * inside.values() > 2 * half[0].diff()[j]
        expanded = (own + _product(i[grow], j[grow], grow[grow].double(), len(rows), half)).coalesce()
        i, j = expanded.indices()
        weights = _on_grid(_exp(2 * pair_similarity(points, points, rows[i], j) - 2))
        totals = weights.new_zeros(len(rows)).index_add_(0, i, weights)
        parts.append((_degrees(expanded), j, _on_grid(weights / totals[i])))
    return _stacked(parts, together)


def _extend(
    encodings: CSR,
    ranks: torch.Tensor,
    cameras: torch.Tensor,
    modalities: torch.Tensor,
    k2: int,
    k3: int | None,
    together: bool = False,
) -> CSR:
    if k3 is None:
        cameras, modalities, k3 = torch.zeros_like(cameras), torch.zeros_like(modalities), k2
    indptr, indices, values = encodings
    parts = [_no_rows(ranks, torch.float32)]
    for rows in _strips(ranks, together):
        near = ranks[rows, :k3]
        weights = _on_grid(_member_weights(cameras[near], modalities[near], k2))
        extended = _times(near, weights, (indptr, indices, values.double()))
        parts.append((_degrees(extended), extended.indices()[1], extended.values().float()))
    return _stacked(parts, together)


def _strips(table: torch.Tensor, together: bool) -> list[torch.Tensor]:
    """The rows of the table that are this process's to handle, some at a time."""
    rows = torch.arange(len(table), device=table.device)
    rows = rows[distributed.share(len(table))] if together else rows
    return [strip for strip in rows.split(ROWS) if len(strip)]


def _joined(rows: torch.Tensor, together: bool) -> torch.Tensor:
    """The rows of all processes, however many each has, in the order of the processes."""
    if not together:
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(distributed.size())]
    dist.all_gather(counts, count)
    padded = rows.new_zeros(max(map(int, counts)), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


def _reciprocal(ranks: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest of each point, and which of them are mutual: they make R(i, k)."""
    near = ranks[:, :k]
    itself = torch.arange(len(near), device=near.device)[:, None]
    return near, torch.cat([(near[near[i]] == itself[i, None]).any(2) for i in itself[:, 0].split(ROWS)])


def _member_weights(cameras: torch.Tensor, modalities: torch.Tensor, k2: int) -> torch.Tensor:
    """Each neighbour's weight in the extension, (rows, k3) float64, 0 for those left out; a row sums to 1.

    A member counts 1 / (modalities present * cameras of its modality present * members of its camera).
    """
    places = torch.arange(cameras.shape[1], device=cameras.device)
    earlier = places[:, None] > places
    alike = modalities[:, :, None] == modalities[:, None, :]
    same = alike & (cameras[:, :, None] == cameras[:, None, :])
    place = (same & earlier).sum(2)  # within the camera
    cameras_present = (alike & (place == 0)[:, None, :]).sum(2)  # each by its nearest
    modalities_present = (~(alike & earlier).any(2)).sum(1, keepdim=True)
    members = same.sum(2).clamp(max=k2)
    return (place < k2) / (modalities_present * cameras_present * members).double()


def _on_grid(values: torch.Tensor) -> torch.Tensor:
    """Multiples of 2**-26: see the head of this file."""
    return torch.round(values * 2.0**26) / 2.0**26


def _exp(x: torch.Tensor) -> torch.Tensor:
    """exp of float64 from -4 to 0, to 12 digits, in steps that every device rounds alike."""
    x = x / 64
    power = torch.ones_like(x)
    for n in range(8, 0, -1):
        power = 1 + x * power / n
    for _ in range(6):
        power = power * power
    return power


def _row_sums(values: torch.Tensor) -> torch.Tensor:
    """The sum of each row, in an order of its own, which no device changes; overwrites `values`."""
    while values.shape[1] > 1:
        half = (values.shape[1] + 1) // 2
        rest = values[:, half:]
        values = values[:, :half]
        values[:, : rest.shape[1]] += rest
    return values.sum(1)


def _sparse(
    rows: torch.Tensor, cols: torch.Tensor, values: torch.Tensor, shape: tuple[int, ...]
) -> torch.Tensor:
    matrix = torch.sparse_coo_tensor(torch.stack([rows, cols]), values, shape, check_invariants=False)
    return matrix.coalesce()


def _entries(near: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, columns and values of the entries with a weight, from (rows, k) columns and weights."""
    chosen = weights > 0
    return chosen.nonzero()[:, 0], near[chosen], weights[chosen]


def _times(near: torch.Tensor, weights: torch.Tensor, matrix: CSR) -> torch.Tensor:
    """For each row the sum of the rows `near` of a CSR (N, N) float64 matrix, with weights: coalesced COO."""
    return _product(*_entries(near, weights.double()), len(near), matrix)


@_beta_allowed()
def _product(
    rows: torch.Tensor, cols: torch.Tensor, weights: torch.Tensor, height: int, matrix: CSR
) -> torch.Tensor:
    """A sparse (height, N) matrix times a CSR (N, N) one, of which only rows that take part are touched."""
    indptr, indices, values = matrix
    named, cols = cols.unique(return_inverse=True)
    degrees = indptr.diff()[named]
    first = (indptr[named] - (degrees.cumsum(0) - degrees)).repeat_interleave(degrees)
    place = first + torch.arange(len(first), device=first.device)
    owner = torch.arange(len(named), device=first.device).repeat_interleave(degrees)
    right = _sparse(owner, indices[place], values[place], (len(named), len(indptr) - 1))
    return torch.sparse.mm(_sparse(rows, cols, weights, (height, len(named))), right).coalesce()


def _degrees(matrix: torch.Tensor) -> torch.Tensor:
    """Entries in each row of a COO matrix."""
    return matrix.indices()[0].bincount(minlength=len(matrix))


def _stacked(parts: list[CSR], together: bool = False) -> CSR:
    """One CSR matrix of strips of rows, given as (entries in each row, columns, values)."""
    degrees, indices, values = (_joined(torch.cat(part), together) for part in zip(*parts, strict=True))
    return torch.cat([degrees.new_zeros(1), degrees.cumsum(0)]), indices, values


def _no_rows(like: torch.Tensor, dtype: torch.dtype) -> CSR:
    """A strip for `_stacked` without rows, on the device of a tensor."""
    none = torch.empty(0, dtype=torch.int64, device=like.device)
    return none, none, none.to(dtype)


def _normalize(features: torch.Tensor) -> torch.Tensor:
    if not isinstance(features, torch.Tensor):
        raise TypeError(f"features must be a torch tensor or a NumPy array, got {type(features).__name__}")
    if not features.is_floating_point():
        raise TypeError(f"features must be floating point, got {features.dtype}: try features.float()")
    if features.ndim != 2:
        raise ValueError(f"features must have shape (N, D), got {tuple(features.shape)}")
    strips = features.detach().split(ROWS)
    norms = torch.cat([_row_sums(rows.float().double().square_()).sqrt().float()[:, None] for rows in strips])
    for bad, what in ((~norms.isfinite(), "not finite"), (norms == 0, "all zeros")):
        if bad.any():
            row, count = int(bad.flatten().nonzero()[0]), int(bad.sum())
            raise ValueError(f"features must be finite, no row zero; row {row} is {what} ({count} such rows)")
    points = torch.empty(features.shape, dtype=torch.float32, device=features.device)
    for rows, part, sizes in zip(strips, points.split(ROWS), norms.split(ROWS), strict=True):
        part.copy_(_on_grid(rows.float() / sizes))
    return points


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
