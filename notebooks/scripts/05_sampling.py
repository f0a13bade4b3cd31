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
# # 05 Draw flowers out of noise
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/noisOut/noisOut/blob/main/notebooks/05_sampling.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/noisOut/noisOut/main?labpath=notebooks/05_sampling.ipynb)
#
# **What you'll do**: run the process of stage 2 backwards with the network of stage 4, in a thousand steps, then in fifty, then in ten.
#
# **What you'll learn**: Algorithm 2 of Ho et al. (2020), why the network's guess is clamped and the last step adds no noise, what DDIM and
# DPM-Solver++ do differently, and how to walk from one flower to another.
#
# **What you need**: notebooks 02 to 04. Under two minutes on two CPU cores; if 04 has not run on this machine, one or two more, because this
# notebook then runs it first.

# %%
import sys

if "google.colab" in sys.modules:  # there a notebook comes alone: fetch what it imports, once
    import subprocess

    subprocess.run("test -d noisOut || git clone -q --depth 1 https://github.com/noisOut/noisOut", shell=True, check=True)
    sys.path.insert(0, "noisOut")

# %%
import ipywidgets as widgets
import torch
from torch.testing import assert_close

from noisout_nb.data import factor_distance, load_data, species_labels, to_float
from noisout_nb.display import Again, Explorer, filmstrip, image_grid, plot_histograms, plot_lines, progress
from noisout_nb.forward_process import GaussianDiffusion, linear_beta_schedule
from noisout_nb.parallel import get_device
from noisout_nb.profiles import PROFILES, get_profile
from noisout_nb.sampling import SAMPLERS, ddim, ddpm, dpm_solver, p_mean_variance, sample, sample_image
from noisout_nb.training import load_model, load_or_train

# %%
torch.manual_seed(0)
profile, device = get_profile(), get_device()

# %%
model, process, classes = load_or_train(profile, device)
T, shape = process.timesteps, (3, profile.image_size, profile.image_size)
print(f"a network of {sum(p.numel() for p in model.parameters()):,} parameters that knows {len(classes)} species")

# %% [markdown]
# ## One step back
#
# Somewhere in the chain, we hold a noisy $x_t$. If we knew the clean $x_0$, stage 2 would tell us exactly how $x_{t-1}$ is distributed: as the
# posterior $q(x_{t-1} \mid x_t, x_0)$, a Gaussian. We don't, but the network has a guess. So: ask the network, turn its answer into $\hat x_0$, and take
# the posterior as if the guess were true. That is all there is to $p_\theta(x_{t-1} \mid x_t)$.

# %%
held_out = load_data(profile, "val")
x_0 = torch.stack([held_out[i][0] for i in range(6)]).to(device)
y = torch.tensor([held_out[i][1] for i in range(6)], device=device)

# %%
t = torch.tensor([100, 250, 400, 550, 700, 850], device=device)
x_t = process.q_sample(x_0, t, torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1)).to(device))

# %%
with torch.no_grad():
    x_start = process.predict_start(x_t, t, model(x_t, t, y)).clamp(-1, 1)
    mean, variance = process.q_posterior_mean_variance(x_start, x_t, t)
    for mine, helpers in zip((mean, variance, x_start), p_mean_variance(model, process, x_t, t, y)):
        assert_close(mine, helpers)

# %% [markdown]
# The guess is good where there is little noise. The more noise, the vaguer it gets: from the same $x_t$ many flowers are possible, and the network
# answers with their average.

# %%
filmstrip([x_0, x_t, x_start], row_labels=["$x_0$", "$x_t$", r"guessed $\hat x_0$"], column_labels=[f"t = {int(i)}" for i in t],
          alt="Six flowers, their noisy versions at rising t, and the network's guesses: near perfect at t = 100, a blurred flower at t = 850")


# %% [markdown]
# ## Algorithm 2
#
# Repeat that from $t = T-1$ down to 0, adding fresh noise of the posterior's variance each time, but none at the last step: what
# is drawn there is the picture itself, and noise on it would stay for good.

# %%
def my_ddpm(x, y, generator):
    for i in reversed(range(T)):
        t = torch.full((len(x),), i, device=device)
        mean, variance, x_start = p_mean_variance(model, process, x, t, y)
        noise = torch.randn(x.shape, generator=generator, device=device) if i > 0 else 0
        x = mean + variance.sqrt() * noise
    return x


# %% [markdown]
# A thousand steps with two pictures, by hand and by the helper, from the same noise and with the same random numbers:

