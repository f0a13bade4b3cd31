"""The protocol behind `python -m noisout_nb evaluate`: what is compared with what, how often.

Every comparison is of as many images: one half of the held-out ones is the reference, the other
half shows what a perfect model would reach and lends the samples its labels. That is repeated with
other halves, other noise and other seeds, so every number has an error.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .classifier import ClassifierFeatures, FlowerClassifier, classify
from .data import ImageDataset, ProceduralFlowers, to_float
from .evaluation import (
    CopyDetector,
    extract_features,
    factor_distance,
    fine_power_ratio,
    frechet_distance,
    kernel_distance,
    petal_count,
    planted_copies,
    precision_recall,
)
from .forward_process import GaussianDiffusion
from .guidance import ClassifierFreeGuidance
from .parallel import has_bfloat16
from .profiles import Profile
from .progress import progress
from .sampling import sample
from .unet import UNet

# the measures, and how their names and numbers are written in a table
MEASURES = {
    "frechet": ("Fréchet", "{:.3f}"),
    "kernel": ("kernel, x 1000", "{:.2f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "recognised": ("recognised", "{:.1%}"),
    "factors": ("factors", "{:.3f}"),
    "petals": ("petals right", "{:.1%}"),
    "plain": ("fine power, plainest", "{:.2f}"),
    "median": ("fine power, median", "{:.2f}"),
}


@dataclass
class Sampler:
    """Samples of one network with a profile's settings, in bfloat16 where it trains so."""

    model: UNet
    process: GaussianDiffusion
    profile: Profile
    steps: int

    def __call__(self, labels: Tensor, seed: int, guidance_scale: float) -> Tensor:
        """Images float32 (N, 3, H, W) in [-1, 1] on the CPU, one per label."""
        device, profile = self.process.betas.device, self.profile
        autocast = profile.autocast and has_bfloat16(device)
        interval = profile.guidance_interval
        guided = ClassifierFreeGuidance(
            self.model, guidance_scale, process=self.process, interval=interval
        )
        side = self.model.config["image_size"]
        height, width = (side, side) if isinstance(side, int) else side
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            images = sample(
                self.model if guidance_scale == 1 else guided,
                self.process,
                labels.to(device),
                shape=(self.model.config["in_channels"], height, width),
                sampler=profile.sampler,
                steps=self.steps,
                spacing=profile.spacing,
                seed=seed,
            )
        return images.float().clamp(-1, 1).cpu()


class Judge:
    """Compares images with a reference: all measures of one pair of sets."""

    def __init__(self, classifier: FlowerClassifier, data: ImageDataset):
        self.classifier, self.network = classifier, ClassifierFeatures(classifier)
        self.petals = None  # of each species, where they are known
        if isinstance(data, ProceduralFlowers):
            counts = data.factors["petals"]
            self.petals = torch.stack(
                [counts[data.labels == label][0] for label in range(len(data.classes))]
            )

    def measure(self, images: Tensor, labels: Tensor, reference: Tensor) -> dict[str, float]:
        """Each of MEASURES for images (N, 3, H, W) with their labels (N,)."""
        features = extract_features(self.network, images)
        expected = extract_features(self.network, reference)
        precision, recall = precision_recall(features, expected)
        known = classify(self.classifier, images) == labels
        found = {
            "frechet": frechet_distance(features, expected),
            "kernel": 1000 * kernel_distance(features, expected)[0],
            "precision": precision,
            "recall": recall,
            "recognised": known.double().mean().item(),
            "factors": factor_distance(images, reference)["mean"],
            **fine_power_ratio(images, reference),
        }
        if self.petals is not None:
            right = petal_count(images) == self.petals[labels]
            found["petals"] = right.double().mean().item()
        return found


