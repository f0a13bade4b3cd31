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
# # 02 Dissolve a flower in noise
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/noisOut/noisOut/blob/main/notebooks/02_forward_process.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/noisOut/noisOut/main?labpath=notebooks/02_forward_process.ipynb)
#
# **What you'll do**: destroy a flower in a thousand small steps, jump to any of them at once, work
# out what it takes to go one step back, and generate first flowers without any network.
#
# **What you'll learn**: why each step shrinks the image as well as adding noise, what a noise
# schedule is and how to judge one, why $\epsilon$, $x_0$ and $v$ carry the same information and
# which of them to predict, and where the formulas of the reverse process come from.
#
# **What you need**: notebook 01 and the normal distribution. Reading takes about half an hour,
# running less than half a minute. Formulas follow Ho et al. 2020, "Denoising Diffusion
# Probabilistic Models", with its equation numbers.

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

from noisout_nb.data import load_data
from noisout_nb.exercises import check
from noisout_nb.figures import filmstrip, image_grid, plot_histograms, plot_lines, stack
from noisout_nb.forward_process import GaussianDiffusion, cosine_beta_schedule
from noisout_nb.profiles import get_profile
from noisout_nb.widgets import Explorer

profile = get_profile()
generator = torch.Generator().manual_seed(0)
scale = 128 // profile.image_size  # images are shown at 128 pixels

# %% [markdown]
# ## The idea
#
# Generating a flower is hard. Destroying one is easy: add noise. If the noise comes in small enough
# steps, each single step can nearly be undone by someone who knows what flowers look like. So a
# network only has to learn many small, easy reversals, and together they lead from pure noise to a
# flower.
#
# This notebook is about the destruction, the *forward process*: idea 1 of notebook 00, now on
# images and with its derivation. Nothing is learned here; everything is known in closed form, which
# is why training (notebook 04) will be simple. This is the flower:

# %%
flowers = torch.stack([image for image, _ in load_data(profile, "val")])
flower = flowers[3:4]
image_grid(flower, scale=scale, alt="One flower, sharp and clean")

# %% [markdown]
# ## One step
#
# In step $t$ the image is shrunk a little, and a little Gaussian noise is added (eq. 2):
#
# $$q(x_t \mid x_{t-1}) = \mathcal{N}\!\left(x_t;\ \sqrt{1-\beta_t}\,x_{t-1},\ \beta_t I\right)$$
#
# The $\beta_t$ are small numbers chosen in advance. Ho et al. let them rise linearly from 0.0001 to
# 0.02 over $T = 1000$ steps.
#
# **A word on counting.** The papers, and notebook 00, call the clean image $x_0$ and the noisy ones
# $x_1, \dots, x_T$. Code counts from zero, so from here on `t = 0` is the *first noisy* step (the
# papers' $t = 1$) and `t = T - 1` the last. $x_0$ always means the clean image, never the image at
# `t = 0`.

# %%
T = 1000
betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)


def step(x, t):
    noise = torch.randn(x.shape, generator=generator)
    return (1 - betas[t]).sqrt() * x + betas[t].sqrt() * noise


# %%
image_grid(
    torch.cat([flower, step(flower, 0), step(flower, T - 1)]),
    scale=scale,
    column_labels=["$x_0$, clean", "the smallest step", "the largest step"],
    alt="The flower clean, after one step of beta 0.0001 (no difference to see), and after one "
    "step of beta 0.02 (grainy)",
)

# %% [markdown]
# ## The film
#
# Now the flower goes through all thousand steps, one after the other. We keep a few frames.

# %% tags=["cover"]
shown = [0, 19, 49, 99, 199, 299, 499, 999]
x, frames = flower, [flower[0]]
for t in range(T):
    x = step(x, t)
    if t in shown:
        frames.append(x[0])

filmstrip(
    [frames],
    column_labels=["$x_0$", *(f"t = {t}" for t in shown)],
    arrow="the forward process",
    alt="A flower dissolving in noise: clear until t = 49, grainy at 99, faint at 299, nothing "
    "but noise at 999",
)

# %% [markdown]
# Compare neighbouring frames: details go first, large shapes and colours last. On the way back a
# network will therefore settle the large shapes first and the details at the end.
#
# Why shrink at all? Variances add up: without the shrinking, the variance would grow with every
# step, and the network would have to cope with ever larger numbers. With it, a variance $V$ turns
# into $(1-\beta_t)\,V + \beta_t$, and if $V = 1$ that is 1 again. Such a process is called
# *variance preserving*. Here 20,000 numbers of variance 1 go through all steps, with and without
# the shrinking.

# %%
kept = grown = torch.randn(20_000, generator=generator)
variance = {"with shrinking": [], "without": []}
for t in range(T):
    kept = step(kept, t)
    grown = grown + betas[t].sqrt() * torch.randn(grown.shape, generator=generator)
    variance["with shrinking"].append(kept.var())
    variance["without"].append(grown.var())

