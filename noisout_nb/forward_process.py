"""Stage 2, the forward process: noise added step by step, and everything that follows from it in closed form.

Symbols are those of Ho et al. 2020: x_0 a clean picture, x_T pure noise, beta_t the variance added in step t,
alpha_t = 1 - beta_t and alpha_bar_t = alpha_1 ... alpha_t. In code t runs over 0..T-1: the paper's t minus one.
"""

import math

import torch
from torch import Tensor, nn

PREDICTIONS = ("eps", "v")
VARIANCES = ("posterior", "learned")


def linear_beta_schedule(timesteps: int = 1000) -> Tensor:
    """Betas rising in a line from 1e-4 to 0.02 at T = 1000 (Ho et al. 2020, sec. 4): float64 (timesteps,).

    For another T both ends are scaled by 1000 / T, so that the same noise is added in fewer, larger steps.

    >>> linear_beta_schedule(1000)[[0, -1]].tolist()
    [0.0001, 0.02]
    """
    _check_timesteps(timesteps)
    scale = 1000 / timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64).clamp(max=0.999)


def cosine_beta_schedule(timesteps: int = 1000, s: float = 0.008) -> Tensor:
    """Betas whose alpha_bar follows cos^2 (Nichol & Dhariwal 2021, eq. 17), clipped at 0.999: float64 (timesteps,)."""
    _check_timesteps(timesteps)
    u = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def _check_timesteps(timesteps: int) -> None:
    if not isinstance(timesteps, int) or timesteps < 1:
        raise ValueError(f"timesteps is {timesteps!r}: it must be an integer of at least 1 (the papers use 1000)")


SCHEDULES = {"linear": linear_beta_schedule, "cosine": cosine_beta_schedule}