def halves(count: int, number: int) -> tuple[Tensor, Tensor]:
    """The indices of two halves of `count` held-out images: another split for each number."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(number))
    return order[: count // 2], order[count // 2 : count // 2 * 2]


def compare(
    sampler: Sampler, judge: Judge, held_out: ImageDataset, *, samples: int, seeds: list[int],
    scales: list[float],
) -> tuple[dict[str, list[dict]], dict[str, Tensor]]:  # fmt: skip
    """Measure real images, samples at each guidance scale, and noise: rows and their images.

    Each row is a list of measurements, one per set of half the held-out images; at least `samples`
    samples are taken of each seed.
    """
    half = len(held_out) // 2
    sets = [(seed, i) for seed in seeds for i in range(math.ceil(samples / half))]
    names = {scale: f"samples, guidance {scale:g}" for scale in scales}
    rows = {"real": [], **{name: [] for name in names.values()}, "noise": []}
    images = {name: [] for name in names.values()}
    for number, (seed, i) in enumerate(progress(sets, description="sets")):
        first, second = halves(len(held_out), number)
        reference, real = to_float(held_out.images[first]), to_float(held_out.images[second])
        labels = held_out.labels[second]
        rows["real"].append(judge.measure(real, labels, reference))
        if number == 0:
            noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(seed))
            rows["noise"].append(judge.measure(noise.clamp(-1, 1), labels, reference))
        for scale, name in names.items():
            # sets of one seed get noise of their own: seeds a million apart
            drawn = sampler(labels, seed=seed + 1_000_003 * i, guidance_scale=scale)
            images[name].append(drawn)
            rows[name].append(judge.measure(drawn, labels, reference))
    return rows, {name: torch.cat(parts) for name, parts in images.items()}


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """The mean, and its standard error where there is more than one value."""
    found = torch.tensor(values, dtype=torch.float64)
    error = (found.std() / len(values) ** 0.5).item() if len(values) > 1 else None
    return found.mean().item(), error


def summarise(rows: dict[str, list[dict]]) -> dict[str, dict]:
    """Name -> measure -> (mean, standard error or None)."""
    return {
        name: {key: mean_and_error([s[key] for s in sets]) for key in MEASURES if key in sets[0]}
        for name, sets in rows.items()
    }


def markdown(summary: dict[str, dict]) -> str:
    """The summary as a table in markdown, a row per set of images."""
    used = [key for key in MEASURES if key in next(iter(summary.values()))]
    lines = ["| | " + " | ".join(MEASURES[key][0] for key in used) + " |"]
    lines.append("|---" * (len(used) + 1) + "|")
    for name, row in summary.items():
        cells = []
        for key in used:
            mean, error = row[key]
            number = MEASURES[key][1]
            written = number.format(mean)
            cells.append(written if error is None else f"{written} ± {number.format(error)}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def memorisation(
    images: dict[str, Tensor], training: Tensor, held_out: Tensor, planted: int = 200
) -> tuple[dict, CopyDetector]:
    """How many samples are suspected of being copies, and how many planted copies are found.

    The share of suspects is about 0.01 for a model that does not copy; "d1/d2" is the usual
    criterion's share. Near-duplicates among the held-out images are listed by index.
    """
    detector = CopyDetector(training, held_out)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(training), generator=generator)
    planted = min(planted, len(training) // 2)
    copies = planted_copies(training[order[:planted]], training[order[planted : 2 * planted]])

    def shares(x: Tensor) -> dict[str, float]:
        return {
            "suspected": detector.copied(x).double().mean().item(),
            "d1/d2": detector.a_third_of_the_second(x).double().mean().item(),
        }

    found = {
        "threshold": detector.threshold,
        "near_duplicates": detector.duplicates.tolist(),
        "samples": {name: shares(x) for name, x in images.items()},
        "planted": {name: shares(x) for name, x in copies.items()},
    }
    return found, detector


def inception_table(
    network: nn.Module, images: dict[str, Tensor], training: Tensor, held_out: Tensor
) -> dict[str, dict]:
    """Distances in Inception's features, as others publish them.

    "frechet" compares all samples with all training images (where there are more than 2,048 of
    both); "kernel" samples with the held-out images, which needs no equal counts. The row "real"
    compares training images with held-out ones: the floor.
    """

    def rows() -> Iterator[tuple[str, Tensor]]:
        yield "real", extract_features(network, held_out)
        for name, x in images.items():
            yield name, extract_features(network, x)

    features = dict(rows())
    expected = extract_features(network, training)
    table = {}
    for name, found in features.items():
        other = expected if name == "real" else features["real"]
        kernel, error = kernel_distance(found, other)
        table[name] = {"kernel": (1000 * kernel, 1000 * error), "samples": len(found)}
        if min(len(found), len(expected)) > found.shape[1]:
            table[name]["frechet"] = (frechet_distance(found, expected), None)
    return table
