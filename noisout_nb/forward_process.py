"""Stage 2, the forward process: noise added step by step, and all that follows in closed form.

Symbols are those of Ho et al. 2020: x_0 a clean image, x_T pure noise, beta_t the variance added in
step t, alpha_t = 1 - beta_t and alpha_bar_t = alpha_1 ... alpha_t. In code t runs over 0..T-1: the
paper's t minus one.
"""

import math
import operator
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

PREDICTIONS = ("eps", "v", "x0")
VARIANCES = ("posterior", "learned")
SPACINGS = ("uniform", "lambda", "karras")
SIGMA_MAX = 80.0  # at more noise nothing is left to see (Karras et al. 2022)


def check_integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """`value` as an int; numpy's integers count, True and False do not.

    Raises ValueError unless it is an integer from `low` to `high`, where these are given.
    """
    wanted = "" if low is None else f" of at least {low}" if high is None else f" in {low}..{high}"
    number = None
    if not isinstance(value, bool):
        with suppress(TypeError):
            number = operator.index(value)
    if number is not None and (low is None or low <= number) and (high is None or number <= high):
        return number
    raise ValueError(f"{name} is {value!r}: it must be an integer{wanted}")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of the allowed names."""
    if value not in allowed:
        raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(allowed)}")


def linear_beta_schedule(timesteps: int = 1000) -> Tensor:
    """Betas rising linearly, from 1e-4 to 0.02 for T = 1000 (Ho et al. 2020, sec. 4): float64 (T,).

    For another T both ends are scaled by 1000 / T, so that fewer, larger steps add the same noise.
    Raises ValueError for T of 20 or less, where the last beta would reach 1.

    >>> linear_beta_schedule(1000)[[0, -1]].tolist()
    [0.0001, 0.02]
    """
    timesteps = check_integer("timesteps", timesteps, 1)
    scale = 1000 / timesteps
    if scale * 0.02 >= 1:
        raise ValueError(
            f"timesteps is {timesteps}: the linear schedule needs more than 20, for its last beta "
            "is 20 / timesteps. Take the cosine schedule, or sample a process of 1000 in few steps"
        )
    return torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64)


def cosine_beta_schedule(timesteps: int = 1000, s: float = 0.008) -> Tensor:
    """Betas whose alpha_bar follows cos^2 (Nichol & Dhariwal 2021, eq. 17): float64 (timesteps,).

    As in the paper, no beta is larger than 0.999.
    """
    timesteps = check_integer("timesteps", timesteps, 1)
    u = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def straight_beta_schedule(timesteps: int = 1000) -> Tensor:
    """Betas of flow matching's path (1 - s) x_0 + s eps with s = (t + 1) / T: float64 (timesteps,).

    Divided by its length r = sqrt((1 - s)^2 + s^2) it has alpha_bar = ((1 - s) / r)^2. At s = 1
    that would be 0, for which no beta below 1 exists: there the last beta is 1 - 1e-6.
    """
    timesteps = check_integer("timesteps", timesteps, 1)
    s = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
    alpha_bar = (1 - s) ** 2 / ((1 - s) ** 2 + s**2)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return (1 - alpha_bar / previous).clamp(max=1 - 1e-6)


SCHEDULES = {
    "linear": linear_beta_schedule,
    "cosine": cosine_beta_schedule,
    "straight": straight_beta_schedule,
}


class GaussianDiffusion(nn.Module):
    """The tables of one noise schedule and the closed forms built on them.

    - `betas`: (T,), each strictly between 0 and 1.
    - `prediction`: what the network's output means: "eps", the noise (Ho et al. 2020), "v"
      (Salimans & Ho 2022) or "x0", the clean image.
    - `variance`: that of a reverse step: "posterior", beta tilde of eq. 7, or "learned" (Nichol &
      Dhariwal 2021), for which the network has twice as many output channels, see `split_output`.
    - `timestep_map`: int64 (T,), rising: the t that the network sees at each step. Only a respaced
      process has one that differs from 0..T-1.

    All tables are computed in float64 and kept in float32. They are buffers, so `.to(device)` moves
    them, and no part of the state_dict. Every method takes `t` as int64 (B,) in 0..T-1 and images
    as (B, ...) tensors. Raises ValueError for arguments that do not fit.
    """

    betas: Tensor
    alphas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    sigmas: Tensor  # the noise level sqrt((1 - alpha_bar) / alpha_bar) of Karras et al. 2022
    posterior_variance: Tensor
    posterior_log_variance: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    timestep_map: Tensor

    def __init__(
        self,
        betas: Tensor | Sequence[float],
        prediction: str = "eps",
        timestep_map: Tensor | Sequence[int] | None = None,
        variance: str = "posterior",
    ):
        super().__init__()
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if betas.ndim != 1 or len(betas) == 0 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(
                "betas must be one row of numbers strictly between 0 and 1, such as "
                "cosine_beta_schedule()"
            )
        check_choice("prediction", prediction, PREDICTIONS)
        check_choice("variance", variance, VARIANCES)
        self.prediction = prediction
        self.variance = variance
        self.timesteps = len(betas)
        self.exact_betas = betas
        self.exact_alphas_cumprod = torch.cumprod(1 - betas, 0)
        for name, table in self._tables().items():
            self.register_buffer(name, table.float(), persistent=False)

        steps = torch.arange(self.timesteps)
        timestep_map = steps if timestep_map is None else torch.as_tensor(timestep_map)
        rising = timestep_map.shape == steps.shape and (timestep_map.diff() > 0).all()
        if timestep_map.dtype != torch.int64 or not rising or timestep_map[0] < 0:
            raise ValueError(
                f"timestep_map must be {self.timesteps} rising integers, one for each beta"
            )
        self.register_buffer("timestep_map", timestep_map, persistent=False)

    def _tables(self) -> dict[str, Tensor]:
        betas, alpha_bar = self.exact_betas, self.exact_alphas_cumprod
        alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        variance = betas * (1 - alpha_bar_prev) / (1 - alpha_bar)
        # The variance at t = 0 is 0; its logarithm takes the value of t = 1 (Ho et al. 2020).
        nonzero = torch.cat([variance[1:2], variance[1:]]) if len(betas) > 1 else betas
        return {
            "betas": betas,
            "alphas": 1 - betas,
            "alphas_cumprod": alpha_bar,
            "alphas_cumprod_prev": alpha_bar_prev,
            "sqrt_alphas_cumprod": alpha_bar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - alpha_bar).sqrt(),
            "sigmas": ((1 - alpha_bar) / alpha_bar).sqrt(),
            "posterior_variance": variance,
            "posterior_log_variance": nonzero.log(),
            "posterior_mean_coef1": betas * alpha_bar_prev.sqrt() / (1 - alpha_bar),
            "posterior_mean_coef2": (1 - betas).sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar),
        }

    @classmethod
    def from_config(
        cls,
        schedule: str | Sequence[float] = "cosine",
        timesteps: int = 1000,
        prediction: str = "x0",
        variance: str = "posterior",
        timestep_map: Sequence[int] | None = None,
    ) -> "GaussianDiffusion":
        """The process that `config` describes: a schedule by name, or its `timesteps` betas.

        Raises ValueError for an unknown schedule, prediction or variance, and for betas that are
        not `timesteps` many.

        >>> GaussianDiffusion.from_config("linear", 100, "v").config["schedule"]
        'linear'
        """
        if isinstance(schedule, str):
            check_choice("schedule", schedule, tuple(SCHEDULES))
            betas = SCHEDULES[schedule](timesteps)
        else:
            betas = torch.as_tensor(schedule, dtype=torch.float64)
            if betas.numel() != check_integer("timesteps", timesteps, 1):
                raise ValueError(
                    f"schedule has {betas.numel()} betas, but timesteps is {timesteps}"
                )
        return cls(betas, prediction, timestep_map, variance)

    @property
    def config(self) -> dict:
        """The arguments of `from_config` that build this process again, as plain JSON values."""
        betas = self.exact_betas
        schedule = betas.tolist()
        for name, make in SCHEDULES.items():
            with suppress(ValueError):  # linear does not exist for few timesteps
                schedule = name if torch.equal(make(len(betas)), betas) else schedule
        config = {
            "schedule": schedule,
            "timesteps": self.timesteps,
            "prediction": self.prediction,
            "variance": self.variance,
        }
        if self.timestep_map.tolist() != list(range(self.timesteps)):
            config["timestep_map"] = self.timestep_map.tolist()
        return config

    def extract(self, table: Tensor, t: Tensor, ndim: int) -> Tensor:
        """The table's entries at t, shaped (B, 1, ..., 1) with `ndim` axes.

        Raises ValueError unless t is int64 (B,), and on the CPU unless all t are in 0..T-1. On a
        GPU, reading t in Python would make the processor wait: there `gather` itself stops a t out
        of range.
        """
        if t.dtype != torch.int64 or t.ndim != 1:
            shape = tuple(t.shape)
            raise ValueError(f"t must be an int64 tensor of shape (B,), not {t.dtype} of {shape}")
        readable = t.device.type == "cpu" and not torch.compiler.is_compiling()
        if readable and len(t) and (t.min() < 0 or t.max() >= self.timesteps):
            raise ValueError(
                f"t runs from {int(t.min())} to {int(t.max())}, outside 0..{self.timesteps - 1} "
                "(the papers' t = 1..T is t = 0..T-1 here)"
            )
        return table.gather(0, t).reshape(-1, *[1] * (ndim - 1))

    def _signal_and_noise(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t)."""
        signal = self.extract(self.sqrt_alphas_cumprod, t, ndim)
        noise = self.extract(self.sqrt_one_minus_alphas_cumprod, t, ndim)
        return signal, noise

    # The forward process

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t in one jump: sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (eq. 4), float32."""
        a, b = self._signal_and_noise(t, x_start.ndim)
        return a * x_start.float() + b * noise.float()

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eqs. 6 and 7).

        The variance has the shape (B, 1, ..., 1) and is 0 at t = 0.
        """
        a = self.extract(self.posterior_mean_coef1, t, x_t.ndim)
        b = self.extract(self.posterior_mean_coef2, t, x_t.ndim)
        return a * x_start + b * x_t, self.extract(self.posterior_variance, t, x_t.ndim)

    def signal_to_noise_ratio(self, t: Tensor) -> Tensor:
        """alpha_bar_t / (1 - alpha_bar_t), float32 (B,)."""
        return self.extract(self.sigmas, t, 1) ** -2

    # Given x_t, each of x_0, eps and v determines the other two.

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t)."""
        a, b = self._signal_and_noise(t, x_t.ndim)
        return (x_t - b * noise) / a

    def predict_noise_from_start(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """eps = (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t)."""
        a, b = self._signal_and_noise(t, x_t.ndim)
        return (x_t - a * x_start) / b

    def predict_v(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 (Salimans & Ho 2022)."""
        a, b = self._signal_and_noise(t, x_start.ndim)
        return a * noise - b * x_start

    def predict_start_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x_0 = sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v."""
        a, b = self._signal_and_noise(t, x_t.ndim)
        return a * x_t - b * v

    def training_target(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should predict from q_sample(x_start, t, noise), float32."""
        x_start, noise = x_start.float(), noise.float()
        if self.prediction == "x0":
            return x_start
        if self.prediction == "eps":
            return noise
        return self.predict_v(x_start, t, noise)

    def predict_start(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The x_0 that the network's prediction stands for, float32."""
        x_t, output = x_t.float(), output.float()
        if self.prediction == "x0":
            return output
        if self.prediction == "eps":
            return self.predict_start_from_noise(x_t, t, output)
        return self.predict_start_from_v(x_t, t, output)

    def split_output(self, output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's output as its prediction, shaped like x_t, and the variance's fraction.

        The fraction is the second half of the channels, or None where the variance is not learned.
        Raises ValueError where the number of channels does not fit `variance`.
        """
        channels = x_t.shape[1]
        needed = 2 * channels if self.variance == "learned" else channels
        if output.shape[1] != needed:
            raise ValueError(
                f"the network has {output.shape[1]} output channels, but with variance="
                f"{self.variance!r} images of {channels} need {needed}: build UNet(out_channels="
                f"{needed}), or choose the other variance of {VARIANCES}"
            )
        if self.variance == "learned":
            return output[:, :channels], output[:, channels:]
        return output, None

    def p_log_variance(self, x_t: Tensor, t: Tensor, fraction: Tensor | None = None) -> Tensor:
        """Log variance of p(x_{t-1} | x_t): the posterior's, or one between it and log beta_t.

        With `fraction` f, the output's second half, nominally in [-1, 1], it is v log beta_t +
        (1 - v) log beta tilde_t with v = (f + 1) / 2 (Nichol & Dhariwal 2021, eq. 15). At t = 0,
        where beta tilde is 0, the value of t = 1 stands in.
        """
        low = self.extract(self.posterior_log_variance, t, x_t.ndim)
        if fraction is None:
            return low
        high = self.extract(self.betas, t, x_t.ndim).log()
        v = (fraction.float() + 1) / 2
        return v * high + (1 - v) * low

    # Fewer steps

    def respace(self, steps: int, spacing: str = "uniform") -> "GaussianDiffusion":
        """The same process seen at only `steps` of its T timesteps, the last of them T-1.

        Its betas make its alpha_bar equal this process's at the kept timesteps, and its
        `timestep_map` keeps telling the network the original t. `spacing` is described in
        `spaced_timesteps`. Raises ValueError unless steps is in 1..T.
        """
        kept = self.spaced_timesteps(steps, spacing)
        alpha_bar = self.exact_alphas_cumprod[kept]
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        respaced = GaussianDiffusion(
            1 - alpha_bar / previous,
            self.prediction,
            self.timestep_map.cpu()[kept],
            self.variance,
        )
        return respaced.to(self.betas.device)

    def spaced_timesteps(self, steps: int, spacing: str = "uniform") -> Tensor:
        """int64 (steps,), rising to T-1: the timesteps that `respace` keeps.

        - "uniform": evenly spaced in t. The lowest is T / steps - 1: for 20 of 1000 steps t = 49,
          whose noise still hides fine texture.
        - "lambda": evenly spaced in lambda = log(sqrt(alpha_bar) / sqrt(1 - alpha_bar)), half the
          log-SNR (Lu et al. 2022), down to t = 0.
        - "karras": evenly spaced in sigma^(1/7), sigma = sqrt((1 - alpha_bar) / alpha_bar) (Karras
          et al. 2022, eq. 5 with rho = 7), down to t = 0.

        The last two count noise levels above 80 as 80, since nothing is left to see there, and
        take the nearest timesteps, each at most once.
        """
        steps = check_integer("steps", steps, 1, self.timesteps)
        check_choice("spacing", spacing, SPACINGS)
        if spacing == "uniform":
            count = torch.arange(1, steps + 1, dtype=torch.float64)
            return (count * self.timesteps / steps).round().long() - 1
        alpha_bar = self.exact_alphas_cumprod
        sigma = ((1 - alpha_bar) / alpha_bar).sqrt().clamp(max=SIGMA_MAX)
        grid = sigma.log() if spacing == "lambda" else sigma ** (1 / 7)
        levels = torch.linspace(grid[-1].item(), grid[0].item(), steps, dtype=torch.float64).flip(0)
        nearest = torch.bucketize(levels, (grid[1:] + grid[:-1]) / 2)
        nearest[-1] = self.timesteps - 1
        return _distinct(nearest, self.timesteps)


def _distinct(kept: Tensor, timesteps: int) -> Tensor:
    """Rising indices made strictly rising within 0..timesteps-1, moved as little as needed."""
    order = torch.arange(len(kept))
    kept = order + (kept - order).cummax(0).values
    return kept.minimum(timesteps - len(kept) + order)
