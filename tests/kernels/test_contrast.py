"""`memory_contrast` against the definition, summed slot by slot in float64."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ecul.kernels import contrast, memory_contrast, memory_contrast_reference

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
TEMPERATURE = 0.05


def world(samples, slots, features, classes, dtype=FULL, bank_dtype=FULL, device="cpu", seed=0):
    """Unit rows, every class among the slots, and a sample in four without a label."""
    generator = torch.Generator().manual_seed(seed)
    x = F.normalize(torch.randn(samples, features, generator=generator)).to(device, dtype)
    bank = F.normalize(torch.randn(slots, features, generator=generator)).to(device, bank_dtype)
    bank_labels = torch.arange(slots) % min(classes, slots)
    labels = bank_labels[torch.randint(slots, (samples,), generator=generator)]
    labels[3::4] = -1
    return x, bank, bank_labels.to(device), labels.to(device)


def definition(x, bank, bank_labels, labels, temperature):
    """L_I of the paper, one sample and slot at a time."""
    losses = []
    for row, label in zip(x, labels.tolist(), strict=True):
        scores = [row @ slot / temperature for slot in bank]
        own = [s for s, slot_label in zip(scores, bank_labels.tolist(), strict=True) if slot_label == label]
        top = max(s.detach() for s in scores)
        everything = top + sum((s - top).exp() for s in scores).log()
        losses.append(everything * 0 if label < 0 else everything - torch.stack(own).logsumexp(0))
    return torch.stack(losses)


def dense(x, bank, bank_labels, labels, temperature):
    """The same at once, in the dtype of `x`: what a script would write."""
    scores = x @ bank.to(x.dtype).T / temperature
    own = (labels[:, None] == bank_labels) | (labels < 0)[:, None]
    return scores.logsumexp(1) - scores.masked_fill(~own, -torch.inf).logsumexp(1)


def loss_and_gradient(function, x, *arguments, temperature=TEMPERATURE):
    x = x.detach().clone().requires_grad_()
    loss = function(x, *arguments, temperature)
    weights = torch.linspace(0.5, 2, len(x), device=x.device, dtype=loss.dtype)
    (gradient,) = torch.autograd.grad((loss * weights).sum(), x)
    return loss.detach().double(), gradient.double()


def exact(x, bank, bank_labels, labels, temperature=TEMPERATURE, function=dense):
    return loss_and_gradient(
        function, x.double(), bank.double(), bank_labels, labels, temperature=temperature
    )


def worst(got, want):
    return (got - want).abs().max().item()


@settings(max_examples=12)
@given(
    samples=st.integers(1, 9),
    slots=st.integers(1, 12),
    features=st.integers(1, 20),
    classes=st.integers(1, 12),
    temperature=st.sampled_from([0.02, 0.05, 1.0]),
    outliers=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_the_definition(samples, slots, features, classes, temperature, outliers, seed):
    """outliers: slots labelled -1 are nobody's positives."""
    arguments = world(samples, slots, features, classes, seed=seed)
    for labels in arguments[2:] if outliers else ():
        labels[labels == 0] = -1
    loss, gradient = loss_and_gradient(memory_contrast, *arguments, temperature=temperature)
    want_loss, want_gradient = exact(*arguments, temperature=temperature, function=definition)
    assert worst(loss, want_loss) < 4e-7 / temperature + 4e-6
    assert worst(gradient, want_gradient) < 2e-6 / temperature**2


