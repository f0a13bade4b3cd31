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
# # 06 Guidance
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/noisOut/noisOut/blob/main/notebooks/06_guidance.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/noisOut/noisOut/main?labpath=notebooks/06_guidance.ipynb)
#
# **What you'll do**: ask for a species and get it, with a classifier that has seen noisy images,
# and without one.
#
# **What you'll learn**: how Bayes' rule becomes a sum of scores; classifier guidance (Dhariwal &
# Nichol 2021), classifier-free guidance (Ho & Salimans 2022), guidance in an interval of noise
# levels (Kynkäänniemi et al. 2024) and autoguidance (Karras et al. 2024); and what guidance costs
# in diversity.
#
# **What you need**: notebooks 02 to 05. One to two minutes on two CPU cores, with the weights in
# `models/`.

# %%
import sys

if "google.colab" in sys.modules:  # there a notebook comes alone: fetch what it imports, once
    import subprocess

    subprocess.run(
        "test -d noisOut || git clone -q --depth 1 https://github.com/noisOut/noisOut noisOut",
        shell=True,
        check=True,
    )
    sys.path.insert(0, "noisOut")

# %%
import copy
import time

import ipywidgets as widgets
import numpy as np
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from noisout_nb.checkpoints import load_model, load_pretrained
from noisout_nb.data import load_data, species_labels, to_float
from noisout_nb.exercises import check
from noisout_nb.figures import bars, filmstrip, image_grid, plot_lines, plot_points
from noisout_nb.forward_process import GaussianDiffusion
from noisout_nb.guidance import (
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    NoisyClassifier,
)
from noisout_nb.losses import discretized_gaussian_log_likelihood
from noisout_nb.parallel import get_device, memory_format
from noisout_nb.profiles import PROFILES, get_profile
from noisout_nb.sampling import dpm_solver
from noisout_nb.training import EMA, Batches, simple_loss, train, variational_bound_term
from noisout_nb.unet import ResBlock, UNet
from noisout_nb.widgets import Again, Explorer

# %%
torch.manual_seed(0)
profile, device = get_profile(), get_device()
model, process, classes = load_pretrained(profile, device)
photo_network, photo_process, species = load_model(PROFILES["flowers64"].published, device)
data, held_out = load_data(profile), load_data(profile, "val")
shape = (3, profile.image_size, profile.image_size)
photo_shape = (3, photo_network.config["image_size"], photo_network.config["image_size"])


def start(count, seed, shape=photo_shape):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).to(device)


# %% [markdown]
# ## One knob
#
# The network that was trained on photographs is told the species, and so its samples should be of
# that species. `guidance_scale` says how much that counts: 0 not at all, 1 as much as the network
# has learned, above 1 more than that. Each column starts from the same noise:

# %% tags=["cover"]
names = ["sunflower", "rose", "passion flower"]
scales = [0.0, 1.0, 3.0, 8.0]


def sampled(wrapper, x_T, y, process=photo_process, steps=10):
    *_, last = dpm_solver(wrapper, process, x_T, y, steps=steps)
    return last.x.cpu()


y = species_labels(names, species).repeat(4).to(device)
scale = torch.tensor(scales, device=device).repeat_interleave(3)
knob = sampled(ClassifierFreeGuidance(photo_network, scale), start(3, 5).repeat(4, 1, 1, 1), y)
image_grid(
    knob,
    columns=3,
    scale=2,
    row_labels=[f"scale {s:g}" for s in scales],
    column_labels=names,
    alt="Three species at guidance scale 0, 1, 3 and 8: at 0 flowers of any kind, at 1 and 3 more "
    "and more clearly the species asked for, at 8 oversaturated",
)

