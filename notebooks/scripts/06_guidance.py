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
# **What you'll do**: ask for a species and get it: with a classifier that looks at noisy pictures, and without one. On the way the network learns how
# uncertain it is, and you meet the network that beat the GANs.
#
# **What you'll learn**: what Dhariwal & Nichol (2021) added to Ho et al. (2020): the learned variance and its hybrid loss (from Nichol & Dhariwal 2021), the choices
# of their network, classifier guidance; then classifier-free guidance (Ho & Salimans 2022), which needs no classifier, and what each costs in diversity.
#
# **What you need**: notebooks 02 to 05. Under two minutes on two CPU cores; if 04 has not run on this machine, one or two more, because this
# notebook then runs it first.

# %%
import sys

if "google.colab" in sys.modules:  # there a notebook comes alone: fetch what it imports, once
    import subprocess

    subprocess.run("test -d noisOut || git clone -q --depth 1 https://github.com/noisOut/noisOut", shell=True, check=True)
    sys.path.insert(0, "noisOut")

# %%
import copy
import time

import ipywidgets as widgets
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from noisout_nb.data import load_data, species_labels, to_float
from noisout_nb.display import Again, Explorer, Picture, filmstrip, image_grid, plot_histograms, plot_lines, styled
from noisout_nb.forward_process import GaussianDiffusion, cosine_beta_schedule
from noisout_nb.guidance import ClassifierFreeGuidance, ClassifierGuidance, NoisyClassifier
from noisout_nb.parallel import get_device, memory_format
from noisout_nb.profiles import PROFILES, get_profile
from noisout_nb.sampling import SAMPLERS, dpm_solver, p_mean_variance, sample, sample_image
from noisout_nb.training import EMA, Batches, discretized_gaussian_log_likelihood, load_model, load_or_train, simple_loss, train, variational_bound_term
from noisout_nb.unet import ResBlock, UNet

# %%
torch.manual_seed(0)
profile, device = get_profile(), get_device()
model, process, classes = load_or_train(profile, device)
data, held_out = load_data(profile), load_data(profile, "val")
shape = (3, profile.image_size, profile.image_size)

# %% [markdown]
# ## Bayes' rule is all of it
#
# The network's noise is, up to a factor, a *score*: the direction in which a noisy picture becomes more probable. For one clean picture $x_0$ that is plain to see: $p(x_t \mid x_0)$ is a Gaussian around
# $\sqrt{\bar\alpha_t}\, x_0$ with the variance $1 - \bar\alpha_t$, so its logarithm has the gradient $-(x_t - \sqrt{\bar\alpha_t}\, x_0) / (1 - \bar\alpha_t) = -\epsilon / \sqrt{1 - \bar\alpha_t}$. Averaged over all $x_0$
# that $x_t$ may come from, the left side becomes $\nabla \log p(x_t)$, and $\epsilon$ the mean noise, which is what a network trained on squared errors answers: $\nabla \log p(x_t) = -\epsilon(x_t) / \sqrt{1 - \bar\alpha_t}$.
#
# We want the score of the pictures *of one species*. Bayes' rule, $p(x_t \mid y) \propto p(x_t)\, p(y \mid x_t)$, becomes a sum when we take logarithms and gradients:
#
# $$\nabla \log p(x_t \mid y) = \nabla \log p(x_t) + \nabla \log p(y \mid x_t).$$
#
# The first term is the network without label. The second is a classifier's gradient: how must the noisy picture change to look more like a daisy? Put a factor before it,
# the `guidance_scale`, and the condition counts for more, or less, than Bayes says. In terms of the noise:
#
# $$\hat\epsilon = \epsilon(x_t) - s \sqrt{1 - \bar\alpha_t}\, \nabla \log p(y \mid x_t).$$
#
# Let us first see it work where everything is known: "pictures" of a single pixel, distributed as $\mathcal N(0, 0.25^2)$. The perfect network can be written down, and so can
# its version for any other Gaussian.

# %%
toy = GaussianDiffusion(cosine_beta_schedule(1000), "eps")
prior_std, reading, error = 0.25, 0.3, 0.2


# %%
def signal_and_noise(t):
    return toy.sqrt_alphas_cumprod[t].view(-1, 1, 1, 1), toy.sqrt_one_minus_alphas_cumprod[t].view(-1, 1, 1, 1)


