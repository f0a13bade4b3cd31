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
# # 10 Edit an image
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/noisOut/noisOut/blob/main/notebooks/10_editing.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/noisOut/noisOut/main?labpath=notebooks/10_editing.ipynb)
#
# **What you'll do**: change an image with a network that was only ever trained to generate images:
# fill a hole, turn a rose into a sunflower, and do the same with an image of your own.
#
# **What you'll learn**: inpainting by replacement, and why it fits badly; RePaint (Lugmayr et al.
# 2022); SDEdit (Meng et al. 2022); and DDIM run backwards, which finds the noise of an image (Song
# et al. 2021). None of them needs training, and none a new sampler.
#
# **What you need**: notebooks 05 and 06. About a minute on two CPU cores, with the weights in
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
from torchvision.transforms.functional import pil_to_tensor

from noisout_nb.checkpoints import load_model, load_pretrained
from noisout_nb.data import load_data, resize_and_crop, species_labels, to_float, to_uint8
from noisout_nb.decoding import read_image
from noisout_nb.editing import Inpainting, first_timesteps, invert, repaint, sdedit
from noisout_nb.exercises import check
from noisout_nb.figures import bars, filmstrip, image_grid, plot_histograms, plot_lines, stack
from noisout_nb.forward_process import GaussianDiffusion
from noisout_nb.guidance import ClassifierFreeGuidance
from noisout_nb.parallel import get_device
from noisout_nb.profiles import PROFILES, get_profile
from noisout_nb.sampling import ddim, ddpm, dpm_solver
from noisout_nb.widgets import Again, Explorer

# %% [markdown]
# As in notebook 05: a small network to measure with, and the one that was trained on photographs,
# with guidance, for the images.

# %%
torch.manual_seed(0)
profile, device = get_profile(), get_device()
model, process, classes = load_pretrained(profile, device)
network, photo_process, species = load_model(PROFILES["flowers64"].published, device)
flowers = ClassifierFreeGuidance(network, 3.0, process=photo_process, interval=(0.3, 8.0))


def start(count, seed, size=64):
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return noise.to(device)


def seeded(seed):
    return torch.Generator(device).manual_seed(seed)


# %% [markdown]
# ## One flower, three edits
#
# Generated flowers stand in for photographs. From left to right: the image; its centre painted
# anew; the image as another species, by way of noise (SDEdit); and by way of *its own* noise, which
# inversion finds.

# %%
names, new_names = ["rose", "sunflower", "water lily"], ["sunflower", "osteospermum", "rose"]
y, new_y = (species_labels(n, species).to(device) for n in (names, new_names))
*_, last = dpm_solver(flowers, photo_process, start(4, 2)[[0, 1, 3]], y, steps=12, spacing="karras")
images = last.x
at = torch.arange(64, device=device) - 31.5
disc = at[:, None] ** 2 + at**2 < 14**2

# %% tags=["cover"]
around = Inpainting(flowers, photo_process, images, disc)
options = {"steps": 12, "repeats": 3, "generator": seeded(1)}
*_, filled = repaint(around, photo_process, start(3, 7), y, **options)
options = {"strength": 0.9, "steps": 14, "generator": seeded(0)}
changed = sdedit(flowers, photo_process, images, new_y, **options)
*_, inverted = invert(network, photo_process, images, y, steps=10, iterations=3)
*_, moved = ddim(flowers, photo_process, inverted.x, new_y, steps=10, spacing="karras")
pairs = [f"{a}\nto {b}" for a, b in zip(names, new_names, strict=True)]
columns = {"image": images, "centre anew": filled.x, "SDEdit": changed, "inversion": moved.x}
filmstrip(
    list(torch.stack(list(columns.values()), 1).cpu()),
    row_labels=pairs,
    column_labels=list(columns),
    scale=2,
    alt="A rose, a sunflower and a water lily; with new centres, which fit; and as a sunflower, an "
    "osteospermum and a rose in about the same place, by SDEdit and by inversion",
)

