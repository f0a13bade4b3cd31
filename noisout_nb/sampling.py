"""Stage 5, sampling: from noise to images. Every sampler is a generator that yields each state.

A sampler takes `(model, process, x_T, y=None, *, steps, spacing, generator)`: x_T float
(B, C, H, W) of standard normal noise, y int64 (B,) labels or None, both on the process's device,
and one generator, or one per image, where the sampler is stochastic. It visits `steps` of the T
timesteps (None: all), chosen by `spacing` as in `GaussianDiffusion.respace`, from T-1 down, and
yields a `State` per step. The model is called in eval mode, and each of its modules keeps its own
mode. All samplers raise ValueError at the first step for arguments that do not fit.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .forward_process import GaussianDiffusion, check_choice, check_integer
from .parallel import gather, share
from .progress import progress
from .unet import check_labels, evaluating

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclass
class State:
    """What one step leaves, all float32 and shaped like x_T.

    `t` is the timestep that the network saw, `x` the less noisy image that came of it, and
    `x_start` the clean image that it predicted, in [-1, 1].
    """

    t: int
    x: Tensor
    x_start: Tensor


def predict(
    model: nn.Module,
    process: GaussianDiffusion,
    x: Tensor,
    t: Tensor,
    y: Tensor | None = None,
    clip: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One call of the network: x_0, the noise that agrees with it, and the variance's fraction.

    x_0 is clamped to [-1, 1] if `clip`. The fraction is None unless the variance is learned. `t`
    counts the process's own timesteps; the network sees `timestep_map[t]`.
    """
    with evaluating(model):
        output = model(x, process.timestep_map[t], y)
    output, fraction = process.split_output(output, x)
    x_start = process.predict_start(x, t, output)
    if clip:
        x_start = x_start.clamp(-1, 1)
    return x_start, process.predict_noise_from_start(x, t, x_start), fraction


