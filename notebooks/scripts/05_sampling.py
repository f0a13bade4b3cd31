# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05 Sample flowers from noise
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/noisOut/noisOut/blob/main/notebooks/05_sampling.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/noisOut/noisOut/main?labpath=notebooks/05_sampling.ipynb)
#
# **What you'll do**: run the process of notebook 02 backwards with a trained network, first in many
# small steps with fresh noise, then in a few large ones without.
#
# **What you'll learn**: Algorithm 2 of Ho et al. (2020); the noise level $\sigma$, in which
# diffusion becomes an ordinary differential equation; DDIM, DPM-Solver++ and Heun's method as three
# ways to solve it, with their orders measured; where to spend few steps; and how to walk from one
# flower to another.
#
# **What you need**: notebooks 02 to 04. About a minute on two CPU cores, with the weights in
# `models/`.

# %%
import sys

if "google.colab" in sys.modules:  # there a notebook comes alone: fetch what it imports, once
    import subprocess

    clone = "git clone -q --depth 1 https://github.com/noisOut/noisOut noisOut"
    subprocess.run(  # the version that this notebook belongs to; the newest until it is released
        f"test -d noisOut || {clone} --branch v0.2.0 || {clone}",
        shell=True,
        check=True,
    )
    sys.path.insert(0, "noisOut")

# %%
import ipywidgets as widgets
import torch
from torch.testing import assert_close

from noisout_nb.checkpoints import load_model, load_pretrained
from noisout_nb.data import load_data, species_labels, to_float
from noisout_nb.exercises import check
from noisout_nb.figures import filmstrip, image_grid, plot_histograms, plot_lines
from noisout_nb.forward_process import GaussianDiffusion
from noisout_nb.generate import sample_image
from noisout_nb.guidance import ClassifierFreeGuidance
from noisout_nb.parallel import get_device
from noisout_nb.profiles import PROFILES, get_profile
from noisout_nb.sampling import SAMPLERS, ddim, ddpm, dpm_solver, heun
from noisout_nb.widgets import Again, Explorer

# %% [markdown]
# We use two networks: a small one for measurements, and the one in `models/` that was trained on
# photographs. (`guided` is the latter with *guidance*, the subject of notebook 06.)

# %%
torch.manual_seed(0)
profile, device = get_profile(), get_device()
model, process, classes = load_pretrained(profile, device)
network, photo_process, species = load_model(PROFILES["flowers64"].published, device)
guided = ClassifierFreeGuidance(network, 3.0)
T, shape = process.timesteps, (3, profile.image_size, profile.image_size)
photo_shape = (3, network.config["image_size"], network.config["image_size"])


def start(count, seed, shape=photo_shape):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).to(device)


# %% [markdown]
# ## From noise to a flower
#
# Every sampler of this notebook is a generator, as `generate` was in notebook 00: it yields a state
# after each step. Here are four of 50 steps of DDPM: in the upper row the image after the step at
# $t$, in the lower row the clean image that the network predicted there. The prediction has colour
# and place from the start and gains detail; in the image itself the flower emerges half-way.

# %% tags=["cover"]
sunflower = species_labels("sunflower", species).to(device)
generator = torch.Generator(device).manual_seed(3)
states = list(ddpm(guided, photo_process, start(1, 1), sunflower, steps=50, generator=generator))
shown = [0, 20, 35, 49]
filmstrip(
    [[states[i].x[0].cpu() for i in shown], [states[i].x_start[0].cpu() for i in shown]],
    row_labels=["$x$", r"predicted $\hat x_0$"],
    column_labels=[f"t = {states[i].t}" for i in shown],
    arrow="the reverse process",
    alt="The reverse film: noise turns into a sunflower; below, the prediction goes from a blurred "
    "disc to a sharp flower",
)


# %% [markdown]
# What happens in one step? If the clean $x_0$ were known, notebook 02 would give the distribution
# of $x_{t-1}$ exactly: the posterior $q(x_{t-1} \mid x_t, x_0)$, a Gaussian. We clamp the network's
# prediction to the range of an image, put it in the place of $x_0$, and sample from that Gaussian.
# At the last step the variance is zero. This is *Algorithm 2*:

