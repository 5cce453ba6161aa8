"""Folders of one's own images: no layout, no identities, sub-folders of any depth."""

import logging
from pathlib import Path

from ecul.common.names import shorten
from ecul.data.decode import read_images, unreadable
from ecul.data.layouts import Listing, list_folder

log = logging.getLogger("ecul")


def read_folder(folder: Path, cameras: bool = False) -> tuple[Listing, list[str]]:
    """Every image below a folder, and all other files; with `cameras`, each sub-folder is one, by name."""
    if not folder.is_dir():
        kind = "is not a folder of images" if folder.exists() else "does not exist"
        raise ValueError(f"{str(folder)!r} {kind}")
    images, extra, inner = list_folder(folder, folder)
    if cameras and images:
        raise ValueError(f"{str(folder)!r}: with a sub-folder a camera, {images[0]!r} belongs to no camera")
    listing = Listing()
    listing.add(images, 0, 0)
    for number, name in enumerate(inner, 1):
        for below, others in _walk(folder / name, folder, [folder.resolve()]):
            listing.add(below, 0, number if cameras else 0)
            extra += others
    if not listing.names:
        held = f": {shorten(extra, 3)}" if extra else ""
        raise ValueError(f"{str(folder)!r} holds no image that Pillow reads{held}")
    return listing, extra


def require_apart(visible: Path, infrared: Path) -> None:
    """A ValueError when one folder is or lies in the other: its images would count in both modalities."""
    a, b = visible.resolve(), infrared.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise ValueError(
            f"visible and infrared: expected two folders apart, got {str(visible)!r} and {str(infrared)!r}"
        )


def only_readable(found: Listing, folder: Path) -> Listing:
    """The images of a folder that can be decoded; a warning names the others."""
    kept, problems = Listing(), []
    decoded = read_images([folder / name for name in found.names], (8, 4), True, "decoding")
    for name, camid, image in zip(found.names, found.camids, decoded, strict=True):
        if isinstance(image, ValueError):
            problems.append(image)
        else:
            kept.add([name], 0, camid)
    if not kept.names:
        raise unreadable(problems, len(found.names))
    if problems:
        log.warning("%s", unreadable(problems, len(found.names), " and are left out"))
    return kept


def _walk(folder: Path, root: Path, above: list[Path]):
    """Images and other files of a folder and of those below it; a link back to one above is not followed."""
    here = folder.resolve()
    if here in above:
        return
    images, others, inner = list_folder(folder, root)
    yield images, others
    for name in inner:
        yield from _walk(root / name, root, [*above, here])