# %% [markdown]
# ## Bayes' rule for scores
#
# Recall notebook 05: at noise level $\sigma$ the score, the direction in which a noisy image
# $\bar x = x_0 + \sigma\epsilon$ becomes more probable, follows from the predicted $\hat x_0$. For
# one clean image, $p(\bar x \mid x_0)$ is a Gaussian around $x_0$, and
# $\nabla \log p(\bar x \mid x_0) = (x_0 - \bar x)/\sigma^2$. Averaged over all $x_0$ that $\bar x$
# may have come from, that is
#
# $$ \nabla \log p(\bar x) = \frac{\mathbb E[x_0 \mid \bar x] - \bar x}{\sigma^2}. $$
#
# We want the score of images *of one species*. Bayes' rule, $p(\bar x \mid y) \propto p(\bar
# x)\,p(y \mid \bar x)$, becomes a sum under logarithm and gradient, and a factor $s$, the guidance
# scale, makes the condition count for more:
#
# $$ \nabla \log p_s(\bar x \mid y) = \nabla \log p(\bar x) + s\,\nabla \log p(y \mid \bar x). $$
#
# - **Classifier guidance** takes the last gradient from a classifier of noisy images.
# - **Classifier-free guidance** gets it from the network itself:
#   $\nabla \log p(y \mid \bar x) = \nabla \log p(\bar x \mid y) - \nabla \log p(\bar x)$, the
#   difference of its predictions with and without label.
#
# ## In the plane
#
# In two dimensions everything can be seen. The data has two species, each of three blobs; the best
# prediction for such data is known in closed form, the blobs' predictions weighted by how probable
# each blob is.

# %%
CENTRES = torch.tensor(
    [[[-0.7, 0.5], [0.0, 0.6], [0.4, 0.0]], [[-0.4, 0.1], [0.7, 0.5], [0.3, -0.6]]]
)


# %%
class Blobs(torch.nn.Module):
    """The best prediction of x_0 for blobs of one width: called as a network is called."""

    num_classes, null_label, centres = 2, 2, CENTRES

    def __init__(self, width):
        super().__init__()
        self.width = width

    def log_densities(self, x, t):
        """Log density of every blob at x_bar, up to one constant, and x_bar: (B, 2, 3), (B, 2)."""
        x_bar = x.flatten(1) / toy.sqrt_alphas_cumprod[t, None]
        variance = self.width**2 + toy.sigmas[t] ** 2
        squared = (x_bar[:, None, None] - self.centres).square().sum(-1)
        return -squared / (2 * variance[:, None, None]), x_bar

    def forward(self, x, t, y):
        log_density, x_bar = self.log_densities(x, t)
        other = torch.arange(2) != y[:, None]
        log_density = log_density.masked_fill((other & (y[:, None] < 2))[:, :, None], -torch.inf)
        weight = log_density.flatten(1).softmax(1).view_as(log_density)[..., None]
        keep = self.width**2 / (self.width**2 + toy.sigmas[t] ** 2)
        each = self.centres + keep.view(-1, 1, 1, 1) * (x_bar[:, None, None] - self.centres)
        return (weight * each).sum((1, 2))[:, :, None, None]


# %%
toy = GaussianDiffusion.from_config("cosine", prediction="x0")
blobs = Blobs(width=0.05)


# %% [markdown]
# A classifier follows from the same densities. Are both kinds of guidance one and the same here?

# %%
class BlobClassifier(torch.nn.Module):
    def forward(self, x, t):
        return blobs.log_densities(x, t)[0].logsumexp(-1)  # log p(x | y), and p(y) is the same


class Unlabelled(torch.nn.Module):
    def forward(self, x, t, y=None):
        return blobs(x, t, torch.full((len(x),), blobs.null_label))


x, t = start(9, 0, (2, 1, 1)).cpu(), torch.arange(50, 950, 100)
x = toy.sqrt_one_minus_alphas_cumprod[t].view(-1, 1, 1, 1) * x
y = torch.zeros(9, dtype=torch.int64)
by_classifier = ClassifierGuidance(Unlabelled(), toy, BlobClassifier(), 3.0)(x, t, y)
without_one = ClassifierFreeGuidance(blobs, 3.0)(x, t, y)
assert_close(by_classifier, without_one, rtol=1e-3, atol=1e-3)
print("largest difference of the two:", f"{(by_classifier - without_one).abs().max():.2f}")