# %%
variance = {name: torch.stack(values) for name, values in variance.items()}
plot_lines(
    variance | {"1 + the sum of the betas so far": 1 + betas.cumsum(0)},
    x_label="t",
    y_label="variance",
    alt="Variance against t: with shrinking it stays at 1, without it climbs to 11, along the "
    "curve of one plus the sum of the betas so far",
)

# %% [markdown]
# An image has less variance than 1, since its values lie in $[-1, 1]$, but wherever it starts, it
# ends at mean 0 and variance 1. For our flower:

# %%
for name, frame in zip(["x_0", *(f"t = {t}" for t in shown)], frames, strict=True):
    print(f"{name:>7}: mean {frame.mean():z5.1f}, variance {frame.var():.1f}")

# %% [markdown]
# ## The jump
#
# To train a network we need $x_t$ for random $t$, millions of times. Walking there step by step is
# out of the question, and not needed. Write $\alpha_t = 1 - \beta_t$ and do two steps by hand:
#
# $$x_t = \sqrt{\alpha_t}\,x_{t-1} + \sqrt{1-\alpha_t}\,\epsilon_t, \qquad
# x_{t-1} = \sqrt{\alpha_{t-1}}\,x_{t-2} + \sqrt{1-\alpha_{t-1}}\,\epsilon_{t-1}$$
#
# Insert the second into the first. The two noise terms are independent Gaussians, so their
# variances add: $\alpha_t(1-\alpha_{t-1}) + (1-\alpha_t) = 1-\alpha_t\alpha_{t-1}$. Hence
#
# $$x_t = \sqrt{\alpha_t\alpha_{t-1}}\,x_{t-2} + \sqrt{1-\alpha_t\alpha_{t-1}}\,\epsilon$$
#
# Two steps are one larger step whose $\alpha$ is the product. By induction so are all $t$ steps:
# with $\bar\alpha_t = \alpha_1\alpha_2\cdots\alpha_t$ (eq. 4)
#
# $$q(x_t \mid x_0) = \mathcal{N}\!\left(x_t;\ \sqrt{\bar\alpha_t}\,x_0,\ (1-\bar\alpha_t) I\right)
# \quad\text{or}\quad x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon$$

# %%
alpha_bar = torch.cumprod(1 - betas, 0)


def my_q_sample(x_0, t, noise):
    a = alpha_bar[t].view(-1, 1, 1, 1)
    return (a.sqrt() * x_0 + (1 - a).sqrt() * noise).float()


# %%
for t in (0, 99, 299, 999):
    a = alpha_bar[t]
    print(f"t = {t:3}: x_t = {a.sqrt():.3f} x_0 + {(1 - a).sqrt():.3f} noise")

# %% [markdown]
# Is the jump the same as the walk? We send 20,000 copies of one bright pixel, $x_0 = 0.8$, through
# the walk, and plot the normal densities of eq. 4 over their histograms.

# %%
stops = [49, 249, 999]
x, walked = torch.full((20_000,), 0.8), {}
for t in range(T):
    x = step(x, t)
    if t in stops:
        walked[t] = x

# %%
for t in stops:
    mean, std = 0.8 * alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt()
    print(
        f"t = {t:3}: the walk has mean {walked[t].mean():z.1f} and std {walked[t].std():.2f}, "
        f"eq. 4 says {mean:.1f} and {std:.2f}"
    )


# %%
def density(at, mean, variance):
    return torch.exp(-((at - mean) ** 2) / (2 * variance)) / (2 * torch.pi * variance).sqrt()


# %%
axis = torch.linspace(-4, 4, 400)
promised = [density(axis, 0.8 * alpha_bar[t].sqrt(), 1 - alpha_bar[t]) for t in stops]
plot_histograms(
    {f"walk, t = {t}": walked[t] for t in stops},
    x_label="value of the pixel",
    bins=160,
    curves={"eq. 4": (axis.repeat(3), torch.cat(promised))},
    alt="Histograms of a walked pixel at t = 49, 249 and 999, each under the normal density of "
    "eq. 4",
)

# %% [markdown]
# They agree. The pixel forgets that it was 0.8 (its mean goes to 0) while its spread grows to 1.
#
# The helper package `noisout_nb` keeps these tables in a `GaussianDiffusion`, one `t` per image of
# the batch. Its `q_sample` is our jump:

# %%
linear = GaussianDiffusion.from_config("linear", T)
x_0 = flowers[:8]
t = torch.tensor([0, 1, 10, 100, 300, 600, 998, 999])
noise = torch.randn(x_0.shape, generator=generator)
x_t = linear.q_sample(x_0, t, noise)