# %%
x_T = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2)).to(device)
species = torch.tensor([0, 3], device=device)
with torch.no_grad():
    mine = my_ddpm(x_T, species, torch.Generator(device).manual_seed(3))
states = list(ddpm(model, process, x_T, species, generator=torch.Generator(device).manual_seed(3)))
assert_close(mine, states[-1].x, atol=1e-3, rtol=0)
print(f"{len(states)} states, from t = {states[0].t} to t = {states[-1].t}")

# %% [markdown]
# The helper is a generator: it yields every state, so the loop can be watched. Above the picture just after the step at time t, below the clean one that the network believed in. The
# guess knows colour and place from the first frame and then gains detail; in the picture itself the flower appears about half-way, and the last noise goes at the end.

# %% tags=["cover"]
shown = [0, 200, 400, 600, 700, 800, 900, 950, 999]
filmstrip([[states[i].x[1].cpu() for i in shown], [states[i].x_start[1].cpu() for i in shown]], row_labels=["after the step", r"$\hat x_0$"],
          column_labels=[f"t = {states[i].t}" for i in shown], arrow="the reverse process",
          alt="The reverse film: noise turns into a flower; below, the predicted flower goes from a blurred disc to ragged petals")

# %% [markdown]
# ## Three traps
#
# **The last step.** The posterior's variance at $t=0$ is zero, so the last state is its own guess:

# %%
assert torch.equal(states[-1].x, p_mean_variance(model, process, states[-2].x, torch.zeros(2, dtype=torch.int64, device=device), species)[0])
assert_close(states[-1].x, states[-1].x_start)

# %% [markdown]
# **The clamp.** A network that predicts $\epsilon$ has its error multiplied by $\sqrt{1-\bar\alpha_t}/\sqrt{\bar\alpha_t}$ on the way to $\hat x_0$ (notebook 02), which at large $t$ means far outside
# $[-1, 1]$. Ours predicts $v$, whose error does not grow so, but may leave the range, too. A picture cannot be there, so $\hat x_0$ is clamped (never $x_t$, which has every right to be large).

# %%
assert all(state.x_start.abs().max() <= 1 for state in states)
assert states[0].x.abs().max() > 2, "a noisy state must not be clamped"

# %% [markdown]
# **The start.** The first step must happen at $t = T-1$, whatever the number of steps: a network that is told "t = 980" and shown pure noise believes that
# some of the noise is flower. And the last step must arrive at a clean picture.

# %%
for steps in (10, 13, 20, 50):
    visited = [state.t for state in ddim(model, process, x_T, species, steps=steps)]
    assert visited[0] == T - 1 and len(visited) == steps and visited == sorted(set(visited), reverse=True)
    print(f"{steps} steps: {', '.join(map(str, visited[:3]))}, ..., {visited[-1]}, done")


# %% [markdown]
# ## Is the mathematics right? A case with a known answer
#
# Let the "pictures" be single numbers from a Gaussian with mean 0.3 and standard deviation 0.2. Then the best possible guess of $x_0$ is known in closed
# form, and no training is needed:
#
# $$ \mathbb E[x_0 \mid x_t] = \mu + \frac{\sqrt{\bar\alpha_t}\,\sigma^2}{\bar\alpha_t\sigma^2 + 1 - \bar\alpha_t}\,(x_t - \sqrt{\bar\alpha_t}\,\mu) $$

# %%
class PerfectDenoiser(torch.nn.Module):
    def __init__(self, process, mean=0.3, std=0.2):
        super().__init__()
        self.process, self.mean, self.std = process, mean, std

    def forward(self, x, t, y=None):
        alpha_bar = self.process.alphas_cumprod[t].view(-1, 1, 1, 1)
        gain = alpha_bar.sqrt() * self.std**2 / (alpha_bar * self.std**2 + 1 - alpha_bar)
        x_start = self.mean + gain * (x - alpha_bar.sqrt() * self.mean)
        return self.process.predict_noise_from_start(x, t, x_start)


# %% [markdown]
# From pure noise, every sampler must arrive at that Gaussian. With all the steps, all three do:

# %%
toy = GaussianDiffusion(linear_beta_schedule(), prediction="eps")
x_T = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(4))
ends = {}
for name, sampler in SAMPLERS.items():
    *_, last = sampler(PerfectDenoiser(toy), toy, x_T, steps=T)
    ends[name] = last.x
    assert abs(last.x.mean() - 0.3) < 0.01 and abs(last.x.std() - 0.2) < 0.01, name