def perfect_noise(x, t, mean, std):
    a, b = signal_and_noise(t)
    return b * (x - a * mean) / (a**2 * std**2 + b**2)


# %% [markdown]
# The condition $y = 1$: a gauge whose error is 0.2 shows 0.3. A picture $x_0$ makes it do so with $p(y = 1 \mid x_0) = e^{-(x_0 - 0.3)^2 / (2 \cdot 0.2^2)}$. Of a noisy $x_t$ we know $x_0$ only up to
# a Gaussian, so that the classifier for noisy pictures is that exponential, averaged over it:

# %%
class Gauge(torch.nn.Module):
    def forward(self, x, t):
        a, b = signal_and_noise(t)
        total = a**2 * prior_std**2 + b**2
        mean, var = a * prior_std**2 / total * x, prior_std**2 * b**2 / total  # of x_0, given x_t
        log_p = 0.5 * (error**2 / (error**2 + var)).log() - (reading - mean) ** 2 / (2 * (error**2 + var))
        log_p = log_p.flatten(1).clamp(max=-1e-6)
        return torch.cat([(-log_p.expm1()).log(), log_p], dim=1)  # log p(y = 0), log p(y = 1)


# %% [markdown]
# Two Gaussians multiplied are a Gaussian, so we know where guidance must lead. Is the guided noise that of the narrower, shifted Gaussian?

# %%
tilted_std = (1 / prior_std**2 + 1 / error**2) ** -0.5
tilted_mean = tilted_std**2 * reading / error**2
unguided = lambda x, t, y=None: perfect_noise(x, t, 0.0, prior_std)

# %%
x, t = torch.randn(8, 1, 1, 1, generator=torch.Generator().manual_seed(0)), torch.arange(50, 850, 100)
y = torch.ones(8, dtype=torch.int64)
guided = ClassifierGuidance(unguided, toy, Gauge(), guidance_scale=1.0)

# %%
assert_close(guided(x, t, y), perfect_noise(x, t, tilted_mean, tilted_std), rtol=1e-4, atol=1e-5)

# %% [markdown]
# It is, at every $t$. The samplers of stage 5 need not know: `ClassifierGuidance` is called as a model is called.

# %%
x_T, y = torch.randn(4096, 1, 1, 1, generator=torch.Generator().manual_seed(1)), torch.ones(4096, dtype=torch.int64)
found = {}
for name, steps in {"ddpm": 1000, "ddim": 250, "dpm_solver": 100}.items():
    *_, last = SAMPLERS[name](guided, toy, x_T, y, steps=steps)
    found[name] = last.x

# %%
for x in found.values():
    assert abs(x.mean() - tilted_mean) < 0.01 and abs(x.std() - tilted_std) < 0.01

# %%
axis = torch.linspace(-1, 1, 201)
normal = lambda mean, std: torch.exp(-(((axis - mean) / std) ** 2) / 2) / (std * (2 * torch.pi) ** 0.5)
plot_histograms(found, curves={"unguided": (axis, normal(0, prior_std)), "Bayes": (axis, normal(tilted_mean, tilted_std))}, x_label="sample",
                alt="Guided samples of DDPM, DDIM and DPM-Solver++ follow the tilted density, which is narrower than the unguided one and shifted to the right")

# %% [markdown]
# Algorithm 1 of the paper does the same to DDPM's step in another way: it moves the *mean* by $s\, \Sigma\, \nabla \log p(y \mid x_t)$. Shifting the noise moves the mean, too, by
# $s\, \beta_t / \sqrt{\alpha_t}$ times the gradient. So both are one, with $\Sigma = \beta_t$ up to the factor $1 / \sqrt{\alpha_t} \approx 1$.

# %%
x, y, t = x_T[:8], y[:8], torch.full((8,), 500)
mean = p_mean_variance(unguided, toy, x, t, y, clip=False)[0]
mine = mean + toy.betas[500] / toy.alphas[500].sqrt() * guided.gradient(x, t, y)
assert_close(mine, p_mean_variance(guided, toy, x, t, y, clip=False)[0])

# %% [markdown]
# ## How uncertain is a step? The learned variance
#
# Before we guide flowers, the other half of the paper's toolbox. In stage 5 the network gave the mean of $p(x_{t-1} \mid x_t)$, and the variance was fixed: the posterior's $\tilde\beta_t$,
# which is right if the picture is known for certain. If nothing is known, it is $\beta_t$. Between these two must lie the truth. They differ at the last steps only:

