"""Stage 10, editing: inpainting, SDEdit and inversion, with the samplers as they are.

Masks: bool, or float of 0 (keep) and 1 (paint anew), (H, W), or (B, 1, H, W) for one per image;
images x_0: float (B, C, H, W) in [-1, 1]. Anything else raises ValueError.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .forward_process import GaussianDiffusion, check_integer
from .sampling import State, ddim, ddpm, predict


class Inpainting(nn.Module):
    """A model that knows part of the image, for any sampler: x_0 in place of its prediction.

    Where the mask is 0, x_t is then a sample of q(x_t | x_0), and x_0 at the end: *replacement*
    (Lugmayr et al. 2022, eq. 8). `x_0` has as many images as the batch, or one for all; `process`
    is the one that the model was trained with, not a respaced one.
    """

    def __init__(self, model: nn.Module, process: GaussianDiffusion, x_0: Tensor, mask: Tensor):
        super().__init__()
        _check_images(x_0)
        self.model, self.process, self.x_0 = model, process, x_0.float()
        self.mask = _as_bool(mask, x_0)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The output with the known x_0 in it, shaped like the model's."""
        if x.shape[1:] != self.x_0.shape[1:] or len(self.x_0) not in (1, len(x)):
            raise ValueError(f"x is {[*x.shape]}, x_0 {[*self.x_0.shape]}: the shapes must agree")
        output = self.model(x, t, y)
        prediction, _ = self.process.split_output(output, x)
        noise = self.process.predict_noise_from_start(x, t, self.x_0)
        known = self.process.training_target(self.x_0, t, noise)
        return torch.cat([torch.where(self.mask, prediction, known), output[:, x.shape[1] :]], 1)


def repaint(
    model: nn.Module,
    process: GaussianDiffusion,
    x_T: Tensor,
    y: Tensor | None = None,
    *,
    steps: int = 20,
    spacing: str = "uniform",
    repeats: int = 5,
    generator: torch.Generator | None = None,
) -> Iterator[State]:
    """RePaint (Lugmayr et al. 2022, Algorithm 1): DDPM that takes each step `repeats` times.

    Between two times q(x_t | x_{t-1}) leads back up, so that both sides of the mask come to agree.
    The last step, which adds no noise, is taken once. `model` is an `Inpainting`. It makes
    `repeats` times as many calls as `ddpm`; with 1 it is `ddpm`.
    """
    process, x = process.respace(steps, spacing), x_T
    repeats = check_integer("repeats", repeats, 1)
    for i in reversed(range(steps)):
        part, beta = first_timesteps(process, i + 1), process.betas[i]
        for again in reversed(range(repeats if i > 0 else 1)):
            state = next(ddpm(model, part, x, y, generator=generator))
            yield state
            x = state.x
            if again:
                noise = torch.randn(x.shape, generator=generator, device=x.device)
                x = (1 - beta).sqrt() * x + beta.sqrt() * noise


def sdedit(
    model: nn.Module,
    process: GaussianDiffusion,
    x_0: Tensor,
    y: Tensor | None = None,
    *,
    strength: float,
    steps: int = 20,
    sampler: Callable = ddim,
    generator: torch.Generator | None = None,
) -> Tensor:
    """SDEdit (Meng et al. 2022): noise up to timestep `strength` T, then sample back.

    Returns images; 0 returns x_0, 1 keeps nothing of it. Takes the same share of `steps`.
    """
    _check_images(x_0)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}: it must lie in 0..1, from x_0 itself to new")
    if (count := round(strength * process.timesteps)) == 0:
        return x_0.float()
    noise = torch.randn(x_0.shape, generator=generator, device=x_0.device)
    x = process.q_sample(x_0, torch.full((len(x_0),), count - 1, device=x_0.device), noise)
    part = first_timesteps(process, count)
    steps = max(1, round(strength * check_integer("steps", steps, 1)))
    *_, last = sampler(model, part, x, y, steps=steps, generator=generator)
    return last.x


@torch.no_grad()
def invert(
    model: nn.Module,
    process: GaussianDiffusion,
    x_0: Tensor,
    y: Tensor | None = None,
    *,
    steps: int = 20,
    spacing: str = "karras",
    iterations: int = 1,
) -> Iterator[State]:
    """DDIM backwards (Song et al. 2021, sec. 4.3): the last x is the noise that leads to x_0.

    A step needs the noise predicted where it ends; the first of the `iterations` takes that from
    where it starts, the others from where the one before ended (a fixed point inverts exactly).
    """
    _check_images(x_0)
    process, x = process.respace(steps, spacing), x_0.float()
    for i in range(steps):
        t, alpha_bar = torch.full((len(x),), i, device=x.device), process.alphas_cumprod_prev[i]
        end, rise = x, process.sigmas[i] - ((1 - alpha_bar) / alpha_bar).sqrt()
        for _ in range(check_integer("iterations", iterations, 1)):
            x_start, noise, _ = predict(model, process, end, t, y)
            end = process.sqrt_alphas_cumprod[i] * (x / alpha_bar.sqrt() + rise * noise)
        x = end
        yield State(int(process.timestep_map[i]), x, x_start)


def first_timesteps(process: GaussianDiffusion, count: int) -> GaussianDiffusion:
    """The process at its first `count` timesteps alone: the way back from there, for a sampler."""
    betas, seen = process.exact_betas[:count], process.timestep_map[:count].cpu()
    part = GaussianDiffusion(betas, process.prediction, seen, process.variance)
    return part.to(process.betas.device)


def _check_images(x_0: Any) -> None:
    kind, shape = getattr(x_0, "dtype", type(x_0).__name__), tuple(getattr(x_0, "shape", ()))
    if len(shape) != 4 or 0 in shape or not x_0.is_floating_point():
        raise ValueError(f"x_0 is {kind} {shape}: it must be float (B, C, H, W), see data.to_float")
    if not (largest := float(x_0.abs().max())) <= 1.001:
        raise ValueError(f"x_0 reaches {largest:.3g}: it must lie in -1..1, as data.to_float gives")


def _as_bool(mask: Any, x_0: Tensor) -> Tensor:
    kind, shape = getattr(mask, "dtype", type(mask).__name__), tuple(getattr(mask, "shape", ()))
    size, full = tuple(x_0.shape[2:]), (len(x_0), 1, *x_0.shape[2:])
    if shape not in (size, full) or not (kind == torch.bool or mask.is_floating_point()):
        raise ValueError(f"the mask is {kind} {shape}: it must be bool or float, {size} or {full}")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("the mask has values other than 0 (keep) and 1 (paint): take mask > 0.5")
    return mask.bool().to(x_0.device).view(-1, 1, *size)
