"""Does a model copy its training images? Distances to the nearest of them, and what they tell."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .measurements import check_features, check_images

THUMBNAIL = 8  # pixels


def nearest(
    features: Tensor,
    training: Tensor,
    k: int = 10,
    *,
    mirrored: Tensor | None = None,
    batch_size: int = 256,
) -> tuple[Tensor, Tensor]:
    """Distances to the k nearest training images and their indices, each (N, k), nearest first.

    `mirrored`: features of the same images flipped; then a distance is the smaller one of both.
    Raises ValueError for features of different dimensions and for fewer than k training images.
    """
    check_features(features, training)
    check_features(training, training, k, f"have no {k}-th neighbour: take more, or a smaller k")
    if mirrored is not None and mirrored.shape != features.shape:
        raise ValueError(
            f"mirrored features of shape {tuple(mirrored.shape)} for {tuple(features.shape)}: "
            "give those of the same images, flipped"
        )
    found = []
    for start in range(0, len(features), batch_size):
        part = slice(start, start + batch_size)
        distance = torch.cdist(features[part].to(training), training)
        if mirrored is not None:
            distance = distance.minimum(torch.cdist(mirrored[part].to(training), training))
        found.append(distance.topk(k, largest=False))
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def thumbnails(images: Tensor) -> Tensor:
    """The images' means on a grid of 8 x 8: (N, C, H, W) -> (N, 64 C).

    Noise and blur hardly change them, and they are much cheaper to compare than all pixels.
    """
    side = min(THUMBNAIL, *images.shape[2:])
    return F.adaptive_avg_pool2d(images, side).flatten(1)


@dataclass(frozen=True)
class Verdict:
    """What a `CopyDetector` says of N images: one entry for each in every tensor.

    `ratio`: the distance to the nearest training image over the mean distance to the next ones;
    `suspected`: bool, is that below the threshold? `third`: bool, the usual criterion, d1 / d2 <
    1/3 (Yoon et al. 2023); `nearest`: int64, the index of the nearest training image.
    """

    ratio: Tensor
    suspected: Tensor
    third: Tensor
    nearest: Tensor


class CopyDetector:
    """Tells copies of training images, mirrored ones included, from new images.

    A copy is far nearer to one training image than to any other; a new image is about as near to
    several. So an image is suspicious if its distance to the nearest training image, over the mean
    distance to the next k - 1, is lower than for 99 % of the held-out images: about 1 % of the
    samples of a model that does not copy are. (Plain distance would suspect every blurred sample.)

    `training`, `held_out`: float (N, C, H, W) in [-1, 1]. `features`: a function from images to
    (N, D), by default `thumbnails`. Held-out images that are near-duplicates of a training image
    (two photographs of one plant, say) would blunt the threshold, so outliers take no part in it:
    ratios more than four interquartile ranges below the lower quartile. `duplicates` lists their
    indices, `originals` those of the training images.

    Raises ValueError for images out of range and where there are too few.
    """

    def __init__(
        self,
        training: Tensor,
        held_out: Tensor,
        *,
        k: int = 10,
        false_alarms: float = 0.01,
        features: Callable[[Tensor], Tensor] = thumbnails,
    ):
        check_images(training)
        self.k, self.features, self.threshold = k, features, 0.0
        self.training = features(training)
        found = self.examine(held_out)
        lower, upper = found.ratio.quantile(found.ratio.new_tensor([0.25, 0.75]))
        outliers = found.ratio < lower - 4 * (upper - lower)
        self.duplicates = outliers.nonzero().flatten()
        self.originals = found.nearest[outliers]
        honest = found.ratio[~outliers]
        if len(honest) < 1 / false_alarms:
            raise ValueError(
                f"{len(honest)} held-out images cannot place a threshold at {false_alarms:.0%} "
                f"false alarms: give at least {math.ceil(1 / false_alarms)}"
            )
        self.threshold = honest.quantile(false_alarms).item()

    def neighbours(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Distances to the k nearest training images and their indices: each (N, k)."""
        check_images(images)
        mirrored = self.features(images.flip(-1))
        return nearest(self.features(images), self.training, self.k, mirrored=mirrored)

    def examine(self, images: Tensor) -> Verdict:
        """All that the distances of images, float (N, C, H, W) in [-1, 1], say."""
        distances, indices = self.neighbours(images)
        first, second = distances[:, 0], distances[:, 1]
        ratio = first / distances[:, 1:].mean(1).clamp(
            min=1e-12
        )  # equal training images: 0, no NaN
        return Verdict(ratio, ratio < self.threshold, first < second / 3, indices[:, 0])

    def ratios(self, images: Tensor) -> Tensor:
        """Distance to the nearest training image over the mean distance to the next ones: (N,)."""
        return self.examine(images).ratio

    def copied(self, images: Tensor) -> Tensor:
        """bool (N,): is the image suspicious?"""
        return self.examine(images).suspected


def copied_share(samples: Tensor, training: Tensor, held_out: Tensor, **options) -> float:
    """The share of samples that `CopyDetector` suspects: about 0.01 for a model that does not copy.

    All images float (N, C, H, W) in [-1, 1]; `options` are `CopyDetector`'s.
    """
    return CopyDetector(training, held_out, **options).copied(samples).double().mean().item()


# how strong each change is, from weak to strong, as a share of the whole
STRENGTHS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)


def altered(
    training: Tensor, others: Tensor, strength: float, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """Copies of training images, changed: name of the change -> float (N, C, H, W) in [-1, 1].

    `strength` is the standard deviation of the noise (of the whole range, 2), the blur's side and
    the shift as shares of the image's width, how much of green and blue is lost, and the share of
    the image (its right side) that comes from `others`. 0 changes nothing.
    Raises ValueError unless there are as many `others` of the same size.
    """
    if training.shape != others.shape:
        raise ValueError(
            f"training images {tuple(training.shape)}, others {tuple(others.shape)}: give as many "
            "images of one size"
        )
    width = training.shape[-1]
    pixels = round(strength * width)
    noise = torch.randn(training.shape, generator=generator).to(training)
    tint = torch.tensor([1.0, 1 - strength, 1 - strength]).to(training).view(1, 3, 1, 1)
    left = torch.arange(width, device=training.device) < width - pixels
    side = 2 * (pixels // 2) + 1
    return {
        "noise": (training + 2 * strength * noise).clamp(-1, 1),
        "blur": F.avg_pool2d(training, side, 1, side // 2, count_include_pad=False),
        "colour": (training + 1) * tint[:, : training.shape[1]] - 1,
        "shift": training.roll(pixels, -1),
        "part": torch.where(left, training, others),
    }


def planted_copies(training: Tensor, others: Tensor) -> dict[str, Tensor]:
    """Copies as a model might make them, to measure how many a detector finds, by name.

    `training`, `others`: float (N, C, H, W) in [-1, 1], as many of both; so is each set of copies.
    A partly copied image has its left part from the first and the rest from the second.
    """
    generator = torch.Generator().manual_seed(0)
    weak = altered(training, others, 0.05, generator)
    some = altered(training, others, 0.15)
    strong = altered(training, others, 0.3)
    return {
        "exact": training,
        "mirrored": training.flip(-1),
        "with noise": weak["noise"],
        "blurred": some["blur"],
        "recoloured": strong["colour"],
        "shifted": weak["shift"],
        "three quarters": altered(training, others, 0.25)["part"],
        "half": altered(training, others, 0.5)["part"],
    }