# %% [markdown]
# They are, as Bayes' rule says. Now a network is never perfect. Let ours blur: it believes that the
# blobs are 0.15 wide instead of 0.05. What does each method make of it?
#
# - *Classifier-free guidance* pushes away from the other species at all noise levels.
# - *In an interval*: the same, but only at middle noise levels. At the highest the push would
#   decide which blob it becomes; at the lowest there is nothing left to decide.
# - *Autoguidance* pushes away from a *worse network*, here one that believes in a width of 0.4,
#   with the same label. Where the two disagree, the better one errs in the same direction, but
#   less.

# %%
blurred, worse = Blobs(width=0.15), Blobs(width=0.4)
methods = {
    "scale 1": ClassifierFreeGuidance(blurred, 1.0),
    "classifier-free, 4": ClassifierFreeGuidance(blurred, 4.0),
    "in an interval, 4": ClassifierFreeGuidance(blurred, 4.0, process=toy, interval=(0.1, 0.7)),
    "autoguidance, 2": AutoGuidance(blurred, worse, 2.0),
}
x_T, y = start(900, 1, (2, 1, 1)).cpu(), torch.zeros(900, dtype=torch.int64)


def points(wrapper, y=y):
    *_, last = dpm_solver(wrapper, toy, x_T, y, steps=30, spacing="karras")
    return last.x.flatten(1)


# %%
found = {"data": points(blobs), "other species": points(blobs, 1 - y)}
found |= {name: points(wrapper) for name, wrapper in methods.items()}
plot_points(
    found,
    limits=(-1.1, 1.1),
    columns=3,
    alt="Six panels of points: the three blobs of the species, those of the other one, and samples "
    "of it: wide blobs at scale 1; by classifier-free guidance blobs pushed away from the other "
    "species, the third nearly empty; in an interval the same, less so; by autoguidance three "
    "narrow, evenly filled blobs",
)


# %% [markdown]
# Two numbers say the same: the share of samples within 0.15 of a centre (three widths of the data,
# where nearly all of it lies), and how evenly the three blobs are filled (the smallest share of the
# three, one third at best).

# %%
def quality(points):
    distance, nearest = (points[:, None] - blobs.centres[0]).norm(dim=-1).min(1)
    shares = torch.bincount(nearest, minlength=3) / len(points)
    return float((distance < 0.15).float().mean()), float(shares.min())


print(f"{'':20} near a centre   smallest blob")
for name in ("data", *methods):
    near, smallest = quality(found[name])
    print(f"{name:20} {near:13.0%} {smallest:15.0%}")

# %%
guidance_scales = [1, 1.5, 2, 3, 4, 6, 8]
curves = {"near a centre": [], "smallest blob": []}
for s in guidance_scales:
    near, smallest = quality(points(ClassifierFreeGuidance(blurred, float(s))))
    curves["near a centre"].append(near)
    curves["smallest blob"].append(smallest)
plot_lines(
    {name: (guidance_scales, shares) for name, shares in curves.items()},
    x_label="guidance scale of classifier-free guidance",
    y_label="share of the samples",
    markers=True,
    size=(720, 260),
    alt="Shares against the guidance scale: near a centre from 0.37 to 0.5 at scale 2, then "
    "falling to 0.14 at 8; the smallest blob falls throughout, from 0.32 to 0.02",
)

# %% [markdown]
# A little guidance helps: at scale 2 more samples lie near a centre. Diversity falls from the
# start: the blob nearest to the other species empties. And beyond scale 2 the samples are driven
# past their own centres, so that both numbers get worse. Autoguidance has neither fault here, since
# what it corrects is the blur and not the species.
#
# ## Flowers without a classifier
#
# In terms of the prediction, whichever it is, classifier-free guidance reads
# $\hat x_0(x_t) + s\,\big(\hat x_0(x_t, y) - \hat x_0(x_t)\big)$: two calls of the network, or one
# with twice the images. It can answer without a label because labels were dropped in training.

