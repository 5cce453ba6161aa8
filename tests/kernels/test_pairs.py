"""`pair_similarity` against exact integers."""

import pytest
import torch
import torch.nn.functional as F

from ecul.kernels import pair_similarity, pair_similarity_reference, pairs


def on_grid(rows, features, seed, device="cpu"):
    x = F.normalize(torch.randn(rows, features, generator=torch.Generator().manual_seed(seed)))
    return (torch.round(x * 2**26) / 2**26).to(device)


def some_pairs(count, rows, columns, device="cpu"):
    """Different pairs, their rows ascending, a column in nine negative."""
    pair = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(3))[:count].sort().values
    column = (pair % columns).masked_fill(torch.arange(count) % 9 == 4, -1)
    return (pair // columns).to(device), column.to(device)


def whole_numbers(x, y, rows, columns):
    """Inner products in units of 2**-52: products and sums of integers."""
    a, b = (torch.round(m.cpu().double() * 2**26).long() for m in (x, y))
    return (a[rows.cpu()] * b[columns.cpu()]).sum(1)


@pytest.mark.parametrize("features", [1, 7, 130, 2048])
def test_sums_rows_on_a_grid_exactly(features, device):
    x, y = on_grid(20, features, 0, device), on_grid(30, features, 1, device)
    rows, columns = some_pairs(50, 20, 30, device)
    got = pair_similarity(x, y, rows, columns)
    want = whole_numbers(x, y, rows, columns).double() / 2**52
    assert (columns < 0).any() and got.dtype == torch.float64
    assert torch.equal(got.cpu(), torch.where(columns.cpu() < 0, -torch.inf, want))


@pytest.mark.parametrize("strip, block", [(1, 1), (3, 7), (20, 5), (100, 100)])
def test_the_sizes_of_the_blocks_do_not_matter(monkeypatch, strip, block):
    x, y, listed = on_grid(20, 9, 0), on_grid(30, 9, 1), some_pairs(60, 20, 30)
    want = pair_similarity_reference(x, y, *listed)
    monkeypatch.setattr(pairs, "X_PART", 9 * strip)
    monkeypatch.setattr(pairs, "Y_PART", 9 * block)
    assert torch.equal(pair_similarity_reference(x, y, *listed), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_widens_the_rows_before_it_multiplies(dtype, device):
    x, y = on_grid(9, 33, 0, device).to(dtype), on_grid(8, 33, 1, device).to(dtype)
    rows, columns = some_pairs(30, 9, 8, device)
    want = (x[rows].double() * y[columns].double()).sum(1).masked_fill(columns < 0, -torch.inf)
    torch.testing.assert_close(pair_similarity(x.T.clone().T, y, rows, columns), want, atol=1e-15, rtol=0)


def test_a_pair_of_one_set_is_the_same_both_ways(device):
    x = on_grid(20, 130, 0, device)
    rows, columns = some_pairs(400, 20, 20, device)
    got = pair_similarity(x, x, rows, columns)
    assert torch.equal(got, pair_similarity(x, x.clone(), rows, columns))
    assert torch.equal(got, pair_similarity_reference(x, x.clone(), rows, columns))


def test_no_pairs_and_wrong_pairs(device):
    x = on_grid(4, 3, 0, device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert pair_similarity(x, x, none, none).shape == (0,)
    with pytest.raises(ValueError, match="columns must have 2 entries, .*; got 3"):
        pair_similarity(x, x, none.new_zeros(2), none.new_zeros(3))
    with pytest.raises(TypeError, match="y must be float32; got float16"):
        pair_similarity(x, x.half(), none, none)
