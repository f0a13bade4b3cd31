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
# # 11 Flow matching: straight paths
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/noisOut/noisOut/blob/main/notebooks/11_flow_matching.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/noisOut/noisOut/main?labpath=notebooks/11_flow_matching.ipynb)
#
# **What you'll do**: connect noise and data by straight lines, train a network on the velocity
# along them, and follow it from noise to flowers; then prove that you have trained a diffusion
# model, turn the one of the earlier notebooks into a flow without training, compare it with one
# that was trained as a flow from scratch, and straighten its paths.
#
# **What you'll learn**: conditional flow matching (Lipman et al. 2023) and rectified flow (Liu et
# al. 2023), behind most image generators since 2024; what it shares with diffusion, which is nearly
# everything, and what it does not; what one round of rectification costs and brings.
#
# **What you need**: notebooks 02, 04 and 05. About two minutes on two CPU cores.

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
import copy
from collections import deque

import ipywidgets as widgets
import torch
from torch import nn
from torch.testing import assert_close

from noisout_nb.checkpoints import load_model, load_pretrained, read_card
from noisout_nb.data import load_data, to_float
from noisout_nb.evaluation import factor_distance
from noisout_nb.exercises import check
from noisout_nb.figures import bars, image_grid, plot_bars, plot_lines, plot_points
from noisout_nb.flow_matching import StraightPath, flow_euler, flow_heun, flow_matching_loss
from noisout_nb.forward_process import GaussianDiffusion
from noisout_nb.losses import loss_terms
from noisout_nb.parallel import get_device
from noisout_nb.profiles import PROFILES
from noisout_nb.progress import progress
from noisout_nb.sampling import ddim
from noisout_nb.training import Batches
from noisout_nb.unet import UNet
from noisout_nb.widgets import Explorer

# %% [markdown]
# ## A straight line to every point
#
# The forward process of notebook 02 leads from data to noise along a schedule, which papers have
# argued about. Flow matching takes the straight line at constant speed:
#
# $$ x_s = (1-s)\,x_0 + s\,\epsilon, \qquad u = \frac{dx_s}{ds} = \epsilon - x_0, \qquad
# 0 \le s \le 1 . $$
#
# At $s = 0$ is the data, at $s = 1$ the noise. (Many papers count the other way.) If we knew
# the velocity at each place, we could start at noise and walk back. The trouble is that lines
# cross, and at a crossing there are two velocities. Below, three data points in one dimension and
# thirty noises: on the left the lines between random pairs; on the right points that move with the
# *mean* velocity of all lines through their place.

# %%
torch.manual_seed(0)
values = torch.tensor([-1.6, 0.2, 1.3])


def mean_velocity(x, s):
    s = torch.as_tensor(s).reshape(-1, 1)
    likelihood = -(((x[:, None] - (1 - s) * values) / s) ** 2) / 2  # of x_s, for each x_0
    mean_x_0 = likelihood.softmax(dim=1) @ values
    return (x - mean_x_0) / s[:, 0]


# %%
levels = torch.linspace(1, 0, 401)
start, end = torch.randn(30).sort().values, values[torch.randint(3, (30,))]
lines = torch.stack([(1 - s) * end + s * start for s in levels])
moved = [start]
for s, lower in zip(levels[:-1], levels[1:], strict=True):
    moved.append(moved[-1] + (lower - s) * mean_velocity(moved[-1], s))
moved = torch.stack(moved)


# %%
def crossings(paths):
    order = (paths[:, :, None] - paths[:, None, :]).sign()
    return int((order[:-2].amin(0) * order[:-2].amax(0) < 0).sum()) // 2


print("pairs of paths that cross: ", crossings(lines), "of the lines,", crossings(moved), "of ours")

# %%
palette = torch.tensor([[0.93, 0.36, 0.30], [0.95, 0.68, 0.08], [0.36, 0.30, 0.75]])


def in_time(paths):  # s and x as the two coordinates
    return torch.stack([levels[:, None].expand_as(paths), paths], dim=2)


paths = {"straight lines, $x_s$": lines, "paths of the mean velocity": moved}
reached = {name: palette[(x[-1][:, None] - values).abs().argmin(1)] for name, x in paths.items()}
plot_points(
    {name: torch.cat([in_time(x)[0], in_time(x)[-1]]) for name, x in paths.items()},
    paths={name: in_time(x) for name, x in paths.items()},
    colors={name: rgb.repeat(2, 1) for name, rgb in reached.items()},
    point_size=30,
    x_label="s",
    y_label="x",
    alt="Left: straight lines from three data points to thirty noises cross each other everywhere. "
    "Right: the paths of the mean velocity start alike and bend, and none crosses another",
)

# %% [markdown]
# Paths of a velocity field cannot cross: where two met, they would go on as one. So the lowest
# noises go to the lowest point, and the paths bend. And yet both figures are the same at every $s$,
# if we only look at *where* points are, not at which went where: whatever flows through a place on
# the left flows through it on the right.

