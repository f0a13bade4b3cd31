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
# # 09 The two papers that made diffusion win
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/noisOut/noisOut/blob/main/notebooks/09_improved_ddpm.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/noisOut/noisOut/main?labpath=notebooks/09_improved_ddpm.ipynb)
#
# **What you'll do**: teach a trained network how uncertain each of its steps is, count the bits
# that this saves, and take ADM's network apart.
#
# **What you'll learn**: *improved DDPM* (Nichol & Dhariwal 2021): the learned variance, the hybrid
# loss, importance sampling of the timestep, and the cosine schedule; *ADM* (Dhariwal & Nichol
# 2021): its choices of network, what each costs and what each brought.
#
# **What you need**: notebooks 02 to 05. About a minute on two CPU cores, with the weights in
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
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from noisout_nb.checkpoints import load_pretrained
from noisout_nb.data import load_data, to_float
from noisout_nb.exercises import check
from noisout_nb.figures import bars, filmstrip, plot_bars, plot_lines, stack
from noisout_nb.forward_process import GaussianDiffusion
from noisout_nb.losses import discretized_gaussian_log_likelihood
from noisout_nb.parallel import get_device
from noisout_nb.profiles import get_profile
from noisout_nb.sampling import ddpm
from noisout_nb.training import EMA, Batches, held_out_loss, train
from noisout_nb.unet import ResBlock, UNet

# %% [markdown]
# ## The result
#
# In 2020, DDPM made convincing images, but the best ones came from GANs. A year later they no
# longer did. The numbers are the paper's own (Dhariwal & Nichol 2021, Table 5); the Fréchet
# distance (FID) to the training set measures quality, and recall the share of the real images that
# the samples cover:

# %% tags=["cover"]
fid = {  # StyleGAN for bedrooms, StyleGAN2 for horses and cats, BigGAN-deep for ImageNet
    "best GAN": [2.35, 3.84, 7.25, 4.06, 6.02, 6.95, 8.43],
    "ADM": [1.90, 2.57, 5.57, 2.07, 2.97, 4.59, 7.72],
}
recall = {
    "best GAN": [0.48, 0.48, 0.43, 0.48, 0.35, 0.28, 0.29],
    "ADM": [0.51, 0.55, 0.52, 0.63, 0.59, 0.52, 0.42],
}
tasks = ["bedrooms", "horses", "cats", *(f"ImageNet {side}" for side in (64, 128, 256, 512))]


def by_task(table):
    return {name: dict(zip(tasks, row, strict=True)) for name, row in table.items()}


stack(
    plot_bars(by_task(fid), y_label="FID, lower is better", number="{:.2f}", size=(820, 240)),
    plot_bars(by_task(recall), y_label="recall, higher is better", size=(820, 220)),
    alt="FID of the best GAN and of ADM on seven tasks: ADM's is lower on each; and their recall: "
    "ADM's is higher on each",
)

# %% [markdown]
# ADM here is the paper's best variant without upsampling: with dropout for the three LSUN
# categories and ImageNet 64, with classifier guidance (notebook 06) for the larger three. (For
# ImageNet at 128 x 128 the paper also quotes a better GAN, LOGAN, with an FID of 3.36 but without
# recall; the bars show BigGAN-deep.) Two things led there: a better *process* and a better
# *network*. We take them in turn.
#
# ## How uncertain is a step?
#
# In notebook 05 the network gave the mean of $p(x_{t-1} \mid x_t)$, and the variance was fixed: the
# posterior's $\tilde\beta_t$, which is right if the image is known for certain. If nothing is
# known, it is $\beta_t$. The two differ in the first timesteps only, the last steps of sampling:

# %%
torch.manual_seed(0)
profile, device = get_profile(), get_device()
model, process, classes = load_pretrained(profile, device)
data, held_out = load_data(profile), load_data(profile, "val")
T = process.timesteps
order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
images, labels = to_float(held_out.images[order]).to(device), held_out.labels[order].to(device)

# %%
ratio = process.posterior_log_variance.exp().cpu() / process.betas.cpu()
plot_lines(
    {"lower over upper bound": (range(1, T), ratio[1:])},
    x_label="t",
    y_label="ratio of variances",
    log_x=True,
    size=(720, 220),
    alt="The ratio of the two bounds against t on a log axis: a half at t = 1, 0.9 at t = 10, "
    "nearly 1 from t = 100 on",
)