# %%
ratio = process.posterior_log_variance.exp().cpu() / process.betas.cpu()
plot_lines({"lower over upper bound": ratio}, x_label="t", y_label="ratio of variances", log_x=True, size=(720, 240),
           alt="The ratio of the two bounds against t on a log axis: a half in the first steps, 0.9 at t = 10, nearly 1 from t = 100 on")

# %% [markdown]
# Yet these few steps decide about most of a picture's *likelihood*: they say how surprising its finest details are. So let a second half of the output, $f$ in about $-1..1$, interpolate between
# the logarithms (Nichol & Dhariwal 2021, eq. 15), with $w = (f + 1) / 2$ (the paper's $v$, a name that is taken here by the prediction):
#
# $$\Sigma = \exp(w \log \beta_t + (1 - w) \log \tilde\beta_t).$$

# %%
learned = GaussianDiffusion(cosine_beta_schedule(1000), "v", variance="learned").to(device)
f, t = torch.rand(4, 3, 8, 8, device=device) * 2 - 1, torch.tensor([1, 10, 100, 999], device=device)
w = (f + 1) / 2
mine = w * learned.betas[t].log().view(-1, 1, 1, 1) + (1 - w) * learned.posterior_variance[t].log().view(-1, 1, 1, 1)
assert_close(mine, learned.p_log_variance(f, t, f))

# %% [markdown]
# $L_\text{simple}$ does not see the variance, so it needs a loss of its own: the variational bound. It bounds from above the bits that the model needs to describe a picture, a sum of one
# term a step (notebook 07 takes it apart): how many bits it costs at $t$ that the network's $p(x_{t-1} \mid x_t)$ is not the true posterior $q(x_{t-1} \mid x_t, x_0)$. For $t > 0$ that is the
# Kullback-Leibler distance of two Gaussians, which is a formula. PyTorch knows it, too:

# %%
x_0 = to_float(held_out.images[:4]).to(device)
noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(2)).to(device)
x_t = learned.q_sample(x_0, t, noise)

# %%
output = torch.cat([learned.predict_v(x_0, t, noise) + 0.1, torch.rand(x_0.shape, device=device)], dim=1)  # a network that errs a little

# %%
answer, f = learned.split_output(output, x_t)
mean, _ = learned.q_posterior_mean_variance(learned.predict_start(x_t, t, answer), x_t, t)
true_mean, true_variance = learned.q_posterior_mean_variance(x_0, x_t, t)
p = torch.distributions.Normal(mean, (0.5 * learned.p_log_variance(x_t, t, f)).exp())

# %%
kl = torch.distributions.kl_divergence(torch.distributions.Normal(true_mean, true_variance.sqrt()), p)
mine = kl.flatten(1).mean(1) / np.log(2)
assert_close(mine, variational_bound_term(learned, x_0, x_t, t, output), rtol=1e-3, atol=1e-6)

# %% [markdown]
# At $t = 0$ the network must name one of 256 grey levels. The Gaussian is cut into 256 intervals, the outer two reaching to infinity, so the probabilities add up to one:

# %%
levels = torch.arange(256) / 127.5 - 1
for mean, std in ((0.3, 0.02), (-0.99, 0.1), (1.2, 0.3)):
    total = discretized_gaussian_log_likelihood(levels, torch.tensor(mean), torch.tensor(std)).exp().sum()
    assert abs(total - 1) < 1e-4

# %% [markdown]
# The hybrid loss is $L_\text{simple} + 0.001\, L_\text{vlb}$. $L_\text{vlb}$ is a sum over all $T$ terms, and one random $t$ stands for all of them: the factor before it is $T / 1000$, so 1 here. (Forget the $T$,
# and the variance learns a thousand times too slowly.) And the bound may teach only the variance: it would disturb the mean. So through it
# no gradient reaches the answer:

# %%
with torch.random.fork_rng():
    network = UNet(**model.config | {"out_channels": 6}).to(device)

# %%
torch.nn.init.normal_(network.conv_out.weight, std=0.1, generator=torch.Generator(device).manual_seed(0))
loss = simple_loss(network, learned, x_0, t, noise)
loss.backward()
hybrid_gradient = network.conv_out.weight.grad.view(6, -1).clone()  # of the 3 answer channels and the 3 variance ones

