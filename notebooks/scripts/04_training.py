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
# # 04 Train the network
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/noisOut/noisOut/blob/main/notebooks/04_training.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/noisOut/noisOut/main?labpath=notebooks/04_training.ipynb)
#
# **What you'll do**: train the UNet of notebook 03 until it turns noise into flowers, and then look
# closely at what it has learned.
#
# **What you'll learn**: where the loss comes from, why predictions are blurred, what the choice
# between $\epsilon$, $v$ and $x_0$ changes, why samples are made with averaged weights, and what
# longer training brings.
#
# **What you need**: notebooks 01 to 03. On two CPU cores all of it takes about two minutes, most of
# them for the training run.

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

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from noisout_nb.batches import NOISE, stream_seed
from noisout_nb.checkpoints import load_model, read_card, save_model
from noisout_nb.data import load_data, to_float
from noisout_nb.evaluation import factor_distance
from noisout_nb.exercises import check
from noisout_nb.figures import bars, filmstrip, image_grid, plot_bars, plot_lines, plot_loss
from noisout_nb.forward_process import GaussianDiffusion
from noisout_nb.generate import sample_image
from noisout_nb.parallel import get_device, memory_format
from noisout_nb.profiles import PROFILES, get_profile
from noisout_nb.progress import progress
from noisout_nb.sampling import ddpm, sample
from noisout_nb.training import EMA, Batches, held_out_loss, learning_rate_at, train
from noisout_nb.unet import UNet
from noisout_nb.widgets import Live

# %% [markdown]
# Data, process and network, as the last three notebooks built them:

# %%
torch.manual_seed(0)
profile, device = get_profile(), get_device()
data, held_out = load_data(profile), load_data(profile, "val")
process = GaussianDiffusion.from_config(**profile.process).to(device)
layout = memory_format(device, profile.autocast)
model = UNet(**profile.network, num_classes=len(data.classes)).to(device, memory_format=layout)
T, shape = process.timesteps, (3, profile.image_size, profile.image_size)

# %% [markdown]
# ## The task
#
# This is the task of `fit` in notebook 00, with images. A clean image $x_0$, a timestep $t$ and
# noise $\epsilon$ give the noisy
# $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon$. The network sees $x_t$, $t$
# and the species, and predicts $x_0$. Before training it predicts zero everywhere: mid-grey.

# %%
order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
x_0 = to_float(held_out.images[order[:6]]).to(device)
y = held_out.labels[order[:6]].to(device)
t = torch.tensor([50, 200, 400, 600, 800, 950], device=device)
noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1)).to(device)
x_t = process.q_sample(x_0, t, noise)
denoiser = model  # after training: a copy with the averaged weights


@torch.no_grad()
def predict(x_t, t, y):
    return process.predict_start(x_t, t, denoiser.eval()(x_t, t, y)).cpu()


times = [f"t = {int(i)}" for i in t]
filmstrip(
    [x_0, x_t, predict(x_t, t, y)],
    row_labels=["target $x_0$", "input $x_t$", "prediction"],
    column_labels=times,
    alt="Six flowers, the same with more and more noise, and the predictions of the untrained "
    "network, which are all grey",
)

