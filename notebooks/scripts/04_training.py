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
# **What you'll do**: teach the UNet of stage 3 to undo noise, and watch flowers come out of it while it learns.
#
# **What you'll learn**: why the loss is a plain mean squared error, what the network is asked for (the noise or *v*) and why
# that matters, why pictures are drawn with *averaged* weights, and how a training survives being killed.
#
# **What you need**: notebooks 01 to 03. On two CPU cores all of it takes about two minutes, most of them for the training itself.

# %%
import sys

if "google.colab" in sys.modules:  # there a notebook comes alone: fetch what it imports, once
    import subprocess

    subprocess.run("test -d noisOut || git clone -q --depth 1 https://github.com/noisOut/noisOut", shell=True, check=True)
    sys.path.insert(0, "noisOut")

# %%
import torch
from torch.testing import assert_close

from noisout_nb.data import FlowerImages, factor_distance, load_data, to_float
from noisout_nb.display import Live, filmstrip, image_grid, plot_lines, plot_loss, progress, stack
from noisout_nb.forward_process import SCHEDULES, GaussianDiffusion
from noisout_nb.parallel import get_device, memory_format
from noisout_nb.profiles import get_profile
from noisout_nb.sampling import sample
from noisout_nb.training import EMA, Batches, learning_rate_at, load_model, save_model, simple_loss, train
from noisout_nb.unet import UNet

# %%
torch.manual_seed(0)
profile, device = get_profile(), get_device()

# %% [markdown]
# Data, process and network, as the last three notebooks built them.

# %%
data, held_out = load_data(profile), load_data(profile, "val")
process = GaussianDiffusion(SCHEDULES[profile.schedule](profile.timesteps), profile.prediction).to(device)
model = UNet(**profile.network, num_classes=len(data.classes)).to(device, memory_format=memory_format(device, profile.autocast))
print(f"{len(data)} pictures of {len(data.classes)} species to learn from, {len(held_out)} held out")

# %% [markdown]
# ## The question and the answer
#
# One training example takes four ingredients: a clean picture $x_0$, a time $t$, a noise $\epsilon$, and what stage 2 makes of
# them: the noisy picture $x_t$. The network sees $x_t$ and $t$. What shall it answer?

# %%
x_0 = torch.stack([held_out[i][0] for i in range(4)]).to(device)
y = torch.tensor([held_out[i][1] for i in range(4)], device=device)
t = torch.tensor([100, 300, 600, 900], device=device)
noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(device)
x_t = process.q_sample(x_0, t, noise)

# %% [markdown]
# Ho et al. (2020) ask for the noise $\epsilon$. Knowing $x_t$, that is the same as asking for $x_0$, or for
# $v = \sqrt{\bar\alpha_t}\,\epsilon - \sqrt{1-\bar\alpha_t}\,x_0$ (Salimans & Ho 2022), as stage 2 showed. Below, each column is one
# example: above what the network sees, below the $v$ that it should answer with. Where there is little noise, $v$ is nearly the noise;
# where there is little picture, $v$ is nearly the negative of the picture. So the question is never trivial and never hopeless.

# %%
v = process.predict_v(x_0, t, noise)
filmstrip([x_0, x_t, v / v.abs().amax((1, 2, 3), keepdim=True)], row_labels=["$x_0$", "$x_t$", "$v$"],
          column_labels=[f"t = {int(i)}" for i in t],
          alt="Four flowers, their noisy versions at t = 100, 300, 600 and 900, and v, which turns from noise into the negative flower")


# %% [markdown]
# The loss is the mean squared distance between answer and target: $L_\text{simple}$, eq. 14 of the paper. Four lines:

# %%
def my_loss(model, x_0, t, noise, y):
    x_t = process.q_sample(x_0, t, noise)
    target = process.predict_v(x_0, t, noise) if profile.prediction == "v" else noise
    return ((model(x_t, t, y) - target) ** 2).mean()


