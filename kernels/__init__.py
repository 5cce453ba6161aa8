"""The kernels of the library; each file holds one, beside the torch reference that specifies it.

`_triton.py` says which tensors go through Triton, and which through the references.
"""

from .contrast import memory_contrast, memory_contrast_reference
from .jaccard import jaccard_neighbors, jaccard_neighbors_reference
from .momentum import momentum_update_, momentum_update_reference
from .neighbors import topk_similarity, topk_similarity_reference
from .pairs import pair_similarity, pair_similarity_reference

__all__ = [
    "jaccard_neighbors", "jaccard_neighbors_reference", "memory_contrast", "memory_contrast_reference",
    "momentum_update_", "momentum_update_reference", "pair_similarity", "pair_similarity_reference",
    "topk_similarity", "topk_similarity_reference",
]  # fmt: skip