# %%
grid = torch.linspace(-0.6, 1.2, 200)
density = torch.distributions.Normal(0.3, 0.2).log_prob(grid).exp()
plot_histograms(ends, x_label="sample", curves={"the true density": (grid, density)},
                alt="Histograms of the samples of DDPM, DDIM and DPM-Solver++ all follow the true Gaussian density")

# %% [markdown]
# Fewer steps are larger steps, and each takes $\hat x_0$ for granted a little too long: the samples crowd around the mean. With a known answer we can see by how much.
# (The other two samplers are explained below; mind how few steps the last one needs.)

# %%
counts = (5, 10, 20, 50, 100, 200, 500)
spread = {name: [list(sampler(PerfectDenoiser(toy), toy, x_T, steps=n))[-1].x.std() for n in counts] for name, sampler in SAMPLERS.items()}
plot_lines({name: (counts, values) for name, values in spread.items()}, x_label="steps", y_label="standard deviation", markers=True, log_x=True,
           hlines={"the true one": 0.2}, alt="Standard deviation of the samples against steps: all rise towards the true 0.2; DPM-Solver++ is closest throughout")


# %% [markdown]
# And an oracle that knows the one true noise must bring back the very picture, along any path:

# %%
class Oracle(torch.nn.Module):
    def forward(self, x, t, y=None):
        answer = process.predict_noise_from_start(x, t, x_0)
        return answer if process.prediction == "eps" else process.predict_v(x_0, t, answer)


for sampler in SAMPLERS.values():
    *_, last = sampler(Oracle(), process, torch.randn_like(x_0), steps=20)
    assert_close(last.x, x_0, atol=1e-4, rtol=0)


# %% [markdown]
# ## DDIM: the same network, fewer steps, no dice
#
# Song et al. (2021) noticed that the training only ever uses $q(x_t \mid x_0)$. Any backward path with these marginals will do, also one without
# fresh noise: from $x_t$, the guess $\hat x_0$ and the noise $\hat\epsilon$ that goes with it, mix the two again in the proportion of an earlier time:
#
# $$ x_{s} = \sqrt{\bar\alpha_{s}}\;\hat x_0 + \sqrt{1-\bar\alpha_{s}}\;\hat\epsilon $$

# %%
def my_ddim(x, y, steps):
    times = [T * k // steps - 1 for k in range(steps, 0, -1)]
    for now, then in zip(times, [*times[1:], -1]):
        t = torch.full((len(x),), now, device=device)
        x_start = process.predict_start(x, t, model(x, t, y)).clamp(-1, 1)
        noise = process.predict_noise_from_start(x, t, x_start)
        alpha_bar = process.alphas_cumprod[then] if then >= 0 else torch.ones((), device=device)
        x = alpha_bar.sqrt() * x_start + (1 - alpha_bar).sqrt() * noise
    return x


# %%
x_T = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2)).to(device)
with torch.no_grad():
    mine = my_ddim(x_T, species, 50)
*_, last = ddim(model, process, x_T, species, steps=50)
assert_close(mine, last.x, atol=1e-4, rtol=0)

# %% [markdown]
# Without dice, the same noise gives the same flower, always. With `eta=1` the dice are back, and DDIM *is* DDPM: the same variance, the same mean.

# %%
*_, again = ddim(model, process, x_T, species, steps=50)
assert torch.equal(again.x, last.x)

dice = lambda: torch.Generator(device).manual_seed(5)
*_, a = ddim(model, process, x_T, species, steps=100, eta=1.0, generator=dice())
*_, b = ddpm(model, process, x_T, species, steps=100, generator=dice())
assert_close(a.x, b.x, atol=1e-3, rtol=0)


# %% [markdown]
# ## DPM-Solver++: look back to see ahead
#
# DDIM treats $\hat x_0$ as fixed during a step. But it moves, and from its last two values one can see where to: DPM-Solver++(2M) (Lu et al. 2022) extends
# that line to the middle of the step. Time is measured in $\lambda = \log(\sqrt{\bar\alpha}/\sqrt{1-\bar\alpha})$, half the logarithm of the signal-to-noise ratio; with $h$ the length of this step and
# $r$ the last one's length over it, the paper's formula reads (in its own letters: this $\alpha$ is not DDPM's $1 - \beta$)
#
# $$ D = \Big(1 + \tfrac{1}{2r}\Big)\hat x_0 - \tfrac{1}{2r}\,\hat x_0^\text{before}, \qquad x_s = \frac{\sigma_s}{\sigma_t}\,x_t - \alpha_s\,(e^{-h} - 1)\,D, \qquad \alpha = \sqrt{\bar\alpha},\ \sigma = \sqrt{1-\bar\alpha} $$