# %%
assert_close(my_loss(model, x_0, t, noise, y), simple_loss(model, process, x_0, t, noise, y))

# %% [markdown]
# The last convolution of the untrained UNet is all zeros (stage 3), so it answers 0 and its loss is the mean square of the target.
# That is the number to beat: a loss that stays there means that nothing is learned.

# %%
assert_close(simple_loss(model, process, x_0, t, noise, y), (v**2).mean())

# %% [markdown]
# ## One loss, three weightings
#
# The three questions differ in one thing only: how much an error counts at each $t$. A wrong $\hat x_0$ costs
#
# $$ \|\epsilon - \hat\epsilon\|^2 = \text{SNR}_t\, \|x_0 - \hat x_0\|^2, \qquad \|v - \hat v\|^2 = (\text{SNR}_t + 1)\, \|x_0 - \hat x_0\|^2 $$
#
# with the signal-to-noise ratio of stage 2. We check both with a guess that is off by a random picture.

# %%
guess = x_0 + 0.1 * torch.randn_like(x_0)
x_0_error = ((x_0 - guess) ** 2).sum((1, 2, 3))
eps_error = ((noise - process.predict_noise_from_start(x_t, t, guess)) ** 2).sum((1, 2, 3))
v_error = ((v - process.predict_v(guess, t, process.predict_noise_from_start(x_t, t, guess))) ** 2).sum((1, 2, 3))
snr = process.signal_to_noise_ratio(t)
assert_close(eps_error, snr * x_0_error, rtol=1e-3, atol=1e-4)
assert_close(v_error, (snr + 1) * x_0_error, rtol=1e-3, atol=1e-4)

# %% [markdown]
# Near pure noise the SNR goes to zero, and the eps-loss stops caring whether the network has any idea of the picture.
# The v-loss keeps a weight of 1 there, which is where the flower's place, size and colour are decided. With little time to train, that
# helps; our profiles use *v*, and the code serves both.

# %%
all_t = torch.arange(process.timesteps, device=device)
snr = process.signal_to_noise_ratio(all_t)
plot_lines({"eps: SNR": snr, "v: SNR + 1": snr + 1, "x_0: 1": torch.ones_like(snr)}, x_label="t", y_label="weight of an error in $x_0$", log_y=True,
           alt="Weight of an x_0 error against t, log axis: eps and v agree at small t; at large t eps falls towards zero and v stays at 1")

# %% [markdown]
# ## Batches
#
# A batch is drawn without replacement until the epoch is over. Half of the pictures are mirrored (a mirrored flower is a flower). Order and mirroring
# are functions of a seed and the step's number, which will let a killed training go on exactly.

# %%
batches = Batches(data, profile.batch_size, device=device)
images, labels = next(batches)
print(tuple(images.shape), images.dtype, labels.dtype)
assert -1 <= images.min() and images.max() <= 1

# %%
again = Batches(data, profile.batch_size, device=device)
assert torch.equal(next(again)[0], images)

# %%
numbered = FlowerImages(data.images, torch.arange(len(data)), data.classes)  # each picture's label is its number
one_epoch = Batches(numbered, profile.batch_size)
seen = torch.cat([next(one_epoch)[1] for _ in range(one_epoch.per_epoch)])
assert len(seen.unique()) == len(seen), "no picture twice in an epoch"


# %% [markdown]
# ## Algorithm 1
#
# Ho et al.'s Algorithm 1 in ten lines: pick pictures, times and noise; drop some labels, so that the network also learns to draw
# without being told the species (notebook 06 makes use of it); take a gradient step.

