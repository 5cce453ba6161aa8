"""Augmentation: distributions against the published code's, and independence between images."""

import pytest
import torch

from ecul import augment

N = 4000


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def noise(count=N, size=(16, 8)):
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1))


def share(condition):
    return condition.float().mean().item()


def test_normalize_is_imagenets():
    x = augment.normalize(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    expected = [(1 - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    assert torch.allclose(x[0, :, 0, 0], torch.tensor(expected))


def test_crop_shifts_by_up_to_pad_and_fills_zeros(generator):
    images = torch.zeros(N, 3, 9, 9, dtype=torch.uint8)
    images[:, :, 4, 4] = 200
    cropped = augment.crop(images, 2, generator)
    place = cropped[:, 0].flatten(1).argmax(1)
    counts = torch.bincount(place, minlength=81).reshape(9, 9)
    assert cropped.shape == images.shape and (counts.nonzero() - 4).abs().max() == 2
    assert counts[2:7, 2:7].min() > 0.6 * N / 25 and counts.sum() == N
    ones = augment.crop(torch.ones(N, 3, 9, 9, dtype=torch.uint8), 2, generator)
    assert share((ones == 1).flatten(1).all(1)) == pytest.approx(1 / 25, abs=0.015)


def test_flip_mirrors_half_of_the_images(generator):
    images = noise()
    flipped = augment.flip(images, generator)
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    assert share(mirrored) == pytest.approx(0.5, abs=0.03)
    assert (flipped == images).flatten(1).all(1)[~mirrored].all()


def test_erasing_fills_one_rectangle_of_the_stated_area_and_shape(generator):
    h, w = 64, 32
    images = torch.full((N, 3, h, w), -9.0)
    erased = augment.erase(images, 0.5, generator)
    inside = (erased != -9).all(1)
    touched = inside.flatten(1).any(1)
    assert share(touched) == pytest.approx(0.5, abs=0.03)
    rows, columns = inside.any(2).sum(1)[touched], inside.any(1).sum(1)[touched]
    area = inside.flatten(1).sum(1)[touched]
    assert torch.equal(area, rows * columns)
    assert rows.max() < h and columns.max() < w
    assert area.min() >= 0.9 * 0.02 * h * w and area.max() <= 1.1 * 0.4 * h * w
    aspect = rows / columns
    assert aspect.min() > 0.25 and aspect.max() < 4.5 and share(aspect > 1) > 0.5
    colour = erased[touched][inside[touched][:, None].expand(-1, 3, -1, -1)].reshape(-1, 1)
    assert set(colour.unique().tolist()) == set(torch.tensor(augment.ERASED).tolist())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (augment.exchange_channels, [1 / 3, 1 / 3, 1 / 3, 0, 0]),
        (augment.adapt_channels, [0.25, 0.25, 0.25, 0.125, 0.125]),
    ],
)
def test_channels_are_copied_or_grayed_with_the_stated_shares(change, expected, generator):
    images = noise()
    gray = (images * torch.tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    outcomes = [*images[:, :, None].unbind(1), gray, images]
    changed = change(images, generator)
    shares = [share(torch.isclose(changed, x.expand_as(images)).flatten(1).all(1)) for x in outcomes]
    assert shares == pytest.approx(expected, abs=0.03)


def test_a_rectangle_is_scaled_by_b_over_its_maximum(generator, monkeypatch):
    """b ~ Beta(.5, .5): its mean is 1 / 2, its variance 1 / 8, and a third of it is below 1 / 4."""
    monkeypatch.setattr(augment, "SCALINGS", 1)
    images = torch.tensor([0.9, 0.5, 0.1])[:, None, None] * (0.5 + 0.5 * noise(N, (24, 12)))
    scaled = augment.scale_rectangles(images, 1.0, generator)
    inside = scaled != images
    highest = torch.where(inside, images, 0).amax((2, 3))
    b = torch.where(inside, scaled, 0).amax((2, 3))  # the brightest pixel of a rectangle becomes b
    assert torch.allclose(scaled, torch.where(inside, images * (b / highest)[:, :, None, None], images))
    assert b.mean(0).tolist() == pytest.approx([0.5] * 3, abs=0.03)
    assert b.var(0).tolist() == pytest.approx([0.125] * 3, abs=0.01)
    assert (b < 0.25).float().mean(0).tolist() == pytest.approx([1 / 3] * 3, abs=0.03)
    monkeypatch.undo()
    black = torch.zeros(4, 3, 24, 12)  # no factor is drawn for it, and the loop ends
    assert torch.equal(augment.scale_rectangles(black, 1.0, generator), black)


@pytest.mark.parametrize(("view", "expected"), [("visible", 0.0), ("exchanged", 1.0), ("infrared", 7 / 8)])
def test_each_view_has_its_own_colours_and_draws_for_each_image_by_the_seed(view, expected, generator):
    """Channels are alike in all exchanged images and, copied or gray, in seven of eight infrared ones."""
    image = (noise(1)[0] * 255).to(torch.uint8).expand(64, -1, -1, -1)
    first, again = (
        augment.train_view(image, view, 2, torch.Generator().manual_seed(3), True) for _ in range(2)
    )
    assert torch.equal(first, again) and first.dtype == torch.float32
    assert len(first.flatten(1).unique(dim=0)) > 50
    colours = torch.tensor([200, 90, 20], dtype=torch.uint8)[:, None, None]
    seen = augment.train_view(colours.expand(1000, 3, 16, 8), view, 0, generator)
    alike = torch.isclose(seen, seen[:, :1]).flatten(1).all(1)
    assert share(alike) == pytest.approx(expected, abs=0.03)


def test_the_linear_transform_scales_four_of_five_images_before_they_are_normalised(generator):
    plain = torch.full((1000, 3, 16, 8), 100, dtype=torch.uint8)
    seen = augment.train_view(plain, "visible", 0, generator, linear_transform=True)
    erased = torch.tensor(augment.ERASED)[:, None, None]
    untouched = torch.isclose(seen, augment.normalize(plain)) | torch.isclose(seen, erased)
    assert share(~untouched.flatten(1).all(1)) == pytest.approx(0.8, abs=0.05)
    black, white = augment.normalize(plain * 0), augment.normalize(plain + 155)
    assert black.min() <= seen.min() and seen.max() <= white.max()