def p_mean_variance(
    model: nn.Module,
    process: GaussianDiffusion,
    x: Tensor,
    t: Tensor,
    y: Tensor | None = None,
    clip: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of p(x_{t-1} | x_t), and the predicted x_0.

    It is the posterior of Ho et al. 2020, eq. 7, with the network's x_0 in place of the true one;
    without `clip` the mean is that of eq. 11. The variance is the posterior's, (B, 1, ..., 1) and 0
    at t = 0, or the learned one, shaped like x.
    """
    x_start, _, fraction = predict(model, process, x, t, y, clip)
    mean, variance = process.q_posterior_mean_variance(x_start, x, t)
    if fraction is not None:
        variance = process.p_log_variance(x, t, fraction).exp()
    return mean, variance, x_start


@torch.no_grad()
def ddpm(
    model: nn.Module,
    process: GaussianDiffusion,
    x_T: Tensor,
    y: Tensor | None = None,
    *,
    steps: int | None = None,
    spacing: str = "uniform",
    generator: Generators = None,
) -> Iterator[State]:
    """Algorithm 2 of Ho et al. 2020: stochastic, with the process's variance."""
    process, x = _start(process, x_T, y, steps, spacing)
    for i, t in _timesteps(process, x):
        mean, variance, x_start = p_mean_variance(model, process, x, t, y)
        x = mean
        if i > 0:  # the last step adds no noise
            x = mean + variance.sqrt() * _randn(x, generator)
        yield State(int(process.timestep_map[i]), x, x_start)


@torch.no_grad()
def ddim(
    model: nn.Module,
    process: GaussianDiffusion,
    x_T: Tensor,
    y: Tensor | None = None,
    *,
    steps: int | None = 50,
    spacing: str = "uniform",
    eta: float = 0.0,
    generator: Generators = None,
) -> Iterator[State]:
    """Song et al. 2021, eq. 12: deterministic for eta = 0; eta = 1 is `ddpm` (their eq. 16).

    With eta = 0 it is Euler's method on the probability-flow ODE d(x / alpha) = eps d(sigma), with
    alpha = sqrt(alpha_bar) and sigma = sqrt((1 - alpha_bar) / alpha_bar): first order.
    """
    _check_eta(eta)
    process, x = _start(process, x_T, y, steps, spacing)
    for i, t in _timesteps(process, x):
        x_start, noise, _ = predict(model, process, x, t, y)
        x = _ddim_step(process, i, x_start, noise, eta, generator)
        yield State(int(process.timestep_map[i]), x, x_start)


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: it must lie in 0..1, from deterministic to DDPM's noise")


def _ddim_step(
    process: GaussianDiffusion,
    i: int,
    x_start: Tensor,
    noise: Tensor,
    eta: float,
    generator: Generators,
) -> Tensor:
    """x_{i-1} of Song et al. 2021, eq. 12; the last step, to x_0, adds no noise."""
    variance = eta**2 * process.posterior_variance[i]
    alpha_bar = process.alphas_cumprod_prev[i]
    x = alpha_bar.sqrt() * x_start + (1 - alpha_bar - variance).clamp(min=0).sqrt() * noise
    if eta > 0 and i > 0:
        x = x + variance.sqrt() * _randn(x, generator)
    return x


@torch.no_grad()
def dpm_solver(
    model: nn.Module,
    process: GaussianDiffusion,
    x_T: Tensor,
    y: Tensor | None = None,
    *,
    steps: int | None = 20,
    spacing: str = "uniform",
    eta: float = 0.0,
    generator: Generators = None,
) -> Iterator[State]:
    """DPM-Solver++(2M), Algorithm 2 of Lu et al. 2022: second order, deterministic for eta = 0.

    It is DDIM with a better x_0: over lambda = log sqrt(alpha_bar / (1 - alpha_bar)) the last two
    predicted x_0 are extrapolated along a line to the middle of the step. The first step, which
    has no predecessor, and the last one, where lambda is infinite, are DDIM's. With eta > 0 each
    step removes and adds as much noise as that of `ddim` does.
    """
    _check_eta(eta)
    process, x = _start(process, x_T, y, steps, spacing)
    lambdas = (-process.sigmas.double().log()).tolist()
    previous = None
    for i, t in _timesteps(process, x):
        x_start, noise, _ = predict(model, process, x, t, y)
        target = x_start
        if previous is not None and i > 0:
            ratio = (lambdas[i - 1] - lambdas[i]) / (lambdas[i] - lambdas[i + 1])
            target = x_start + ratio / 2 * (x_start - previous)
            noise = process.predict_noise_from_start(x, t, target)
        x = _ddim_step(process, i, target, noise, eta, generator)
        previous = x_start
        yield State(int(process.timestep_map[i]), x, x_start)


def sde_dpm_solver(
    model: nn.Module,
    process: GaussianDiffusion,
    x_T: Tensor,
    y: Tensor | None = None,
    *,
    steps: int | None = 20,
    spacing: str = "uniform",
    generator: Generators = None,
) -> Iterator[State]:
    """SDE-DPM-Solver++(2M) of Lu et al. 2022: `dpm_solver` with eta = 1, as `ddpm` is to `ddim`.

    Noise removed along with that of the image takes errors of earlier steps with it.
    """
    options = {"steps": steps, "spacing": spacing, "generator": generator}
    return dpm_solver(model, process, x_T, y, eta=1.0, **options)


@torch.no_grad()
def heun(
    model: nn.Module,
    process: GaussianDiffusion,
    x_T: Tensor,
    y: Tensor | None = None,
    *,
    steps: int | None = 20,
    spacing: str = "uniform",
    generator: Generators = None,
) -> Iterator[State]:
    """Heun's method on the probability-flow ODE, Algorithm 1 of Karras et al. 2022: second order.

    A DDIM step, then a second call of the network at its end: the step is taken again with the mean
    of both noises. The last step, to sigma = 0, is DDIM's alone, and so is the first one, whose
    sigma falls from up to 20,000: 2 steps - 2 calls in all. `generator` is not used.
    """
    process, x = _start(process, x_T, y, steps, spacing)
    for i, t in _timesteps(process, x):
        x_start, noise, _ = predict(model, process, x, t, y)
        alpha_bar = process.alphas_cumprod_prev[i]
        start = x
        x = alpha_bar.sqrt() * x_start + (1 - alpha_bar).sqrt() * noise
        if 0 < i < process.timesteps - 1:
            _, noise_at_end, _ = predict(model, process, x, t - 1, y)
            slope = (noise + noise_at_end) / 2
            step = process.sigmas[i - 1] - process.sigmas[i]
            x = alpha_bar.sqrt() * (start / process.sqrt_alphas_cumprod[i] + step * slope)
        yield State(int(process.timestep_map[i]), x, x_start)


SAMPLERS = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm_solver": dpm_solver,
    "sde_dpm_solver": sde_dpm_solver,
    "heun": heun,
}