# %% [markdown]
# ## A hole, and what is known around it
#
# Half of each flower below is hidden. The network generates whole flowers. How can it generate one
# whose other half we know?

# %%
held_out = load_data(profile, "val")
whole, labels = to_float(held_out.images[:16]).to(device), held_out.labels[:16].to(device)
half = (torch.arange(32, device=device) >= 16).expand(32, 32)  # True is painted anew
hidden = torch.where(half, torch.zeros_like(whole), whole)
image_grid(
    torch.cat([whole[:6], hidden[:6]]).cpu(),
    columns=6,
    scale=3,
    row_labels=["whole", "hidden"],
    alt="Six embedded flowers, and below them their left halves, with grey on the right",
)


# %% [markdown]
# Each step of Algorithm 2 asks the network for $\hat x_0$ and draws $x_{t-1}$ from
# $q(x_{t-1} \mid x_t, \hat x_0)$. In the known half we need not ask: we have $x_0$. With a mask $m$
# that is 1 where we paint,
#
# $$ \hat x_0 \leftarrow m\,\hat x_0 + (1 - m)\,x_0 . $$
#
# Then the known half of $x_t$ is at every $t$ what the forward process would have made of it, a
# sample of $q(x_t \mid x_0)$, and $x_0$ itself at the end. The network sees both halves at the
# same noise level, as in training. This is *replacement*: one line more in the loop.

# %%
@torch.no_grad()
def my_inpainting(process, x, y, known, mask, generator):
    for i in reversed(range(process.timesteps)):
        t = torch.full((len(x),), i, device=device)
        x_start = process.predict_start(x, t, model(x, process.timestep_map[t], y)).clamp(-1, 1)
        x_start = torch.where(mask, x_start, known)  # the new line
        mean, variance = process.q_posterior_mean_variance(x_start, x, t)
        noise = torch.randn(x.shape, generator=generator, device=device) if i > 0 else 0
        x = mean + variance.sqrt() * noise
    return x


# %% [markdown]
# Since only the prediction changes, the package has this as a wrapper around the model, as guidance
# is one. Any sampler takes it, unchanged:

# %%
x_T = start(16, 1, 32)
mine = my_inpainting(process.respace(10), x_T[:2], labels[:2], whole[:2], half, seeded(2))
known = Inpainting(model, process, whole, half)
first_two = Inpainting(model, process, whole[:2], half)
*_, last = ddpm(first_two, process, x_T[:2], labels[:2], steps=10, generator=seeded(2))
assert_close(mine, last.x, atol=1e-3, rtol=0)
print("largest difference of a pixel:", f"{(mine - last.x).abs().max():.2f}")

# %%
*_, replaced = ddim(known, process, x_T, labels, steps=20)
off = (to_uint8(replaced.x).int() - to_uint8(whole).int())[..., ~half].abs().max()
print("known half: largest difference", int(off), "grey levels")
image_grid(
    replaced.x[:6].cpu(),
    columns=6,
    scale=3,
    row_labels=["replacement"],
    alt="Left halves of six flowers, completed by replacement: the species is right, but some of "
    "the right halves are larger or darker than the left ones, or on another green",
)


# %% [markdown]
# The known half is exact. But look closely: the new half is half a flower of that species, though
# not always the other half of *this* one. It is larger, or darker, or on another green. We measure
# two things: the *seam*, the mean difference of neighbouring pixels across the border, relative to
# whole flowers; and the error of the new half, since for these flowers one half nearly determines
# the other.

# %%
def seam(images, mask):
    """Mean difference across the mask's border, one number per image."""
    steps = [images.diff(dim=axis).abs().mean(1)[:, mask.diff(dim=axis - 2)] for axis in (2, 3)]
    return torch.cat(steps, dim=1).mean(1)


def measure(painted):
    """Seam and error of each image."""
    error = (painted - whole)[..., half].square().mean((1, 2)).sqrt()
    return seam(painted, half) / seam(whole, half).mean(), error


pasted = torch.where(half, whole.roll(1, 0), whole)  # halves of two different flowers
measured = {"halves of two flowers": measure(pasted), "replacement": measure(replaced.x)}