# %%
from noisout_nb.figures import plot_histograms

x_0, eps = values[torch.randint(3, (20_000,))], torch.randn(20_000)
moving, half_way = eps.clone(), {}
for s, lower in zip(levels[:-1], levels[1:], strict=True):
    moving = moving + (lower - s) * mean_velocity(moving, s)
    if abs(lower - 0.25) < 1e-4:
        half_way = {"straight lines": 0.75 * x_0 + 0.25 * eps, "mean velocity": moving}
plot_histograms(
    half_way,
    x_label="x at s = 0.25",
    size=(720, 240),
    alt="Two histograms at s = 0.25, of points on straight lines and of points that moved with the "
    "mean velocity: three humps each, which coincide",
)

# %% [markdown]
# ## The loss: aim at a line, hit the mean
#
# The mean velocity of images is as unknown as their distribution. But we need not know it. The
# squared error against the velocity of *one* random line, the **conditional flow-matching loss**,
# splits in two, since what deviates from the mean averages to zero:
#
# $$ \begin{aligned} L(v) &= \mathbb E\,\lVert v(x_s, s) - (\epsilon - x_0)\rVert^2 \\
# &= \mathbb E\,\lVert v(x_s, s) - \bar u(x_s, s)\rVert^2 + \text{const}, \end{aligned} $$
#
# where $\bar u(x, s) = \mathbb E[\epsilon - x_0 \mid x_s = x]$ is the mean velocity.
#
# The constant does not depend on $v$, so the minimiser is $\bar u$. With four fields $v$:

# %%
s = torch.rand(200_000).clamp(min=0.01)
x_0, eps = values[torch.randint(3, (200_000,))], torch.randn(200_000)
x_s = (1 - s) * x_0 + s * eps
u = mean_velocity(x_s, s)
fields = {"the mean velocity": u, "half as fast": u / 2, "zero": 0 * u, "x itself": x_s}
print(f"{'':18} loss   distance to the mean velocity   difference")
for name, v in fields.items():
    loss, distance = (v - (eps - x_0)).square().mean(), (v - u).square().mean()
    print(f"{name:18} {loss:4.1f} {distance:16.1f} {loss - distance:27.1f}")

# %% [markdown]
# ## Learn it
#
# Now in the plane, with the flower of notebook 00 and a small network, whose output is the
# velocity. As everywhere in the series it sees an integer `t`, here one of 1,000 levels
# $s = (t+1)/T$.

# %%
path = StraightPath()
T = path.timesteps


def flower(count):
    angle, depth = 2 * torch.pi * torch.rand(count), torch.rand(count)
    petals = (0.55 + 1.25 * torch.cos(2.5 * angle).abs()) * (0.9 + 0.1 * depth)
    radius = torch.where(torch.rand(count) < 0.75, petals, 0.4 * depth.sqrt())
    return torch.stack([radius * angle.sin(), radius * angle.cos()], dim=1)


# %%
def colours(points):  # gold in the centre, from coral to violet around it
    share = (1 + torch.cos(torch.atan2(*points.T) - 1))[:, None] / 2
    in_centre = points.norm(dim=1, keepdim=True) < 0.45
    return torch.where(in_centre, palette[1], share * palette[0] + (1 - share) * palette[2])


# %%
class Velocity(nn.Module):
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

    def forward(self, x, t, y=None):
        angles = torch.cat([x, 2 * path.level(t, 2)], dim=1) @ self.frequencies
        return self.layers(torch.cat([angles.sin(), angles.cos()], dim=1))


# %% [markdown]
# Training is Algorithm 1 of notebook 04 with another line for $x_s$ and another target. The levels
# are *logit-normal*: $s = 1/(1 + e^{-z})$ with a normal $z$, so that both ends are rare. (Esser et
# al. 2024 compared dozens of choices for Stable Diffusion 3, and this one came out best.)

# %%
def my_loss(network, x_0, t, eps, y):
    s = ((t + 1) / T).view(-1, *[1] * (x_0.ndim - 1))
    x_s = (1 - s) * x_0 + s * eps
    return ((network(x_s, t, y) - (eps - x_0)) ** 2).mean()


