"""The protocol behind `python -m noisout_nb evaluate`: what is compared with what, how often.

Every comparison is of as many images: one half of the held-out ones is the reference, the other
half shows what a perfect model would reach and lends the samples its labels. That is repeated with
other halves, other noise and other seeds, so every number has an error.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .classifier import ClassifierFeatures, FlowerClassifier, classify
from .data import ImageDataset, ProceduralFlowers, to_float, to_uint8
from .evaluation import (
    CopyDetector,
    coverage,
    extract_features,
    factor_distance,
    fine_power_ratio,
    frechet_distance,
    kernel_distance,
    petal_count,
    planted_copies,
    precision_recall,
)
from .features import extractor_name
from .files import atomic_file, fingerprint, load_safely
from .forward_process import GaussianDiffusion
from .guidance import ClassifierFreeGuidance
from .parallel import has_bfloat16, rank_and_world
from .profiles import Profile
from .progress import progress
from .sampling import sample
from .unet import UNet

PART = 128  # samples that are saved at a time

# the measures, and how their names and numbers are written in a table
MEASURES = {
    "frechet": ("Fréchet", "{:.3f}"),
    "kernel": ("kernel, x 1000", "{:.2f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "coverage": ("coverage", "{:.3f}"),
    "recognised": ("recognised", "{:.1%}"),
    "factors": ("factors", "{:.3f}"),
    "petals": ("petals right", "{:.1%}"),
    "plain": ("fine power, plainest", "{:.2f}"),
    "median": ("fine power, median", "{:.2f}"),
}


@dataclass
class Sampler:
    """Samples of one network with a profile's settings, in bfloat16 where it trains so.

    With `folder` every 128 samples are saved there, and read again by a program that is started
    anew: what was cut loses little. The files' names follow from weights, settings, labels and
    seed, so other ones are never mistaken for them.
    """

    model: UNet
    process: GaussianDiffusion
    profile: Profile
    steps: int
    guidance_scale: float = 1.0
    folder: Path | None = None
    weights: str = field(init=False)

    def __post_init__(self):
        self.weights = extractor_name(self.model)

    def __call__(self, labels: Tensor, seed: int) -> Tensor:
        """Images uint8 (N, 3, H, W) on the CPU, one per label, as photographs are stored."""
        # each part gets noise of its own: seeds a million apart
        parts = enumerate(labels.split(PART))
        return torch.cat([self._saved(part, seed + 1_000_003 * i) for i, part in parts])

    def _saved(self, labels: Tensor, seed: int) -> Tensor:
        if self.folder is None:
            return self._images(labels, seed)
        profile = self.profile
        settings = (profile.sampler, profile.spacing, profile.guidance_interval, profile.autocast)
        wanted = f"{self.weights} {settings} {self.steps} {self.guidance_scale} {seed}"
        name = fingerprint(labels, torch.tensor(list(wanted.encode())))
        path = self.folder / f"{name}.pth"
        if path.exists():
            return load_safely(path)
        images = self._images(labels, seed)
        if rank_and_world()[0] == 0:
            with atomic_file(path) as file:
                torch.save(images, file)
        return images

    def _images(self, labels: Tensor, seed: int) -> Tensor:
        device, profile = self.process.betas.device, self.profile
        autocast = profile.autocast and has_bfloat16(device)
        guided = ClassifierFreeGuidance(
            self.model,
            self.guidance_scale,
            process=self.process,
            interval=profile.guidance_interval,
        )
        side = self.model.config["image_size"]
        height, width = (side, side) if isinstance(side, int) else side
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            images = sample(
                self.model if self.guidance_scale == 1 else guided,
                self.process,
                labels.to(device),
                shape=(self.model.config["in_channels"], height, width),
                sampler=profile.sampler,
                steps=self.steps,
                spacing=profile.spacing,
                seed=seed,
            )
        return to_uint8(images.float()).cpu()


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

    def features(self, images: Tensor) -> Tensor:
        """The classifier's features of images, uint8 (N, 3, H, W)."""
        return extract_features(self.network, to_float(images))

    def measure(
        self, images: Tensor, labels: Tensor, features: Tensor, against: tuple[Tensor, Tensor]
    ) -> dict[str, float]:
        """Each of MEASURES for uint8 images with their labels and features.

        `against`: the reference, other uint8 images and their features.
        """
        reference, expected = against
        precision, recall = precision_recall(features, expected)
        images, reference = to_float(images), to_float(reference)
        known = classify(self.classifier, images) == labels
        found = {
            "frechet": frechet_distance(features, expected),
            "kernel": 1000 * kernel_distance(features, expected)[0],
            "precision": precision,
            "recall": recall,
            "coverage": coverage(features, expected),
            "recognised": known.double().mean().item(),
            "factors": factor_distance(images, reference)["mean"],
            **fine_power_ratio(images, reference),
        }
        if self.petals is not None:
            right = petal_count(images) == self.petals[labels]
            found["petals"] = right.double().mean().item()
        return found


