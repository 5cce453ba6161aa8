"""Pairs of sparse rows that overlap enough: what `jaccard_neighbors` searches for."""

from bisect import bisect_left

import torch

from ._triton import jit, tl, triton

UNIT = 2**30  # overlaps are whole numbers of units of 2**-30: no order of summation changes them
SHARE = 6  # this part of the overlap asked for must lie in the rows' first entries
STRIP = 2**25  # overlaps the kernel holds at a time
SORTED = 65536  # rows that are sorted at a time
FOUND = 128  # pairs a row that the kernel has room for at first
BLOCK, WARPS = 256, 4
Left = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # rows (int64), columns and units (int32) of entries

# Rows that overlap by `least` or more share a good part of that in their first entries, in one order of the
# columns for all. Cut off the end of each row, as long as its values sum to `least - share` at most. Of two
# rows let i be the one whose last entry left comes first in that order: what they share later on lies in the
# end of i, and is `least - share` at most; the rest, `share` or more, lies in what is left of both. With rare
# columns first, what is left is short of partners. So only the first entries are compared, and the pairs that
# share enough there, few more than are wanted, are measured.


def in_units(values: torch.Tensor) -> torch.Tensor:
    """Whole numbers of units, int32."""
    return torch.round(values * UNIT).to(torch.int32)


def least_overlap(eps: float) -> int:
    """The smallest overlap, in units, whose distance is eps or less; every step of d is monotone in s."""
    return bisect_left(range(UNIT + 1), True, key=lambda s: 1 - (s / UNIT) / (2 - s / UNIT) <= eps)


def share_of(least: int) -> int:
    """The overlap of first entries that a pair with an overlap of `least` has at least; some."""
    return max(1, least // SHARE)


def rarity(indices: torch.Tensor, size: int) -> torch.Tensor:
    """The place of each column among all, rare ones first."""
    rank = torch.empty(size, dtype=torch.int64, device=indices.device)
    rank[indices.bincount(minlength=size).argsort(stable=True)] = torch.arange(size, device=indices.device)
    return rank


def rare_first(
    indptr: torch.Tensor, indices: torch.Tensor, units: torch.Tensor, rank: torch.Tensor, least: int
) -> tuple[torch.Tensor, torch.Tensor, Left]:
    """Columns renumbered by rank, ascending in a row, and their units; and what is left of the rows.

    Some rows at a time: sorting takes several times the room of what is sorted.
    """
    device, rows = indptr.device, len(indptr) - 1
    cols, ordered = (torch.empty(len(indices), dtype=torch.int32, device=device) for _ in range(2))
    tops = list(range(0, rows, SORTED))
    edges, left = [*indptr[tops].tolist(), len(indices)], []
    for top, start, stop in zip(tops, edges, edges[1:], strict=False):
        strip, offsets = slice(start, stop), indptr[top : top + SORTED + 1] - start
        row = torch.arange(len(offsets) - 1, device=device).repeat_interleave(offsets.diff())
        keys, order = (row * len(rank) + rank[indices[strip]]).sort()
        cols[strip], ordered[strip] = keys % len(rank), units[strip][order]
        sums = torch.cat([offsets.new_zeros(1), ordered[strip].cumsum(0, dtype=torch.int64)])
        kept = sums[offsets[1:]][row] - sums[:-1] > least - share_of(least)
        left.append((row[kept] + top, cols[strip][kept], ordered[strip][kept]))
    found, columns, parts = (torch.cat(part) for part in zip(*left, strict=True))
    return cols, ordered, (found, columns, parts)


# The kernels. `place` puts the entries that are left of the rows into the order of their columns, rows
# ascending in each: an entry (i, l) finds behind its own place the entries (j, l) of all rows j > i, its
# column's inverted list. The first kernel adds min(v_il, v_jl) to the overlap of i and j, in a dense strip of
# a few rows i and all j; the second lists the pairs that share enough there; the third measures them on whole
# rows. The sums are integers, so atomic additions in any order give the same bits; sorting the pairs undoes
# their order. The host waits for the ends of the strips and for the number of pairs, never in between.


@jit
def _add_overlaps(
    strip, rows, cols, units, place, ends, list_rows, list_units, first, top, size, BLOCK: tl.constexpr
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
        tl.atomic_add(strip + row * size + other, smaller, within, sem="relaxed")


@jit
def _list_pairs(strip, pairs, count, top, size, share, room, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    other = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    overlap = tl.load(strip + row * size + other, mask=other < size, other=0)
    likely = overlap >= share
    found = tl.sum(likely.to(tl.int32), 0)
    if found > 0:
        place = tl.atomic_add(count, found.to(tl.int64), sem="relaxed")
        place += tl.cumsum(likely.to(tl.int32), 0) - 1
        fits = likely & (place < room)
        tl.store(pairs + place, tl.zeros((BLOCK,), tl.int64) + row + top, mask=fits)
        tl.store(pairs + room + place, other.to(tl.int64), mask=fits)


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


def pairs_on_device(
    indptr: torch.Tensor,
    indices: torch.Tensor,
    units: torch.Tensor,
    least: int,
    turn: int,
    turns: int,
) -> torch.Tensor:
    """`pairs_on_host` in the kernels."""
    size, device = len(indptr) - 1, indptr.device
    cols, units, first = rare_first(indptr, indices, units, rarity(indices, size), least)
    by_column = (first[1].long() * size + first[0]).argsort()
    place = torch.empty_like(by_column)
    place[by_column] = torch.arange(len(by_column), device=device)
    ends = first[1].bincount(minlength=size).cumsum(0)
    lists = first[0][by_column], first[2][by_column]
    height = max(1, min(size, STRIP // size))
    strip = torch.empty(height, size, dtype=torch.int32, device=device)
    tops = list(range(0, size, height))
    edges = [*torch.searchsorted(first[0], torch.tensor(tops, device=device)).tolist(), len(by_column)]
    room = FOUND * size
    while True:
        pairs = torch.empty(2, room, dtype=torch.int64, device=device)
        count = torch.zeros(1, dtype=torch.int64, device=device)
        for top, start, stop in list(zip(tops, edges, edges[1:], strict=False))[turn::turns]:
            if start == stop:
                continue
            strip.zero_()
            _add_overlaps[(stop - start,)](
                strip, *first, place, ends, *lists, start, top, size, BLOCK=BLOCK, num_warps=WARPS
            )
            _list_pairs[(min(height, size - top), triton.cdiv(size, 4 * BLOCK))](
                strip, pairs, count, top, size, share_of(least), room, BLOCK=4 * BLOCK, num_warps=WARPS
            )
        found = int(count)
        if found <= room:
            break
        room = found
    overlaps = torch.empty(found, dtype=torch.int32, device=device)
    if found:
        steps = int(indptr.diff().max()).bit_length() + 1
        _measure[(found,)](
            pairs, overlaps, indptr, cols, units, room, STEPS=steps, BLOCK=BLOCK, num_warps=WARPS
        )
    return pairs[:, :found][:, overlaps >= least]
