"""The embedded flowers' formula: known factors in, images out. Plain functions on tensors."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Species(NamedTuple):
    """What all flowers of one species share; colours are in 0..1."""

    petals: int
    petal_width: float  # 1: the petals just touch at their base
    pointedness: float
    notch: float  # depth of the notch in a petal's tip, in petal lengths
    hue: float
    hue_range: float  # hues lie in hue - hue_range .. hue + hue_range
    saturation: float
    value: float
    centre_radius: float  # in petal lengths
    centre_rgb: tuple[float, float, float]
    second_whorl: float  # opacity of the petals behind the first ones


SPECIES = {
    "daisy": Species(
        petals=10,
        petal_width=0.80,
        pointedness=0.9,
        notch=0.0,
        hue=0.13,
        hue_range=0.05,
        saturation=0.08,
        value=1.0,
        centre_radius=0.30,
        centre_rgb=(0.98, 0.76, 0.12),
        second_whorl=1.0,
    ),
    "poppy": Species(
        petals=4,
        petal_width=1.35,
        pointedness=0.5,
        notch=0.0,
        hue=0.01,
        hue_range=0.03,
        saturation=0.88,
        value=0.92,
        centre_radius=0.24,
        centre_rgb=(0.16, 0.12, 0.14),
        second_whorl=0.6,
    ),
    "forget-me-not": Species(
        petals=5,
        petal_width=1.10,
        pointedness=0.5,
        notch=0.18,
        hue=0.61,
        hue_range=0.05,
        saturation=0.62,
        value=0.95,
        centre_radius=0.19,
        centre_rgb=(0.99, 0.85, 0.25),
        second_whorl=0.0,
    ),
    "cosmos": Species(
        petals=8,
        petal_width=1.00,
        pointedness=0.6,
        notch=0.07,
        hue=0.88,
        hue_range=0.04,
        saturation=0.62,
        value=0.96,
        centre_radius=0.22,
        centre_rgb=(0.97, 0.74, 0.15),
        second_whorl=0.0,
    ),
    "sunflower": Species(
        petals=12,
        petal_width=0.90,
        pointedness=1.5,
        notch=0.0,
        hue=0.125,
        hue_range=0.025,
        saturation=0.92,
        value=1.0,
        centre_radius=0.46,
        centre_rgb=(0.36, 0.20, 0.10),
        second_whorl=1.0,
    ),
    "starflower": Species(
        petals=6,
        petal_width=0.85,
        pointedness=1.5,
        notch=0.0,
        hue=0.75,
        hue_range=0.04,
        saturation=0.60,
        value=0.90,
        centre_radius=0.17,
        centre_rgb=(0.98, 0.95, 0.62),
        second_whorl=0.7,
    ),
}


def draw_factors(labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """What tells flowers of one species apart: name -> float32 (B,), for int64 `labels` (B,)."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(labels), generator=generator)

    species = _look_up(labels)
    return {
        "petals": species["petals"].float(),
        "hue": (species["hue"] + uniform(-1, 1) * species["hue_range"]) % 1,
        "radius": uniform(0.60, 0.88),
        "x": uniform(-0.06, 0.06),
        "y": uniform(-0.06, 0.06),
        "rotation": uniform(-0.1, 0.1) - math.pi / 2,  # more or less with one petal on top
        "tilt": uniform(0, 0.6),
        "tilt_direction": uniform(-0.3, 0.3) + math.pi / 2,  # seen from in front and above
        "background_hue": uniform(0.22, 0.45),
        "background_value": uniform(0.12, 0.48),
    }


def paint(size: int, labels: Tensor, factors: dict[str, Tensor]) -> Tensor:
    """Flowers of the species `labels` (B,) with `factors`: float32 (B, 3, size, size) in [-1, 1].

    They are painted at twice the size, in layers from back to front, then averaged down.
    """
    species = _look_up(labels)
    axis = (torch.arange(2 * size) + 0.5) / size - 1
    y, x = axis.view(1, -1, 1), axis.view(1, 1, -1)
    soft = 1.2 / size  # half the width of a soft edge
    plane = _flower_plane(x, y, factors)

    image = _background(x, y, factors)
    image = _whorl(image, plane, species, factors, soft, behind=True)
    image = _whorl(image, plane, species, factors, soft, behind=False)
    image = _centre(image, plane, species, factors, soft)
    return torch.nn.functional.avg_pool2d(image.clamp(0, 1), 2) * 2 - 1


def _look_up(labels: Tensor) -> dict[str, Tensor]:
    """The fields of `Species` for each label: (B,), and `centre_rgb` (B, 3)."""
    columns = zip(Species._fields, zip(*SPECIES.values(), strict=True), strict=True)
    return {name: torch.tensor(column)[labels] for name, column in columns}


class _Plane(NamedTuple):
    """Every pixel in the flower's own plane, (B, H, W): polar coordinates, and the light on it."""

    r: Tensor  # 1 at the petals' tips
    theta: Tensor
    light: Tensor


