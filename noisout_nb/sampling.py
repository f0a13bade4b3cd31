"""Stage 5, sampling: from noise to pictures. Every sampler is a generator, so that a film, a widget or a metric can follow.

A sampler takes `(model, process, x_T, y=None, ...)`: x_T (B, C, H, W) standard normal, y (B,) labels or None, and
yields a `State` a step, from the noisiest to t = 0. It visits `steps` of the T times, evenly spaced, the first T-1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .data import species_labels
from .forward_process import GaussianDiffusion
from .guidance import ClassifierFreeGuidance
from .parallel import gather, get_device, rank_and_world, share
from .profiles import PROFILES
from .training import load_model


@dataclass
class State:
    """One step of the reverse process, seen just after it: `t`, the time that the network was asked about;
    `x`, the less noisy picture that came of it; `x_start`, the clean picture that the network believed in, in [-1, 1].
    """

    t: int
    x: Tensor
    x_start: Tensor


def ask(model: nn.Module, process: GaussianDiffusion, x: Tensor, t: Tensor, y: Tensor | None = None, clip: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """The network's x_0, clamped to [-1, 1]; the noise that agrees with it; the variance's fraction, if it is learned."""
    answer, fraction = process.split_output(model(x, process.timestep_map[t], y), x)
    x_start = process.predict_start(x, t, answer)
    x_start = x_start.clamp(-1, 1) if clip else x_start
    return x_start, process.predict_noise_from_start(x, t, x_start), fraction


def p_mean_variance(model: nn.Module, process: GaussianDiffusion, x: Tensor, t: Tensor, y: Tensor | None = None, clip: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of p(x_{t-1} | x_t), and the predicted x_0: the posterior of eq. 7 with the network's x_0.

    The variance is the posterior's, eq. 7, (B, 1, ..., 1) and 0 at t = 0, or the learned one, shaped like x. Without `clip`
    the mean is that of eq. 11.
    """
    x_start, _, fraction = ask(model, process, x, t, y, clip)
    mean, variance = process.q_posterior_mean_variance(x_start, x, t)
    if fraction is not None:
        variance = process.p_log_variance(x, t, fraction).exp()
    return mean, variance, x_start