# %%
network.zero_grad()
output = network(x_t, t)
simple = F.mse_loss(output[:, :3], learned.predict_v(x_0, t, noise))
simple.backward()
simple_gradient = network.conv_out.weight.grad.view(6, -1)

# %%
assert_close(loss, simple + variational_bound_term(learned, x_0, x_t, t, output).mean())
assert_close(hybrid_gradient[:3], simple_gradient[:3], rtol=1e-3, atol=1e-6)
assert (simple_gradient[3:] == 0).all() and (hybrid_gradient[3:] != 0).any()


# %% [markdown]
# Does it pay? Two copies of the network of stage 4 train on for 200 steps, one with three more output channels and the hybrid loss. We drop the label of every third picture, since guidance
# will need a network that is good without one.

# %%
def train_on(process):
    weights, channels = model.state_dict(), 6 if process.variance == "learned" else 3
    if channels == 6:  # the new channels start at 0: halfway between the bounds
        weights |= {name: torch.cat([value, 0 * value]) for name, value in weights.items() if name.startswith(("conv_out", "input_skip"))}
    network = UNet(**model.config | {"out_channels": channels}).to(device, memory_format=memory_format(device, profile.autocast))
    network.load_state_dict(weights)
    ema = EMA(network, 0.99)
    batches = Batches(data, profile.batch_size, device=device)
    for _ in train(network, process, batches, ema, steps=200, learning_rate=profile.learning_rate * 2 / 3, label_dropout=1 / 3, autocast=profile.autocast):
        pass
    with ema.applied():
        return copy.deepcopy(network).eval().requires_grad_(False)


# %%
fixed = GaussianDiffusion(cosine_beta_schedule(1000), "v").to(device)
networks = {"fixed variance": (train_on(fixed), fixed), "learned variance": (train_on(learned), learned)}

# %% [markdown]
# The bits per dimension of 48 held-out pictures, for a first impression: the terms at some $t$, straight lines between them, added up. (Stage 7 takes all thousand.)

# %%
some_t = [0, 1, 2, 3, 5, 8, 12, 18, 27, 40, 60, 90, 130, 190, 270, 370, 500, 650, 800, 950, 999]
some = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))  # the photographs are sorted by species
x_0, y = to_float(held_out.images[some[:48]]).to(device), held_out.labels[some[:48]].to(device)


@torch.no_grad()
def bound_terms(network, process):
    generator, terms = torch.Generator().manual_seed(0), []
    for step in some_t:
        t = torch.full((len(x_0),), step, device=device)
        x_t = process.q_sample(x_0, t, torch.randn(x_0.shape, generator=generator).to(device))
        terms.append(variational_bound_term(process, x_0, x_t, t, network(x_t, t, y), clip=True).mean().item())
    return terms


# %%
terms = {name: bound_terms(*pair) for name, pair in networks.items()}
bits = {name: np.interp(range(1000), some_t, term).sum() for name, term in terms.items()}
assert bits["learned variance"] < bits["fixed variance"] - 0.1

# %%
plot_lines({f"{name}: {bits[name]:.2f} bits": ([t + 1 for t in some_t], term) for name, term in terms.items()}, x_label="t + 1", y_label="bits per dimension", log_x=True,
           log_y=True, markers=True, alt="Terms of the bound against t on log axes: with the learned variance they are lower in the first ten steps and the same later")

# %% [markdown]
# Fewer bits, all of them saved in the first few steps, where the bounds differ. The samplers use the learned variance where they need one (DDPM does). From here on the network with learned variance is ours:

# %%
network, process = networks["learned variance"]

# %% [markdown]
# ## The network that beat the GANs
#
# Dhariwal & Nichol tried, one by one: attention at more resolutions, heads of a fixed width, BigGAN's residual blocks for going down and up, division of residual sums by
# $\sqrt 2$, and the time as scale and shift of a norm instead of a sum. `UNet` has each as an option. What do they cost?

