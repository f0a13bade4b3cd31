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
# # 00 Diffusion in ten minutes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/noisOut/noisOut/blob/main/notebooks/00_quickstart.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/noisOut/noisOut/main?labpath=notebooks/00_quickstart.ipynb)
#
# **What you'll do**: write a complete diffusion model in about forty lines, train it in seconds on
# points in the plane, and watch noise flow into the shape of a flower. Then run the same sampling
# loop on a network trained on photographs, and get images of flowers.
#
# **What you'll learn**: the three ideas behind every diffusion model: add noise, predict the clean
# data, go back in small steps.
#
# **What you need**: some PyTorch. Half a minute on a laptop; nothing is downloaded.

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
from IPython.display import display
from torch import nn

from noisout_nb.checkpoints import load_pretrained
from noisout_nb.data import species_labels
from noisout_nb.exercises import check
from noisout_nb.figures import filmstrip, image_grid, plot_loss, plot_points
from noisout_nb.generate import sample_image
from noisout_nb.guidance import ClassifierFreeGuidance
from noisout_nb.profiles import PROFILES
from noisout_nb.progress import progress
from noisout_nb.widgets import Explorer

_ = torch.manual_seed(0)


# %% [markdown]
# ## Data: a flower made of points
#
# An image of 64 x 64 pixels is a single point in a space of 12,288 dimensions. We begin with two
# dimensions, where everything can be seen. Our data are points in the plane: five petals, drawn as
# outlines, and a centre.

# %%
def flower(count):
    angle = 2 * torch.pi * torch.rand(count)
    depth = torch.rand(count)
    petals = (0.55 + 1.25 * torch.cos(2.5 * angle).abs()) * (0.9 + 0.1 * depth)
    radius = torch.where(torch.rand(count) < 0.75, petals, 0.4 * depth.sqrt())
    return torch.stack([radius * angle.sin(), radius * angle.cos()], dim=1)


def colours(points):  # for the figures: gold in the centre, from coral to violet around it
    coral, violet, gold = torch.tensor([[0.96, 0.36, 0.38], [0.45, 0.24, 0.78], [0.95, 0.68, 0.08]])
    share = (1 + torch.cos(torch.atan2(*points.T) - 1))[:, None] / 2
    in_centre = points.norm(dim=1, keepdim=True) < 0.45
    return torch.where(in_centre, gold, share * coral + (1 - share) * violet)


# %%
points = flower(2000)
hues = colours(points)
alt = "Points that form a flower: the outlines of five petals and a filled centre"
plot_points({"the data: 2,000 points": points}, colors=hues, limits=(-2, 2), alt=alt)

# %% [markdown]
# The task: generate *new* points of this distribution, from these examples alone.
#
# ## Idea 1: destroy the data with noise
#
# Over $T$ timesteps a data point $x_0$ turns into noise. At timestep $t$ it is a weighted sum of
# itself and Gaussian noise $\epsilon$:
#
# $$x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon$$
#
# The *schedule* $\bar\alpha_t$ falls from 1 (only data) at $t = 0$ to 0 (only noise) at $t = T$.

# %%
T = 40
alpha_bar = torch.cos(torch.linspace(0, 1, T + 1) * torch.pi / 2) ** 2
signal, noise = alpha_bar.sqrt()[:, None], (1 - alpha_bar).sqrt()[:, None]
print(*[f"t = {t}: {float(alpha_bar[t]):.2f}" for t in (0, 8, 16, 32, 40)], sep="   ")

# %%
eps = torch.randn_like(points)
noisy = {f"$t = {t}$": signal[t] * points + noise[t] * eps for t in (0, 4, 10, 20, 40)}
alt = "Five timesteps: the flower blurs; at t = 40 a round cloud is left, its colours mixed"
plot_points(noisy, colors=hues, limits=(-2.8, 2.8), columns=5, point_size=2, alt=alt)


