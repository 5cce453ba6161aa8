"""Extended modality-camera clustering: labels from features, in memory linear in their number.

ECUL, arXiv 2412.19134. `emcc` is four sparse steps, each a public function of its own:
`rank_neighbors`, `reciprocal_encodings`, `extend_encodings`, `neighbor_graph`, then `dbscan`.
Sparse matrices are plain CSR arrays: `indptr` (N + 1,) and `indices` (nnz,) int64, and `values`.
Every function takes torch tensors on any device, or NumPy arrays, and returns the same kind.
"""

import contextlib
import functools
import warnings

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from .kernels import jaccard_neighbors, topk_similarity

ROWS = 8192  # rows handled at a time where a step needs more than O(k) room a row


def _same_kind(function):
    """Let a function of tensors take NumPy arrays too; it then returns NumPy arrays."""

    @functools.wraps(function)
    def wrapper(first, *args, **options):
        as_numpy = isinstance(first, np.ndarray)
        first, *args = (torch.as_tensor(a) if isinstance(a, np.ndarray) else a for a in (first, *args))
        result = function(first, *args, **options)
        if not as_numpy:
            return result
        return tuple(part.numpy() for part in result) if isinstance(result, tuple) else result.numpy()

    return wrapper


@_same_kind
def emcc(
    features,
    cameras=None,
    modalities=None,
    *,
    k1: int = 30,
    k2: int = 6,
    k3: int | None = 12,
    eps: float = 0.6,
    min_samples: int = 4,
):
    """Cluster features across cameras and modalities; -1 marks outliers.

    Equals DBSCAN(eps, min_samples) on the Jaccard distance between the extended k-reciprocal
    encodings of the features (arXiv 2412.19134; METHOD: neighbours, encodings, extension, distance).

    Args:
        features: (N, D) floating point, one point a row; rows are normalised in float32.
        cameras: (N,) integers >= 0, the camera of each point; None: one camera.
        modalities: (N,) integers, 0 visible and 1 infrared; None: one modality.
        k1: size of the neighbourhoods that must be mutual.
        k2: members of each camera, or neighbours where k3 is None, that an encoding is averaged over.
        k3: size of the range these members are taken from, at least k2; None: plain local query
            expansion over k2 neighbours, cameras and modalities unused (standard clustering).
        eps: the largest Jaccard distance between neighbours, in (0, 1].
        min_samples: neighbours, the point among them, that make a core point.

    Returns:
        (N,) int64 labels: clusters count from 0 in the order of their smallest core point.

    Neighbourhoods hold the point itself first, whatever its duplicates; ties go to the lower index;
    sizes beyond N mean N. Similarities are float32. The averaging in the extension is a
    reconstruction [R]: see `extend_encodings`.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range; features that are not
            finite or a row of zeros.
    """
    _check_sizes(k1, k2, k3, eps, min_samples)
    points = _normalize(features)
    cameras = _check_codes("cameras", cameras, points)
    modalities = _check_codes("modalities", modalities, points, largest=1)
    if len(points) == 0:
        return torch.empty(0, dtype=torch.int64, device=points.device)
    with tqdm(total=5, desc="emcc", unit="step", delay=2, leave=False, disable=None) as bar:

        def done(result):
            bar.update()
            return result

        ranks = done(_rank(points, max(k1, k2, k3 or 0)))
        encodings = done(_encode(points, ranks, k1))
        encodings = done(extend_encodings(*encodings, ranks, cameras, modalities, k2=k2, k3=k3))
        graph = done(neighbor_graph(*encodings, eps=eps))
        return done(dbscan(*graph, min_samples=min_samples))