# %%
base = profile.network | {"attention_resolutions": (), "head_channels": profile.channels, "scale_shift_norm": False}
bottom = profile.image_size // profile.patch_size // 2 ** (len(profile.channel_mults) - 1)
options = {
    "base": {},
    "scale-shift": {"scale_shift_norm": True},
    "attention": {"attention_resolutions": (2 * bottom, bottom)},
    "narrow heads": {"attention_resolutions": (2 * bottom, bottom), "head_channels": profile.channels // 2},
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
    print(f"{name:12} {parameters:9,} parameters {counter.get_total_flops() / 8e6:7.1f} million FLOPs for a picture")

# %% [markdown]
# A new residual block is one that does nothing, since its last convolution starts at zero. So what the options do to the sum shows at once:

# %%
x, emb = torch.randn(2, 16, 8, 8), torch.randn(2, 64)
assert_close(ResBlock(16, 16, 64)(x, emb), x)
assert_close(ResBlock(16, 16, 64, rescale_residual=True)(x, emb), x / 2**0.5)
assert_close(ResBlock(16, 16, 64, resample="down")(x, emb), F.avg_pool2d(x, 2))

# %% [markdown]
# The time of a training step, forward and back, depends on the machine. We take turns, so that a machine that is busy for a moment treats all alike, and draw the ratio to the base.

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


# %%
@styled
def bars(values, x_label, alt):
    figure = Figure(figsize=(7.2, 0.5 + 0.32 * len(values)))
    axes = figure.add_subplot(xlabel=x_label)
    axes.bar_label(axes.barh(list(values), list(values.values()), color="#0072B2", height=0.6), fmt="%.2f", padding=4)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.1)
    return Picture.from_figure(figure, alt)


# %% tags=["measurement"]
bars(dict(zip(variants, (median / median[0]).tolist())), "time of a training step, relative to the base",
     "Time of a training step of each variant relative to the base: attention costs most, the more with narrow heads; blocks that go up and down cost something, the others hardly anything")

# %% [markdown]
# Together and large, this is the paper's network, ADM, for ImageNet at 64 x 64. We build it without giving it memory ("meta"), and count. The paper says 296 million:

# %%
with torch.device("meta"):
    adm = UNet(image_size=64, out_channels=6, channels=192, channel_mults=(1, 2, 3, 4), num_res_blocks=3, attention_resolutions=(32, 16, 8),
               head_channels=64, dropout=0.1, num_classes=1000, resblock_updown=True)

# %%
count = sum(p.numel() for p in adm.parameters())
print(f"{count:,} parameters, {count - adm.label_emb.weight.numel():,} of them without the labels' embedding")
assert round(count / 1e6) == 296


# %% [markdown]
# ## A classifier that has seen noise
#
# Now to the flowers. Steering begins when the picture is still all noise, so the classifier must know noisy pictures: the same encoder that is the UNet's left half, attention pooling on top, and training on $x_t$
# with $t$ from the whole range. Its targets are a little soft (a tenth of each label is spread over all species): a classifier that is soon sure has no gradient left to give.

# %%
def train_classifier(classifier, process, highest_t, steps, batch_size, label_smoothing=0.0):
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    batches, generator = Batches(data, batch_size, device=device), torch.Generator(device).manual_seed(0)
    for _, (x_0, y) in zip(range(steps), batches):
        t = torch.randint(highest_t, (len(y),), generator=generator, device=device)
        x_t = process.q_sample(x_0, t, torch.randn(x_0.shape, generator=generator, device=device))
        optimizer.zero_grad()
        F.cross_entropy(classifier(x_t, t), y, label_smoothing=label_smoothing).backward()
        optimizer.step()
        schedule.step()
    return classifier.eval().requires_grad_(False)


# %%
half = {"image_size": profile.image_size, "channels": profile.channels, "channel_mults": (1, 2, 4), "num_res_blocks": 1, "attention_resolutions": (), "patch_size": 2}
torch.manual_seed(1)
classifier = train_classifier(NoisyClassifier(process, len(classes), **half).to(device), process, 1000, steps=400, batch_size=64, label_smoothing=0.1)

# %%
x_0, y = to_float(held_out.images[some[:256]]).to(device), held_out.labels[some[:256]].to(device)
grid = list(range(0, 1000, 111))


@torch.no_grad()
def accuracy_at(step):
    t = torch.full(y.shape, step, device=device)
    x_t = process.q_sample(x_0, t, torch.randn(x_0.shape, generator=torch.Generator().manual_seed(step)).to(device))
    return (classifier(x_t, t).argmax(1) == y).float().mean().item()


# %%
accuracies = [accuracy_at(step) for step in grid]
assert accuracies[0] > 2 / len(classes) and (accuracies[0] > accuracies[-1] + 0.1 or profile.dataset == "flowers102")

# %%
plot_lines({"held-out pictures": (grid, accuracies)}, x_label="t", y_label="accuracy", markers=True, size=(720, 260), hlines={"chance": 1 / len(classes)},
           alt="Accuracy of the classifier against t: nearly 1 up to t = 600, then falling to about chance at t = 999")

# %% [markdown]
# At $t = 999$ there is nothing to see, and the accuracy is that of guessing, give or take a few pictures. Now the gradient $\nabla \log p(y \mid x_t)$, as a picture: what would have to change in noisy flowers at $t = 800$, on the
# average of 256, to make each species more probable? Red where red must be added, and so on; grey is no change.

# %%
six = species_labels([name for name in ("daisy", "poppy", "forget-me-not", "cosmos", "sunflower", "starflower")] if len(classes) == 6
                     else ["oxeye daisy", "corn poppy", "water lily", "rose", "sunflower", "hibiscus"], classes).to(device)
names = [classes[label] for label in six]

# %%
t = torch.full((256,), 800, device=device)
x_t = process.q_sample(x_0, t, torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(device))
steering = ClassifierGuidance(network, process, classifier, 1.0)
gradient = torch.stack([steering.gradient(x_t, t, label.expand(256)).mean(0) for label in six])

# %% [markdown]
# Where one species gains, the others lose: weighted with their probabilities, the gradients towards all species cancel.

# %%
x, t_one = x_t[:1].repeat(len(classes), 1, 1, 1), t[: len(classes)]
probability = classifier(x, t_one)[0].softmax(0).view(-1, 1, 1, 1)
towards_all = steering.gradient(x, t_one, torch.arange(len(classes), device=device))
assert (probability * towards_all).sum(0).abs().max() < 1e-3 * towards_all.abs().max()

# %%
gradient = gradient / gradient.abs().amax(dim=(1, 2, 3), keepdim=True)
image_grid(gradient.cpu(), columns=6, column_labels=names,
           alt="The mean gradient towards each of six species: in the middle the colour of its petals, towards the border grey")

# %% [markdown]
# ## Turning the knob
#
# One noise, growing scale: in each row the species is asked for more strongly. The network itself is never told the species; the classifier alone steers.

# %%
x_T = torch.randn(6, *shape, generator=torch.Generator().manual_seed(5)).to(device)


# %%
def draw(wrapper, x_T, y):
    *_, last = dpm_solver(wrapper, process, x_T, y, steps=10)
    return last.x


# %%
by_classifier = {f"scale {s}": ClassifierGuidance(network, process, classifier, float(s)) for s in (0, 1, 3, 10, 40, 80)}

# %%
filmstrip([draw(wrapper, x_T, six).cpu() for wrapper in list(by_classifier.values())[::2]], row_labels=list(by_classifier)[::2], column_labels=names, scale=3,
          alt="Six flowers at growing scale of classifier guidance: at 0 patchworks of any kind, then more and more of the colour and form that was asked for")

# %% [markdown]
# And without a classifier? Bayes' rule again: the network, asked with and without label, holds a classifier's gradient within itself, $\nabla \log p(y \mid x_t) = \nabla \log p(x_t \mid y) - \nabla \log p(x_t)$. Put in:
#
# $$\hat\epsilon = \epsilon(x_t) + s\, \big(\epsilon(x_t, y) - \epsilon(x_t)\big).$$
#
# At scale 0 it is the network without label, at 1 with label, beyond 1 it goes too far on purpose. (Ho & Salimans' own $w$ is $s - 1$.) The price is a second call of the network in each step. The network can answer without a label because labels were dropped in training.

# %%
t, with_label = torch.full((6,), 500, device=device), ClassifierFreeGuidance(network, 3.0)
with torch.no_grad():
    without, conditional = network(x_T, t), network(x_T, t, six)
    mine = without[:, :3] + 3 * (conditional[:, :3] - without[:, :3])
    assert_close(mine, with_label(x_T, t, six)[:, :3], rtol=1e-4, atol=1e-4)
    assert_close(conditional[:, 3:], with_label(x_T, t, six)[:, 3:], rtol=1e-4, atol=1e-4)  # the variance is not guided

# %%
classifier_free = {f"scale {s}": ClassifierFreeGuidance(network, float(s)) for s in (0, 0.5, 1, 2, 4, 8)}

# %% tags=["cover"]
filmstrip([draw(wrapper, x_T, six).cpu() for wrapper in list(classifier_free.values())[::2]], row_labels=list(classifier_free)[::2], column_labels=names, scale=3,
          alt="Six flowers at growing scale of classifier-free guidance: at 0 patchworks of any kind, at 1 the species, at 4 the same flower in glaring colours")


# %% [markdown]
# In the toy world the two are the same thing exactly, since there the network holds the perfect classifier:

# %%
class BothGaussians(torch.nn.Module):
    num_classes, null_label = 1, 1

    def forward(self, x, t, y):
        return torch.where((y == 0).view(-1, 1, 1, 1), perfect_noise(x, t, tilted_mean, tilted_std), perfect_noise(x, t, 0.0, prior_std))


# %%
x, t, label = torch.randn(8, 1, 1, 1, generator=torch.Generator().manual_seed(0)), torch.arange(50, 850, 100), torch.zeros(8, dtype=torch.int64)
free = ClassifierFreeGuidance(BothGaussians(), 3.0)(x, t, label)
assert_close(free, ClassifierGuidance(unguided, toy, Gauge(), 3.0)(x, t, label + 1), rtol=1e-3, atol=1e-4)

# %% [markdown]
# ## What it costs
#
# A picture of scale 8 is unmistakably a poppy, but is it still *any* poppy? We measure both. *Fidelity*: does a second classifier, which has no part in the guidance, name the species that was asked for?
# *Diversity*: how unlike each other are two pictures of the same species, relative to two real ones?

# %%
torch.manual_seed(2)
judge = train_classifier(NoisyClassifier(process, len(classes), **half).to(device), process, 300, steps=200, batch_size=32)


@torch.no_grad()
def fidelity(pictures, y):
    t = torch.full(y.shape, 50, device=device)  # a trace of noise: the judge shall look at the flower, not at single pixels
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0)).to(device)
    return (judge(process.q_sample(pictures, t, noise), t).argmax(1) == y).float().mean().item()


