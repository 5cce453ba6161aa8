"""Losses, memories and TSMem against loops written from the papers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ecul import ClusterMemory, InstanceMemory
from ecul.kernels import momentum_update_
from ecul.memory import cluster_means, consistency_loss, random_members, tsmem


def unit(rng, n, d):
    return F.normalize(torch.tensor(rng.normal(size=(n, d))), dim=1)


@given(st.integers(1, 12), st.integers(1, 20), st.integers(0, 10**6))
def test_the_instance_loss_equals_the_oracle(b, slots, seed):
    """Positives are summed, every slot is in the denominator, an outlier's slot is nobody's positive."""
    rng = np.random.default_rng(seed)
    x, bank, bank_labels = unit(rng, b, 5), unit(rng, slots, 5), rng.integers(-1, 4, slots)
    labels, weights = rng.choice([-1, *bank_labels], b), rng.uniform(0, 2, b)
    scores = x[labels >= 0] @ bank.T / 0.5
    others = torch.tensor(bank_labels != labels[labels >= 0][:, None])
    each = scores.logsumexp(1) - scores.masked_fill(others, -math.inf).logsumexp(1)
    memory = InstanceMemory.from_features(bank.float(), bank_labels, temp=0.5)
    loss = memory(x.float(), labels)
    assert loss.item() == pytest.approx(each.sum().item() / max(len(each), 1), abs=1e-5)
    assert torch.equal(memory(x.float(), np.where(labels < 0, -7, labels)), loss)  # any negative: no loss
    want = (weights[labels >= 0] * each.numpy()).sum() / max(len(each), 1)
    assert memory(x.float(), labels, weights).item() == pytest.approx(want, abs=1e-5)
    with pytest.raises(ValueError, match="weights: expected .*, one a row"):
        memory(x.float(), labels, weights[:, None])


@given(st.integers(1, 10), st.integers(2, 12), st.integers(0, 10**6))
def test_cluster_loss_and_gradient_are_those_of_cross_entropy_and_change_no_state(b, clusters, seed):
    rng = np.random.default_rng(seed)
    labels, lengths = torch.tensor(rng.integers(-1, clusters, b)), torch.tensor(rng.uniform(0.5, 9, (b, 1)))
    memory = ClusterMemory.from_clusters(unit(rng, clusters, 6).float(), temp=0.05)
    before = memory.features.clone()
    x = (lengths * unit(rng, b, 6)).float().requires_grad_()
    y = x.detach().double().requires_grad_()
    loss = memory(x, labels)
    loss.backward()
    logits = F.normalize(y, dim=1) @ memory.features.double().T / 0.05
    expected = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / max(1, (labels >= 0).sum())
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    assert torch.allclose(x.grad.double(), y.grad, atol=1e-4)
    assert torch.equal(memory.features, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_exact_under_autocast(dtype):
    rng = np.random.default_rng(0)
    memory = ClusterMemory.from_clusters(unit(rng, 7, 64).float())
    x = (3 * unit(rng, 5, 64)).to(dtype)
    want = F.normalize(x.double(), dim=1) @ memory.features.double().T / 0.05
    with torch.autocast("cpu", torch.bfloat16):
        found = memory.logits(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=0)
    gradients = []
    for features, autocast in ((x.float(), True), (x.double(), False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = memory.logits(features.requires_grad_())
            loss = consistency_loss(logits, logits / 2)
        gradients.append(torch.autograd.grad(loss, features)[0].double())
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_half_precision_are_normalised_in_float32(dtype):
    """A row of zeros and a norm beyond 65504 (the largest float16) are NaN or 0 where half precision sums."""
    x = torch.zeros(4, 9, dtype=dtype)
    x[1:] = 3e4 * torch.eye(9, dtype=dtype)[:3] + 3e4
    wide, labels = x.float(), [0, 1, 2, 2]

    def moved(rows):
        memory = ClusterMemory.from_clusters(torch.eye(3, 9) + 0.1)
        found = memory(rows, labels), memory.logits(rows).flatten()
        memory.update(rows, labels)
        return torch.cat([found[0][None], found[1], memory.features.flatten()])

    for make in (
        moved,
        lambda rows: ClusterMemory.from_clusters(rows).features,
        lambda rows: InstanceMemory.from_features(rows, labels).features,
        lambda rows: cluster_means(rows, labels),
        lambda rows: cluster_means(rows, labels, [0, 0, 0, 1]),
        lambda rows: random_members(rows, labels, torch.Generator().manual_seed(0)),
    ):
        assert torch.equal(make(x), make(wide)) and make(x).isfinite().all()


@pytest.mark.parametrize("rule", ["sequential", "instance", "mean", "hard"])
def test_an_update_is_that_of_the_kernel_with_its_generator(rule):
    rng = np.random.default_rng(0)
    bank, x, labels = unit(rng, 3, 4).float(), unit(rng, 12, 4).float(), torch.arange(12) % 4 - 1
    memory = ClusterMemory.from_clusters(bank, momentum=0.3, rule=rule)
    memory.update(7 * x, labels, torch.Generator().manual_seed(5))
    momentum_update_(bank, x, labels, 0.3, rule, torch.Generator().manual_seed(5))
    assert torch.allclose(memory.features, bank, atol=1e-6)


@given(st.integers(1, 30), st.integers(0, 10**6))
def test_consistency_equals_the_oracle(b, seed):
    rng = np.random.default_rng(seed)
    p, q = (torch.tensor(rng.normal(size=(b, 7)) * 4) for _ in range(2))
    a, b_side = F.log_softmax(p, 1), F.log_softmax(q, 1)
    each = [F.kl_div(*pair, log_target=True, reduction="batchmean") for pair in ((a, b_side), (b_side, a))]
    assert consistency_loss(p, q).item() == pytest.approx(sum(each).item() / 2, rel=1e-4, abs=1e-6)


@given(st.integers(1, 40), st.integers(0, 10**6))
def test_cluster_means_equal_the_oracle(n, seed):
    rng = np.random.default_rng(seed)
    x, groups = unit(rng, n, 5), torch.tensor(rng.integers(0, 2, n))
    drawn = rng.integers(-1, 5, n)
    drawn[0] = 0
    labels = torch.tensor(np.searchsorted(np.unique(drawn[drawn >= 0]), drawn))
    labels[drawn < 0] = -1
    for c in range(int(labels.max()) + 1):
        plain = x[labels == c].mean(0)
        parts = [
            x[(labels == c) & (groups == g)].mean(0) for g in (0, 1) if ((labels == c) & (groups == g)).any()
        ]
        joint = sum(parts) / len(parts)
        assert torch.allclose(cluster_means(x, labels)[c], plain / plain.norm(), atol=1e-9)
        assert torch.allclose(cluster_means(x, labels, groups)[c], joint / joint.norm(), atol=1e-9)


def test_random_members_are_members_and_every_member_is_drawn():
    x, labels = torch.eye(6), torch.tensor([0, 1, 0, -1, 1, 1])
    drawn = torch.stack(
        [random_members(x, labels, torch.Generator().manual_seed(s)).argmax(1) for s in range(100)]
    )
    assert set(drawn[:, 0].tolist()) == {0, 2} and set(drawn[:, 1].tolist()) == {1, 4, 5}


@pytest.mark.parametrize("function", [cluster_means, random_members])
def test_labels_with_gaps_are_refused_by_what_makes_a_row_of_each(function):
    for labels, absent in (([2, 7, 10, 2], 0), ([1, 2, 1, 2], 0), ([0, -1, 2, 3], 1), ([9**15, 0, 0, 0], 1)):
        with pytest.raises(ValueError, match=f"must count from 0 without gaps: {absent} is absent"):
            function(torch.eye(4), labels)
    assert function(torch.eye(4), [-1] * 4).shape == (0, 4) == function(torch.empty(0, 4), []).shape


def test_tsmem_has_two_steps():
    assert tsmem(4, 5) == ("random", "instance", 0.0)
    assert tsmem(5, 5) == ("mean", "instance", 0.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ClusterMemory(4, 2, momentum=1.5), "momentum"),
        (lambda: ClusterMemory(4, 2, temp=0), "temp"),
        (lambda: ClusterMemory(4, 2, rule="best"), "rule must be one of"),
        (lambda: ClusterMemory.from_clusters(torch.eye(3))(torch.eye(3)[:2], torch.tensor([0, 3])), "label"),
        (lambda: ClusterMemory(3, 3).update(torch.eye(3)[:1], [7]), "label"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_both_memories_start_from_rows_of_any_length_and_number_and_are_saved_with_their_labels():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.5]])
    for memory in (ClusterMemory.from_clusters(rows), InstanceMemory.from_features(rows, [1, -1])):
        assert torch.allclose(memory.features, torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
        other = type(memory)(2, 2)
        other.load_state_dict(memory.state_dict())
        assert torch.equal(other.features, memory.features) and torch.equal(other.labels, memory.labels)
    assert memory.labels.tolist() == [1, -3]  # an outlier is nobody's positive
    with pytest.raises(RuntimeError, match="labels"):
        other.load_state_dict({"features": memory.features})
    ClusterMemory(2, 2).load_state_dict({"features": memory.features})  # as published: labels count from 0
    one = ClusterMemory(1, 1)
    one.update(torch.full((2, 1), 3.0), [0, -1])
    assert one.features.item() == 1 and one(torch.ones(1, 1), [0]).item() == 0


def test_labels_are_whole_numbers_of_any_kind_and_layout_one_a_row():
    rng = np.random.default_rng(0)
    rows, x, labels = unit(rng, 3, 6).float(), unit(rng, 5, 6).float(), [0, 1, 1, 2, -1]
    array, found = np.array(labels), []
    kinds = [array.astype(kind) for kind in ("i8", "i4", ">i8")] + [array[::-1].copy()[::-1]]
    for kind in [labels, *kinds, torch.tensor(labels), torch.tensor(labels, dtype=torch.int32)]:
        memory = ClusterMemory.from_clusters(rows)
        loss = memory(x, kind)
        memory.update(x, kind)
        instances = InstanceMemory.from_features(x, kind)
        assert instances.labels.tolist() == [0, 1, 1, 2, -6]
        found.append(torch.cat([loss[None], memory.features.flatten(), cluster_means(x, kind).flatten()]))
    assert all(torch.equal(each, found[0]) for each in found)
    with pytest.raises(TypeError, match="labels must be whole numbers, got torch.float32"):
        memory(x, torch.zeros(5))
    for make in (InstanceMemory.from_features, cluster_means, random_members):
        with pytest.raises(ValueError, match="labels: expected 5, one a row"):
            make(x, [0])
    with pytest.raises(ValueError, match="groups: expected 5, one a row"):
        cluster_means(x, labels, [0])


def test_momentum_is_an_argument_of_update_and_use_hard_a_name_of_its_rule():
    x = F.normalize(torch.tensor([[3.0, 1.0], [1.0, 2.0]]), dim=1)
    memory = ClusterMemory(2, 1, momentum=0.3, use_hard=True)
    memory.features = torch.tensor([[1.0, 0.0]])
    memory.update(x, [0, 0], momentum=0.0)
    assert memory.rule == "hard" and torch.allclose(memory.features[0], x[1])
    with pytest.raises(TypeError, match=r"not momentum, ca: a memory moves in update\(x, labels, momentum"):
        memory(x, [0, 0], momentum=0.2, ca=True)
