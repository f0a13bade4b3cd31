"""Stage 11, flow matching: straight paths from images to noise, and the velocity along them.

Our convention is that of Esser et al. 2024: x_s = (1 - s) x_0 + s eps, so that s = 0 is the image,
s = 1 the noise, the velocity is dx_s / ds = eps - x_0, and sampling runs from s = 1 to 0. (Lipman
et al. 2023 and Liu et al. 2023 write t = 1 - s and the opposite sign.) In code s is one of T
levels, s = (t + 1) / T, so networks and guidance keep their signature `model(x, t, y=None)`, with t
int64 (B,) in 0..T-1; a flow's network predicts the velocity.
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .forward_process import GaussianDiffusion, check_integer
from .losses import logit_normal_timesteps
from .sampling import State
from .unet import check_labels, evaluating


@dataclass(frozen=True)
class StraightPath:
    """x_s = (1 - s) x_0 + s eps on the levels s = 1/T, 2/T, ..., 1, and what follows from it.

    `t` is int64 (B,) in 0..T-1, images are (B, ...). Raises ValueError for another t, and for
    fewer than 2 timesteps.
    """

    timesteps: int = 1000

    def __post_init__(self):
        check_integer("timesteps", self.timesteps, 2)

    def level(self, t: Tensor, ndim: int = 1) -> Tensor:
        """s = (t + 1) / T, float32, shaped (B, 1, ..., 1) with `ndim` axes."""
        if t.dtype != torch.int64 or t.ndim != 1:
            shape = tuple(t.shape)
            raise ValueError(f"t must be an int64 tensor of shape (B,), not {t.dtype} of {shape}")
        if t.device.type == "cpu" and len(t) and (t.min() < 0 or t.max() >= self.timesteps):
            raise ValueError(
                f"t runs from {int(t.min())} to {int(t.max())}, outside 0..{self.timesteps - 1}: "
                "the level s = (t + 1) / T must lie in (0, 1]"
            )
        return ((t + 1) / self.timesteps).reshape(-1, *[1] * (ndim - 1))

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_s = (1 - s) x_0 + s eps, float32."""
        s = self.level(t, x_start.ndim)
        return (1 - s) * x_start.float() + s * noise.float()

    def predict_start(self, x: Tensor, t: Tensor, velocity: Tensor) -> Tensor:
        """Where the straight path through x ends: x_0 = x_s - s velocity."""
        return x - self.level(t, x.ndim) * velocity

    def draw(
        self,
        count: int,
        *,
        mean: float = 0.0,
        std: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """int64 (count,) timesteps whose levels are logit-normal (Esser et al. 2024, sec. 3.1).

        logit(s) ~ N(mean, std^2): few lie near the ends. Raises ValueError unless std is positive
        and both are finite.
        """
        check_integer("count", count, 1)
        if not (0 < std < math.inf and math.isfinite(mean)):
            raise ValueError(
                f"mean is {mean} and std {std}: both must be finite, and std positive; 0 and 1 are "
                "the usual ones"
            )
        return logit_normal_timesteps(count, self.timesteps, mean, std, generator)

    def as_diffusion(self, prediction: str = "v") -> GaussianDiffusion:
        """The same path as a Gaussian diffusion: x_s / r with r = sqrt((1 - s)^2 + s^2).

        Its schedule is "straight", so `train` takes it too: with the weighting "flow" and
        logit-normal timesteps a step's loss is `flow_matching_loss` of `AsVelocity(model, ...)`.
        """
        return GaussianDiffusion.from_config("straight", self.timesteps, prediction)


def flow_matching_loss(
    model: nn.Module,
    path: StraightPath,
    x_start: Tensor,
    t: Tensor,
    noise: Tensor,
    y: Tensor | None = None,
) -> Tensor:
    """E |model(x_s, t, y) - (eps - x_0)|^2, conditional flow matching: float32 scalar.

    (Lipman et al. 2023, eq. 9; Liu et al. 2023, eq. 1.) `x_start` and `noise`: float (B, ...) of
    one shape. They may be independent, or the pairs of a rectification. Raises ValueError where
    the shapes differ.
    """
    if x_start.shape != noise.shape or len(t) != len(x_start):
        shapes = f"{tuple(x_start.shape)}, {tuple(noise.shape)} and {tuple(t.shape)}"
        raise ValueError(
            f"x_start, noise and t have the shapes {shapes}: x_start and noise must have one shape "
            "(B, ...), and t (B,)"
        )
    velocity = model(path.q_sample(x_start, t, noise), t, y).float()
    return (velocity - (noise.float() - x_start.float())).square().mean()


class AsVelocity(nn.Module):
    """A network trained for a Gaussian diffusion, seen as the velocity of a straight path.

    `model(x, t, y=None)` -> (x_s - x_0) / s, with the x_0 that the network predicts at the timestep
    of `process` whose noise level is nearest to s / (1 - s). The parameters are the network's own,
    so training this module trains the network. Raises ValueError for a learned variance.
    """

    matched: Tensor

    def __init__(self, model: nn.Module, process: GaussianDiffusion, path: StraightPath):
        super().__init__()
        if process.variance == "learned":
            raise ValueError(
                "the process has a learned variance, which a flow has no use for: take a network "
                "and a process with variance='posterior'"
            )
        self.model, self.process, self.path = model, process, path
        self.num_classes: Any = getattr(model, "num_classes", None)
        self.null_label: Any = getattr(model, "null_label", None)
        twin = path.as_diffusion()
        angles = [p.exact_alphas_cumprod.sqrt().acos() for p in (process, twin)]
        matched = torch.bucketize(angles[1], (angles[0][1:] + angles[0][:-1]) / 2)
        self.register_buffer("matched", matched.to(process.betas.device), persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The velocity, float32, shaped like x."""
        s = self.path.level(t, x.ndim)
        nearest = self.matched[t]
        scaled = x / ((1 - s) ** 2 + s**2).sqrt()
        output = self.model(scaled, self.process.timestep_map[nearest], y)
        return (x - self.process.predict_start(scaled, nearest, output)) / s


@torch.no_grad()
def flow_euler(
    model: nn.Module,
    path: StraightPath,
    x_T: Tensor,
    y: Tensor | None = None,
    *,
    steps: int = 20,
    clip: bool = True,
) -> Iterator[State]:
    """Euler's method on dx / ds = velocity, from the noise at s = 1 to s = 0 in even steps.

    x_T: float (B, ...) of standard normal noise; y: int64 (B,) labels or None. One call of the
    network per step. `clip` clamps each predicted x_0 to [-1, 1], as the other samplers do; leave
    it out for data that are no images. Raises ValueError at the first step for arguments that do
    not fit.
    """
    x = _start(model, path, x_T, y, steps)
    for t, following in _steps(path, steps):
        velocity, x_start = _predict(model, path, x, t, y, clip)
        x = x + (following - t) / path.timesteps * velocity
        yield State(t, x, x_start)


@torch.no_grad()
def flow_heun(
    model: nn.Module,
    path: StraightPath,
    x_T: Tensor,
    y: Tensor | None = None,
    *,
    steps: int = 10,
    clip: bool = True,
) -> Iterator[State]:
    """Heun's method: as `flow_euler`, with the mean of the velocities at both ends of a step.

    The last step, whose end s = 0 the network has never seen, is Euler's: 2 steps - 1 calls in all.
    """
    x = _start(model, path, x_T, y, steps)
    for t, following in _steps(path, steps):
        velocity, x_start = _predict(model, path, x, t, y, clip)
        end = x + (following - t) / path.timesteps * velocity
        if following >= 0:
            velocity_at_end, _ = _predict(model, path, end, following, y, clip)
            end = x + (following - t) / path.timesteps * (velocity + velocity_at_end) / 2
        x = end
        yield State(t, x, x_start)


def rectified_pairs(
    model: nn.Module,
    path: StraightPath,
    noise: Tensor,
    y: Tensor | None = None,
    *,
    steps: int = 8,
    clip: bool = True,
    batch_size: int = 64,
) -> Tensor:
    """Where the flow takes each noise, by Heun's method: float32 (B, ...), to train on in pairs.

    (The "reflow" of Liu et al. 2023.) It costs 2 steps - 1 calls per image. Raises ValueError
    for arguments that do not fit.
    """
    check_integer("batch_size", batch_size, 1)
    noise, ends = _start(model, path, noise, y, steps), []
    for i in range(0, len(noise), batch_size):
        labels = None if y is None else y[i : i + batch_size]
        states = flow_heun(model, path, noise[i : i + batch_size], labels, steps=steps, clip=clip)
        ends.append(deque(states, maxlen=1).pop().x)
    return torch.cat(ends)


def _steps(path: StraightPath, steps: int) -> Iterator[tuple[int, int]]:
    """Each t to visit with the one that follows it, from T-1 down to -1, where s = 0."""
    visited = [round(i * path.timesteps / steps) - 1 for i in range(steps, -1, -1)]
    yield from zip(visited[:-1], visited[1:], strict=True)


def _start(
    model: nn.Module, path: StraightPath, x_T: Tensor, y: Tensor | None, steps: int
) -> Tensor:
    """The first x, once all that a sampler is given has been checked."""
    check_integer("steps", steps, 1, path.timesteps)
    given = {"x_T": x_T} if y is None else {"x_T": x_T, "y": y}
    for name, value in given.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"{name} is a {kind}: it must be a tensor, as torch.tensor makes it")
    if x_T.ndim < 2 or len(x_T) == 0 or not x_T.is_floating_point():
        raise ValueError(
            f"x_T is {x_T.dtype} of shape {tuple(x_T.shape)}: it must be float (B, ...) noise for "
            "at least one image"
        )
    if y is not None:
        classes = getattr(model, "num_classes", None)
        check_labels(y.cpu(), len(x_T), classes, getattr(model, "null_label", None))
    return x_T.float()


def _predict(
    model: nn.Module, path: StraightPath, x: Tensor, t: int, y: Tensor | None, clip: bool
) -> tuple[Tensor, Tensor]:
    """One call of the network: the velocity, and the x_0 that agrees with it."""
    times = torch.full((len(x),), t, device=x.device)
    with evaluating(model):
        velocity = model(x, times, y).float()
    x_start = path.predict_start(x, times, velocity)
    if clip:
        x_start = x_start.clamp(-1, 1)
        velocity = (x - x_start) / path.level(times, x.ndim)
    return velocity, x_start
