"""Metrics against a brute-force oracle, galleries against the published drawing, evaluate() as a whole."""

import itertools
import json
import os
import random
import shutil
from collections import Counter
from unittest.mock import patch

import layouts
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.io import savemat
from test_clustering import oracle_emcc_distance
from tiny import Pooled

import ecul.evaluation.metrics
from ecul.data import Dataset, open_dataset
from ecul.evaluation import Results, average, eval_llcm, eval_regdb, eval_sysu, evaluate
from ecul.evaluation.rerank import reranked
from ecul.features import extract
from ecul.streams import Backbone


def oracle(distmat, q_pids, g_pids, q_camids, g_camids, rule, max_rank=20):
    """The protocol, one query after the other; of equal distances the lower index first.

    A distractor, -1, is ranked, but neither asks nor matches.
    """
    curves, precisions, penalties = [], [], []
    for q in np.flatnonzero(np.asarray(q_pids) >= 0):
        ranking = sorted(range(len(g_pids)), key=lambda g: (distmat[q][g], g))
        if rule == "sysu":
            ranking = [g for g in ranking if not (q_camids[q] == 3 and g_camids[g] == 2)]
        if rule == "llcm":
            ranking = [g for g in ranking if not (g_pids[g] == q_pids[q] and g_camids[g] == q_camids[q])]
        hits = [g_pids[g] == q_pids[q] for g in ranking]
        if not any(hits):
            continue
        shown = [g_pids[g] for g in ranking]
        if rule != "regdb":
            shown = list(dict.fromkeys(shown))
        first = shown.index(q_pids[q])
        curves.append([float(first < k) for k in range(1, max_rank + 1)])
        places = [place for place, hit in enumerate(hits, 1) if hit]
        precisions.append(sum(found / place for found, place in enumerate(places, 1)) / len(places))
        penalties.append(len(places) / places[-1])
    if not curves:
        return None
    return np.mean(curves, 0), np.mean(precisions), np.mean(penalties)


def call(rule, distmat, q_pids, g_pids, q_camids, g_camids, **options):
    if rule == "regdb":
        return eval_regdb(distmat, q_pids, g_pids, **options)
    metric = eval_sysu if rule == "sysu" else eval_llcm
    return metric(distmat, q_pids, g_pids, q_camids, g_camids, **options)


def problem(seed, queries, gallery, ids, levels, lowest=0):
    """Random distances of `levels` values (0: all different), identities from `lowest` on, and cameras."""
    rng = np.random.default_rng(seed)
    distmat = rng.integers(0, levels, (queries, gallery)) if levels else rng.random((queries, gallery))
    pids = rng.integers(lowest, ids, queries), rng.integers(lowest, ids, gallery)
    return (distmat.astype(np.float32), *pids, rng.choice([3, 6, 2], queries), rng.integers(1, 6, gallery))


@pytest.mark.parametrize("rule", ["sysu", "regdb", "llcm"])
@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.integers(1, 80),  # more than 32 images of one person are ranked by a sort
    st.integers(1, 30),
    st.sampled_from([0, 1, 2, 5]),
    st.sampled_from([0, -1]),  # -1: with distractors
    st.sampled_from([1, 5, 20, 40]),
    st.sampled_from([20, 8_000_000]),  # distances at a time
)
def test_metrics_equal_the_brute_force(rule, seed, queries, gallery, ids, levels, lowest, max_rank, block):
    arrays = problem(seed, queries, gallery, ids, levels, lowest)
    expected = oracle(*arrays, rule, max_rank)
    with patch.object(ecul.evaluation.metrics, "_BLOCK", block):
        if expected is None:
            with pytest.raises(ValueError, match="no query has a match"):
                call(rule, *arrays, max_rank=max_rank)
            return
        cmc, mean_precision, mean_penalty = call(rule, *arrays, max_rank=max_rank)
    assert cmc.shape == (max_rank,)
    np.testing.assert_allclose(cmc, expected[0], atol=1e-12)
    np.testing.assert_allclose([mean_precision, mean_penalty], expected[1:], atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distmat": np.full((4, 6), np.nan)}, "NaN"),
        ({"distmat": np.zeros(4)}, "distmat"),
        ({"distmat": np.eye(4, 6).tolist() + [[1.0]]}, "distmat must be an array of numbers"),
        ({"distmat": torch.eye(4).to_sparse()}, "distmat must be a dense tensor"),
        ({"q_pids": [1, 2, 3]}, r"q_pids: expected 4 values for distmat \(4, 6\), not \(3,\)"),
        ({"g_pids": list("abcdef")}, "g_pids must be .* real numbers, got <U1"),
        ({"g_camids": [1] * 5}, "g_camids: expected 6 values"),
    ],
)
def test_metrics_refuse_what_they_cannot_rank(change, message):
    names = ("distmat", "q_pids", "g_pids", "q_camids", "g_camids")
    arrays = {**dict(zip(names, problem(2, 4, 6, 2, 0), strict=True)), **change}
    with pytest.raises((TypeError, ValueError), match=message):
        eval_llcm(**arrays)