# %%
print("the judge on held-out pictures is", "right almost always" if fidelity(x_0, y) > 0.98 else "sometimes wrong")


# %%
def spread(pictures, labels):
    """One minus the correlation of two pictures of the same species, on average: blind to contrast."""
    correlations = [torch.corrcoef(pictures[labels == k].flatten(1)) for k in six]
    return 1 - sum((c.sum() - len(c)) / (len(c) * (len(c) - 1)) for c in correlations).item() / len(six)


# %%
asked = six.repeat(12)
many = torch.randn(len(asked), *shape, generator=torch.Generator().manual_seed(3)).to(device)
real, real_labels = to_float(held_out.images).to(device), held_out.labels.to(device)

# %%
trade = {}
for method, wrappers in {"classifier": by_classifier, "classifier-free": classifier_free}.items():
    drawn = [draw(wrapper, many, asked) for wrapper in wrappers.values()]
    trade[method] = [fidelity(x, asked) for x in drawn], [spread(x, asked) / spread(real, real_labels) for x in drawn]

# %%
for (fidelities, diversities), enough in zip(trade.values(), (0.85, 0.95)):
    assert max(fidelities) >= enough > 0.5 > fidelities[0] or profile.dataset == "flowers102", "the best scale is right, scale 0 is left to chance"
    assert min(diversities) < 0.9 * diversities[0]

