"""`topk_similarity` against sorting every pair in float64."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from ecul.kernels import _shortlist, _shortlist_cpu, neighbors, pairs
from ecul.kernels.neighbors import Team, topk_similarity, topk_similarity_reference, topk_together

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def long_blocks_of_pairs(few, monkeypatch):
    """In the interpreter the programs of `pairs`, which has tests of its own, would take most of the time."""
    monkeypatch.setattr(pairs, "OPTIONS", pairs.OPTIONS | {"BLOCK": few(4096, 16)})


def sorted_pairs(x, y, k, exclude_self=False):
    """Best first by the float32 values, the lower index first among equals, in plain Python."""
    scores = (x.double() @ y.double().T).float().tolist()
    best = []
    for i, row in enumerate(scores):
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        best.append([j for j in order if not (exclude_self and i == j)][:k])
    indices = torch.tensor(best, dtype=torch.int64).reshape(len(scores), k)
    return torch.tensor(scores, dtype=torch.float32).reshape(len(x), len(y)).gather(1, indices), indices


def assert_exact(*arguments):
    """For features whose products float64 sums without rounding: the same bits, ties included."""
    values, indices = topk_similarity(*arguments)
    want = sorted_pairs(*arguments)
    assert values.dtype == torch.float32 and indices.dtype == torch.int64
    assert values.device == indices.device == arguments[0].device and not values.requires_grad
    assert torch.equal(values.cpu(), want[0]) and torch.equal(indices.cpu(), want[1])


def assert_as_reference(*arguments):
    """The same values and the same indices, bit for bit."""
    for ours, theirs in zip(topk_similarity(*arguments), topk_similarity_reference(*arguments), strict=True):
        assert torch.equal(ours, theirs)


def quarters(rows, features, seed, dtype=torch.float32, device="cpu"):
    """Multiples of 1/4 from -3/4 to 3/4: their products and sums are exact in every dtype, and tie often."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-3, 4, (rows, features), generator=generator) / 4).to(device, dtype)


def unit(rows, features, seed, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return on_grid(torch.randn(rows, features, generator=generator)).to(device, dtype)


def on_grid(x):
    return torch.round(F.normalize(x) * 2**26) / 2**26


@settings(max_examples=24)
@given(st.data())
def test_equals_sorting_every_pair(data):
    """Of two sets, or of one."""
    columns, features = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 8))
    seed, rows = data.draw(st.integers(0, 1000)), data.draw(st.none() | st.integers(1, 20))
    exclude_self = rows is None and columns > 1 and data.draw(st.booleans())
    k = data.draw(st.integers(1, columns - exclude_self))
    y = quarters(columns, features, seed + 1)
    assert_exact(y if rows is None else quarters(rows, features, seed), y, k, exclude_self)


SIZES = [(0, 4, 3, 2), (1, 1, 1, 1), (128, 128, 64, 4), (129, 257, 65, 1), (5, 130, 3, 2), (20, 300, 7, 40)]


@pytest.mark.parametrize("make", [quarters, unit])
@pytest.mark.parametrize(
    "rows, columns, features, k, dtype",
    [(*sizes, torch.float32) for sizes in SIZES] + [(5, 130, 100, 9, dtype) for dtype in DTYPES[1:]],
)
def test_is_exact_at_every_size(make, rows, columns, features, k, dtype, device):
    assert_exact(make(rows, features, 1, dtype, device), make(columns, features, 2, dtype, device), k)


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("size, k", [(3, 2), (140, 1), (70, 60)])
def test_one_set_is_exact_at_every_size(size, k, exclude_self, device):
    """Also rows whose products tie, or almost: float32 would rank them otherwise."""
    near = on_grid(unit(1, 96, 20, device=device) + 3e-3 * unit(size, 96, 21, device=device))
    for x in (quarters(size, 9, 3, device=device), near):
        assert_exact(x, x, k, exclude_self)
        assert_exact(x, x.clone(), k, exclude_self)


def test_rows_with_crowded_lists_leave_the_others_alone(device, monkeypatch):
    """Every other row is the same point, seventy times: more than the lists hold."""
    monkeypatch.setattr(_shortlist, "ROOM", 1)
    x = quarters(140, 5, 17, device=device)
    x[::2] = torch.tensor([0.75, -0.75, 0.75, 0.75, -0.75], device=device)
    assert_exact(x, x, 3)