# %%
assert_close(x_t, my_q_sample(x_0, t, noise))
image_grid(
    x_t,
    scale=3 if scale > 2 else 1,
    column_labels=[f"t = {i}" for i in t.tolist()],
    alt="Eight flowers jumped to t = 0, 1, 10, 100, 300, 600, 998 and 999: the first three look "
    "clean, the last three like noise",
)


# %% [markdown]
# ## Schedules
#
# Because of the jump, the betas matter only through $\bar\alpha_t$. The *signal-to-noise ratio*
# summarises how much of the image survives at timestep $t$:
#
# $$\text{SNR}_t = \frac{\bar\alpha_t}{1-\bar\alpha_t}$$
#
# Nichol & Dhariwal (2021) found that the linear schedule destroys images too early: its last
# quarter is almost pure noise, and steps spent there contribute little. In their *cosine* schedule
# $\bar\alpha_t$ falls along a squared cosine (their eq. 17), as in notebook 00:
#
# $$\bar\alpha_t = \frac{f(t)}{f(0)}, \qquad
# f(t) = \cos^2\!\left(\frac{t/T + s}{1 + s}\cdot\frac{\pi}{2}\right), \quad s = 0.008$$

# %%
def my_cosine_schedule(T, s=0.008):
    u = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((u + s) / (1 + s) * torch.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


# %%
assert_close(my_cosine_schedule(T), cosine_beta_schedule(T))
print("largest betas:", *(f"{beta:.3f}" for beta in my_cosine_schedule(T)[-3:]))

# %% [markdown]
# The last step is clamped to 0.999. Unclamped, it would be $\beta_T = 1$ and $\bar\alpha_T = 0$:
# nothing at all would be left of the image, and formulas that divide by $\sqrt{\bar\alpha_T}$ would
# give infinities.

# %%
cosine = GaussianDiffusion.from_config("cosine", T)
processes = {"linear": linear, "cosine": cosine}
stack(
    plot_lines(
        {name: p.betas for name, p in processes.items()},
        x_label="t",
        y_label="$\\beta_t$",
        log_y=True,
        size=(720, 230),
    ),
    plot_lines(
        {name: p.alphas_cumprod for name, p in processes.items()},
        x_label="t",
        y_label="$\\bar\\alpha_t$",
        size=(720, 230),
    ),
    alt="Above, betas on a log axis: both rise, the cosine's to nearly 1 at the end. Below, alpha "
    "bar: the linear schedule's is almost 0 from t = 600 on, the cosine's falls evenly",
)

# %% [markdown]
# The same noise, added to the same flower under both schedules:

# %%
columns = torch.tensor([0, 99, 199, 499, 799, 999])
same_noise = torch.randn(flower.shape, generator=generator).expand(len(columns), -1, -1, -1)
films = [p.q_sample(flower.expand_as(same_noise), columns, same_noise) for p in processes.values()]
filmstrip(
    films,
    row_labels=processes,
    column_labels=[f"t = {t}" for t in columns.tolist()],
    alt="The flower dissolving under both schedules, with the same noise: at t = 499 it is gone "
    "under the linear schedule and still to be seen under the cosine one",
)

# %% [markdown]
# ### One noise level, four names
#
# Papers name the same noise level in different ways. Divide $x_t$ by $\sqrt{\bar\alpha_t}$ and it
# reads $x_0 + \sigma_t\,\epsilon$: the clean image plus noise of standard deviation
# $\sigma_t = \sqrt{(1-\bar\alpha_t)/\bar\alpha_t}$. This is the view of Karras et al. (2022).
# Kingma et al. (2021) use the log-SNR, $\log \text{SNR}_t = -2\log\sigma_t$. All of them say how
# noisy an image is without mentioning $t$ or a schedule.

# %%
print("  t   alpha_bar       SNR   sigma   log-SNR")
for t in (0, 99, 499, 899, 989):
    a = cosine.exact_alphas_cumprod[t]  # in float64
    ratio = a / (1 - a)
    print(f"{t:3} {a:11.5f} {ratio:9.3g} {ratio**-0.5:7.3f} {ratio.log():9.2f}")

# %% [markdown]
# In this view a schedule only says *how many steps are spent at which noise level*. A histogram of
# the log-SNR over all $t$ shows it; $\log\text{SNR} = 0$ is where signal and noise are equally
# strong.

# %%
snr = {name: p.signal_to_noise_ratio(torch.arange(T)) for name, p in processes.items()}
plot_histograms(
    {name: values.log() for name, values in snr.items()},
    x_label="log-SNR (clean images on the right, noise on the left)",
    bins=50,
    size=(720, 260),
    alt="Histograms of the log-SNR over the timesteps: the linear schedule spreads from -10 to 5 "
    "with a peak at -1, the cosine schedule centres on 0 and has long, thin tails",
)

# %% [markdown]
# The linear schedule spends three quarters of its steps where noise outweighs signal, many of them
# at a log-SNR below -4, where next to nothing is left of the flower. The cosine schedule spends as
# many steps on either side of 0, and most of them near it.
#
# Your turn: move $t$ (drag, or use the arrow keys) and change the schedule. At which $t$ do you
# lose the flower, and what is the SNR there?

# %%
curves = plot_lines(
    snr, x_label="t", y_label="SNR", log_y=True, hlines={"SNR = 1": 1}, size=(720, 240)
)


def noisy_flower(t, schedule):
    p, at = processes[schedule], torch.tensor([t])
    x_t = p.q_sample(flower, at, same_noise[:1])
    images = image_grid(
        torch.cat([flower, same_noise[:1], x_t]),
        scale=scale,
        column_labels=["$x_0$", r"$\epsilon$", f"$x_t$, t = {t}"],
    )
    alt = f"The flower, the noise, and both mixed at t = {t}; below, the {schedule} schedule's SNR"
    return stack(images, curves.marked(t, p.signal_to_noise_ratio(at).item()), alt=alt)


# %%
Explorer(
    noisy_flower,
    t=widgets.IntSlider(209, 9, 999, 10),
    schedule=widgets.Dropdown(options=["linear", "cosine"]),
)

# %% [markdown]
# ## Why ten steps do not reach noise
#
# A thousand steps are many. What if we take only ten, with betas from 0.0001 to 0.02 as before? One
# number tells whether a schedule is usable: $\bar\alpha_T$, what is left of the signal at the end.

# %%
ten_small = GaussianDiffusion(torch.linspace(1e-4, 0.02, 10))
for name, p in (processes | {"ten small steps": ten_small}).items():
    print(f"{name:>15}: alpha_bar_T = {p.exact_alphas_cumprod[-1]:.1e}")

last = [
    p.q_sample(flower, torch.tensor([p.timesteps - 1]), same_noise[:1]) for p in (ten_small, linear)
]
image_grid(
    torch.cat([flower, *last]),
    scale=scale,
    column_labels=["$x_0$", "$x_T$, T = 10", "$x_T$, T = 1000"],
    alt="The flower; the flower after ten small steps, still plain to see; pure noise after "
    "1000 steps",
)

# %% [markdown]
# After ten small steps $\sqrt{0.90} = 95\,\%$ of the flower's amplitude is left. For a network
# trained on that, the image in the middle is as noisy as images get, yet sampling would start from
# the one on the right, which it has never seen. At the end of this notebook we watch that go wrong.
#
# Fewer steps must be *larger* steps. The best way keeps the fine process and visits only some of
# its timesteps, as we did for images in notebook 00: `respace(10)` makes a process of ten steps
# whose betas lead from one kept $\bar\alpha$ to the next,
# $\beta = 1 - \bar\alpha_t / \bar\alpha_{\text{previous}}$. A network trained with 1000 steps can
# be sampled with ten in this way, because it is still told the original $t$.

# %%
ten = linear.respace(10)
print("timesteps kept:", ten.timestep_map.tolist())
print("their betas:   ", *(f"{beta:.2f}" for beta in ten.betas))
print(f"alpha_bar_T = {ten.exact_alphas_cumprod[-1]:.1e}, as with all 1000 steps")

# %% [markdown]
# ## Three targets
#
# Given $x_t$ and $\epsilon$, the clean image is determined: solve
# $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon$ for $x_0$. So a network may be
# trained to predict either one. There is a third candidate, the *velocity* of Salimans & Ho (2022):
#
# $$v = \sqrt{\bar\alpha_t}\,\epsilon - \sqrt{1-\bar\alpha_t}\,x_0$$
#
# The two roots are the cosine and the sine of one angle, since their squares sum to 1. So
# $(x_t, v)$ is $(x_0, \epsilon)$ *rotated*, and rotating back gives
# $x_0 = \sqrt{\bar\alpha_t}\,x_t - \sqrt{1-\bar\alpha_t}\,v$, with nothing to divide by.

# %%
t = torch.tensor([9, 199, 499, 799, 989])
x_0, noise = flower.expand(5, -1, -1, -1), same_noise[:5]
cos = cosine.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)
sin = (1 - cosine.alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1)
x_t = cos * x_0 + sin * noise
v = cos * noise - sin * x_0

