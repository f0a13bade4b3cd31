"""Stage 1, the data: Oxford Flowers102, and flowers drawn by formula that need no download.

Both come as a `FlowerImages` data set: every picture decoded once and kept as uint8, so that no epoch decodes
a JPEG again. An item is `(image, label)` with the image as float32 in [-1, 1], the range that diffusion works in.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.utils.data import Dataset
from torchvision import datasets
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

REPOSITORY = Path(__file__).resolve().parent.parent
SPLITS = {"train": ("train", "test"), "val": ("val",)}  # torchvision's splits behind ours
VAL_IMAGES = 512  # procedural pictures held out, drawn with another seed


def to_float(images: Tensor) -> Tensor:
    """uint8 (..., H, W) in 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float (..., H, W) in [-1, 1] -> uint8 in 0..255, clamped and rounded (a plain cast would cut off)."""
    return ((images.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


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
            raise RuntimeError(
                f"Flowers102 is not in {root} and could not be downloaded there ({error}). Connect to the network "
                "and try again, or set NOISOUT_DATA to a folder that holds 'flowers-102', "
                "or set NOISOUT_PROFILE=quick for the embedded flowers, which need no download."
            ) from error
        files = [file for part in parts for file in part._image_files]
        labels = torch.tensor([label for part in parts for label in part._labels])
        missing = [file for file in files if not file.exists()]
        if missing:
            raise RuntimeError(
                f"Flowers102 in {root} is incomplete: {len(missing)} of {len(files)} photographs are missing, "
                f"{missing[0].name} for one. Delete the folder {missing[0].parent.parent} and run again to download it anew."
            )
        super().__init__(_decode(files, size), labels, datasets.Flowers102.classes)


def _decode(files: list[Path], size: int) -> Tensor:
    def decode(file: Path) -> Tensor:
        try:
            return resize_and_crop(decode_image(str(file), ImageReadMode.RGB), size)
        except RuntimeError as error:
            raise RuntimeError(f"{file} is not a readable JPEG ({error}). Delete {file.parent.parent} and run again.") from error

    with ThreadPoolExecutor() as pool:
        return torch.stack(list(pool.map(decode, files)))


@dataclass(frozen=True)
class Species:
    """What the flowers of one species share: ranges of the factors, the shape of a petal, the colours of its heart."""

    petals: tuple[int, int]
    hue: tuple[float, float]  # in turns: 0 red, 1/3 green, 2/3 blue
    saturation: float
    value: float
    width: float  # half the petal's width / its length
    base: float  # width ~ u^base (1 - u)^tip at u of the way along the petal: a high base
    tip: float  # makes a slim claw, a low tip a round end
    notch: float  # > 0 cuts a heart into the tip, < 0 draws it to a point
    layer: float  # length of a second ring of petals behind the first (0: none)
    throat: tuple[float, float, float, float]  # hue, saturation, value, reach: the colour at the petal's foot
    disc: tuple[float, float, float, float]  # hue, saturation, value, radius: the button in the middle


SPECIES = {
    "poppy": Species((4, 4), (-0.02, 0.04), 0.92, 0.92, 0.62, 0.60, 0.30, 0.00, 0.0, (0.95, 0.75, 0.16, 0.34), (0.22, 0.45, 0.42, 0.15)),
    "buttercup": Species((5, 6), (0.125, 0.165), 0.90, 0.98, 0.46, 0.75, 0.38, 0.06, 0.0, (0.09, 0.95, 0.80, 0.30), (0.16, 0.75, 0.72, 0.19)),
    "lily": Species((3, 3), (0.03, 0.09), 0.70, 1.00, 0.27, 0.75, 0.85, -0.10, 1.0, (0.20, 0.55, 0.80, 0.32), (0.06, 0.85, 0.50, 0.09)),
    "periwinkle": Species((5, 5), (0.60, 0.72), 0.66, 0.92, 0.42, 1.15, 0.34, 0.05, 0.0, (0.70, 0.04, 1.00, 0.30), (0.14, 0.75, 0.95, 0.09)),
    "cosmos": Species((8, 8), (0.84, 0.94), 0.62, 0.95, 0.27, 0.90, 0.28, 0.10, 0.0, (0.90, 0.85, 0.55, 0.36), (0.125, 0.88, 0.92, 0.19)),
    "daisy": Species((11, 14), (0.08, 0.16), 0.07, 0.98, 0.16, 0.60, 0.35, 0.00, 0.94, (0.18, 0.30, 0.80, 0.36), (0.125, 0.92, 0.95, 0.27)),
}


class ProceduralFlowers(FlowerImages):
    """Flowers drawn by formula from known factors: no download, no licence, the same pixels on every machine.

    `factors` maps each factor's name to a tensor (N,): `petals` (a count), `hue` (in turns), `radius` and `cx`, `cy`
    (in half frames, y downwards), `rotation`, `tilt` and `lean` (radians: how far and which way the flower leans),
    `background_hue` (in turns), `background` (brightness). Another seed gives an independent sample of the same distribution.
    Raises ValueError for a size below 16 or a count below 1.

    >>> flowers = ProceduralFlowers(size=32, count=6, seed=0)
    >>> flowers.images.shape, flowers.images.dtype, len(flowers.classes)
    (torch.Size([6, 3, 32, 32]), torch.uint8, 6)
    """

    def __init__(self, size: int = 32, count: int = 2000, seed: int = 0):
        if size < 16:
            raise ValueError(f"size is {size}, but a flower needs at least 16 pixels: choose size >= 16, for example 32")
        if count < 1:
            raise ValueError(f"count is {count}: choose at least 1 flower")
        generator = torch.Generator().manual_seed(seed)

        def uniform(low, high, *shape):
            return low + (high - low) * torch.rand(count, *shape, dtype=torch.float64, generator=generator)

        labels = torch.randint(len(SPECIES), (count,), generator=generator)
        kind = {f.name: torch.tensor([getattr(s, f.name) for s in SPECIES.values()], dtype=torch.float64)[labels] for f in fields(Species)}
        self.factors = {
            "petals": uniform(kind["petals"][:, 0], kind["petals"][:, 1] + 1).floor(),
            "hue": uniform(*kind["hue"].T) % 1,
            "radius": uniform(0.58, 0.84),
            "rotation": uniform(-0.5, 0.5),
            "tilt": uniform(0.0, 0.75),
            "lean": uniform(0.9, 2.3),
            "cx": uniform(-0.14, 0.14),
            "cy": uniform(-0.14, 0.10),
            "background_hue": uniform(0.20, 0.42),
            "background": uniform(0.12, 0.55),
        }
        details = {"petal": uniform(-1, 1, 2, 16), "bokeh": uniform(-1, 1, 5, 4)}  # what varies, but nobody needs to know
        parts = {**kind, **self.factors, **details}
        step = max(1, 2**15 // size**2)  # pictures drawn at once: few enough for the processor's cache
        images = [_draw(size, {name: v[i : i + step] for name, v in parts.items()}) for i in range(0, count, step)]
        super().__init__(torch.cat(images), labels, tuple(SPECIES))


def _smooth(low, high, x: Tensor) -> Tensor:
    """0 below `low`, 1 above `high`, a smooth S between."""
    x = ((x - low) / (high - low)).clamp(0, 1)
    return x * x * (3 - 2 * x)


def _rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Hue in turns, saturation and value in 0..1, each (...) -> RGB (..., 3)."""
    k = (hue[..., None] * 6 + torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64)) % 6
    return value[..., None] * (1 - saturation[..., None] * torch.minimum(k, 4 - k).clamp(0, 1))


