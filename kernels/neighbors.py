"""The k most similar rows, without ever storing the matrix of similarities: the neighbourhoods of EMCC."""

import torch
from torch import Tensor

from ._checks import check_device, check_number, check_tensor
from ._shortlist import ALONE, Team, shortlist
from ._shortlist_cpu import shortlist as shortlist_on_cpu
from ._triton import REFERENCE, rows_contiguous, same_rows, use_triton
from .pairs import pair_similarity


def topk_similarity(x: Tensor, y: Tensor, k: int, exclude_self: bool = False) -> tuple[Tensor, Tensor]:
    """For every row of `x` the `k` rows of `y` with the largest inner product, best first.

    `(x.double() @ y.double().T).float().topk(k)`, where equal values rank the lower index first. Results are
    the same on every device if float64 sums the products without rounding, as for unit rows on a grid of
    2**-26. The M x N matrix never exists: memory is O((M + N) * (D + k)).

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
    check_tensor("x", x, None, None)
    check_tensor("y", y, None, x.shape[1], dtypes=(x.dtype,))
    check_device(x.device, y=y)
    check_number("k", k, integer=True)
    if exclude_self and x.shape[0] != y.shape[0]:
        raise ValueError(f"exclude_self needs as many rows in y as in x; got {y.shape[0]} and {x.shape[0]}")
    if x.shape[1] == 0:
        raise ValueError("x and y must have features; got rows of none")
    most = y.shape[0] - exclude_self
    if not 1 <= k <= most:
        raise ValueError(f"k must be from 1 to {most}, the rows of y to choose from; got {k}")
    return _topk_similarity(x.detach(), y.detach(), int(k), exclude_self)


@torch.no_grad()
def topk_similarity_reference(
    x: Tensor, y: Tensor, k: int, exclude_self: bool = False, rows: Tensor | None = None, team: Team = ALONE
) -> tuple[Tensor, Tensor]:
    """`topk_similarity` in plain torch, for these rows of `x` or for all: the specification.

    No product exceeds that of the norms. Rows of like norm are handled together, and columns whose norm
    is too small for a better product than the k found are left out: of nearly equal rows, most.
    """
    rows = torch.arange(len(x), device=x.device) if rows is None else rows
    x_norms, y_norms = (torch.cat([part.double().norm(dim=1) for part in m.split(8192)]) for m in (x, y))
    rows = rows.tensor_split(team.turns)[team.turn]
    keys = torch.full((len(rows), k), NONE, dtype=torch.int64, device=x.device)
    for strip in x_norms[rows].argsort().split(512):
        wide, largest = x[rows[strip]].double(), x_norms[rows[strip]].amax() * (1 + 2.0**-40)
        best = keys[strip]
        for columns in torch.arange(len(y), device=x.device).split(512):
            least = _ranked(best[:, -1:])[0]  # NaN before k are found
            columns = columns[~((largest * y_norms[columns]).float() <= least.amin())]
            with torch.autocast(x.device.type, enabled=False):
                scores = (wide @ y[columns].double().T).float()
            better = ~(scores <= least)  # of equal ones, the first stay
            if exclude_self:
                better &= columns != rows[strip, None]
            row, column = better.nonzero().unbind(1)
            counts = better.sum(1)
            place = torch.arange(len(row), device=x.device) - (counts.cumsum(0) - counts)[row]
            more = best.new_full((len(best), int(counts.amax())), NONE)
            more[row, place] = _keys(scores[row, column], columns[column])
            best = torch.cat([best, more], 1).topk(k).values
        keys[strip] = best
    values, indices = _ranked(keys)
    return team.join(values), team.join(indices)


NONE = torch.iinfo(torch.int64).min  # the key of no pair
LISTED = 2**21  # entries of short lists whose exact products are held at a time


def _search(x: Tensor, y: Tensor, k: int, exclude_self: bool, team: Team) -> tuple[Tensor, Tensor]:
    """The k best of short lists, which hold the row itself, too."""
    keys = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    one_set, x, y = same_rows(x, y), rows_contiguous(x), rows_contiguous(y)
    find = shortlist if use_triton(x) else shortlist_on_cpu
    lists, short = find(x, x if one_set else y, k + exclude_self, team)
    for rows in torch.arange(len(x), device=x.device).split(max(1, LISTED // lists.shape[1])):
        listed, owners = lists[rows].long(), rows.repeat_interleave(lists.shape[1])
        if exclude_self:
            listed = listed.masked_fill(listed == rows[:, None], -1)
        products = pair_similarity(x, y, owners, listed.flatten()).view(listed.shape)
        keys[rows] = team.largest(_keys(products.float(), listed).topk(k).values)
    values, indices = _ranked(keys)
    last = values[:, -1].abs()  # float32 cannot rank products that are tiny or infinite
    short |= ~((last >= torch.finfo(last.dtype).tiny) & last.isfinite())
    again = short.nonzero()[:, 0]
    if len(again):
        values[again], indices[again] = topk_similarity_reference(x, y, k, exclude_self, again, team)
    return values, indices


def _keys(values: Tensor, columns: Tensor) -> Tensor:
    """An int64 key for each pair, larger for better ones; columns below 0 have the smallest.

    The upper half is the value, in bits that sort as integers; the lower half the complement of the column.
    """
    bits = (values + 0.0).view(torch.int32)  # + 0.0 makes -0 a 0
    keys = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | (0xFFFFFFFF - columns)
    return torch.where(columns < 0, NONE, keys)


def _ranked(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The values and the columns of keys."""
    ordered = (keys >> 32).int()
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def topk_together(x: Tensor, y: Tensor, k: int, exclude_self: bool, team: Team) -> tuple[Tensor, Tensor]:
    """`topk_similarity` by a team: all give equal arguments and get the whole result."""
    for name, matrix in (("x", x), ("y", y)):
        if matrix.numel() and not torch.stack(torch.aminmax(matrix)).isfinite().all():
            raise ValueError(f"{name} holds NaN or infinite features")
    if len(x) == 0:
        return x.new_empty(0, k, dtype=torch.float32), x.new_empty(0, k, dtype=torch.int64)
    if use_triton(x) or (x.device.type == "cpu" and not REFERENCE):
        with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
            return _search(x, y, k, exclude_self, team)
    return topk_similarity_reference(x, y, k, exclude_self, team=team)


@torch.library.custom_op("ecul::topk_similarity", mutates_args=())
def _topk_similarity(x: Tensor, y: Tensor, k: int, exclude_self: bool) -> tuple[Tensor, Tensor]:
    return topk_together(x, y, k, exclude_self, ALONE)


@_topk_similarity.register_fake
def _(x, y, k, exclude_self):
    values = x.new_empty((x.shape[0], k), dtype=torch.float32)
    return values, torch.empty_like(values, dtype=torch.int64)