assert_close(v, cosine.predict_v(x_0, t, noise), rtol=0, atol=1e-4)
assert_close(cosine.predict_start_from_v(x_t, t, v), x_0, rtol=0, atol=1e-4)
filmstrip(
    [x_t, x_0, noise, v],
    row_labels=["input $x_t$", "target $x_0$", r"target $\epsilon$", "target $v$"],
    column_labels=[f"t = {i}" for i in t.tolist()],
    scale=scale * 3 // 4,
    alt="Input and the three possible targets at five timesteps: x_0 is always the clean flower, "
    "eps always the same noise, v goes from noise at small t to the flower's negative at large t",
)

# %% [markdown]
# Given the input, any one target gives the other two. What differs is the effect of the network's
# errors. An error in $\epsilon$ becomes an error in $x_0$ that is
# $\sqrt{(1-\bar\alpha_t)/\bar\alpha_t} = \sigma_t$ times as large, an error in $v$ one that is
# $\sqrt{1-\bar\alpha_t}$ times as large, and an error in $x_0$ stays what it is.

# %%
errors = {f"$\\epsilon$, {name}": values.rsqrt() for name, values in snr.items()}
errors["$v$, cosine"] = cosine.sqrt_one_minus_alphas_cumprod
errors["$x_0$"] = torch.ones(T)
plot_lines(
    errors,
    x_label="t",
    y_label="error in $x_0$\nper error in the prediction",
    log_y=True,
    alt="Error in x_0 per error in the prediction, log axis: for eps it climbs to 157 under the "
    "linear and to 20,000 under the cosine schedule; for v it never exceeds 1; for x_0 it is 1",
)