class GaussianDiffusion(nn.Module):
    """The tables of one noise schedule and the closed forms built on them.

    `betas`: (T,), each in (0, 1). `prediction`: what the network's output means, "eps" (the noise, Ho et al. 2020)
    or "v" (Salimans & Ho 2022). `variance`: that of a step back, the "posterior" one (beta tilde, eq. 7), or "learned": then
    the network answers with twice as many channels, see `split_output`. `timestep_map`: int64 (T,), the t that the network is told at each step; only a
    respaced process has one that differs from 0..T-1.

    All tables are computed in float64 and kept in float32; they are buffers, so `.to(device)` moves them, and they
    are no part of the state_dict. Every method takes `t` as int64 (B,) in 0..T-1 and pictures as (B, ...) tensors.
    """

    def __init__(self, betas: Tensor, prediction: str = "eps", timestep_map: Tensor | None = None, variance: str = "posterior"):
        super().__init__()
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if betas.ndim != 1 or len(betas) == 0 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError("betas must be one row of numbers strictly between 0 and 1; see linear_beta_schedule()")
        for what, given, allowed in (("prediction", prediction, PREDICTIONS), ("variance", variance, VARIANCES)):
            if given not in allowed:
                raise ValueError(f"unknown {what} {given!r}: choose one of {allowed}")
        self.prediction, self.variance = prediction, variance
        self.timesteps = len(betas)
        alphas_cumprod = self.exact_alphas_cumprod = torch.cumprod(1 - betas, 0)  # float64, for building other tables
        alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        tables = {
            "betas": betas,
            "alphas": 1 - betas,
            "alphas_cumprod": alphas_cumprod,
            "alphas_cumprod_prev": alphas_cumprod_prev,
            "posterior_log_variance": torch.cat([posterior_variance[1:2] if len(betas) > 1 else betas, posterior_variance[1:]]).log(),
            "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - alphas_cumprod).sqrt(),
            "posterior_variance": posterior_variance,
            "posterior_mean_coef1": betas * alphas_cumprod_prev.sqrt() / (1 - alphas_cumprod),
            "posterior_mean_coef2": (1 - betas).sqrt() * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.float(), persistent=False)
        timestep_map = torch.arange(self.timesteps) if timestep_map is None else timestep_map
        self.register_buffer("timestep_map", timestep_map, persistent=False)

    def extract(self, table: Tensor, t: Tensor, ndim: int) -> Tensor:
        """The table's entries at t, shaped (B, 1, ..., 1) with `ndim` axes. Raises ValueError for t outside 0..T-1."""
        if t.dtype != torch.int64 or t.ndim != 1:
            raise ValueError(f"t must be an int64 tensor of shape (B,), not {t.dtype} of shape {tuple(t.shape)}")
        if len(t) and not (0 <= t.min() and t.max() < self.timesteps):
            raise ValueError(f"t runs from {int(t.min())} to {int(t.max())}, outside 0..{self.timesteps - 1} (the papers' t = 1..T is t = 0..T-1 here)")
        return table[t].reshape(-1, *[1] * (ndim - 1))

    def _signal_and_noise(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        return self.extract(self.sqrt_alphas_cumprod, t, ndim), self.extract(self.sqrt_one_minus_alphas_cumprod, t, ndim)

    # The forward process

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t in one jump: sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (Ho et al. 2020, eq. 4)."""
        a, b = self._signal_and_noise(t, x_start.ndim)
        return a * x_start.float() + b * noise.float()

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of q(x_{t-1} | x_t, x_0) (eqs. 6 and 7); the variance, (B, 1, ..., 1), is 0 at t = 0."""
        a, b = (self.extract(table, t, x_t.ndim) for table in (self.posterior_mean_coef1, self.posterior_mean_coef2))
        return a * x_start + b * x_t, self.extract(self.posterior_variance, t, x_t.ndim)

    def signal_to_noise_ratio(self, t: Tensor) -> Tensor:
        """alpha_bar_t / (1 - alpha_bar_t), float32 (B,)."""
        a, b = self._signal_and_noise(t, 1)
        return (a / b) ** 2  # 1 - alpha_bar in float32 would be off by 5e-4 at t = 0

    # Three names for one thing: given x_t, each of x_0, eps and v determines the other two

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
        """What the network shall answer when it is shown q_sample(x_start, t, noise)."""
        return noise if self.prediction == "eps" else self.predict_v(x_start, t, noise)

    def predict_start(self, x_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The x_0 that the network's answer stands for."""
        convert = self.predict_start_from_noise if self.prediction == "eps" else self.predict_start_from_v
        return convert(x_t, t, output)

    def split_output(self, output: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's output -> its answer, shaped like x_t, and the second half of the channels for a learned variance.

        Raises ValueError where the number of channels does not fit `variance`.
        """
        channels = x_t.shape[1]
        needed = 2 * channels if self.variance == "learned" else channels
        if output.shape[1] != needed:
            why = f"variance={self.variance!r} needs {needed} for pictures of {channels}"
            raise ValueError(f"the network answers with {output.shape[1]} channels, but {why}: build UNet(out_channels={needed}), or choose the other one of {VARIANCES}")
        return (output[:, :channels], output[:, channels:]) if self.variance == "learned" else (output, None)

    def p_log_variance(self, x_t: Tensor, t: Tensor, fraction: Tensor | None = None) -> Tensor:
        """Log variance of p(x_{t-1} | x_t): the posterior's, or between it and beta_t's, which is as large as it can be.

        `fraction`, the output's second half, in -1..1: log variance = v log beta_t + (1 - v) log beta tilde_t with
        v = (fraction + 1) / 2 (Nichol & Dhariwal 2021, eq. 15). At t = 0, where beta tilde is 0, that of t = 1 stands in.
        """
        low = self.extract(self.posterior_log_variance, t, x_t.ndim)
        if fraction is None:
            return low
        v = (fraction.float() + 1) / 2
        return v * self.extract(self.betas, t, x_t.ndim).log() + (1 - v) * low

    def respace(self, steps: int) -> "GaussianDiffusion":
        """The same process seen at only `steps` of its T times, spaced evenly and ending at T-1 ("trailing").

        Its betas make its alpha_bar equal this process's at the kept times, and its `timestep_map` keeps telling
        the network the original t. Raises ValueError unless steps is in 1..T.
        """
        if not isinstance(steps, int) or not 1 <= steps <= self.timesteps:
            raise ValueError(f"steps is {steps!r}: it must be an integer in 1..{self.timesteps}")
        kept = (torch.arange(1, steps + 1, dtype=torch.float64) * self.timesteps / steps).round().long() - 1
        alphas_cumprod = self.exact_alphas_cumprod[kept]
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        respaced = GaussianDiffusion(1 - alphas_cumprod / previous, self.prediction, self.timestep_map.cpu()[kept], self.variance)
        return respaced.to(self.betas.device)