# %%
six = torch.arange(6, device=device) % len(classes)
x, t = start(6, 5, shape), torch.full((6,), 500, device=device)
with torch.no_grad():
    with_label, without_label = model(x, t, six), model(x, t)
    mine = without_label + 3 * (with_label - without_label)
    packaged = ClassifierFreeGuidance(model, 3.0)(x, t, six)
assert_close(mine, packaged, rtol=1e-3, atol=1e-3)
print("largest difference of a pixel:", f"{(mine - packaged).abs().max():.2f}")

# %% [markdown]
# The price of a high scale is oversaturation: the extrapolated prediction leaves the range of
# images and is clamped. Two remedies, at scale 6: an interval (here $0.2 < \sigma \le 3$), and
# *rescaling* the guided prediction to the standard deviation of the unguided one (Lin et al. 2024):

# %%
y = species_labels(names, species).to(device)
remedies = {
    "scale 1": {"guidance_scale": 1.0},
    "scale 6": {"guidance_scale": 6.0},
    "in an interval": {"guidance_scale": 6.0, "process": photo_process, "interval": (0.2, 3.0)},
    "rescaled": {"guidance_scale": 6.0, "rescale": 0.7},
}
rows = [
    sampled(ClassifierFreeGuidance(photo_network, **options), start(3, 5), y)
    for options in remedies.values()
]
filmstrip(
    rows,
    row_labels=list(remedies),
    column_labels=names,
    scale=2,
    alt="Three species unguided, at scale 6, at scale 6 in an interval, and rescaled: the "
    "second row "
    "is oversaturated; the third has the colours of the first with clearer shapes; the last is a "
    "little softer than the second",
)


# %% [markdown]
# Your choice: a species, a scale, the interval on or off, and new noise as often as you like.

# %%
def ask(species_name, guidance, interval, noise):
    labels = species_labels([species_name] * 3, species).to(device)
    options = {"process": photo_process, "interval": (0.2, 3.0)} if interval else {}
    wrapper = ClassifierFreeGuidance(photo_network, guidance, **options)
    states = dpm_solver(wrapper, photo_process, start(3, noise), labels, steps=10)
    for count, state in enumerate(states, 1):
        images = state.x.cpu()
        yield count / 10
    alt = f"Three generated flowers of the species {species_name}, guidance scale {guidance:g}"
    yield image_grid(images, scale=3, alt=alt)


Explorer(
    ask,
    species_name=widgets.Dropdown(
        options=sorted(species), value="sunflower", description="species"
    ),
    guidance=widgets.FloatSlider(3, min=0, max=8, step=0.5, continuous_update=False),
    interval=widgets.Checkbox(False),
    noise=Again("new noise"),
)


# %% [markdown]
# ## Flowers with a classifier
#
# Steering begins when the image is still all noise, so the classifier must know noisy images: it is
# the encoder of the UNet with attention pooling on top, trained on $x_t$ with $t$ from the whole
# range. Its labels are smoothed, because an overconfident classifier's gradient vanishes.

# %%
def train_classifier(classifier, process, highest_t, steps, batch_size, label_smoothing=0.0):
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    batches = Batches(data, batch_size, flip=profile.flip, device=device)
    generator = torch.Generator(device).manual_seed(0)
    for index in range(steps):
        x_0, y = batches[index]
        t = torch.randint(highest_t, (len(y),), generator=generator, device=device)
        noise = torch.randn(x_0.shape, generator=generator, device=device)
        logits = classifier(process.q_sample(x_0, t, noise), t)
        optimizer.zero_grad()
        F.cross_entropy(logits, y, label_smoothing=label_smoothing).backward()
        optimizer.step()
        schedule.step()
    return classifier.eval().requires_grad_(False)


small = {"image_size": profile.image_size, "channels": 32, "channel_mults": (1, 2), "patch_size": 2}
small |= {"num_res_blocks": 1, "attention_resolutions": ()}
torch.manual_seed(1)
classifier = NoisyClassifier(process, len(classes), **small).to(device)
classifier = train_classifier(classifier, process, 1000, 250, 32, label_smoothing=0.1)

# %%
some = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
x_0, y = to_float(held_out.images[some[:128]]).to(device), held_out.labels[some[:128]].to(device)
levels = list(range(0, 1000, 111))