# Galleries


def published_draw(root, trial, cameras, ids, shots=1):
    """The field's script: seed the module, walk the folders of the cameras, choose."""
    random.seed(trial)
    chosen = []
    for pid in sorted("%04d" % pid for pid in ids):  # noqa: UP031
        for camera in cameras:
            folder = root / camera / pid
            if folder.is_dir():
                files = sorted(f"{folder}/{name}" for name in os.listdir(folder))
                if shots == 1:
                    chosen.append(random.choice(files))
                else:
                    chosen += random.sample(files, min(shots, len(files)))
    return [os.path.relpath(path, root) for path in chosen]


@pytest.fixture
def world(tmp_path):
    counts = {(pid, camid): 2 + (pid * camid) % 11 for pid in (6, 7, 8, 10) for camid in range(1, 7)}
    return layouts.sysu(tmp_path, test=(10, 7, 6, 8), skip=[(7, 1), (8, 5)], count=counts, images=1)


def features_of(dataset, dim=6):
    """Features that know a little of the identity."""
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=(len(pile), dim)) + np.eye(32, dim)[pile.pids % dim]
        for name, pile in (("visible", dataset.test_visible), ("infrared", dataset.test_infrared))
    }


def unit(rows):
    return torch.nn.functional.normalize(torch.as_tensor(rows).float(), dim=1).numpy()


def expected_row(dataset, features, pairs, rule):
    """Mean and deviation over (query modality, rows, gallery modality, rows) of each trial."""
    figures = []
    for q_name, q_rows, g_name, g_rows in pairs:
        query, gallery = getattr(dataset, "test_" + q_name), getattr(dataset, "test_" + g_name)
        distmat = -unit(features[q_name])[q_rows] @ unit(features[g_name])[g_rows].T
        ids = query.pids[q_rows], gallery.pids[g_rows], query.camids[q_rows], gallery.camids[g_rows]
        cmc, mean_precision, mean_penalty = oracle(distmat, *ids, rule)
        figures.append([100 * value for value in (*cmc[[0, 4, 9, 19]], mean_precision, mean_penalty)])
    return np.mean(figures, 0), np.std(figures, 0)


def assert_row(row, expected):
    names = ("rank1", "rank5", "rank10", "rank20", "mAP", "mINP")
    np.testing.assert_allclose([row[name] for name in names], expected[0], atol=1e-9)
    np.testing.assert_allclose([row[name + "_std"] for name in names], expected[1], atol=1e-9)


def official_draw(dataset, trial, cameras, ids, shots, path):
    """The first images of the permutations in a rand_perm_cam.mat of our own."""
    cells = permutations(Counter(zip(dataset.test_visible.pids, dataset.test_visible.camids, strict=True)))
    savemat(path, {"rand_perm_cam": cells})
    return [
        f"cam{camid}/{pid:04d}/{number:04d}.jpg"
        for pid, camid in itertools.product(sorted(ids), cameras)
        for number in cells[camid - 1, 0][pid - 1, 0][trial][:shots]
    ]