@_same_kind
def rank_neighbors(features, k: int):
    """The k nearest points of every point by cosine similarity, the point itself first.

    Equals `(x @ x.T).fill_diagonal_(inf).topk(k).indices` with ties to the lower index, where `x`
    is `features` with unit rows in float32; (N, D) to (N, min(k, N)) int64.
    Raises ValueError where k < 1, and for features that are not finite or hold a row of zeros.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return _rank(_normalize(features), k)


@_same_kind
def reciprocal_encodings(features, ranks, k1: int = 30):
    """Encode each point by its expanded k-reciprocal neighbours; CSR (N, N), rows sum to 1.

    Row i is `softmax(2 * cos(f_i, f_j) - 2)` over j in E(i). R(i, k), the mutual neighbours within
    rank k, grows into E(i) by the half set H(j) = R(j, round(k1 / 2) + 1) of every j in R(i, k1) that
    has more than two thirds of it in R(i, k1) already (METHOD: steps 2 to 5; Zhong et al., CVPR 2017).

    Args:
        features: (N, D) floating point; rows are normalised.
        ranks: (N, K) int64 from `rank_neighbors`, K >= min(k1, N).
        k1: size of the neighbourhoods that must be mutual.

    Returns:
        indptr (N + 1,) int64, indices int64, ascending in a row, values float64.
    """
    if k1 < 1:
        raise ValueError(f"k1 must be at least 1, got {k1}")
    points = _normalize(features)
    _check_ranks(ranks, len(points), "k1", k1)
    return _encode(points, ranks, k1)


@_same_kind
def extend_encodings(
    indptr, indices, values, ranks, cameras=None, modalities=None, k2: int = 6, k3: int | None = 12
):
    """Average encodings over the first k2 members of every camera within the nearest k3: CSR (N, N).

    `V'_i = mean over modalities ( mean over their cameras ( mean over members j of V_j ) )`, over those
    present among the k3 nearest of i. k3=None: the mean over the k2 nearest, cameras unused.
    [P] that there are two sizes and that cameras and modalities count; [R] this averaging.

    Args:
        indptr, indices, values: encodings, CSR (N, N).
        ranks: (N, K) int64 from `rank_neighbors`, K >= min(k3 or k2, N).
        cameras, modalities, k2, k3: as in `emcc`.

    Returns:
        indptr, indices, values: CSR, columns ascending, float32 from float64 sums.
    """
    _check_sizes(1, k2, k3, 1, 1)
    _check_ranks(ranks, len(indptr) - 1, "k3" if k3 else "k2", k3 or k2)
    cameras = _check_codes("cameras", cameras, ranks)
    modalities = _check_codes("modalities", modalities, ranks, largest=1)
    if k3 is None:
        cameras, modalities, k3 = torch.zeros_like(cameras), torch.zeros_like(modalities), k2
    size = len(ranks)
    encodings = _sparse(_rows_of(indptr), indices, values.double(), (size, size))
    parts = []
    for near in ranks[:, :k3].split(ROWS):
        weights = _member_weights(cameras[near], modalities[near], k2)
        member, numbers = weights > 0, torch.arange(len(near), device=near.device)[:, None].expand_as(near)
        chosen = _sparse(numbers[member], near[member], weights[member], (len(near), size))
        extended = _product(chosen, encodings)
        parts.append((*_row_counts(extended), extended.values().float()))
    counts, indices, values = (torch.cat(part) for part in zip(*parts, strict=True))
    return _offsets(counts), indices, values


@_same_kind
def neighbor_graph(indptr, indices, values, eps: float = 0.6):
    """The pairs of points with Jaccard distance d <= eps between their encodings: CSR, no values.

    See `ecul.kernels.jaccard_neighbors`: symmetric, ascending, and every point lists itself.
    """
    return jaccard_neighbors(indptr, indices, values, eps)


@_same_kind
def dbscan(indptr, indices, min_samples: int = 4):
    """DBSCAN labels from the graph of points within eps; equals scikit-learn's, -1 = outlier.

    Args:
        indptr, indices: CSR of a symmetric graph, (N + 1,) and (nnz,) integers, no pair twice. A
            point counts as its own neighbour whether or not the graph says so.
        min_samples: neighbours, the point among them, that make a core point.

    Returns:
        (N,) int64. Clusters count from 0 in the order of their smallest core point; a point that is
        no core joins the lowest-numbered cluster that reaches it.

    The graph of a tensor on a device is copied to the host and its labels back: it is small, and
    connected components are sequential work.
    """
    if min_samples < 1:
        raise ValueError(f"min_samples must be at least 1, got {min_samples}")
    rows, cols = _rows_of(indptr).cpu().numpy(), indices.cpu().numpy()
    size = len(indptr) - 1
    rows, cols = rows[rows != cols], cols[rows != cols]
    core = np.bincount(rows, minlength=size) + 1 >= min_samples
    inner = core[rows] & core[cols]
    links = csr_matrix((np.ones(inner.sum(), bool), (rows[inner], cols[inner])), shape=(size, size))
    component = connected_components(links, directed=False)[1][core]
    _, first, which = np.unique(component, return_index=True, return_inverse=True)
    labels = np.full(size, -1)
    labels[core] = np.argsort(np.argsort(first))[which]
    border = ~core[rows] & core[cols]
    reached = np.full(size, size)
    np.minimum.at(reached, rows[border], labels[cols[border]])
    labels = np.where(reached < size, reached, labels)
    return torch.from_numpy(labels.astype(np.int64)).to(indptr.device)


def _normalize(features) -> torch.Tensor:
    if not isinstance(features, torch.Tensor):
        raise TypeError(f"features must be a torch tensor or a NumPy array, got {type(features).__name__}")
    if not features.is_floating_point():
        raise TypeError(f"features must be floating point, got {features.dtype}; try features.float()")
    if features.ndim != 2:
        raise ValueError(f"features must have shape (N, D), got {tuple(features.shape)}")
    points = features.detach().float()
    norms = torch.linalg.vector_norm(points, dim=1, keepdim=True, dtype=torch.float64)
    for bad, what in ((~norms.isfinite(), "is not finite"), (norms == 0, "is all zeros")):
        if bad.any():
            row = int(bad.flatten().nonzero()[0])
            raise ValueError(
                f"features must be finite and not zero, but row {row} {what} ({int(bad.sum())} such rows)"
            )
    return points / norms.float()


def _check_codes(name, codes, points, largest=None) -> torch.Tensor:
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


def _check_sizes(k1, k2, k3, eps, min_samples):
    for name, value in (("k1", k1), ("k2", k2), ("k3", k3), ("min_samples", min_samples)):
        if value is None and name == "k3":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if k3 is not None and k3 < k2:
        raise ValueError(f"k3 must be at least k2 = {k2}, or None for plain query expansion, got {k3}")
    if not 0 < eps <= 1:
        raise ValueError(f"eps must lie in (0, 1], got {eps}")


def _check_ranks(ranks, size, name, k):
    if ranks.ndim != 2 or len(ranks) != size or ranks.shape[1] < min(k, size):
        raise ValueError(
            f"ranks must have shape ({size}, >= {min(k, size)}) for {name} = {k}, got {tuple(ranks.shape)}"
        )


def _rank(points, k) -> torch.Tensor:
    itself = torch.arange(len(points), device=points.device)[:, None]
    k = min(k, len(points))
    if k <= 1:
        return itself[:, :k]
    return torch.cat([itself, topk_similarity(points, points, k - 1, exclude_self=True)[1]], 1)


def _encode(points, ranks, k1):
    mutual = _reciprocal(ranks, k1)
    half = _reciprocal(ranks, round(k1 / 2) + 1)
    inside = (_product(mutual, half) * mutual).coalesce()  # |H(j) & R(i)| for j in R(i)
    i, j = inside.indices()
    grow = 3 * inside.values() > 2 * half.indices()[0].bincount(minlength=len(points))[j]
    grown = _product(_sparse(i[grow], j[grow], inside.values()[grow], mutual.shape), half)
    counts, indices = _row_counts((mutual + grown).coalesce())
    indptr = _offsets(counts)
    weights = torch.exp(2 * _similarities(points, indptr, indices).double() - 2)
    totals = torch.segment_reduce(weights, "sum", offsets=indptr)
    return indptr, indices, weights / totals.repeat_interleave(counts)


def _reciprocal(ranks, k) -> torch.Tensor:
    """R(i, k) as a sparse (N, N) matrix of ones; it is symmetric."""
    near = ranks[:, :k]
    itself = torch.arange(len(near), device=near.device)[:, None]
    mutual = torch.cat([(near[near[i]] == itself[i, None]).any(2) for i in itself[:, 0].split(ROWS)])
    rows = itself.expand_as(near)[mutual]
    return _sparse(rows, near[mutual], torch.ones(len(rows), device=near.device), (len(near), len(near)))


def _similarities(points, indptr, indices) -> torch.Tensor:
    """`points @ points.T` at the entries of a CSR pattern, and nowhere else."""
    empty = torch.zeros(len(indices), device=points.device)
    with _beta_allowed():
        pattern = torch.sparse_csr_tensor(indptr, indices, empty, check_invariants=False)
        return torch.sparse.sampled_addmm(pattern, points, points.T, beta=0.0).values()


def _product(a, b) -> torch.Tensor:
    with _beta_allowed():
        return torch.sparse.mm(a, b).coalesce()


@contextlib.contextmanager
def _beta_allowed():
    """Without torch's notice that its CSR tensors are in beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR", category=UserWarning)
        yield