def halves(labels: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The indices of two halves of the held-out images: another split for each number.

    Each species is in both as often, but for one image: which species a set happens to hold would
    move its mean more than the quality of the images does. (Kernel distances are unbiased for
    independent images; those of balanced sets lie a little lower, and may be below 0.)
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(number))
    order = order[labels[order].argsort(stable=True)][: len(labels) // 2 * 2]
    return order[0::2], order[1::2]


def in_turn(labels: Tensor, seed: int = 0) -> Tensor:
    """Indices of all images in random order, but one of each species after the other.

    So any rows that follow each other are balanced, as long as no species runs out.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    labels = labels[order]
    rounds = torch.empty_like(labels)
    for species in labels.unique():
        rounds[labels == species] = torch.arange(int((labels == species).sum()))
    return order[(rounds * (int(labels.max()) + 1) + labels).argsort()]


@dataclass
class Comparison:
    """What `compare` found: by name the measurements of each set, uint8 images, and features.

    The features are one species after the other (see `in_turn`), those of held-out images too.
    """

    rows: dict[str, list[dict[str, float]]]
    images: dict[str, Tensor]
    features: dict[str, Tensor]


def compare(
    samplers: Mapping[str, Sampler],
    judge: Judge,
    held_out: ImageDataset,
    *,
    samples: int,
    seeds: list[int],
) -> Comparison:
    """Measure real images, those of each sampler, and noise.

    Each set is of half as many images as are held out; at least `samples` samples are taken of each
    seed.
    """
    half = len(held_out) // 2
    sets = [(seed, i) for seed in seeds for i in range(math.ceil(samples / half))]
    real = judge.features(held_out.images)
    found = Comparison({"real": [], **{name: [] for name in samplers}, "noise": []}, {}, {})
    asked, parts = [], {name: ([], []) for name in samplers}
    for number, (seed, i) in enumerate(progress(sets, description="sets")):
        first, second = halves(held_out.labels, number)
        against = held_out.images[first], real[first]
        images, labels = held_out.images[second], held_out.labels[second]
        asked.append(labels)
        found.rows["real"].append(judge.measure(images, labels, real[second], against))
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(number))
        noise = to_uint8(noise)
        found.rows["noise"].append(judge.measure(noise, labels, judge.features(noise), against))
        for name, sampler in samplers.items():
            drawn = sampler(labels, seed + 1_000_000_007 * i)  # noise of its own for each set
            features = judge.features(drawn)
            found.rows[name].append(judge.measure(drawn, labels, features, against))
            for whole, part in zip(parts[name], (drawn, features), strict=True):
                whole.append(part)
    found.images = {name: torch.cat(images) for name, (images, _) in parts.items()}
    asked = torch.cat(asked)
    found.features = {name: torch.cat(x)[in_turn(asked)] for name, (_, x) in parts.items()}
    found.features["held-out"] = real[in_turn(held_out.labels)]
    return found


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
) -> tuple[dict, dict[str, Tensor], CopyDetector]:
    """How many samples are suspected of being copies, and how many planted copies are found.

    All images uint8 (N, C, H, W). The share of suspects is about 0.01 for a model that does not
    copy; "d1/d2" is the usual criterion's share. Near-duplicates among the held-out images are
    listed by index, each with that of its training image. Also returns the ratios of held-out
    images and samples, by name, and the detector.
    """
    training = to_float(training)
    detector = CopyDetector(training, to_float(held_out))
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))
    planted = min(planted, len(training) // 2)
    copies = planted_copies(training[order[:planted]], training[order[planted : 2 * planted]])
    ratios = {"held-out images": detector.ratios(to_float(held_out))}

    def shares(x: Tensor, name: str = "") -> dict[str, float]:
        verdict = detector.examine(x)
        if name:
            ratios[name] = verdict.ratio
        return {
            "suspected": verdict.suspected.double().mean().item(),
            "d1/d2": verdict.third.double().mean().item(),
        }

    pairs = zip(detector.duplicates.tolist(), detector.originals.tolist(), strict=True)
    found = {
        "threshold": detector.threshold,
        "near_duplicates": [list(pair) for pair in pairs],
        "samples": {name: shares(to_float(x), name) for name, x in images.items()},
        "planted": {name: shares(x) for name, x in copies.items()},
    }
    return found, ratios, detector


def public_protocol(
    network: nn.Module,
    samplers: Mapping[str, Sampler],
    data: ImageDataset,
    held_out: ImageDataset,
    seed: int,
) -> dict[str, dict]:
    """Distances in Inception's features with the counts that others publish.

    For each sampler, as many samples as there are training images, with their labels: "all" is the
    Fréchet distance to all training images (with Flowers102 7,169 against 7,169), "half" that of
    half of both, and "kernel" the kernel distance of as many samples as held-out images, with their
    labels, to those (1,020 against 1,020), with its error. The row "real" is the floor: half the
    training images against the other half, held-out ones against as many training images. A Fréchet
    distance is missing where there are no more images than features.
    """
    training = extract_features(network, to_float(data.images))
    real = extract_features(network, to_float(held_out.images))
    first, second = halves(data.labels, 0)
    count = min(len(held_out), len(data))

    def row(half: Tensor, few: Tensor, whole: Tensor | None = None) -> dict:
        kernel, error = kernel_distance(few, real)
        found: dict = {"kernel": (1000 * kernel, 1000 * error), "kernel_images": len(few)}
        for name, x, y in (("all", whole, training), ("half", half, training[second])):
            if x is not None and len(x) > x.shape[1]:
                found[name] = frechet_distance(x, y)
                found[f"{name}_images"] = len(x)
        return found

    table = {"real": row(training[first], training[first][:count])}
    for name, sampler in samplers.items():
        whole = extract_features(network, to_float(sampler(data.labels, seed)))
        few = extract_features(network, to_float(sampler(held_out.labels, seed + 1_000_000_007)))
        table[name] = row(whole[second], few, whole)
    return table