# %%
def my_dpm_solver(x, y, steps):
    times = [T * k // steps - 1 for k in range(steps, 0, -1)]
    alpha_bar = torch.cat([process.exact_alphas_cumprod[times], torch.ones(1, dtype=torch.float64)])
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    lambda_, before = (alpha / sigma).log(), None
    for i, now in enumerate(times):
        t, h = torch.full((len(x),), now, device=device), lambda_[i + 1] - lambda_[i]
        x_start = target = process.predict_start(x, t, model(x, t, y)).clamp(-1, 1)
        if 0 < i < steps - 1:
            r = (lambda_[i] - lambda_[i - 1]) / h
            target = (1 + 1 / (2 * r)) * x_start - before / (2 * r)
        x, before = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * ((-h).exp() - 1) * target, x_start
    return x


# %% [markdown]
# The helper says the same more shortly: with $D$ in the place of $\hat x_0$, and the noise that goes with it, the step is DDIM's.

# %%
with torch.no_grad():
    mine = my_dpm_solver(x_T, species, 20)
*_, last = dpm_solver(model, process, x_T, species, steps=20)
assert_close(mine, last.x, atol=1e-4, rtol=0)

# %% [markdown]
# Same noise, same network, 10, 20 and 50 steps:

# %%
x_T = torch.randn(4, *shape, generator=torch.Generator().manual_seed(6)).to(device)
species = torch.tensor([1, 2, 3, 4], device=device)
rows = {}
for name, sampler in SAMPLERS.items():
    for steps in (10, 20, 50):
        dice = {"generator": torch.Generator(device).manual_seed(7)} if sampler is ddpm else {}
        *_, state = sampler(model, process, x_T, species, steps=steps, **dice)
        rows[f"{name}, {steps}"] = state.x.cpu()

# %%
filmstrip(list(rows.values()), row_labels=list(rows), scale=2,
          alt="Four samples by DDPM, DDIM and DPM-Solver++ with 10, 20 and 50 steps: DDPM changes with every row, the other two draw the same flowers throughout")

# %% [markdown]
# DDPM rolls dice on the way, others for each number of steps, and so ends at other flowers. The two deterministic samplers agree on what the noise means, and get closer to one another with more steps. Who gets
# there first? We take 200 steps of DDIM as the truth and measure how far each is from it: as on the toy problem, the second order pays.

# %%
*_, truth = ddim(model, process, x_T, species, steps=200)
counts = (5, 10, 20, 50)
errors = {}
for name, sampler in {"ddim": ddim, "dpm_solver": dpm_solver}.items():
    ends = [list(sampler(model, process, x_T, species, steps=steps))[-1].x for steps in counts]
    errors[name] = [float((x - truth.x).pow(2).mean().sqrt()) for x in ends]
assert errors["dpm_solver"][2] < errors["ddim"][2], "at 20 steps the second order must pay"

# %%
plot_lines({name: (counts, error) for name, error in errors.items()}, x_label="steps", y_label="distance from the truth", log_x=True, log_y=True, markers=True, size=(720, 260),
           alt="Root mean square distance from the truth against the number of steps, on log axes: both fall, DPM-Solver++ below DDIM")


# %% [markdown]
# ## From one flower to another
#
# A deterministic sampler turns noise space into a map of flowers: nearby noises, similar flowers. To walk from one noise to another, a straight line will
# not do: its middle is too quiet, with a standard deviation of $\sqrt{1/2}$, and the network has never seen such noise. Pure noise lies on a sphere, so
# walk along the sphere: *spherical* interpolation.

# %%
def slerp(a, b, weights):
    angle = torch.acos(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0))
    weights = weights.view(-1, 1, 1, 1)
    return (torch.sin((1 - weights) * angle) * a + torch.sin(weights * angle) * b) / torch.sin(angle)


# %%
a, b = torch.randn(2, *shape, generator=torch.Generator().manual_seed(11))
middle = slerp(a, b, torch.tensor([0.5]))
assert abs(middle.std() - 1) < 0.05 < abs((0.5 * a + 0.5 * b).std() - 1)
print(f"the line's middle: {(0.5 * a + 0.5 * b).std():.1f}   the arc's middle: {middle.std():.1f}")