# %%
@torch.no_grad()
def my_ddpm(process, x, y, generator):
    for i in reversed(range(process.timesteps)):
        t = torch.full((len(x),), i, device=device)
        output = model(x, process.timestep_map[t], y)
        x_start = process.predict_start(x, t, output).clamp(-1, 1)
        mean, variance = process.q_posterior_mean_variance(x_start, x, t)
        noise = torch.randn(x.shape, generator=generator, device=device) if i > 0 else 0
        x = mean + variance.sqrt() * noise
    return x


# %% [markdown]
# By hand and by the package, with 100 of the 1,000 timesteps (`respace`, notebook 02), from the
# same noise and with the same random numbers:

# %%
x_T, y = start(2, 2, shape), torch.tensor([0, 3], device=device) % len(classes)
mine = my_ddpm(process.respace(100), x_T, y, torch.Generator(device).manual_seed(3))
*_, last = ddpm(model, process, x_T, y, steps=100, generator=torch.Generator(device).manual_seed(3))
assert_close(mine, last.x, atol=1e-3, rtol=0)
print("largest difference of a pixel:", f"{(mine - last.x).abs().max():.2f}")

# %% [markdown]
# Three details matter. The clamp: a prediction outside $[-1, 1]$ is no image, and its error would
# grow from step to step. The start: the first step must be at $t = T - 1$ however few there are,
# since a network that is told a smaller $t$ takes some of the noise for a flower. And the end: no
# noise is added in the last step, since nothing would remove it.
#
# ## The noise level
#
# Divide $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon$ by
# $\sqrt{\bar\alpha_t}$:
#
# $$ \bar x = \frac{x_t}{\sqrt{\bar\alpha_t}} = x_0 + \sigma\,\epsilon, \qquad \sigma =
# \sqrt{\frac{1-\bar\alpha_t}{\bar\alpha_t}} . $$
#
# This is the same process without the shrinking. All that is left of schedule and $t$ is the *noise
# level* $\sigma$ (Karras et al. 2022), which falls to zero during sampling. At $\sigma = 1$ signal
# and noise are equally strong. We also need $\lambda = -\log\sigma$, half the log-SNR.

# %%
schedules = {name: GaussianDiffusion.from_config(name) for name in ("linear", "cosine")}
plot_lines(
    {name: p.sigmas for name, p in schedules.items()},
    x_label="t",
    y_label=r"noise level $\sigma$",
    log_y=True,
    hlines={r"$\sigma = 1$": 1},
    size=(720, 260),
    alt="Noise level against t on a log axis, for both schedules: from about 0.01 through 1 to 157 "
    "for the linear and to 20,000 for the cosine schedule",
)


# %% [markdown]
# The network's prediction gives the noise, $\hat\epsilon = (\bar x - \hat x_0)/\sigma$, and with it
# the *score*, the direction in which a noisy image becomes more probable:
# $\nabla \log p(\bar x; \sigma) = -\hat\epsilon/\sigma$ (for the best prediction this is exact;
# notebook 06 derives it). Y. Song et al. (2021, *Score-Based Generative Modeling through Stochastic
# Differential Equations*) showed that the score is enough to remove the noise without any
# randomness. Images that move by
#
# $$ \frac{d\bar x}{d\sigma} = \hat\epsilon(\bar x, \sigma) $$
#
# have at every noise level the same distribution as clean images with that much noise added: this
# is the *probability-flow ODE*. Euler's method takes a step with the slope at its start. That is
# **DDIM** (J. Song et al. 2020):
#
# $$ \bar x' = \bar x + (\sigma' - \sigma)\,\hat\epsilon = \hat x_0 +
# \frac{\sigma'}{\sigma}\,(\bar x - \hat x_0) . $$
#
# In words: keep the prediction and shrink the rest, the noise. This is the step of `generate` in
# notebook 00, divided by $\sqrt{\bar\alpha_{t-1}}$.

# %%
def denoise(model, process, x_bar, t, y):
    """The predicted x_0 at the noise level of t."""
    t = torch.full((len(x_bar),), int(t), device=device)
    x = x_bar * process.sqrt_alphas_cumprod[t].view(-1, 1, 1, 1)
    return process.predict_start(x, t, model(x, t, y)).clamp(-1, 1)