def test_negative_zero_ties_with_zero(device):
    x = torch.tensor([[1.0, 0.0]], device=device)
    y = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [-1e-30, 0.0], [-0.0, -1.0]], device=device)
    assert topk_similarity(x, y, 3)[1].tolist() == [[0, 1, 3]]
    assert topk_similarity(x * 1e-30, y, 4)[1].tolist() == [[0, 1, 2, 3]]


def test_any_scale(device):
    x, y = unit(20, 30, 7, device=device), unit(60, 30, 8, device=device)
    for scale in (2.0**-40, 2.0**20, 2.0 ** torch.arange(-30, 30, 3, device=device)[:, None]):
        assert_exact(x * scale, y, 5)
        assert_exact(y, x * scale, 5)


def test_tiny_rows_among_others(device):
    """Their squares are zero in float32: norms that forget them would bound no error."""
    x, y = (F.normalize(torch.ones(64) + 0.02 * unit(400, 64, seed)) for seed in (22, 23))
    rows = torch.cat([x * 1e-22, y]).to(device)
    assert_as_reference(rows, rows, 5, True)


@pytest.mark.parametrize("scale", [1e-22, 3e19], ids=["nearly zero", "infinite"])
def test_products_that_float32_cannot_tell_apart_tie(device, scale):
    x = unit(300, 16, 26, device=device).abs() * scale
    assert_as_reference(x, x, 4)


def test_any_memory_layout_and_rows_that_want_a_gradient(device):
    x, y = quarters(30, 9, 10, device=device).requires_grad_(), quarters(40, 9, 11, device=device)
    wide = torch.zeros(80, 18, device=device)
    wide[::2, ::2] = y
    transposed = y.T.clone().T
    for rows, columns in ((x, wide[::2, ::2]), (x, y.repeat(1, 2)[:, :9]), (transposed, transposed)):
        assert_exact(rows, columns, 6)


@pytest.mark.host
def test_many_rows_and_few_columns():
    assert_as_reference(quarters(300_000, 2, 13), quarters(3, 2, 14), 2)


FEW = {"cpu": 60, "cuda": 60}
PORTIONS = [(neighbors, "LISTED", 60 * 128, 140), (_shortlist, "PORTION", FEW, 140)]
PORTIONS += [(_shortlist, "MAXIMA", 1, 1100), (_shortlist, "PRODUCTS", 2**13, 1100)]
ON_HOST = [("HEIGHT", 64), ("PRODUCTS", 2**13), ("PRODUCTS", 2**15), ("EVEN", 16), ("PART", 100)]


@pytest.mark.parametrize(
    "module, name, size, rows",
    PORTIONS + [pytest.param(_shortlist_cpu, *portion, 1100, marks=pytest.mark.host) for portion in ON_HOST],
)
def test_the_sizes_of_the_portions_do_not_matter(device, monkeypatch, module, name, size, rows):
    x = quarters(rows, 9, 12, device=device)
    monkeypatch.setattr(module, name, size)
    assert_as_reference(x, x, 3, True)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_finds_the_same_without_tensor_descriptors(monkeypatch, dtype):
    """GPUs before compute capability 9.0, and those of AMD, load tiles by pointers."""
    monkeypatch.setattr(_shortlist, "has_tma", lambda: False)
    x, y = quarters(140, 70, 3, dtype), quarters(300, 70, 4, dtype)
    assert_as_reference(x, y, 5)
    assert_as_reference(y, y, 3, True)


def test_bounds_are_below_the_last_of_the_best_by_twice_the_error():
    best, margin = torch.tensor([[0.9, 0.5, 0.25], [0.75, 0.5, -torch.inf]]), torch.tensor([0.125, 0.0])
    assert _shortlist.bounds(best, margin).tolist() == [0.0, torch.finfo(torch.float32).min]
    assert _shortlist.bounds(best[:, :2], margin).tolist() == [0.25, 0.5]