# %%
def mean_and_error(which, x_label, names):
    values = {name: measured[name][which] for name in names}
    return bars(
        {name: value.mean() for name, value in values.items()},
        errors={name: value.std() / len(value) ** 0.5 for name, value in values.items()},
        x_label=f"{x_label} (mean of 16 flowers, ± standard error)",
        number="{:.2f}",
        alt=f"Bars of the {x_label} of {', '.join(names)}, the largest first",
    )


mean_and_error(0, "seam, 1 for whole flowers", list(measured))

# %% [markdown]
# There is hardly a seam: the network sees both sides, and paints edges that meet. What is wrong is
# the flower as a whole.
#
# ## Why replacement does not fit
#
# Let images be two pixels, Gaussian, with standard deviation $s$ and correlation $\rho$. If the
# left pixel is $a$, the right one is Gaussian with mean $\rho a$ and standard deviation
# $s\sqrt{1-\rho^2}$. The best prediction of both is known, too, with $\Sigma$ their covariance:
# $\mathbb E[x_0 \mid x_t] = \sqrt{\bar\alpha}\,\Sigma\,(\bar\alpha\Sigma + (1-\bar\alpha) I)^{-1}
# x_t$. So every error below is the method's.

# %%
s, rho, a = 0.25, 0.9, 0.4
covariance = s**2 * torch.tensor([[1, rho], [rho, 1]])
toy = GaussianDiffusion.from_config("cosine", prediction="x0")


class Pair(torch.nn.Module):
    def forward(self, x, t, y=None):
        alpha_bar = toy.alphas_cumprod[t[0]]
        joint = alpha_bar * covariance + (1 - alpha_bar) * torch.eye(2)
        gain = alpha_bar.sqrt() * covariance @ torch.linalg.inv(joint)
        return (x.flatten(1) @ gain.T).view(x.shape)


# %%
pair = torch.tensor([a, 0.0]).view(1, 1, 1, 2)
left_known = Inpainting(Pair(), toy, pair, torch.tensor([[False, True]]))
noise = torch.randn(3000, 1, 1, 2, generator=torch.Generator().manual_seed(3))
*_, last = ddpm(left_known, toy, noise, steps=50, generator=torch.Generator().manual_seed(4))
right = {"replacement": last.x[..., 1]}
print(f"mean of the right pixel: {right['replacement'].mean():.2f}, exact {rho * a:.2f}")


# %% [markdown]
# The right pixel comes out as if it knew the left one only dimly, and that is how it is. At high
# noise levels, where much of the right pixel is decided, the network sees a *noisy* left pixel.
# Later it sees the left one clearly, but the right one has gone too far to follow. Smaller steps
# hardly help, since they see the same noise: 250 of them give 0.25.
#
# ## RePaint: step back, and try again
#
# After a step from $t$ to $t-1$, add the step's noise again, $x_t \sim q(x_t \mid x_{t-1})$, and
# repeat. The pixels' noise is new, what they have agreed upon remains, and with each repetition
# they agree more. Many repetitions at one $t$ are a random walk (Langevin's). Its stationary
# distribution is close to that of the unknown pixels given the known ones *at that noise level*
# (not equal, since the known pixels' noise is new each time, too); towards the low levels it
# becomes the exact one.

# %%
@torch.no_grad()
def my_repaint(model, process, x, y, repeats, generator):
    for i in reversed(range(process.timesteps)):
        t = torch.full((len(x),), i)
        for again in reversed(range(repeats if i > 0 else 1)):
            x_start = model(x, process.timestep_map[t], y).clamp(-1, 1)
            mean, variance = process.q_posterior_mean_variance(x_start, x, t)
            x = mean + variance.sqrt() * torch.randn(x.shape, generator=generator)
            if again:  # one step of the forward process
                fresh = torch.randn(x.shape, generator=generator)
                x = process.alphas[i].sqrt() * x + process.betas[i].sqrt() * fresh
    return x


