"""Short lists that hold the k best columns of every row: the first two steps of `topk_similarity` on a CPU.

The steps and their bounds are those of `_shortlist`, with strips of rows and columns in place of tiles. Where
the processor multiplies bfloat16, products come rounded to it, by a 256th at most: the bounds allow for that,
and rows whose neighbours bfloat16 cannot tell apart are looked at again in float32.

Hardly a product is made twice. Those with a part of the columns give the first bounds, and are listed at
once; where y is x they go into the lists of both, once the rows of that part have their bounds. Looking at a
product costs as much as making it from a few features, so they are looked at in company: the largest of a
GROUP of columns is compared with the row's bound, or with the least of the columns' where that is smaller.
"""

import math

import torch
import torch.nn.functional as F

from ._shortlist import (
    MAXIMA,
    ROOM,
    Shortlist,
    bounds,
    closest,
    largest_error,
    power_of_two,
    random_order,
)

PRODUCTS = 2**22  # looked at at a time
GROUP = 16  # columns that are looked at together
ROWS, MOST = 512, 8192  # of x at a time, a multiple of GROUP; at most, where columns are few
EVEN = 128  # maxima are slow to find for a number of rows that is not a multiple of this
PART = 4  # the first bound comes from one column in so many
BRAIN = any(
    getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile")
)  # whether the processor has such instructions
DTYPE = torch.bfloat16 if BRAIN else torch.float32
COARSE = {torch.bfloat16: 2.0**-8, torch.float32: 0.0}


def shortlist(x: torch.Tensor, y: torch.Tensor, k: int, exclude_self: bool, symmetric: bool) -> Shortlist:
    """The short lists of the rows of x."""
    itself = torch.arange(len(x)) if exclude_self else None
    lists, overflowed = _Search(x, y, k, itself, symmetric, DTYPE).run()
    exact = torch.get_float32_matmul_precision() == "highest"  # or float32 may be multiplied as bfloat16
    if torch.float32 != DTYPE and exact and overflowed.any():
        again = overflowed.nonzero()[:, 0]
        itself = again if exclude_self else None
        more, overflowed[again] = _Search(x[again], y, k, itself, False, torch.float32).run()
        lists[again] = -1
        lists[again, : more.shape[1]] = more
    longest = max(k, int((lists >= 0).sum(1).max()))
    return lists[:, :longest], overflowed


class _Columns:
    """Rows of y by their numbers, in whole groups: the first stands in for what the last group lacks."""

    def __init__(self, y: torch.Tensor, names: torch.Tensor):
        self.table = y[torch.cat([names, names[:1].expand(-len(names) % GROUP)])]
        self.place = torch.full((len(y),), -1)
        self.place[names] = torch.arange(len(names))


