"""The k most similar rows, without ever storing the matrix of similarities: METHOD's `N(i, k)`."""

import torch

from ._checks import check_device, check_matrix


def topk_similarity(
    x: torch.Tensor, y: torch.Tensor, k: int, exclude_self: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """For every row of `x` the `k` rows of `y` with the largest inner product, best first.

    `(x.float() @ y.float().T).topk(k)`, where equal similarities rank the lower index first. The M x N matrix
    never exists: memory is O((M + N) * (D + k)).

    Args:
        x: (M, D) float32, bfloat16 or float16.
        y: (N, D), the same dtype; may be `x` itself.
        k: neighbours a row, 1 <= k <= N.
        exclude_self: leave out row i of `y` for row i of `x` (then M = N and k <= N - 1).

    Returns:
        values (M, k) float32 and indices (M, k) int64.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, k out of range, features
            that are NaN or infinite.
    """
    _check(x, y, k, exclude_self)
    return topk_similarity_reference(x, y, k, exclude_self)


@torch.no_grad()
def topk_similarity_reference(
    x: torch.Tensor, y: torch.Tensor, k: int, exclude_self: bool = False, rows: int = 512
) -> tuple[torch.Tensor, torch.Tensor]:
    """`topk_similarity` in plain torch, `rows` rows at a time: the specification and the CPU path."""
    values = torch.empty(x.shape[0], k, device=x.device)
    indices = torch.empty(x.shape[0], k, dtype=torch.int64, device=x.device)
    y = y.float()
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, x.shape[0], rows):
            strip = slice(start, start + rows)
            scores = x[strip].float() @ y.T
            if exclude_self:
                scores.diagonal(start).fill_(-torch.inf)
            values[strip], indices[strip] = _topk(scores, k)
    return values, indices


def _topk(scores, k):
    """`scores.topk(k)` with the lower index first among equals, which `torch.topk` leaves open."""
    values, indices = scores.topk(min(k + 1, scores.shape[1]))
    cut = (values[:, k - 1 : k] == values[:, k:]).any(1).nonzero()[:, 0]  # a tie across the k-th place
    indices = indices[:, :k].sort().values
    indices[cut] = _lowest(scores[cut], values[cut, k - 1 : k], k)
    values, order = scores.gather(1, indices).sort(dim=1, descending=True, stable=True)
    return values, indices.gather(1, order)


def _lowest(scores, bound, k):
    """Each row's columns above `bound` and the lowest of those at it: k a row, in ascending order."""
    above, equal = scores > bound, scores == bound
    room = k - above.sum(1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(1) <= room))
    return chosen.nonzero()[:, 1].view(-1, k)


def _check(x, y, k, exclude_self):
    check_matrix("x", x)
    check_matrix("y", y, columns=x.shape[1], dtypes=(x.dtype,))
    check_device("y", y, x.device)
    if exclude_self and x.shape[0] != y.shape[0]:
        raise ValueError(
            f"exclude_self needs as many rows in y as in x, row i being the same point; "
            f"got {y.shape[0]} and {x.shape[0]}"
        )
    most = y.shape[0] - bool(exclude_self)
    if not 1 <= k <= most:
        raise ValueError(f"k must be from 1 to {most}, the rows of y to choose from; got {k}")
    for name, tensor in (("x", x), ("y", y)):
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite features")
