"""The published way to cluster in plain code: dense N x N matrices, filled and compared in Python loops.

k-reciprocal encoding and Jaccard distance as in the ReID field's scripts (Zhong et al., CVPR 2017), with
the camera- and modality-aware extension of ECUL (arXiv 2412.19134) in the same manner, then scikit-learn's
DBSCAN.
"""

import numpy as np
import torch


def product_topk(features, k):
    """One plain product and its k best columns: the least work of an exact search."""
    return (features @ features.T).topk(k)


def cluster(features, cameras, modalities, k1, k2, k3, eps, min_samples):
    """Labels of unit rows; float32 tensors in, NumPy labels out."""
    from sklearn.cluster import DBSCAN

    ranks = product_topk(features, max(k1, k3)).indices.numpy()
    encodings = _encode(features, ranks, k1)
    extended = _extend(encodings, ranks, cameras.numpy(), modalities.numpy(), k2, k3)
    del encodings
    distances = _jaccard(extended)
    del extended
    return DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit_predict(distances)


def _reciprocal(ranks, i, k):
    forward = ranks[i, :k]
    backward = ranks[forward, :k]
    return forward[np.where(backward == i)[0]]


def _encode(features, ranks, k1):
    size = len(features)
    near = [_reciprocal(ranks, i, k1) for i in range(size)]
    half = [_reciprocal(ranks, i, round(k1 / 2) + 1) for i in range(size)]
    encodings = np.zeros((size, size), dtype=np.float32)
    for i in range(size):
        expanded = near[i]
        for candidate in near[i]:
            own = half[candidate]
            if len(np.intersect1d(own, near[i])) > 2 / 3 * len(own):
                expanded = np.append(expanded, own)
        expanded = np.unique(expanded)
        distance = 2 - 2 * torch.mm(features[i].unsqueeze(0), features[expanded].t())
        encodings[i, expanded] = torch.softmax(-distance, dim=1).view(-1).numpy()
    return encodings


def _extend(encodings, ranks, cameras, modalities, k2, k3):
    extended = np.zeros_like(encodings)
    for i in range(len(encodings)):
        around = ranks[i, :k3]
        by_modality = []
        for modality in np.unique(modalities[around]):
            same = around[modalities[around] == modality]
            by_camera = [
                np.mean(encodings[same[cameras[same] == camera][:k2]], axis=0)
                for camera in np.unique(cameras[same])
            ]
            by_modality.append(np.mean(by_camera, axis=0))
        extended[i] = np.mean(by_modality, axis=0)
    return extended


def _jaccard(encodings):
    size = len(encodings)
    holders = [np.where(encodings[:, i] != 0)[0] for i in range(size)]
    distances = np.zeros((size, size), dtype=np.float32)
    for i in range(size):
        overlap = np.zeros(size, dtype=np.float32)
        for column in np.where(encodings[i] != 0)[0]:
            held = holders[column]
            overlap[held] += np.minimum(encodings[i, column], encodings[held, column])
        distances[i] = 1 - overlap / (2 - overlap)
    return np.clip(distances, 0, None, out=distances)
