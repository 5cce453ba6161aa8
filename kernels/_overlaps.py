"""Pairs of sparse rows that overlap by `least` or more: on a GPU. `_overlaps_cpu` does the same on the host.

Measuring every pair is slow, so only candidates are measured on whole rows: pairs that share enough in their
first entries. That is slow on the host if rows share columns with many others, so the host has a second way.

First entries: put the columns of all rows in one order, rare columns first. Cut the end off each row, as long
as the values there sum to at most `least - share`. Take two rows that overlap by `least`, and of them the row
that stops first in this order. What the two share after it stops lies in its end: at most `least - share`. So
they share at least `share` in the entries that remain of both. Only few rows have the same rare columns.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from ._triton import jit, tl

UNIT = 2**30  # overlaps are whole numbers of units of 2**-30: no order of summation changes them
SHARE = 6  # candidates share 1 / SHARE of the overlap in their first entries
SORTED = 65536  # rows that are sorted at a time
OVERLAPS = 2**26  # sums that are held at a time
FOUND = 64  # so many pairs for each row make a portion
OPTIONS = {"BLOCK": 256, "num_warps": 4}
CSR = tuple[Tensor, Tensor, Tensor]  # indptr, indices, values
Groups = Callable[[], np.ndarray | None]  # gives each row's group as far as it is known
Entries = tuple[Tensor, Tensor, Tensor]  # rows (int64), columns and units (int32)


def in_units(values: Tensor) -> Tensor:
    """Whole numbers of units, int32."""
    return torch.round(values * UNIT).to(torch.int32)


def least_overlap(eps: float) -> int:
    """The smallest overlap, in units, with distance eps or less: the distance falls as the overlap rises."""
    return bisect_left(range(UNIT + 1), True, key=lambda s: 1 - (s / UNIT) / (2 - s / UNIT) <= eps)


def share_of(least: int) -> int:
    """What first entries share, 1 at least, in every pair with an overlap of `least`."""
    return max(1, least // SHARE)


def rarity(indices: Tensor, size: int) -> Tensor:
    """The rank of each column, rare columns first."""
    return indices.bincount(minlength=size).argsort(stable=True).argsort()


def ascending(keys: Tensor) -> Tensor:
    """Sorted keys, on the host in their own memory: `torch.sort` is slower there, as it finds the order."""
    if keys.is_cuda:
        return keys.sort().values
    keys.numpy().sort()
    return keys


def rare_first(
    indptr: Tensor, indices: Tensor, units: Tensor, rank: Tensor, least: int
) -> tuple[Tensor, Tensor, Entries]:
    """The ranks of the columns, ascending in each row; their units; and the first entries of all rows.

    Rows are sorted in portions, because sorting needs several times the memory of its input.
    """
    device, rows = indptr.device, len(indptr) - 1
    cols, ordered = torch.empty(2, len(indices), dtype=torch.int32, device=device)
    tops = list(range(0, rows, SORTED))
    edges, first = [*indptr[tops].tolist(), len(indices)], []
    for top, start, stop in zip(tops, edges, edges[1:], strict=False):
        strip, offsets = slice(start, stop), indptr[top : top + SORTED + 1] - start
        row = torch.arange(len(offsets) - 1, device=device).repeat_interleave(offsets.diff())
        keys, order = (row * len(rank) + rank[indices[strip]]).sort()
        cols[strip], ordered[strip] = keys % len(rank), units[strip][order]
        sums = torch.cat([offsets.new_zeros(1), ordered[strip].cumsum(0, dtype=torch.int64)])
        kept = sums[offsets[1:]][row] - sums[:-1] > least - share_of(least)
        first.append((row[kept] + top, cols[strip][kept], ordered[strip][kept]))
    found, columns, parts = (torch.cat(part) for part in zip(*first, strict=True))
    return cols, ordered, (found, columns, parts)


# The kernels. The first entries are sorted by column, then by row. `place` is the place of an entry (i, l) in
# this order; the entries (j, l) of the rows j > i follow it. `_add_overlaps` adds min(v_il, v_jl) to the sum
# of i and j, for a strip of rows i and all j. `_measure` computes the overlaps of the pairs with large sums,
# on whole rows. Sums are integers: atomic additions in any order give the same bits. The host waits for the
# ends of the strips, and for the pairs of each strip.


@jit
def _add_overlaps(
    sums, rows, cols, units, place, ends, list_rows, list_units, first, top, size, BLOCK: tl.constexpr
):
    entry = first + tl.program_id(0).to(tl.int64)
    row = tl.load(rows + entry) - top
    unit = tl.load(units + entry)
    start = tl.load(place + entry) + 1
    end = tl.load(ends + tl.load(cols + entry))
    for block in range(start, end, BLOCK):
        lane = block + tl.arange(0, BLOCK)
        within = lane < end
        other = tl.load(list_rows + lane, within, 0)
        smaller = tl.minimum(tl.load(list_units + lane, within, 0), unit)
        tl.atomic_add(sums + row * size + other, smaller, within, sem="relaxed")


@jit
def _measure(pairs, overlaps, indptr, cols, units, room, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    pair = tl.program_id(0).to(tl.int64)
    one, other = tl.load(pairs + pair), tl.load(pairs + room + pair)
    start, stop = tl.load(indptr + one), tl.load(indptr + one + 1)
    low, high = tl.load(indptr + other), tl.load(indptr + other + 1)
    overlap = tl.zeros((BLOCK,), tl.int32)
    for block in range(start, stop, BLOCK):
        lane = block + tl.arange(0, BLOCK)
        column = tl.load(cols + lane, mask=lane < stop, other=-1)
        below, above = tl.zeros((BLOCK,), tl.int64) + low, tl.zeros((BLOCK,), tl.int64) + high
        for _ in range(STEPS):  # until below is the first entry whose column is not smaller
            middle = (below + above) // 2
            smaller = tl.load(cols + middle, mask=middle < high, other=2**31 - 1) < column
            below = tl.where(smaller & (below < above), middle + 1, below)
            above = tl.where(smaller, above, middle)
        shared = (lane < stop) & (below < high)
        shared &= tl.load(cols + below, mask=shared, other=-2) == column
        own = tl.load(units + lane, mask=shared, other=0)
        overlap += tl.minimum(own, tl.load(units + below, mask=shared, other=0))
    tl.store(overlaps + pair, tl.sum(overlap, 0))


def pairs_on_device(csr: CSR, eps: float, groups: Groups, turn: int, turns: int) -> Iterator[Tensor]:
    """`jaccard_pairs` in the kernels. A portion is the pairs of all strips, or of as many as give enough."""
    indptr, indices, values = csr
    size, device, least = len(indptr) - 1, indptr.device, least_overlap(eps)
    cols, units, first = rare_first(indptr, indices, in_units(values), rarity(indices, size), least)
    by_column = (first[1].long() * size + first[0]).argsort()
    place, ends = by_column.argsort(), first[1].bincount(minlength=size).cumsum(0)
    lists = first[0][by_column], first[2][by_column]
    height = max(1, min(size, OVERLAPS // size))
    sums = torch.empty(height, size, dtype=torch.int32, device=device)
    tops = torch.arange(0, size, height, device=device)
    edges = [*torch.searchsorted(first[0], tops).tolist(), len(by_column)]
    steps = int(indptr.diff().max()).bit_length() + 1
    strips = [number for number in range(turn, len(tops), turns) if edges[number] < edges[number + 1]]
    found: list[Tensor] = []
    for number in strips:
        top, start, stop = number * height, edges[number], edges[number + 1]
        sums.zero_()
        _add_overlaps[(stop - start,)](sums, *first, place, ends, *lists, start, top, size, **OPTIONS)
        i, j = (sums >= share_of(least)).nonzero().unbind(1)
        found.append(torch.stack([i + top, j]))
        if number == strips[-1] or sum(pairs.shape[1] for pairs in found) >= FOUND * size:
            likely, found, group = torch.cat(found, 1), [], groups()
            if group is not None:
                i, j = torch.from_numpy(group).to(device)[likely]
                likely = likely[:, i != j]
            overlaps = torch.empty(likely.shape[1], dtype=torch.int32, device=device)
            whole = indptr, cols, units, likely.stride(0)
            _measure[(len(overlaps),)](likely, overlaps, *whole, STEPS=steps, **OPTIONS)
            yield likely[:, overlaps >= least]
