"""Batched augmentation on the device where the images are; every image draws for itself.

The transforms are those of ECUL's and MBCCM's published code (pad-crop, flip, random erasing, channel
exchange, channel adapt, linear transform), exact in distribution. All functions take and return (B, 3, H, W)
images, float32 but for `crop` and `flip`. The generator lives on the images' device; None is the default one.
"""

import torch

from ecul.common.pretrained import MEAN, STD

Random = torch.Generator | None

ERASED = (0.4914, 0.4822, 0.4465)
GRAY = (0.2989, 0.5870, 0.1140)
TRIES = 100  # rectangles drawn at once, of which the first that fits is taken
SCALINGS = 40  # rectangles that the linear transform scales at most; one photograph in 1000 has 33


def normalize(images: torch.Tensor) -> torch.Tensor:
    """`(images / 255 - mean) / std` for uint8 (B, 3, H, W) images; float32."""
    return _standardize(images.float() / 255)


def train_view(
    images: torch.Tensor, view: str, pad: int, generator: Random = None, linear_transform: bool = False
) -> torch.Tensor:
    """One random view of each uint8 (B, 3, H, W) image, normalised.

    Pad by `pad` zeros, crop, flip, normalise, erase; then by `view`: "visible" nothing more, "exchanged"
    channel exchange, "infrared" channel adapt. `linear_transform` scales rectangles before normalising
    (MBCCM, its visible view 1).
    """
    last = {"visible": lambda x, _: x, "exchanged": exchange_channels, "infrared": adapt_channels}
    x = flip(crop(images, pad, generator), generator).float() / 255
    if linear_transform:
        x = scale_rectangles(x, 0.8, generator)
    return last[view](erase(_standardize(x), 0.5, generator), generator)


def crop(images: torch.Tensor, pad: int, generator: Random = None) -> torch.Tensor:
    """Pad every side by `pad` zeros and cut the old size out at a random place."""
    b, _, h, w = images.shape
    rows, columns = (
        torch.arange(n, device=images.device) + _integers(images, 2 * pad + 1, generator)[:, None]
        for n in (h, w)
    )
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    batch = torch.arange(b, device=images.device)[:, None, None]
    return padded[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flip(images: torch.Tensor, generator: Random = None) -> torch.Tensor:
    """Mirror each image with probability one half."""
    return torch.where(_chosen(images, 0.5, generator), images.flip(3), images)


def erase(images: torch.Tensor, probability: float, generator: Random = None) -> torch.Tensor:
    """Random erasing: fill a rectangle of area U(.02, .4) and aspect U(.3, 1/.3) with a constant colour."""
    chosen = _chosen(images, probability, generator)
    return torch.where(_rectangles(images, generator) & chosen, _channels(ERASED, images.device), images)


def exchange_channels(images: torch.Tensor, generator: Random = None) -> torch.Tensor:
    """Copy one of the three channels, drawn uniformly, into all of them."""
    return _copy_channel(images, _integers(images, 3, generator))


def adapt_channels(images: torch.Tensor, generator: Random = None) -> torch.Tensor:
    """Each channel copied into all with 25 %, the gray image with 12.5 %, unchanged with 12.5 %."""
    kind = _integers(images, 8, generator)
    gray = (images * _channels(GRAY, images.device)).sum(1, keepdim=True).expand_as(images)
    copied = _copy_channel(images, (kind // 2).clamp(max=2))
    kind = kind[:, None, None, None]
    return torch.where(kind < 6, copied, torch.where(kind == 6, gray, images))


def scale_rectangles(images: torch.Tensor, probability: float, generator: Random = None) -> torch.Tensor:
    """MBCCM's linear transform of images in [0, 1].

    Again and again a rectangle is drawn and each of its channels scaled by b / its maximum, b ~ Beta(.5, .5),
    until some pixel's factors multiply to at most 1e-6, or SCALINGS rectangles were drawn.
    """
    active, product = _chosen(images, probability, generator), torch.ones_like(images)
    for _ in range(SCALINGS):
        if images.device.type == "cpu" and not active.any():  # a GPU would wait for this look
            break
        inside = _rectangles(images, generator) & active
        highest = torch.where(inside, images, 0).amax(dim=(2, 3), keepdim=True)
        uniform = torch.rand(highest.shape, generator=generator, dtype=torch.float32, device=images.device)
        factor = torch.sin(uniform * (torch.pi / 2)).square() / highest.clamp(min=1e-12)
        factor = torch.where(inside & (highest > 0), factor, 1.0)
        images, product = images * factor, product * factor
        active = active & (product.amin(dim=(1, 2, 3), keepdim=True) > 1e-6)
    return images


def _rectangles(images: torch.Tensor, generator: Random) -> torch.Tensor:
    """A random rectangle of each image as a bool (B, 1, H, W) mask, the first of TRIES that fits inside."""
    b, _, h, w = images.shape
    draws = torch.rand(4, b, TRIES, generator=generator, dtype=torch.float32, device=images.device)
    area = (0.02 + 0.38 * draws[0]) * h * w
    aspect = 0.3 + (1 / 0.3 - 0.3) * draws[1]
    heights, widths = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (heights < h) & (widths < w)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    height, width, down, right = (t.gather(1, first) for t in (heights, widths, draws[2], draws[3]))
    top, left = ((h - height + 1) * down).floor(), ((w - width + 1) * right).floor()
    rows, columns = (torch.arange(n, device=images.device) for n in (h, w))
    inside_rows = (rows >= top) & (rows < top + height) & fits.any(dim=1, keepdim=True)
    inside_columns = (columns >= left) & (columns < left + width)
    return (inside_rows[:, :, None] & inside_columns[:, None, :])[:, None]


def _copy_channel(images: torch.Tensor, channel: torch.Tensor) -> torch.Tensor:
    return images.gather(1, channel[:, None, None, None].expand(-1, 1, *images.shape[2:])).expand_as(images)


def _standardize(x: torch.Tensor) -> torch.Tensor:
    return (x - _channels(MEAN, x.device)) / _channels(STD, x.device)


def _channels(values: tuple[float, float, float], device: torch.device) -> torch.Tensor:
    """(3, 1, 1) numbers on this device, filled there: a GPU would wait for a copy."""
    return torch.stack([torch.full((1, 1), value, dtype=torch.float32, device=device) for value in values])


def _chosen(images: torch.Tensor, probability: float, generator: Random) -> torch.Tensor:
    """(B, 1, 1, 1) bool: whether each image is chosen."""
    size = (len(images), 1, 1, 1)
    return torch.rand(size, generator=generator, dtype=torch.float32, device=images.device) < probability


def _integers(images: torch.Tensor, high: int, generator: Random) -> torch.Tensor:
    """(B,) whole numbers below `high`."""
    return torch.randint(high, (len(images),), generator=generator, device=images.device)
