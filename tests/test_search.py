"""Image files to features: lists and folders, a chunk at a time."""

import layouts
import numpy as np
import pytest
import torch

import ecul.features
from ecul import extract
from ecul.data.decode import read_image
from ecul.features import extract_files
from ecul.search import extract_folder


class Colours(torch.nn.Module):
    """The mean colour of each image, and how many images were embedded at once."""

    input_size, num_features = (16, 8), 3

    def __init__(self):
        super().__init__()
        self.seen, self.scale = [], torch.nn.Parameter(torch.ones(1))

    def embed(self, x, modality):
        self.seen.append(len(x))
        return torch.nn.functional.normalize(x.mean((2, 3)) * self.scale, dim=1)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setattr(ecul.features, "CHUNK", 2)
    return [layouts.picture(tmp_path / f"{name}.png") for name in "abcde"]


def test_a_list_is_read_in_chunks_as_it_is_given(photos):
    given = [photos[3], str(photos[0]), photos[3], photos[4], photos[1]]
    model = Colours()
    found = extract(model, given, "visible", flip=False, progress=False)
    assert model.seen == [2, 2, 1]
    pixels = np.stack([read_image(path, model.input_size) for path in given])
    assert torch.allclose(found, extract(model, pixels, "visible", flip=False, progress=False))
    assert extract(model, [], "visible", progress=False).shape == (0, 3)
    assert extract(model, iter(given), "visible", progress=False).shape == (5, 3)


def test_a_folder_and_the_list_of_its_files_agree(photos, tmp_path):
    found = extract_folder(Colours(), tmp_path, "infrared", progress=False)
    assert found.paths == [str(path) for path in photos] and found.unreadable == []
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