@pytest.mark.parametrize("dtype, bank_dtype", [(FULL, FULL), (BRAIN, BRAIN), (BRAIN, FULL), (HALF, FULL)])
@pytest.mark.parametrize(
    "samples, slots, features, classes",
    [(1, 1, 1, 1), (64, 128, 64, 16), (65, 129, 65, 129), (130, 300, 130, 40)],
    ids=["one", "blocks", "above blocks", "several blocks"],
)
def test_errs_no_more_than_torch_in_the_same_dtype(
    samples, slots, features, classes, dtype, bank_dtype, device
):
    arguments = world(samples, slots, features, classes, dtype, bank_dtype, device)
    ours, again = (loss_and_gradient(memory_contrast, *arguments) for _ in range(2))
    assert torch.equal(ours[0], again[0]) and torch.equal(ours[1], again[1])  # the same bits every time
    torchs, want = loss_and_gradient(dense, *arguments), exact(*arguments)
    assert worst(ours[0], want[0]) <= worst(torchs[0], want[0]) + 4e-6
    scale = want[1].abs().max()
    assert worst(ours[1], want[1]) <= worst(torchs[1], want[1]) + 2e-6 * scale


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype, relative", [(FULL, 2e-5), (BRAIN, 8e-3), (HALF, 2e-3)])
def test_gradient_keeps_its_precision_where_the_loss_is_small(dtype, relative, device):
    _, bank, bank_labels, labels = world(40, 30, 16, 30, device=device)
    x = F.normalize(bank[labels] + 0.01).to(dtype)
    bank = bank.to(dtype)
    _, gradient = loss_and_gradient(memory_contrast, x, bank, bank_labels, labels)
    _, want = exact(x, bank, bank_labels, labels)
    assert worst(gradient, want) <= relative * want.abs().max()


@pytest.mark.parametrize("dtype", [FULL, BRAIN])
def test_ignored_samples_give_exactly_nothing(dtype, device):
    x, bank, bank_labels, labels = world(70, 150, 40, 9, dtype, device=device)
    loss, gradient = loss_and_gradient(memory_contrast, x, bank, bank_labels, labels)
    ignored = labels < 0
    assert ignored.any() and (loss[ignored] == 0).all() and (gradient[ignored] == 0).all()
    alone = loss_and_gradient(memory_contrast, x[~ignored], bank, bank_labels, labels[~ignored])[0]
    assert worst(loss[~ignored], alone) < 4e-6
    assert (loss[~ignored] > 0).all() and (gradient[~ignored] != 0).any(1).all()


def test_own_slots_far_below_the_others_do_not_underflow(device):
    """At this temperature the own slot lies 2,000 below the highest score of its tile."""
    x = torch.tensor([[1.0, 0.0]], device=device)
    bank = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], device=device)
    labels = torch.arange(3, device=device)
    loss, gradient = loss_and_gradient(memory_contrast, x, bank, labels, labels[:1], temperature=0.001)
    torch.testing.assert_close(loss.cpu(), torch.tensor([2000.0]).double())
    torch.testing.assert_close(gradient.cpu(), torch.tensor([[1000.0, 0.0]]).double())  # 0.5 * 2 / tau


def test_any_memory_layout(device):
    x, bank, bank_labels, labels = world(30, 150, 24, 7, device=device)
    want = loss_and_gradient(memory_contrast, x, bank, bank_labels, labels)
    strided = torch.stack([labels, labels], 1)[:, 0]
    for other in (bank.T.clone().T, bank.repeat(1, 2)[:, :24]):
        got = loss_and_gradient(memory_contrast, x.T.clone().T, other, bank_labels, strided)
        assert worst(got[0], want[0]) < 4e-6 and worst(got[1], want[1]) < 4e-6


@pytest.mark.interpreted
def test_strips_of_samples_change_nothing(monkeypatch, device):
    arguments = world(20, 40, 20, 11, device=device)
    want = loss_and_gradient(memory_contrast, *arguments)
    for scores in (1, 3 * 40, 7 * 40 + 1):
        monkeypatch.setattr(contrast, "SCORES", scores)
        loss, gradient = loss_and_gradient(memory_contrast, *arguments)
        assert worst(loss, want[0]) < 4e-6 and worst(gradient, want[1]) < 2e-6 * want[1].abs().max()


@pytest.mark.parametrize("samples", [0, 6])
def test_only_the_samples_take_a_gradient_in_their_dtype(samples, device):
    x, bank, bank_labels, labels = world(6, 9, 5, 3, BRAIN, device=device)
    x, labels = x[:samples], labels[:samples]
    bank.requires_grad_()
    assert not memory_contrast(x, bank, bank_labels, labels, TEMPERATURE).requires_grad
    loss = memory_contrast(x.requires_grad_(), bank, bank_labels, labels, TEMPERATURE)
    loss.sum().backward()
    assert loss.dtype == FULL and loss.shape == labels.shape
    assert x.grad.dtype == BRAIN and x.grad.shape == x.shape
    assert bank.grad is None and (samples == 0 or x.grad.abs().sum() > 0)
    with torch.no_grad():
        assert not memory_contrast(x, bank, bank_labels, labels, TEMPERATURE).requires_grad