@pytest.mark.parametrize(("mode", "cameras"), [("all", (1, 2, 4, 5)), ("indoor", (1, 2))])
@pytest.mark.parametrize("shots", [1, 10])
@pytest.mark.parametrize("draw", ["random", "rand_perm_cam.mat"])
def test_sysu_is_evaluated_on_the_published_draws(world, tmp_path, draw, mode, cameras, shots):
    dataset, ids = open_dataset("sysu", world), (10, 7, 6, 8)
    features, pairs = features_of(dataset), []
    path = draw if draw == "random" else tmp_path / draw
    for trial in range(10):
        if draw == "random":
            names = published_draw(world, trial, [f"cam{camera}" for camera in cameras], ids, shots)
        else:
            names = official_draw(dataset, trial, cameras, ids, shots, path)
        rows = [dataset.test_visible.names.index(name) for name in names]
        pairs.append(("infrared", np.arange(len(dataset.test_infrared)), "visible", rows))
    state = random.getstate()
    (row,) = evaluate(None, dataset, features=features, modes=mode, shots=[shots], draw=path).rows
    assert random.getstate() == state
    assert_row(row, expected_row(dataset, features, pairs, "sysu"))
    assert row["protocol"] == "SYSU-MM01" and row["mode"] == mode and row["trials"] == 10
    assert row["draw"] == {"random": "random.seed(t)"}.get(draw, draw)
    assert row["reranking"] == "no re-ranking"
    assert row["shots"] == {1: "single-shot", 10: "multi-shot"}[shots]


def permutations(counts, trials=10, ids=10):
    """rand_perm_cam as scipy writes MATLAB's cells."""
    rng = np.random.default_rng(3)
    outer = np.empty((6, 1), object)
    for camid in range(1, 7):
        inner = np.empty((ids, 1), object)
        for pid in range(1, ids + 1):
            count = counts.get((pid, camid), 0)
            drawn = [rng.permutation(count) + 1 for _ in range(trials)]
            inner[pid - 1, 0] = np.reshape(drawn, (trials, count))
        outer[camid - 1, 0] = inner
    return outer


NOTHING_DRAWN = r"trial 0 should name .* of identity 6 in camera 1, not \[\]"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a mat file", "is damaged"),
        ({"something": np.zeros(3)}, "is damaged: 'rand_perm_cam' is missing"),
        ({"rand_perm_cam": np.zeros((6, 10))}, NOTHING_DRAWN),
        ({"rand_perm_cam": permutations({})[:0]}, NOTHING_DRAWN),
        ({"rand_perm_cam": permutations({})}, NOTHING_DRAWN),
        ({"rand_perm_cam": permutations({}, ids=2)}, NOTHING_DRAWN),
        (
            {"rand_perm_cam": permutations({(p, c): 50 for p in range(11) for c in range(7)}, 1)},
            "trial 0 should name images 1 to 8 of identity 6 in camera 1, not .* 2",
        ),
    ],
)
def test_a_mat_file_of_another_shape_is_named(world, tmp_path, content, message):
    path = tmp_path / "mine.mat"
    path.write_bytes(content) if isinstance(content, bytes) else savemat(path, content)
    dataset = open_dataset("sysu", world)
    with pytest.raises(ValueError, match=f"mine.mat.*{message}"):
        evaluate(None, dataset, features=features_of(dataset), shots=[10], draw=path)


def test_regdb_both_directions_and_the_average_of_trials(tmp_path):
    root = layouts.regdb(tmp_path)
    results = []
    for trial in (1, 2):
        dataset = open_dataset("regdb", root, trial=trial)
        features = features_of(dataset)
        everything = np.arange(len(dataset.test_visible)), np.arange(len(dataset.test_infrared))
        result = evaluate(None, dataset, features=features)
        assert [row["direction"] for row in result.rows] == ["visible-to-infrared", "infrared-to-visible"]
        forth = ("visible", everything[0], "infrared", everything[1])
        back = ("infrared", everything[1], "visible", everything[0])
        for row, pair in zip(result.rows, (forth, back), strict=True):
            assert_row(row, expected_row(dataset, features, [pair], "regdb"))
            assert row["trials"] == 1 and row["protocol"] == f"RegDB trial {trial}"
        results.append(result)
    mean = average(results)
    for row, *rows in zip(mean.rows, *(result.rows for result in results), strict=True):
        assert row["protocol"] == "RegDB" and row["trials"] == 2 and row["direction"] == rows[0]["direction"]
        np.testing.assert_allclose(row["mAP"], np.mean([one["mAP"] for one in rows]))
        np.testing.assert_allclose(row["rank1_std"], np.std([one["rank1"] for one in rows]))
    assert "RegDB" in mean.table()
    forth, back = (Results([row]) for row in result.rows)
    for different in ([results[0], back], [forth, back], []):
        with pytest.raises(ValueError, match="results: .* that measure the same"):
            average(different)


