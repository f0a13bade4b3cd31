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
# **What you'll do**: destroy a flower in a thousand small steps, jump to any of them at once, and work out exactly
# what it takes to go one step back.
#
# **What you'll learn**: why each step shrinks the picture as well as adding noise, what a noise schedule is and how to
# judge one, why $\epsilon$, $x_0$ and $v$ are three names for one thing, and where the formulas of the reverse process
# come from.
#
# **What you need**: notebook 01, and the normal distribution. Reading takes about half an hour, running about half a
# minute. Formulas follow Ho et al. 2020, "Denoising Diffusion Probabilistic Models", with its equation numbers.

# %%
import sys

if "google.colab" in sys.modules:  # there a notebook comes alone: fetch what it imports, once
    import subprocess

    subprocess.run("test -d noisOut || git clone -q --depth 1 https://github.com/noisOut/noisOut", shell=True, check=True)
    sys.path.insert(0, "noisOut")

# %%
import ipywidgets as widgets
import torch
from torch.nn.functional import avg_pool2d, interpolate
from torch.testing import assert_close

from noisout_nb.data import load_data
from noisout_nb.display import Explorer, filmstrip, image_grid, plot_histograms, plot_lines, stack
from noisout_nb.forward_process import GaussianDiffusion, cosine_beta_schedule, linear_beta_schedule
from noisout_nb.profiles import get_profile

torch.manual_seed(0)
profile = get_profile()

# %% [markdown]
# ## The idea
#
# Painting a flower is hard. Ruining one is easy: add noise. Now suppose that it is ruined *slowly*, so slowly that
# every single step could nearly be undone by someone who knows what flowers look like. Then a network only has to learn
# many easy undoings, and together they make a flower out of nothing but noise.
#
# This notebook is about the ruining. Nothing is learned here: all of it is known in closed form, which is why training
# will be so simple. Our victim:

