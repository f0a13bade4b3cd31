"""Stage 1, the data: Oxford Flowers102, and flowers drawn by formula that need no download.

Both come as a `FlowerImages` data set: every picture decoded once and kept as uint8, so that no epoch decodes
a JPEG again. An item is `(image, label)` with the image as float32 in [-1, 1], the range that diffusion works in.
"""

import difflib
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from .profiles import REPOSITORY

SPLITS = {"train": ("train", "test"), "val": ("val",)}  # torchvision's splits behind ours


def to_float(images: Tensor) -> Tensor:
    """uint8 (..., H, W) in 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float (..., H, W) in [-1, 1] -> uint8 in 0..255, clamped and rounded (a plain cast would cut off)."""
    return ((images.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write that takes the place of `path` at the end of the `with` block, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # one name for each process of torchrun, so that what a killed run leaves is overwritten by the next
    partial = path.with_name(f"{path.name}.{os.environ.get('RANK', 0)}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class FlowerImages(Dataset):
    """Pictures in memory with their species.

    Attributes: `images` uint8 (N, 3, size, size); `labels` int64 (N,), each in 0..len(classes)-1;
    `classes` the species' names. `dataset[i]` is `(image, label)`: float32 (3, size, size) in [-1, 1] and an int.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: tuple[str, ...]):
        self.images, self.labels, self.classes = images, labels, tuple(classes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return to_float(self.images[index]), int(self.labels[index])


def resize_and_crop(image: Tensor, size: int) -> Tensor:
    """uint8 (3, H, W) -> uint8 (3, size, size): the short side resized with antialiasing, then the centre cut out."""
    image = F.resize(image, size, interpolation=InterpolationMode.BICUBIC, antialias=True)
    return F.center_crop(image, [size, size])


class Flowers102(FlowerImages):
    """Oxford Flowers102: 102 species, 8,189 photographs, downloaded on first use (345 MB).

    `split` is "train" (torchvision's train + test, 7,169 photographs) or "val" (1,020, ten a species, held out
    for every evaluation). The files live below `root`: the argument, else the environment's NOISOUT_DATA,
    else `data/` in the repository. Raises ValueError for an unknown split, RuntimeError where the files cannot
    be had or are incomplete; the message says what to do.
    """

    def __init__(self, size: int, split: str = "train", root: str | Path | None = None):
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: choose one of {', '.join(map(repr, SPLITS))}")
        root = Path(root or os.environ.get("NOISOUT_DATA") or REPOSITORY / "data")
        try:
            root.mkdir(parents=True, exist_ok=True)
            parts = [datasets.Flowers102(root, split=part, download=True) for part in SPLITS[split]]
        except Exception as error:  # torchvision raises what its download, unpacking and checks happen to raise
            ways = "set NOISOUT_DATA to a folder that holds 'flowers-102', or set NOISOUT_PROFILE=quick for the embedded flowers, which need no download"
            raise RuntimeError(f"Flowers102 is not in {root} and could not be downloaded there ({error}). Connect to the network and try again, or {ways}.") from error
        files = [file for part in parts for file in part._image_files]
        labels = torch.tensor([label for part in parts for label in part._labels])
        missing = [file for file in files if not file.exists()]
        if missing:
            lost = f"{len(missing)} of {len(files)} photographs are missing, {missing[0].name} for one"
            raise RuntimeError(f"Flowers102 in {root} is incomplete: {lost}. Delete the folder {missing[0].parent.parent} and run again to download it anew.")
        super().__init__(_decode(files, size), labels, datasets.Flowers102.classes)


def _decode(files: list[Path], size: int) -> Tensor:
    def decode(file: Path) -> Tensor:
        try:
            return resize_and_crop(F.pil_to_tensor(Image.open(file).convert("RGB")), size)
        except OSError as error:
            raise RuntimeError(f"{file} is not a readable JPEG ({error}). Delete {file.parent.parent} and run again.") from error

    with ThreadPoolExecutor() as pool:
        return torch.stack(list(pool.map(decode, files)))


# The embedded flowers: species -> number of petals, petal width, pointedness, notch of the tip,
# hue of the petals (middle, half range), saturation, value, size of the centre, colour of the centre, second whorl
SPECIES = {
    "daisy": (10, 0.80, 0.9, 0.00, (0.13, 0.05), 0.08, 1.00, 0.30, (0.98, 0.76, 0.12), 1.0),
    "poppy": (4, 1.35, 0.5, 0.00, (0.01, 0.03), 0.88, 0.92, 0.24, (0.16, 0.12, 0.14), 0.6),
    "forget-me-not": (5, 1.10, 0.5, 0.18, (0.61, 0.05), 0.62, 0.95, 0.19, (0.99, 0.85, 0.25), 0.0),
    "cosmos": (8, 1.00, 0.6, 0.07, (0.88, 0.04), 0.62, 0.96, 0.22, (0.97, 0.74, 0.15), 0.0),
    "sunflower": (12, 0.90, 1.5, 0.00, (0.125, 0.025), 0.92, 1.00, 0.46, (0.36, 0.20, 0.10), 1.0),
    "starflower": (6, 0.85, 1.5, 0.00, (0.75, 0.04), 0.60, 0.90, 0.17, (0.98, 0.95, 0.62), 0.7),
}
VAL_IMAGES, VAL_SEED = 512, 1_000_003  # the held-out flowers are drawn with a seed of their own


class ProceduralFlowers(FlowerImages):
    """Flowers drawn by formula from known factors: no download, and the truth about the distribution is at hand.

    `size`: side in pixels, at least 16; `count`: how many; `seed`: another seed gives other flowers of the same kind.
    `factors` maps each name to a float32 tensor (count,): petals, hue (0..1), radius, x, y (in half sides, the picture
    being -1..1), rotation, tilt and tilt_direction (radians), background_hue and background_value.
    Raises ValueError for a size or count that is too small.

    >>> flowers = ProceduralFlowers(size=32, count=4)
    >>> tuple(flowers.images.shape), flowers.classes[0], sorted(flowers.factors)[:3]
    ((4, 3, 32, 32), 'daisy', ['background_hue', 'background_value', 'hue'])
    """

    def __init__(self, size: int = 32, count: int = 2000, seed: int = 0):
        if size < 16:
            raise ValueError(f"size is {size}: a flower needs at least 16 pixels, and 32 to look like one")
        if count < 1:
            raise ValueError(f"count is {count}: at least 1 flower must be drawn")
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(len(SPECIES), (count,), generator=generator)
        self.factors = _draw_factors(labels, generator)
        chunks = zip(labels.split(100), *(f.split(100) for f in self.factors.values()))
        pictures = [_paint(size, chunk, dict(zip(self.factors, factors))) for chunk, *factors in chunks]
        super().__init__(to_uint8(torch.cat(pictures)), labels, tuple(SPECIES))


def _species_table(labels: Tensor) -> list[Tensor]:
    """Each column of SPECIES as a tensor, looked up for every label."""
    return [torch.tensor(column)[labels] for column in zip(*SPECIES.values())]


def _draw_factors(labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(labels), generator=generator)

    petals, _, _, _, hue, *_ = _species_table(labels)
    return {
        "petals": petals.float(),
        "hue": (hue[:, 0] + uniform(-1, 1) * hue[:, 1]) % 1,
        "radius": uniform(0.60, 0.88),
        "x": uniform(-0.06, 0.06),
        "y": uniform(-0.06, 0.06),
        "rotation": uniform(-0.1, 0.1) - math.pi / 2,  # one petal more or less on top
        "tilt": uniform(0, 0.6),
        "tilt_direction": uniform(-0.3, 0.3) + math.pi / 2,  # seen from in front and above
        "background_hue": uniform(0.22, 0.45),
        "background_value": uniform(0.12, 0.48),
    }


def _hsv_to_rgb(hue: Tensor, saturation: Tensor | float, value: Tensor | float) -> Tensor:
    """(B,) each, in 0..1 -> (B, 3, 1, 1) in 0..1."""
    ramps = [((hue + shift) % 1 * 6 - 3).abs().sub(1).clamp(0, 1) for shift in (0, 2 / 3, 1 / 3)]
    rgb = [value * (1 - saturation + saturation * ramp) for ramp in ramps]
    return torch.stack(rgb, 1)[:, :, None, None]


def _paint(size: int, labels: Tensor, factors: dict[str, Tensor]) -> Tensor:
    """float32 (B, 3, size, size) in [-1, 1], painted at twice the size in layers from back to front, then averaged down."""
    f = {name: value.view(-1, 1, 1) for name, value in factors.items()}
    columns = _species_table(labels)
    _, width, point, notch, _, saturation, value, centre, centre_rgb, whorl = (c.view(-1, 1, 1) if c.ndim == 1 else c for c in columns)
    fine = 2 * size
    axis = (torch.arange(fine) + 0.5) / size - 1
    y, x = axis.view(1, -1, 1), axis.view(1, 1, -1)
    soft = 1.2 / size  # half the width of a soft edge

    def over(picture: Tensor, cover: Tensor, colour: Tensor) -> Tensor:
        return picture + cover.clamp(0, 1).unsqueeze(1) * (colour - picture)

    # Background: from a lit to a dark side, with two soft discs of light out of focus, and the flower's own shadow
    far = _hsv_to_rgb(factors["background_hue"], 0.55, factors["background_value"])
    slope = (0.5 + 0.35 * (x * f["tilt_direction"].cos() - y)).clamp(0, 1).unsqueeze(1)
    picture = far * (0.55 + 0.9 * slope)
    for k in (1, 2):
        angle = f["tilt_direction"] + 2.4 * k
        glow = torch.exp(-(((x - 0.9 * angle.cos()) ** 2 + (y - 0.9 * angle.sin()) ** 2) / (0.12 * k)))
        picture = over(picture, 0.35 * glow, far * 1.5 + 0.08)
    dx, dy = x - f["x"], y - f["y"]
    shadow = torch.exp(-((((dx - 0.06) ** 2 + (dy - 0.10) ** 2) / (f["radius"] * 0.85) ** 2) ** 2))
    picture = over(picture, 0.55 * shadow, picture * 0.25)

    # The flower's own plane: tilted about an axis, then polar
    along = dx * f["tilt_direction"].cos() + dy * f["tilt_direction"].sin()
    stretch = 1 / f["tilt"].cos() - 1
    px = dx + along * stretch * f["tilt_direction"].cos()
    py = dy + along * stretch * f["tilt_direction"].sin()
    r, theta = (px**2 + py**2).sqrt() / f["radius"], torch.atan2(py, px)
    light = (1 - 0.13 * (px + py) / f["radius"]).unsqueeze(1)  # from the upper left
    petal = _hsv_to_rgb(factors["hue"], saturation.flatten(), value.flatten())
    throat = _hsv_to_rgb(factors["hue"] + 0.03, (saturation.flatten() + 0.25).clamp(max=1), value.flatten() * 0.62)

    def whorl_of_petals(picture: Tensor, turn: Tensor, length: float, brightness: float, cover: Tensor) -> Tensor:
        turns = (theta - f["rotation"]) * f["petals"] / (2 * math.pi) + turn
        u = (2 * (turns - turns.round())) / width  # across one petal: 0 on its middle line, 1 at its edge
        across = u.abs().clamp(max=1)
        edge = length * (1 - across ** (1.6 + point.clamp(max=1))) ** (0.5 * point) * (1 - notch * torch.exp(-((u / 0.22) ** 2)))
        seam = 1 - 0.45 * across**4  # petals darken where they meet
        vein = 1 + 0.05 * torch.cos(9 * u) * r.clamp(0, 1)
        blend = (1.15 * r).clamp(0, 1).unsqueeze(1)
        colour = (throat + blend**0.8 * (petal * 1.03 - throat)) * (seam * vein).unsqueeze(1) * light * brightness
        inside = (edge - r) * f["radius"] / (2 * soft) + 0.5
        return over(picture, inside.clamp(0, 1) * cover, colour.clamp(0, 1))

    picture = whorl_of_petals(picture, torch.tensor(0.5), 0.94, 0.74, whorl)
    picture = whorl_of_petals(picture, torch.tensor(0.0), 1.0, 1.0, torch.ones(()))

    # The centre: a dome with a rim of stamens
    rim = (1.35 * centre - r) * f["radius"] / (3 * soft) + 0.5
    picture = over(picture, 0.35 * rim.clamp(0, 1), picture * 0.35)
    grain = 1 + 0.16 * torch.cos(5 * theta + 8 * r / centre) * (r / centre)
    dome = centre_rgb[:, :, None, None] * ((1.15 - 0.55 * (r / centre) ** 2).clamp(min=0.4) * grain).unsqueeze(1) * light
    picture = over(picture, (centre - r) * f["radius"] / (2 * soft) + 0.5, dome.clamp(0, 1))
    return torch.nn.functional.avg_pool2d(picture.clamp(0, 1), 2) * 2 - 1


def species_labels(names: str | Sequence[str], classes: Sequence[str]) -> Tensor:
    """int64 labels of one species or several, by name. An unknown one raises ValueError and suggests the nearest.

    >>> species_labels(["daisy", "cosmos"], tuple(SPECIES)).tolist()
    [0, 3]
    """
    names = [names] if isinstance(names, str) else names
    for name in names:
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=3, cutoff=0.5) or sorted(classes)[:3]
            raise ValueError(f"unknown species {name!r}: did you mean {' or '.join(map(repr, near))}? All {len(classes)} are in `classes`")
    return torch.tensor([classes.index(name) for name in names], dtype=torch.int64)


def load_data(profile, split: str = "train") -> FlowerImages:
    """The profile's data set: `split` is "train" or "val"; embedded flowers have 512 of their own for "val"."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(map(repr, SPLITS))}")
    if profile.dataset == "flowers102":
        return Flowers102(profile.image_size, split)
    count, seed = (profile.train_images, 0) if split == "train" else (VAL_IMAGES, VAL_SEED)
    return ProceduralFlowers(profile.image_size, count, seed)


def measure_factors(images: Tensor) -> dict[str, Tensor]:
    """What a picture shows of its factors, found from its pixels alone: images float (B, 3, H, W) in [-1, 1].

    size: share of the picture that the flower covers, where the colour is far from the border's; background: mean
    brightness of the border; red_green and yellow_blue: the flower's mean colour on the two opponent axes (its hue,
    without the jump of an angle from 1 to 0). Each is float32 (B,).
    """
    images = images.float().clamp(-1, 1)
    side = images.shape[-1]
    border = torch.ones(side, side, dtype=torch.bool)
    border[side // 10 + 1 : -(side // 10) - 1, side // 10 + 1 : -(side // 10) - 1] = False
    colour = images[:, :, border].median(dim=2).values[:, :, None, None]
    flower = ((images - colour).norm(dim=1) > 0.6).float()
    red, green, blue = ((images * flower[:, None]).sum((2, 3)) / (flower.sum((1, 2))[:, None] + 1)).unbind(1)
    return {
        "size": flower.mean((1, 2)),
        "background": images[:, :, border].mean((1, 2)),
        "red_green": red - green,
        "yellow_blue": (red + green) / 2 - blue,
    }


def factor_distance(images: Tensor, reference: Tensor) -> dict[str, float]:
    """How far two sets of pictures lie apart in each measured factor, and their "mean".

    The distance is Wasserstein's in one dimension (the mean gap between the sorted values), in units of the
    reference's standard deviation: 0 for the same distribution, 1 where it is shifted by its own width.
    """
    measured, expected = measure_factors(images), measure_factors(reference)
    levels = (torch.arange(100) + 0.5) / 100
    distance = {
        name: float((value.quantile(levels) - expected[name].quantile(levels)).abs().mean() / expected[name].std())
        for name, value in measured.items()
    }
    return distance | {"mean": sum(distance.values()) / len(distance)}