# %% [markdown]
# Yet these few steps decide about most of an image's *likelihood*, as we will see. So let a second
# half of the output, $f$ in about $-1..1$, interpolate between the logarithms (Nichol & Dhariwal
# 2021, eq. 15), with $w = (f + 1) / 2$ (the paper's $v$, a name that is taken here by the
# prediction):
#
# $$\Sigma = \exp(w \log \beta_t + (1 - w) \log \tilde\beta_t).$$

# %%
learned = GaussianDiffusion.from_config(**profile.process | {"variance": "learned"}).to(device)
f, t = torch.rand(4, 3, 8, 8, device=device) * 2 - 1, torch.tensor([1, 10, 100, 999], device=device)
w = (f + 1) / 2
upper = learned.betas[t].log().view(-1, 1, 1, 1)
lower = learned.posterior_variance[t].log().view(-1, 1, 1, 1)
mine = w * upper + (1 - w) * lower
packaged = learned.p_log_variance(f, t, f)
assert_close(mine, packaged)
print(f"log variance by hand {mine[0, 0, 0, 0]:.3f}, helper package {packaged[0, 0, 0, 0]:.3f}")

# %% [markdown]
# ## The bound, term by term
#
# $L_\text{simple}$ does not see the variance. The *variational bound* $L_\text{vlb}$ does: from
# above it bounds the bits per dimension (channel of a pixel) that the model needs to describe an
# image, with one term per timestep. For $t > 0$ the term is the KL divergence between the true
# posterior $q(x_{t-1} \mid x_t, x_0)$ and the network's $p(x_{t-1} \mid x_t)$, two Gaussians.
# PyTorch has the formula, too:

# %%
from noisout_nb.training import variational_bound_term

x_0, noise = images[:4], torch.randn(4, *images.shape[1:], device=device)
x_t = learned.q_sample(x_0, t, noise)
prediction, f = x_0 + 0.1, torch.rand_like(x_0)  # a network that errs a little
mean, _ = learned.q_posterior_mean_variance(prediction, x_t, t)
true_mean, true_variance = learned.q_posterior_mean_variance(x_0, x_t, t)
q = torch.distributions.Normal(true_mean, true_variance.sqrt())
p = torch.distributions.Normal(mean, (0.5 * learned.p_log_variance(x_t, t, f)).exp())
mine = torch.distributions.kl_divergence(q, p).flatten(1).mean(1) / math.log(2)
packaged = variational_bound_term(learned, x_0, x_t, t, torch.cat([prediction, f], dim=1))
assert_close(mine, packaged, rtol=1e-3, atol=1e-6)
print(f"bits at t = 10: by hand {mine[1]:.3f}, helper package {packaged[1]:.3f}")

# %% [markdown]
# At $t = 0$ the network must name one of 256 grey levels. The Gaussian is cut into 256 intervals,
# the outer two reaching to infinity, so the probabilities add up to one:

# %%
levels = torch.arange(256) / 127.5 - 1
for mean, std in ((0.3, 0.02), (-0.99, 0.1), (1.2, 0.3)):
    log_p = discretized_gaussian_log_likelihood(levels, torch.tensor(mean), torch.tensor(std))
    print(f"mean {mean:5.2f}, deviation {std:.2f}: probabilities sum to {log_p.exp().sum():.3f}")

# %% [markdown]
# Which terms matter? We measure some of them for the trained network, with its fixed variance, on
# 48 images, and join the rest by straight lines. Along the way we keep the error of the predicted
# $\hat x_0$ for later.

# %%
some_t = [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 27, 37, 50, 68, 92, 125, 170, 230, 310, 420, 500]
some_t += [570, 650, 720, 800, 860, 910, 950, 975, 999]
x_0, y, terms, errors = images[:48], labels[:48], [], []
generator = torch.Generator().manual_seed(1)
for step in some_t:
    t = torch.full((48,), step, device=device)
    x_t = process.q_sample(x_0, t, torch.randn(x_0.shape, generator=generator).to(device))
    with torch.no_grad():
        prediction = model(x_t, t, y)
    terms.append(variational_bound_term(process, x_0, x_t, t, prediction, clip=True))
    errors.append((prediction - x_0).square().flatten(1).mean(1))