def test_llcm_both_directions_in_both_readings(tmp_path):
    root = layouts.llcm(tmp_path, test=(4, 5, 11), images=3, skip=[("nir", 4, 2), ("vis", 5, 7)])
    dataset = open_dataset("llcm", root)
    features = features_of(dataset)

    def drawn(kind, trial):
        pile = dataset.test_visible if kind == "vis" else dataset.test_infrared
        cameras = layouts.LLCM_VISIBLE if kind == "vis" else layouts.LLCM_INFRARED
        folders = [f"test_{kind}/cam{camid}" for camid in cameras]
        return [pile.names.index(name) for name in published_draw(root, trial, folders, (4, 5, 11))]

    visible, infrared = np.arange(len(dataset.test_visible)), np.arange(len(dataset.test_infrared))
    results = evaluate(None, dataset, features=features)
    wanted = [
        [("infrared", infrared, "visible", drawn("vis", trial)) for trial in range(10)],
        [("visible", visible, "infrared", drawn("nir", trial)) for trial in range(10)],
        [("infrared", drawn("nir", trial), "visible", visible) for trial in range(10)],
    ]
    for row, pairs in zip(results.rows, wanted, strict=True):
        assert_row(row, expected_row(dataset, features, pairs, "llcm"))
    assert [(row["mode"], row["direction"]) for row in results.rows] == [
        ("drawn gallery", "infrared-to-visible"),
        ("drawn gallery", "visible-to-infrared"),
        ("drawn queries", "visible-to-infrared"),
    ]


# evaluate()


def test_a_model_is_evaluated_like_its_features(world):
    dataset = open_dataset("sysu", world)
    model = Backbone(Pooled(), (16, 8)).eval()
    sides = {"visible": dataset.test_visible, "infrared": dataset.test_infrared}
    features = {name: extract(model, side, name, progress=False) for name, side in sides.items()}
    ours = evaluate(model, dataset, trials=3, progress=False)
    assert ours.rows == evaluate(None, dataset, features=features, trials=3).rows
    assert [row["mode"] for row in ours.rows] == ["all", "indoor"]
    assert {row["shots"] for row in ours.rows} == {"single-shot"}
    for word in ("SYSU-MM01", "random.seed(t)", "no re-ranking", "3 trials", "indoor", "mAP", "±"):
        assert word in str(ours)


def test_evaluate_refuses_what_it_cannot_measure(world, tmp_path):
    dataset = open_dataset("sysu", world)
    features = features_of(dataset)
    own = Dataset.from_arrays(np.zeros((2, 4, 4), np.uint8), np.zeros((2, 4, 4), np.uint8))
    market = open_dataset("market", layouts.market(tmp_path))
    one_sided = Dataset("half", None, own.visible, own.infrared, own.visible, protocol="regdb")
    for name, lacking in (("arrays", own), ("market", market), ("half", one_sided)):
        with pytest.raises(ValueError, match=f"{name!r} has no test images with a protocol"):
            evaluate(None, lacking, features=features)
    nameless = Dataset.from_arrays(own.visible.load((4, 4)), np.zeros((2, 4, 4), np.uint8), test=own)
    object.__setattr__(nameless, "protocol", "regdb")
    with pytest.raises(ValueError, match="no identities"):
        evaluate(None, nameless, features={"visible": np.eye(2), "infrared": np.eye(2)})
    visible, infrared = features.values()
    for options, message in (
        ({"features": None}, "either a model or features"),
        ({"features": {"visible": visible}}, "'visible' and 'infrared'"),
        ({"features": {**features, "infrared": infrared[:, :1]}}, "rows of one size, not of .* and 1"),
        ({"features": {**features, "visible": visible[1:]}}, r"features\['visible'\]: .* finite rows"),
        ({"features": {**features, "visible": visible[:, 0]}}, r"features\['visible'\]: .* finite rows"),
        ({"draw": "absent.mat"}, "there is no file absent.mat"),
        ({"modes": ["outdoor"]}, "modes: 'sysu' knows all, indoor, not"),
        ({"modes": "indor"}, "did you mean 'indoor'"),
        ({"trials": 0}, "^trials must be at least 1, got 0"),
        ({"trials": "3"}, "^trials must be an integer, got '3'"),
        ({"shots": [0]}, "^shots must be at least 1, got 0"),
        ({"shots": 2.5}, "^shots must be an integer"),
        ({"rerank": "k"}, "rerank: expected k-reciprocal, modality, True or False, not 'k'"),
    ):
        with pytest.raises((FileNotFoundError, TypeError, ValueError), match=message):
            evaluate(None, dataset, **{"features": features, **options})


