"""Re-ranking by the k-reciprocal neighbours among queries and gallery, in memory linear in their number.

"k-reciprocal": Zhong et al., Re-ranking Person Re-identification, CVPR 2017. "modality" [R]: the same
distance with EMCC's extension, so that an image's own modality does not crowd out the other one.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse import csr_matrix

from ecul.clustering import encode, extend_encodings, unit_rows
from ecul.common.duplicates import distinct_rows
from ecul.common.neighbors import neighbors
from ecul.kernels import topk_similarity

K1, K2, WEIGHT = 20, 6, 0.3
RERANKINGS = {  # names, and settings for the results
    "k-reciprocal": f"k1={K1}, k2={K2}, lambda={WEIGHT}",
    "modality": f"k1={K1}, k2={K2}, k3={K1}, lambda={WEIGHT}",
}


def reranked(query: torch.Tensor, gallery: torch.Tensor, name: str) -> Callable[[slice], np.ndarray]:
    """The distances of a slice of the queries to the gallery, as a function: slice -> (n, G) float32.

        0.7 * jaccard + 0.3 * squared / largest

    query (Q, D), gallery (G, D): float tensors of unit rows. `squared` are squared Euclidean distances;
    `largest` is that of the query's farthest point among all, for "modality" 2. `jaccard` compares encodings
    over all points. "k-reciprocal": weights exp(-squared / largest) over the expanded k1-reciprocal
    neighbours, averaged over the k2 nearest. "modality": `reciprocal_encodings`, averaged over the k2 nearest
    of each modality among the k1 nearest. Errors: those of `rank_neighbors`.
    """
    points = unit_rows(torch.cat([query, gallery]).float().cpu())
    first, rows = len(query), torch.arange(len(points))
    largest = torch.full((len(points),), 2.0)
    k1 = K1 if name == "modality" else K1 + 1  # the published k1 leaves out the point itself
    found = neighbors(*distinct_rows(points), k1)
    encoded, ranks = encode(found, k1), found.ranks
    if name == "modality":
        encoded = extend_encodings(*encoded, ranks, None, (rows >= first).long(), K2, K1)
    else:
        largest = (2 + 2 * topk_similarity(points, -points, 1)[0][:, 0]).clamp_min(1e-12)
        indptr, indices, values = encoded  # in exp(-squared)
        owner = rows.repeat_interleave(indptr.diff())
        most = values.new_zeros(len(points)).scatter_reduce(0, owner, values, "amax")
        values = (values / most[owner]) ** (1 / largest.double())[owner]
        values /= values.new_zeros(len(points)).index_add(0, owner, values)[owner]
        encoded = extend_encodings(indptr, indices, values, ranks, k2=K2, k3=None)
    indptr, indices, shares = (part.numpy() for part in encoded)
    columns = csr_matrix((shares, indices, indptr), shape=(len(points),) * 2)[first:].tocsc()
    asked, answers = points[:first].numpy(), points[first:].numpy().T

    def distances(block: slice) -> np.ndarray:
        squared = (2 - 2 * (asked[block] @ answers)).clip(min=0)
        result = WEIGHT * squared / largest[:first][block, None].numpy()
        for row, out in zip(range(first)[block], result, strict=True):
            own = slice(indptr[row], indptr[row + 1])
            held = columns[:, indices[own]]
            smaller = np.minimum(held.data, np.repeat(shares[own], np.diff(held.indptr)))
            shared = np.bincount(held.indices, smaller, minlength=len(out))
            out += (1 - WEIGHT) * (1 - shared / (2 - shared))
        return result

    return distances
