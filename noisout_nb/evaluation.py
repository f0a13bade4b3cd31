"""Stage 7, evaluation: how likely a model finds images, how far its samples lie from real ones, and
whether it copies.

Distances compare *features*, float (N, D): one row per image, from whatever network
`extract_features` is given. Real images are held-out ones, without flips. A distance depends on the
features, on both counts and on the reference set, so state them with every number, and beside it
the distance of a second real set.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .forward_process import GaussianDiffusion
from .measurements import (
    check_images,
    factor_distance,
    fine_power_ratio,
    measure_factors,
    petal_count,
)
from .parallel import gather, rank_and_world, share
from .progress import progress
from .training import variational_bound_term
from .unet import evaluating

__all__ = [
    "CopyDetector",
    "InceptionFeatures",
    "bits_per_dim",
    "copied_share",
    "extract_features",
    "factor_distance",
    "fine_power_ratio",
    "frechet_distance",
    "kernel_distance",
    "measure_factors",
    "nearest",
    "petal_count",
    "planted_copies",
    "precision_recall",
]


@torch.no_grad()
def bits_per_dim(
    model: nn.Module,
    process: GaussianDiffusion,
    images: Tensor,
    y: Tensor | None = None,
    *,
    batch_size: int = 64,
    seed: int = 0,
) -> tuple[float, Tensor]:
    """The variational bound on -log2 p(x_0) per dimension (Ho et al. 2020, eq. 5).

    `images`: float (N, C, H, W) in [-1, 1]; `y`: int64 (N,) labels or None. Returns L_T, what x_T
    still tells of x_0, and float64 (T,): L_0 at index 0, then L_1 ... L_{T-1}, with one noise per
    image and timestep. Their sum is the bound. The model runs in eval mode. Noise depends on `seed`
    alone, so neither batch size nor the number of processes of torchrun, which share out the
    images, changes the result beyond rounding.

    Raises ValueError for images out of range and for labels of another number than the images.
    """
    check_images(images)
    if y is not None and len(y) != len(images):
        raise ValueError(f"{len(y)} labels for {len(images)} images: give one label per image")
    device, (_, world) = process.betas.device, rank_and_world()
    prior = _prior_bits(process, images)
    ours = share(images).to(device).split(batch_size)
    labels = [None] * len(ours) if y is None else share(y).to(device).split(batch_size)
    generator = torch.Generator().manual_seed(seed)
    terms = torch.zeros(1, process.timesteps, dtype=torch.float64)
    with evaluating(model):
        for i in progress(range(process.timesteps), description="bits per dimension"):
            noises = share(torch.randn(images.shape, generator=generator)).split(batch_size)
            for x, label, noise in zip(ours, labels, noises, strict=True):
                t = torch.full((len(x),), i, device=device)
                x_t = process.q_sample(x, t, noise.to(x))
                output = model(x_t, process.timestep_map[t], label)
                bound = variational_bound_term(process, x, x_t, t, output, clip=True)
                terms[0, i] += bound.cpu().double().sum() / len(images)
    return prior, gather(terms.to(device), world).sum(0).cpu()


def _prior_bits(process: GaussianDiffusion, images: Tensor) -> float:
    """L_T: the KL divergence of q(x_T | x_0) from the standard normal, in bits per dimension."""
    signal = process.sqrt_alphas_cumprod[-1].cpu().double()
    noise = process.sqrt_one_minus_alphas_cumprod[-1].cpu().double()
    mean_square = signal**2 * images.cpu().double().square().mean()
    return (0.5 * (noise**2 + mean_square - 1 - 2 * noise.log()) / math.log(2)).item()


@torch.no_grad()
def extract_features(network: nn.Module, images: Tensor, batch_size: int = 64) -> Tensor:
    """Features of images, float (N, C, H, W) in [-1, 1]: float64 (N, D) on the CPU.

    `network` maps a batch to (B, D); it runs in eval mode. Under torchrun the processes share out
    the work, and each gets all features. Raises ValueError for images out of range and for a
    network whose output has another shape.
    """
    check_images(images)
    device = next(network.parameters()).device
    found = []
    with evaluating(network):
        batches = share(images).split(batch_size)
        for batch in progress(batches, total=len(batches), description="features"):
            found.append(network(batch.to(device, torch.float32)))
    if found[0].ndim != 2:
        shape = tuple(found[0].shape)
        raise ValueError(f"the network gives {shape}: features must be (B, D), one row per image")
    return gather(torch.cat(found), len(images)).cpu().double()


class InceptionFeatures(nn.Module):
    """The Inception network of the original FID: (B, 3, H, W) in [-1, 1] -> (B, 2048).

    It is torch-fidelity's conversion, which resizes as the original program does, so distances
    compare with published ones. Raises RuntimeError where the package or its weights (91 MB,
    downloaded on first use) cannot be had; the message says what to do.
    """

    def __init__(self):
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
                FeatureExtractorInceptionV3,
            )
        except ImportError as error:
            raise RuntimeError(
                "Inception's features need the package torch-fidelity: pip install torch-fidelity"
            ) from error
        try:
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"Inception's weights could not be downloaded ({error}). Connect to the network, "
                f"or put the file that torch-fidelity names into {torch.hub.get_dir()}/checkpoints"
            ) from error
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, 2048)."""
        return self.network(((x + 1) * 127.5).clamp(0, 255).round().to(torch.uint8))[0]


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Between Gaussians of equal means and covariances (Heusel et al. 2017, the "FID"):

    |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)). Biased upwards where images are few, so compare only
    distances of equal counts. Raises ValueError where there are no more images than features.
    """
    dim = features.shape[-1]
    _check_features(
        features,
        reference,
        dim + 1,
        f"cannot give a covariance of {dim} features: take more images, or kernel_distance",
    )
    mean, cov = _moments(features)
    mean_r, cov_r = _moments(reference)
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # the eigenvalues of S S' are those of the symmetric S^(1/2) S' S^(1/2)
    root_trace = torch.linalg.eigvalsh(root @ cov_r @ root).clamp(min=0).sqrt().sum()
    return ((mean - mean_r).square().sum() + cov.trace() + cov_r.trace() - 2 * root_trace).item()


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    dim = features.shape[1]
    return features.double().mean(0), features.double().T.cov().view(dim, dim)


def kernel_distance(features: Tensor, reference: Tensor, blocks: int = 8) -> tuple[float, float]:
    """The unbiased squared MMD with kernel (a.b / D + 1)^3, and its standard error.

    (Binkowski et al. 2018, the "KID".) The error is a jackknife's: what leaving out each of
    `blocks` parts of both sets changes. Near 0 the distance may come out negative.
    Raises ValueError for fewer than two images per block.
    """
    _check_features(
        features,
        reference,
        2 * blocks,
        f"are too few for {blocks} blocks: each needs at least two",
    )
    a = features.double().tensor_split(blocks)
    b = reference.double().tensor_split(blocks)
    within_a, within_b, between = _kernel_sums(a, a), _kernel_sums(b, b), _kernel_sums(a, b)
    # an image's kernel with itself would bias the distance
    within_a -= torch.diag(torch.stack([_kernel_diagonal(part).sum() for part in a]))
    within_b -= torch.diag(torch.stack([_kernel_diagonal(part).sum() for part in b]))

    def distance(keep: list[int]) -> Tensor:
        n, m = sum(len(a[i]) for i in keep), sum(len(b[i]) for i in keep)
        sums = [table[keep][:, keep].sum() for table in (within_a, within_b, between)]
        return sums[0] / (n * (n - 1)) + sums[1] / (m * (m - 1)) - 2 * sums[2] / (n * m)

    everything = list(range(blocks))
    left_out = torch.stack([distance([j for j in everything if j != i]) for i in everything])
    error = ((blocks - 1) * left_out.var(correction=0)).sqrt()
    return distance(everything).item(), error.item()


def _kernel_sums(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
    """Entry (i, j): the kernel summed over all pairs of part i of a and part j of b."""
    dim = a[0].shape[1]
    rows = [[((p @ q.T / dim + 1) ** 3).sum() for q in b] for p in a]
    return torch.stack([torch.stack(row) for row in rows])


def _kernel_diagonal(part: Tensor) -> Tensor:
    return (part.square().sum(1) / part.shape[1] + 1) ** 3


def precision_recall(
    features: Tensor, reference: Tensor, k: int = 3, batch_size: int = 256
) -> tuple[float, float]:
    """The share of samples near real images, and of real images near samples.

    (Kynkäänniemi et al. 2019.) "Near" is within the distance of some image of the other set to its
    own k-th nearest neighbour. Raises ValueError where there is no k-th neighbour.
    """
    _check_features(
        features, reference, k + 1, f"have no {k}-th neighbour: take more, or a smaller k"
    )

    def radii(centres: Tensor) -> Tensor:  # the nearest one is the image itself
        rows = [
            torch.cdist(batch, centres).kthvalue(k + 1, dim=1).values
            for batch in centres.split(batch_size)
        ]
        return torch.cat(rows)

    def covered(points: Tensor, centres: Tensor) -> float:
        reach = radii(centres)
        near = [(torch.cdist(batch, centres) <= reach).any(1) for batch in points.split(batch_size)]
        return torch.cat(near).double().mean().item()

    samples, real = features.double(), reference.double()
    return covered(samples, real), covered(real, samples)


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
    _check_features(features, training)
    _check_features(training, training, k, f"have no {k}-th neighbour: take more, or a smaller k")
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


def pixels(images: Tensor) -> Tensor:
    """Images as features of their own: (N, C, H, W) -> (N, C H W)."""
    return images.flatten(1)


class CopyDetector:
    """Tells copies of training images, mirrored ones included, from new images.

    A copy is far nearer to one training image than to any other; a new image is about as near to
    several. So an image is suspicious if its distance to the nearest training image, over the mean
    distance to the next k - 1, is lower than for 99 % of the held-out images: about 1 % of the
    samples of a model that does not copy are. (Plain distance would suspect every blurred sample.)

    `training`, `held_out`: float (N, C, H, W) in [-1, 1]. `features`: a function from images to
    (N, D), by default the pixels. Held-out images that are near-duplicates of a training image (two
    photographs of one plant, say) would blunt the threshold, so outliers take no part in it: ratios
    more than four interquartile ranges below the lower quartile. `duplicates` lists their indices.

    Raises ValueError for images out of range and where there are too few.
    """

    def __init__(
        self,
        training: Tensor,
        held_out: Tensor,
        *,
        k: int = 10,
        false_alarms: float = 0.01,
        features: Callable[[Tensor], Tensor] = pixels,
    ):
        check_images(training)
        self.k, self.features = k, features
        self.training = features(training)
        ratios = self.ratios(held_out)
        lower, upper = ratios.quantile(ratios.new_tensor([0.25, 0.75]))
        outliers = ratios < lower - 4 * (upper - lower)
        self.duplicates = outliers.nonzero().flatten()
        honest = ratios[~outliers]
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

    def ratios(self, images: Tensor) -> Tensor:
        """Distance to the nearest training image over the mean distance to the next ones: (N,)."""
        distances, _ = self.neighbours(images)
        return distances[:, 0] / distances[:, 1:].mean(1)

    def copied(self, images: Tensor) -> Tensor:
        """bool (N,): is the image suspicious?"""
        return self.ratios(images) < self.threshold

    def a_third_of_the_second(self, images: Tensor) -> Tensor:
        """bool (N,): the usual criterion, d1 / d2 < 1/3 (Yoon et al. 2023)."""
        distances, _ = self.neighbours(images)
        return distances[:, 0] < distances[:, 1] / 3


def copied_share(samples: Tensor, training: Tensor, held_out: Tensor, **options) -> float:
    """The share of samples that `CopyDetector` suspects: about 0.01 for a model that does not copy.

    All images float (N, C, H, W) in [-1, 1]; `options` are `CopyDetector`'s.
    """
    return CopyDetector(training, held_out, **options).copied(samples).double().mean().item()


def planted_copies(training: Tensor, others: Tensor) -> dict[str, Tensor]:
    """Copies as a model might make them, to measure how many a detector finds, by name.

    `training`, `others`: float (N, C, H, W) in [-1, 1], as many of both; so is each set of copies.
    A partly copied image has its left part from the first and the rest from the second.
    """
    if training.shape != others.shape:
        raise ValueError(
            f"training images {tuple(training.shape)}, others {tuple(others.shape)}: give as many "
            "images of one size"
        )
    width = training.shape[-1]
    shift = max(1, width // 16)
    noise = torch.randn(training.shape, generator=torch.Generator().manual_seed(0)).to(training)
    tint = torch.tensor([1.0, 0.7, 0.7]).to(training).view(1, 3, 1, 1)[:, : training.shape[1]]
    blurred = nn.functional.avg_pool2d(training, 5, 1, 2, count_include_pad=False)
    left = torch.arange(width, device=training.device)
    return {
        "exact": training,
        "mirrored": training.flip(-1),
        "with noise": (training + 0.1 * noise).clamp(-1, 1),
        "blurred": blurred,
        "recoloured": (training + 1) * tint - 1,
        "shifted": training.roll(shift, -1),
        "three quarters": torch.where(left < width * 3 // 4, training, others),
        "half": torch.where(left < width // 2, training, others),
    }


def _check_features(
    features: Tensor, reference: Tensor, needed: int = 1, why: str = "are too few"
) -> None:
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features of shape {tuple(features.shape)} and {tuple(reference.shape)}: "
            "both must be (N, D) from one and the same extractor"
        )
    if (fewest := min(len(features), len(reference))) < needed:
        raise ValueError(f"{fewest} images {why}")
    if not (features.isfinite().all() and reference.isfinite().all()):
        raise ValueError("features hold NaN or infinite values: check the network and the images")
