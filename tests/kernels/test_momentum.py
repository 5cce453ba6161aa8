"""`momentum_update_` against the rules, one sample at a time in float64."""

import pytest
import torch
import torch.nn.functional as F

from ecul.kernels import momentum, momentum_update_

RULES = momentum.RULES


def world(slots, samples, features, dtype=torch.float32, device="cpu", seed=0):
    """A bank of unit rows, a batch of unit rows, labels from -1 on."""
    generator = torch.Generator().manual_seed(seed)
    bank = F.normalize(torch.randn(slots, features, generator=generator)).to(device, dtype)
    x = F.normalize(torch.randn(samples, features, generator=generator)).to(device, dtype)
    labels = torch.randint(-1, slots, (samples,), generator=generator)
    return bank, x, labels.to(device)


def moved(row, sample, share):
    row = share * row + (1 - share) * sample
    return row / row.norm().clamp_min(1e-12)


def rules_applied(bank, x, labels, share, rule, chosen=None):
    """The bank after the update; `chosen` names, for `instance`, the sample that each label drew."""
    bank, x = bank.double(), x.double()
    updated = bank.clone()
    for label in set(labels.tolist()) - {-1}:
        samples = [f for f, own in zip(x, labels.tolist(), strict=True) if own == label]
        if rule == "sequential":
            for sample in samples:
                updated[label] = moved(updated[label], sample, share)
        elif rule == "mean":
            updated[label] = moved(bank[label], torch.stack(samples).mean(0), share)
        elif rule == "hard":
            updated[label] = moved(bank[label], min(samples, key=lambda f: (f @ bank[label]).item()), share)
        else:
            updated[label] = moved(bank[label], x[chosen[label]], share)
    return updated


def smallest_draws(labels, seed):
    """The sample that each label draws: the one with the smallest of the generator's numbers."""
    draws = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    labels = labels.tolist()
    own = {label: [i for i, other in enumerate(labels) if other == label] for label in labels}
    return {label: min(slots, key=lambda i: draws[i]) for label, slots in own.items()}


def assert_follows_the_rule(bank, x, labels, share, rule, tolerance, seed=0):
    chosen = smallest_draws(labels, seed) if rule == "instance" else None
    want = rules_applied(bank, x, labels, share, rule, chosen)
    untouched = [row for row in range(len(bank)) if row not in labels.tolist()]
    before, again = bank.clone(), bank.clone()
    for each in (bank, again):
        generator = torch.Generator().manual_seed(seed)
        assert momentum_update_(each, x, labels, share, rule, generator) is each
    assert torch.equal(bank, again)  # the same bits every time
    assert (bank.double() - want).abs().max() <= tolerance
    assert torch.equal(bank[untouched], before[untouched])


SIZES = [(1, 1, 1, 0.0), (6, 0, 9, 0.3), (9, 40, 33, 0.3), (40, 20, 128, 0.9), (3, 70, 5, 0.1)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-3)])
@pytest.mark.parametrize("slots, samples, features, share", SIZES)
def test_follows_the_rules_at_every_size(
    slots, samples, features, share, dtype, tolerance, rule, device, monkeypatch
):
    monkeypatch.setattr(momentum, "SLOTS", 32)  # of a batch at a time
    bank, x, labels = world(slots, samples, features, dtype, device)
    assert_follows_the_rule(bank, x, labels, share, rule, tolerance)


def test_finds_samples_far_apart_in_the_batch(device, few):
    """A label carries the first and one a block or more later, or the last alone; the rest carry none."""
    count = few(momentum.SLOTS + 40, 600)
    bank, x, _ = world(2, count, 5, device=device)
    labels = torch.full((count,), -1, device=device)
    labels[0] = labels[count - 20] = 0
    labels[count - 1] = 1
    assert_follows_the_rule(bank, x, labels, 0.3, "sequential", 1e-6)