def shortest(monkeypatch, dtype, x, k):
    """The mean length of the short lists from products in this dtype. No neighbour may be lost."""
    monkeypatch.setattr(_shortlist_cpu, "product_dtype", lambda: dtype)
    lists, overflowed = _shortlist_cpu.shortlist(x, x, k + 1)
    best = topk_similarity_reference(x, x, k, True)[1]
    assert not overflowed.any()
    assert all(set(own) <= set(row) for own, row in zip(best.tolist(), lists.tolist(), strict=True))
    assert_as_reference(x, x, k, True)
    return (lists >= 0).sum(1).float().mean()


@pytest.mark.host
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spread", [0.02, 0.3, 3.0], ids=["crowded", "near", "far"])
def test_short_lists_lose_no_neighbour_and_are_short(monkeypatch, dtype, spread):
    """With products in either dtype: crowded rows cannot be told apart in bfloat16."""
    x = on_grid(unit(40, 64, 18).repeat(20, 1) + spread / 8 * unit(800, 64, 19))
    assert shortest(monkeypatch, dtype, x, 9) < 60


@pytest.mark.host
@pytest.mark.parametrize("size, k", [(1000, 251), (1001, 500), (1003, 1001), (17, 16)])
def test_short_lists_hold_more_neighbours_than_a_part_has_columns(monkeypatch, size, k):
    """With sizes that are no multiple of a group: the padding, zeros, is nearer than most rows."""
    x = unit(size, 24, 30)
    assert k < shortest(monkeypatch, torch.float32, x, k) <= size


@pytest.mark.host
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_rows_too_close_for_bfloat16_are_told_apart_in_float32(monkeypatch, precision):
    """Where torch multiplies float32 as float32; else the reference ranks them."""
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    monkeypatch.setattr(_shortlist_cpu, "BRAIN", False)
    assert (_shortlist_cpu.product_dtype() == torch.bfloat16) == (precision == "medium")
    monkeypatch.setattr(_shortlist_cpu, "BRAIN", True)
    assert _shortlist_cpu.product_dtype() == torch.bfloat16
    x = on_grid(unit(2, 64, 27).repeat(400, 1) + 0.04 * unit(800, 64, 28))
    assert _shortlist_cpu.shortlist(x, x, 9)[1].all() == (precision == "medium")
    assert_as_reference(x, x, 9, True)


@pytest.mark.host
def test_full_lists_take_no_more(monkeypatch):
    """Else equal rows, each in the list of each, would cost the time and the room of all pairs."""
    monkeypatch.setattr(_shortlist, "ROOM", 20)
    search = _shortlist.Search(unit(2, 3, 0), unit(64, 3, 1), 1, Team(), torch.float32, 1)
    search.bounds[:] = 0.5
    products = torch.tensor([1.0, 0.0]).repeat(32, 1)
    products[7, 1] = 0.5
    _shortlist_cpu._list(search, products, 0, 0)
    _shortlist_cpu._list(search, products, 0, 32)
    assert search.counts.tolist() == [32, 2] and search.lists[1, :2].tolist() == [7, 39]


@pytest.mark.host
@pytest.mark.parametrize("spread", [0, 1e-8, 1e-7, 1e-4, 1e-3])
def test_nearly_equal_rows_take_few_products(spread):
    """In float32 their products tie, or almost: most columns cannot be better than the first k."""
    x = on_grid(unit(1, 24, 20) + spread * unit(3000, 24, 21))
    with FlopCounterMode(display=False) as counter:
        found = topk_together(x, x, 5, True, Team())  # the counter does not look into operators of torch
    want = (x.double() @ x.double().T).float().fill_diagonal_(-torch.inf)
    assert torch.equal(found[0], want.topk(5).values)
    assert torch.equal(found[1], want.sort(dim=1, descending=True, stable=True).indices[:, :5])
    assert counter.get_total_flops() / (2 * 24 * len(x) ** 2) < (0.7 if spread < 1e-3 else 1.7)


def by_team(turns, work):
    """What `work(team)` returns in each member of a team. Members are threads, and one works at a time."""
    lock, met, given = threading.Lock(), threading.Barrier(turns, timeout=60), [None] * turns

    def meet():
        lock.release()
        met.wait()
        lock.acquire()

    def member(turn):
        def join(rows):
            given[turn] = rows
            meet()
            whole = torch.cat(given)
            meet()
            return whole

        with lock:
            return work(Team(turn, turns, join))

    with ThreadPoolExecutor(turns) as pool:
        return list(pool.map(member, range(turns)))