@torch.no_grad()
def my_ddim(model, process, x_T, y, timesteps):
    sigmas = [*process.sigmas[timesteps], 0.0]
    x = x_T / process.sqrt_alphas_cumprod[-1]
    for t, sigma, lower in zip(timesteps, sigmas[:-1], sigmas[1:], strict=True):
        x_start = denoise(model, process, x, t, y)
        x = x_start + lower / sigma * (x - x_start)
    return x


# %%
evenly = list(range(T - 1, 0, -T // 20))  # 999, 949, ..., 49
mine = my_ddim(model, process, x_T, y, evenly)
*_, last = ddim(model, process, x_T, y, steps=20)
assert_close(mine, last.x, atol=1e-3, rtol=0)
print("largest difference of a pixel:", f"{(mine - last.x).abs().max():.2f}")

# %% [markdown]
# Without randomness the same noise always gives the same flower, in more detail with more steps.
# DDPM adds new noise on the way, and ends elsewhere each time. (`ddim(..., eta=1)` adds DDPM's
# noise, and is then the same as DDPM.)

# %%
hibiscus = species_labels("hibiscus", species).to(device)
rows = {"ddpm": [], "ddim": []}
for name, row in rows.items():
    for steps in (10, 20):
        options = {"steps": steps, "generator": torch.Generator(device).manual_seed(7)}
        *_, last = SAMPLERS[name](guided, photo_process, start(1, 6), hibiscus, **options)
        row.append(last.x[0].cpu())
filmstrip(
    list(rows.values()),
    row_labels=list(rows),
    column_labels=["10 steps", "20 steps"],
    scale=2,
    alt="A hibiscus by DDPM and by DDIM in 10 and in 20 steps: DDPM's are two different flowers, "
    "DDIM's the same one, clearer with 20 steps",
)

# %% [markdown]
# ## A case with a known solution
#
# How wrong is a sampler with few steps? Let "images" be single numbers from a Gaussian with mean
# $\mu = 0.3$ and standard deviation $s = 0.2$. Then the best prediction is known (notebook 02), no
# training is needed, and the ODE has a solution in closed form: each number stays as many standard
# deviations from the mean as it was.
#
# $$ \mathbb E[x_0 \mid \bar x] = \mu + \frac{s^2}{s^2 + \sigma^2}\,(\bar x - \mu), \qquad x_0 =
# \mu + s\,\frac{\bar x_T - \mu}{\sqrt{s^2 + \sigma_T^2}} $$

# %%
mu, s = 0.3, 0.2
toy = GaussianDiffusion.from_config("cosine", prediction="x0")


class Perfect(torch.nn.Module):
    """In place of a network: the best prediction for this Gaussian."""

    def forward(self, x, t, y=None):
        x_bar = x / toy.sqrt_alphas_cumprod[t].view(-1, 1, 1, 1)
        sigma = toy.sigmas[t].view(-1, 1, 1, 1)
        return mu + s**2 / (s**2 + sigma**2) * (x_bar - mu)


noise = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(4))
bar = noise / toy.sqrt_alphas_cumprod[-1]
solution = mu + s * (bar - mu) / (s**2 + toy.sigmas[-1] ** 2) ** 0.5

# %%
ends = {}
for steps in (5, 20, 100):
    *_, last = ddim(Perfect(), toy, noise, steps=steps)
    ends[f"{steps} steps"] = last.x
    print(f"DDIM with {steps:3} steps: standard deviation {last.x.std():.3f}, the true one is {s}")
axis = torch.linspace(-0.5, 1.1, 200)
density = torch.distributions.Normal(mu, s).log_prob(axis).exp()
plot_histograms(
    ends,
    x_label="sample",
    curves={"true density": (axis, density)},
    alt="Histograms of DDIM's samples: with 5 steps far too narrow, with 20 a little too "
    "narrow, with 100 hardly distinguishable from the true density",
)


# %% [markdown]
# With few steps the samples are too close to the mean: DDIM holds $\hat x_0$ fixed for a whole
# step, but $\hat x_0$ should move away from the mean as the noise falls.
#
# ## Second order
#
# **DPM-Solver++(2M)** (Lu et al. 2022) also uses the prediction of the step before: it extrapolates
# the two linearly in $\lambda$ to the middle of the step, and uses the result $D$ in place of
# $\hat x_0$. With $h$ and $h_\text{before}$ the lengths of this step and of the one before in
# $\lambda$:
#
# $$ D = \hat x_0 + \frac{h}{2\,h_\text{before}}\,\big(\hat x_0 -
# \hat x_0^\text{before}\big), \qquad \bar x' = D + \frac{\sigma'}{\sigma}\,(\bar x - D) $$
#
# It costs no further call of the network. The first step, which has none before it, and the last,
# at whose end $\lambda$ is infinite, are DDIM's.

# %%
@torch.no_grad()
def my_dpm_solver(model, process, x_T, y, timesteps):
    sigmas = [*process.sigmas[timesteps], torch.tensor(0.0)]
    x = x_T / process.sqrt_alphas_cumprod[-1]
    before = None
    for i, t in enumerate(timesteps):
        sigma, lower = sigmas[i], sigmas[i + 1]
        x_start = target = denoise(model, process, x, t, y)
        if before is not None and lower > 0:
            ratio = (sigma / lower).log() / (sigmas[i - 1] / sigma).log()
            target = x_start + ratio / 2 * (x_start - before)
        x = target + lower / sigma * (x - target)
        before = x_start
    return x


# %% [markdown]
# **Heun's method** (EDM, Karras et al. 2022) takes Euler's step, calls the network again at its
# end, and repeats the step with the mean of both slopes. Two calls per step, except in the first,
# which is far too long to be corrected, and in the last, which ends at $\sigma = 0$:

# %%
@torch.no_grad()
def my_heun(model, process, x_T, y, timesteps):
    sigmas = [*process.sigmas[timesteps], torch.tensor(0.0)]
    x = x_T / process.sqrt_alphas_cumprod[-1]
    for i, t in enumerate(timesteps):
        sigma, lower = sigmas[i], sigmas[i + 1]
        x_start = denoise(model, process, x, t, y)
        x_end = x_start + lower / sigma * (x - x_start)
        if i > 0 and lower > 0:  # the first step is far too long to be corrected
            slope = (x - x_start) / sigma
            slope_at_end = (x_end - denoise(model, process, x_end, timesteps[i + 1], y)) / lower
            x_end = x + (lower - sigma) * (slope + slope_at_end) / 2
        x = x_end
    return x


# %%
for mine, sampler in ((my_dpm_solver, dpm_solver), (my_heun, heun)):
    ours = mine(model, process, x_T, y, evenly)
    *_, last = sampler(model, process, x_T, y, steps=20)
    assert_close(ours, last.x, atol=2e-3, rtol=0)
    print(f"{sampler.__name__}: largest difference of a pixel {(ours - last.x).abs().max():.2f}")

# %% [markdown]
# Does second order pay? On the Gaussian we know the solution, so we can measure the error of each
# sampler and how fast it falls: twice as many steps should halve the error of a first-order method
# and quarter that of a second-order one (slopes of 1 and 2 on log axes). The steps are spaced as in
# EDM, which the next section explains.

# %%
counts = (5, 10, 20, 40, 80)
error = {}
for name in ("ddim", "dpm_solver", "heun"):
    for steps in counts:
        *_, last = SAMPLERS[name](Perfect(), toy, noise, steps=steps, spacing="karras")
        error[name, steps] = float((last.x - solution).square().mean().sqrt())

# %%
for name in ("ddim", "dpm_solver", "heun"):
    slope = (torch.tensor(error[name, 20] / error[name, 80]).log2() / 2).item()
    print(f"{name:>10}: slope {slope:.1f} from 20 to 80 steps")
    assert abs(slope - (1 if name == "ddim" else 2)) < 0.2
calls = {"ddim": counts, "dpm_solver": counts, "heun": [2 * steps - 2 for steps in counts]}
plot_lines(
    {name: (calls[name], [error[name, steps] for steps in counts]) for name in calls},
    x_label="calls of the network",
    y_label="error (root mean square)",
    log_x=True,
    log_y=True,
    markers=True,
    alt="Error against calls of the network on log axes: DDIM falls along a line of slope 1, "
    "DPM-Solver++ and Heun twice as steeply; DPM-Solver++ has the smallest error throughout",
)

# %% [markdown]
# It pays: per call of the network DPM-Solver++ has the smallest error throughout. Heun, with nearly
# two calls per step, is behind DDIM below about 25 calls and ahead of it above.
#
# ## Where to spend few steps
#
# Twenty steps may be spread evenly in $t$ ("uniform"), evenly in $\lambda$, or, as in EDM
# ("karras"), evenly in $\sigma^{1/\rho}$ with $\rho = 7$, with more of them at high noise levels
# than $\lambda$ has. All begin at $t = 999$, where the cosine schedule has $\sigma = 20{,}000$; the
# last two count every level above 80 as 80, since nothing can be seen there:

# %%
spacings = {name: process.respace(20, name) for name in ("uniform", "lambda", "karras")}
plot_lines(
    {name: p.sigmas.flip(0) for name, p in spacings.items()},
    x_label="step",
    x_ticks=[str(step) for step in range(1, 21)],
    y_label=r"noise level $\sigma$",
    log_y=True,
    markers=True,
    alt="Noise level of each of 20 steps on a log axis, the first far above the others: evenly in "
    "t they stay between 10 and 0.08; evenly in lambda they fall nearly along a line to 0.006; "
    "Karras' lie above that line and bend down to its end",
)

# %%
print("standard deviation with 20 steps, where the true one is 0.2")
print(f"{'':10} {'uniform':>8} {'lambda':>8} {'karras':>8}")
for name in ("ddim", "dpm_solver", "heun"):
    found = [list(SAMPLERS[name](Perfect(), toy, noise, steps=20, spacing=s))[-1] for s in spacings]
    print(f"{name:>10}", *(f"{last.x.std():8.3f}" for last in found))

# %% [markdown]
# On the Gaussian, steps evenly in $\lambda$ win with all three samplers, since the prediction then
# changes most evenly. Are they best for flowers, too? That depends on the noise levels at which the
# network's prediction changes most. Compare:

# %%
images = {}
rows = [("ddim", "uniform"), *(("dpm_solver", spacing) for spacing in spacings)]
for name, spacing in rows:
    options = {"steps": 12, "spacing": spacing}
    *_, last = SAMPLERS[name](guided, photo_process, start(1, 6), hibiscus, **options)
    images[f"{name}\n{spacing}"] = last.x[0].cpu()
filmstrip(
    [list(images.values())],
    column_labels=list(images),
    scale=2,
    alt="A hibiscus in 12 steps by DDIM and DPM-Solver++ with three spacings: the same flower, "
    "which differs in contrast and in fine texture",
)


# %% [markdown]
# The two spacings in noise level go down to $t = 0$, the uniform one only to $t = 82$, and their
# flower has more contrast and finer texture. Whether it is also nearer to photographs, only many
# samples can tell (notebook 07).
#
# ## What new noise is good for
#
# Deterministic samplers need fewer steps, and yet DDPM's noise has a merit. A network errs, and an
# ODE carries part of each error to the end. Let the perfect prediction be too high by 0.2 while
# $\sigma > 1$, and take the same steps with and without new noise. (`dpm_solver` has DDIM's `eta`,
# too: $D$ takes the place of $\hat x_0$ in DDPM's step.)

# %%
class Wrong(Perfect):
    """Predicts too high a number while the noise is strong."""

    def forward(self, x, t, y=None):
        strong = toy.sigmas[t].view(-1, 1, 1, 1) > 1
        return super().forward(x, t) + 0.2 * strong


print(f"mean of the samples, where the true one is {mu}")
for eta in (0, 0.5, 1):
    options = {"eta": eta, "generator": torch.Generator().manual_seed(1)}
    *_, last = dpm_solver(Wrong(), toy, noise, steps=50, spacing="karras", **options)
    print(f"eta = {eta:3}: {last.x.mean():.3f}")

# %% [markdown]
# A stochastic step throws away more of $\bar x$ and its errors, and puts noise in their place;
# later predictions, which are right here, fill it in. Does it help a real network? Here are samples
# without guidance, from the same start by the same solver. `sde_dpm_solver` is `dpm_solver` with
# `eta=1`.

# %%
names = ["pink primrose", "rose", "water lily", "gazania"]
labels = species_labels(names, species).to(device)
rows = []
for name in ("dpm_solver", "sde_dpm_solver"):
    options = {"steps": 20, "generator": torch.Generator(device).manual_seed(5)}
    *_, last = SAMPLERS[name](network, photo_process, start(4, 8), labels, **options)
    rows.append(last.x.cpu())
filmstrip(
    rows,
    row_labels=["dpm_solver", "sde_dpm_solver"],
    column_labels=names,
    scale=2,
    alt="Four species without guidance: by the deterministic solver some are ragged, by the "
    "stochastic one petals and centres are clearer",
)


# %% [markdown]
# Measured on 6,120 samples each ([model card](../models/README.md)), new noise takes their kernel
# distance to photographs (notebook 07; of photographs themselves: -3) from 17 to 10, with as many
# calls. With guidance (06) there is less to correct: at scale 2 it is 3 without new noise and 4
# with it.
#
# ## From one flower to another
#
# A deterministic sampler maps noise to flowers, and similar noise to similar flowers. To walk from
# one noise to another, a straight line will not do: half-way the standard deviation is $\sqrt{1/2}$
# instead of 1, noise that the network has never seen. So we walk along an arc (*slerp*), and mix
# the predictions for two species in the same proportion. On the straight line the images in the
# middle lack detail:

# %%
def slerp(a, b, weights):
    angle = torch.acos(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))
    weights = weights.view(-1, 1, 1, 1)
    return (torch.sin((1 - weights) * angle) * a + torch.sin(weights * angle) * b) / torch.sin(
        angle
    )