# %% [markdown]
# Large as they are, these factors alone do not spoil samples, since one step moves only a small
# part of the way towards the predicted $x_0$. We come back to that below, once we know what a step
# back is.
#
# ### What the series predicts
#
# Ho et al. predict $\epsilon$, and it works well for wide networks. But noise has no structure: a
# network that predicts it has to carry every one of its numbers from input to output. An image is
# different. It lies near a manifold of few dimensions, so far fewer numbers suffice to describe it.
# How much of each fits into 100 numbers? We take the first 100 principal components of 400 flowers,
# and measure on images that were not among those.

# %%
seen, unseen = flowers[:400], flowers[400:]
centre = seen.mean(0)
_, singular, directions = torch.linalg.svd((seen - centre).flatten(1), full_matrices=False)
directions, variances = directions[:100], singular[:100] ** 2 / (len(seen) - 1)


def share_kept(x):
    return ((x.flatten(1) @ directions.T) ** 2).sum() / (x**2).sum()


noise = torch.randn(unseen.shape, generator=generator)
print(
    f"100 of {directions.shape[1]} numbers keep {share_kept(unseen - centre):.0%} of the variance "
    f"of unseen flowers and {share_kept(noise):.0%} of that of noise"
)

# %% [markdown]
# Our networks cut images into patches and have few channels. To predict the noise they would have
# to pass all of it through these few channels; the flower fits easily. So the series predicts
# $x_0$. (Li & He 2025, "Back to Basics: Let Denoising Generative Models Denoise", make this
# argument at scale; notebook 03 shows it on patches, and 04 compares all three.)
#
# ### One error, several weights
#
# Predicting $x_0$ does not commit us to the plain squared error of $x_0$. Subtract a prediction
# from its target, and the conversions above give
#
# $$\|\epsilon - \hat\epsilon\|^2 = \text{SNR}_t\,\|x_0 - \hat x_0\|^2, \qquad
# \|v - \hat v\|^2 = (\text{SNR}_t + 1)\,\|x_0 - \hat x_0\|^2$$
#
# so the three losses differ only in how much each noise level counts. We check it with a prediction
# of $x_0$ that is off by a little noise:

# %%
wrong = x_0 + 0.1 * torch.randn(x_0.shape, generator=generator)


def squared_error(a, b):
    return ((a - b) ** 2).mean((1, 2, 3))


noise_hat = cosine.predict_noise_from_start(x_t, t, wrong)
v_hat = cosine.predict_v(wrong, t, noise_hat)
in_noise = squared_error(noise_hat, same_noise[:5]) / squared_error(wrong, x_0)
in_v = squared_error(v_hat, v) / squared_error(wrong, x_0)
ratios = cosine.signal_to_noise_ratio(t)
for i, a, b, ratio in zip(t.tolist(), in_noise, in_v, ratios, strict=True):
    print(f"t = {i:3}: eps {a:9.3g}, SNR {ratio:9.3g};  v {b:9.3g}, SNR + 1 {ratio + 1:9.3g}")

# %%
ratio = torch.logspace(-4, 4, 200)
weights = {
    r"$\epsilon$: SNR": ratio,
    "$v$: SNR + 1": ratio + 1,
    "$x_0$: 1": torch.ones_like(ratio),
    "min-SNR-5": ratio.clamp(max=5),
    f"ours: min(SNR + 1, {profile.max_weight:.0f})": (ratio + 1).clamp(max=profile.max_weight),
}
plot_lines(
    {name: (ratio.log(), weight) for name, weight in weights.items()},
    x_label="log-SNR",
    y_label="weight of the squared error in $x_0$",
    log_y=True,
    alt="Loss weights against log-SNR, log axis: eps rises as a straight line, v joins it above "
    "0 and is flat at 1 below, x_0 is flat at 1, min-SNR-5 follows eps up to 5, ours v up to a cap",
)