class _Search:
    """Of every row a bound, and a list of the columns that reach it; a list that overflowed takes no more.

    Rows and columns go by the caller's numbers; `itself`, where given, names the row of y to leave out for
    each row of x.
    """

    def __init__(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        k: int,
        itself: torch.Tensor | None,
        symmetric: bool,
        dtype: torch.dtype,
    ):
        self.y, *y_norms = round_rows(y, dtype)
        self.x, *x_norms = (self.y, *y_norms) if symmetric else round_rows(x, dtype)
        self.margin = largest_error(x_norms, y_norms, y.shape[1], 2.0**-23)
        self.k, self.itself, self.symmetric, self.coarse = k, itself, symmetric, COARSE[dtype]
        room = min(len(y), max(ROOM, 4 * PART * k))
        self.least = torch.empty(len(x), dtype=dtype)
        self.columns = torch.empty((len(x), room), dtype=torch.int32)
        self.scores = torch.empty((len(x), room), dtype=dtype)
        self.counts = torch.zeros(len(x), dtype=torch.int64)
        self.buffer = torch.empty(0, dtype=dtype)  # for products: fresh memory is slower than making them

    def run(self) -> Shortlist:
        """The short lists of all rows."""
        size = len(self.y)
        count = min(size, max(size // PART, 2 * self.k))
        part, rest = random_order(size).long().split([count, size - count])
        if self.symmetric:
            self.begin(part, part)
            part = self.ascending(part)
            self.begin(rest, part, mutual=True)
            rest = self.ascending(rest)
            self.go_on(rest, rest, mutual=True)
        else:
            rows = torch.arange(len(self.x))
            self.begin(rows, part)
            self.go_on(rows, rest)
        return self.closest()

    def begin(self, rows: torch.Tensor, part: torch.Tensor, mutual: bool = False) -> None:
        """The bounds of these rows from a part of the columns, which are listed; mutual: the rows, too."""
        columns = _Columns(self.y, part)
        height = min(MOST, max(1, PRODUCTS // len(part) // EVEN) * EVEN)
        for start in range(0, len(rows), height):
            some = rows[start : start + height]
            products, tops = self._products(some, columns, 0, len(columns.table))
            groups = tops[: len(part) // GROUP]
            maxima = groups if len(groups) >= MAXIMA * self.k else products[: len(part)]
            width = max(1, len(maxima) // (MAXIMA * self.k))
            maxima = maxima[: len(maxima) // width * width].unflatten(0, (width, -1)).amax(0)
            best = maxima.T.topk(self.k).values.float()  # at least k columns reach the k-th of the maxima
            least = bounds(best, self.k, self.margin[some], self.coarse)
            self.least[some] = least.to(self.least.dtype)
            step = _width(len(some))
            for first in range(0, len(part), step):
                several, whole = slice(first, first + step), slice(first // GROUP, (first + step) // GROUP)
                self._list(products[several], tops[whole], some, part[several], 0 if mutual else step)

    def ascending(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows in ascending order of their bounds: those of a group are much the same."""
        return rows[self.least[rows].argsort(stable=True)]

    def go_on(self, rows: torch.Tensor, rest: torch.Tensor, mutual: bool = False) -> None:
        """List the rest of the columns; mutual: these are the rows, so one of (i, j) and (j, i) will do."""
        columns, width = _Columns(self.y, rest), _width(ROWS)
        for start in range(0, len(rows), ROWS):
            some = rows[start : start + ROWS]
            for first in range(start if mutual else 0, len(rest), width):
                several = rest[first : first + width]
                products, tops = self._products(some, columns, first, width)
                beyond = start + len(some) - first if mutual else width
                self._list(products, tops, some, several, beyond)

    def closest(self) -> Shortlist:
        """Of each list those columns that may be among the k best."""
        found = []
        for start in range(0, len(self.counts), ROWS):
            rows = slice(start, start + ROWS)
            lists = self.columns[rows], self.scores[rows].float(), self.counts[rows]
            found.append(closest(*lists, self.k, self.margin[rows], self.coarse))
        shortest, overflowed = zip(*found, strict=True)
        return torch.cat(shortest), torch.cat(overflowed)

    def _products(
        self, rows: torch.Tensor, columns: _Columns, first: int, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of some columns, from the first on, and the rows, (columns, rows); the largest of each group."""
        table, x = columns.table[first : first + count], self.x[rows].T
        if self.buffer.numel() < len(table) * len(rows):
            self.buffer = self.buffer.new_empty(len(table) * len(rows))
        products = self.buffer[: len(table) * len(rows)].view(len(table), len(rows))
        tops = self.buffer.new_empty((len(table) // GROUP, len(rows)))
        place = None if self.itself is None else columns.place[self.itself[rows]] - first
        step = _width(len(rows))
        for start in range(0, len(table), step):
            strip = products[start : start + step]
            torch.mm(table[start : start + step], x, out=strip)
            if place is not None:
                _leave_out(strip, place - start)
            groups = strip.unflatten(0, (len(strip) // GROUP, GROUP))
            torch.amax(groups, 1, out=tops[start // GROUP :][: len(groups)])
        return products, tops

    def _list(
        self,
        products: torch.Tensor,
        tops: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
        beyond: int,
    ) -> None:
        """List what reaches the bounds in the products with whole groups of columns.

        From column `beyond` on, the rows go into the lists of the columns, too.
        """
        least, mutual = self.least[rows], beyond < len(columns)
        groups = products.unflatten(0, (len(tops), GROUP))
        reach = least.expand_as(tops)
        if mutual:
            theirs = F.pad(self.least[columns], (0, -len(columns) % GROUP), value=torch.inf)
            reach = torch.minimum(reach, theirs.view(-1, GROUP).amin(1)[:, None])
        row, group = (tops >= reach).T.nonzero().unbind(1)
        members = groups[group, :, row]
        which, member = (members >= reach[group, row, None]).nonzero().unbind(1)
        row, column, score = row[which], group[which] * GROUP + member, members[which, member]
        own = (column < len(columns)) & (score >= least[row])
        self._append(rows[row[own]], columns[column[own]], score[own])
        if mutual:
            across = ((column >= beyond) & (score >= theirs[column])).nonzero()[:, 0]
            column, order = column[across].sort(stable=True)
            across = across[order]
            self._append(columns[column], rows[row[across]], score[across])

    def _append(self, owners: torch.Tensor, entries: torch.Tensor, scores: torch.Tensor) -> None:
        """Add the entries to the lists of their owners; equal owners stand side by side."""
        owners, found = owners.unique_consecutive(return_counts=True)
        first = self.counts[owners] - (found.cumsum(0) - found)
        self.counts[owners] += found
        slot = first.repeat_interleave(found) + torch.arange(len(entries))
        room = self.columns.shape[1]
        place = owners.repeat_interleave(found) * room + slot.clamp_max(room - 1)
        self.columns.view(-1)[place] = entries.int()
        self.scores.view(-1)[place] = scores
        self.least[owners[self.counts[owners] > room]] = torch.inf


def _width(rows: int) -> int:
    """The columns whose products with so many rows are looked at at a time, whole groups."""
    return max(1, PRODUCTS // rows // GROUP) * GROUP


def _leave_out(products: torch.Tensor, place: torch.Tensor) -> None:
    """Put minus infinity where the row, the second index, meets the column at its place, if that is here."""
    rows = ((place >= 0) & (place < len(products))).nonzero()[:, 0]
    products[place[rows], rows] = -torch.inf


def round_rows(matrix: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows in this dtype, their norms and those of the errors; a power of two keeps products within range."""
    scale = float(power_of_two(matrix))
    if abs(math.log2(scale)) < 32:
        scale = 1.0
    as_it_is = matrix.dtype == dtype and scale == 1
    rounded = matrix if as_it_is else torch.empty(matrix.shape, dtype=dtype)
    sizes, errors = torch.zeros(2, len(matrix), dtype=torch.float32)
    for start in range(0, len(matrix), 8192):
        strip = slice(start, start + 8192)
        rows = matrix[strip].float() * scale
        sizes[strip] = rows.norm(dim=1)
        if not as_it_is:
            rounded[strip] = rows
            errors[strip] = rows.sub_(rounded[strip]).norm(dim=1)
    return rounded, sizes, errors