# %%
plot_lines({f"{name}: best {max(f):.0%}, unguided {f[0]:.0%}": (d, f) for name, (f, d) in trade.items()}, x_label="diversity (1: that of real pictures of a species)", y_label="fidelity",
           markers=True, alt="Fidelity against diversity at six scales of both methods: from low and diverse at scale 0 to high and uniform; classifier-free guidance reaches higher")

# %% [markdown]
# Both methods trade the one for the other, as the paper's Figure 4 shows for ImageNet. At scale 0 each "species" is a mixture of all, and patchwork between them: too diverse. Classifier-free guidance
# comes closest to the real pictures' own diversity with every picture recognised; further on its flowers resemble each other more than real ones do, until at the end the glaring colours
# break them up again.
#
# ## By name
#
# The networks in `models/` know 102 species of photographed flowers, one at 64 x 64 pixels, the other one at 32 x 32. `sample_image` turns names into labels, and classifier-free guidance does the rest, at scale 3 unless told otherwise. (How well, stage 7 will measure.)

# %%
wanted = ["sunflower", "rose", "hibiscus", "osteospermum", "bird of paradise", "passion flower"]
image_grid(sample_image(2 * wanted, steps=15, seed=4), columns=6, scale=2, column_labels=wanted,
           alt="Generated flowers, two of each of six species, each column in colours of its own")

