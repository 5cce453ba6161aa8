"""Images of SYSU-MM01's numbers without its images: a coarse pattern for each person, with noise."""

from dataclasses import replace

import numpy as np

CAMERAS = {"visible": (1, 2, 4, 5), "infrared": (3, 6)}
TRAIN, TEST = {"visible": 22_258, "infrared": 11_909}, {"visible": 6_775, "infrared": 3_803}
PEOPLE = {"train": 395, "test": 96}


def splits(share, size):
    """Of each split: its name, modality, identities, cameras, and an iterator over its images.

    share: of the people and their images; size: (H, W).
    """
    rng = np.random.default_rng(0)
    coarse = -(-size[0] // 16), -(-size[1] // 16)

    def images(patterns, places, modality):
        for place in places:
            image = patterns[place] + rng.integers(-12, 12, (*coarse, 3))
            image = image if modality == "visible" else image[..., :1].repeat(3, 2)
            yield image.astype(np.uint8).repeat(16, 0).repeat(16, 1)[: size[0], : size[1]]

    for (split, people), of in zip(PEOPLE.items(), (TRAIN, TEST), strict=True):
        people = max(2, round(share * people))
        patterns = rng.integers(40, 216, (people, *coarse, 3))
        for modality, count in of.items():
            rows, cameras = np.arange(max(4, round(share * count))), np.array(CAMERAS[modality])
            pids = 1 + rows % people + (0 if split == "train" else PEOPLE["train"])
            cameras = cameras[rows // people % len(cameras)]
            yield split, modality, pids, cameras, images(patterns, rows % people, modality)


def in_memory(share, size):
    """A data set of these images in arrays."""
    from ecul import Dataset

    arrays = {"train": {}, "test": {}}
    for split, modality, pids, cameras, images in splits(share, size):
        pixels = np.empty((len(pids), *size, 3), np.uint8)
        for row, image in enumerate(images):
            pixels[row] = image
        arrays[split] |= {modality: pixels, f"{modality}_pids": pids, f"{modality}_cameras": cameras}
    test = Dataset.from_arrays(**arrays["test"])
    whole = Dataset.from_arrays(**arrays["train"], test=test, protocol="sysu", name="rehearsal")
    return replace(whole, subset=share != 1)