# %% [markdown]
# ## Where the loss comes from
#
# Why do we minimise a weighted squared error? (You can skip the derivation on a first reading.) The
# model should give every training image a high probability. For a chain of steps
# $p_\theta(x_{t-1} \mid x_t)$ that probability cannot be computed, but it can be bounded: this is
# the *variational bound* (Ho et al. 2020, eq. 5, in their counting of $t$)
#
# $$ \begin{aligned} -\log p_\theta(x_0) \;\le\;
# & \underbrace{D_\text{KL}\big(q(x_T \mid x_0)\,\|\,p(x_T)\big)}_{\text{no parameters}}
# - \log p_\theta(x_0 \mid x_1) \\
# & + \sum_{t > 1} D_\text{KL}\big(q(x_{t-1} \mid x_t, x_0)\,\|\,p_\theta(x_{t-1} \mid x_t)\big)
# \end{aligned} $$
#
# on average over the noise. Each term of the sum compares two Gaussians. One is the posterior of
# notebook 02, with mean $\tilde\mu(x_t, x_0)$ and variance $\tilde\beta_t$. The other is the
# model's step; since small steps back are nearly Gaussian, we take the same formula with the
# prediction in place of $x_0$: mean $\tilde\mu(x_t, \hat x_0)$, variance $\tilde\beta_t$. The KL
# divergence of two Gaussians with equal variance is the squared distance of their means over twice
# the variance. And $\tilde\mu$ is linear in $x_0$, so
#
# $$ D_\text{KL} = \frac{\|\tilde\mu(x_t, x_0) - \tilde\mu(x_t, \hat x_0)\|^2}{2\tilde\beta_t} =
# \frac{\text{SNR}_{t-1} - \text{SNR}_t}{2}\;\|x_0 - \hat x_0\|^2 . $$
#
# So the bound is a mean squared error with a weight for each $t$. Both sides for a prediction that
# is off by a little noise:

# %%
wrong = x_0 + 0.1 * torch.randn(x_0.shape, generator=torch.Generator().manual_seed(2)).to(device)
true_mean, variance = process.q_posterior_mean_variance(x_0, x_t, t)
mean, _ = process.q_posterior_mean_variance(wrong, x_t, t)
p, q = (torch.distributions.Normal(m, variance.sqrt()) for m in (mean, true_mean))
kl = torch.distributions.kl_divergence(q, p).sum((1, 2, 3))

snr = process.signal_to_noise_ratio
formula = (snr(t - 1) - snr(t)) / 2 * (x_0 - wrong).square().sum((1, 2, 3))
assert_close(kl, formula, rtol=1e-2, atol=0)
print("  t    KL divergence    weighted squared error")
for i, left, right in zip(t.tolist(), kl, formula, strict=True):
    print(f"{i:3} {left:16.2g} {right:25.2g}")


# %% [markdown]
# Ho et al. found samples better with a simpler weight. Their $L_\text{simple}$ is the plain squared
# error of the predicted noise, which weights an error in $x_0$ by $\text{SNR}_t$. The profiles of
# this series use $\text{SNR}_t + 1$ (the weight of notebook 00), capped; below we compare these
# weights. Whatever the weight, training is *Algorithm 1* of the paper, which is short:
#
# ```python
# x_0, y = next(images)
# t, noise = torch.randint(T, (len(x_0),)), torch.randn_like(x_0)
# prediction = model(process.q_sample(x_0, t, noise), t, y)
# loss = (weight(t) * (prediction - x_0).square().mean((1, 2, 3))).mean()
# loss.backward()  # and a step of the optimiser
# ```
#
# Here it is in full:

# %%
def my_training(model, batches, steps, learning_rate):
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=True)
    generator = torch.Generator(device)
    for index in range(steps):
        x_0, y = batches[index]
        generator.manual_seed(stream_seed(0, NOISE, index))  # random numbers of this step
        t = torch.randint(T, (len(x_0),), generator=generator, device=device)
        noise = torch.randn(x_0.shape, generator=generator, device=device)
        x_t = process.q_sample(x_0, t, noise)
        dropped = torch.rand(len(y), generator=generator, device=device) < profile.label_dropout
        y = torch.where(dropped, model.null_label, y)

        prediction = process.predict_start(x_t, t, model(x_t, t, y))
        weight = (snr(t) + 1).clamp(max=profile.max_weight)
        loss = (weight * (prediction - x_0).square().mean((1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()

        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate_at(index, steps, learning_rate)
        optimizer.step()
        yield loss.item()


# %% [markdown]
# Four things have been added. Each step has its own random numbers, so that a run can be resumed at
# any step. Some labels are dropped, so that the network also learns to predict without one
# (notebook 06 makes use of it). The gradient's norm is clipped. The learning rate rises over the
# first steps and then falls along a cosine. The package's `train` is the same loop, and yields
# after each step. From the same start, both have the same losses:

# %%
def small_network():  # without dropout, which would consume random numbers in a different order
    torch.manual_seed(1)
    network = UNet(**profile.network | {"dropout": 0.0}, num_classes=len(data.classes))
    return network.to(device).train()


def same_batches():
    return Batches(data, profile.batch_size, flip=profile.flip, device=device)


options = profile.training | {"steps": 3, "autocast": False}
package = small_network()
theirs = [step.loss for step in train(package, process, same_batches(), EMA(package), **options)]
mine = list(my_training(small_network(), same_batches(), 3, profile.learning_rate))
assert_close(mine, theirs, rtol=1e-4, atol=0)
print(
    "largest relative difference:",
    f"{max(abs(a / b - 1) for a, b in zip(mine, theirs, strict=True)):.3f}",
)

# %% [markdown]
# ## Train
#
# The loop is ours, so we decide what it shows and records. It plots the loss of each step. At four
# points of the run it keeps four samples, always from the same noise, and the loss on held-out
# images: with the raw weights, and with their *exponential moving average* (EMA), which we come to
# below. The stop button ends the loop; to go on, run the cell again.

# %%
preview_steps = [round(profile.train_steps * part) for part in (0.05, 0.2, 0.5, 1)]
species = torch.arange(4, device=device) % len(data.classes)
previews, scores = {"raw": {}, "averaged": {}}, {"raw": {}, "averaged": {}}
ema, batches, losses = EMA(model, profile.ema_decay), same_batches(), []


def preview(index, weights):
    previews[weights][index] = sample(
        model, process, species, shape=shape, sampler="ddim", steps=20, seed=1
    ).cpu()
    scores[weights][index] = held_out_loss(model, process, held_out, count=128)


# %%
if len(losses) == profile.train_steps:
    raise RuntimeError("trained already: to start anew, run all cells from the top")
checkpoint = profile.runs / "checkpoint.pth"
alt = "The loss of each step, which falls steeply and then slowly"
options = profile.training | {"losses": losses, "checkpoint": checkpoint}
with train(model, process, batches, ema, **options) as run, Live(alt) as live:
    for step in progress(run, total=profile.train_steps, description="training"):
        if step.index in preview_steps:
            preview(step.index, "raw")
            with ema.applied():
                preview(step.index, "averaged")
        live.update(lambda: plot_loss(losses, size=(720, 240)))
        if live.stopped:
            break  # leaving the block saves the state

# %% [markdown]
# Each row below is sampled from the same noise, after longer training. Colour and place come first,
# the shape of the petals last:

# %% tags=["cover"]
assert len(losses) == profile.train_steps, "stopped early: run the cell above again to go on"
filmstrip(
    list(previews["averaged"].values()),
    row_labels=[f"step {index}" for index in previews["averaged"]],
    scale=2,
    alt="Four samples at four points of training: first blobs of colour on dark green, then "
    "ragged flowers, at the end clear petals and centres",
)

# %% [markdown]
# ## What has it learned?
#
# From here on we use the averaged weights. The same six held-out flowers as above:

# %%
with ema.applied():
    denoiser = copy.deepcopy(model).requires_grad_(False)

filmstrip(
    [x_0, x_t, predict(x_t, t, y)],
    row_labels=["target $x_0$", "input $x_t$", "prediction"],
    column_labels=times,
    alt="Six flowers, the same with more and more noise, and the predictions: sharp flowers where "
    "there is little noise, blurred ones of the right colour where there is much",
)

# %% [markdown]
# The more noise, the more blurred the prediction. The network is not to blame: this is what a
# squared error asks for, as we saw in notebook 00. For any function $f$ of $x_t$
#
# $$ \mathbb E\,\|x_0 - f(x_t)\|^2 = \mathbb E\,\big\|x_0 - \mathbb E[x_0 \mid x_t]\big\|^2 +
# \mathbb E\,\big\|\mathbb E[x_0 \mid x_t] - f(x_t)\big\|^2 $$
#
# Only the last term depends on $f$, and it vanishes for $f(x_t) = \mathbb E[x_0 \mid x_t]$. The
# best prediction is the *conditional mean*: the average of all clean images that $x_t$ may have
# come from. The first term is a floor that no network gets below.
#
# The smallest example has one pixel and two images, $x_0 = -1$ and $x_0 = +1$. At
# $\bar\alpha_t = 0.5$ the mean of $x_0$ over all examples that end near $x_t$ lies between the two:

# %%
generator = torch.Generator().manual_seed(4)
pixel = torch.randint(2, (100_000,), generator=generator) * 2.0 - 1
noisy = (pixel + torch.randn(pixel.shape, generator=generator)) * 0.5**0.5
centres = torch.linspace(-2, 2, 17)
means = [float(pixel[(noisy - centre).abs() < 0.1].mean()) for centre in centres]

plot_lines(
    {
        "mean of $x_0$ among 100,000 examples": (centres, means),
        r"$\mathrm{E}[x_0 \mid x_t] = \tanh(\sqrt{2}\,x_t)$": (
            centres,
            torch.tanh(2**0.5 * centres),
        ),
    },
    x_label="$x_t$",
    y_label="$x_0$",
    markers=["mean of $x_0$ among 100,000 examples"],
    size=(720, 260),
    alt="The mean of x_0 against x_t: an S from -1 to 1 that passes through 0, on the curve tanh",
)

# %% [markdown]
# For flowers we cannot list all that an $x_t$ may have come from, but we can *sample* them: start
# the reverse process at $x_t$ and add new noise in each step, as Algorithm 2 does (notebook 05).
# The flowers sampled from one $x_t$ differ in size, place and background. The mean of 24 is blurred
# as the prediction is:

# %%
start = torch.tensor([900], device=device)
daisy, noisy = y[5:], process.q_sample(x_0[5:], start, noise[5:])
above = GaussianDiffusion(process.exact_betas[:901], process.prediction).to(device)
generator = torch.Generator(device).manual_seed(5)
*_, end = ddpm(
    denoiser, above, noisy.repeat(24, 1, 1, 1), daisy.repeat(24), steps=25, generator=generator
)
possible = end.x.cpu()

# %%
prediction = predict(noisy, start, daisy)
image_grid(
    [noisy[0].cpu(), *possible[:5], possible.mean(0), prediction[0]],
    column_labels=["$x_t$", *["sample"] * 5, "mean of 24", "prediction"],
    alt="A noisy image, five different sharp daisies sampled from it, the blurred mean of 24, and "
    "the prediction, which looks like the mean",
)

# %%
to_mean = (prediction[0] - possible.mean(0)).square().mean()
to_samples = (prediction - possible).square().mean((1, 2, 3))
print("nearer to the mean than to any of the 24 samples:", bool(to_mean < to_samples.min()))


# %% [markdown]
# ## How large is the error?
#
# We compare three predictions of $x_0$: the network's, for held-out and for training images; that
# of notebook 02's Gaussian, which pretends that flowers are normally distributed and is not told
# the species; and the input itself, $x_t/\sqrt{\bar\alpha_t}$.

# %%
def gaussian(images):
    """Mean, variances and directions of the first hundred principal components."""
    torch.manual_seed(0)  # pca_lowrank starts from random directions
    _, singular, components = torch.pca_lowrank(images.flatten(1), q=100)
    return images.mean(0), singular**2 / (len(images) - 1), components


centre, variances, components = gaussian(to_float(data.images))


def gaussian_prediction(x_t, t, y):
    a = process.alphas_cumprod[t].view(-1, 1).cpu()
    deviation = (x_t.cpu() - a.sqrt().view(-1, 1, 1, 1) * centre).flatten(1) @ components
    gain = a.sqrt() * variances / (a * variances + 1 - a)
    return centre + (deviation * gain @ components.T).view_as(x_t)


def input_itself(x_t, t, y):
    return (x_t / process.sqrt_alphas_cumprod[t].view(-1, 1, 1, 1)).cpu()


# %%
levels = [10, 30, 60, 100, 200, 350, 500, 650, 800, 900, 999]


def errors(predict, images, labels):
    found = []
    for level in levels:
        t = torch.full((len(images),), level, device=device)
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(level)).to(device)
        prediction = predict(process.q_sample(images, t, noise), t, labels)
        found.append(float((prediction - images.cpu()).square().mean()))
    return found


checked = to_float(held_out.images[order[:256]]).to(device), held_out.labels[order[:256]].to(device)
seen = to_float(data.images[:256]).to(device), data.labels[:256].to(device)
curves = {
    "network": errors(predict, *checked),
    "network, training images": errors(predict, *seen),
    "Gaussian of notebook 02": errors(gaussian_prediction, *checked),
    "the input itself": errors(input_itself, *checked)[:5],
}

# %%
plot_lines(
    {name: (levels[: len(curve)], curve) for name, curve in curves.items()},
    x_label="t",
    y_label="mean squared error of $x_0$",
    log_y=True,
    markers=True,
    alt="Error of the predicted x_0 against t on a log axis: the network's rises from below 0.005 "
    "to almost 0.1 and is about the same for training and for held-out images; the Gaussian's is "
    "larger at both ends; that of the input itself is lowest up to t = 30 and above from 60 on",
)

# %% [markdown]
# Three things to read off:
#
# - Training images are predicted only a little better than held-out ones: hardly any memorisation
#   so far.
# - Under heavy noise the network is ahead of the Gaussian, whose prediction there is the mean of
#   all species: the network knows which one it is. In the middle the two are close, since the
#   embedded flowers are smooth and simple. Under little noise the network is ahead again, in the
#   details.
# - At the smallest $t$ there is so little noise that returning the input is best. A network that
#   predicts $x_0$ has to reproduce every detail, and so short a training is not enough for that.
#
# ## One error, three targets
#
# Given $x_t$, a prediction of $x_0$ is one of $\epsilon$ and one of $v$, so a network may be
# trained on any of the three, and their squared errors differ by factors that depend on $t$ alone
# (notebook 02 measures them):
#
# $$ \|\epsilon - \hat\epsilon\|^2 = \text{SNR}_t\,\|x_0 - \hat x_0\|^2,
# \qquad \|v - \hat v\|^2 = (\text{SNR}_t + 1)\,\|x_0 - \hat x_0\|^2 $$
#
# So the plain squared errors of the three targets are one error with three weights. The figure adds
# the weight of the variational bound, and the capped one of our profiles. Towards pure noise the
# weights of the bound and of $\epsilon$ vanish, though that is where colour and place are decided.
# Towards the clean image those of the bound, of $\epsilon$ and of $v$ grow to 10,000.

# %%
every = torch.arange(1, T, device=device)
plot_lines(
    {
        "bound": (snr(every - 1) - snr(every)) / 2,
        r"$\epsilon$: SNR": snr(every),
        "$v$: SNR + 1": snr(every) + 1,
        "$x_0$: 1": torch.ones(T - 1),
        f"ours: SNR + 1, at most {profile.max_weight:g}": (snr(every) + 1).clamp(
            max=profile.max_weight
        ),
    },
    x_label="t",
    y_label="weight of the squared error of $x_0$",
    log_y=True,
    alt="Weights against t on a log axis: those of the bound, of eps and of v start near 10,000 "
    "and fall, eps and the bound on towards zero, v to 1, where that of x_0 always is; ours starts "
    "at its cap and then follows v",
)


# %% [markdown]
# The weight is one difference. The other is what the network has to *output*. Both $\epsilon$ and
# $v$ contain noise, and noise has no structure: the value of every pixel must pass through the
# network unchanged. Our UNet works on patches of 2 x 2 pixels (notebook 03), and what is lost on
# the way stays in the sample as grain. A network that outputs $x_0$ need not pass on the noise.
#
# How much does this matter? Below are trial runs of equal work, made by
# `python tools/ablation.py --steps 400`: 400 steps with patches of 2 x 2, about half of the run
# above; 102 steps on single pixels and 1,464 with patches of 4 x 4, which cost the same.
# (Their cap is 25, that of `models/quick_model.pth`; the run above has 10.) Each bar is the mean of
# two or three runs, the thin lines are standard errors.

# %%
def by_patch(*values):
    return dict(zip(("single pixels", "2 x 2", "4 x 4"), values, strict=True))


distance = {  # recorded: mean and standard error
    r"$\epsilon$": by_patch((2.40, 0.01), (2.78, 0.01), (3.36, 0.01)),
    "$v$": by_patch((0.424, 0.003), (0.617, 0.008), (1.83, 0.03)),
    "$x_0$, weight 1": by_patch((0.326, 0.003), (0.22, 0.02), (0.15, 0.01)),
    "$x_0$, SNR + 1 up to 25": by_patch((0.33, 0.02), (0.283, 0.007), (0.17, 0.01)),
}
plot_bars(
    distance,
    y_label="distance to held-out flowers",
    log_y=True,
    alt="Distance for three patch sizes on a log axis: eps 2.4, 2.8 and 3.4, v 0.4, 0.6 and 1.8, "
    "growing with the patch; both kinds of x_0 0.3, below 0.3, and 0.15 to 0.17",
)

# %% [markdown]
# The larger the patch, the farther $\epsilon$ and $v$ stay from flowers, although they get more
# steps. $x_0$ only gains. The runs of $v$ and of the last bars have the same weight up to the cap,
# so it is the output that makes the difference. The same program measures the power of the samples'
# finest details, which shows the reason:

# %%
finest = {
    r"$\epsilon$": by_patch((6.3, 0.7), (11.8, 0.2), (26.6, 0.1)),
    "$v$": by_patch((1.12, 0.02), (2.05, 0.03), (9.6, 0.1)),
    "$x_0$, weight 1": by_patch((0.344, 0.004), (0.45, 0.01), (0.503, 0.008)),
    "$x_0$, SNR + 1 up to 25": by_patch((0.533, 0.001), (0.55, 0.01), (0.568, 0.004)),
}
plot_bars(
    finest,
    y_label="power of the finest details",
    log_y=True,
    hlines={"held-out flowers": 1},
    alt="Power of the finest details, held-out flowers 1: eps 6, 12 and 27, v 1.1, 2 and 10, "
    "growing with the patch; both kinds of x_0 about a half, whatever the patch",
)

# %% [markdown]
# With $\epsilon$ and $v$ the samples are grainy, the more so the larger the patch; with $x_0$ they
# are still too smooth. SNR + 1 puts more weight on low noise levels, where fine details are
# learned, and has a little more of them.
#
# All this is measured on a narrow network. Ho et al. found $\epsilon$ best, with 128 channels on
# single pixels, which have room to pass the noise on.
#
# ## Averaged weights
#
# Each step follows the gradient of a few images, so the weights keep jittering while the learning
# rate is high. Averaging smooths this out: after every step,
# $\bar\theta \leftarrow d\,\bar\theta + (1-d)\,\theta$ with a decay $d$ slightly below 1. Samples
# from the same noise at two points of training, with raw and with averaged weights:

# %%
pairs = [(index, weights) for index in preview_steps[1:3] for weights in ("raw", "averaged")]
filmstrip(
    [previews[weights][index][:3] for index, weights in pairs],
    row_labels=[f"step {index}, {weights}" for index, weights in pairs],
    scale=2,
    alt="Three samples at two points of training, with raw and averaged weights: ragged flowers at "
    "the first, clear ones at the second; raw and averaged hardly differ",
)

# %%
plot_lines(
    {name: (list(found), list(found.values())) for name, found in scores.items()},
    x_label="training step",
    y_label="held-out loss",
    log_y=True,
    markers=True,
    size=(720, 260),
    alt="Held-out loss against the training step: that of the averaged weights is a little higher "
    "at the first point, clearly lower at the second and third; at the end both meet",
)

# %% [markdown]
# The samples differ little, the held-out losses clearly: half-way the average is about a hundred
# training steps ahead. At the end the two meet, because the learning rate has fallen to
# zero and the last weights hardly differ. If you stop early, or keep the rate constant, you need
# the average.
#
# ## Are they flowers?
#
# We sample 256 images, with the species of 256 held-out flowers. Below eight of them, samples of
# notebook 02's Gaussian:

# %%
reference, second = to_float(held_out.images[order[:512]]).chunk(2)
labels = held_out.labels[order[:512]].chunk(2)[1]
samples = sample(
    denoiser, process, labels.to(device), shape=shape, sampler="ddim", steps=10, seed=2
).cpu()
random = torch.randn(256, 100, generator=torch.Generator().manual_seed(6))
ghosts = (centre + (random * variances.sqrt() @ components.T).view(-1, *shape)).clamp(-1, 1)
filmstrip(
    [samples[:4], samples[5:9], ghosts[:4]],
    row_labels=["network", "network", "Gaussian"],
    scale=2,
    alt="Eight flowers generated by the network, each in the colours and with the petals of its "
    "species; four of the Gaussian, blurred and in mixed colours",
)

# %% [markdown]
# `factor_distance` (notebook 01) measures how far the samples' sizes, colours and backgrounds are
# from those of held-out flowers, in standard deviations. For comparison: a second set of held-out
# flowers, which shows the least that 256 images can reach; the Gaussian; and the mean flower 256
# times. The error bars are bootstrap standard errors.

# %%
sets = {
    "held-out flowers": second,
    "network": samples,
    "Gaussian of notebook 02": ghosts,
    "the mean flower": reference.mean(0, keepdim=True).expand_as(reference),
}
generator = torch.Generator().manual_seed(7)


def resampled(images):
    picked = torch.randint(len(images), (8, len(images)), generator=generator)
    return torch.tensor([factor_distance(images[k], reference)["mean"] for k in picked])


distances = {name: factor_distance(images, reference)["mean"] for name, images in sets.items()}
distance_errors = {name: float(resampled(images).std()) for name, images in sets.items()}
ahead = distances["network"] < distances["Gaussian of notebook 02"]
print("the network is nearer to the held-out flowers than the Gaussian:", ahead)

# %%
bars(
    distances,
    errors=distance_errors,
    x_label="distance to held-out flowers (0: the same values)",
    alt="Distance to held-out flowers: shortest for other held-out flowers, then the network, then "
    "the Gaussian, and by far the longest bar for the mean flower",
)

# %% [markdown]
# The network is clearly nearer to the held-out flowers than the Gaussian, although a Gaussian has
# the right mean and spread by construction. What the Gaussian lacks is plain in the images: it
# mixes the species. Distances that see more than four numbers are the subject of notebook 07.
#
# ## What longer training brings
#
# This run; a longer one of the same network, shipped as `models/quick_model.pth`; and the network
# of the profile `flowers64`, trained for hours on photographs of 102 species at 64 x 64 pixels,
# shipped as `models/Flowers102_model.pth`:

# %%
shipped = PROFILES["quick"].published
longer, longer_process, _ = load_model(shipped, device)
three = torch.tensor([0, 1, 4], device=device)  # of the embedded flowers: daisy, poppy, sunflower
options = {"sampler": "ddim", "steps": 20, "seed": 3}
now = sample(denoiser, process, three % len(data.classes), shape=shape, **options).cpu()
later = sample(longer, longer_process, three, shape=(3, 32, 32), **options).cpu()
names = ["oxeye daisy", "corn poppy", "sunflower"]
photographs = sample_image(names, sampler="ddim", steps=15, seed=3)

# %%
rows = [now, later, photographs]
image_grid(
    torch.cat([F.interpolate(images, size=64) for images in rows]),
    columns=3,
    scale=2,
    row_labels=["this run", f"{read_card(shipped)['steps']:,} steps", "flowers64"],
    alt="A daisy, a poppy and a sunflower of this run, ragged; the same after many more steps, "
    "with smooth petals; three that look like photographs",
)

# %% [markdown]
# ## Keep the weights
#
# We keep the averaged weights: a plain `state_dict` in half precision, with a card in the same file
# that says which network and process they belong to.

# %%
if len(losses) < profile.train_steps:
    raise RuntimeError("not finished: run the training cell again, and it goes on where it was")
facts = {"steps": len(losses), "profile": profile.name}
save_model(model, profile.weights, process, data.classes, ema=ema, **facts)
checkpoint.unlink(missing_ok=True)
read_card(profile.weights)["process"]

# %%
loaded, loaded_process, classes = load_model(profile.weights, device)
again = sample(
    loaded, loaded_process, labels[:4].to(device), shape=shape, sampler="ddim", steps=10, seed=2
).cpu()
print("mean difference of a pixel:", f"{(again - samples[:4]).abs().mean():.2f}")

# %% [markdown]
# While it ran, `train` also saved everything needed to resume (weights, average, optimiser, random
# states and step) to `checkpoint=...`: every 500 steps, and when the loop is left early. Run the
# cell again, or start the same program again, and it continues where it stopped; on the CPU the
# result is the same to the last bit. A damaged file is refused, and a loss of NaN stops the run
# before it reaches the file. [08_scaling](08_scaling.ipynb) kills a run to show it, and `tests/`
# checks the rest.
#
# ## Your turn
#
# Replace `None` or `...` and run the cell; it says whether you are right.
#
# **1. Nothing to see.** At $t = T - 1$ nothing is left of the image, so without the species the
# best prediction is the mean flower. How large is its mean squared error over the training set?
# Compute it without the network.

# %% tags=["exercise"]
error_of_the_mean = None

images = to_float(data.images)
check(
    "exercise 1",
    error_of_the_mean,
    float((images - images.mean(0)).square().mean()),
    tolerance=0.002,
    hint="It is a variance: of each pixel over all images, averaged over the pixels.",
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# error_of_the_mean = float(to_float(data.images).var(0, correction=0).mean())
# ```
#
# It is 0.14 for the embedded flowers, where the curve of the Gaussian ends. The network's ends
# lower: it is told the species, so its best prediction is the mean flower of that species.
# </details>
#
# **2. A long memory.** An average with a constant decay of 0.9999 starts from the random weights.
# Which share of it do these still make up after the 900 updates of the profile `quick`? (`EMA`
# avoids this: its decay starts low, at $(1+n)/(10+n)$ after $n$ updates.)

# %% tags=["exercise"]
share = None

check(
    "exercise 2",
    share,
    0.9999**900,
    tolerance=0.01,
    hint="Each update keeps the share d of what was there before.",
)


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# share = 0.9999**900
# ```
#
# 91 %: the average would hardly have learned anything.
# </details>
#
# **3. Another weight.** Hang et al. (2023) weight the squared error of $x_0$ by $\min(\text{SNR}_t,
# 5)$. Write it as a function of the SNR. For which share of all timesteps does the cap hold?

# %% tags=["exercise"]
def min_snr_weight(snr): ...


capped_share = None

some = torch.tensor([0.01, 1.0, 4.0, 10.0, 1000.0])
check("exercise 3, weight", min_snr_weight(some), some.clamp(max=5), hint="What is min(10, 5)?")
check(
    "exercise 3, share",
    capped_share,
    float((snr(torch.arange(T, device=device)) > 5).float().mean()),
    tolerance=0.002,
    hint="snr(t) takes a tensor of timesteps.",
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def min_snr_weight(snr):
#     return snr.clamp(max=5)
#
#
# capped_share = float((snr(torch.arange(T)) > 5).float().mean())
# ```
#
# The cap holds for about a quarter of the timesteps. To try it in training, give `train` the
# options `weighting="min-snr-5"` and `steps=400`, and compare samples.
# </details>
#
# Next: [05_sampling](05_sampling.ipynb) looks closely at how noise becomes a flower, and how to get
# there in few steps.
