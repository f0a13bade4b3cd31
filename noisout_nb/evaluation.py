"""Stage 7, evaluation: how likely a model finds images, how far its samples lie from real ones, and
whether it copies.

Distances compare features, float (N, D): one row per image, from whatever network
`extract_features` is given. Real images are held-out ones, without flips. A distance depends on the
features, on both counts and on the reference set, so state them with every number, and beside it
the distance of a second real set.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .copies import (
    CopyDetector,
    Verdict,
    altered,
    copied_share,
    nearest,
    planted_copies,
    thumbnails,
)
from .features import (
    Features,
    InceptionFeatures,
    Moments,
    extract_features,
    load_features,
    moments,
    save_features,
)
from .forward_process import GaussianDiffusion
from .measurements import (
    check_features,
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
    "Features",
    "InceptionFeatures",
    "Moments",
    "Verdict",
    "altered",
    "bits_per_dim",
    "copied_share",
    "coverage",
    "extract_features",
    "factor_distance",
    "fine_power_ratio",
    "frechet_distance",
    "jackknife",
    "kernel_distance",
    "load_features",
    "measure_factors",
    "moments",
    "nearest",
    "petal_count",
    "planted_copies",
    "precision_recall",
    "save_features",
    "thumbnails",
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


def frechet_distance(features: Tensor | Moments, reference: Tensor | Moments) -> float:
    """Between Gaussians of equal means and covariances (Heusel et al. 2017, the "FID"):

    |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)). Each set is given by its features, (N, D), or by their
    `moments`. Biased upwards where images are few, so compare only distances of equal counts.
    Raises ValueError where there are no more images than features.
    """
    given = (features, reference)
    dims = [x.mean.shape[0] if isinstance(x, Moments) else x.shape[-1] for x in given]
    a, b = (x.mean[None] if isinstance(x, Moments) else x for x in given)
    check_features(a, b)
    fewest = min(x.count if isinstance(x, Moments) else len(x) for x in given)
    if fewest <= dims[0]:
        raise ValueError(
            f"{fewest} images cannot give a covariance of {dims[0]} features: take more images, or "
            "kernel_distance"
        )
    m, r = (x if isinstance(x, Moments) else moments(x.as_subclass(Tensor)) for x in given)
    values, vectors = torch.linalg.eigh(m.cov)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # the eigenvalues of S S' are those of the symmetric S^(1/2) S' S^(1/2)
    root_trace = torch.linalg.eigvalsh(root @ r.cov @ root).clamp(min=0).sqrt().sum()
    return (
        (m.mean - r.mean).square().sum() + m.cov.trace() + r.cov.trace() - 2 * root_trace
    ).item()


def kernel_distance(features: Tensor, reference: Tensor, blocks: int = 8) -> tuple[float, float]:
    """The unbiased squared MMD with kernel (a.b / D + 1)^3, and its standard error.

    (Binkowski et al. 2018, the "KID".) The error is a jackknife's: what leaving out each of
    `blocks` parts of both sets changes. Near 0 the distance may come out negative.
    Raises ValueError for fewer than two images per block.
    """
    check_features(
        features,
        reference,
        2 * blocks,
        f"are too few for {blocks} blocks: each needs at least two",
    )
    a, b = (x.as_subclass(Tensor).double().tensor_split(blocks) for x in (features, reference))
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


def jackknife(
    metric: Callable[[Tensor, Tensor], float], a: Tensor, b: Tensor, blocks: int = 8
) -> tuple[float, float]:
    """`metric(a, b)` and its standard error: what leaving out each of `blocks` parts changes.

    `a`, `b`: (N, D) and (M, D), in random order. It is the error of both sets' choice, not of the
    bias that few images bring. Raises ValueError for fewer than two images per block.
    """
    if (fewest := min(len(a), len(b))) < 2 * blocks:
        raise ValueError(f"{fewest} images are too few for {blocks} blocks: at least two for each")
    parts = list(zip(a.tensor_split(blocks), b.tensor_split(blocks), strict=True))
    left_out = []
    for i in range(blocks):
        x, y = zip(*(part for j, part in enumerate(parts) if j != i), strict=True)
        left_out.append(metric(torch.cat(x), torch.cat(y)))
    spread = torch.tensor(left_out, dtype=torch.float64).var(correction=0)
    return metric(a, b), ((blocks - 1) * spread).sqrt().item()


def precision_recall(
    features: Tensor, reference: Tensor, k: int = 3, batch_size: int = 256
) -> tuple[float, float]:
    """The share of samples near real images, and of real images near samples.

    (Kynkäänniemi et al. 2019.) "Near" is within the distance of some image of the other set to its
    own k-th nearest neighbour. Raises ValueError where there is no k-th neighbour.
    """
    samples, real = _neighbourly(features, reference, k)

    def near(points: Tensor, centres: Tensor) -> float:
        reach = _radii(centres, k, batch_size)
        found = [(torch.cdist(part, centres) <= reach).any(1) for part in points.split(batch_size)]
        return torch.cat(found).double().mean().item()

    return near(samples, real), near(real, samples)


def coverage(features: Tensor, reference: Tensor, k: int = 3, batch_size: int = 256) -> float:
    """The share of real images with a sample nearer than their k-th nearest real neighbour.

    (Naeem et al. 2020.) Unlike recall it measures with the real images' distances alone, so samples
    that lie far out gain nothing by reaching far. Two independent sets of n real images have about
    1 - 2^(-k). Raises ValueError where there is no k-th neighbour.
    """
    samples, real = _neighbourly(features, reference, k)
    parts = zip(real.split(batch_size), _radii(real, k, batch_size).split(batch_size), strict=True)
    found = [torch.cdist(part, samples).amin(1) <= reach for part, reach in parts]
    return torch.cat(found).double().mean().item()


def _neighbourly(features: Tensor, reference: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Both sets in float64, checked: each image needs a k-th neighbour."""
    check_features(
        features, reference, k + 1, f"have no {k}-th neighbour: take more, or a smaller k"
    )
    samples, real = (x.as_subclass(Tensor).double() for x in (features, reference))
    return samples, real


def _radii(centres: Tensor, k: int, batch_size: int) -> Tensor:
    """The distance of each to its k-th nearest neighbour; the nearest is the image itself."""
    rows = [
        torch.cdist(part, centres).kthvalue(k + 1, dim=1).values
        for part in centres.split(batch_size)
    ]
    return torch.cat(rows)
