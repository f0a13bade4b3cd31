"""Stage 1, the data: Oxford Flowers102, a folder of your own images, flowers made by formula.

All come as an `ImageDataset`: every image decoded once and kept as uint8, so that no epoch
decodes a JPEG again. An item is `(image, label)` with the image as float32 in [-1, 1], the range
that diffusion works in.
"""

import os
from contextlib import suppress
from pathlib import Path

import torch
from torchvision import datasets

from .dataset import ImageDataset, check_split, species_labels, to_float, to_uint8
from .decoding import decode_images, resize_and_crop
from .flowers import SPECIES, draw_factors, paint
from .folder import FolderImages
from .locks import one_process_at_a_time
from .profiles import DATASETS, REPOSITORY, Profile

__all__ = [
    "Flowers102",
    "FolderImages",
    "ImageDataset",
    "ProceduralFlowers",
    "load_data",
    "resize_and_crop",
    "species_labels",
    "to_float",
    "to_uint8",
]


class Flowers102(ImageDataset):
    """Oxford Flowers102: 102 species, 8,189 photographs, downloaded on first use (345 MB).

    `split` is "train" (torchvision's train + test, 7,169 photographs) or "val" (1,020, ten per
    species, held out for every evaluation). `size` is the side of a square or (height, width).
    The files live below `root`: the argument, else the environment's NOISOUT_DATA, else `data/`
    in the repository. Raises ValueError for an unknown split, RuntimeError if the files cannot be
    downloaded or are incomplete; the message says what to do.
    """

    def __init__(
        self, size: int | tuple[int, int], split: str = "train", root: str | Path | None = None
    ):
        check_split(split)
        root = Path(root or os.environ.get("NOISOUT_DATA") or REPOSITORY / "data")
        parts = _torchvision_parts(root, {"train": ("train", "test"), "val": ("val",)}[split])
        files = [file for part in parts for file in part._image_files]
        labels = torch.tensor([label for part in parts for label in part._labels])
        folder = root / "flowers-102"
        anew = f"Move {folder} to another place and run again to download it anew."
        missing = [file for file in files if not file.exists()]
        if missing:
            raise RuntimeError(
                f"Flowers102 in {root} is incomplete: {len(missing)} of {len(files)} photographs "
                f"are missing, {missing[0].name} for one. {anew}"
            )
        images, errors = decode_images(files, folder, size, split)
        for name, reason in errors.items():
            raise RuntimeError(f"{folder / name} is not a readable JPEG ({reason}). {anew}")
        super().__init__(images, labels, datasets.Flowers102.classes)


def _torchvision_parts(root: Path, names: tuple[str, ...]) -> list[datasets.Flowers102]:
    """torchvision's splits of Flowers102, downloaded first if they are not there."""
    with suppress(RuntimeError):  # not there, or not whole
        return [datasets.Flowers102(root, split=name) for name in names]
    try:
        with one_process_at_a_time(root / ".flowers-102.lock"):
            return [datasets.Flowers102(root, split=name, download=True) for name in names]
    except Exception as error:  # torchvision's download, unpacking and checks raise many kinds
        raise RuntimeError(
            f"Flowers102 is not in {root} and could not be downloaded there ({error}). Connect to "
            "the network and try again, or set NOISOUT_DATA to a folder that holds "
            "'flowers-102', or set NOISOUT_PROFILE=quick for the embedded flowers, which need "
            "no download."
        ) from error


TRAIN_IMAGES, VAL_IMAGES = 2000, 512
VAL_SEED = 1_000_003  # the held-out embedded flowers have a seed of their own


class ProceduralFlowers(ImageDataset):
    """Flowers made by formula from known factors: no download, and a distribution that is known.

    `size`: side in pixels, at least 16; `count`: how many; `seed`: another seed gives other
    flowers of the same kind. `factors` maps each name to a float32 tensor (count,): petals, hue
    (0..1), radius, x, y (in half sides, the image being -1..1), rotation, tilt and tilt_direction
    (radians), background_hue and background_value. Raises ValueError for a size or count that is
    too small.

    >>> flowers = ProceduralFlowers(size=32, count=4)
    >>> tuple(flowers.images.shape), flowers.classes[0], sorted(flowers.factors)[:3]
    ((4, 3, 32, 32), 'daisy', ['background_hue', 'background_value', 'hue'])
    """

    def __init__(self, size: int = 32, count: int = TRAIN_IMAGES, seed: int = 0):
        if size < 16:
            raise ValueError(
                f"size is {size}: a flower needs at least 16 pixels, and 32 to look like one"
            )
        if count < 1:
            raise ValueError(f"count is {count}: at least 1 flower must be drawn")
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(len(SPECIES), (count,), generator=generator)
        self.factors = draw_factors(labels, generator)
        images = []
        for part in torch.arange(count).split(100):
            factors = {name: values[part] for name, values in self.factors.items()}
            images.append(to_uint8(paint(size, labels[part], factors)))
        super().__init__(torch.cat(images), labels, tuple(SPECIES))


def load_data(profile: Profile, split: str = "train") -> ImageDataset:
    """The profile's data set: `split` is "train" or "val", which is held out for every evaluation.

    Raises ValueError for an unknown split or data set.
    """
    check_split(split)
    if profile.dataset == "flowers102":
        return Flowers102(profile.image_size, split)
    if profile.dataset == "folder":
        return FolderImages(profile.image_size, split)
    if profile.dataset == "procedural":
        count, seed = (
            (profile.train_images or TRAIN_IMAGES, 0)
            if split == "train"
            else (VAL_IMAGES, VAL_SEED)
        )
        return ProceduralFlowers(profile.image_size, count, seed)
    raise ValueError(
        f"unknown data set {profile.dataset!r}: choose one of {', '.join(map(repr, DATASETS))}. "
        "For images of your own set dataset='folder' and NOISOUT_DATA=path/to/images"
    )