# %%
weights = torch.linspace(0, 1, 7)
path = slerp(a, b, weights).to(device)
line = torch.stack([(1 - w) * a + w * b for w in weights]).to(device)
walks = []
for noises in (path, line):
    *_, state = dpm_solver(model, process, noises, torch.full((7,), 3, device=device), steps=20)
    walks.append(state.x.cpu())
filmstrip(walks, row_labels=["arc", "straight line"], column_labels=[f"{w:.2f}" for w in weights],
          alt="Seven steps from one flower to another: along the arc all are equally crisp; along the straight line the middle ones are smooth and pale")

# %% [markdown]
# ## In one call
#
# `sample` is all that in one line, for who only wants pictures. One row a species:

# %%
labels = torch.arange(6, device=device).repeat_interleave(4)
pictures = sample(model, process, labels, shape=shape, sampler="dpm_solver", steps=20, seed=8)
image_grid(pictures.cpu(), columns=4, scale=2, row_labels=classes[:6], alt="Generated flowers, a row for each species")

# %% [markdown]
# And photographs? The two networks in `models/` have learned from Flowers102, one at 32 x 32 pixels, the other one at 64 x 64. `sample_image` reads the larger one's weights and asks it for a species by name. (And it insists on the species by *guidance*, the subject of the next stage.)

# %%
sunflowers = sample_image("sunflower", 3, sampler="ddim", steps=20, seed=1)
image_grid(sunflowers, columns=3, scale=3, alt="Three sunflowers that the network drew: dark centres, yellow petals")

# %% [markdown]
# ## Play
#
# The reverse film of the smaller network, in your hands. Press play or drag the frame; change the sampler and the number of steps, and the same noise takes another way; new noise, another flower.
# A film that has not been seen yet is computed first, which the bar shows.

# %%
flowers, flower_process, species_names = load_model(PROFILES["flowers32"].weights, device)
sunflower, side = species_labels("sunflower", species_names).to(device), flowers.config["image_size"]
films = {}


def film(frame, sampler, steps, noise):
    states = films.setdefault((sampler, steps, noise), [])
    if len(states) < steps:
        x_T = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(noise)).to(device)
        for count, state in enumerate(SAMPLERS[sampler](flowers, flower_process, x_T, sunflower, steps=steps)):
            states[count:] = [state]
            yield (count + 1) / steps
    state = states[round(frame / 20 * (steps - 1))]
    yield image_grid(torch.cat([state.x, state.x_start]).cpu(), scale=6, column_labels=[f"after t = {state.t}", r"guessed $\hat x_0$"],
                     alt=f"The reverse film by {sampler} in {steps} steps at t = {state.t}: left the picture, right the clean sunflower that the network expects")


# %%
Explorer(film, play="frame", frame=widgets.IntSlider(14, 0, 20), sampler=widgets.Dropdown(options=list(SAMPLERS), value="ddim"),
         steps=widgets.Dropdown(options=[10, 20, 50, 200], value=20), noise=Again("new noise"))

# %% [markdown]
# ## Your turn
#
# 1. What does `ddim` give for `eta=0.5`: is the spread of the samples still right? Try it with `PerfectDenoiser` and all the steps, and put the standard deviation in `my_spread`.
# 2. Noise a real flower to $t = 500$ and let `ddim` bring it back: it takes only the part of the process below 500. What stays of the flower?

# %% tags=["exercise"]
my_spread = None  # your answer to 1

# %% [markdown]
# ## Solutions
#
# 1. Every eta has the right marginals, so the spread is right for every eta, given enough steps.

# %% tags=["solution"]
x_T = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(4))
*_, last = ddim(PerfectDenoiser(toy), toy, x_T, steps=T, eta=0.5, generator=torch.Generator().manual_seed(9))
my_spread = float(last.x.std())
assert abs(my_spread - 0.2) < 0.01

# %% [markdown]
# 2. A process that is cut off at $t=500$ is a process of its own, with 501 times. What stays is what had not drowned in noise by then: place and colour;
# details are invented anew.

# %% tags=["solution"]
half = GaussianDiffusion(process.betas[:501], process.prediction).to(device)
t = torch.full((6,), 500, device=device)
noisy = process.q_sample(x_0, t, torch.randn(x_0.shape, generator=torch.Generator().manual_seed(10)).to(device))
*_, back = ddim(model, half, noisy, y, steps=25)
filmstrip([x_0[:4], noisy[:4], back.x[:4]], row_labels=["before", "t = 500", "after"], alt="Four flowers, noised to t = 500, and brought back: place, size and colour stay, petals are redrawn")

# %% [markdown]
# Next: [06_guidance](06_guidance.ipynb) asks for a species, and gets it.