# %%
terms, errors = torch.stack(terms).cpu(), torch.stack(errors).cpu()
plot_lines(
    {"mean of 48 images": ([t + 1 for t in some_t], terms.mean(1))},
    x_label="t + 1",
    y_label="bits per dimension",
    log_x=True,
    log_y=True,
    markers=True,
    size=(720, 260),
    alt="Terms of the bound against t on log axes: 12 bits at t = 0, a tenth of a bit at t = 10, a "
    "thousandth at t = 100, and less at higher t",
)

# %% [markdown]
# Ten of the thousand terms hold nearly all of the bound, at noise levels that no eye can see.
# Together they are more than 8 bits, which storing the grey level itself would take: our network
# was trained for images, its loss caps the weight of the first timesteps, and the bound weights
# them most. It is a poor compressor with good taste, which leaves all the more to gain.
#
# ## Draw t where the bound is
#
# To train with the bound, one $t$ per image is drawn and stands for the sum of all. Drawn
# uniformly, it rarely hits a term that matters, and then counts a thousandfold. Nichol & Dhariwal
# (eq. 18) draw it with probability $p_t \propto \sqrt{\mathbb E[L_t^2]}$ and divide by it: the same
# mean, with the least possible scatter. The standard deviation of one such draw of $L_t / p_t$:

# %%
root = torch.from_numpy(np.interp(range(T), some_t, terms.square().mean(1).sqrt()))
total = np.interp(range(T), some_t, terms.mean(1)).sum()
importance = root / root.sum()
scatter = {
    "uniform": float((T * root.square().sum() - total**2) ** 0.5),
    "importance sampling": float((root.sum() ** 2 - total**2) ** 0.5),
}
assert scatter["importance sampling"] < scatter["uniform"] / 30
bars(
    scatter,
    x_label=f"standard deviation of one draw of L_t / p_t, in bits (the sum is {total:.1f})",
    log_x=True,
    number="{:.0f}",
    alt="Standard deviation of one draw: hundreds of bits with uniform t, a few with importance "
    "sampling",
)


# %% [markdown]
# A batch of one drawn this way is worth thousands drawn uniformly. (The paper estimates $\mathbb
# E[L_t^2]$ from the last ten values at each $t$, since it changes during training.)
#
# ## Teach the variance
#
# We leave the trained network as it is and add what gives $f$: one more convolution on the features
# that its last one reads. Then the mean stays the same, and every bit that is saved is owed to the
# variance. The features of frozen layers never change, so they are computed once. $t$ is drawn from
# $p_t$, mixed with a tenth of uniform draws so that no weight is large.

