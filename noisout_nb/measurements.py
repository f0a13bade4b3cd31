"""What images show, measured from their pixels alone: factors, petals, texture.

Unlike features these numbers have names, so they say *what* is wrong with samples. The embedded
flowers' factors are known, which makes their measurement testable.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

PETALS = range(3, 15)  # the counts that petal_count can tell apart


def check_images(images: Tensor, channels: int | None = None) -> None:
    """Raise ValueError unless images are float (N, C, H, W) in [-1, 1] with as many channels."""
    found = f"{images.dtype} {tuple(images.shape)}"
    if images.numel():
        found += f" from {images.min():.3g} to {images.max():.3g}"
    if images.ndim != 4 or 0 in images.shape or not images.is_floating_point():
        good = False
    else:
        good = bool(images.abs().max() <= 1.001)  # also False for NaN
    if not good:
        raise ValueError(
            f"images are {found}: they must be float (N, C, H, W) in [-1, 1]; "
            "see data.to_float, and clamp samples"
        )
    if channels is not None and images.shape[1] != channels:
        raise ValueError(
            f"images have {images.shape[1]} channels: this measurement needs {channels} (colour)"
        )


def check_features(
    features: Tensor,
    reference: Tensor,
    needed: int = 1,
    why: str = "are too few: each set needs at least one",
) -> None:
    """Raise ValueError unless both are finite (N, D) of one extractor, N at least `needed`."""
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features of shape {tuple(features.shape)} and {tuple(reference.shape)}: "
            "both must be (N, D) from one and the same extractor"
        )
    torch.cat([features[:0], reference[:0]])  # refused where two extractors made them
    if (fewest := min(len(features), len(reference))) < needed:
        raise ValueError(f"{fewest} images {why}")
    if not (features.isfinite().all() and reference.isfinite().all()):
        raise ValueError("features hold NaN or infinite values: check the network and the images")


def _flower_masks(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distance of each pixel's colour from the border's, the flower's mask, and the border's.

    float32 (B, H, W), float32 (B, H, W) of zeros and ones, bool (H, W).
    """
    height, width = images.shape[2:]
    edge = min(height, width) // 10 + 1
    border = torch.ones(height, width, dtype=torch.bool, device=images.device)
    border[edge:-edge, edge:-edge] = False
    colour = images[:, :, border].median(dim=2).values[:, :, None, None]
    distance = (images - colour).norm(dim=1)
    return distance, (distance > 0.6).float(), border


def measure_factors(images: Tensor) -> dict[str, Tensor]:
    """What an image shows of its factors: images float (B, 3, H, W) in [-1, 1] -> name -> (B,).

    size: share of the image that the flower covers, where the colour is far from the border's;
    background: mean brightness of the border; red_green and yellow_blue: the flower's mean colour
    on the two opponent axes (its hue, without the jump of an angle from 1 to 0). All float32.
    Raises ValueError for images out of range or without colour.
    """
    check_images(images, channels=3)
    images = images.float()
    _, flower, border = _flower_masks(images)
    area = flower.sum((1, 2))
    red, green, blue = ((images * flower[:, None]).sum((2, 3)) / (area[:, None] + 1)).unbind(1)
    return {
        "size": flower.mean((1, 2)),
        "background": images[:, :, border].mean((1, 2)),
        "red_green": red - green,
        "yellow_blue": (red + green) / 2 - blue,
    }


def factor_distance(images: Tensor, reference: Tensor) -> dict[str, float]:
    """How far two sets of images lie apart in each measured factor, and their "mean".

    The Wasserstein distance in one dimension (the mean gap between the sorted values), in units of
    the reference's standard deviation: 0 for the same distribution, 1 where it is shifted by its
    own width.
    """
    measured, expected = measure_factors(images), measure_factors(reference)
    levels = ((torch.arange(100) + 0.5) / 100).to(images.device)
    distance = {}
    for name, value in measured.items():
        gap = value.quantile(levels) - expected[name].quantile(levels)
        distance[name] = float(gap.abs().mean() / expected[name].std())
    return distance | {"mean": sum(distance.values()) / len(distance)}


