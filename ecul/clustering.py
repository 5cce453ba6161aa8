"""Extended modality-camera clustering: labels from features, in memory linear in their number.

ECUL, arXiv 2412.19134. `emcc` normalises the features (`unit_rows`) and calls the four steps below it in
their order. Sparse matrices are CSR arrays: `indptr` (N + 1,) and `indices` (nnz,) int64, columns ascending
in a row, and `values`. Every function takes tensors on any device and returns tensors, or takes NumPy arrays
and lists and returns NumPy. With `together`, the processes of torch.distributed share the work of a step; all
call it with equal arguments, and all get the whole result.

Labels are the same on every device and in any number of threads or processes, because all sums are exact
(`common/exact.py`). Memory is linear for any data: equal rows are handled once (`common/duplicates.py`), and
pairs of neighbours are never held all at once (`common/density.py`). N = 1,000,000 points of D = 2048 take
about 22 GB beyond the features on a GPU.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from ecul.common import distributed, logs
from ecul.common.arrays import check_codes, check_sizes, same_kind
from ecul.common.density import Density
from ecul.common.duplicates import distinct_rows, without_repeats
from ecul.common.exact import exp, on_grid, unit_rows
from ecul.common.neighbors import Neighbors, neighbors
from ecul.common.sparse import CSR, by_strips, product, spans, stacked
from ecul.kernels._checks import check_csr
from ecul.kernels._overlaps import ascending
from ecul.kernels.jaccard import jaccard_pairs

WEIGHTED = 2**16  # rows of encodings that get their weights at a time
SMALL = 2**35  # N * N * D of features that take a second or two in one thread


@same_kind
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
        features: (N, D) real numbers, a point a row; rows are normalised here.
        cameras: (N,) integers >= 0, the camera of each point; None: one camera.
        modalities: (N,) integers, 0 visible and 1 infrared; None: one modality.
        k1: size of the neighbourhoods that must be mutual.
        k2: members of each camera that an encoding is averaged over.
        k3: size of the range that these members come from, at least k2. None is the standard clustering: the
            mean over the k2 nearest, cameras and modalities unused.
        eps: the largest Jaccard distance between neighbours, in (0, 1].
        min_samples: neighbours, the point included, that make a core point.
        together: share the work with the other processes of torch.distributed. All processes call with equal
            arguments, and all get the labels that one process would get.

    Returns:
        (N,) int64 labels; clusters count from 0 in the order of their smallest core point. Tensors give a
        tensor: code that uses `set(labels)` or `centers[labels[i]]` needs `labels.cpu().numpy()`, because a
        set compares the elements of a tensor by identity and would find N clusters.

    Neighbourhoods hold the point itself first, even before its duplicates. Ties go to the lower index, and
    sizes beyond N mean N. Normalised rows are rounded to multiples of 2**-26; their similarities are exact,
    rounded once to float32. [R] The averaging in the extension is a reconstruction, see `extend_encodings`.

    To choose eps and k1, `ecul tune` shows clusters, outliers and a label-free score for each eps. Take the
    top of the score: below it people fall into outliers, above it they merge.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or range; a row of features that is not
            finite, or all zeros.
    """
    check_sizes(k1=k1, k2=k2, k3=k3, min_samples=min_samples)
    if not isinstance(eps, float | int | np.number) or not 0 < eps <= 1:
        raise ValueError(f"eps must be a number in (0, 1], got {eps!r}")
    points = unit_rows(features)
    cameras, modalities = check_codes(cameras, modalities, points)
    if eps == 1:  # no distance is larger
        return torch.full((len(points),), 0 if len(points) >= min_samples else -1, device=points.device)
    bar = logs.progress(4, "emcc", "step", distributed.team(together).turn == 0)
    with bar, _threads_for(len(points) * points.numel()):
        points, group = distinct_rows(points)
        found = neighbors(points, group, max(k1, k2, k3 or 0), together)
        bar.update()
        encodings, ranks = encode(found, k1, together), found.ranks
        bar.update()
        del points, found
        encodings = extend_encodings(*encodings, ranks, cameras, modalities, k2, k3, together)
        bar.update()
        codes = 2 * cameras + modalities
        encodings, first = without_repeats(encodings, ranks, k3 or k2, codes, eps)
        weights = first.bincount(minlength=len(first))
        labels = dbscan(*encodings, eps, min_samples, together, weights)[first]
        bar.update()
    return labels