# %% [markdown]
# Every point keeps its colour, so you see how they mix. At $t = 40$ nothing of the flower is left,
# only Gaussian noise, and that needs no data: `torch.randn` generates it.
#
# ## Idea 2: train a network to predict the clean data
#
# The way back has to be learned. A network sees a noisy point $x_t$ and its timestep, and predicts
# the clean point $x_0$. Its inputs are turned into sines and cosines of many frequencies (*random
# Fourier features*), without which so small a network would learn only blurred shapes.

# %%
class Denoiser(nn.Module):
    def __init__(self, waves=128, width=128):
        super().__init__()
        self.register_buffer("frequencies", torch.randn(3, waves) * torch.linspace(0, 8, waves))
        self.layers = nn.Sequential(
            nn.Linear(2 * waves, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, x, t):  # t: one timestep for each point, or one for all
        time = torch.as_tensor(2 * t / T).expand(len(x))
        angles = torch.cat([x, time[:, None]], dim=1) @ self.frequencies
        return self.layers(torch.cat([angles.sin(), angles.cos()], dim=1))


print(f"{sum(p.numel() for p in Denoiser().parameters()):,} parameters")


# %% [markdown]
# For random points, timesteps and noise we minimise the squared error of the prediction $\hat x_0$:
#
# $$L = \mathbb{E}\left[\frac{\lVert \hat x_0(x_t, t) - x_0 \rVert^2}{1 - \bar\alpha_t}\right]$$
#
# Dividing by the variance of the noise makes errors count more where there is little noise: that
# is where details are decided.

# %%
def fit(points, steps=2000, batch_size=512):
    network, losses = Denoiser(), []
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in progress(range(steps), description="training"):
        x_0 = points[torch.randint(len(points), (batch_size,))]
        t = torch.randint(1, T + 1, (batch_size,))
        x_t = signal[t] * x_0 + noise[t] * torch.randn_like(x_0)
        loss = ((network(x_t, t) - x_0) ** 2 / noise[t] ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return network.requires_grad_(False), losses


# %%
network, losses = fit(points)
plot_loss(losses, alt="The loss falls steeply over the first hundred steps, then slowly")

# %% [markdown]
# The loss stays far from zero: many clean points could have led to the same $x_t$, and the best
# prediction is their mean. The points below are predictions at four timesteps, in the colours of
# the true clean points. The arrows are the vector field that the network has learned: from places
# $x_t$ they point to $\hat x_0$ (shortened), and have the colour of that point.

# %%
places = torch.cartesian_prod(*2 * [torch.linspace(-2, 2, 19)])
predictions, field = {}, {}
for t in (38, 25, 15, 4):
    title = f"$t = {t}$"
    predictions[title] = network(signal[t] * points + noise[t] * eps, t)
    x_0 = network(places, t)
    field[title] = places, x_0 - places, colours(x_0)

# %%
alt = "Predictions under less and less noise: a spot, a small disc, five lobes, the flower"
plot_points(predictions, arrows=field, colors=hues, limits=(-2.2, 2.2), point_size=1, alt=alt)


# %% [markdown]
# Under heavy noise the prediction is close to the mean of the data. The less noise there is, the
# more of the shape the network can make out.
#
# ## Idea 3: go back in small steps
#
# From pure noise, a single prediction lands in the middle. So we do not go all the way. Given
# $x_t$, the prediction $\hat x_0$ also tells which noise $\hat\epsilon$ must have been added (solve
# the formula of idea 1 for it). We mix the two again at the *next lower* noise level, where the
# network can make out a little more:
#
# $$\hat\epsilon = \frac{x_t - \sqrt{\bar\alpha_t}\,\hat x_0}{\sqrt{1-\bar\alpha_t}}, \qquad
# x_{t-1} = \sqrt{\bar\alpha_{t-1}}\,\hat x_0 + \sqrt{1-\bar\alpha_{t-1}}\,\hat\epsilon$$

# %%
@torch.no_grad()
def generate(predict, x, signal, noise):
    for t in range(len(signal) - 1, 0, -1):
        x_0 = predict(x, t)
        eps = (x - signal[t] * x_0) / noise[t]
        x = signal[t - 1] * x_0 + noise[t - 1] * eps
        yield x, x_0


# %%
x_T = torch.randn(800, 2)
path = torch.stack([x_T, *[x for x, _ in generate(network, x_T, signal, noise)]])
landed = colours(path[-1])  # each point has the colour of the place where it lands
frames = {f"$t = {t}$": path[T - t] for t in (40, 20, 12, 8, 5, 3, 1, 0)}
alt = "Eight frames: a cloud of noise draws together, forms five lobes, then a flower"
plot_points(frames, colors=landed, limits=(-2.8, 2.8), point_size=2, alt=alt)


# %% [markdown]
# Noise has become a flower. Each point has the colour of the place where it *will* land. That is
# settled in the first frame, because only $x_T$ is random: from there on, sampling is
# deterministic. Move the slider, or press play:

# %%
def frame(step):
    alt = f"The points after {step} of {T} steps, on their way from noise to the flower"
    title = f"$t = {T - step}$"
    return plot_points({title: path[step]}, colors=landed, limits=(-2.5, 2.5), alt=alt)


Explorer(frame, play="step", step=widgets.IntSlider(36, 0, T))

# %% [markdown]
# Many paths at once, from where a point starts to where it lands:

# %% tags=["cover"]
alt = "The generated flower and the curved paths of its points, which fan in from all sides"
plot_points({"": path[-1]}, paths=path[:, :400], colors=landed, limits=(-2.5, 2.5), alt=alt)

# %% [markdown]
# How many steps does it take? The same loop over every $k$-th timestep only:

# %%
samples = {}
for k in (40, 20, 8, 4, 1):
    coarse = generate(lambda x, t, k=k: network(x, k * t), x_T, signal[::k], noise[::k])
    *_, (x, x_0) = coarse  # the last step's
    samples[f"steps: {T // k}"] = x
by_place = {title: colours(x) for title, x in samples.items()}
alt = "Samples after 1, 2, 5, 10 and 40 steps: a spot in the middle grows into the flower"
plot_points(samples, colors=by_place, limits=(-2.2, 2.2), columns=5, point_size=2, alt=alt)

# %% [markdown]
# A single step gives the middle, ten come close to forty. [05](05_sampling.ipynb) gets more out of
# few steps.
#
# ## The same five lines, with images
#
# Nothing in `generate` is specific to points. Here is a network that was trained on photographs of
# flowers in the same way. It takes noisy images, the timestep and the species, and predicts the
# clean images.

# %%
flowers64 = PROFILES["flowers64"]
model, process, classes = load_pretrained(flowers64)
size = sum(p.numel() for p in model.parameters()) / 1e6
print(f"{size:.1f} M parameters, {len(classes)} species, predicts {process.prediction}")

# %% [markdown]
# It was trained with $T = 1000$ timesteps; we visit 15 of them. *Guidance* strengthens the
# influence of the species. Pixel values lie in $[-1, 1]$, so predictions are clamped to that range.

# %%
names = ["sunflower", "water lily", "hibiscus", "osteospermum"]
y = species_labels(names, classes)
guided = ClassifierFreeGuidance(model, guidance_scale=flowers64.guidance_scale)
timesteps = torch.arange(1, 16) * process.timesteps // 15 - 1
schedule = torch.cat([torch.ones(1), process.alphas_cumprod[timesteps]])


def predict_flowers(x, t):
    return guided(x, timesteps[t - 1].expand(len(x)), y).clamp(-1, 1)


# %%
images_T = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(2))
states = list(generate(predict_flowers, images_T, schedule.sqrt(), (1 - schedule).sqrt()))
alt = "Four generated flowers: " + ", ".join(names)
image_grid(states[-1][0], columns=4, scale=2, column_labels=names, alt=alt)

# %% [markdown]
# The same for the first image, step by step: above $x_t$, below the network's prediction. At first
# it is a blur, the mean of all sunflowers that are still possible; then shape appears, then detail,
# as in the plane.

# %%
chosen = [0, 5, 14]
rows = [[states[i][k][0] for i in chosen] for k in (0, 1)]
steps = [f"after step {i + 1}" for i in chosen]
alt = "Three frames of sampling: noise above, the prediction below, first a blur, then a flower"
filmstrip(rows, row_labels=["$x_t$", r"$\hat x_0$"], column_labels=steps, scale=2, alt=alt)


# %% [markdown]
# All of this in one call, by name. Try other seeds and species; an image takes about a second:

# %%
def by_name(species, seed):
    image = sample_image(species, sampler="ddim", steps=10, seed=seed)
    return image_grid(image, scale=4, alt=f"A generated {species}, seed {seed}")


species = ["sunflower", "rose", "water lily", "hibiscus", "passion flower", "osteospermum"]
Explorer(by_name, species=widgets.Dropdown(options=species), seed=widgets.IntSlider(3, 0, 99))

# %% [markdown]
# ## Where each idea is taken up
#
# | idea | here | in the series |
# |---|---|---|
# | data | `flower` | [01](01_data.ipynb): photographs, your own images, embedded flowers |
# | adding noise | `signal`, `noise` | [02](02_forward_process.ipynb): schedules, the posterior |
# | the network | `Denoiser` | [03](03_unet.ipynb): the UNet and its position embeddings |
# | the loss | `fit` | [04](04_training.ipynb): where it comes from; training on images |
# | small steps back | `generate` | [05](05_sampling.ipynb): this is DDIM; DDPM; faster samplers |
# | guidance | `guided` | [06](06_guidance.ipynb): where it comes from and what it costs |
# | how good? | by eye | [07](07_evaluation.ipynb): distances between distributions |
#
# One difference in counting: the package, like most code, counts noisy timesteps from 0, so its `t`
# is ours minus one. [test](test.ipynb) has the whole path on one page.
#
# ## Exercises
#
# Write your answers into the cells below; the next cell checks them.
#
# 1. At which timestep $t$ of the first schedule are signal and noise equally strong?
# 2. Many networks predict the noise $\epsilon$ instead. Write `x_0_from_noise`: what is $x_0$,
#    given $x_t$, $t$ and $\epsilon$?
# 3. Replace `None` by points of your own, a tensor of shape (N, 2) with coordinates between -3 and
#    3: two half moons, a spiral, your initials. The last cell then trains on them.

# %%
equally_strong_at = None


def x_0_from_noise(x_t, t, eps):
    return None


my_points = None

# %%
check("exercise 1", equally_strong_at, 20, hint="Signal and noise are equal at alpha_bar = 1/2.")
x_t = signal[25] * points + noise[25] * eps
answer = x_0_from_noise(x_t, 25, eps)
check("exercise 2", answer, points, 1e-3, hint="Solve the formula of idea 1 for the clean point.")


def fits_the_plane(p):
    return p.ndim == 2 and p.shape[1] == 2 and len(p) >= 100 and bool(p.abs().max() <= 3)


check("exercise 3", my_points, fits_the_plane, hint="At least 100 rows of 2 numbers are needed.")

# %%
if my_points is not None:
    my_network, _ = fit(my_points.float())
    *_, (generated, _) = generate(my_network, torch.randn(2000, 2), signal, noise)
    display(plot_points({"your points": my_points, "generated": generated}, limits=(-3, 3)))

# %% [markdown]
# <details><summary>Solutions</summary>
#
# 1. $\bar\alpha_t = \cos^2(\frac{\pi}{2} \frac{t}{T})$ is 1/2 where the angle is 45 degrees:
#
# ```python
# equally_strong_at = 20
# ```
#
# 2. The formula of idea 1, solved for $x_0$; `generate` solves it for the noise:
#
# ```python
# def x_0_from_noise(x_t, t, eps):
#     return (x_t - noise[t] * eps) / signal[t]
# ```
#
# 3. For instance two half moons:
#
# ```python
# angle = torch.pi * torch.rand(4000)
# upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=1)
# my_points = 1.3 * torch.cat([upper, -upper]) + 0.03 * torch.randn(8000, 2)
# ```
#
# </details>
#
# Next: [01_data](01_data.ipynb), the flowers that the series learns from.