def _flower_plane(x: Tensor, y: Tensor, factors: dict[str, Tensor]) -> _Plane:
    """The plane is tilted: seen at an angle, it looks shorter along `tilt_direction`."""
    f = _per_pixel(factors)
    dx, dy = x - f["x"], y - f["y"]
    cos, sin = f["tilt_direction"].cos(), f["tilt_direction"].sin()
    along = dx * cos + dy * sin
    stretch = 1 / f["tilt"].cos() - 1
    px = dx + along * stretch * cos
    py = dy + along * stretch * sin
    r = (px**2 + py**2).sqrt() / f["radius"]
    light = 1 - 0.13 * (px + py) / f["radius"]  # from the upper left
    return _Plane(r, torch.atan2(py, px), light.unsqueeze(1))


def _background(x: Tensor, y: Tensor, factors: dict[str, Tensor]) -> Tensor:
    """From a lit to a dark side, with two discs of light out of focus, and the flower's shadow."""
    f = _per_pixel(factors)
    far = _hsv_to_rgb(factors["background_hue"], 0.55, factors["background_value"])
    slope = (0.5 + 0.35 * (x * f["tilt_direction"].cos() - y)).clamp(0, 1).unsqueeze(1)
    image = far * (0.55 + 0.9 * slope)
    for k in (1, 2):
        angle = f["tilt_direction"] + 2.4 * k
        distance = (x - 0.9 * angle.cos()) ** 2 + (y - 0.9 * angle.sin()) ** 2
        image = _over(image, 0.35 * torch.exp(-(distance / (0.12 * k))), far * 1.5 + 0.08)
    dx, dy = x - f["x"], y - f["y"]
    distance = ((dx - 0.06) ** 2 + (dy - 0.10) ** 2) / (f["radius"] * 0.85) ** 2
    return _over(image, 0.55 * torch.exp(-(distance**2)), image * 0.25)


def _whorl(
    image: Tensor,
    plane: _Plane,
    species: dict[str, Tensor],
    factors: dict[str, Tensor],
    soft: float,
    behind: bool,
) -> Tensor:
    """One ring of petals; the one `behind` is turned by half a petal, shorter and darker."""
    f, s = _per_pixel(factors), _per_pixel(species)
    turn, length, brightness = (0.5, 0.94, 0.74) if behind else (0.0, 1.0, 1.0)
    cover = s["second_whorl"] if behind else 1.0
    turns = (plane.theta - f["rotation"]) * f["petals"] / (2 * math.pi) + turn
    u = (2 * (turns - turns.round())) / s[
        "petal_width"
    ]  # 0 on a petal's middle line, 1 at its edge
    across, point = u.abs().clamp(max=1), s["pointedness"]
    outline = length * (1 - across ** (1.6 + point.clamp(max=1))) ** (0.5 * point)
    edge = outline * (1 - s["notch"] * torch.exp(-((u / 0.22) ** 2)))

    petal = _hsv_to_rgb(factors["hue"], species["saturation"], species["value"])
    throat = _hsv_to_rgb(
        factors["hue"] + 0.03, (species["saturation"] + 0.25).clamp(max=1), species["value"] * 0.62
    )
    seam = 1 - 0.45 * across**4  # petals darken where they meet
    vein = 1 + 0.05 * torch.cos(9 * u) * plane.r.clamp(0, 1)
    blend = (1.15 * plane.r).clamp(0, 1).unsqueeze(1)
    colour = throat + blend**0.8 * (petal * 1.03 - throat)
    colour = colour * (seam * vein).unsqueeze(1) * plane.light * brightness
    inside = (edge - plane.r) * f["radius"] / (2 * soft) + 0.5
    return _over(image, inside.clamp(0, 1) * cover, colour.clamp(0, 1))


def _centre(
    image: Tensor,
    plane: _Plane,
    species: dict[str, Tensor],
    factors: dict[str, Tensor],
    soft: float,
) -> Tensor:
    """A dome with a rim of stamens."""
    radius = _per_pixel(factors)["radius"]
    centre = species["centre_radius"].view(-1, 1, 1)
    rim = (1.35 * centre - plane.r) * radius / (3 * soft) + 0.5
    image = _over(image, 0.35 * rim.clamp(0, 1), image * 0.35)
    grain = 1 + 0.16 * torch.cos(5 * plane.theta + 8 * plane.r / centre) * (plane.r / centre)
    shade = (1.15 - 0.55 * (plane.r / centre) ** 2).clamp(min=0.4) * grain
    dome = species["centre_rgb"][:, :, None, None] * shade.unsqueeze(1) * plane.light
    return _over(image, (centre - plane.r) * radius / (2 * soft) + 0.5, dome.clamp(0, 1))


def _per_pixel(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """(B,) each -> (B, 1, 1), to be combined with images (B, H, W)."""
    return {name: column.view(len(column), -1, 1) for name, column in columns.items()}


def _over(image: Tensor, cover: Tensor, colour: Tensor) -> Tensor:
    """A layer of `colour` over the image, with opacity `cover` (B, H, W)."""
    return image + cover.clamp(0, 1).unsqueeze(1) * (colour - image)


def _hsv_to_rgb(hue: Tensor, saturation: Tensor | float, value: Tensor | float) -> Tensor:
    """(B,) each, in 0..1 -> (B, 3, 1, 1) in 0..1."""
    ramps = [((hue + shift) % 1 * 6 - 3).abs().sub(1).clamp(0, 1) for shift in (0, 2 / 3, 1 / 3)]
    rgb = [value * (1 - saturation + saturation * ramp) for ramp in ramps]
    return torch.stack(rgb, 1)[:, :, None, None]