def _member_weights(cameras, modalities, k2) -> torch.Tensor:
    """Each neighbour's weight in the extension, (rows, k3) float64; 0 = not a member.

    A member of camera c of modality m weighs 1 / (modalities present * cameras of m present * members
    of c), so that a row's weights sum to 1.
    """
    earlier = torch.ones(cameras.shape[1], cameras.shape[1], device=cameras.device).tril(-1).bool()
    alike = modalities[:, :, None] == modalities[:, None, :]
    same = alike & (cameras[:, :, None] == cameras[:, None, :])
    place = (same & earlier).sum(2)
    present = place == 0  # one neighbour for each camera, its nearest
    cameras_present = (alike & present[:, None, :]).sum(2)
    leads = ~(alike & earlier).any(2)  # one neighbour for each modality
    modalities_present = leads.sum(1, keepdim=True)
    members = same.sum(2).clamp(max=k2)
    return (place < k2) / (modalities_present * cameras_present * members).double()


def _sparse(rows, cols, values, shape) -> torch.Tensor:
    matrix = torch.sparse_coo_tensor(torch.stack([rows, cols]), values, shape, check_invariants=False)
    return matrix.coalesce()


def _row_counts(matrix) -> tuple[torch.Tensor, torch.Tensor]:
    """A coalesced matrix's entries a row, and their columns."""
    rows, cols = matrix.indices()
    return rows.bincount(minlength=matrix.shape[0]), cols


def _offsets(counts) -> torch.Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _rows_of(indptr) -> torch.Tensor:
    return torch.arange(len(indptr) - 1, device=indptr.device).repeat_interleave(indptr.diff())