# %%
@torch.no_grad()
def draws(count, probability, data, seed):
    """Images, x_t and t, 1 / (T p_t), the last convolution's input, and the prediction."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(len(data), (count,), generator=generator)
    t = torch.multinomial(probability, count, replacement=True, generator=generator)
    x_0, y = to_float(data.images[which]).to(device), data.labels[which].to(device)
    noise = torch.randn(x_0.shape, generator=generator).to(device)
    x_t = process.q_sample(x_0, t.to(device), noise)
    hidden, predictions = [], []
    read = model.conv_out.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    for batch in torch.arange(count).split(64):
        predictions.append(model(x_t[batch], t[batch].to(device), y[batch]))
    read.remove()
    weight = (1 / (T * probability[t])).float().to(device)
    return x_0, x_t, t.to(device), weight, torch.cat(hidden), torch.cat(predictions)


def bound(head, x_0, x_t, t, weight, hidden, prediction, clip=False):
    """1 / (T p_t) L_t for each draw; without a head that of the fixed variance."""
    if head is None:
        return weight * variational_bound_term(process, x_0, x_t, t, prediction, clip)
    output = torch.cat([prediction, F.pixel_shuffle(head(hidden), profile.patch_size)], dim=1)
    return weight * variational_bound_term(learned, x_0, x_t, t, output, clip)


# %%
uniform = torch.full((T,), 1 / T, dtype=torch.float64)
mixed = 0.9 * importance + 0.1 * uniform
training = {name: draws(768, p, data, 1) for name, p in (("uniform", uniform), ("mixed", mixed))}


def train_head(drawn, factor=1.0, steps=120, peak=0.02):
    """The variance's convolution, trained on factor times the bound's mean; and its losses."""
    old = model.conv_out
    head = torch.nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1).to(device)
    torch.nn.init.zeros_(head.weight), torch.nn.init.zeros_(head.bias)  # halfway
    optimizer = torch.optim.Adam(head.parameters(), lr=peak, betas=(0.9, 0.99))
    generator, losses = torch.Generator().manual_seed(0), []
    for index in range(steps):
        batch = torch.randint(768, (32,), generator=generator).to(device)
        loss = bound(head, *(tensor[batch] for tensor in drawn)).mean()
        optimizer.zero_grad()
        (factor * loss).backward()
        optimizer.param_groups[0]["lr"] = peak * (1 + math.cos(math.pi * index / steps)) / 2
        optimizer.step()
        losses.append(T * loss.item())
    return head, losses


# %%
heads, curves = {"fixed variance": None}, {}
for name, key, factor in (
    ("learned, uniform t", "uniform", 1.0),
    ("learned, importance sampling", "mixed", 1.0),
    ("importance sampling, loss / 1000", "mixed", 0.001),
):
    heads[name], curves[name] = train_head(training[key], factor)

# %%
plot_lines(
    {name: curves[name] for name in list(curves)[:2]},
    x_label="training step",
    y_label="bound of the batch, in bits",
    log_y=True,
    size=(720, 280),
    alt="The bound of each batch against the training step on a log axis: with uniform t it jumps "
    "between a tenth and a hundred bits, with importance sampling it falls from 20 to 10 bits with "
    "little scatter",
)

# %% [markdown]
# ## How many bits does it save?
#
# The same trick measures the bound: 512 draws of images *held out*, the same for every variance.
# Their mean of $L_t / p_t$ estimates the whole sum without bias, and has a standard error.

# %%
test = draws(512, mixed, held_out, 2)
values = {}
with torch.no_grad():
    for name, head in heads.items():
        values[name] = T * bound(head, *test, clip=True).cpu()

# %%
bits = {name: value.mean().item() for name, value in values.items()}
error = {name: value.std().item() / len(value) ** 0.5 for name, value in values.items()}
saved = values["fixed variance"] - values["learned, importance sampling"]
assert saved.mean() > 5 and saved.mean() > 10 * saved.std() / len(saved) ** 0.5
bars(
    bits,
    errors=error,
    x_label="bits per dimension, mean of 512 draws, +- one standard error",
    number="{:.1f}",
    alt="Bits per dimension with error bars: 24 with the fixed variance, 15 with one learned from "
    "uniform t, 10 with importance sampling, 11 if the loss is divided by 1,000",
)

# %% [markdown]
# Same network, same mean: a learned variance saves a third of the bits, and with importance
# sampling more than half in as many steps. Where? We compare the terms, and look at $f$ itself.

# %%
x_0, x_t, t, weight, hidden, prediction = draws(256, mixed, held_out, 3)
with torch.no_grad():
    best = heads["learned, importance sampling"]
    f = F.pixel_shuffle(best(hidden), profile.patch_size).mean((1, 2, 3))
    pairs = {
        name: bound(head, x_0, x_t, t, torch.ones_like(weight), hidden, prediction, clip=True)
        for name, head in (("fixed variance", None), ("learned variance", best))
    }


def at_each_t(value):
    """The mean over the draws at each of the first timesteps: t + 1, mean."""
    first = [step for step in range(100) if (t == step).any()]
    return [step + 1 for step in first], [value[t == step].mean().item() for step in first]


# %%
plot_lines(
    {name: at_each_t(value) for name, value in pairs.items()},
    x_label="t + 1",
    y_label="bits per dimension",
    log_x=True,
    log_y=True,
    markers=True,
    size=(720, 260),
    alt="Terms of the bound: with the learned variance they are lower in the first eight timesteps "
    "and higher from about the fifteenth on",
)

# %%
plot_lines(
    {"mean of f": at_each_t(f)},
    x_label="t + 1",
    y_label="f",
    log_x=True,
    markers=True,
    hlines={"variance = upper bound": 1, "variance = lower bound": -1},
    size=(720, 220),
    alt="The mean of f at the first timesteps: between 2 and 5, above the upper bound at 1",
)

# %% [markdown]
# In the first timesteps, where the bits are, the learned variance is better; later it is a little
# worse, where there is little to lose. And $f$ leaves its interval: the variance is *larger* than
# the upper bound. That bound holds for a perfect mean, and this network's mean errs there by more
# than the noise. The variance has learned how wrong the network is.
#
# ## The hybrid loss, and what T does in it
#
# To train both at once, the *hybrid loss* is $L_\text{simple} + 0.001\,L_\text{vlb}$, and through
# $L_\text{vlb}$ no gradient reaches the prediction: the bound, which cares for invisible detail
# only, may teach the variance alone. Here is the network with the new convolution built in.

# %%
network = UNet(**model.config | {"out_channels": 6}).to(device)
weights = model.state_dict()
for name, new in best.state_dict().items():
    weights[f"conv_out.{name}"] = torch.cat([weights[f"conv_out.{name}"], new])
network.load_state_dict(weights)
network.eval()
more = sum(p.numel() for p in best.parameters())
print(f"{sum(p.numel() for p in network.parameters()):,} parameters, {more:,} of them new")

# %%
from noisout_nb.training import simple_loss

x_0, y = images[:32], labels[:32]
noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(2)).to(device)


def both_losses(t, probability):
    """L_simple and L_vlb from one t per image, drawn with these probabilities."""
    x_t, weight = learned.q_sample(x_0, t, noise), 1 / (T * probability[t].to(noise))
    prediction, f = learned.split_output(network(x_t, t, y), x_t)
    simple = (prediction - x_0).square().flatten(1).mean(1)  # the target is x_0 here
    output = torch.cat([prediction.detach(), f], dim=1)
    bound = variational_bound_term(learned, x_0, x_t, t, output)
    return (weight * simple).mean(), T * (weight * bound).mean()  # one t stands for T of them


t = 15 + T // 32 * torch.arange(32, device=device)
simple, vlb = both_losses(t, uniform)
packaged = simple_loss(network, learned, x_0, t, noise, y)
assert_close(simple + 0.001 * vlb, packaged)
print(f"by hand {simple + 0.001 * vlb:.2f}, helper package {packaged:.2f}")

# %%
parameters = dict(network.named_parameters())
of_simple = torch.autograd.grad(simple, parameters.values())
t = torch.multinomial(mixed, 32, True, generator=torch.Generator().manual_seed(3)).to(device)
of_bound = torch.autograd.grad(both_losses(t, mixed)[1], parameters.values())
channels = 3 * profile.patch_size**2
last = list(parameters).index("conv_out.weight")
print("gradient of L_simple for the variance: ", of_simple[last][channels:].abs().max().item())
print("gradient of L_vlb for the prediction:  ", of_bound[last][:channels].abs().max().item())


# %% [markdown]
# $L_\text{vlb}$ is a *sum* over $T$ terms, so one random $t$ must be multiplied by $T$, and
# $0.001\,T$ is 1 here. Forgetting it weights the bound a thousand times less. Does it matter?
#
# - *For the variance's own channels, no.* Their gradient comes from the bound alone, and Adam
#   divides each gradient by its own typical size, so a constant factor cancels. The figure of
#   the bits shows it: trained with a thousandth of the loss, the variance costs hardly more.
# - *For all layers below, it might.* There the bound's gradient is added to that of
#   $L_\text{simple}$. How large is it?

# %%
def norm(gradients):
    shared = [g for name, g in zip(parameters, gradients, strict=True) if "conv_out" not in name]
    return torch.cat([g.flatten() for g in shared]).norm().item()


bars(
    {
        "L_simple": norm(of_simple),
        "0.001 L_vlb, times T": 0.001 * norm(of_bound),
        "0.001 L_vlb, T forgotten": 0.001 * norm(of_bound) / T,
    },
    x_label="norm of the gradient in the shared layers",
    log_x=True,
    number="{:.2g}",
    alt="Norms of gradients on a log axis: the bound has less than half of that of L_simple; "
    "without T it is a thousandth of that",
)


# %% [markdown]
# With $T$ the bound has a say in the shared layers, here nearly half of that of $L_\text{simple}$;
# without it, none to speak of. So that is what $T$ decides: how much of the network works for the
# variance, and not whether the variance is learned.
#
# Do the samples look different? DDPM uses the learned variance in each step. Below, 25 steps with
# the fixed and the learned one, and with $f$ clamped to its interval, from the same noise and with
# the same random numbers:

# %%
class Clamped(torch.nn.Module):
    def forward(self, x, t, y=None):
        prediction, f = network(x, t, y).chunk(2, dim=1)
        return torch.cat([prediction, f.clamp(-1, 1)], dim=1)


six = torch.arange(6, device=device) % len(classes)
x_T = torch.randn(6, *images.shape[1:], generator=torch.Generator().manual_seed(5)).to(device)
rows = {"fixed": (model, process), "learned": (network, learned), "clamped": (Clamped(), learned)}
for name, pair in rows.items():
    generator = torch.Generator().manual_seed(6)
    *_, last_state = ddpm(*pair, x_T, six, steps=25, generator=generator)
    rows[name] = last_state.x.cpu()
filmstrip(
    list(rows.values()),
    row_labels=list(rows),
    column_labels=[classes[i] for i in six],
    scale=3,
    alt="Six flowers by DDPM with the fixed, the learned and the clamped variance: the same "
    "flowers; with the learned variance a daisy's petals and a starflower's centre get coloured "
    "spots, in the other two rows they are clean",
)

# %% [markdown]
# In the second row daisy and starflower get spots. $f$ was learned on 1,000 small steps. With 25
# the bounds lie far apart, and outside of them the formula extrapolates: it adds more noise than
# the steps that are left can remove. Inside, the eye sees no difference, since a likelihood is
# decided by details that cannot be seen. (Nichol & Dhariwal report that their network never left
# the interval, and that its learned variances let DDPM sample in fewer steps. Their mean was
# trained to a better bound than ours.) So the profiles of this series sample with the fixed
# variance.
#
# ## The cosine schedule
#
# The other half of the first paper is the schedule. The linear one of DDPM destroys the image
# early, so that its last steps go from noise to noise. Our network was trained with the cosine
# schedule, but what it can predict depends on the noise level $\sigma$ only (notebook 05). So we
# know its error at each timestep of either schedule, without another run:

# %%
linear = GaussianDiffusion.from_config("linear", prediction="x0")
schedules = {"linear": linear, "cosine": process}
rms, known = errors.mean(1).sqrt(), process.sigmas[some_t].log().cpu()
curves = {
    name: np.interp(p.sigmas.log().cpu().clamp(known[0], known[-1]), known, rms)
    for name, p in schedules.items()
}

# %%
plot_lines(
    curves,
    x_label="t",
    y_label=r"error of the predicted $\hat x_0$",
    size=(720, 260),
    alt="Root mean square error of the predicted image against t: with the linear schedule it has "
    "risen to its highest by t = 700 and stays there; with the cosine schedule it rises to the end",
)

# %%
ranges = ["below 0.1", "0.1 to 1", "1 to 10", "above 10"]
steps_spent = {}
for name, p in schedules.items():
    which = torch.bucketize(p.sigmas.cpu(), torch.tensor([0.1, 1, 10]))
    steps_spent[name] = dict(zip(ranges, which.bincount().tolist(), strict=True))
plot_bars(
    steps_spent,
    y_label=r"timesteps at noise level $\sigma$",
    number="{:.0f}",
    alt="Timesteps of both schedules in four ranges of the noise level: above 10 the linear "
    "schedule spends a third of its steps, the cosine schedule a sixteenth; from 0.1 to 1 it is "
    "the other way round",
)

# %% [markdown]
# Above $\sigma = 10$ hardly anything can be seen, and the linear schedule spends a third of its
# steps there. The cosine schedule moves them to where the image is decided. (A sampler may choose
# its noise levels itself, as notebook 05 does; then the schedule matters for training only, where
# it says how often each noise level is drawn.)
#
# ## The network that beat the GANs
#
# Dhariwal & Nichol tried, one by one: more depth, more heads of attention, attention at more
# resolutions, BigGAN's residual blocks for going down and up, division of residual sums by
# $\sqrt 2$; then heads of a fixed width, and the timestep as scale and shift of a norm instead of a
# sum. What each brought, on ImageNet at 128 x 128 after 700,000 steps, by their Tables 1 to 3:

# %%
change_of_fid = {
    "depth 4 instead of 2, narrower": -0.21,
    "4 heads instead of 1": -0.54,
    "attention at 32, 16, 8 instead of 16": -0.72,
    "BigGAN's blocks up and down": -1.20,
    "residual sums over the root of 2": 0.16,
    "heads, attention and BigGAN's blocks": -3.14,
    "64 channels per head (Table 2)": -1.03,
    "scale and shift (Table 3)": 13.06 - 15.08,
}
bars(
    change_of_fid,
    x_label="change of FID, from 15.33, or from 14.08 (Table 2) and 15.08 (Table 3)",
    width=820,
    number="{:+.2f}",
    alt="Changes of FID: all but the rescaled residual lower it; scale and shift by 2.0, BigGAN's "
    "blocks by 1.2, heads, attention and BigGAN's blocks together by 3.1",
)

# %% [markdown]
# Depth helped, too, but a deeper network takes longer to get as far as a wider one, so it was
# dropped. `UNet` has each of the others as an option. What do they cost? We take a network that
# trains in seconds, with patches of 4 x 4 pixels.

# %%
small = {"image_size": profile.image_size, "patch_size": profile.image_size // 8, "channels": 16}
small |= {"channel_mults": (1, 2), "num_res_blocks": 1, "num_classes": len(classes)}
base = {"attention_resolutions": (), "head_channels": 16, "scale_shift_norm": False}
adm = {"attention_resolutions": (8, 4), "head_channels": 8, "resblock_updown": True}
options = {
    "base": {},
    "scale and shift": {"scale_shift_norm": True},
    "attention": {"attention_resolutions": (8, 4)},
    "narrow heads": {"attention_resolutions": (8, 4), "head_channels": 8},
    "up/down blocks": {"resblock_updown": True},
    "rescaled": {"rescale_residual": True},
    "all but rescaled": adm | {"scale_shift_norm": True},
}


def build(name, seed=0):
    torch.manual_seed(seed)
    return UNet(**small | base | options[name]).to(device)


# %%
variants = {name: build(name) for name in options}
x, t = torch.randn(16, *images.shape[1:], device=device), torch.full((16,), 500, device=device)
y = torch.zeros(16, dtype=torch.int64, device=device)
for name, variant in variants.items():
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        variant(x, t, y)
    parameters = sum(p.numel() for p in variant.parameters())
    work = counter.get_total_flops() / 16e6
    print(f"{name:16} {parameters:8,} parameters {work:6.1f} MFLOP per image")


# %% [markdown]
# The time of a training step, forward and back, depends on the machine. We take turns, so that a
# machine that is busy for a moment treats all alike, and give the ratio to the base.

# %%
def seconds(variant):
    start = time.perf_counter()
    variant(x, t, y).square().mean().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


rounds = torch.tensor([[seconds(variant) for variant in variants.values()] for _ in range(8)])
median = rounds[1:].median(dim=0).values

# %% tags=["measurement"]
bars(
    dict(zip(variants, (median / median[0]).tolist(), strict=True)),
    x_label="time of a training step, relative to the base",
    number="{:.2f}",
    alt="Time of a training step of each variant relative to the base: attention costs most; "
    "blocks that go up and down cost something, the others hardly anything",
)


# %% [markdown]
# And what does each bring *here*? We train every variant from scratch for 30 steps, with three
# seeds, and compare the held-out loss. A seed fixes batches, timesteps and noise, so the variants
# of one seed are compared with each other.

# %%
def trained(name, seed):
    variant = build(name, seed)
    batches = Batches(data, 8, flip=profile.flip, seed=seed, device=device)
    ema = EMA(variant, 0.9)
    rules = {"weighting": profile.weighting, "max_weight": profile.max_weight}
    options = rules | {"steps": 30, "learning_rate": 4e-3}
    for _ in train(variant, process, batches, ema, seed=seed, **options):
        pass
    with ema.applied():
        return held_out_loss(variant, process, held_out, count=128, **rules)


# %%
losses = {name: torch.tensor([trained(name, seed) for seed in range(3)]) for name in options}
base_loss = losses.pop("base")
change = {name: 100 * (loss / base_loss - 1) for name, loss in losses.items()}
bars(
    {name: value.mean().item() for name, value in change.items()},
    errors={name: (value.std() / 3**0.5).item() for name, value in change.items()},
    x_label="change of the held-out loss in % of the base, 3 seeds, +- one standard error",
    number="{:+.0f}",
    alt="Change of the held-out loss against the base with error bars, for six variants",
)

# %% [markdown]
# None of the choices is a gain that counts, and some look like a loss: with three runs, a
# difference should exceed four standard errors before one believes it (Student's t with two degrees
# of freedom). That does not speak against the paper, which trained for 700,000 steps on a thousand
# kinds of object; we look at the first 30 steps on six kinds of flower. An ablation holds for its
# own scale, and differences of a few per cent need many seeds.
#
# What the options do to a residual sum can be read off a new block. It does nothing, since its last
# convolution starts at zero:

# %%
x, emb = torch.randn(2, 16, 8, 8), torch.randn(2, 64)
plain = ResBlock(16, 16, 64)(x, emb)
rescaled = ResBlock(16, 16, 64, rescale_residual=True)(x, emb)
down = ResBlock(16, 16, 64, resample="down")(x, emb)
assert_close(down, F.avg_pool2d(x, 2))
print(f"output / input: plain {(plain / x).mean():.2f}, rescaled {(rescaled / x).mean():.2f}")

# %% [markdown]
# Together and large, this is ADM for ImageNet at 64 x 64. We build it without giving it memory
# ("meta"), and count. The paper says 296 million:

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
count = sum(p.numel() for p in adm.parameters())
assert round(count / 1e6) == 296
print(f"{count:,} parameters")

# %% [markdown]
# ## Your turn
#
# Replace `None` and run the cell; it says whether you are right.
#
# **1. The best variance.** The mean of a step is off by $d$ on average (root mean square), and the
# posterior's variance is $\tilde\beta$. Which variance minimises the KL divergence? Give it for
# $\tilde\beta = 0.0004$ and $d = 0.03$.

# %% tags=["exercise"]
best_variance = None

check(
    "exercise 1",
    best_variance,
    0.0013,
    tolerance=1e-5,
    hint="Set the derivative of log v + (0.0004 + 0.03**2) / v to zero.",
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# The KL divergence is $\tfrac12\big(\log(v/\tilde\beta) + (\tilde\beta + d^2)/v - 1\big)$, and its
# derivative is zero at $v = \tilde\beta + d^2$:
#
# ```python
# best_variance = 0.0004 + 0.03**2
# ```
#
# So a network with a poor mean wants a variance above the "upper bound" $\beta_t$, and that is what
# we saw.
# </details>
#
# **2. The same mean, less scatter.** Three terms, $L = (8, 1, 1)$, the same for all images. With
# which probabilities does importance sampling draw them, and how large is the standard deviation of
# one draw of $L_t / p_t$ then? Give the four numbers as a list.

# %% tags=["exercise"]
numbers = None

check(
    "exercise 2",
    numbers,
    [0.8, 0.1, 0.1, 0.0],
    tolerance=1e-3,
    hint="p is proportional to L here; what is L / p for each of the three?",
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# numbers = [0.8, 0.1, 0.1, 0.0]
# ```
#
# $L_t/p_t$ is 10 for each of them, so nothing scatters. Uniformly it is 24, 3 or 3, with a standard
# deviation of 9.9.
# </details>
#
# **3. Wasted steps.** How many of the 1,000 timesteps of `linear` are noisier than $\sigma = 80$,
# where EDM starts to sample?

# %% tags=["exercise"]
wasted = None

check("exercise 3", wasted, int((linear.sigmas > 80).sum()), hint="linear.sigmas > 80")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# wasted = int((linear.sigmas > 80).sum())
# ```
# </details>
#
# Next: [10_editing](10_editing.ipynb) changes images instead of making new ones.