def sample(
    model: nn.Module,
    process: GaussianDiffusion,
    y: Tensor | None = None,
    *,
    shape: tuple[int, int, int] = (3, 32, 32),
    count: int = 1,
    sampler: str = "dpm_solver",
    steps: int | None = 20,
    spacing: str = "uniform",
    seed: int = 0,
    batch_size: int = 64,
) -> Tensor:
    """Images sampled from noise: float32 (count, *shape) in [-1, 1], on the process's device.

    `y`: int64 (count,) labels, which then set the count, or None. `model` may be a guidance
    wrapper. Image i of a seed depends on the seed, i, its label and the settings only, not on
    `count` or `batch_size`, which bounds the memory. Under torchrun the processes share the work,
    and each gets all images. Raises ValueError for arguments that do not fit.
    """
    check_choice("sampler", sampler, tuple(SAMPLERS))
    batch_size = check_integer("batch_size", batch_size, 1)
    seed = check_integer("seed", seed)
    device = process.betas.device
    if y is not None:
        _check_labels(model, y)
        count = len(y)
        y = y.to(device)
    count = check_integer("count", count, 1)
    mine = share(torch.arange(count))
    starts = range(0, len(mine), batch_size)
    images = [torch.empty(0, *shape, device=device)]  # all that a process without a share has
    for start in progress(starts, description="samples") if len(starts) > 1 else starts:
        batch = mine[start : start + batch_size]
        generators = [image_generator(seed, i) for i in batch.tolist()]
        x_T = torch.stack([torch.randn(*shape, generator=g) for g in generators]).to(device)
        labels = None if y is None else y[batch.to(device)]
        states = SAMPLERS[sampler](
            model, process, x_T, labels, steps=steps, spacing=spacing, generator=generators
        )
        [last] = deque(states, maxlen=1)
        images.append(last.x)
    return gather(torch.cat(images), count)


def image_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of image `index` of a seed, the same in every batch (as in EDM's code).

    PyTorch's CPU generator uses 32 bits of its seed. Strides of 2^32 / 1.618 keep the images of
    different seeds far apart, whatever the seeds are.
    """
    return torch.Generator().manual_seed((2_654_435_769 * seed + index) % 2**32)


def _start(
    process: GaussianDiffusion, x_T: Tensor, y: Tensor | None, steps: int | None, spacing: str
) -> tuple[GaussianDiffusion, Tensor]:
    """The respaced process and the first x, once all that a sampler is given has been checked."""
    given = {"x_T": x_T} if y is None else {"x_T": x_T, "y": y}
    for name, value in given.items():
        _check_tensor(name, value)
        if value.device != process.betas.device:
            raise ValueError(
                f"{name} is on {value.device}, the process on {process.betas.device}: move {name} "
                "there with .to(process.betas.device)"
            )
    if x_T.ndim != 4 or len(x_T) == 0 or not x_T.is_floating_point():
        raise ValueError(
            f"x_T is {x_T.dtype} of shape {tuple(x_T.shape)}: it must be float (B, C, H, W) noise "
            "for at least one image"
        )
    steps = process.timesteps if steps is None else steps
    return process.respace(steps, spacing), x_T.float()


def _timesteps(process: GaussianDiffusion, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The process's timesteps from the last to 0, as int and as int64 (B,)."""
    for i in reversed(range(process.timesteps)):
        yield i, torch.full((len(x),), i, device=x.device)


def _randn(x: Tensor, generator: Generators) -> Tensor:
    """Standard normal numbers shaped like x, drawn where the generators live."""
    if generator is None or isinstance(generator, torch.Generator):
        device = x.device if generator is None else generator.device
        return torch.randn(x.shape, generator=generator, device=device).to(x.device)
    if len(generator) != len(x):
        raise ValueError(f"{len(generator)} generators for {len(x)} images: give one per image")
    rows = [torch.randn(x.shape[1:], generator=g, device=g.device) for g in generator]
    return torch.stack(rows).to(x.device)


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        raise ValueError(
            f"{name} is a {kind}: it must be a tensor, such as torch.as_tensor({name})"
        )


def _check_labels(model: nn.Module, y: Tensor) -> None:
    """Checks labels before they go to a GPU, which could only stop with an error of its own."""
    _check_tensor("y", y)
    classes = getattr(model, "num_classes", None)
    check_labels(y.cpu(), y.numel(), classes)