# %% [markdown]
# The loss in $\epsilon$ hardly counts the noisy end, where the composition is decided, and its
# weight grows without bound at the clean end. The plain loss in $x_0$ weights all levels equally,
# which neglects fine details, whose errors are small numbers. The loss in $v$ is a compromise.
# Min-SNR (Hang et al. 2023) caps the weight. Our profiles predict $x_0$ and weight its error by
# $\text{SNR}_t + 1 = 1/(1-\bar\alpha_t)$, the weight of the loss in $v$ and of notebook 00, but
# capped.
#
# ## One step back
#
# Undoing a step means sampling from $q(x_{t-1} \mid x_t)$. If $\beta_t$ is small, that is nearly a
# Gaussian, but its mean depends on all the images that $x_t$ may have come from. Given $x_0$ as
# well, it is exactly a Gaussian, and we can compute it from two facts about $x_{t-1}$:
#
# - *from the past*: it was made from $x_0$ by the jump, so it follows
#   $\mathcal{N}(\sqrt{\bar\alpha_{t-1}}\,x_0,\ 1-\bar\alpha_{t-1})$;
# - *from the future*: it became $x_t = \sqrt{\alpha_t}\,x_{t-1} + \sqrt{\beta_t}\,\epsilon$, which
#   puts it at $x_t/\sqrt{\alpha_t}$ with variance $\beta_t/\alpha_t$.
#
# Bayes' rule multiplies the two, and for normal densities that is easy: the *precisions* (one over
# the variance) add, and the mean is the average of both means, weighted by precision.

# %%
def my_posterior(x_0, x_t, alpha_bar_prev, beta):
    past, future = 1 / (1 - alpha_bar_prev), (1 - beta) / beta  # precisions
    variance = 1 / (past + future)
    mean = past * alpha_bar_prev.sqrt() * x_0 + future * x_t / (1 - beta).sqrt()
    return variance * mean, variance


# %%
a, beta = ten.alphas_cumprod[1], ten.betas[2]  # from t = 1 to t = 2 of the ten large steps
mine = my_posterior(0.5, -0.8, a, beta)
theirs = ten.q_posterior_mean_variance(*torch.tensor([[0.5], [-0.8]]), torch.tensor([2]))
for name, (mean, var) in {"by hand": mine, "package": theirs}.items():
    print(f"{name}: mean {mean.item():.4f}, variance {var.item():.4f}")

# %% [markdown]
# Ho et al. state the same as eqs. 6 and 7, with the fractions worked out:
#
# $$\tilde\mu_t = \frac{\sqrt{\bar\alpha_{t-1}}\,\beta_t}{1-\bar\alpha_t}\,x_0 +
# \frac{\sqrt{\alpha_t}\,(1-\bar\alpha_{t-1})}{1-\bar\alpha_t}\,x_t, \qquad
# \tilde\beta_t = \frac{1-\bar\alpha_{t-1}}{1-\bar\alpha_t}\,\beta_t$$
#
# Derivations can be wrong, so we also simulate it. A million pixels start at $x_0 = 0.5$, jump to
# `t = 1` of the ten large steps and take one more step. Where had those been that arrive near
# $-0.8$?

# %%
before = 0.5 * a.sqrt() + (1 - a).sqrt() * torch.randn(1_000_000, generator=generator)
after = (1 - beta).sqrt() * before + beta.sqrt() * torch.randn(before.shape, generator=generator)
origin = before[(after + 0.8).abs() < 0.02]

# %%
narrow = torch.linspace(-3, 2, 400)
views = {
    "from the past": density(narrow, 0.5 * a.sqrt(), 1 - a),
    "from the future": density(narrow, -0.8 / (1 - beta).sqrt(), beta / (1 - beta)),
    "both: eqs. 6 and 7": density(narrow, *mine),
}
plot_histograms(
    {"simulated": origin},
    x_label="value of the pixel at t = 1, given that it is -0.8 at t = 2",
    curves={name: (narrow, values) for name, values in views.items()},
    alt="The histogram of pixels that arrive at -0.8 lies just under the density of eqs. 6 and 7, "
    "which is narrower than those from past and future and stands between them",
)

