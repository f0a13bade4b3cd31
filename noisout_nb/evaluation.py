"""Stage 7, evaluation: how likely a model finds pictures, how far its samples lie from real ones, and whether it copies.

Distances compare *features*, float (N, D): one row a picture, from whatever network `extract_features` is given. Real
pictures are held-out ones, without flips. A distance depends on the features, the two counts and the reference set,
so state them with every number, and the distance of a second real set beside it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import Inception_V3_Weights, inception_v3

from .display import progress
from .forward_process import GaussianDiffusion
from .parallel import gather, rank_and_world, share
from .training import variational_bound_term


@torch.no_grad()
def bits_per_dim(model: nn.Module, process: GaussianDiffusion, images: Tensor, y: Tensor | None = None, *, batch_size: int = 64, seed: int = 0) -> tuple[float, Tensor]:
    """The variational bound on -log2 p(x_0), by which a picture can be stored (Ho et al. 2020, eq. 5), per dimension.

    `images`: float (N, C, H, W) in [-1, 1]. Returns L_T, what x_T still tells of x_0, and float64 (T,): L_0 at index 0, then
    L_1 ... L_{T-1}, with one draw of noise for each t and picture. All add up to the bound. Under torchrun the processes share
    out the pictures, and each gets all terms. Raises ValueError for images out of range.
    """
    _check_range(images)
    device, (rank, world) = process.betas.device, rank_and_world()
    a, b = process.sqrt_alphas_cumprod[-1].double(), process.sqrt_one_minus_alphas_cumprod[-1].double()
    prior = 0.5 * (b**2 + a**2 * images.double().square().mean() - 1 - 2 * b.log()) / math.log(2)
    labels = [None] * len(images) if y is None else share(y).to(device).split(batch_size)
    batches = list(zip(share(images).to(device).split(batch_size), labels))
    generator = torch.Generator().manual_seed(seed + rank)
    terms = torch.zeros(1, process.timesteps, dtype=torch.float64, device=device)
    for i in progress(range(process.timesteps), description="bits per dimension"):
        for x, y in batches:
            t, noise = torch.full((len(x),), i, device=device), torch.randn(x.shape, generator=generator).to(device)
            x_t = process.q_sample(x, t, noise)
            bound = variational_bound_term(process, x, x_t, t, model(x_t, process.timestep_map[t], y), clip=True)
            terms[0, i] += bound.double().sum() / len(images)
    return prior.item(), gather(terms, world).sum(0).cpu()


@torch.no_grad()
def extract_features(network: nn.Module, images: Tensor, batch_size: int = 64) -> Tensor:
    """float64 (N, D) on the CPU: what `network` answers for images, float (N, 3, H, W) in [-1, 1], in batches.

    Under torchrun the processes share out the work, and each gets all features.
    """
    _check_range(images)
    device = next(network.parameters()).device
    batches = progress(share(images).split(batch_size), description="features")
    return gather(torch.cat([network(batch.to(device, torch.float32)).double() for batch in batches]), len(images)).cpu()


class InceptionFeatures(nn.Module):
    """torchvision's InceptionV3, trained on ImageNet: (B, 3, H, W) in [-1, 1] -> (B, 2048), for numbers that others have, too.

    The weights (104 MB) are downloaded on first use; without a network RuntimeError says what to do. These are not the
    weights of the original FID program: quote the numbers as "torchvision InceptionV3".
    """

    def __init__(self):
        super().__init__()
        try:
            self.network = inception_v3(weights=Inception_V3_Weights.IMAGENET1K_V1)
        except OSError as error:
            ways = f"put the file {Inception_V3_Weights.IMAGENET1K_V1.url} into {torch.hub.get_dir()}/checkpoints, or take the features of a classifier of your own"
            raise RuntimeError(f"InceptionV3's weights could not be downloaded ({error}). Connect to the network, or {ways}.") from error
        self.network.transform_input = False  # it wants [-1, 1], as we have it
        self.network.fc = nn.Identity()
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(F.interpolate(x, size=(299, 299), mode="bilinear", antialias=True))


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Between Gaussians of the same means and covariances: |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) (Heusel et al. 2017).

    Biased upwards for few pictures. Raises ValueError where there are no more pictures than features.
    """
    dim = features.shape[-1]
    _check_features(features, reference, dim + 1, f"cannot give a covariance of {dim} features: take more pictures, fewer features, or kernel_distance")
    (mean, cov), (mean_r, cov_r) = ((f.double().mean(0), f.double().T.cov().view(dim, dim)) for f in (features, reference))
    root_trace = torch.linalg.eigvals(cov @ cov_r).real.clamp(min=0).sqrt().sum()
    return ((mean - mean_r).square().sum() + cov.trace() + cov_r.trace() - 2 * root_trace).item()