@torch.no_grad()
def accuracy_at(level):
    t = torch.full(y.shape, level, device=device)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(level)).to(device)
    right = classifier(process.q_sample(x_0, t, noise), t).argmax(1) == y
    return right.float().mean().item()


plot_lines(
    {"held-out images": (levels, [accuracy_at(level) for level in levels])},
    x_label="t",
    y_label="accuracy",
    markers=True,
    size=(720, 240),
    hlines={"chance": 1 / len(classes)},
    alt="Accuracy of the classifier against t: nearly 1 up to about t = 700, then falling to about "
    "chance at t = 999",
)

# %% [markdown]
# The network is never told the species here; the classifier's gradient alone steers it.

# %%
class_names = [classes[label] for label in six]
rows = {}
for s in (0, 1, 3, 10):
    wrapper = ClassifierGuidance(model, process, classifier, float(s))
    rows[f"scale {s}"] = sampled(wrapper, start(6, 5, shape), six, process, steps=15)
filmstrip(
    list(rows.values()),
    row_labels=list(rows),
    column_labels=class_names,
    scale=3,
    alt="Six flowers at growing scale of classifier guidance: at 0 petals of all colours mixed;"
    " with "
    "the scale each gains petals in the colour of its species, but at 10 a mixture remains",
)

# %% [markdown]
# It works, but weakly: the daisy's petals turn white, the poppy's red, the sunflower's yellow, and
# yet most flowers remain mixtures. Steering starts from the network without label, which saw one
# image in ten without, and mixes species within one flower (scale 0). And the classifier knows
# least where the species is decided, at the highest noise levels, as its accuracy shows. A network
# that is told the label has neither handicap, which is why classifier-free guidance is the usual
# choice today.
#
# ## Your turn
#
# Replace `None` or `...` and run the cell; it says whether you are right.
#
# **1. A row of scales.** `guidance_scale` may be a tensor with one number per image. Sample eight
# poppies from one noise, `x_T`, with the scales 0 to 7, in one call of `sampled` with `process`.

# %% tags=["exercise"]
x_T = start(1, 5, shape).repeat(8, 1, 1, 1)
poppies = None