def fit(network, draw, steps, rate, mean=0.0):
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in progress(range(steps), description="training"):
        x_0, eps, y = draw()
        t = (T * torch.sigmoid(mean + torch.randn(len(x_0)))).long().to(x_0.device)
        loss = my_loss(network, x_0, t, eps, y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


# %%
points = flower(4000)


def random_pairs():
    return points[torch.randint(len(points), (512,))], torch.randn(512, 2), None


plane = Velocity()
plane_losses = fit(plane, random_pairs, steps=1500, rate=0.01)
plot_lines(
    {"": (range(15, 1500, 30), torch.tensor(plane_losses).view(50, 30).mean(1))},
    x_label="training step",
    y_label="loss, mean of 30 steps",
    size=(720, 200),
    alt="The loss falls from 1.5 to 1.4 within a hundred steps, then stays near 1.35",
)

# %% [markdown]
# The loss stays far above zero, at the constant of the formula. The package has the same loss, and
# draws the same levels:

# %%
x_0, eps, _ = random_pairs()
t = path.draw(512)
ours, package = my_loss(plane, x_0, t, eps, None), flow_matching_loss(plane, path, x_0, t, eps)
assert_close(ours, package)
print(f"by hand {ours:.1f}, helper package {package:.1f}")
plot_histograms(
    {"logit-normal, 0 and 1": path.level(path.draw(50_000)), "uniform": torch.rand(50_000)},
    x_label="s",
    bins=40,
    size=(720, 200),
    alt="Histogram of logit-normal levels: a hump in the middle, little near 0 and 1",
)


# %% [markdown]
# ## Follow it
#
# Euler's method takes the velocity for constant during a step. That is all of sampling:

# %%
@torch.no_grad()
def my_euler(network, x, steps):
    for i in range(steps, 0, -1):
        t = torch.full((len(x),), i * T // steps - 1)
        x = x - network(x, t) / steps
    return x


noises = torch.randn(600, 2)
states = list(flow_euler(plane, path, noises, steps=40, clip=False))
assert_close(my_euler(plane, noises, 40), states[-1].x, atol=1e-4, rtol=0)
film = torch.stack([noises, *[state.x for state in states]])  # film[k]: s = 1 - k / 40
landed = colours(film[-1])
plot_points(
    {f"$s = {1 - k / 40:.2g}$": film[k] for k in (0, 20, 30, 40)},
    colors=landed,
    limits=(-2.6, 2.6),
    point_size=2,
    alt="Four frames: a cloud of noise draws together into five lobes, then a flower",
)

# %% [markdown]
# Here are both ways between noise and flower: the straight lines of training, each to a random
# point, and the learned flow. Move the slider or press play. Each point has the colour of its end.

# %%
targets = flower(600)
straight = torch.stack([torch.lerp(noises, targets, k / 40) for k in range(41)])
ways = {"straight lines": (straight, colours(targets)), "the flow": (film, landed)}


def frame(step):
    return plot_points(
        {name: positions[step] for name, (positions, _) in ways.items()},
        colors={name: rgb for name, (_, rgb) in ways.items()},
        limits=(-2.6, 2.6),
        columns=2,
        alt=f"Points at s = {1 - step / 40:.2f} between noise and flower: left on straight lines, "
        "with mixed colours; right moved by the flow, with sorted colours",
    )


Explorer(frame, play="step", step=widgets.IntSlider(26, 0, 40))

# %% [markdown]
# *Heun's method* (notebook 05) calls the network again at the end of each step, and takes the mean
# of both velocities: `flow_heun`. Where the solution is known, we can measure what it brings. For
# data from a Gaussian with mean $\mu$ and standard deviation $\varsigma$ the flow takes a noise
# $\epsilon$ to $\mu + \varsigma\,\epsilon$:

# %%
mu, spread = 0.3, 0.2


class OfGaussian(nn.Module):
    def forward(self, x, t, y=None):
        s = path.level(t, 2)
        gain = (1 - s) * spread**2 / ((1 - s) ** 2 * spread**2 + s**2)
        mean_x_0 = mu + gain * (x - (1 - s) * mu)
        return (x - mean_x_0) / s


# %%
eps, error = torch.randn(2000, 1), {}
for sampler, counts in ((flow_euler, (8, 16, 32, 64, 128)), (flow_heun, (4, 8, 16, 32, 64))):
    for n in counts:
        *_, last = sampler(OfGaussian(), path, eps, steps=n, clip=False)
        error[sampler, n] = (last.x - mu - spread * eps).square().mean().sqrt()

# %%
slopes = [(error[f, 32] / error[f, 64]).log2().item() for f in (flow_euler, flow_heun)]
print("order of Euler {:.1f}, of Heun {:.1f}".format(*slopes))
assert abs(slopes[0] - 1) < 0.2 and abs(slopes[1] - 2) < 0.2
plot_lines(
    {
        "Euler": ([n for f, n in error if f is flow_euler], list(error.values())[:5]),
        "Heun": ([2 * n - 1 for f, n in error if f is flow_heun], list(error.values())[5:]),
    },
    x_label="calls of the network",
    y_label="error (root mean square)",
    log_x=True,
    log_y=True,
    markers=True,
    size=(720, 260),
    alt="Error against calls on log axes: Heun falls twice as steeply as Euler, and is below it "
    "from 15 calls on",
)

# %% [markdown]
# ## It is a Gaussian diffusion
#
# Divide $x_s$ by $r = \sqrt{(1-s)^2 + s^2}$, and signal and noise have squares that add to one:
# this is the process of notebook 02 with $\sqrt{\bar\alpha} = (1-s)/r$. The straight line is the
# chord of the circle on which diffusion walks, and a ray from the origin joins equal noise levels
# $\sigma = s/(1-s)$. Both are the same journey; only the size of $x$ differs.

# %%
s = torch.linspace(0, 1, 11)
chord = torch.stack([1 - s, s], dim=1)
arc = chord / chord.norm(dim=1, keepdim=True)
tangent = torch.stack([-arc[:, 1], arc[:, 0]], dim=1)
direction = torch.tensor([-1.0, 1.0]).expand_as(chord)
places, steps = torch.cat([chord[:-1], arc[:-1]]), torch.cat([direction[:-1], tangent[:-1]])
hues = palette[[0, 2]].repeat_interleave(10, dim=0)
title = "$s = 0, 0.1, ..., 0.9$"
plot_points(
    {title: places},
    paths=torch.stack([0 * places, arc[:-1].repeat(2, 1)]),
    arrows={title: (places, steps, hues)},
    colors=hues,
    point_size=20,
    x_label="factor of $x_0$",
    y_label=r"factor of $\epsilon$",
    alt="A quarter of a circle and its chord. Rays join the points of equal noise level. Arrows: "
    "along the chord all in one direction, on the circle along its tangents",
)

# %% [markdown]
# The arrows are the targets. Flow matching's (red) is the direction of the chord,
# $u = \epsilon - x_0$; that of v-prediction (blue, notebook 02) is the tangent,
# $v = \sqrt{\bar\alpha}\,\epsilon - \sqrt{1 - \bar\alpha}\,x_0$. In the plane of $x_0$ and
# $\epsilon$ one is the other, turned, and $\sqrt 2$ times as long. In terms of what is known:
#
# $$ u = \frac{v}{r} + \frac{2s-1}{r^2}\,x_s . $$

# %%
process_v = path.as_diffusion("v")  # the same path as a GaussianDiffusion
x_0, eps = torch.rand(T, 3, 8, 8) * 2 - 1, torch.randn(T, 3, 8, 8)
t = torch.arange(T)
s = path.level(t, 4)
r = ((1 - s) ** 2 + s**2).sqrt()
x_s, v = path.q_sample(x_0, t, eps), process_v.predict_v(x_0, t, eps)
same_x = (x_s / r - process_v.q_sample(x_0, t, eps)).abs().max()
same_u = (v / r + (2 * s - 1) / r**2 * x_s - (eps - x_0)).abs().max()
assert same_x < 1e-5 and same_u < 1e-5
print("at all 1,000 levels, to 1e-5: x_s / r is diffusion's x_t, and u the formula of v and x_s")

# %% [markdown]
# So a network that predicts $v$, $\epsilon$ or $x_0$ also predicts the velocity. The one of the
# earlier notebooks was trained to predict $x_0$ under the cosine schedule. `AsVelocity` shows it
# $x_s / r$ and the timestep with the nearest noise level, and returns $(x_s - \hat x_0)/s$:

# %%
from noisout_nb.flow_matching import AsVelocity

profile, device = PROFILES["quick"], get_device()  # the size that `models/` has a flow for
model, process, classes = load_pretrained(profile, device)
data, held_out = load_data(profile), load_data(profile, "val")
flow = AsVelocity(model, process, path).to(device)


def noise(count, seed):
    shape = (count, *held_out.images.shape[1:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


# %% [markdown]
# The velocity is off by as much as $v$ is, divided by $r$. So the flow-matching loss is the loss of
# v-prediction with a weight of $1/r^2$, between 1 and 2, under another schedule:

# %%
x_0, y = to_float(held_out.images[:64]).to(device), held_out.labels[:64].to(device)
eps, t = noise(64, seed=1), path.draw(64, generator=torch.Generator().manual_seed(1)).to(device)
weight = 1 / ((1 - path.level(t)) ** 2 + path.level(t) ** 2)


def v_of_the_flow(x_t, t, y):
    s = path.level(t, 4)
    r = ((1 - s) ** 2 + s**2).sqrt()
    return r * flow(r * x_t, t, y) - (2 * s - 1) * x_t


with torch.no_grad():
    by_flow = flow_matching_loss(flow, path, x_0, t, eps, y)
    by_v = (weight * loss_terms(v_of_the_flow, process_v.to(device), x_0, t, eps, y)).mean()
assert_close(by_flow, by_v, atol=1e-5, rtol=0)
print(f"flow matching {by_flow:.3f}, weighted v-prediction {by_v:.3f}")

# %% [markdown]
# And the sampler? In a step from $s$ to $s'$, Euler's method goes along the line from
# $\hat\epsilon = \hat x_0 + \hat u$ to $\hat x_0$, and ends at $(1-s')\,\hat x_0 +
# s'\,\hat\epsilon$. That is DDIM's rule. Below the package's DDIM, which has never heard of flows,
# with this schedule as its process (`timestep_map` tells it which timestep the network should see),
# and Euler's method:

# %%
steps, y = 4, torch.arange(6, device=device) % len(classes)
chosen = path.as_diffusion().respace(steps)
told = flow.matched.cpu()[chosen.timestep_map]
as_diffusion = GaussianDiffusion(chosen.exact_betas, process.prediction, told).to(device)
by_ddim = list(ddim(model, as_diffusion, noise(6, 1), y, steps=steps))
by_euler = list(flow_euler(flow, path, noise(6, 1), y, steps=steps))

# %%
differences = []
for step, (a, b) in enumerate(zip(by_ddim, by_euler, strict=True), start=1):
    s = 1 - step / steps
    r = ((1 - s) ** 2 + s**2) ** 0.5
    differences.append(float((a.x - b.x / r).abs().max()))
assert max(differences) < 1e-5
print(f"after each of {len(differences)} steps DDIM and Euler agree to 1e-5 in every pixel")
image_grid(
    torch.cat([by_ddim[-1].x, by_euler[-1].x]).cpu(),
    columns=6,
    scale=2,
    row_labels=["DDIM", "Euler"],
    alt="Six flowers by DDIM and the same six by Euler's method",
)

# %% [markdown]
# So neither loss nor sampler separates the two theories. What is left are choices that both leave
# open: the output, the weight of the loss, and the noise levels that the steps visit. Here is the
# last one, for eight even steps:

# %%
by_t, by_s = process.respace(8).sigmas.cpu().flip(0), torch.arange(8, 0, -1) / 8
plot_lines(
    {
        "diffusion, evenly in t (cosine schedule)": (range(2, 9), by_t[1:]),
        "flow, evenly in s": (range(2, 9), (by_s / (1 - by_s))[1:]),
    },
    x_label="step (the first one starts from pure noise)",
    y_label=r"noise level $\sigma$",
    log_y=True,
    markers=True,
    size=(720, 240),
    alt="Noise level at the start of each of eight steps, on a log axis: both fall through 1 in "
    "the middle; the flow begins a little higher and ends lower",
)


# %% [markdown]
# ## Train it on flowers
#
# `fit` takes the UNet as it took the small network. But what should its output be? In the papers it
# is the velocity. That contains the noise, which the network would have to pass on, pixel by pixel,
# through its patches; notebook 04 shows how hard that is. So ours predicts $x_0$ again, and
# `AsVelocity` makes a velocity of it: the loss stays the same. Sixty steps of both from scratch,
# with the same initial weights, batches, noise and levels:

# %%
def flower_pairs():
    x_0, y = next(batches)
    return x_0, torch.randn_like(x_0), y


networks = {}
for output in ("the velocity", "x_0"):
    torch.manual_seed(0)
    fresh = UNet(**profile.network, num_classes=len(classes)).to(device)
    if output == "x_0":
        fresh = AsVelocity(fresh, path.as_diffusion("x0").to(device), path)
    batches = iter(Batches(data, profile.batch_size, flip=profile.flip, device=device))
    fit(fresh, flower_pairs, steps=60, rate=profile.learning_rate)
    networks[f"{output}, 60 steps"] = fresh

# %% [markdown]
# Sixty steps are a beginning. `models/quick_flow.pth` is the second network after 24,000. Since the
# straight path is a Gaussian diffusion, the `train` of notebook 04 has trained it from scratch,
# exactly as it trained the diffusion network of the earlier notebooks: the same network, batches,
# steps and learning rate, the same average of the weights. What differs:

# %%
files = {"diffusion": profile.pretrained, "flow": profile.pretrained.with_name("quick_flow.pth")}
for name, file in files.items():
    card = {"timestep_density": "uniform"} | read_card(file)
    print(f"{name}: {card['process']['schedule']} schedule, {card['timestep_density']} timesteps,")
    print(f"    weighting {card['weighting']}, limit {card['max_weight']}, {card['steps']:,} steps")

# %% [markdown]
# "flow" is the weight $1/s^2$ of $x_0$'s error, which makes it the velocity's:

# %%
network, flow_process, _ = load_model(files["flow"], device)
from_scratch = AsVelocity(network, flow_process, path).to(device)
with torch.no_grad():
    y = held_out.labels[:64].to(device)
    by_train = loss_terms(network, flow_process, x_0, t, eps, y, weighting="flow").mean()
    by_flow = flow_matching_loss(from_scratch, path, x_0, t, eps, y)
assert_close(by_train, by_flow, atol=1e-5, rtol=0)
print(f"the loss of train {by_train:.2f}, of flow matching {by_flow:.2f}")

# %%
networks |= {"x_0, 24,000 steps": from_scratch, "diffusion network": flow}
rows, three = [], torch.arange(3, device=device)
for net in list(networks.values())[:3]:
    *_, last = flow_euler(net, path, noise(3, 1), three, steps=16)
    rows.append(last.x.cpu())
image_grid(
    torch.cat(rows),
    columns=3,
    scale=2,
    row_labels=list(networks)[:3],
    alt="Three species by Euler's method. The velocity as output, 60 steps: noise, with a trace of "
    "colour. x_0 as output, 60 steps: smooth blobs in the right colours. 24,000 steps: flowers",
)

# %% [markdown]
# The error of the velocity on 256 held-out flowers, at the same levels and with the same noise:

# %%
x_0, y = to_float(held_out.images[:256]).to(device), held_out.labels[:256].to(device)
eps, t = noise(256, seed=5), path.draw(256, generator=torch.Generator().manual_seed(5)).to(device)
x_s, error = path.q_sample(x_0, t, eps), {}
with torch.no_grad():
    for name, net in networks.items():
        error[name] = (net(x_s, t, y) - (eps - x_0)).square().flatten(1).mean(1).cpu()
bars(
    {name: e.mean() for name, e in error.items()},
    errors={name: e.std() / len(e) ** 0.5 for name, e in error.items()},
    x_label="squared error of the velocity, +- one standard error",
    alt="Error of the velocity: velocity as output, 60 steps, 0.7; x_0, 60 steps, 0.4; both "
    "shipped networks below 0.05, the diffusion network's a little lower",
)

# %%
gain = error["x_0, 24,000 steps"] - error["diffusion network"]
certain = bool(gain.mean() > 3 * gain.std() / len(gain) ** 0.5)
print("the last two differ by more than 3 standard errors:", certain)

# %% [markdown]
# Sixty steps from scratch have far to go, with the velocity as output farther. After 24,000 steps
# both errors are small, and that of the diffusion network is a little lower, although the flow was
# trained for this very loss: the two training runs end up nearly equal.
#
# ## Equal work
#
# Which path is the better one to walk, and to train on? Equal noises, equal numbers of calls: DDIM
# evenly in $t$ with the diffusion network; Euler evenly in $s$ with the same network, where only
# the spacing differs; and Euler with the network that was trained as a flow. `factor_distance`
# (notebook 01) compares sizes, colours and backgrounds with those of held-out flowers; six seeds of
# 12 images. The dashed line is the distance of 12 held-out flowers.

# %%
calls, seeds = (1, 2, 4, 8, 16, 32), range(6)
labels, reference = torch.arange(12, device=device) % len(classes), to_float(held_out.images)
images, table = {}, {}


def measure(name, sampler, *networks, steps):
    found = []
    for seed in seeds:
        [last] = deque(sampler(*networks, noise(12, seed), labels, steps=steps), maxlen=1)
        images[name, steps] = last.x.clamp(-1, 1).cpu()
        found.append(factor_distance(images[name, steps], reference)["mean"])
    table[name, steps] = torch.tensor(found)


for n in calls:
    measure("diffusion, DDIM", ddim, model, process, steps=n)
    measure("diffusion, Euler", flow_euler, flow, path, steps=n)
    measure("flow, Euler", flow_euler, from_scratch, path, steps=n)


# %%
def mean_and_error(found):  # over the seeds
    return found.mean(), found.std() / len(seeds) ** 0.5


def two_of_each(k):  # held-out flowers
    chosen = [(held_out.labels == label).nonzero()[2 * k : 2 * k + 2, 0] for label in range(6)]
    return reference[torch.cat(chosen)]


real = torch.tensor([factor_distance(two_of_each(k), reference)["mean"] for k in seeds])


# %%
def plot_table(names, alt):
    curves, bands = {}, {}
    for name in names:
        known = [n for n in calls if (name, n) in table]
        means, bands[name] = zip(*[mean_and_error(table[name, n]) for n in known], strict=True)
        curves[name] = (known, torch.stack(means))
    return plot_lines(
        curves,
        bands=bands,
        x_label="calls of the network (mean of 6 seeds, +- one standard error)",
        y_label="distance to held-out",
        log_x=True,
        markers=True,
        hlines={"": real.mean()},
        alt=alt,
    )


# %%
plot_table(
    ["diffusion, DDIM", "diffusion, Euler", "flow, Euler"],
    "Distance against 1 to 32 calls of the network: three curves fall from about 0.4 and are flat "
    "from 16 calls on; the flow's begins a little lower, from 4 calls on their bands overlap",
)


# %% [markdown]
# The bands are wider than the gaps, but all samplers had the same noises, so the seeds'
# *differences* say more. Above zero, the second one of each pair is nearer to the held-out flowers:

# %%
def gaps(one, other, calls):
    names = {n: f"{n} call{'s'[: n > 1]}" for n in calls}
    return {names[n]: mean_and_error(table[one, n] - table[other, n]) for n in calls}


plot_bars(
    {
        "spacing: DDIM minus Euler, diffusion network": gaps(
            "diffusion, DDIM", "diffusion, Euler", calls
        ),
        "training: diffusion minus flow, Euler": gaps("diffusion, Euler", "flow, Euler", calls),
    },
    y_label="difference +- one SE",
    number="{:.3f}",
    alt="Spacing: 0.015, 0.008 and 0.004 at 4, 8 and 16 calls, with small errors, close to 0 else. "
    "Training: 0.03 at one call, else error bars of 0.01 to 0.02 that include zero or end near it",
)

# %% [markdown]
# From 4 to 16 calls spacing evenly in $s$ brings a little: the last step starts at a lower noise
# level (the figure above). Training on the straight path brings nothing that these seeds can show,
# except perhaps with a single call (2.4 standard errors), where the samples of both are blurred;
# and another training run of either network would add a scatter of its own. We call the two
# networks equal. So the straight path is as good to train on as the arc, and its even steps are a
# good choice where they are few. Contrary to what its name may suggest, it does not give samples in
# a single step.
#
# ## Straighten the paths
#
# One step is enough where paths are straight, and ours bend: each starts towards the mean of all
# flowers. **Rectification** (Liu et al. 2023) makes use of the freedom that is left: the loss
# wants pairs of noise and data, not independent ones. So pair each noise with the point to which
# the flow has taken it. These lines hardly cross, and a flow that is trained on them has nothing to
# average, and no reason to bend. First in the plane:

# %%
from noisout_nb.flow_matching import rectified_pairs

plane_noise = torch.randn(4000, 2)
plane_ends = rectified_pairs(plane, path, plane_noise, steps=10, clip=False, batch_size=4000)


def flow_pairs():
    picked = torch.randint(4000, (512,))
    return plane_ends[picked], plane_noise[picked], None


straighter = copy.deepcopy(plane)
again = fit(straighter, flow_pairs, steps=1000, rate=0.003)

# %% tags=["cover"]
films = {"pairs at random": straight}
for name, network in (("the flow", plane), ("rectified", straighter)):
    states = flow_euler(network, path, noises, steps=40, clip=False)
    films[name] = torch.stack([noises, *[state.x for state in states]])
plot_points(
    {name: x[-1, :150] for name, x in films.items()},
    paths={name: x[:, :150] for name, x in films.items()},
    colors={name: colours(x[-1, :150]) for name, x in films.items()},
    limits=(-2.6, 2.6),
    alt="Paths from noise to the flower. Pairs at random: straight lines that cross everywhere. "
    "The flow: sorted, but bent. Rectified: sorted and straight",
)


# %%
def bend(x):  # mean squared deviation of the velocity from that of the straight line
    velocity, chord = (x[1:] - x[:-1]) * 40, x[-1] - x[0]
    return float((velocity - chord).square().sum(-1).mean())


plot_bars(
    {
        "loss": {
            "the flow": torch.tensor(plane_losses[-200:]).mean(),
            "rectified": torch.tensor(again[-200:]).mean(),
        },
        "bend of the paths": {name: bend(films[name]) for name in ("the flow", "rectified")},
    },
    log_y=True,
    size=(720, 220),
    alt="Loss and bend of the paths on a log axis: both more than a hundred times smaller after "
    "rectification",
)

# %%
few = {}
for name, network in (("flow", plane), ("rectified", straighter)):
    for n in (1, 2, 16):
        *_, last = flow_euler(network, path, noises, steps=n, clip=False)
        few[f"{name}, {n} step{'s'[: n > 1]}"] = last.x
plot_points(
    few,
    colors={name: colours(x) for name, x in few.items()},
    limits=(-2.2, 2.2),
    point_size=2,
    columns=3,
    alt="Samples in 1, 2 and 16 steps. The flow: a spot, a disc and a sharp flower. "
    "The rectified flow: a flower from the first step on, sharp from the second",
)

# %% [markdown]
# The loss falls, because its constant was the crossings. Now the flow of the diffusion network, as
# InstaFlow (Liu et al. 2024) did with Stable Diffusion: 384 pairs, each by five steps of Heun's
# method, then 120 training steps on them. More levels than before lie near the noise, where the new
# velocity differs most from the old one.

# %%
count, heun_steps, train_steps = 384, 5, 120
pair_noise, pair_labels = noise(count, seed=100), torch.arange(count, device=device) % len(classes)
pair_ends = rectified_pairs(flow, path, pair_noise, pair_labels, steps=heun_steps)


def flower_flow_pairs():
    k = torch.randint(count, (profile.batch_size,), device=device)
    return pair_ends[k], pair_noise[k], pair_labels[k]


rectified = copy.deepcopy(flow)
fit(rectified, flower_flow_pairs, steps=train_steps, rate=1e-3, mean=1.0)
for n in (1, 2, 4, 8):
    measure("rectified, Euler", flow_euler, rectified, path, steps=n)

# %%
plot_table(
    ["diffusion, Euler", "rectified, Euler"],
    "Distance against calls: with one and two calls the rectified flow is below the flow, with "
    "four they meet, with eight it is above",
)

# %%
gap = gaps("diffusion, Euler", "rectified, Euler", (1, 2, 4, 8))
bars(
    {name: mean for name, (mean, _) in gap.items()},
    errors={name: error for name, (_, error) in gap.items()},
    x_label="distance of the flow, minus that of the rectified one, +- one standard error",
    number="{:.3f}",
    alt="How much nearer rectified samples are: 0.07 with one call, 0.03 with two, nothing with "
    "four; with eight they are 0.02 farther",
)

# %%
rows, few = ("diffusion, Euler", "rectified, Euler"), (1, 2, 8)
image_grid(
    [images[name, n][3] for name in rows for n in few],
    columns=3,
    scale=2,
    row_labels=["the flow", "rectified"],
    column_labels=[f"{n} call{'s'[: n > 1]}" for n in few],
    alt="A flower in 1, 2 and 8 calls. The flow: blurred with one call, sharp with more; "
    "rectified: clear petals from the first call on",
)

# %% [markdown]
# The same noise still leads to the same flower, but now at once. What has it cost?

# %%
batch = profile.batch_size
pair_calls, training_calls = count * (2 * heun_steps - 1), 3 * train_steps * batch
print(f"pairs: {count} x {2 * heun_steps - 1} = {pair_calls:,} calls")
print(f"training: {train_steps} x {batch} images, forward and backward = {training_calls:,} calls")
print(f"as many calls as {(pair_calls + training_calls) // 8:,} images at 8 calls each")
one = table["rectified, Euler", 1].mean()
print("rectified, 1 call, beats the flow with 2:", bool(one < table["diffusion, Euler", 2].mean()))


# %% [markdown]
# Rectified, one call is at least as good as two were, the lead is gone with four, and with eight
# the flow seems to be ahead (2.5 standard errors): more calls improve the flow, and hardly the
# rectified one, whose paths are straight already. It has learned from 384 samples of the flow,
# errors included, and for a short time. What rectification brings is the first few calls.
#
# ## What is left of the difference
#
# | | diffusion | flow matching |
# |---|---|---|
# | path | arc: squares add to 1 | chord: $(1-s)\,x_0 + s\,\epsilon$ |
# | target | $\epsilon$, $x_0$ or $v$ | $u = v/r + (2s-1)\,x_s/r^2$ |
# | loss | any weight of the noise levels | the weight $1/r^2$ of v's error |
# | sampler | DDIM, evenly in $t$ | Euler, evenly in $s$: DDIM at other levels |
# | its own | a likelihood bound, random steps | pairs of choice: rectification |
#
# ## Your turn
#
# Replace `None` and run the cell; it says whether you are right.
#
# **1. From $\hat x_0$ to the velocity.** A network predicts $\hat x_0$ from $x_s$. What velocity
# does it stand for?

# %% tags=["exercise"]
def velocity_from_x_0(x_s, x_0, s):
    return None


s = torch.tensor([0.25, 0.5, 1.0])
check(
    "exercise 1",
    velocity_from_x_0((1 - s) * 0.4 + s * 0.9, torch.tensor(0.4), s),
    torch.full((3,), 0.5),
    tolerance=1e-4,
    hint="Solve x_s = (1 - s) x_0 + s eps for eps, and subtract x_0.",
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def velocity_from_x_0(x_s, x_0, s):
#     return (x_s - x_0) / s
# ```
# </details>
#
# **2. Larger images.** In an image of twice the side, four pixels show what one did, and averaging
# them halves the noise. To hide as much as before, every noise level $\sigma = s/(1-s)$ should be
# doubled. To which level does $s = 0.5$ move?

# %% tags=["exercise"]
moved_level = None

check("exercise 2", moved_level, 2 / 3, tolerance=0.01, hint="Solve s / (1 - s) = 2 for s.")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# moved_level = 2 / 3
# ```
#
# In general $s' = \dfrac{a\,s}{1 + (a-1)\,s}$ multiplies every noise level by $a$: the *timestep
# shift* of Stable Diffusion 3 (Esser et al. 2024, eq. 23), which takes $a = 3$ at 1024 x 1024.
# </details>
#
# **3. Noise on a straight path.** "Flows are deterministic, diffusion is stochastic." But
# `as_diffusion`, made above, is the straight path as a process, and any sampler takes it. Sample
# six flowers with `ddpm` in its four steps, from `noise(6, 1)`, with the labels `labels[:6]`.

# %% tags=["exercise"]
stochastic = None

check(
    "exercise 3",
    stochastic,
    lambda x: (
        x.shape == by_ddim[-1].x.shape
        and (x - by_ddim[-1].x).abs().max() > 0.05
        and (x - by_ddim[-1].x).abs().mean() < 0.5
    ),
    hint="from noisout_nb.sampling import ddpm; then *_, last = ddpm(model, as_diffusion, ...)",
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# from noisout_nb.sampling import ddpm
#
# *_, last = ddpm(model, as_diffusion, noise(6, 1), labels[:6], steps=4)
# stochastic = last.x
# image_grid(stochastic.cpu(), columns=6)
# ```
#
# The same call, made twice, gives different flowers: random steps belong to the sampler, not to the
# path.
# </details>
#
# This is the last stage. [test](test.ipynb) has the whole way, from data to samples, on one page.