@same_kind
def rank_neighbors(points: torch.Tensor, k: int, together: bool = False) -> torch.Tensor:
    """The k nearest points of every point, itself first, then by similarity: (N, min(k, N)) int64.

    `(points.double() @ points.double().T).float().fill_diagonal_(inf).topk(k).indices`, ties to the lower
    index, for points (N, D) float32 from `unit_rows`.
    """
    return neighbors(*distinct_rows(points.detach()), k, together).ranks


@same_kind
def reciprocal_encodings(
    points: torch.Tensor, ranks: torch.Tensor, k1: int = 30, together: bool = False
) -> CSR:
    """Encode each point by its expanded k-reciprocal neighbours: CSR (N, N) float64, rows sum to 1.

    R(i, k) holds the points among the k nearest of i that have i among their own k nearest. E(i) is R(i, k1),
    and with it every R(j, round(k1 / 2) + 1), j in R(i, k1), of which more than two thirds lie in R(i, k1).
    Row i is `softmax(2 * cos(f_i, f_j) - 2)` over j in E(i) (Zhong et al., CVPR 2017).

    Args:
        points: (N, D) float32 from `unit_rows`.
        ranks: (N, >= min(k1, N)) int64 from `rank_neighbors`.
        k1: size of the neighbourhoods that must be mutual.
    """
    points, itself = points.detach(), torch.arange(len(points), device=points.device)
    return encode(Neighbors(points, itself, points[:, :0], ranks[:, :0], ranks), k1, together)