# %%
generators = [torch.Generator().manual_seed(5) for _ in range(2)]
mine = my_repaint(left_known, toy.respace(10), noise, None, 3, generators[0])
*_, last = repaint(left_known, toy, noise, steps=10, repeats=3, generator=generators[1])
assert_close(mine, last.x, atol=1e-3, rtol=0)
print("largest difference of a pixel:", f"{(mine - last.x).abs().max():.2f}")

# %%
for repeats in (5, 20):
    generator = torch.Generator().manual_seed(4)
    *_, last = repaint(left_known, toy, noise, steps=50, repeats=repeats, generator=generator)
    right[f"RePaint, {repeats} repeats"] = last.x[..., 1]
axis = torch.linspace(-0.2, 0.8, 200)
exact = torch.distributions.Normal(rho * a, s * (1 - rho**2) ** 0.5)
plot_histograms(
    right,
    x_label="right pixel",
    curves={"exact": (axis, exact.log_prob(axis).exp())},
    alt="Histograms of the right pixel: replacement lies too far to the left and is too wide; "
    "RePaint with 5 and with 20 repeats lies close to the exact density",
)

# %%
for name, values in right.items():
    print(f"{name:>19}: mean {values.mean():.2f}, exact {rho * a:.2f}")

# %% [markdown]
# Two approximations remain: steps of finite size, and DDPM's fixed variance, which is too small
# where the prediction is uncertain. (With 120 steps, 15 repeats and the exact variance, mean and
# spread come within a few per cent of the exact ones; the package's tests check it.) On the
# flowers:

# %%
for repeats in (1, 2, 4):
    options = {"steps": 15, "repeats": repeats, "generator": seeded(3)}
    *_, repainted = repaint(known, process, x_T, labels, **options)
    measured[f"RePaint, {repeats} x"] = measure(repainted.x)
assert 0.7 < measured["RePaint, 4 x"][0].mean() < 1.3  # a seam like a whole flower's
assert measured["RePaint, 4 x"][1].mean() < measured["replacement"][1].mean()
names_of = [name for name in measured if name != "halves of two flowers"]
stack(
    mean_and_error(0, "seam, 1 for whole flowers", names_of),
    mean_and_error(1, "error of the new half", names_of),
    alt="Bars of seam and error: RePaint's seam is the closer to 1, and its error falls with the "
    "repeats, to little more than half of replacement's",
)

# %%
image_grid(
    torch.cat([replaced.x[:4], repainted.x[:4], whole[:4]]).cpu(),
    columns=4,
    scale=3,
    row_labels=["replacement", "RePaint", "whole"],
    alt="Four half flowers completed: by replacement some do not match; by RePaint size and colour "
    "are nearly those of the whole flowers",
)

# %% [markdown]
# One repeat is DDPM with replacement. Its fresh noise in each step already lets the halves move
# towards each other, while DDIM keeps the noise that it started from. (Some error must remain: half
# a flower does not say all about the other half.) The price is `repeats` times as many calls. With
# the network for photographs:

# %%
hole = torch.where(disc, torch.zeros_like(images), images)
*_, plain = ddim(around, photo_process, start(3, 7), y, steps=12)
columns = {"known": hole, "replacement": plain.x, "RePaint": filled.x}
filmstrip(
    list(torch.stack(list(columns.values()), 1).cpu())[::2],
    row_labels=names[::2],
    column_labels=list(columns),
    scale=3,
    alt="A rose and a water lily with a round hole in the centre, which is filled by replacement "
    "and by RePaint",
)

# %% [markdown]
# ## Your image
#
# Write the name of an image file between the quotation marks, and the sliders below edit that one.
# The network has only seen flowers, so take a flower, in the middle.

# %%
file = ""

own = images[:1]
if file:
    own = to_float(resize_and_crop(pil_to_tensor(read_image(file)), 64))[None].to(device)


# %% [markdown]
# Choose a mask, move it, and choose what grows there:

# %%
def masked(shape, x, y, size):
    down, across = (at[:, None] - y).abs(), (at - x).abs()
    if shape == "disc":
        return down**2 + across**2 < size**2
    if shape == "square":
        return (down < size) & (across < size)
    if shape == "right of x":
        return (at > x).expand(64, 64)
    return down**2 + across**2 >= size**2  # all but the disc


# %%
def paint(shape, x, y, size, species_there, noise):
    mask = masked(shape, x, y, size)
    model = Inpainting(flowers, photo_process, own, mask)
    label = species_labels(species_there, species).to(device)
    options = {"steps": 10, "repeats": 2, "generator": seeded(noise)}
    states = repaint(model, photo_process, start(1, noise), label, **options)
    for done, last in enumerate(states, 1):  # noqa: B007
        yield done / 19
    seen = torch.where(mask, torch.zeros_like(own), own)
    yield image_grid(
        torch.cat([seen, last.x]).cpu(),
        scale=3,
        column_labels=["known", f"as a {species_there}"],
        alt=f"Left the image with a hole ({shape}), right the hole filled as a {species_there}",
    )


# %%
some = ["rose", "sunflower", "hibiscus", "passion flower", "osteospermum", "water lily"]
Explorer(
    paint,
    shape=widgets.Dropdown(options=["disc", "square", "right of x", "all but a disc"]),
    x=widgets.IntSlider(0, -32, 32, continuous_update=False),
    y=widgets.IntSlider(0, -32, 32, continuous_update=False),
    size=widgets.IntSlider(26, 4, 32, continuous_update=False),
    species_there=widgets.Dropdown(options=some, value="sunflower", description="species"),
    noise=Again("new noise"),
)


# %% [markdown]
# ## SDEdit: as much noise as the change needs
#
# No mask now. Add noise up to a timestep of our choice, and sample back from there, as another
# species. Noise hides details before it hides place and colour, so the timestep decides what
# remains. The *strength* is that timestep divided by $T$: 0 leaves the image alone, 1 forgets it.

# %%
def my_sdedit(x_0, y, strength, steps, generator):
    count = round(strength * process.timesteps)
    t = torch.full((len(x_0),), count - 1, device=device)
    noise = torch.randn(x_0.shape, generator=generator, device=device)
    x_t = process.q_sample(x_0, t, noise)
    *_, last = ddim(model, first_timesteps(process, count), x_t, y, steps=steps)
    return last.x


# %%
wanted = (labels[:4] + 1) % len(classes)
mine = my_sdedit(whole[:4], wanted, 0.5, 10, seeded(6))
found = sdedit(model, process, whole[:4], wanted, strength=0.5, steps=20, generator=seeded(6))
assert_close(mine, found, atol=1e-3, rtol=0)
print("largest difference of a pixel:", f"{(mine - found).abs().max():.2f}")

# %% [markdown]
# `first_timesteps` is the process below the chosen timestep, so the samplers stay as they are. Each
# flower below becomes the next species of the list:

# %%
rows = {"0": whole[:4]}
for strength in (0.3, 0.6, 0.9):
    options = {"strength": strength, "generator": seeded(6)}
    rows[f"{strength}"] = sdedit(model, process, whole[:4], wanted, **options)
image_grid(
    torch.cat(list(rows.values())).cpu(),
    columns=4,
    scale=3,
    row_labels=[f"strength {name}" for name in rows],
    column_labels=[f"to {classes[label]}" for label in wanted],
    alt="Four flowers at growing strength: at 0.3 they keep their petals and change colour, at 0.6 "
    "they are mixtures in the old place and size, at 0.9 they are of the other species",
)

# %%
kept = {}
for strength in (0.1, 0.3, 0.5, 0.7, 0.9):
    options = {"strength": strength, "steps": 10, "generator": seeded(7)}
    for name, y_there in (("same species", labels), ("another", (labels + 1) % len(classes))):
        edited = sdedit(model, process, whole, y_there, **options)
        kept.setdefault(name, []).append((edited - whole).square().mean().sqrt().item())