# %%
def my_training(model, steps, peak):
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=True)
    generator = torch.Generator(device).manual_seed(0)
    batches = Batches(data, profile.batch_size, device=device)
    for index in range(steps):
        x_0, y = next(batches)
        t = torch.randint(process.timesteps, (len(x_0),), generator=generator, device=device)
        noise = torch.randn(x_0.shape, generator=generator, device=device)
        y[torch.rand(len(y), generator=generator, device=device) < profile.label_dropout] = model.null_label
        optimizer.zero_grad()
        simple_loss(model, process, x_0, t, noise, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate_at(index, steps, peak)
        optimizer.step()


# %% [markdown]
# The helper's `train` is the same loop as a generator, with bookkeeping around it. Three steps of each, from the same start, must end at
# the same weights. (Without dropout, whose dice the two would throw at different moments.)

# %%
def small_model():
    torch.manual_seed(1)
    return UNet(**profile.network | {"dropout": 0.0}, num_classes=len(data.classes)).to(device)


# %%
def helper_training(model, steps, **options):
    batches, ema = Batches(data, profile.batch_size, device=device), EMA(model)
    options = dict(steps=steps, learning_rate=1e-3, label_dropout=profile.label_dropout) | options
    return [step.loss for step in train(model, process, batches, ema, **options)]


# %%
mine, helpers = small_model(), small_model()
my_training(mine, 3, 1e-3)
helper_losses = helper_training(helpers, 3)

# %%
for a, b in zip(mine.parameters(), helpers.parameters()):
    assert_close(a, b)

# %% [markdown]
# `learning_rate_at` climbs for a moment, while Adam's averages are still poor, and then falls along a cosine to zero: the last steps
# only polish, so the result depends little on which step happened to be the last.

# %%
rates = [learning_rate_at(i, profile.train_steps, profile.learning_rate) for i in range(profile.train_steps)]
plot_lines({"learning rate": rates}, x_label="step", y_label="learning rate", size=(720, 240), alt="Learning rate against step: a short climb, then half a cosine down to zero")

# %% [markdown]
# ## The average of the weights
#
# Single steps are noisy; their average is not. The *exponential moving average* (EMA) follows the weights with a decay $d$:
# $\bar\theta \leftarrow d\,\bar\theta + (1-d)\,\theta$. A constant 0.9999 would remember the random start for ten thousands of steps, so the decay is warmed up:
# $\min(d, \frac{1+n}{10+n})$ at update $n$. In a model of one number that is set to 1, 2, 3, ..., by hand and by the helper:

# %%
one_number = torch.nn.Linear(1, 1, bias=False)
ema, by_hand = EMA(one_number, decay=0.9), one_number.weight.item()
for n in range(1, 101):
    torch.nn.init.constant_(one_number.weight, n)
    ema.update()
    decay = min(0.9, (1 + n) / (10 + n))
    by_hand = decay * by_hand + (1 - decay) * n
assert_close(ema.shadow[0].item(), by_hand, rtol=1e-5, atol=0)

# %% [markdown]
# To look at samples, the average is put into the network for a moment. Whatever happens meanwhile, the trained weights must come
# back, or training would silently go on from the average:

# %%
try:
    with ema.applied():
        assert_close(one_number.weight.item(), by_hand, rtol=1e-5, atol=0)
        raise KeyboardInterrupt("someone pressed stop while looking at samples")
except KeyboardInterrupt:
    print("stopped; the weight is", one_number.weight.item(), "again")
assert one_number.weight.item() == 100

# %% [markdown]
# ## Nothing is lost
#
# With `checkpoint=...`, `train` writes everything that it needs to go on: network, average, optimiser, random states, step. Two
# trainings of six steps, one of which is left after the second and started again, must agree in every bit (on the CPU; a GPU adds up
# in another order each time).

# %%
folder = profile.runs / "lesson"
(folder / "run.pth").unlink(missing_ok=True)
straight, interrupted = small_model(), small_model()
losses = helper_training(straight, 6)

left = Batches(data, profile.batch_size, device=device)
for step in train(interrupted, process, left, EMA(interrupted), steps=6, learning_rate=1e-3, checkpoint=folder / "run.pth"):
    if step.index == 2:
        break  # leaving the loop writes the checkpoint

# %% [markdown]
# A new process would start with new weights. So do we: `resumed` knows nothing but the file.

# %%
resumed, all_losses = small_model(), []
helper_training(resumed, 6, checkpoint=folder / "run.pth", losses=all_losses)
same = [torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters())]
assert device.type != "cpu" or (all(same) and all_losses == losses)
print("steps in the record of the resumed run:", len(all_losses))