@pytest.mark.parametrize("turns", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "size, k, setting",
    [(3, 2, ()), (300, 5, ())]
    + [
        pytest.param(300, 5, it, marks=pytest.mark.host)
        for it in ((_shortlist, "ROOM", 1), (neighbors, "REFERENCE", True))
    ],
)
def test_a_team_finds_what_one_finds(device, few, monkeypatch, turns, size, k, setting):
    """Also members without a row, lists that are too short for rows that are repeated, and the reference."""
    x = unit(min(size, few(150, size)), 24, 31, device=device)
    x[len(x) // 2 :: 2] = x[0]
    want = topk_similarity_reference(x, x, k)
    if setting:
        monkeypatch.setattr(*setting)
    for got in by_team(turns, lambda team: topk_together(x, x, k, False, team)):
        assert all(map(torch.equal, got, want))


@pytest.mark.host
def test_a_team_of_unequal_processors_multiplies_in_one_dtype(monkeypatch):
    turns, used, search = 2, [], _shortlist_cpu._shortlist
    kinds = iter([torch.float32, torch.bfloat16, torch.bfloat16, torch.float32])
    monkeypatch.setattr(_shortlist_cpu, "product_dtype", lambda: next(kinds))
    monkeypatch.setattr(_shortlist_cpu, "_shortlist", lambda *a: used.append(a[-1]) or search(*a))
    x = unit(300, 24, 31)
    for got in by_team(turns, lambda team: topk_together(x, x, 5, False, team)):
        assert all(map(torch.equal, got, topk_similarity_reference(x, x, 5)))
    assert used == [torch.bfloat16] * 2


@pytest.mark.host
@pytest.mark.parametrize("turns", [1, 2, 3, 4])
@pytest.mark.parametrize("one_set", [True, False])
def test_a_team_shares_the_products_equally(turns, one_set):
    """Of one set about half of the pairs, and those of its part twice; of two sets every pair once."""
    x = unit(6000, 8, 20)
    y = x if one_set else unit(6000, 8, 21)

    def products(team):
        with FlopCounterMode(display=False) as counter:
            _shortlist_cpu.shortlist(x, y, 5, team)
        return counter.get_total_flops() / (2 * 8 * len(x) * len(y))

    shares = by_team(turns, products)
    assert 0.5 <= sum(shares) <= 0.6 if one_set else sum(shares) == pytest.approx(1)
    assert max(shares) <= 1.1 * sum(shares) / turns


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"y": torch.zeros(5, 4)}, ValueError, "y must have 3 columns"),
        ({"y": torch.zeros(5, 3).half()}, TypeError, "y must be float32; got float16"),
        ({"x": torch.zeros(5, 0), "y": torch.zeros(5, 0)}, ValueError, "x and y must have features"),
        ({"k": 6}, ValueError, "k must be from 1 to 5, the rows of y to choose from; got 6"),
        ({"k": torch.tensor([1, 2])}, TypeError, "k must be an integer; got Tensor"),
        ({"k": 2.0}, TypeError, "k must be an integer; got float"),
        ({"y": torch.zeros(5, 3, device="meta")}, ValueError, "y must be a dense tensor with data"),
        ({"k": 5, "exclude_self": True}, ValueError, "k must be from 1 to 4"),
        ({"y": torch.zeros(6, 3), "exclude_self": True}, ValueError, "exclude_self needs as many rows"),
        ({"x": torch.full((5, 3), torch.nan)}, ValueError, "x holds NaN or infinite"),
        ({"y": torch.full((5, 3), -torch.inf)}, ValueError, "y holds NaN or infinite"),
    ],
)
def test_refuses(change, error, message):
    arguments = {"x": torch.zeros(5, 3), "y": torch.zeros(5, 3), "k": 2}
    with pytest.raises(error, match=message):
        topk_similarity(**{**arguments, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_reference_at_scale(dtype):
    x = unit(34167, 2048, 16, dtype, "cuda")
    got, want = topk_similarity(x, x, 40), topk_similarity_reference(x, x, 40)
    torch.testing.assert_close(got[0], want[0], atol=1e-6, rtol=0)
    swapped = got[1] != want[1]  # only where two values agree to float32 precision
    assert swapped.float().mean() < 1e-3