# %% [markdown]
# At the very last step back, from `t = 0` to $x_0$, the past *is* $x_0$: the mean is $x_0$ and the
# variance 0. That is why samplers add no noise in their last step.
#
# ### Equation 11, and what errors do
#
# A sampler has no $x_0$, only a network's prediction of it. If the network predicts $\epsilon$,
# insert $x_0 = (x_t - \sqrt{1-\bar\alpha_t}\,\epsilon)/\sqrt{\bar\alpha_t}$ into $\tilde\mu_t$, and
# it simplifies to eq. 11:
#
# $$\tilde\mu_t = \frac{1}{\sqrt{\alpha_t}}
# \left(x_t - \frac{\beta_t}{\sqrt{1-\bar\alpha_t}}\,\epsilon\right)$$
#
# Now we can say what an error in the prediction does to *one step*: in $\epsilon$ it is multiplied
# by $\beta_t/\sqrt{\alpha_t(1-\bar\alpha_t)}$, in $x_0$ by the first coefficient of eq. 7, in $v$
# by that coefficient times $\sqrt{1-\bar\alpha_t}$. This is the factor at the first step of
# sampling, $t = T - 1$:

# %%
print("schedule  steps     eps       v     x_0")
for name, p in processes.items():
    for steps in (1000, 100, 10):
        q = p.respace(steps)
        x_0_factor = q.posterior_mean_coef1[-1]
        noise_factor = q.betas[-1] / (q.alphas[-1].sqrt() * q.sqrt_one_minus_alphas_cumprod[-1])
        v_factor = x_0_factor * q.sqrt_one_minus_alphas_cumprod[-1]
        print(f"{name:9} {steps:5} {noise_factor:7.2f} {v_factor:7.4f} {x_0_factor:7.4f}")


# %% [markdown]
# With Ho et al.'s thousand linear steps an error in $\epsilon$ is harmless: a factor of 0.02,
# although the one for $x_0$ was 157. It becomes a problem with the cosine schedule's clamped last
# step, and with few steps under any schedule. Errors in $v$ and $x_0$ are not amplified. In
# practice samplers also clamp the predicted $x_0$ to $[-1, 1]$, which prevents the worst.
#
# ## Samples without a network
#
# We can already run the whole process backwards if we pretend that flowers are *Gaussian*: a mean
# image, and the variances along the 100 principal components that we found above. For such data the
# best prediction of $x_0$, its conditional mean given $x_t$, follows from Bayes' rule once more.
# Along a component of variance $s^2$ it is the mean plus
#
# $$\frac{\sqrt{\bar\alpha_t}\,s^2}{\bar\alpha_t\,s^2 + 1 - \bar\alpha_t}$$
#
# times the deviation of $x_t$ from its own mean, $\sqrt{\bar\alpha_t}$ times the mean image.

# %%
def gaussian_prediction(x_t, a):
    deviation = (x_t - a.sqrt() * centre).flatten(1) @ directions.T
    gain = a.sqrt() * variances / (a * variances + 1 - a)
    return centre + (deviation * gain @ directions).view_as(x_t)


x_t = films[0]  # the flower under the linear schedule
predicted = [
    gaussian_prediction(x[None], a)[0]
    for x, a in zip(x_t, linear.alphas_cumprod[columns], strict=True)
]
filmstrip(
    [x_t, predicted],
    row_labels=["$x_t$", "predicted $x_0$"],
    column_labels=[f"t = {t}" for t in columns.tolist()],
    alt="Above, the flower dissolving; below, the prediction: close to the flower at small t, more "
    "and more blurred, and the mean of all flowers at the end",
)


# %% [markdown]
# The noisier the input, the vaguer the prediction, until it is the average flower. That is not a
# weakness of the Gaussian: as in notebook 00, the best prediction of something uncertain is an
# average. Sampling gives sharper images all the same, since it predicts, goes one step back with
# eqs. 6 and 7, and predicts again.

# %%
def walk_back(process, x):
    for t in reversed(range(process.timesteps)):
        x_0_hat = gaussian_prediction(x, process.alphas_cumprod[t])
        mean, var = process.q_posterior_mean_variance(x_0_hat, x, torch.full((len(x),), t))
        x = mean + var.sqrt() * torch.randn(x.shape, generator=generator)
    return x


# %%
start = torch.randn(64, *flower.shape[1:], generator=generator)
walks = {"1000 steps": linear, "10 of the 1000": ten, "10 small steps": ten_small}
samples = {name: walk_back(p, start) for name, p in walks.items()}
filmstrip(
    [x[:6] for x in samples.values()],
    row_labels=samples,
    alt="Six samples each: flowers in bright mixed colours with frayed edges from 1000 steps, "
    "paler ones from 10 of them; speckled flowers on grey from the 10 small steps",
)

# %% [markdown]
# The first row is as good as "Gaussian flowers" can be: place and background are a flower's, but
# colours of several species mix and the petals fray. The second takes only ten steps, but ten that
# reach noise: paler, still flowers. The third has the same perfect knowledge of the Gaussian and
# the same starting noise. But its ten small steps never reach noise, so it expects an $x_T$ that is
# 95 % flower, and takes the noise for one. Even the brightness is wrong:

