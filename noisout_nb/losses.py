"""Stage 4, what a step minimises: the simple loss, its weighting, the variational bound.

The weighting of the loss and the network's own target are separate choices: whatever the network
predicts, its error is that of x_0 times a function of the signal-to-noise ratio.
"""

import math

import torch
from torch import Tensor, nn

from .dataset import ImageDataset, to_float
from .forward_process import GaussianDiffusion
from .parallel import gather, share
from .unet import evaluating

WEIGHTINGS = {  # of the squared error of x_0, as functions of the signal-to-noise ratio
    "x0": torch.ones_like,
    "snr": lambda snr: snr,  # the simple loss of a network that predicts eps
    "snr+1": lambda snr: snr + 1,  # of one that predicts v
    "truncated-snr": lambda snr: snr.clamp(min=1),  # Salimans & Ho 2022
    "min-snr-5": lambda snr: snr.clamp(max=5),  # Hang et al. 2023
    "flow": lambda snr: (snr.sqrt() + 1) ** 2,  # of the velocity, whose error is that of x_0 / s
}
_OWN_WEIGHTINGS = {"eps": "snr", "v": "snr+1", "x0": "x0"}
TIMESTEP_DENSITIES = ("uniform", "logit-normal")


def logit_normal_timesteps(
    count: int,
    timesteps: int,
    mean: float = 0.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """int64 (count,) timesteps in 0..timesteps-1 with logit((t + 1) / timesteps) ~ N(mean, std^2).

    So few lie near either end (Esser et al. 2024, sec. 3.1).
    """
    device = None if generator is None else generator.device
    s = torch.sigmoid(mean + std * torch.randn(count, generator=generator, device=device))
    return (s * timesteps).ceil().long().sub(1).clamp(0, timesteps - 1)


def relative_weight(
    process: GaussianDiffusion,
    t: Tensor,
    weighting: str | None = None,
    max_weight: float | None = None,
) -> Tensor:
    """The factor that turns the squared error of the network's target into the weighting wanted.

    The squared error of eps is SNR times that of x_0, the error of v SNR + 1 times. `max_weight`
    caps the wanted weight of x_0's error. Without `weighting` the wanted one is the target's own.
    Where both are the same the factor is exactly 1. The SNR counts as 1e-12..1e12 where it lies
    outside, so the factor is finite for every schedule: float32 (B,).

    Raises ValueError for an unknown weighting and for a `max_weight` that is not positive.
    """
    own = WEIGHTINGS[_OWN_WEIGHTINGS[process.prediction]]
    check_weighting(weighting, max_weight)
    snr = process.signal_to_noise_ratio(t).clamp(1e-12, 1e12)
    wanted = WEIGHTINGS[weighting](snr) if weighting is not None else own(snr)
    return wanted.clamp(max=math.inf if max_weight is None else max_weight) / own(snr)


def check_weighting(weighting: str | None, max_weight: float | None = None) -> None:
    """Raises ValueError for an unknown weighting and for a `max_weight` that is not positive."""
    if weighting is not None and weighting not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {weighting!r}: choose one of {', '.join(WEIGHTINGS)}")
    if max_weight is not None and not max_weight > 0:
        raise ValueError(f"max_weight is {max_weight}: it must be positive, or None for no limit")


def simple_loss(
    model: nn.Module,
    process: GaussianDiffusion,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor,
    y: Tensor | None = None,
    autocast: bool = False,
    *,
    weighting: str | None = None,
    max_weight: float | None = None,
) -> Tensor:
    """L_simple, the mean squared error of the prediction (Ho et al. 2020, eq. 14): float32 scalar.

    `x_start`: float (B, C, H, W) in [-1, 1]; `t`: int64 (B,); `noise`: like `x_start`. Without
    `weighting` it is the plain mean squared error of the network's own target, whether eps, v or
    x_0; with one of WEIGHTINGS it is that weighting of x_0's error, capped at `max_weight`.

    With a learned variance it is L_hybrid = L_simple + 0.001 L_vlb (Nichol & Dhariwal 2021, eq.
    16). `autocast` runs the network, and it alone, in bfloat16; x_t, target and loss stay float32.
    """
    return loss_terms(
        model, process, x_start, t, noise, y, autocast, weighting=weighting, max_weight=max_weight
    ).mean()


def loss_terms(
    model: nn.Module,
    process: GaussianDiffusion,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor,
    y: Tensor | None = None,
    autocast: bool = False,
    *,
    weighting: str | None = None,
    max_weight: float | None = None,
) -> Tensor:
    """The loss of each image, float32 (B,): `simple_loss` is their mean."""
    x_t = process.q_sample(x_start, t, noise)
    with torch.autocast(x_start.device.type, torch.bfloat16, enabled=autocast):
        output = model(x_t, t, y)
    prediction, fraction = process.split_output(output.float(), x_t)
    error = (prediction - process.training_target(x_start, t, noise)).square().flatten(1).mean(1)
    loss = error * relative_weight(process, t, weighting, max_weight)
    if fraction is not None:
        # L_vlb is a sum over all T timesteps, so one random t stands for T of them. The prediction
        # is detached: the bound teaches the variance alone.
        output = torch.cat([prediction.detach(), fraction], dim=1)
        bound = variational_bound_term(process, x_start, x_t, t, output)
        loss = loss + process.timesteps / 1000 * bound
    return loss


def variational_bound_term(
    process: GaussianDiffusion,
    x_start: Tensor,
    x_t: Tensor,
    t: Tensor,
    output: Tensor,
    clip: bool = False,
) -> Tensor:
    """L_t of the variational bound (Ho et al. 2020, eq. 5), in bits per dimension: float32 (B,).

    `output` is the network's at `x_t`.
    For t > 0 the KL divergence of p(x_{t-1} | x_t) from the true posterior; at t = 0 the negative
    log-likelihood of the discretised decoder at x_0. `clip` clamps the predicted x_0 to [-1, 1], as
    sampling does.
    """
    prediction, fraction = process.split_output(output, x_t)
    predicted = process.predict_start(x_t, t, prediction)
    mean, _ = process.q_posterior_mean_variance(
        predicted.clamp(-1, 1) if clip else predicted, x_t, t
    )
    log_variance = process.p_log_variance(x_t, t, fraction)
    true_mean, _ = process.q_posterior_mean_variance(x_start, x_t, t)
    gap = process.extract(process.posterior_log_variance, t, x_t.ndim) - log_variance
    kl = 0.5 * (gap.exp() - 1 - gap + (true_mean - mean) ** 2 * (-log_variance).exp())
    nll = -discretized_gaussian_log_likelihood(x_start, mean, (0.5 * log_variance).exp())
    return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-likelihood of each 8-bit value x in [-1, 1] under a Gaussian, in nats, shaped like x.

    The discretised decoder of Ho et al. 2020, eq. 13.

    A value owns the interval of half a grey level to both sides, the darkest and the brightest all
    that lies beyond.
    """
    above = torch.special.ndtr((x + 1 / 255 - mean) / std)
    below = torch.special.ndtr((x - 1 / 255 - mean) / std)
    above = above.where(x < 0.999, 1.0)
    below = below.where(x > -0.999, 0.0)
    return (above - below).clamp(min=1e-12).log()


def check_classes(model: nn.Module, labels: Tensor) -> bool:
    """Does the model take labels? Raises ValueError where one of them is none of its classes."""
    classes = getattr(model, "num_classes", None)
    if classes is not None and len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"labels run from {int(labels.min())} to {int(labels.max())}, but this network knows "
            f"0..{classes - 1}: number the classes from 0, or build it with more num_classes"
        )
    return classes is not None


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    process: GaussianDiffusion,
    data: ImageDataset,
    *,
    weighting: str | None = "snr+1",
    max_weight: float | None = 400.0,
    count: int = 1024,
    batch_size: int = 64,
    seed: int = 0,
) -> float:
    """The weighted loss on held-out images, by which networks for the same data are compared.

    It is the mean of `count` terms, a function of `seed` alone: fixed images (all of `data` before
    any is used again), fixed noise, and timesteps spread evenly over 0..T-1. The model is in eval
    mode meanwhile. With a given `weighting`, networks that predict eps, v and x_0 are comparable.
    Under torchrun the processes share out the terms, and each gets the result.

    Raises ValueError where `count` is below 1 or a label is outside the network's classes.
    """
    if count < 1 or not len(data):
        raise ValueError(f"count is {count} and there are {len(data)} images: 1 or more are needed")
    labelled = check_classes(model, data.labels)
    device = process.betas.device
    generator = torch.Generator().manual_seed(seed)
    image = torch.randperm(len(data), generator=generator).repeat(-(-count // len(data)))[:count]
    t = (torch.arange(count) + 0.5).mul(process.timesteps / count).long()
    t = t[torch.randperm(count, generator=generator)]
    terms = []
    with evaluating(model):
        for rows in torch.arange(count).split(batch_size):
            # the noise of all images on the CPU, so that neither device nor processes change it
            shape = (len(rows), *data.images.shape[1:])
            noise = share(torch.randn(shape, generator=generator)).to(device)
            mine = share(rows)
            x = to_float(data.images[image[mine]].to(device))
            y = data.labels[image[mine]].to(device) if labelled else None
            options = {"weighting": weighting, "max_weight": max_weight}
            term = torch.zeros(0, device=device)
            if len(mine):  # the last batch may have fewer terms than there are processes
                term = loss_terms(model, process, x, t[mine].to(device), noise, y, **options)
            terms.append(gather(term, len(rows)).cpu().double())
    return torch.cat(terms).mean().item()