plot_lines(
    {name: ([0.1, 0.3, 0.5, 0.7, 0.9], values) for name, values in kept.items()},
    x_label="strength",
    y_label="change (root mean square)",
    markers=True,
    size=(720, 260),
    alt="Change of a pixel against strength: both curves rise; towards another species the change "
    "is larger throughout",
)


# %% [markdown]
# Move the strength. From about 0.8 on, an image changes its species and keeps its composition:

# %%
def edit(strength, species_there, noise):
    label = species_labels(species_there, species).to(device)
    options = {"strength": strength, "steps": 14, "generator": seeded(noise)}
    edited = sdedit(flowers, photo_process, own, label, **options)
    return image_grid(
        torch.cat([own, edited]).cpu(),
        scale=3,
        column_labels=["image", f"{species_there}, strength {strength:.2f}"],
        alt=f"Left the image, right the same as a {species_there} at strength {strength:.2f}",
    )


# %%
Explorer(
    edit,
    strength=widgets.FloatSlider(0.9, min=0, max=1, step=0.05, continuous_update=False),
    species_there=widgets.Dropdown(options=some, value="sunflower", description="species"),
    noise=Again("new noise"),
)


# %% [markdown]
# ## Inversion: the noise that an image came from
#
# SDEdit's noise is any noise. DDIM maps each noise to one image, so an image has a noise of its
# own, and DDIM from there leads back to it. Its step is Euler's on an ODE (notebook 05),
# $\bar x' = \bar x + (\sigma' - \sigma)\,\hat\epsilon$, and an ODE runs both ways. Upwards, from
# $\sigma'$ to $\sigma$:
#
# $$ \bar x = \bar x' + (\sigma - \sigma')\,\hat\epsilon(\bar x, \sigma) . $$
#
# There is one snag: $\hat\epsilon$ is needed at $\bar x$, which we are about to compute. Take it at
# $\bar x'$ instead: with small steps the two are close. Or put the result in again, and again: a
# *fixed-point iteration*, whose limit inverts DDIM's step exactly (Pan et al. 2023).

# %%
@torch.no_grad()
def my_inversion(process, x, y, iterations):
    lower = 0.0
    x_bar = x
    for i, sigma in enumerate(process.sigmas):
        t = torch.full((len(x),), i, device=device)
        for _ in range(iterations):
            x_start = model(x, process.timestep_map[t], y).clamp(-1, 1)
            noise = process.predict_noise_from_start(x, t, x_start)
            x = process.sqrt_alphas_cumprod[i] * (x_bar + (sigma - lower) * noise)
        x_bar, lower = x / process.sqrt_alphas_cumprod[i], sigma
    return x


# %%
mine = my_inversion(process.respace(10, "karras"), whole[:2], labels[:2], 2)
*_, last = invert(model, process, whole[:2], labels[:2], steps=10, iterations=2)
assert_close(mine, last.x, atol=2e-3, rtol=0)
print("largest difference of a pixel:", f"{(mine - last.x).abs().max():.2f}")

# %% [markdown]
# How well does the way up and down again reconstruct an image? More steps help, and a second and
# third call at each of them help far more:

# %%
errors = {}
for iterations in (1, 3):
    for steps in (6, 12, 24):
        options = {"steps": steps, "iterations": iterations}
        *_, top = invert(model, process, whole[:2], labels[:2], **options)
        *_, back = ddim(model, process, top.x, labels[:2], steps=steps, spacing="karras")
        error = (back.x - whole[:2]).square().mean().sqrt().item()
        errors.setdefault(f"{iterations} call{'s'[: iterations > 1]} per step", []).append(error)
one, three = errors.values()
assert one[2] < one[0] and three[1] < one[1] / 2
plot_lines(
    {name: ([6, 12, 24], values) for name, values in errors.items()},
    x_label="steps",
    y_label="reconstruction error (rms)",
    log_y=True,
    markers=True,
    size=(720, 260),
    alt="Reconstruction error against steps: with one call per step it falls slowly, with three it "
    "lies far below",
)