# %%
dataset = load_data(profile, "val")
flowers = torch.stack([image for image, _ in dataset])
flower = flowers[3:4]
image_grid(flower, scale=128 // profile.image_size, alt="One flower, sharp and clean")

# %% [markdown]
# ## One step
#
# In step $t$ the picture is shrunk a little, and a little normal noise is added (eq. 2):
#
# $$q(x_t \mid x_{t-1}) = \mathcal{N}\!\left(x_t;\ \sqrt{1-\beta_t}\,x_{t-1},\ \beta_t I\right)$$
#
# The $\beta_t$ are small numbers chosen beforehand. Ho et al. let them rise in a line from 0.0001 to 0.02 over
# $T = 1000$ steps. In code $t$ counts from 0, so `betas[t]` is the paper's $\beta_{t+1}$.

# %%
T = 1000
betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
generator = torch.Generator().manual_seed(0)


# %%
def step(x, t):
    noise = torch.randn(x.shape, generator=generator)
    return (1 - betas[t]).sqrt() * x + betas[t].sqrt() * noise


# %% [markdown]
# Why shrink? Noise of variance $\beta_t$ adds up: without the shrinking, the variance would grow with every step, and
# the network would have to cope with pictures of ever larger numbers. With it, the variance $\sigma^2$ turns into
# $(1-\beta_t)\,\sigma^2 + \beta_t$, and for $\sigma^2 = 1$ that is 1 again. Such a process is called *variance
# preserving*. Below, 20,000 numbers of variance 1 go through all steps, once as it should be and once without the
# shrinking.

# %%
kept = grown = torch.randn(20_000, generator=generator)
variance = {"with the shrinking": [], "without it": []}
for t in range(T):
    kept = step(kept, t)
    grown = grown + betas[t].sqrt() * torch.randn(grown.shape, generator=generator)
    variance["with the shrinking"].append(kept.var())
    variance["without it"].append(grown.var())

# %%
plot_lines({name: torch.stack(values) for name, values in variance.items()}, x_label="t", y_label="variance",
           alt="Variance against t: with the shrinking it stays at 1, without it it climbs to 11")

# %%
after = torch.stack(variance["with the shrinking"])
assert (after - 1).abs().max() < 0.1
assert abs(variance["without it"][-1] - (1 + betas.sum())) < 1
print(f"without the shrinking the variance ends at 1 + the sum of the betas = {1 + betas.sum():.2f}")

# %% [markdown]
# ## The film
#
# Now the flower goes through the same thousand steps, one after the other, and we keep a few of the frames.

# %%
shown = [0, 19, 49, 99, 199, 299, 499, 999]
x, frames = flower, [flower[0]]
for t in range(T):
    x = step(x, t)
    if t in shown:
        frames.append(x[0])

# %% tags=["cover"]
filmstrip([frames], column_labels=["$x_0$", *(f"t = {t}" for t in shown)], arrow="the forward process",
          alt="A flower dissolving in noise: clear until t = 49, grainy at 99, faint at 299, nothing but noise at 999")

# %% [markdown]
# Flowers have less variance than 1 (they live in [-1, 1]), so theirs moves towards 1. Whatever the start, the end is the
# same: mean 0 and variance 1.

# %%
assert flower.var() < 0.9
assert abs(frames[-1].mean()) < 0.15 and abs(frames[-1].var() - 1) < 0.15

# %% [markdown]
# Look at neighbouring frames: the details go first, the large shapes and the colours last. A network that walks back
# will therefore decide on the large shapes first and fill in the details at the end.
#
# ## The jump
#
# To train a network we shall need $x_t$ for random $t$, millions of times. Walking there step by step is out of the
# question, and not needed. Write $\alpha_t = 1 - \beta_t$, and do two steps by hand:
#
# $$x_t = \sqrt{\alpha_t}\,x_{t-1} + \sqrt{1-\alpha_t}\,\epsilon_t, \qquad x_{t-1} = \sqrt{\alpha_{t-1}}\,x_{t-2} + \sqrt{1-\alpha_{t-1}}\,\epsilon_{t-1}$$
#
# $$x_t = \sqrt{\alpha_t\alpha_{t-1}}\,x_{t-2} + \underbrace{\sqrt{\alpha_t(1-\alpha_{t-1})}\,\epsilon_{t-1} + \sqrt{1-\alpha_t}\,\epsilon_t}_{\text{normal, its variances add: } \alpha_t - \alpha_t\alpha_{t-1} + 1 - \alpha_t\, =\, 1 - \alpha_t\alpha_{t-1}}$$
#
# Two steps are one larger step whose $\alpha$ is the product. So are all steps: with
# $\bar\alpha_t = \alpha_1\alpha_2\cdots\alpha_t$ (eq. 4)
#
# $$q(x_t \mid x_0) = \mathcal{N}\!\left(x_t;\ \sqrt{\bar\alpha_t}\,x_0,\ (1-\bar\alpha_t) I\right) \quad\text{or}\quad x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon$$

# %%
alpha_bar = torch.cumprod(1 - betas, 0)


# %%
def my_q_sample(x_0, t, noise):
    a = alpha_bar[t].view(-1, 1, 1, 1)
    return (a.sqrt() * x_0 + (1 - a).sqrt() * noise).float()


# %% [markdown]
# The helper's `GaussianDiffusion` holds the same tables. From here on `process` is ours; it is given one $t$ for every
# picture of the batch.

# %%
process = GaussianDiffusion(linear_beta_schedule(T))
x_0 = flowers[:8]
t = torch.tensor([0, 1, 10, 100, 300, 600, 998, 999])
noise = torch.randn(x_0.shape, generator=generator)
assert_close(process.q_sample(x_0, t, noise), my_q_sample(x_0, t, noise))

# %% [markdown]
# Is the jump the same as the walk? We send 20,000 copies of one bright pixel, $x_0 = 0.8$, through the walk, and draw
# over their histograms the normal densities that eq. 4 promises.

# %%
stops = [49, 249, 999]
x, walked = torch.full((20_000,), 0.8), {}
for i in range(T):
    x = step(x, i)
    if i in stops:
        walked[i] = x

# %%
for i in stops:
    assert abs(walked[i].mean() - 0.8 * alpha_bar[i].sqrt()) < 0.04
    assert abs(walked[i].std() - (1 - alpha_bar[i]).sqrt()) < 0.03


# %%
def density(at, mean, variance):
    return torch.exp(-((at - mean) ** 2) / (2 * variance)) / (2 * torch.pi * variance).sqrt()


# %%
axis = torch.linspace(-4, 4, 400)
promised = [density(axis, 0.8 * alpha_bar[i].sqrt(), 1 - alpha_bar[i]) for i in stops]
plot_histograms({f"walk, t = {i}": walked[i] for i in stops}, x_label="the pixel's value", bins=160,
                curves={"eq. 4": (axis.repeat(3), torch.cat(promised))},
                alt="Histograms of a walked pixel at t = 49, 249 and 999, each under the normal density of eq. 4")

# %% [markdown]
# They agree. The pixel forgets that it was 0.8 (its mean wanders to 0) while its spread grows to 1. And the helper's
# jump, at the same three times, over 20,000 draws:

# %%
pixel = torch.full((20_000, 1), 0.8)
for i in stops:
    jumped = process.q_sample(pixel, torch.full((20_000,), i), torch.randn(pixel.shape, generator=generator))
    assert abs(jumped.mean() - 0.8 * alpha_bar[i].sqrt()) < 0.04
    assert abs(jumped.std() - (1 - alpha_bar[i]).sqrt()) < 0.03


# %% [markdown]
# ## Schedules
#
# Because of the jump, the betas matter only through $\bar\alpha_t$, the share of the signal's power that is left at
# $t$. What a network can see at $t$ is told by one number, the *signal-to-noise ratio*
# $\text{SNR}_t = \bar\alpha_t / (1-\bar\alpha_t)$. Nichol & Dhariwal (2021, eq. 17) found that the linear schedule
# hurries: its last third is all but pure noise, and steps spent there teach little. Their *cosine* schedule lets
# $\bar\alpha_t$ fall along a squared cosine instead:
#
# $$\bar\alpha_t = \frac{f(t)}{f(0)}, \qquad f(t) = \cos^2\!\left(\frac{t/T + s}{1 + s}\cdot\frac{\pi}{2}\right), \quad s = 0.008$$

# %%
def my_cosine_schedule(T, s=0.008):
    u = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((u + s) / (1 + s) * torch.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


# %%
assert_close(my_cosine_schedule(T), cosine_beta_schedule(T))
assert (my_cosine_schedule(T) == 0.999).sum() == 1  # the clamp touches the last step alone
assert_close(betas, linear_beta_schedule(T))

# %% [markdown]
# Without the clamp the last step would have $\beta_T = 1$: it would leave nothing at all, and dividing by
# $\sqrt{\bar\alpha_T} = 0$ would give infinities.

# %%
processes = {"linear": process, "cosine": GaussianDiffusion(cosine_beta_schedule(T))}
half = {"x_label": "t", "size": (720, 230)}
stack(
    plot_lines({n: p.betas for n, p in processes.items()}, y_label="$\\beta_t$", log_y=True, **half),
    plot_lines({n: p.alphas_cumprod for n, p in processes.items()}, y_label="$\\bar\\alpha_t$", **half),
    alt="Above, betas on a log axis: both rise, the cosine's to nearly 1 at the end. Below, alpha bar: the linear "
    "schedule's is almost 0 from t = 600 on, the cosine's falls evenly",
)

# %%
every_t = torch.arange(T)
assert_close(process.signal_to_noise_ratio(every_t), (alpha_bar / (1 - alpha_bar)).float(), rtol=1e-5, atol=0)
snr_curves = plot_lines({n: p.signal_to_noise_ratio(every_t) for n, p in processes.items()}, x_label="t", y_label="SNR", log_y=True,
                        hlines={"as much noise as signal": 1}, size=(720, 280),
                        alt="SNR against t on a log axis: the linear schedule passes 1 at t = 259, the cosine at 496")
snr_curves

# %%
columns = [0, 99, 199, 299, 399, 499, 599, 799, 999]
same_noise = torch.randn(flower.shape, generator=generator).expand(len(columns), -1, -1, -1)
films = [p.q_sample(flower.expand_as(same_noise), torch.tensor(columns), same_noise) for p in processes.values()]
filmstrip(films, row_labels=processes, column_labels=[f"t = {t}" for t in columns],
          alt="The flower dissolving under both schedules, with the same noise: at t = 399 it is hard to find under the "
          "linear schedule and plain to see under the cosine one")


# %% [markdown]
# Now you. Move the time (drag it, or use the arrow keys) and change the schedule: where does the flower drown, and what is the SNR there?

# %%
def noisy_flower(t, schedule):
    p, at = processes[schedule], torch.tensor([t])
    x_t = p.q_sample(flower, at, same_noise[:1])
    pictures = image_grid(torch.cat([flower, same_noise[:1], x_t]), scale=128 // profile.image_size, column_labels=["$x_0$", r"$\epsilon$", f"$x_t$, t = {t}"])
    curve = snr_curves.marked(t, p.signal_to_noise_ratio(at).item())
    return stack(pictures, curve, alt=f"The flower, the noise, and their mixture at t = {t}; below, a dot at t = {t} on the {schedule} schedule's SNR curve")


# %%
Explorer(noisy_flower, t=widgets.IntSlider(209, 9, 999, 10), schedule=widgets.Dropdown(options=["linear", "cosine"]))

# %% [markdown]
# Two numbers are worth knowing by heart, since they tell in one glance whether somebody's schedule is right:
# $\bar\alpha_T$, what is left of the signal at the end.

# %%
for name, p in processes.items():
    print(f"{name}: alpha_bar_T = {p.exact_alphas_cumprod[-1]:.2e}")
assert process.signal_to_noise_ratio(torch.tensor([2 * T // 3])) < 0.02  # the linear schedule's last third
assert f"{process.exact_alphas_cumprod[-1]:.3e}" == "4.036e-05"
assert f"{processes['cosine'].exact_alphas_cumprod[-1]:.2e}" == "2.43e-09"


# %% [markdown]
# A word on precision. The tables are *used* in float32, but *computed* in float64: a product of a thousand factors
# close to 1 collects rounding errors, and $1-\bar\alpha_t$ at small $t$, a tiny difference of two large numbers,
# collects more. This is the largest relative error of both, if float32 did all the work:

# %%
def float32_errors(betas):
    exact, coarse = torch.cumprod(1 - betas, 0), torch.cumprod(1 - betas.float(), 0)
    return ((coarse - exact) / exact).abs().max(), ((exact - coarse) / (1 - exact)).abs().max()


# %%
for name, b in (("linear", betas), ("cosine", cosine_beta_schedule(T))):
    signal_error, noise_error = float32_errors(b)
    print(f"{name}: 1 - alpha_bar suffers more than alpha_bar: {bool(noise_error > 10 * signal_error)}")
    assert 1e-8 < signal_error < 1e-4 < noise_error < 1e-3

# %% [markdown]
# ## Why ten steps do not reach noise
#
# A thousand steps are many. What if we take the same betas, from 0.0001 to 0.02, but only $T = 10$ of them? It has been
# done, and it does not work. Ten such steps leave

# %%
ten = GaussianDiffusion(torch.linspace(1e-4, 0.02, 10))
left = ten.exact_alphas_cumprod[-1]
print(f"alpha_bar_10 = {left:.3f}: {left.sqrt():.0%} of the flower's amplitude, SNR {left / (1 - left):.1f}")
assert 0.903 < left < 0.905

# %%
last = [p.q_sample(flower, torch.tensor([p.timesteps - 1]), same_noise[:1])[0] for p in (ten, process)]
image_grid(torch.stack([flower[0], *last]), scale=128 // profile.image_size,
           column_labels=["$x_0$", "$x_T$ for T = 10", "$x_T$ for T = 1000"],
           alt="The flower; the flower after 10 steps, still plain to see; pure noise after 1000 steps")

# %% [markdown]
# of the flower. The middle picture is what a network would be trained on as "pure noise"; sampling would then start
# from the right one, which it has never seen. At the end of this notebook we watch that go wrong.
#
# Fewer steps must be larger steps. The helper's linear schedule scales its betas by $1000/T$, so that their sum, and
# with it roughly $\log\bar\alpha_T$, stays. At $T = 100$ that works; at $T = 10$ the betas would exceed 1 and are
# clamped to 0.999, which is safe but crude:

# %%
for few in (100, 50, 10):
    b = linear_beta_schedule(few)
    print(f"T = {few:3}: largest beta {b.max():.3f}, clamped: {int((b == 0.999).sum())} of {few}")
    assert torch.cumprod(1 - b, 0)[-1] < 1e-3

# %% [markdown]
# The better way keeps the fine process and visits only some of its times: `process.respace(10)`. Its betas are those
# that lead from one kept $\bar\alpha$ to the next, $\beta = 1 - \bar\alpha_t / \bar\alpha_{\text{previous}}$. A network
# trained with 1000 steps can be sampled with ten that way, as it is told the original $t$. The sampling must start
# where the noise is pure, so $T-1$ is always among the kept times.

# %%
respaced = process.respace(10)
print("kept:", respaced.timestep_map.tolist())
assert respaced.timestep_map[-1] == T - 1
assert_close(respaced.alphas_cumprod, process.alphas_cumprod[respaced.timestep_map])

# %% [markdown]
# ## Three names for one thing
#
# Whoever has $x_t$ and knows the noise $\epsilon$ in it also knows $x_0$: just solve
# $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon$. A network may therefore be asked for either. There
# is a third question, Salimans & Ho's (2022) *velocity*
#
# $$v = \sqrt{\bar\alpha_t}\,\epsilon - \sqrt{1-\bar\alpha_t}\,x_0$$
#
# The two roots are the cosine and the sine of one angle, since their squares sum to 1. So $(x_t, v)$ is
# $(x_0, \epsilon)$ *rotated*, and a rotation is undone by rotating back:
# $x_0 = \sqrt{\bar\alpha_t}\,x_t - \sqrt{1-\bar\alpha_t}\,v$, with nothing to divide by.

# %%
cos = process.sqrt_alphas_cumprod[t].view(-1, 1, 1, 1)
sin = process.sqrt_one_minus_alphas_cumprod[t].view(-1, 1, 1, 1)
x_t, v = cos * x_0 + sin * noise, cos * noise - sin * x_0

# %%
assert_close(cos**2 + sin**2, torch.ones_like(cos))
assert_close(process.predict_v(x_0, t, noise), v)
assert_close(process.predict_start_from_v(x_t, t, v), x_0, rtol=0, atol=1e-5)

# %% [markdown]
# All conversions lead back to where they started, at each of our eight times:

# %%
eps = process.predict_noise_from_start(x_t, t, x_0)
assert_close(eps, noise, rtol=0, atol=1e-3)
assert_close(process.predict_start_from_noise(x_t, t, noise), x_0, rtol=0, atol=1e-3)


# %% [markdown]
# The tolerance had to be generous, and that is no accident. Solving for $x_0$ divides by $\sqrt{\bar\alpha_t}$, which
# is nearly 0 at the end; an error in $\epsilon$ comes out multiplied by
# $\sqrt{(1-\bar\alpha_t)/\bar\alpha_t} = 1/\sqrt{\text{SNR}_t}$. We add an error of 1 to see it.

# %%
def error_in_x_0(convert, answer):
    return (convert(x_t, t, answer + 1) - convert(x_t, t, answer)).abs().mean((1, 2, 3))


# %%
from_eps = error_in_x_0(process.predict_start_from_noise, noise)
from_v = error_in_x_0(process.predict_start_from_v, v)
assert_close(from_eps, process.signal_to_noise_ratio(t).rsqrt(), rtol=1e-2, atol=0)
assert_close(from_v, process.sqrt_one_minus_alphas_cumprod[t], rtol=1e-2, atol=0)

# %%
print("   t   error in x_0 per error in eps   in v")
for i in (0, 100, 300, 600, 999):
    print(f"{i:4} {1 / process.signal_to_noise_ratio(torch.tensor([i])).item() ** 0.5:24.2f}"
          f" {process.sqrt_one_minus_alphas_cumprod[i]:17.2f}")

# %%
snr = {name: p.signal_to_noise_ratio(every_t) for name, p in processes.items()}
curves = {f"$\\epsilon$, {name}": s.rsqrt() for name, s in snr.items()}
curves |= {f"$v$, {name}": (1 + s).rsqrt() for name, s in snr.items()}
plot_lines(curves, x_label="t", y_label="error in $x_0$ per error in the answer", log_y=True,
           alt="Error in x_0 per error in the answer, log axis: for eps it climbs to 157 under the linear and to 20,000 "
           "under the cosine schedule; for v it never exceeds 1")


# %% [markdown]
# At the last step of the linear schedule an error in $\epsilon$ is blown up 157 times, under the cosine schedule 20,000
# times, while one in $v$ never grows. It is a real difference, because sampling *begins* there. So our profiles predict
# $v$; and any sampler clamps its guess of $x_0$ to [-1, 1].
#
# ## One step back
#
# What does it take to undo a single step? If we knew $x_0$, the answer would be exact. $x_{t-1}$ is seen from two
# sides:
#
# - from the past: $q(x_{t-1} \mid x_0)$ says $\mathcal{N}(\sqrt{\bar\alpha_{t-1}}\,x_0,\ 1-\bar\alpha_{t-1})$, by the
# jump;
# - from the future: $x_t = \sqrt{\alpha_t}\,x_{t-1} + \sqrt{\beta_t}\,\epsilon$ puts $x_{t-1}$ at
# $x_t/\sqrt{\alpha_t}$, with variance $\beta_t/\alpha_t$.
#
# Bayes multiplies the two, and for normal densities this is easy: the *precisions* (one over the variance) add, and the
# mean is the average of both means, weighted by precision.

# %%
def my_posterior(x_0, x_t, i):
    past, future = 1 / (1 - alpha_bar[i - 1]), (1 - betas[i]) / betas[i]
    variance = 1 / (past + future)
    mean = past * alpha_bar[i - 1].sqrt() * x_0 + future * x_t / (1 - betas[i]).sqrt()
    return variance * mean, variance


# %% [markdown]
# Ho et al. state the same as eqs. 6 and 7, with the fractions worked out:
#
# $$\tilde\mu_t = \frac{\sqrt{\bar\alpha_{t-1}}\,\beta_t}{1-\bar\alpha_t}\,x_0 + \frac{\sqrt{\alpha_t}\,(1-\bar\alpha_{t-1})}{1-\bar\alpha_t}\,x_t, \qquad \tilde\beta_t = \frac{1-\bar\alpha_{t-1}}{1-\bar\alpha_t}\,\beta_t$$

# %%
mean, posterior_variance = process.q_posterior_mean_variance(x_0, x_t, t)
for k, i in enumerate(t.tolist()):
    if i > 0:
        m, s2 = my_posterior(x_0[k], x_t[k], i)
        assert_close(mean[k], m.float(), rtol=1e-4, atol=1e-5)
        assert_close(posterior_variance[k].item(), s2.item(), rtol=1e-5, atol=0)

# %% [markdown]
# At $t = 0$ the past *is* $x_0$: nothing is left to guess, the mean is $x_0$ and the variance 0. That is why samplers
# add no noise in their last step.

# %%
assert t[0] == 0 and posterior_variance[0] == 0
assert_close(mean[0], x_0[0])

# %% [markdown]
# Derivations can be wrong, so let us also try it out. In the process of ten large steps, a million pixels start at
# $x_0 = 0.5$ and go to $t = 1$, and from there one step on, to $t = 2$. Of all that arrive near $-0.8$: where had they
# been?

# %%
a, b = respaced.alphas_cumprod[1], respaced.betas[2]
before = 0.5 * a.sqrt() + (1 - a).sqrt() * torch.randn(1_000_000, generator=generator)
after = (1 - b).sqrt() * before + b.sqrt() * torch.randn(before.shape, generator=generator)
origin = before[(after + 0.8).abs() < 0.02]

# %%
m, s2 = respaced.q_posterior_mean_variance(torch.tensor([0.5]), torch.tensor([-0.8]), torch.tensor([2]))
assert abs(origin.mean() - m) < 0.03 and abs(origin.var() - s2) < 0.03
plot_histograms({"all": before, "those that arrive at -0.8": origin}, x_label="the pixel's value at t = 1",
                curves={"eqs. 6 and 7": (axis, density(axis, m, s2))}, size=(720, 260),
                alt="Two histograms of the pixel before the step: all around 0.4; those that arrive at -0.8 narrower and "
                "further left, just under the density of eqs. 6 and 7")


# %% [markdown]
# ## Equation 11, and a classic bug
#
# A sampler has no $x_0$, only a network's guess. If the network says $\epsilon$, we can put
# $x_0 = (x_t - \sqrt{1-\bar\alpha_t}\,\epsilon)/\sqrt{\bar\alpha_t}$ into $\tilde\mu_t$, and it simplifies to eq. 11:
#
# $$\tilde\mu_t = \frac{1}{\sqrt{\alpha_t}}\left(x_t - \frac{\beta_t}{\sqrt{1-\bar\alpha_t}}\,\epsilon\right)$$

# %%
def eq_11(x_t, t, eps, root):
    beta, sigma = (table[t].view(-1, 1, 1, 1) for table in (process.betas, process.sqrt_one_minus_alphas_cumprod))
    return (x_t - beta / sigma * eps) / root[t].view(-1, 1, 1, 1)


# %%
guess = process.predict_start_from_noise(x_t, t, noise)
mean, _ = process.q_posterior_mean_variance(guess, x_t, t)
assert_close(eq_11(x_t, t, noise, process.alphas.sqrt()), mean, rtol=1e-3, atol=1e-4)

# %% [markdown]
# The root is $\sqrt{\alpha_t}$: only *one* step's shrinking is undone. Write $\sqrt{\bar\alpha_t}$ by mistake, a slip
# of one stroke, and all steps' shrinking is undone at once. The code runs; the pictures are noise. At $t = 999$
# everything is too large by

# %%
wrong = eq_11(x_t, t, noise, process.sqrt_alphas_cumprod)
factor = wrong.std((1, 2, 3)) / mean.std((1, 2, 3))
print(f"a factor of {factor[t == 999].item():.0f}")
assert 155 < factor[t == 999] < 157

# %% [markdown]
# ## A rehearsal
#
# We can already run the whole process backwards, without any network, if we pretend that flowers are normally
# distributed: a mean picture, and some variance along each of their first hundred principal components.

# %%
centre = flowers.mean(0)
_, singular, components = torch.pca_lowrank(flowers.flatten(1), q=100)
variances = singular**2 / (len(flowers) - 1)


# %% [markdown]
# For such data the best possible guess of $x_0$ is known, by Bayes once more: along a component of variance $\lambda$ it is
# the mean plus $\frac{\sqrt{\bar\alpha_t}\,\lambda}{\bar\alpha_t\lambda + 1 - \bar\alpha_t}$
# times the deviation of $x_t$ from its own mean.

# %%
def best_guess(x_t, a):
    deviation = (x_t - a.sqrt() * centre).flatten(1) @ components
    gain = a.sqrt() * variances / (a * variances + 1 - a)
    return centre + (deviation * gain @ components.T).view_as(x_t)


# %%
def walk_back(process, x):
    for i in reversed(range(process.timesteps)):
        guess = best_guess(x, process.alphas_cumprod[i])
        mean, variance = process.q_posterior_mean_variance(guess, x, torch.full((len(x),), i))
        x = mean + variance.sqrt() * torch.randn(x.shape, generator=generator)
    return x


# %%
start = torch.randn(32, *flower.shape[1:], generator=generator)
walks = {"1000 steps": process.respace(100), "10 of the 1000": respaced, "10 small steps": ten}
dreams = {name: walk_back(p, start) for name, p in walks.items()}

# %%
filmstrip([x[:6] for x in dreams.values()], row_labels=dreams,
          alt="Six pictures each: blurred but colourful flowers on dark green from 1000 steps, softer ones from 10 of "
          "them; grey speckled discs from the 10 small steps")

# %% [markdown]
# The first row (for speed it visits 100 of the 1000 times) is as good as "normally distributed flowers" can be: ghosts,
# but with a flower's place, colours and background. A network will do better, since it need not pretend. The second row
# takes only ten steps, but ten that reach noise: softer, still flowers.
#
# The third row had the same perfect knowledge and the same starting noise. But its ten small steps never reach noise,
# so they expect a start that is 95 % flower, look for one in the speckles, and keep what they find. Even the brightness
# is wrong. Half of the data's mean brightness is a wide margin:

# %%
goal = flowers.mean()
for name, x in dreams.items():
    found = abs(x.mean() - goal) < abs(goal) / 2
    print(f"{name}: the brightness of flowers is {'found' if found else 'missed'}")
    assert found == (name != "10 small steps")

# %% [markdown]
# ## A trap in sixteen bits
#
# On a GPU networks run in bfloat16, which keeps 8 significant bits. In such numbers nothing lies between 0.996 and 1,
# so the first $\bar\alpha_t$ all round to 1, and code that computes $1-\bar\alpha_t$ from them adds no noise at all:

# %%
for name, p in processes.items():
    silent = [int((1 - p.alphas_cumprod.to(dtype) == 0).sum()) for dtype in (torch.bfloat16, torch.float16)]
    print(f"{name}: no noise in the first {silent[0]} steps in bfloat16, {silent[1]} in float16")

# %% [markdown]
# Hence the rule: the tables stay in float32, and only the network may run in 16 bits. The helper's `q_sample` answers
# in float32 even if it is handed 16-bit pictures in the middle of an autocast region.

# %%
with torch.autocast("cpu", dtype=torch.bfloat16):
    x_t16 = process.q_sample(x_0.bfloat16(), t, noise.bfloat16())
assert x_t16.dtype == torch.float32
assert (x_t16[0] - x_0[0].bfloat16()).std() > 0.009  # at t = 0 there is noise: sqrt(1e-4) = 0.01

# %% [markdown]
# ## Off by one
#
# The papers count $t = 1..T$, the code counts 0 to $T-1$. Passing the paper's $T$ would read past the end of a table;
# passing $-1$ would quietly read the *last* entry. The helper accepts neither.

# %% tags=["raises-exception"]
process.q_sample(x_0[:1], torch.tensor([T]), noise[:1])

# %% tags=["raises-exception"]
process.q_sample(x_0[:1], torch.tensor([-1]), noise[:1])

# %% [markdown]
# ## What you know now
#
# - A step shrinks and adds noise, so that variance 1 stays 1; all steps together are one jump (eq. 4).
# - A schedule is judged by its SNR, and must end in noise: $\bar\alpha_T < 10^{-3}$.
# - $\epsilon$, $x_0$ and $v$ say the same, but errors in $\epsilon$ explode where sampling begins.
# - Given $x_0$, the step back is exact: two normal densities multiplied (eqs. 6 and 7).
#
# Only $x_0$ is missing: somebody has to guess it from $x_t$. Before we build that somebody, three exercises.
#
# ## Your turn
#
# **1. Halfway.** At which $t$ does the noise first outweigh the signal, SNR < 1, under each schedule? Replace the
# zeros.

# %% tags=["exercise"]
halfway = {"linear": 0, "cosine": 0}


# %% [markdown]
# **2. A hundred steps.** Write a linear schedule for any $T$ whose $\bar\alpha_T$ stays below $10^{-3}$ at $T = 100$.
# The one below does not: how much signal does it leave?

# %% tags=["exercise"]
def my_linear_schedule(T):
    return torch.linspace(1e-4, 0.02, T, dtype=torch.float64)


print(f"alpha_bar_T = {torch.cumprod(1 - my_linear_schedule(100), 0)[-1]:.3f}")

# %% [markdown]
# **3. Larger pictures.** Enlarge the flower to twice its side, add noise at $t = 499$, then average every 2 x 2 pixels.
# Compare it with the small flower at the same $t$. What does the averaging do to the SNR, and what does that say about
# using one schedule for all sizes?

# %% tags=["exercise"]
large = interpolate(flower, scale_factor=2)  # every pixel becomes 2 x 2 equal ones
print(tuple(large.shape))

# %% [markdown]
# ## Solutions
#
# **1.** Count the steps with SNR > 1; they come first, so their number is the first $t$ without.

# %% tags=["solution"]
halfway = {name: int((p.signal_to_noise_ratio(every_t) > 1).sum()) for name, p in processes.items()}
print(halfway)
for name, p in processes.items():
    before, after = p.alphas_cumprod[halfway[name] - 1], p.alphas_cumprod[halfway[name]]
    assert before > 0.5 > after  # SNR = 1 where alpha_bar = 1/2


# %% [markdown]
# The linear schedule is through after a quarter of its steps, the cosine schedule in the middle.
#
# **2.** Fewer steps, each as much larger: scale both ends by $1000/T$.

# %% tags=["solution"]
def my_linear_schedule(T):
    return torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T


assert torch.cumprod(1 - my_linear_schedule(100), 0)[-1] < 1e-3
assert_close(my_linear_schedule(100), linear_beta_schedule(100))

# %% [markdown]
# **3.** Averaging leaves equal pixels as they are, but the mean of four independent noises has a quarter of their
# variance. The SNR is four times as high.

# %% tags=["solution"]
p, t_499 = processes["cosine"], torch.tensor([499])
noisy = p.q_sample(flower, t_499, torch.randn(flower.shape, generator=generator))
averaged = avg_pool2d(p.q_sample(large, t_499, torch.randn(large.shape, generator=generator)), 2)
signal = p.sqrt_alphas_cumprod[499] * flower
ratio = (noisy - signal).var() / (averaged - signal).var()
assert 3.4 < ratio < 4.6

# %% tags=["solution"]
image_grid(torch.cat([noisy, averaged]), scale=128 // profile.image_size,
           column_labels=["small", "large, averaged"],
           alt="The small noisy flower, and the averaged large one, which is much clearer at the same t")

# %% [markdown]
# The same $t$ is easier in a larger picture, where neighbours tell of each other. A schedule that is right for 32 x 32
# pixels destroys too little at 256 x 256; larger pictures want noisier schedules (Hoogeboom et al. 2023, "simple
# diffusion", shift the SNR by just this factor).
#
# Next: in [notebook 03](03_unet.ipynb) we build the network that makes the guess.