def petal_count(images: Tensor) -> Tensor:
    """Number of petals, 3 to 14: images float (B, 3, H, W) in [-1, 1] -> int64 (B,).

    The flower is where the colour is far from the border's. Its second moments undo the tilt; then
    rings around its centre, at 0.6 to 0.85 of its radius, cross every petal once, so the strongest
    frequency of their Fourier transform is the count. 0 where there is no flower. Right for 99 % of
    the embedded flowers at 32 x 32. Raises ValueError for images out of range or without colour.
    """
    check_images(images, channels=3)
    images = images.float()
    distance, flower, _ = _flower_masks(images)
    rings = F.grid_sample(
        distance[:, None],
        _ring_positions(flower, radii=torch.linspace(0.6, 0.85, 6)),
        mode="bicubic",
        padding_mode="border",
        align_corners=False,
    )
    power = torch.fft.rfft(rings[:, 0], dim=-1).abs().square().sum(1)
    count = power[:, PETALS.start : PETALS.stop].argmax(1) + PETALS.start
    return count.where(flower.mean((1, 2)) > 0.02, 0)


def _ring_positions(flower: Tensor, radii: Tensor, points: int = 144) -> Tensor:
    """Positions on rings around each flower, in its own tilted plane: (B, rings, points, 2)."""
    height, width = flower.shape[1:]
    y = ((torch.arange(height, device=flower.device) + 0.5) / height * 2 - 1).view(-1, 1)
    x = ((torch.arange(width, device=flower.device) + 0.5) / width * 2 - 1).view(1, -1)

    def mean(values: Tensor) -> Tensor:
        return (flower * values).sum((1, 2)) / flower.sum((1, 2)).clamp(min=1)

    centre = torch.stack([mean(x), mean(y)], -1)
    dx, dy = x - centre[:, 0, None, None], y - centre[:, 1, None, None]
    moments = torch.stack([mean(dx * dx), mean(dx * dy), mean(dx * dy), mean(dy * dy)], -1)
    values, vectors = torch.linalg.eigh(moments.view(-1, 2, 2))
    # a disc of radius r has the variance r^2 / 4 along each axis
    axes = vectors @ torch.diag_embed(2 * values.clamp(min=0).sqrt()) @ vectors.mT
    angle = torch.arange(points, device=flower.device) / points * 2 * math.pi
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    circles = radii.to(flower.device).view(1, -1, 1, 1) * circle
    return circles @ axes[:, None] + centre[:, None, None]


def fine_power(images: Tensor, block: int = 8) -> Tensor:
    """Power of the finest details in blocks of `block` x `block` pixels: float32 (N, blocks).

    The finest details are the image less its 2 x 2 averages. Raises ValueError for images out of
    range and for sides that `block` does not divide.
    """
    check_images(images)
    height, width = images.shape[2:]
    if height % block or width % block or block % 2:
        raise ValueError(
            f"images of {height} x {width} pixels cannot be cut into blocks of {block}: choose an "
            "even divisor of both sides"
        )
    images = images.float()
    fine = images - F.interpolate(F.avg_pool2d(images, 2), scale_factor=2)
    return F.avg_pool2d(fine.square().mean(1, keepdim=True), block).flatten(1)


def fine_power_ratio(samples: Tensor, reference: Tensor, block: int = 8) -> dict[str, float]:
    """Fine power of samples over that of real images: {"plain": r, "median": r}, ideally both 1.

    "plain" compares the level below which the plainest twentieth of all blocks stays, where grain
    shows (above 1); "median" that of the median block, where texture shows, or lacks (below 1).
    """

    def levels(images: Tensor) -> list[float]:
        power = fine_power(images, block).flatten().sort().values
        return [power[int(level * (len(power) - 1))].item() for level in (0.05, 0.5)]

    (plain, median), (plain_r, median_r) = levels(samples), levels(reference)
    return {"plain": plain / plain_r, "median": median / median_r}