# Re-ranking


def rerank_oracle(query, gallery, k1, k2, weight):
    """Zhong et al., dense, in float64, one point after the other."""
    points = np.concatenate([query, gallery]).astype(np.float64)
    squared = ((points[:, None] - points[None]) ** 2).sum(2)
    original = (squared / squared.max(0)).T
    order = np.argsort(original, 1, kind="stable")
    total = len(points)

    def reciprocal(i, k):
        return {j for j in order[i, : k + 1] if i in order[j, : k + 1]}

    encoded = np.zeros((total, total))
    for i in range(total):
        core = reciprocal(i, k1)
        members = set(core)
        for j in core:
            half = reciprocal(j, int(np.around(k1 / 2)))
            if len(half & core) > 2 / 3 * len(half):
                members |= half
        chosen = sorted(members)
        encoded[i, chosen] = np.exp(-original[i, chosen]) / np.exp(-original[i, chosen]).sum()
    if k2 > 1:
        encoded = np.stack([encoded[order[i, :k2]].mean(0) for i in range(total)])
    shared = np.minimum(encoded[:, None], encoded[None]).sum(2)
    jaccard = 1 - shared / (2 - shared)
    return ((1 - weight) * jaccard + weight * original)[: len(query), len(query) :]


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 60), st.sampled_from([3, 16]))
def test_reranking_equals_the_dense_definition(seed, queries, gallery, dim):
    rng, total = np.random.default_rng(seed), queries + gallery
    people = 2 * rng.normal(size=(6, dim))[rng.integers(0, 6, total)]
    points = unit(rng.normal(size=(total, dim)) + people)
    sides = [torch.from_numpy(side) for side in (points[:queries], points[queries:])]
    modalities = [0] * queries + [1] * gallery
    jaccard = oracle_emcc_distance(points, [0] * total, modalities, 20, 6, 20)[:queries, queries:]
    expected = {
        "k-reciprocal": rerank_oracle(*map(torch.Tensor.numpy, sides), 20, 6, 0.3),
        "modality": 0.7 * jaccard + 0.3 * (1 - points[:queries].astype(np.float64) @ points[queries:].T),
    }
    for name, wanted in expected.items():
        ours = reranked(*sides, name)
        assert ours(slice(None)).shape == (queries, gallery) and ours(slice(None)).dtype == np.float32
        np.testing.assert_allclose(ours(slice(None)), wanted, atol=1e-5)
        np.testing.assert_allclose(ours(slice(1, 3)), wanted[1:3], atol=1e-5)


@pytest.mark.parametrize(
    ("rerank", "name"), [(True, "k-reciprocal"), ("k-reciprocal", "k-reciprocal"), ("modality", "modality")]
)
def test_reranking_is_named_and_ranks_by_its_distances(rerank, name, world):
    dataset = open_dataset("sysu", world)
    features = features_of(dataset)
    options = {"features": features, "modes": "all", "shots": 10_000, "trials": 1}
    row = evaluate(None, dataset, **options, rerank=rerank).rows[0]
    sizes = {"k-reciprocal": "k1=20, k2=6", "modality": "k1=20, k2=6, k3=20"}[name]
    assert row["reranking"] == f"{name} ({sizes}, lambda=0.3)"
    query, gallery = dataset.test_infrared, dataset.test_visible
    rows = [torch.from_numpy(unit(features[m])) for m in ("infrared", "visible")]
    order = reranked(*rows, name)(slice(None))
    cmc, mean_precision, _ = eval_sysu(order, query.pids, gallery.pids, query.camids, gallery.camids)
    assert row["mAP"] == pytest.approx(100 * mean_precision, abs=1e-9)
    assert row["rank1"] == pytest.approx(100 * cmc[0], abs=1e-9)
    assert row["mAP"] != evaluate(None, dataset, **options).rows[0]["mAP"]


# Distractors, and rows without a gallery