# %% [markdown]
# Your choice, from the smaller network: a species, a scale, and new noise as often as you like. Four flowers take a second or two.

# %%
flowers, flower_process, species = load_model(PROFILES["flowers32"].weights, device)
side = flowers.config["image_size"]


def ask(species_name, guidance, noise):
    labels = species_labels([species_name] * 4, species).to(device)
    x_T = torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(noise)).to(device)
    for count, state in enumerate(dpm_solver(ClassifierFreeGuidance(flowers, guidance), flower_process, x_T, labels, steps=15), 1):
        yield count / 15
    yield image_grid(state.x.cpu(), scale=4, alt=f"Four generated flowers of the species {species_name}, guidance scale {guidance:g}")


# %%
Explorer(ask, species_name=widgets.Dropdown(options=sorted(species), value="sunflower", description="species"),
         guidance=widgets.FloatSlider(3, min=0, max=8, step=0.5, continuous_update=False), noise=Again("new noise"))

# %% [markdown]
# A name that it does not know, a label that no species has, a scale for the wrong number of pictures, a network without what is asked of it: each says what is wrong.

# %%
plain = UNet(**profile.network)
for call in (
    lambda: sample_image("sun flower"),
    lambda: ClassifierGuidance(network, process, classifier, 1.0)(x_T, torch.zeros_like(six), six + 1000),
    lambda: ClassifierGuidance(network, process, classifier, torch.ones(5))(x_T, torch.zeros_like(six), six),
    lambda: ClassifierGuidance(network, process, classifier, 1.0)(x_T, torch.zeros_like(six)),
    lambda: ClassifierFreeGuidance(plain, 2.0),
    lambda: plain(x_T.cpu(), torch.zeros(6, dtype=torch.int64), six.cpu()),
    lambda: sample(plain, copy.deepcopy(learned).cpu(), shape=shape),
):
    try:
        call()
    except ValueError as error:
        print(error, "\n")

# %% [markdown]
# ## Exercises
#
# 1. `guidance_scale` may be a tensor, one number for each picture. Draw a row of eight poppies (or your favourite) from one noise, the scale growing from 0 to 7, in one call.

# %% tags=["exercise"]
scales = ...

# %% tags=["solution"]
scales = torch.arange(8.0)
row = draw(ClassifierFreeGuidance(network, scales), x_T[1:2].repeat(8, 1, 1, 1), six[1:2].repeat(8))

# %% tags=["solution"]
image_grid(row.cpu(), column_labels=[f"scale {s:.0f}" for s in scales], alt="Eight pictures from one noise: at scale 0 any flower, from 1 on the one that was asked for, in ever stronger colours")


# %% [markdown]
# 2. Guidance is needed while it is being decided *what* the picture shows. Write a wrapper `GuideEarly` that guides (scale 4) only at $t > 400$, and asks the network with its label
# but without guidance later. Are the colours less glaring?

# %% tags=["exercise"]
class GuideEarly(torch.nn.Module):
    def forward(self, x, t, y=None): ...


# %% tags=["solution"]
class GuideEarly(torch.nn.Module):
    def forward(self, x, t, y=None):
        return ClassifierFreeGuidance(network, torch.where(t > 400, 4.0, 1.0))(x, t, y)


# %% tags=["solution"]
always, early = draw(ClassifierFreeGuidance(network, 4.0), x_T, six), draw(GuideEarly(), x_T, six)
glaring = lambda pictures: (pictures.abs() > 0.95).float().mean()
assert glaring(early) < glaring(always) or profile.dataset == "flowers102"

# %% tags=["solution"]
filmstrip([always.cpu(), early.cpu()], row_labels=["always", "early"], column_labels=names, scale=3,
          alt="Six flowers guided throughout, and only early: the latter have the same forms and softer colours")

# %% [markdown]
# From here: guidance made the pictures "better" by the judge's measure. How good they really are, and by which measures one may say so, is the question of stage 7.
