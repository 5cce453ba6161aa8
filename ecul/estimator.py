"""The clustering with scikit-learn's interface; scikit-learn itself is not needed."""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from ecul.clustering import emcc
from ecul.common.arrays import as_tensor

Table = torch.Tensor | ArrayLike


class EMCC:
    """`emcc` with `fit`, `fit_predict` and `labels_`, which are always NumPy.

        EMCC(k1=30, k2=6, k3=12, eps=0.6, min_samples=4).fit_predict(X)

    X: (N, D) numbers, a point a row: an array, a tensor on any device, a list of lists, a DataFrame.
    cameras and modalities of `fit`: (N,) integers, or None. labels_: (N,) int64, -1 = outlier. The settings
    are those of `emcc`; `clone`, pipelines and `GridSearchCV` of scikit-learn work.
    Errors, at `fit`: those of `emcc`; ValueError for a matrix of distances. Source: arXiv 2412.19134.
    """

    _estimator_type = "clusterer"

    def __init__(
        self, k1: int = 30, k2: int = 6, k3: int | None = 12, eps: float = 0.6, min_samples: int = 4
    ) -> None:
        self.k1, self.k2, self.k3, self.eps, self.min_samples = k1, k2, k3, eps, min_samples

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import Tags, TargetTags

        return Tags(estimator_type="clusterer", target_tags=TargetTags(required=False))

    def fit(
        self, X: Table, y: Any = None, cameras: Table | None = None, modalities: Table | None = None
    ) -> "EMCC":
        """Cluster the rows of X into `labels_`; y is not read."""
        points = as_tensor("X", X)
        if points.ndim == 2 and 2 < len(points) == points.shape[1] and points.diagonal().abs().max() < 1e-5:
            raise ValueError("X looks like a matrix of distances; EMCC takes the features themselves")
        self.labels_ = emcc(points, cameras, modalities, **self.get_params()).cpu().numpy()
        self.n_features_in_ = points.shape[1]
        return self

    def fit_predict(self, X: Table, y: Any = None, **codes: Table | None) -> np.ndarray:
        """`fit(X, y, **codes).labels_`; codes: cameras and modalities."""
        return self.fit(X, y, **codes).labels_

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The settings by name."""
        return {name: getattr(self, name) for name in ("k1", "k2", "k3", "eps", "min_samples")}

    def set_params(self, **params: Any) -> "EMCC":
        """Change settings. Errors: ValueError for an unknown name."""
        known = self.get_params()
        for name, value in params.items():
            if name not in known:
                raise ValueError(f"EMCC has no setting {name!r}; its settings are {', '.join(known)}")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        return f"EMCC({', '.join(f'{name}={value!r}' for name, value in self.get_params().items())})"