class Between(torch.nn.Module):
    """Predictions for two species, mixed with one weight per image."""

    def __init__(self, species, weights):
        super().__init__()
        self.species, self.weights = species, weights.view(-1, 1, 1, 1)

    def forward(self, x, t, y=None):
        first, second = (guided(x, t, label.expand(len(x))) for label in self.species)
        return torch.lerp(first, second, self.weights)


# %%
a, b = start(2, 5)
weights = torch.linspace(0, 1, 4, device=device)
line = torch.stack([torch.lerp(a, b, weight) for weight in weights])
walk = slerp(a, b, weights)
half = torch.full((1,), 0.5, device=device)
on_line, on_arc = torch.lerp(a, b, 0.5).std(), slerp(a, b, half).std()
print(f"standard deviation half-way: line {on_line:.1f}, arc {on_arc:.1f}")

# %%
pair = species_labels(["sunflower", "osteospermum"], species).to(device)
walks = []
for noises in (walk, line):
    *_, last = ddim(Between(pair, weights), photo_process, noises, steps=12)
    walks.append(last.x.cpu())
filmstrip(
    walks,
    row_labels=["arc", "straight line"],
    column_labels=[f"{w:.2f}" for w in weights],
    alt="Four steps from a sunflower to an osteospermum: along the arc all are flowers in full "
    "detail; along the straight line those in the middle are smooth and pale",
)