# %% [markdown]
# A damaged file, or one from another training, is refused with a word on what to do, and is left alone:

# %%
damaged = folder / "damaged.pth"
damaged.write_bytes((folder / "run.pth").read_bytes()[:10_000])
other = UNet(**profile.network | {"channels": 2 * profile.channels}, num_classes=len(data.classes)).to(device)
for model_here, path in ((small_model(), damaged), (other, folder / "run.pth")):
    try:
        helper_training(model_here, 6, checkpoint=path)
    except ValueError as error:
        print(str(error).replace(str(folder), "..."), "\n")

# %% [markdown]
# And a loss that is no longer a number stops the run at once, before it reaches the weights, the average or the file:

# %%
poisoned = small_model()
torch.nn.init.constant_(poisoned.conv_in.bias, float("nan"))
try:
    helper_training(poisoned, 6)
except FloatingPointError as error:
    print(error)

# %% [markdown]
# ## The training
#
# Now in earnest, with `autocast` where the profile has it: the network then calculates in bfloat16, which some processors do much faster (notebook 08). The loop is ours, so what is shown, and how often, is up to us: the loss at every step, and at some of them eight samples
# drawn from the average, always from the same noise. The stop button below the picture (or the kernel's interrupt) ends the loop after the present step; `close()` lets `train`
# write its checkpoint first.

# %%
model.train()
ema, batches, losses, previews = EMA(model, profile.ema_decay), Batches(data, profile.batch_size, device=device), [], {}
shape = (3, profile.image_size, profile.image_size)
species = torch.arange(8, device=device) % len(data.classes)
looks = {round(profile.train_steps * part) for part in (0.03, 0.1, 0.2, 0.4, 0.7)}


def look(index):
    with ema.applied():
        previews[index] = sample(model, process, species, shape=shape, seed=1).cpu()


def dashboard():
    latest = previews[max(previews)] if previews else torch.zeros(8, *shape)
    rates = [learning_rate_at(i, profile.train_steps, profile.learning_rate) for i in range(len(losses))]
    return stack(plot_loss(losses), plot_lines({"learning rate": rates}, x_label="training step", y_label="learning rate", size=(720, 150)), image_grid(latest, scale=2))


# %%
checkpoint = profile.runs / "checkpoint.pth"
steps = train(model, process, batches, ema, steps=profile.train_steps, learning_rate=profile.learning_rate,
              label_dropout=profile.label_dropout, losses=losses, checkpoint=checkpoint, autocast=profile.autocast)
with Live("The loss falls steeply and then slowly; below it the learning rate, which climbs and falls, and the latest samples") as live:
    for step in progress(steps, total=profile.train_steps, description="training"):
        if step.index in looks:
            look(step.index)
        live.update(dashboard)
        if live.stopped:
            steps.close()

# %%
assert len(losses) == profile.train_steps, "stopped early: run the two cells above once more, and the training goes on where it was"
look(profile.train_steps)

# %% [markdown]
# The loss falls steeply at first and then slowly, while the pictures go on changing. Every row is the same noise, drawn by a network that has learned for longer:

# %% tags=["cover"]
filmstrip(list(previews.values()), row_labels=[f"step {index}" for index in previews], scale=2,
          alt="Eight samples at six moments of the training: first noise, then specks of colour on green, then ragged flowers whose backgrounds and centres slowly become clear")

# %% [markdown]
# How far must it fall? The untrained network's answer 0 costs 0.66, the mean square of $v$, where the curve above begins. A good part of that can never be
# guessed, of photographs more than of flowers drawn by a formula:

# %%
assert sum(losses[-50:]) / 50 < (0.15 if profile.dataset == "procedural" else 0.2), "the loss has not fallen enough: was a default changed?"

# %% [markdown]
# ## Are they flowers?
#
# The embedded flowers are drawn from known factors, and `factor_distance` (notebook 01) tells how far a set of pictures is from them: in size, colour and
# background, 0 being perfect and 1 a shift by the data's own spread. For scale stand beside it a second set of real pictures, which shows the least that
# 256 pictures can reach, and plain noise.

# %%
order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
reference, second = to_float(held_out.images[order[:256]]), to_float(held_out.images[order[256:512]])
labels = held_out.labels[order[256:512]].to(device)  # as many of each species as in the second set

# %%
with ema.applied():
    samples = sample(model, process, labels, shape=shape, seed=2).cpu()
noise = torch.randn(256, *shape, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)

# %%
sets = {"real": second, "samples": samples, "noise": noise}
distance = {name: factor_distance(images, reference) for name, images in sets.items()}

# %%
factors = list(distance["real"])
plot_lines({name: [values[f] for f in factors] for name, values in distance.items()}, x_ticks=factors, markers=True, log_y=True,
           y_label="distance to the data", alt="Distance to the data in each factor: real pictures lowest, samples a little above, noise far above")

# %% [markdown]
# The samples must lie much closer to the data than noise does. That alone would not prove much: how far is a network that always draws the same, perfectly average flower?

# %%
collapsed = factor_distance(reference.mean(0, keepdim=True).expand_as(reference), reference)
assert distance["samples"]["mean"] < 0.6 < collapsed["mean"] < distance["noise"]["mean"]

# %% [markdown]
# One more look, at 24 samples that nobody chose:

# %%
image_grid(samples[:24], columns=8, alt="24 generated flowers: ragged blossoms in their species' colours on dark green, some with a centre")

# %% [markdown]
# ## Keep the weights
#
# What is left of a training is the averaged weights: a plain `state_dict`, in half precision, and beside it a small text that says which network it
# belongs to. The checkpoint has done its work.

# %%
with ema.applied():
    save_model(model, profile.weights, profile, data.classes)
checkpoint.unlink(missing_ok=True)

weights = torch.load(profile.weights, weights_only=True)
print(f"{len(weights)} tensors with {sum(w.numel() for w in weights.values()):,} numbers")

# %% [markdown]
# Loading needs no guess, and gives (up to the rounding to half precision) the same pictures:

# %%
loaded, loaded_process, classes = load_model(profile.weights, device)
with ema.applied():
    before = sample(model, process, labels[:4], shape=shape, seed=2)
after = sample(loaded, loaded_process, labels[:4], shape=shape, seed=2)
assert (after - before).abs().mean() < 0.02 and classes == data.classes

# %% [markdown]
# ## Your turn
#
# 1. By how much does the average help? Compare the distance of samples from the last step's weights (no `ema.applied()`) with that of the average.
# 2. How much of the random start would an EMA with a constant decay of 0.9999 still hold at the end of this training? Compute `share`.

# %% tags=["exercise"]
share = None  # your answer to 2

# %% [markdown]
# ## Solutions
#
# 1. With a learning rate that has fallen to zero the last steps hardly differ, so the two are close; stop the training early and the gap opens.

# %% tags=["solution"]
raw = sample(model, process, labels, shape=shape, seed=2).cpu()
assert factor_distance(raw, reference)["mean"] < 0.3 * distance["noise"]["mean"]

# %% [markdown]
# 2. Each update keeps the share $d$ of what was there: $d^n$ after $n$ updates. That is most of it, and why the decay is warmed up.

# %% tags=["solution"]
share = 0.9999**profile.train_steps
assert share > 0.5 or profile.train_steps > 6900
print(f"after {profile.train_steps} steps: {share:.0%}")

# %% [markdown]
# Next: [05_sampling](05_sampling.ipynb) takes these weights and looks closely at how noise becomes a flower, and how to get there in a few steps.