def test_a_bfloat16_bank_is_rounded_once(device):
    """Sixty small moves, each too small for bfloat16 to see, add up."""
    bank = torch.tensor([[1.0, 0.0]], device=device, dtype=torch.bfloat16)
    x = torch.tensor([[0.0, 1.0]], device=device).repeat(60, 1)
    want = rules_applied(bank, x, torch.zeros(60, dtype=torch.int64), 0.999, "sequential")
    momentum_update_(bank, x, torch.zeros(60, dtype=torch.int64, device=device), 0.999, "sequential")
    assert bank[0, 1] > 0.05 and abs(bank[0, 1].item() - want[0, 1].item()) < 2e-4


def test_hard_takes_the_earliest_of_equals(device):
    bank = torch.tensor([[1.0, 0.0]], device=device)
    x = torch.tensor([[0.8, 0.6], [0.6, 0.8], [0.6, -0.8], [0.8, -0.6]], device=device)
    labels = torch.zeros(4, dtype=torch.int64, device=device)
    momentum_update_(bank, x, labels, 0.0, "hard")
    torch.testing.assert_close(bank[0], x[1])


@pytest.mark.parametrize("rule", RULES)
def test_only_instance_reads_the_priority(rule, device):
    """The last sample has the smallest number. A rule that read it would start with that sample."""
    bank, x, _ = world(2, 6, 4, device=device)
    labels = torch.arange(6, device=device) % 2
    want = rules_applied(bank, x, labels, 0.3, rule, chosen={0: 4, 1: 5})
    priority = torch.arange(6, 0, -1, dtype=torch.float32, device=device)
    momentum._momentum_update_(bank, x, labels, 0.3, rule, priority)
    torch.testing.assert_close(bank.double(), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("norm", [0.0, 1e5])
def test_float16_samples_of_any_norm_move_a_row_as_in_float32(norm, rule, device):
    bank, x, labels = world(6, 30, 2048, torch.float16, device)
    x = (x.float() * norm).half()
    assert_follows_the_rule(bank, x, labels, 0.3, rule, 2e-3)


@pytest.mark.parametrize("rule", RULES)
def test_any_memory_layout_dtype_and_a_batch_that_wants_a_gradient(rule, device):
    bank, x, labels = world(6, 30, 20, device=device)
    x = x.bfloat16().float()
    want = momentum_update_(bank.clone(), x, labels, 0.2, rule, torch.Generator().manual_seed(1))
    wide = torch.stack([x, x], 2)[:, :, 0].requires_grad_()
    for layout in (torch.zeros(12, 20)[::2], torch.zeros(20, 6).T, torch.zeros(6, 40)[:, ::2]):
        for samples in (wide, wide.bfloat16()):
            strided = layout.to(device).copy_(bank)
            got = momentum_update_(strided, samples, labels, 0.2, rule, torch.Generator().manual_seed(1))
            torch.testing.assert_close(got, want)
            assert not got.requires_grad


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"bank": torch.zeros(5)}, ValueError, "bank must have 2 dimension"),
        ({"x": torch.zeros(7, 5)}, ValueError, "x must have 4 columns"),
        ({"labels": torch.zeros(6, dtype=torch.int64)}, ValueError, "labels must have 7 entries"),
        ({"labels": torch.zeros(7)}, TypeError, "labels must be int64; got float32"),
        ({"labels": torch.full((7,), 5)}, ValueError, "labels must be below the 5 rows of bank; got 5"),
        ({"momentum": 1.5}, ValueError, "momentum must be from 0 to 1; got 1.5"),
        ({"momentum": -0.1}, ValueError, "momentum must be from 0 to 1; got -0.1"),
        ({"momentum": torch.full((2,), 0.1)}, TypeError, "momentum must be a number; got Tensor"),
        ({"x": torch.zeros(7, 4).to_sparse()}, ValueError, "x must be a dense tensor with data; got torch"),
        ({"rule": "median"}, ValueError, "rule must be one of sequential, instance, mean, hard"),
    ],
)
def test_refuses(change, error, message):
    names = ("bank", "x", "labels")
    arguments = dict(zip(names, world(5, 7, 4), strict=True), momentum=0.1, rule="mean")
    before = arguments["bank"].clone()
    with pytest.raises(error, match=message):
        momentum_update_(**{**arguments, **change})
    assert torch.equal(arguments["bank"], before)
