"""A folder of your own images as a data set."""

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import torch

from .dataset import ImageDataset, check_split
from .decoding import decode_images

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


class FolderImages(ImageDataset):
    """A folder of your own images, of any size and format that PIL reads (see `SUFFIXES`).

    Each subfolder is a class, with all images below it; a folder without subfolders is one class.
    `size` is the side of a square or (height, width); images are resized to cover it and cropped
    in the centre. `split` is "train" or "val": about one image in eight is held out, chosen by a
    hash of its name below `root`, so that an image stays in its split when others are added.
    `root`: the argument, else the environment's NOISOUT_DATA. Hidden files and files of other
    types are ignored; images that cannot be read are named and left out.

    Raises ValueError for an unknown split, a folder that is not there, holds no readable image,
    or holds images beside its subfolders, and for "val" if there are fewer than two images.
    """

    def __init__(
        self, size: int | tuple[int, int], split: str = "train", root: str | Path | None = None
    ):
        check_split(split)
        root = root or os.environ.get("NOISOUT_DATA")
        if not root:
            raise ValueError("no folder of images is named: set NOISOUT_DATA=path/to/images")
        root = Path(root).expanduser()
        files = _image_files(root)
        images, errors = decode_images(files, root, size)
        names = [file.relative_to(root).as_posix() for file in files]
        names = [name for name in names if name not in errors]
        for name, reason in errors.items():
            print(f"left out: {name} in {root} cannot be read ({reason})")
        if errors:
            print(f"{len(errors)} of {len(files)} images in {root} left out, {len(names)} remain")
        if not names:
            raise ValueError(f"none of the {len(files)} images in {root} can be read, see above")
        folders = [name.split("/")[0] if "/" in name else root.resolve().name for name in names]
        classes = sorted(set(folders))
        held_out = torch.tensor(_held_out(names))
        picked = held_out if split == "val" else ~held_out
        if not picked.any():
            raise ValueError(f"{root} has one readable image: to hold one out, two are needed")
        labels = torch.tensor([classes.index(folder) for folder in folders])
        super().__init__(images[picked], labels[picked], classes)


def _image_files(root: Path) -> list[Path]:
    """All images below `root`, sorted.

    Raises ValueError if there are none, or some beside subfolders with images.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder: set NOISOUT_DATA=path/to/images")
    files, others = [], set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith(".") and path.is_file():
                files.append(path)
            else:
                others.add(path.suffix)
    if not files:
        kinds = f" (only {', '.join(sorted(others))})" if others else ""
        raise ValueError(f"{root} holds no images{kinds}: {', '.join(SUFFIXES)} are read")
    beside = [file for file in files if file.parent == root]
    if 0 < len(beside) < len(files):
        raise ValueError(
            f"{root} holds {len(beside)} images, such as {beside[0].name!r}, beside subfolders "
            "with images. Each subfolder is a class: move these images into one, or choose a "
            "folder without subfolders"
        )
    return sorted(files)


def _held_out(names: Sequence[str]) -> list[bool]:
    """Which images are held out: about one in eight, by a hash of the name.

    Of two images or more, at least one is held out and one is not.
    """

    def digest(name: str) -> int:
        name = unicodedata.normalize("NFC", name)  # macOS stores an accent as a letter of its own
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")

    digests = [digest(name) for name in names]
    held_out = [value % 8 == 0 for value in digests]
    if len(names) > 1 and not any(held_out):
        held_out[digests.index(min(digests))] = True
    if len(names) > 1 and all(held_out):
        held_out[digests.index(max(digests))] = False
    return held_out
