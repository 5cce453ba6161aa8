"""Image files to features, lists and folders a chunk at a time; and which of them answer a query."""

import layouts
import numpy as np
import pytest
import torch

import ecul.features
from ecul import Dataset, extract
from ecul.data.decode import load_pixels
from ecul.evaluation.rerank import reranked
from ecul.features import extract_files, warn_if_other
from ecul.tools.search import image_files, search
from ecul.trainset import load_images


class Colours(torch.nn.Module):
    """The mean colour of each image, and how many images were embedded at once."""

    input_size, num_features = (16, 8), 3

    def __init__(self):
        super().__init__()
        self.seen, self.scale = [], torch.nn.Parameter(torch.ones(1))

    def embed(self, x, modality):
        self.seen.append(len(x))
        return torch.nn.functional.normalize(x.mean((2, 3)) * self.scale, dim=1)


def test_one_image_that_does_not_fit_is_an_error(monkeypatch):
    monkeypatch.setattr(Colours, "embed", lambda *_: torch.empty(2**60))
    with pytest.raises(RuntimeError, match="allocate"):
        extract(Colours(), np.zeros((4, 16, 8, 3), np.uint8), "visible", progress=False)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setattr(ecul.features, "CHUNK", 2)
    return [layouts.picture(tmp_path / f"{name}.png") for name in "abcde"]


def test_a_list_is_read_in_chunks_as_it_is_given(photos):
    given = [photos[3], str(photos[0]), photos[3], photos[4], photos[1]]
    model = Colours()
    found = extract(model, given, "visible", flip=False, progress=False)
    assert model.seen == [2, 2, 1]
    pixels = np.stack([load_pixels(path, model.input_size) for path in given])
    assert torch.allclose(found, extract(model, pixels, "visible", flip=False, progress=False))
    assert extract(model, [], "visible", progress=False).shape == (0, 3)
    assert extract(model, iter(given), "visible", progress=False).shape == (5, 3)


def test_a_folder_and_the_list_of_its_files_agree(photos, tmp_path, caplog):
    found = extract_files(Colours(), image_files(tmp_path), "infrared", progress=False)
    assert found.paths == [str(path) for path in photos] and found.unreadable == []
    assert "infrared: 2 of 2 images looked at are coloured" in caplog.text
    assert torch.equal(found.features, extract(Colours(), photos, "infrared", progress=False))


def test_files_that_cannot_be_read_are_all_named_or_skipped(photos, tmp_path):
    for place in (1, 4):
        photos[place].write_bytes(b"no image")
    model = Colours()
    for read in (extract, extract_files):
        with pytest.raises(ValueError, match=r"2 of 5 images cannot be read(.|\n)*b.png(.|\n)*e.png"):
            read(model, photos, "visible", progress=False)
    assert model.seen == []  # no work after the first of them
    found = extract_files(model, photos, "visible", skip_unreadable=True, progress=False)
    assert found.paths == [str(photos[place]) for place in (0, 2, 3)]
    assert found.unreadable == [str(photos[place]) for place in (1, 4)] and len(found.features) == 3
    with pytest.raises(ValueError, match="1 of 1 images cannot be read:"):
        extract_files(model, photos[1:2], "visible", skip_unreadable=True, progress=False)


def unit_rows(count, seed, size=6):
    rows = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


@pytest.mark.parametrize("rerank", ["k-reciprocal", "modality"])
def test_search_in_the_order_of_a_reranking(rerank, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(ecul.tools.search, "STRIP", 2)
    model = Colours()
    features = [extract(model, photos, m, progress=False) for m in ("infrared", "visible")]
    order = np.argsort(reranked(*features, rerank)(slice(None)), axis=1, kind="stable")
    sides = (tmp_path, tmp_path, "infrared", "visible")
    found = search(model, *sides, top=4, rerank=rerank, progress=False)
    assert found.table().startswith(f"in the order of {rerank} re-ranking, with cosines\n")
    assert found.rows.tolist() == order[:, :4].tolist()
    assert torch.allclose(found.scores, (features[0] @ features[1].T).gather(1, found.rows), atol=1e-6)
    seen = len(model.seen)
    with pytest.raises(ValueError, match="top must be a whole number of at least 1, got tensor"):
        search(model, *sides, top=torch.tensor(4))
    assert len(model.seen) == seen  # before any work
    with pytest.raises(ValueError, match="rerank must be one of k-reciprocal, modality, or None, got 'k'"):
        search(model, *sides, rerank="k")


def test_images_that_look_like_the_other_modality_are_warned_of(caplog):
    rng = np.random.default_rng(0)
    colours = torch.from_numpy(rng.integers(0, 256, (600, 3, 4, 2), dtype=np.uint8))
    gray = colours[:, :1].expand(-1, 3, -1, -1)
    warn_if_other(colours, "visible")
    warn_if_other(gray, "infrared")
    warn_if_other(torch.cat([gray, colours[:100]]), "visible")  # a camera at night among others
    warn_if_other(gray[:0], "visible")
    assert caplog.records == []
    warn_if_other(gray, "visible")
    warn_if_other(colours, "infrared")
    first, second = caplog.messages
    assert first == "visible: 200 of 200 images looked at are gray; is the modality right?"
    assert second.startswith("infrared: 200 of 200 images looked at are coloured; is the")
    caplog.clear()
    piles = Dataset.from_arrays(visible=gray.permute(0, 2, 3, 1).numpy(), infrared=gray[:, 0].numpy())
    load_images(piles, (32, 16), torch.device("cpu"))  # as training does
    assert [message for message in caplog.messages if "looked at" in message] == [first]