check(
    "exercise 1",
    poppies,
    lambda x: x.shape == x_T.shape and (x[0] - x[1]).abs().mean() > 0.01,
    hint="ClassifierFreeGuidance(model, torch.arange(8.0)), and a label tensor of eight ones.",
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# y = torch.ones(8, dtype=torch.int64)
# poppies = sampled(ClassifierFreeGuidance(model, torch.arange(8.0)), x_T, y, process)
# image_grid(poppies)
# ```
# </details>
#
# **2. From t to sigma.** An interval is given in noise levels. Which is the noise level at $t =
# 400$ of `process`?

# %% tags=["exercise"]
sigma = None

check("exercise 2", sigma, float(process.sigmas[400]), tolerance=0.01, hint="process.sigmas")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# sigma = float(process.sigmas[400])
# ```
#
# 0.74. Below it, nearly everything about the flower is decided, and guidance only adds contrast.
# </details>
#
# **3. What it saves.** With 10 steps of `photo_process`, spaced evenly in t, how many of them lie
# in the interval $0.2 < \sigma \le 3$ and need the second call?

# %% tags=["exercise"]
guided_steps = None

ten = photo_process.respace(10).sigmas
check(
    "exercise 3",
    guided_steps,
    int(((ten > 0.2) & (ten <= 3.0)).sum()),
    hint="photo_process.respace(10).sigmas holds the noise levels of the ten steps.",
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# ten = photo_process.respace(10).sigmas
# guided_steps = int(((ten > 0.2) & (ten <= 3.0)).sum())
# ```
# </details>
#
# ---
#
# The rest of this notebook is about two other things that Dhariwal & Nichol (2021) took up: the
# learned variance, and the choices of their network, ADM.
#
# ## How uncertain is a step? The learned variance
#
# In notebook 05 the network gave the mean of $p(x_{t-1} \mid x_t)$, and the variance was fixed: the
# posterior's $\tilde\beta_t$, which is right if the image is known for certain. If nothing is
# known, it is $\beta_t$. Between these two must lie the truth. They differ at the last steps only:

# %%
ratio = process.posterior_log_variance.exp().cpu() / process.betas.cpu()
plot_lines(
    {"lower over upper bound": ratio},
    x_label="t",
    y_label="ratio of variances",
    log_x=True,
    size=(720, 240),
    alt="The ratio of the two bounds against t on a log axis: a half in the first steps, 0.9 at"
    " t = 10, nearly 1 from t = 100 on",
)

# %% [markdown]
# Yet these few steps decide about most of an image's *likelihood*: they say how surprising its
# finest details are. So let a second half of the output, $f$ in about $-1..1$, interpolate between
# the logarithms (Nichol & Dhariwal 2021, eq. 15), with $w = (f + 1) / 2$ (the paper's $v$, a name
# that is taken here by the prediction):
#
# $$\Sigma = \exp(w \log \beta_t + (1 - w) \log \tilde\beta_t).$$

# %%
learned = GaussianDiffusion.from_config(**profile.process | {"variance": "learned"}).to(device)
f, t = torch.rand(4, 3, 8, 8, device=device) * 2 - 1, torch.tensor([1, 10, 100, 999], device=device)
w = (f + 1) / 2
mine = w * learned.betas[t].log().view(-1, 1, 1, 1) + (1 - w) * learned.posterior_variance[
    t
].log().view(-1, 1, 1, 1)
assert_close(mine, learned.p_log_variance(f, t, f))

# %% [markdown]
# $L_\text{simple}$ does not see the variance, so it needs a loss of its own: the variational bound.
# It bounds from above the bits that the model needs to describe a image, a sum of one term a step
# (notebook 07 takes it apart): how many bits it costs at $t$ that the network's $p(x_{t-1} \mid
# x_t)$ is not the true posterior $q(x_{t-1} \mid x_t, x_0)$. For $t > 0$ that is the KL divergence
# of two Gaussians, which is a formula. PyTorch knows it, too:

# %%
x_0 = to_float(held_out.images[:4]).to(device)
noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(2)).to(device)
x_t = learned.q_sample(x_0, t, noise)

# %%
output = torch.cat(
    [learned.training_target(x_0, t, noise) + 0.1, torch.rand(x_0.shape, device=device)], dim=1
)  # a network that errs a little

# %%
prediction, f = learned.split_output(output, x_t)
mean, _ = learned.q_posterior_mean_variance(learned.predict_start(x_t, t, prediction), x_t, t)
true_mean, true_variance = learned.q_posterior_mean_variance(x_0, x_t, t)
p = torch.distributions.Normal(mean, (0.5 * learned.p_log_variance(x_t, t, f)).exp())

# %%
kl = torch.distributions.kl_divergence(
    torch.distributions.Normal(true_mean, true_variance.sqrt()), p
)
mine = kl.flatten(1).mean(1) / np.log(2)
assert_close(mine, variational_bound_term(learned, x_0, x_t, t, output), rtol=1e-3, atol=1e-6)

# %% [markdown]
# At $t = 0$ the network must name one of 256 grey levels. The Gaussian is cut into 256 intervals,
# the outer two reaching to infinity, so the probabilities add up to one:

# %%
levels = torch.arange(256) / 127.5 - 1
for mean, std in ((0.3, 0.02), (-0.99, 0.1), (1.2, 0.3)):
    total = (
        discretized_gaussian_log_likelihood(levels, torch.tensor(mean), torch.tensor(std))
        .exp()
        .sum()
    )
    assert abs(total - 1) < 1e-4

# %% [markdown]
# The hybrid loss is $L_\text{simple} + 0.001\, L_\text{vlb}$. $L_\text{vlb}$ is a sum over all $T$
# terms, and one random $t$ stands for all of them: the factor before it is $T / 1000$, so 1 here.
# And the bound may teach only the variance: it would disturb the mean. So through it no gradient
# reaches the prediction:

# %%
with torch.random.fork_rng():
    network = UNet(**model.config | {"out_channels": 6}).to(device)

# %%
torch.nn.init.normal_(
    network.conv_out.weight, std=0.1, generator=torch.Generator(device).manual_seed(0)
)
loss = simple_loss(network, learned, x_0, t, noise)
loss.backward()
hybrid_gradient = network.conv_out.weight.grad.view(
    6, -1
).clone()  # of the 3 prediction channels and the 3 variance ones

# %%
network.zero_grad()
output = network(x_t, t)
simple = F.mse_loss(output[:, :3], learned.training_target(x_0, t, noise))
simple.backward()
simple_gradient = network.conv_out.weight.grad.view(6, -1)

# %%
assert_close(loss, simple + variational_bound_term(learned, x_0, x_t, t, output).mean())
assert_close(hybrid_gradient[:3], simple_gradient[:3], rtol=1e-3, atol=1e-6)
assert (simple_gradient[3:] == 0).all() and (hybrid_gradient[3:] != 0).any()


# %% [markdown]
# Does it pay? Two copies of the network of stage 4 train on for 200 steps, one with three more
# output channels and the hybrid loss. We drop the label of every third image, since guidance will
# need a network that is good without one.

# %%
def train_on(process):
    weights, channels = model.state_dict(), 6 if process.variance == "learned" else 3
    if channels == 6:  # the new channels start at 0: halfway between the bounds
        for name in ("conv_out.weight", "conv_out.bias"):
            weights[name] = torch.cat([weights[name], 0 * weights[name]])
    network = UNet(**model.config | {"out_channels": channels}).to(
        device, memory_format=memory_format(device, profile.autocast)
    )
    network.load_state_dict(weights)
    ema = EMA(network, 0.99)
    batches = Batches(data, profile.batch_size, device=device)
    options = profile.training | {
        "steps": 200,
        "learning_rate": profile.learning_rate * 2 / 3,
        "label_dropout": 1 / 3,
    }
    for _ in train(network, process, batches, ema, **options):
        pass
    with ema.applied():
        return copy.deepcopy(network).eval().requires_grad_(False)


# %%
fixed = GaussianDiffusion.from_config(**profile.process).to(device)
networks = {
    "fixed variance": (train_on(fixed), fixed),
    "learned variance": (train_on(learned), learned),
}

# %% [markdown]
# The bits per dimension of 48 held-out images, for a first impression: the terms at some $t$,
# straight lines between them, added up. (Notebook 07 has every term, of a process of 100 steps.)

# %%
some_t = [0, 1, 2, 3, 5, 8, 12, 18, 27, 40, 60, 90, 130, 190, 270, 370, 500, 650, 800, 950, 999]
some = torch.randperm(
    len(held_out), generator=torch.Generator().manual_seed(0)
)  # the photographs are sorted by species
x_0, y = to_float(held_out.images[some[:48]]).to(device), held_out.labels[some[:48]].to(device)


@torch.no_grad()
def bound_terms(network, process):
    generator, terms = torch.Generator().manual_seed(0), []
    for step in some_t:
        t = torch.full((len(x_0),), step, device=device)
        x_t = process.q_sample(x_0, t, torch.randn(x_0.shape, generator=generator).to(device))
        terms.append(
            variational_bound_term(process, x_0, x_t, t, network(x_t, t, y), clip=True)
            .mean()
            .item()
        )
    return terms


# %%
terms = {name: bound_terms(*pair) for name, pair in networks.items()}
bits = {name: np.interp(range(1000), some_t, term).sum() for name, term in terms.items()}
assert bits["learned variance"] < bits["fixed variance"] - 0.1

# %%
plot_lines(
    {
        f"{name}: {bits[name]:.2f} bits": ([t + 1 for t in some_t], term)
        for name, term in terms.items()
    },
    x_label="t + 1",
    y_label="bits per dimension",
    log_x=True,
    log_y=True,
    markers=True,
    alt="Terms of the bound against t on log axes: with the learned variance they are lower in "
    "the first ten steps and the same later",
)

# %% [markdown]
# Fewer bits, nearly all of them saved in the first few steps, where the bounds differ. They are
# many bits in both cases: the capped weight hardly trains the first timesteps, which the bound
# weights most. A network that is to assign likelihoods needs another weight than one for beautiful
# samples. The samplers use a learned variance where they need one (DDPM does).

# %% [markdown]
# ## The network that beat the GANs
#
# Dhariwal & Nichol tried, one by one: attention at more resolutions, heads of a fixed width,
# BigGAN's residual blocks for going down and up, division of residual sums by $\sqrt 2$, and the
# timestep as scale and shift of a norm instead of a sum. `UNet` has each as an option. What do they
# cost?

# %%
base = profile.network | {
    "attention_resolutions": (),
    "head_channels": profile.channels,
    "scale_shift_norm": False,
}
bottom = profile.image_size // profile.patch_size // 2 ** (len(profile.channel_mults) - 1)
options = {
    "base": {},
    "scale-shift": {"scale_shift_norm": True},
    "attention": {"attention_resolutions": (2 * bottom, bottom)},
    "narrow heads": {
        "attention_resolutions": (2 * bottom, bottom),
        "head_channels": profile.channels // 2,
    },
    "up/down": {"resblock_updown": True},
    "rescaled": {"rescale_residual": True},
}

# %%
variants = {name: UNet(**base | option).to(device) for name, option in options.items()}

# %%
x, t = torch.randn(8, *shape, device=device), torch.full((8,), 500, device=device)
for name, variant in variants.items():
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        variant(x, t)
    parameters = sum(p.numel() for p in variant.parameters())
    work = counter.get_total_flops() / 8e6
    print(f"{name:12} {parameters:9,} parameters {work:7.1f} MFLOPs an image")

# %% [markdown]
# A new residual block is one that does nothing, since its last convolution starts at zero. So what
# the options do to the sum shows at once:

# %%
x, emb = torch.randn(2, 16, 8, 8), torch.randn(2, 64)
assert_close(ResBlock(16, 16, 64)(x, emb), x)
assert_close(ResBlock(16, 16, 64, rescale_residual=True)(x, emb), x / 2**0.5)
assert_close(ResBlock(16, 16, 64, resample="down")(x, emb), F.avg_pool2d(x, 2))

# %% [markdown]
# The time of a training step, forward and back, depends on the machine. We take turns, so that a
# machine that is busy for a moment treats all alike, and draw the ratio to the base.

# %%
x, t = torch.randn(8, *shape, device=device), torch.full((8,), 500, device=device)


def seconds(variant):
    start = time.perf_counter()
    variant(x, t).square().mean().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


rounds = torch.tensor([[seconds(variant) for variant in variants.values()] for _ in range(8)])
median = rounds[1:].median(dim=0).values

# %% tags=["measurement"]
bars(
    dict(zip(variants, (median / median[0]).tolist(), strict=True)),
    x_label="time of a training step, relative to the base",
    alt="Time of a training step of each variant relative to the base: attention costs most, "
    "the more with narrow heads; blocks that go up and down cost something, the others "
    "hardly anything",
)

# %% [markdown]
# Together and large, this is the paper's network, ADM, for ImageNet at 64 x 64. We build it without
# giving it memory ("meta"), and count. The paper says 296 million:

# %%
with torch.device("meta"):
    adm = UNet(
        image_size=64,
        out_channels=6,
        channels=192,
        channel_mults=(1, 2, 3, 4),
        num_res_blocks=3,
        attention_resolutions=(32, 16, 8),
        head_channels=64,
        dropout=0.1,
        num_classes=1000,
        resblock_updown=True,
    )

# %%
count = sum(p.numel() for p in adm.parameters())
print(
    f"{count:,} parameters, "
    f"{count - adm.label_emb.weight.numel():,} of them without the labels' embedding"
)
assert round(count / 1e6) == 296

# %% [markdown]
# Next: [07_evaluation](07_evaluation.ipynb). Guidance made the images "better" to the eye; by which
# measures one may say so is its question.