# %%
print(f"mean of the flowers: {flowers.mean():.2f}")
for name, x in samples.items():
    print(f"{name:>19}: {x.mean():z.2f}")

# %% [markdown]
# ## What you know now
#
# - A step shrinks and adds noise, so that variance 1 stays 1; all steps together are one jump (eq.
#   4).
# - A schedule distributes the steps over noise levels, and must end in noise: say,
#   $\bar\alpha_T < 10^{-3}$.
# - $\epsilon$, $x_0$ and $v$ carry the same information; their losses differ by a weight, a
#   function of the SNR. This series predicts $x_0$.
# - Given $x_0$, the step back is exact: two normal densities multiplied (eqs. 6 and 7). In place of
#   $x_0$ a sampler uses a prediction; even a Gaussian's gives something like flowers.
#
# Notebook 03 builds the network that makes a better prediction, and 04 trains it.
#
# ## Your turn
#
# Replace `None` or `...` and run the cell; it says whether you are right.
#
# **1. Halfway.** At which `t` of the cosine schedule does noise first outweigh signal, SNR < 1?

# %% tags=["exercise"]
halfway = None

check(
    "exercise 1",
    halfway,
    lambda t: snr["cosine"][int(t) - 1] > 1 > snr["cosine"][int(t)],
    hint="snr['cosine'][t] is the SNR at t.",
)


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# halfway = int((snr["cosine"] > 1).sum())
# ```
#
# The steps with SNR > 1 come first, so their number is the first `t` without: 496, in the middle.
# The linear schedule gets there after a quarter of its steps, at 259.
# </details>
#
# **2. A hundred steps.** Write a linear schedule for any $T$ well above 20: at $T = 1000$ it is Ho
# et al.'s, and at $T = 100$ its $\bar\alpha_T$ stays below $10^{-3}$.

# %% tags=["exercise"]
def my_linear_schedule(T): ...


check(
    "exercise 2",
    my_linear_schedule(100),
    lambda b: (
        len(b) == 100
        and torch.cumprod(1 - b, 0)[-1] < 1e-3
        and torch.allclose(my_linear_schedule(1000), betas)
    ),
    hint="Fewer steps must each add more noise.",
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def my_linear_schedule(T):
#     return torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
# ```
#
# Then the sum of the betas, and with it roughly $\log\bar\alpha_T$, stays the same. (At $T \le 20$
# the last beta would reach 1.)
# </details>
#
# **3. Larger images.** Enlarge the flower to twice its side (every pixel becomes 2 x 2 equal ones),
# add noise at some `t`, then average every 2 x 2 pixels. By which factor has the SNR changed?

# %% tags=["exercise"]
factor = None

check("exercise 3", factor, 4, tolerance=0.5, hint="What is the variance of a mean of four noises?")

# %% [markdown]
# <details><summary>Solution</summary>
#
# Averaging leaves the equal pixels as they are, but the mean of four independent noises has a
# quarter of their variance, so the SNR is 4 times as high. Try it:
#
# ```python
# import torch.nn.functional as F
#
# large = F.interpolate(flower, scale_factor=2)
# noisy = cosine.q_sample(large, torch.tensor([499]), torch.randn(large.shape))
# remaining = F.avg_pool2d(noisy, 2) - cosine.sqrt_alphas_cumprod[499] * flower
# factor = cosine.sqrt_one_minus_alphas_cumprod[499] ** 2 / remaining.var()
# ```
#
# The same `t` is easier in a larger image, because neighbouring pixels carry the same information.
# A schedule that is right for 32 x 32 pixels destroys too little at 256 x 256; Hoogeboom et al.
# 2023, "simple diffusion", shift the SNR by just this factor.
# </details>
#
# **4. Sixteen bits.** GPUs run networks in bfloat16, which has 8 significant bits. If the table
# $\bar\alpha_t$ were kept in bfloat16 too, how many of the linear schedule's first steps would add
# no noise at all?

# %% tags=["exercise"]
silent = None

check(
    "exercise 4",
    silent,
    lambda n: (
        int((1 - alpha_bar[: int(n)].bfloat16()).count_nonzero()) == 0
        and alpha_bar[int(n)].bfloat16() < 1
    ),
    hint="tensor.bfloat16() rounds; 1 - alpha_bar is the variance of the noise.",
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# silent = int((1 - alpha_bar.bfloat16() == 0).sum())
# ```
#
# In bfloat16 nothing lies between 0.996 and 1, so the first 10 values of $\bar\alpha_t$ round to 1.
# Hence the rule: the tables and `q_sample` stay in float32, and only the network runs in 16 bits.
# </details>
#
# Next: [03_unet](03_unet.ipynb) builds the network that predicts $x_0$.