def encode(found: Neighbors, k1: int, together: bool = False) -> CSR:
    """`reciprocal_encodings` of neighbours; similarities that they hold are not computed again."""
    check_sizes(k1=k1)
    group, ranks = found.group, found.ranks
    size = max(1, len(group))
    indptr, indices, ones = _mutual(ranks[:, :k1])
    half = _mutual(ranks[:, : round(k1 / 2) + 1])

    def expand(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        place, i = spans(indptr[rows], indptr.diff()[rows])
        j, one = indices[place], ones[place]
        own = i * size + j
        row, column, shared = product(i, j, one, len(rows), half)  # |H(j) & R(i)|
        inside = shared[torch.searchsorted(row * size + column, own)]  # for j in R(i)
        grow = 3 * inside > 2 * half[0].diff()[j]
        row, column, _ = product(i[grow], j[grow], one[grow], len(rows), half)
        expanded = ascending(torch.cat([own, row * size + column]))
        expanded = expanded[expanded.diff(prepend=expanded.new_full((1,), -1)) > 0]
        return group[rows], (expanded // size).bincount(minlength=len(rows)), expanded % size

    owners, counts, columns = map(torch.cat, zip(*by_strips(expand, ranks, together), strict=True))
    parts, sizes = [], counts.split(WEIGHTED)
    strips = owners.split(WEIGHTED), sizes, columns.split([int(strip.sum()) for strip in sizes])
    for rows, entries, j in zip(*strips, strict=True):
        i = torch.arange(len(rows), device=rows.device).repeat_interleave(entries)
        weights = on_grid(exp(2 * found.similarity(rows, i, group[j]).double() - 2))
        totals = weights.new_zeros(len(rows)).index_add_(0, i, weights)
        parts.append((entries, j, on_grid(weights / totals[i])))
    return stacked(parts, together)


def _mutual(near: torch.Tensor) -> CSR:
    """The pairs (i, j) of which each lists the other in near (N, k): CSR (N, N) of ones."""
    rows, size = torch.arange(len(near), device=near.device)[:, None], len(near)
    keys = ascending(torch.cat([rows * size + near, near * size + rows]).flatten())
    keys = keys[1:][keys[1:] == keys[:-1]]
    indptr = torch.searchsorted(keys, torch.arange(size + 1, device=near.device) * size)
    return indptr, keys % max(1, size), torch.ones_like(keys, dtype=torch.float64)


@same_kind
def extend_encodings(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    ranks: torch.Tensor,
    cameras: torch.Tensor | None = None,
    modalities: torch.Tensor | None = None,
    k2: int = 6,
    k3: int | None = 12,
    together: bool = False,
) -> CSR:
    """Average encodings over the first k2 members of every camera within the k3 nearest: CSR (N, N) float32.

    `V'_i = mean over modalities (mean over their cameras (mean over the camera's members j of V_j))`, over
    those present among the k3 nearest of i; k3=None: the mean over the k2 nearest, cameras unused.
    Sums are float64, rounded once. [P] Two sizes, aware of cameras and modalities. [R] This averaging.

    Args:
        indptr, indices, values: encodings, CSR (N, N).
        ranks: (N, >= min(k3 or k2, N)) int64 from `rank_neighbors`.
        cameras, modalities, k2, k3: as in `emcc`.
    """
    check_sizes(k2=k2, k3=k3)
    check_csr(indptr, indices, values)
    cameras, modalities = check_codes(cameras, modalities, ranks)
    codes = 2 * cameras.unique(return_inverse=True)[1] + modalities
    if k3 is None:
        codes, k3 = torch.zeros_like(codes), k2
    encodings = indptr, indices, values.detach().double()

    def extend(rows: torch.Tensor) -> CSR:
        near = ranks[rows, :k3]
        weights = on_grid(_member_weights(codes[near], k2))
        row, place = weights.nonzero().unbind(1)
        row, column, sums = product(row, near[row, place], weights[row, place], len(rows), encodings)
        return row.bincount(minlength=len(rows)), column, sums.float()

    return stacked(list(by_strips(extend, ranks, together)), together)


def _member_weights(codes: torch.Tensor, k2: int) -> torch.Tensor:
    """Each neighbour's weight in the extension, (rows, k3) float64; a row sums to 1.

    A member weighs 1 / (modalities present * cameras of its modality present * members of its camera), and
    members of a camera after its first k2 weigh 0. codes: a number for each camera, even for visible ones.
    """
    codes, order = codes.sort(dim=1, stable=True)  # the members of a camera stand side by side
    modalities = codes % 2
    first = codes.diff(dim=1, prepend=codes[:, :1] - 1) != 0
    run = first.cumsum(1) - 1
    members = torch.zeros_like(codes).scatter_add_(1, run, torch.ones_like(codes)).gather(1, run)
    places = torch.arange(codes.shape[1], device=codes.device).expand_as(codes)
    place = places - torch.where(first, places, 0).cummax(1).values  # within the camera
    cameras_of = torch.stack([(first & (modalities == code)).sum(1) for code in (0, 1)], 1)
    shares = (cameras_of > 0).sum(1, keepdim=True) * cameras_of.gather(1, modalities) * members.clamp(max=k2)
    weights = (place < k2) / shares.double()
    return torch.empty_like(weights).scatter_(1, order, weights)


@same_kind
def dbscan(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    values: torch.Tensor,
    eps: float = 0.6,
    min_samples: int = 4,
    together: bool = False,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """scikit-learn's DBSCAN under the Jaccard distance of the encodings: (N,) int64 labels, -1 = outlier.

    Clusters count from 0 in the order of their smallest core point; a point that is no core joins the
    lowest-numbered cluster that reaches it. The work on groups of points is done on the host.

    Args:
        indptr, indices, values: encodings, CSR (N, N), as for `ecul.kernels.jaccard_neighbors`.
        eps, min_samples, together: as in `emcc`.
        weights: (N,) int64, how many equal points, all neighbours of each other, a point stands for.
    """
    check_sizes(min_samples=min_samples)
    team = distributed.team(together)
    weights = torch.ones_like(indptr[1:]) if weights is None else weights
    found = Density(weights.cpu().numpy(), min_samples)
    for pairs in jaccard_pairs((indptr, indices, values), eps, lambda: found.groups, team.turn, team.turns):
        found.add(pairs.cpu().numpy())
    if together:
        found.join(indptr.device)
    return found.labels().to(indptr.device)


@contextlib.contextmanager
def _threads_for(products: int) -> Iterator[None]:
    """One thread for little work: on a busy machine, many small parallel steps wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if products <= SMALL else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