def test_distractors_of_markets_layout_stay_in_the_gallery(tmp_path):
    """0000 marks a distractor, and -1 is not used: draws and figures of people stay as they were."""
    plain = open_dataset("market", layouts.market(tmp_path / "plain", test=(3, 4, 10)), protocol="sysu")
    root = layouts.market(tmp_path / "more", test=(3, 4, 10))
    for side, cameras in (("rgb_modify", (1, 2)), ("ir_modify", (3, 6))):
        for pid, camera, n in itertools.product(("0000", "-1"), cameras, "12"):
            for part in ("bounding_box_test", "query"):
                layouts.picture(root / side / part / f"{pid}_c{camera}_{n}.jpg")
    for protocol in ("sysu", "regdb", "llcm"):
        dataset = open_dataset("market", root, protocol=protocol)
        assert dataset.extra == () and (dataset.test_visible.pids == -1).sum() == 8
        assert dataset.check().counts["test_visible"]["identities"] == 3
        features = {}
        for m in ("visible", "infrared"):
            pids = getattr(dataset, f"test_{m}").pids
            away = np.eye(12)[np.where(pids < 0, 11, pids)]  # distractors lie apart from all people
            features[m] = away + np.random.default_rng(0).normal(size=away.shape) / 100
        rows = evaluate(None, dataset, features=features).rows
        assert all(row["rank1"] == row["mAP"] == 100 for row in rows)
        for m in ("visible", "infrared"):  # distractors look like person 3
            features[m][getattr(dataset, f"test_{m}").pids < 0] = np.eye(12)[3]
        assert all(row["mAP"] < 100 for row in evaluate(None, dataset, features=features).rows)
    known = {}
    for m in ("visible", "infrared"):  # far from every query: the draws of people stay as they were
        distractors = getattr(dataset, f"test_{m}").pids < 0
        known[m] = features[m][~distractors]
        features[m][distractors] = -1
    rows = evaluate(None, open_dataset("market", root, protocol="sysu"), features=features).rows
    for row, alone in zip(rows, evaluate(None, plain, features=known).rows, strict=True):
        assert row["mAP"] == alone["mAP"] and row["rank1"] == alone["rank1"]


def test_a_row_without_a_gallery_is_empty(world, caplog):
    """The people of a subset may be seen by the outdoor cameras alone."""
    for camera in ("cam1", "cam2"):
        for pid in ("0006", "0007", "0008", "0010"):
            shutil.rmtree(world / camera / pid, ignore_errors=True)
    dataset = open_dataset("sysu", world, subset=True)
    features = features_of(dataset)
    for rerank in (False, "k-reciprocal"):
        results = evaluate(None, dataset, features=features, trials=2, rerank=rerank)
        whole, empty = results.rows
        assert whole["mAP"] > 0 and empty["mode"] == "indoor" and empty["mAP"] is empty["rank1_std"] is None
    assert "SYSU-MM01, indoor, infrared-to-visible: no query has a match" in caplog.text
    assert json.loads(results.table("json"))["rows"] == results.rows
    assert results.table().splitlines()[-1].split() == ["indoor", *"------"]
    assert average([results, results]).rows[1]["mAP"] is None


def test_arrays_of_any_kind_are_evaluated_alike():
    arrays = problem(5, 12, 30, 4, 6)
    kinds = [lambda a: a[::-1].copy()[::-1], lambda a: a.astype(a.dtype.newbyteorder(">")), np.ndarray.tolist]
    tensors = [lambda a: torch.from_numpy(a).bfloat16(), lambda a: torch.from_numpy(a).long()]
    for rule, kind in itertools.product(("sysu", "regdb", "llcm"), (*kinds, *tensors)):
        for ours, theirs in zip(call(rule, *arrays), call(rule, *map(kind, arrays)), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    pixels = np.zeros((12, 4, 4), np.uint8)
    side = {"visible_pids": arrays[1].astype(">i4")[::-1], "infrared_pids": arrays[1].astype(np.uint16)[::-1]}
    test = Dataset.from_arrays(pixels, pixels, **side)
    dataset = Dataset.from_arrays(pixels[::-1], pixels, test=test, protocol="regdb")
    features = {m: unit(np.random.default_rng(6).normal(size=(12, 5))) for m in ("visible", "infrared")}
    rows = evaluate(None, dataset, features=features).rows
    for kind in (*kinds, lambda a: a.astype(np.longdouble), lambda a: torch.from_numpy(a).requires_grad_()):
        assert evaluate(None, dataset, features={m: kind(f) for m, f in features.items()}).rows == rows