def kernel_distance(features: Tensor, reference: Tensor, blocks: int = 8) -> tuple[float, float]:
    """The unbiased squared MMD with kernel (a.b / D + 1)^3 (Binkowski et al. 2018, "KID"), and its standard error.

    The error is a jackknife's: what leaving out each of `blocks` parts of both sets changes. Near 0 the distance may come out negative.
    Raises ValueError for fewer than two pictures a block.
    """
    _check_features(features, reference, 2 * blocks, f"are too few for {blocks} blocks: at least two for each are needed")

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def inner(a: Tensor) -> Tensor:  # without the pairs of a picture with itself, which would bias it
        gram = kernel(a, a)
        return (gram.sum() - gram.trace()) / (len(a) * (len(a) - 1))

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return inner(a) + inner(b) - 2 * kernel(a, b).mean()

    def without(i: int, a: Tensor) -> Tensor:
        return torch.cat([part for j, part in enumerate(a.tensor_split(blocks)) if j != i])

    a, b = features.double(), reference.double()
    left_out = torch.stack([distance(without(i, a), without(i, b)) for i in range(blocks)])
    return distance(a, b).item(), ((blocks - 1) * left_out.var(correction=0)).sqrt().item()


def precision_recall(features: Tensor, reference: Tensor, k: int = 3) -> tuple[float, float]:
    """The share of samples near the real pictures, and of real pictures near the samples (Kynkaanniemi et al. 2019).

    "Near" is within the distance of some picture of the other set to its own k-th nearest neighbour.
    """
    _check_features(features, reference, k + 1, f"have no {k}-th neighbour: take more, or a smaller k")

    def covered(points: Tensor, centres: Tensor) -> float:
        radii = torch.cdist(centres, centres).kthvalue(k + 1, dim=1).values  # the nearest is the picture itself
        return (torch.cdist(points, centres) <= radii).any(1).double().mean().item()

    return covered(features.double(), reference.double()), covered(reference.double(), features.double())


def nearest(features: Tensor, training: Tensor, k: int = 10, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """Distances to the k nearest training pictures and their indices, each (N, k), nearest first."""
    _check_features(features, training)
    _check_features(training, training, k, f"have no {k}-th neighbour: take more, or a smaller k")
    found = [torch.cdist(batch.to(training), training).topk(k, largest=False) for batch in features.split(batch_size)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def copied_share(features: Tensor, training: Tensor, held_out: Tensor, k: int = 10) -> float:
    """The share of samples that are suspiciously near one training picture: about 0.01 for a model that does not copy.

    A sample is suspicious if its distance to the nearest training picture, relative to the mean distance to the next
    k - 1, is lower than for 99 % of the held-out pictures. (Plain distance would suspect every blurred sample.)
    """

    def ratio(f: Tensor) -> Tensor:
        distances, _ = nearest(f, training, k)
        return distances[:, 0] / distances[:, 1:].mean(1)

    return (ratio(features) < ratio(held_out).quantile(0.01)).double().mean().item()


def _check_range(images: Tensor) -> None:
    if images.ndim != 4 or 0 in images.shape or not images.is_floating_point() or not images.abs().max() <= 1.001:
        found = f"{images.dtype} {tuple(images.shape)}" + (f" from {images.min():.3g} to {images.max():.3g}" if images.numel() else "")
        raise ValueError(f"images are {found}: they must be float (N, C, H, W) in [-1, 1]; see data.to_float, and clamp samples")


def _check_features(features: Tensor, reference: Tensor, needed: int = 1, why: str = "are too few") -> None:
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(f"features of shape {tuple(features.shape)} and {tuple(reference.shape)}: both must be (N, D) with one D")
    if (fewest := min(len(features), len(reference))) < needed:
        raise ValueError(f"{fewest} pictures {why}")
