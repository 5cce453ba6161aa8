"""What joins the modalities in the united method: views across stems, matches, memories of both."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny

from ecul import TwoStreamResNet
from ecul.batches import make_batches
from ecul.features import embed_pixels
from ecul.labels import Labels, assign_labels
from ecul.stages import make_terms
from ecul.training import embed_batch, extract_all, extract_exchanged
from ecul.trainset import load_images


@pytest.fixture(scope="module")
def images(dataset):
    return load_images(dataset, (32, 16), torch.device("cpu"))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = TwoStreamResNet(10, width=8, input_size=(32, 16)).eval()
    torch.nn.init.normal_(model.infrared.conv1.weight, std=0.1)  # so that the stems differ
    return model


@pytest.fixture(scope="module")
def labels(images):
    """Each modality's people as clusters; visible people 0, 1, 2 matched with infrared 3, 1, 0."""
    own = torch.from_numpy(np.unique(images.identities, return_inverse=True)[1]).clone()
    own[::5] = -1
    match = np.zeros((10, 10), dtype=bool)
    match[[3, 1, 0], [0, 1, 2]] = True
    features = F.normalize(torch.randn(len(own), 16, generator=torch.Generator().manual_seed(0)), dim=1)
    return Labels.from_own(features, own, images.num_visible, match=match, mutual=True), features


def first_batch(labels, images, stage=2, **fields):
    config = tiny(linear_transform=False, **fields)
    generator = torch.Generator().manual_seed(1)
    return next(make_batches(labels, images, config, stage, np.random.default_rng(1), generator)), config


def test_exchanged_views_pass_the_infrared_stem_once_labels_cross(images, labels, model):
    labels = labels[0]
    inside, _ = first_batch(labels, images, 1, exchanged_stem="infrared")
    own, _ = first_batch(labels, images, exchanged_stem="visible")
    across, _ = first_batch(labels, images, exchanged_stem="infrared")
    p, _, q = across.sizes
    assert [len(v) for v in inside.views] == [len(v) for v in own.views] == [2 * p, q]
    assert [len(v) for v in across.views] == [p, p + q]
    assert torch.equal(torch.cat(own.views), torch.cat(across.views))
    first, second, third = torch.cat(across.views).split(across.sizes)
    with torch.no_grad():
        found = embed_batch(model, across)
        parts = ((first, "visible"), (second, "infrared"), (third, "infrared"))
        expected = torch.cat([model.embed(x, modality) for x, modality in parts])
        assert torch.allclose(found, expected, atol=1e-5)
        assert not torch.allclose(found[p : 2 * p], model.embed(second, "visible"), atol=1e-2)


def test_features_are_in_the_order_of_the_images_and_exchanged_ones_pass_the_infrared_stem(images, model):
    sides = zip(images.pixels, ("visible", "infrared"), strict=True)
    expected = torch.cat([embed_pixels(model, *side, tiny().batch_extract) for side in sides])
    assert torch.equal(extract_all(model, images, tiny()), expected)
    found = extract_exchanged(model, images, tiny(), 2)
    for view, channel in zip(found, range(3), strict=True):
        copied = images.pixels[0][:, [channel] * 3]
        assert torch.allclose(view, embed_pixels(model, copied, "infrared", flip=False), atol=1e-6)
    assert extract_exchanged(model, images, tiny(exchanged_stem="visible"), 2) is None
    ecul = {"method": "ecul", "exchanged_stem": "infrared"}
    for unread in ({"method": "mbccm"}, ecul, {"weight_agnostic": 0.0}):
        assert extract_exchanged(model, images, tiny(**unread), 2) is None
    assert extract_exchanged(model, images, tiny(), 1) is None


def test_clusters_are_matched_by_the_view_that_is_nearest(images):
    """Exchanged views equal the infrared ones of the same person; plain views are a little like another's."""
    border = images.num_visible
    people = torch.from_numpy(np.unique(images.identities, return_inverse=True)[1])
    codes, other = torch.eye(20)[:10], torch.eye(20)[(people[:border] + 1) % 10]
    plain = F.normalize(torch.eye(20)[10:][people[:border]] + 0.1 * other, dim=1)
    features = torch.cat([plain, codes[people[border:]]])
    config = tiny(min_samples=2, k1=4)
    for exchanged, apart in ((codes[people[:border]][None], 0), (None, 1)):
        labels = assign_labels(features, images, config, 2, exchanged)
        of_visible, of_infrared = (
            dict(zip(side.tolist(), part.tolist(), strict=True))
            for side, part in zip(labels.sides.values(), people.tensor_split([border]), strict=True)
        )
        pairs = np.argwhere(labels.match)
        assert len(pairs) == 10
        assert all(of_infrared[i] == (of_visible[j] + apart) % 10 for i, j in pairs)


def test_the_table_across_is_ones_own_cluster_or_its_match(labels):
    labels = labels[0]
    partner = {"visible": {3: 0, 1: 1, 0: 2}, "infrared": {0: 3, 1: 1, 2: 0}}
    for m, (own_first, other_first) in (("visible", (True, False)), ("infrared", (False, True))):
        table = labels.across(m)
        for i, (y, found) in enumerate(zip(labels.own.tolist(), table.tolist(), strict=True)):
            is_own = own_first if i < labels.num_visible else other_first
            assert found == (y if is_own else partner[m].get(y, -1))


def test_agnostic_losses_of_mutual_matches_equal_cross_entropy(images, labels):
    labels, features = labels
    batch, config = first_batch(labels, images, weight_instance=0.0)
    x = F.normalize(torch.randn(sum(batch.sizes), 16, generator=torch.Generator().manual_seed(2)), dim=1)
    terms = {term.name: term for term in make_terms(features, labels, config, epoch=1)}
    assert set(terms) == {f"{kind}_{m}" for kind in ("cluster", "agnostic") for m in ("visible", "infrared")}
    for m, centers in zip(("visible", "infrared"), labels.centers, strict=True):
        y = labels.across(m)[batch.images()]
        expected = 0.9 * 3 * F.cross_entropy(x @ centers.T / config.temp, y, ignore_index=-1)
        assert torch.allclose(terms[f"agnostic_{m}"].loss(x, batch), expected, rtol=1e-4)
        before = terms[f"agnostic_{m}"].memory.features.clone()
        terms[f"agnostic_{m}"].update(x, batch)
        moved = (terms[f"agnostic_{m}"].memory.features != before).any(1)
        assert moved.nonzero()[:, 0].tolist() == sorted(set(y[y >= 0].tolist()))
        assert torch.equal(terms[f"cluster_{m}"].memory.features, before)
