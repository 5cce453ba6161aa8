"""Images in folders: the content of one folder, and all images below a folder of the user's."""

import logging
import os
from functools import lru_cache
from pathlib import Path

from ecul.common.names import shorten
from ecul.data.decode import find_unreadable, pillow, unreadable

log = logging.getLogger("ecul")

# Formats that Pillow may be unable to open. They are reported as unreadable, not ignored.
CAMERA_FORMATS = frozenset((".heic", ".heif", ".hif", ".avif", ".jxl", ".dng", ".cr2", ".nef", ".arw"))


@lru_cache(maxsize=1)
def _extensions() -> frozenset[str]:
    known = pillow().registered_extensions()
    return frozenset(ending for ending, kind in known.items() if kind in pillow().OPEN) | CAMERA_FORMATS


def list_folder(folder: Path, root: Path) -> tuple[list[str], list[str], list[str]]:
    """Sorted images, other files and sub-folders of a folder, relative to root; hidden ones are left out."""
    images, others, folders = [], [], []
    prefix = folder.relative_to(root).as_posix()
    for name in sorted(os.listdir(folder)):
        if name.startswith("."):
            continue
        relative = name if prefix == "." else f"{prefix}/{name}"
        path, is_image = folder / name, os.path.splitext(name)[1].lower() in _extensions()
        if path.is_dir():
            folders.append(relative)
        elif is_image and (path.is_file() or not os.path.exists(path)):  # a broken link is a missing image
            images.append(relative)
        else:
            others.append(relative)
    return images, others, folders


def find_images(
    folder: Path, cameras: bool = False, skip_unreadable: bool = False
) -> tuple[list[str], list[int], list[str]]:
    """Every image below a folder, its camera, and all other files, by paths relative to the folder.

    Each folder is read once, however many links lead to it; a folder that contains this one is not read.
    cameras: each sub-folder is a camera, numbered from 1 by name; otherwise all are 0. skip_unreadable: leave
    out images that cannot be decoded, with a warning that names them. Errors: ValueError for a path that is
    not a folder, a folder without a readable image, or an image outside the cameras' folders.
    """
    if not folder.is_dir():
        kind = "is not a folder of images" if folder.exists() else "does not exist"
        raise ValueError(f"{str(folder)!r} {kind}")
    found, extra, inner = list_folder(folder, folder)
    if cameras and found:
        raise ValueError(f"{str(folder)!r}: with a sub-folder a camera, {found[0]!r} belongs to no camera")
    camera_of = dict.fromkeys(found, 0)
    home = folder.resolve()
    seen = {home, *home.parents}
    waiting = [(name, number) for number, name in enumerate(inner, 1)][::-1]
    while waiting:
        name, number = waiting.pop()
        here = (folder / name).resolve()
        if here in seen:
            extra.append(name)
            continue
        seen.add(here)
        images, others, inner = list_folder(folder / name, folder)
        camera_of |= dict.fromkeys(images, number if cameras else 0)
        extra += others
        waiting += [(name, number) for name in reversed(inner)]
    if not camera_of:
        held = f": {shorten(extra, 3)}" if extra else ""
        raise ValueError(f"{str(folder)!r} holds no image that Pillow reads{held}")
    if skip_unreadable and (problems := find_unreadable([folder / name for name in camera_of])):
        if len(problems) == len(camera_of):
            raise unreadable(problems, len(camera_of))
        log.warning("%s", unreadable(problems, len(camera_of), " and are left out"))
        camera_of = {name: c for name, c in camera_of.items() if str(folder / name) not in problems}
    return list(camera_of), list(camera_of.values()), extra