def _visit(model: nn.Module, process: GaussianDiffusion, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The process's times from the last to 0, as int and as int64 (B,), with the model in eval mode meanwhile."""
    was_training = model.training
    model.eval()
    try:
        for i in reversed(range(process.timesteps)):
            yield i, torch.full((len(x),), i, device=x.device)
    finally:
        model.train(was_training)


@torch.no_grad()
def ddpm(model: nn.Module, process: GaussianDiffusion, x_T: Tensor, y: Tensor | None = None, *,
         steps: int | None = None, generator: torch.Generator | None = None) -> Iterator[State]:  # fmt: skip
    """Algorithm 2 of Ho et al. 2020, with the process's variance; all T steps unless `steps` says fewer."""
    process, x = process.respace(steps or process.timesteps), x_T
    for i, t in _visit(model, process, x):
        mean, variance, x_start = p_mean_variance(model, process, x, t, y)
        x = mean
        if i > 0:  # the last step adds no noise
            x = mean + variance.sqrt() * torch.randn(x.shape, generator=generator, device=x.device)
        yield State(int(process.timestep_map[i]), x, x_start)


@torch.no_grad()
def ddim(model: nn.Module, process: GaussianDiffusion, x_T: Tensor, y: Tensor | None = None, *,
         steps: int = 50, eta: float = 0.0, generator: torch.Generator | None = None) -> Iterator[State]:  # fmt: skip
    """Song et al. 2021, eq. 12: deterministic for eta = 0; eta = 1 is `ddpm` (their eq. 16)."""
    process, x = process.respace(steps), x_T
    for i, t in _visit(model, process, x):
        x_start, noise, _ = ask(model, process, x, t, y)
        alpha_bar_prev = process.alphas_cumprod_prev[i]
        sigma = eta * process.posterior_variance[i].sqrt()
        x = alpha_bar_prev.sqrt() * x_start + (1 - alpha_bar_prev - sigma**2).clamp(min=0).sqrt() * noise
        if eta > 0 and i > 0:
            x = x + sigma * torch.randn(x.shape, generator=generator, device=x.device)
        yield State(int(process.timestep_map[i]), x, x_start)


@torch.no_grad()
def dpm_solver(model: nn.Module, process: GaussianDiffusion, x_T: Tensor, y: Tensor | None = None, *,
               steps: int = 20, generator: torch.Generator | None = None) -> Iterator[State]:  # fmt: skip
    """DPM-Solver++(2M) of Lu et al. 2022, Algorithm 2: deterministic (no use for the generator), second order, one network call a step.

    It is DDIM with a better x_0: over lambda = log sqrt(alpha_bar / (1 - alpha_bar)) the last two predicted x_0 are
    drawn on in a straight line to the middle of the step. The first and the last step are plain DDIM.
    """
    process, x = process.respace(steps), x_T
    alpha_bar = process.exact_alphas_cumprod
    lambdas = (0.5 * (alpha_bar / (1 - alpha_bar)).log()).tolist()
    previous = None
    for i, t in _visit(model, process, x):
        x_start, noise, _ = ask(model, process, x, t, y)
        target = x_start
        if previous is not None and i > 0:
            target = x_start + (x_start - previous) * (lambdas[i - 1] - lambdas[i]) / (2 * (lambdas[i] - lambdas[i + 1]))
            noise = process.predict_noise_from_start(x, t, target)
        alpha_bar_prev = process.alphas_cumprod_prev[i]
        x = alpha_bar_prev.sqrt() * target + (1 - alpha_bar_prev).sqrt() * noise
        previous = x_start
        yield State(int(process.timestep_map[i]), x, x_start)


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm_solver": dpm_solver}


def sample(model: nn.Module, process: GaussianDiffusion, y: Tensor | None = None, *, shape: tuple[int, int, int] = (3, 32, 32),
                 count: int = 1, sampler: str = "dpm_solver", steps: int = 20, seed: int = 0, batch_size: int = 512) -> Tensor:  # fmt: skip
    """Pictures that the reverse process draws out of noise: float32 (count, *shape) in [-1, 1], on the process's device.

    `y`: int64 (count,) labels, which then set the count, or None. `model` may be a guidance wrapper. The same seed
    gives the same pictures. `batch_size` of them at a time, which bounds the memory. Under torchrun the processes share out the work, and each gets all pictures.
    Raises ValueError for an unknown sampler.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    generator = torch.Generator().manual_seed(seed)  # on the CPU, so that a GPU starts from the same noise
    count = count if y is None else len(y)
    x_T = torch.randn(count, *shape, generator=generator).to(process.betas.device)
    dice = torch.Generator(x_T.device).manual_seed(1_000_003 * (1 + rank_and_world()[0]) + seed)  # other dice in each process
    noises, drawn = share(x_T).split(batch_size), []
    labels = [None] * len(noises) if y is None else share(y).split(batch_size)
    for noise, label in zip(noises, labels):
        for state in SAMPLERS[sampler](model, process, noise, label, steps=steps, generator=dice):
            pass
        drawn.append(state.x)
    return gather(torch.cat(drawn), count)


def sample_image(species: str | Sequence[str], count: int = 1, *, guidance_scale: float = 3.0, weights: str | Path = PROFILES["flowers64-folded"].weights, **options) -> Tensor:
    """Flowers by name, drawn by the trained network of `weights`, 64 x 64 pixels by default: float32 (N, 3, H, W) in [-1, 1] on the CPU.

    `count` of each of the species, one after the other. `options` are those of `sample`: sampler, steps, seed. Raises
    ValueError for an unknown species, and what `load_model` raises.

    >>> sample_image(["sunflower", "rose"], 2, steps=2).shape
    torch.Size([4, 3, 64, 64])
    """
    model, process, classes = load_model(weights, get_device())
    y = species_labels(species, classes).repeat_interleave(count).to(process.betas.device)
    shape = (3, model.config["image_size"], model.config["image_size"])
    return sample(ClassifierFreeGuidance(model, guidance_scale), process, y, shape=shape, **options).cpu()