# %% [markdown]
# ## In one call
#
# If you only need images, `sample_image` does all of this by name: it loads the weights, applies
# guidance, and takes `sampler=`, `steps=`, `spacing=` and `seed=` if you want others than the
# profile's.

# %%
image_grid(
    sample_image("sunflower", 2, steps=12, seed=1),
    scale=2,
    alt="Two generated sunflowers",
)

# %% [markdown]
# Watch every step: press play or move the frame, and change the sampler, the spacing or the noise.
# A new film is computed first; the bar shows the progress.

# %%
films = {}


def film(frame, sampler, spacing, noise):
    states = films.setdefault((sampler, spacing, noise), [])
    if len(states) < 20:
        options = {"steps": 20, "spacing": spacing}
        steps = SAMPLERS[sampler](guided, photo_process, start(1, noise), sunflower, **options)
        for count, state in enumerate(steps, 1):
            states[count - 1 :] = [state]
            yield count / 20
    state = states[min(frame, 20) - 1]
    yield image_grid(
        torch.cat([state.x, state.x_start]).cpu(),
        scale=4,
        column_labels=[f"after t = {state.t}", r"predicted $\hat x_0$"],
        alt=f"The reverse film by {sampler} in 20 steps at t = {state.t}: left the image, right "
        "the sunflower that the network predicts",
    )