@pytest.mark.host
def test_autocast_changes_nothing_in_the_reference():
    x, *rest = world(20, 40, 16, 5)
    want = loss_and_gradient(memory_contrast_reference, x, *rest)
    with torch.autocast("cpu", BRAIN):
        loss = memory_contrast_reference(x.requires_grad_(), *rest, TEMPERATURE)
    (loss * torch.linspace(0.5, 2, 20)).sum().backward()
    assert torch.equal(loss.detach().double(), want[0]) and torch.equal(x.grad.double(), want[1])


@pytest.mark.interpreted
def test_autocast_takes_the_products_of_half_precision(device):
    """Equal to the products of rounded rows, and as near to float64 as torch is with such rows."""
    x, bank, bank_labels, labels = world(64, 150, 256, 9, device=device)
    rounded = x.to(BRAIN), bank.to(BRAIN), bank_labels, labels
    with torch.autocast(device, BRAIN):
        loss, gradient = loss_and_gradient(memory_contrast, x, bank, bank_labels, labels)
    want_loss, want_gradient = loss_and_gradient(memory_contrast, *rounded)
    assert torch.equal(loss, want_loss) and torch.equal(gradient, want_gradient)
    torchs, best = loss_and_gradient(dense, *rounded), exact(x, bank, bank_labels, labels)
    assert 0 < worst(loss, best[0]) <= worst(torchs[0], best[0]) / 4
    assert worst(gradient, best[1]) <= 8e-3 * best[1].abs().max()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(4)}, "x must have 2 dimension"),
        ({"x": torch.zeros(4, 5, dtype=torch.float64)}, "x must be float32, bfloat16, float16; got float64"),
        ({"bank": torch.zeros(9, 6)}, "bank must have 5 columns"),
        ({"bank": torch.zeros(0, 5), "bank_labels": torch.zeros(0, dtype=torch.int64)}, "bank has no rows"),
        ({"bank_labels": torch.arange(8)}, "bank_labels must have 9 entries, .*; got 8"),
        ({"labels": torch.zeros(4, dtype=torch.int32)}, "labels must be int64; got int32"),
        ({"labels": [0, 1, 2, 0]}, "labels must be a torch tensor; got list"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": 10**30}, "temperature must be above 0 and at most"),
        ({"temperature": torch.ones(2)}, "temperature must be a number; got Tensor"),
        ({"labels": torch.tensor([0, 1, -1, 7])}, r"labels\[3\] = 7 is carried by no slot"),
        ({"x": torch.full((4, 5), torch.nan)}, "NaN or infinite"),
        ({"bank": torch.full((9, 5), torch.inf)}, "NaN or infinite"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_refuses(change, message):
    names = ("x", "bank", "bank_labels", "labels")
    arguments = dict(zip(names, world(4, 9, 5, 3), strict=True), temperature=TEMPERATURE)
    with pytest.raises((ValueError, TypeError), match=message):
        memory_contrast(**{**arguments, **change})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FULL, BRAIN, HALF])
def test_broken_features_make_the_loss_nan_on_a_gpu(dtype):
    x, bank, bank_labels, labels = world(20, 300, 16, 5, dtype, dtype, "cuda")
    x[2, 3] = torch.nan
    loss, gradient = loss_and_gradient(memory_contrast, x, bank, bank_labels, labels)
    assert loss.isnan().nonzero().flatten().tolist() == [2]
    assert gradient.isnan().any(1).nonzero().flatten().tolist() == [2]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "call, message",
    [
        ("memory_contrast(rows, rows, labels, labels + 1, 0.05)", "a label is carried by no slot"),
        ("momentum_update_(rows, rows, labels + 1, 0.1, 'mean')", "a label is beyond the rows"),
    ],
)
def test_a_label_without_a_slot_on_a_gpu_ends_its_process_with_a_message(call, message):
    """In a process of its own, because the assertion leaves the device unusable for the rest of it."""
    code = f"""
import torch
from ecul.kernels import memory_contrast, momentum_update_
rows, labels = torch.eye(8, device="cuda"), torch.arange(8, device="cuda")
{call}
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stderr + done.stdout