# %% [markdown]
# ## This rose as a sunflower
#
# Now go up with the flower's own label, and down with the new one. The label decides the species,
# and the noise, which is the image's own, much of the rest: place, pose, light, often the
# background. No guidance on the way up, where it would distort the path; with guidance on the way
# down.

# %%
*_, same = ddim(network, photo_process, inverted.x, y, steps=10, spacing="karras")
columns = {"rose": images, "its noise": inverted.x, "and back": same.x, "as a sunflower": moved.x}
image_grid(
    torch.stack([column[0] for column in columns.values()]).cpu(),
    scale=3,
    columns=4,
    column_labels=list(columns),
    alt="A rose, the noise that inversion found for it, the same rose from that noise, and from "
    "the same noise a sunflower in the rose's place",
)

# %% [markdown]
# (The other two are at the top of this page.) Its noise is not quite noise: where an image is
# smooth or saturated, little of it can be recovered. So such edits come out somewhat smoother than
# samples, but they keep more than SDEdit does.
#
# | | keeps | needs |
# |---|---|---|
# | replacement, RePaint | all outside the mask, exactly | a mask |
# | SDEdit | what noise of that strength leaves: place, large colours | a strength |
# | inversion | what the label does not decide | the image's own label; 3 or more calls per step |
#
# They combine, since `Inpainting` is a model like any other: `sdedit(Inpainting(...), ...)` changes
# a flower by degrees and leaves its background as it is.

# %%
centre = at[:, None] ** 2 + at**2 < 27**2
sunflower = images[1:2]
in_the_centre = Inpainting(flowers, photo_process, sunflower, centre)
options = {"strength": 0.9, "steps": 12, "generator": seeded(2)}
background_kept = sdedit(in_the_centre, photo_process, sunflower, new_y[1:2], **options)
image_grid(
    torch.cat([sunflower, background_kept]).cpu(),
    scale=3,
    column_labels=[names[1], new_names[1]],
    alt="A sunflower, and an osteospermum in its place on the same background",
)

# %% [markdown]
# ## Your turn
#
# Replace `None` or `...` and run the cell; it says whether you are right.
#
# **1. The price.** How many calls of the network does `repaint` make with 20 steps and 5 repeats?

# %% tags=["exercise"]
calls = None

check("exercise 1", calls, 19 * 5 + 1, hint="The last step adds no noise, so it is taken once.")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# calls = 19 * 5 + 1
# ```
# </details>
#
# **2. Half image, half noise.** At which strength does SDEdit's `x_t` hold as much noise as image,
# $\sigma = 1$?

# %% tags=["exercise"]
strength = None

equal = int((process.sigmas < 1).sum()) / process.timesteps
check("exercise 2", strength, equal, tolerance=0.01, hint="process.sigmas; it rises with t.")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# strength = float((process.sigmas < 1).float().mean())
# ```
#
# About a half: below it an edit changes details, above it the flower.
# </details>
#
# **3. Between two images.** Notebook 05 walked along an arc from one noise to another. Now that
# images have noises, walk from `whole[0]` to `whole[1]`: invert both with 20 steps and 3
# iterations, take five points of the arc, and sample with the label of each end where it is nearer.

# %% tags=["exercise"]
walk = None


def ends_are_the_images(walk):
    ends = walk[[0, -1]] - whole[:2]
    return len(walk) == 5 and ends.square().mean().sqrt() < 0.1


check("exercise 3", walk, ends_are_the_images, hint="invert, slerp of notebook 05, ddim.")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# *_, top = invert(model, process, whole[:2], labels[:2], steps=20, iterations=3)
# a, b = top.x
# angle = torch.acos(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))
# w = torch.linspace(0, 1, 5, device=device).view(-1, 1, 1, 1)
# arc = (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)
# y_walk = labels[[0, 0, 0, 1, 1]]
# *_, last = ddim(model, process, arc, y_walk, steps=20, spacing="karras")
# walk = last.x
# image_grid(walk.cpu(), columns=5, scale=4)
# ```
# </details>
#
# Next: [11_flow_matching](11_flow_matching.ipynb) takes the straight path from noise to flowers.