def _grid(size: int) -> tuple[Tensor, Tensor]:
    """x and y (size, size) of the pixels' centres in a frame from -1 to 1."""
    ticks = (torch.arange(size, dtype=torch.float64) + 0.5) * 2 / size - 1
    return ticks.expand(size, size), ticks[:, None].expand(size, size)


def _meadow(size: int, p: dict[str, Tensor]) -> Tensor:
    """The background (B, size, size, 3): a meadow out of focus, darker towards the ground, with a few soft lights."""
    x, y = _grid(size)
    p = {name: value[..., None, None] for name, value in p.items()}
    canvas = _rgb(p["background_hue"] - 0.04 * y, 0.6 + 0 * y, p["background"] * (1 - 0.35 * y) + 0.04)
    for dx, dy, wide, glow in (blob.unbind(1) for blob in p["bokeh"].unbind(1)):
        disc = 1 - _smooth(0.6, 1.0, (x - 1.1 * dx).hypot(y - 1.1 * dy) / (0.40 + 0.18 * wide))
        canvas = canvas + ((0.05 + 0.04 * glow) * disc)[..., None] * torch.tensor([0.9, 1.0, 0.5], dtype=torch.float64)
    return canvas


def _flower(size: int, p: dict[str, Tensor]) -> Tensor:
    """The flower (B, size, size, 4): red, green, blue, each times the opacity, and the opacity."""
    # Into the flower's own plane: shifted to its centre, tilted away, and cupped (what stands higher is seen shifted).
    x, y = _grid(size)
    radius, cos, sin, tilt, cx, cy = (v[:, None, None] for v in (p["radius"], p["lean"].cos(), p["lean"].sin(), p["tilt"], p["cx"], p["cy"]))
    x, y = (x - cx) / radius, (y - cy) / radius
    up, side = x * cos + y * sin, y * cos - x * sin
    up = (up + 0.2 * tilt.sin() * (up**2 + side**2)) / tilt.cos()
    x, y = up * cos - side * sin, up * sin + side * cos
    near = x.hypot(y) < 1.1  # only these pixels need a closer look: from here on a list of M pixels, b saying whose
    b, x, y = near.nonzero()[:, 0], x[near], y[near]
    edge, angle, paint = 3 / size / p["radius"], torch.atan2(y, x), x.new_zeros(len(x), 4)
    sector = 2 * torch.pi / p["petals"]
    foot = _rgb(*p["throat"].T[:3])
    inner, outer = (_rgb(p["hue"] + shift, (p["saturation"] * s).clamp(max=1), p["value"]) for shift, s in ((-0.015, 1.15), (0.015, 0.85)))

    for layer in (1, 0):  # the ring behind, half a petal further round, then the ring in front
        reach = p["layer"] if layer else torch.ones_like(p["layer"])
        m = (reach[b] > 0).nonzero()[:, 0]
        i = b[m]
        turn = p["rotation"] + layer * sector / 2 - torch.pi / 2
        axes = turn[:, None] + (torch.arange(16) + 0.07 * p["petal"][:, layer]) * sector[:, None]
        nearest = ((angle[m] - turn[i]) / sector[i]).round().long()
        width, base, tip = p["width"][i], p["base"][i], p["tip"][i]
        peak = base / (base + tip)
        scale = 1 / (peak**base * (1 - peak) ** tip)
        for neighbour in (-1, 0, 1):  # each petal lies over the one before it, all round the flower
            index = (nearest + neighbour) % p["petals"][i].long()
            jitter, axis = p["petal"][i, layer, index], axes[i, index]
            length = reach[i] * (1 + 0.05 * jitter)
            c, s = axis.cos(), axis.sin()
            u, v = (x[m] * c + y[m] * s) / length, (y[m] * c - x[m] * s) / length  # along the petal, across it
            across = v / width
            t = u + p["notch"][i] * (1 - across.abs()).clamp(min=0) ** 2
            shape = scale * t.clamp(0, 1) ** base * (1 - t).clamp(0, 1) ** tip
            inside = (shape - across.abs()) * width  # > 0 on the petal, about the distance to its edge
            alpha = (_smooth(-1, 1, inside / edge[i]) * ((t > 0) & (t < 1)))[:, None]
            shadow = (_smooth(-0.14, 0.05, inside) * (u > 0))[:, None]

            # Colour: from the throat outwards, veined; a petal curves, so one flank and the tip catch the light.
            across = (across / (shape + 0.1)).clamp(-1, 1)
            veins = 0.05 * (11 * across).cos() * u + 0.10 * torch.exp(-((across / 0.12) ** 2)) * (1 - u)
            light = 0.93 + 0.16 * across * (s * 0.83 - c * 0.56) + 0.10 * (u - 0.6) * (1 + c * 0.59 + s * 0.81) - veins + 0.03 * jitter - 0.13 * layer
            petal = inner[i] + (outer[i] - inner[i]) * u[:, None]
            petal = foot[i] + (petal - foot[i]) * _smooth(0.3, 1.0, u / p["throat"][i, 3] - 0.1 * (9 * across).cos())[:, None]
            petal = torch.cat([(petal * light[:, None]).clamp(0, 1), torch.ones_like(alpha)], 1)
            under = paint[m] * (1 - shadow * torch.tensor([0.35, 0.35, 0.35, 0]).double())
            paint[m] = under + (petal - under) * alpha

    # The heart: a dome of little florets set in two families of spirals, on a soft shadow.
    hue, saturation, value, wide = p["disc"][b].unbind(1)
    r = x.hypot(y) / wide
    florets = ((13 * angle + 9 * r).cos() + (8 * angle - 9 * r).cos()) * _smooth(0.1, 0.6, r)
    dome = value * (0.86 + 0.09 * florets - 0.20 * r * (angle - 0.9).cos() - 0.18 * _smooth(0.65, 1.0, r))
    dome = torch.cat([_rgb(hue + 0.02 * (1 - r), saturation, dome), torch.ones_like(r)[:, None]], 1)
    paint[:, :3] *= 1 - 0.4 * (1 - _smooth(0.7, 1.6, r))[:, None]
    paint = paint + (dome - paint) * (1 - _smooth(-1, 1, (r - 1) * wide / edge[b]))[:, None]
    flower = x.new_zeros(*near.shape, 4)
    flower[near] = paint
    return flower