# %%
Explorer(
    film,
    play="frame",
    frame=widgets.IntSlider(14, 1, 20),
    sampler=widgets.Dropdown(options=list(SAMPLERS), value="ddim"),
    spacing=widgets.Dropdown(options=["uniform", "lambda", "karras"], value="uniform"),
    noise=Again("new noise"),
)

# %% [markdown]
# ## Your turn
#
# Replace `None` or `...` and run the cell; it says whether you are right.
#
# **1. Half the noise.** With `eta=0.5`, `ddim` adds half of DDPM's standard deviation in each step.
# Is the spread of its samples still right? Sample the Gaussian from `noise` with all 1,000 steps,
# and give the standard deviation.

# %% tags=["exercise"]
spread = None

check(
    "exercise 1", spread, 0.2, tolerance=0.005, hint="ddim(Perfect(), toy, noise, steps=T, eta=0.5)"
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# *_, last = ddim(Perfect(), toy, noise, steps=1000, eta=0.5)
# spread = float(last.x.std())
# ```
#
# With enough steps, every `eta` gives the right distribution at each noise level.
# </details>
#
# **2. Back from the middle.** Add noise to the held-out flowers `x_0` up to $t = 500$, and let
# `ddim` bring them back in 25 steps (`back`, of the shape of `x_0`). What remains? `half` is the
# process up to $t = 500$.

# %% tags=["exercise"]
held_out = load_data(profile, "val")
x_0 = to_float(held_out.images[:4]).to(device)
labels_of_x_0 = held_out.labels[:4].to(device)
half = GaussianDiffusion(process.exact_betas[:501], process.prediction).to(device)
back = None

check(
    "exercise 2",
    back,
    lambda x: x.shape == x_0.shape and 0.001 < (x - x_0).square().mean() < 0.1,
    hint="half.q_sample(x_0, t, noise) with t = 500 for each image, then ddim(model, half, ...).",
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# t = torch.full((4,), 500, device=device)
# noisy = half.q_sample(x_0, t, start(4, 10, shape))
# *_, last = ddim(model, half, noisy, labels_of_x_0, steps=25)
# back = last.x
# image_grid(torch.cat([x_0, back]).cpu(), columns=4)
# ```
#
# What the noise had not destroyed remains: place, size and colour. The petals are new. Notebook 10
# makes a tool of it.
# </details>
#
# **3. How probable is an image?** The ODE also gives a likelihood. Along its path the log density
# changes by minus the divergence of the slope, so
# $\log p(x_0) = \log p(\bar x_T) + \int_0^{\sigma_T} \operatorname{div}\hat\epsilon\;d\sigma$. For
# our Gaussian the slope is $\hat\epsilon = \sigma(\bar x - \mu)/(s^2 + \sigma^2)$, and in one
# dimension its divergence is its derivative. Compute $\log p(x_0)$ at $x_0 = \mu$, where
# $\bar x = \mu$ all the way, for $\sigma_T = 100$.

# %% tags=["exercise"]
log_p = None

check(
    "exercise 3",
    log_p,
    float(torch.distributions.Normal(mu, s).log_prob(torch.tensor(mu))),
    tolerance=0.02,
    hint="log p(x_T) is that of a Gaussian with variance s^2 + 100^2 at its mean.",
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# sigma = torch.linspace(0, 100, 1_000_001, dtype=torch.float64)
# divergence = sigma / (s**2 + sigma**2)
# at_the_end = torch.distributions.Normal(mu, (s**2 + 100**2) ** 0.5).log_prob(torch.tensor(mu))
# log_p = float(at_the_end + torch.trapezoid(divergence, sigma))
# ```
#
# An image has thousands of dimensions, and as many derivatives cost too much. Hutchinson's
# estimator needs one: for random signs $z$ and the Jacobian $J$ of the slope, $z^\top J z$ has the
# divergence as its mean. With the network, at the noise level of `t` and for `x_bar`:
#
# ```python
# z = torch.randint(2, x_bar.shape, device=device) * 2.0 - 1
# with torch.enable_grad():
#     x_bar = x_bar.detach().requires_grad_()
#     slope = (x_bar - denoise(model, process, x_bar, t, y)) / process.sigmas[t]
#     divergence = (torch.autograd.grad((slope * z).sum(), x_bar)[0] * z).sum((1, 2, 3))
# ```
# </details>
#
# Next: [06_guidance](06_guidance.ipynb) makes samples follow their label.