def _draw(size: int, p: dict[str, Tensor]) -> Tensor:
    """Factors of B flowers -> uint8 (B, 3, size, size). The flower is drawn at twice the size and averaged: soft edges."""
    flower = avg_pool2d(_flower(2 * size, p).permute(0, 3, 1, 2), 2)
    canvas = _meadow(size, p).permute(0, 3, 1, 2) * (1 - flower[:, 3:]) + flower[:, :3]
    return (canvas.clamp(0, 1) * 255).round().to(torch.uint8)


def load_data(profile, split: str = "train") -> FlowerImages:
    """The data set that a profile names: its fields `dataset`, `image_size` and `train_images` decide.

    `split` is "train", or "val" for pictures held out of training (512 of them, if procedural). Raises ValueError otherwise.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(map(repr, SPLITS))}")
    if profile.dataset == "procedural":
        count, seed = {"train": (profile.train_images, 0), "val": (VAL_IMAGES, 1)}[split]
        return ProceduralFlowers(profile.image_size, count, seed)
    if profile.dataset == "flowers102":
        return Flowers102(profile.image_size, split)
    raise ValueError(f"unknown data set {profile.dataset!r}: choose 'procedural' or 'flowers102'")


# The embedded flowers: species -> petals (from, to), petal width, pointedness, notch of the tip,
# hue of the petals (middle, half range), saturation, value, size of the centre, colour of the centre, second whorl
SPECIES = {
    "daisy": ((9, 11), 0.80, 0.9, 0.00, (0.13, 0.05), 0.08, 1.00, 0.30, (0.98, 0.76, 0.12), 1.0),
    "poppy": ((4, 4), 1.35, 0.5, 0.00, (0.01, 0.03), 0.88, 0.92, 0.24, (0.16, 0.12, 0.14), 0.6),
    "forget-me-not": ((5, 5), 1.10, 0.5, 0.18, (0.61, 0.05), 0.62, 0.95, 0.19, (0.99, 0.85, 0.25), 0.0),
    "cosmos": ((7, 8), 1.00, 0.6, 0.07, (0.88, 0.04), 0.62, 0.96, 0.22, (0.97, 0.74, 0.15), 0.0),
    "sunflower": ((11, 13), 0.90, 1.5, 0.00, (0.125, 0.025), 0.92, 1.00, 0.46, (0.36, 0.20, 0.10), 1.0),
    "starflower": ((6, 6), 0.85, 1.5, 0.00, (0.75, 0.04), 0.60, 0.90, 0.17, (0.98, 0.95, 0.62), 0.7),
}
VAL_IMAGES, VAL_SEED = 512, 1_000_003


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
        if size < 16 or count < 1:
            raise ValueError(f"size is {size} and count {count}: flowers need at least 16 pixels, and there must be one of them")
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
        "petals": (petals[:, 0] + uniform(0, 1) * (petals[:, 1] - petals[:, 0] + 1)).floor(),
        "hue": (hue[:, 0] + uniform(-1, 1) * hue[:, 1]) % 1,
        "radius": uniform(0.58, 0.86),
        "x": uniform(-0.14, 0.14),
        "y": uniform(-0.14, 0.14),
        "rotation": uniform(0, 2 * math.pi),
        "tilt": uniform(0, 0.75),
        "tilt_direction": uniform(0, 2 * math.pi),
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


def load_data(profile, split: str = "train") -> FlowerImages:
    """The profile's data set: `split` is "train" or "val"; embedded flowers have 512 of their own for "val"."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(map(repr, SPLITS))}")
    if profile.dataset == "flowers102":
        return Flowers102(profile.image_size, split)
    if profile.dataset == "procedural":
        if split == "val":
            return ProceduralFlowers(profile.image_size, VAL_IMAGES, VAL_SEED)
        return ProceduralFlowers(profile.image_size, profile.train_images)
    raise ValueError(f"unknown dataset {profile.dataset!r}: choose 'procedural' or 'flowers102'")


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
