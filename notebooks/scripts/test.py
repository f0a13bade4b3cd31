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
# # The whole path on one page
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/noisOut/noisOut/blob/main/notebooks/test.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/noisOut/noisOut/main?labpath=notebooks/test.ipynb)
#
# **What you'll do**: generate flowers from pretrained weights, then go the whole path yourself:
# data, noise, network, training, samples.
#
# **What you'll learn**: how the parts that the series takes one by one fit together. Every section
# names the notebook that explains it.
#
# **What you need**: two CPU cores and two minutes. A *profile* sets the data, the image size and
# the length of training. With `NOISOUT_PROFILE=flowers64` this page trains on photographs (Oxford
# Flowers102, a download of 345 MB), which takes hours on a CPU; with
# `NOISOUT_PROFILE=folder NOISOUT_DATA=path/to/images`, on your own images. An interrupted run
# resumes where it stopped.

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
import torch

from noisout_nb.checkpoints import load_model, publish, save_model
from noisout_nb.data import load_data, species_labels, to_float
from noisout_nb.evaluation import factor_distance
from noisout_nb.figures import bars, filmstrip, image_grid, plot_loss, stack
from noisout_nb.forward_process import GaussianDiffusion
from noisout_nb.generate import sample_image
from noisout_nb.guidance import ClassifierFreeGuidance
from noisout_nb.parallel import get_device, memory_format
from noisout_nb.profiles import get_profile
from noisout_nb.progress import progress
from noisout_nb.sampling import ddim, sample
from noisout_nb.training import EMA, Batches, held_out_loss, train
from noisout_nb.unet import UNet
from noisout_nb.widgets import Live

_ = torch.manual_seed(0)
profile, device = get_profile(), get_device()
shape = (3, profile.image_size, profile.image_size)

# %% [markdown]
# ## Where this leads
#
# The repository comes with a network that was trained on photographs. It generates flowers by name,
# in seconds:

# %%
wanted = ["sunflower", "rose", "water lily", "hibiscus"]
photographic = sample_image(2 * wanted, sampler="ddim", steps=15, seed=3)
alt = "Eight generated flowers, two each: " + ", ".join(wanted)
grid = image_grid(photographic, columns=4, scale=2, column_labels=wanted, alt=alt)
grid.save(profile.runs / "pretrained.png")
print(f"saved as runs/{profile.name}/pretrained.png")
grid

# %% [markdown]
# Now train one of your own, from scratch, on the data of your profile.
#
# ## 1 Data
#
# Images of one size, values in $[-1, 1]$, with the species as label. Some are held out: the network
# is never trained on them. Notebook [01_data](01_data.ipynb) looks at them closely.

# %%
data, held_out = load_data(profile), load_data(profile, "val")
print(f"{len(data):,} images of {len(data.classes)} classes, {len(held_out):,} held out")

# %%
batches = Batches(data, profile.batch_size, flip=profile.flip, device=device)
images, labels = batches[0]
image_grid(images[:16].cpu(), columns=8, alt="The first batch: sixteen flowers of the training set")

# %% [markdown]
# ## 2 Noise
#
# Gaussian noise destroys the image step by step: at timestep $t$ it is
# $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon$, with $\bar\alpha_t$ falling
# from 1 to 0 ([02_forward_process](02_forward_process.ipynb)).

# %%
process = GaussianDiffusion.from_config(**profile.process).to(device)
t = torch.linspace(0, process.timesteps - 1, 9, device=device).long()
x_0 = to_float(held_out.images[:1]).to(device).expand(9, *shape)
x_t = process.q_sample(x_0, t, torch.randn(1, *shape, device=device).expand(9, *shape))

# %%
labels = [f"t = {int(i)}" for i in t]
alt = "A flower dissolves in nine steps, from t = 0 to pure noise"
filmstrip([x_t.cpu()], column_labels=labels, arrow="the forward process", alt=alt)

# %% [markdown]
# ## 3 Network
#
# A [UNet](03_unet.ipynb) takes $x_t$, $t$ and the species, and predicts the clean image $x_0$.
# Beside it we keep a moving average of its weights (EMA), which gives better samples than the
# weights of a single step.

# %%
model = UNet(**profile.network, num_classes=len(data.classes))
model.to(device, memory_format=memory_format(device, profile.autocast))
ema, losses, previews = EMA(model, profile.ema_decay), [], {}
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, predicts {process.prediction}")

# %% [markdown]
# ## 4 Training
#
# Take a batch, random timesteps and noise; predict $x_0$; take a gradient step on the squared
# error ([04_training](04_training.ipynb) derives it). The samples below the curve show what the
# network has learned so far.

# %%
species = torch.arange(8, device=device) % len(data.classes)


def dashboard():
    latest = previews[max(previews)] if previews else torch.zeros(8, *shape)
    return stack(plot_loss(losses), image_grid(latest, scale=2))


# %%
if len(losses) == profile.train_steps:
    raise RuntimeError("trained already: to start anew, run the network's cell first")
checkpoint = profile.runs / "checkpoint.pth"
run = train(model, process, batches, ema, losses=losses, checkpoint=checkpoint, **profile.training)
with run, Live("The loss falls, first fast, then slowly; below it, the latest samples") as live:
    for step in progress(run, total=profile.train_steps, description="training"):
        if step.index % (profile.train_steps // 5) == 0:
            with ema.applied():
                previews[step.index] = sample(model, process, species, shape=shape, seed=1).cpu()
        live.update(dashboard)
        if live.stopped:
            break

# %% [markdown]
# The averaged weights are saved under `runs/`, with a card that names the network and its loss on
# the held-out images. A run on photographs is also published to `models/` if that loss is lower
# than the present file's.

# %%
if len(losses) < profile.train_steps:
    raise RuntimeError("not finished: run the training cell again, and it goes on where it was")
with ema.applied():
    loss = held_out_loss(model, process, held_out)
facts = {"held_out_loss": loss, "steps": len(losses), "profile": profile.name}
save_model(model, profile.weights, process, data.classes, ema=ema, **facts)
checkpoint.unlink(missing_ok=True)

# %%
if profile.dataset == "flowers102":
    publish(profile.weights, profile.published)

# %% [markdown]
# ## 5 Samples
#
# Start from pure noise, predict the clean image, take a small step towards it, predict again
# ([05_sampling](05_sampling.ipynb), [06_guidance](06_guidance.ipynb)). The film shows the image
# after the step at $t$ and, below it, the $\hat x_0$ that the network predicted in that step.

# %%
trained, process, classes = load_model(profile.weights, device)
if profile.dataset == "flowers102":
    names = ["sunflower", "rose", "water lily", "osteospermum", "hibiscus", "passion flower"]
else:
    names = list(classes[:6])

# %%
guidance = {
    "guidance_scale": profile.guidance_scale,
    "guidance_interval": profile.guidance_interval,
}
guided = ClassifierFreeGuidance(
    trained, profile.guidance_scale, process=process, interval=profile.guidance_interval
)
x_T = torch.randn(1, *shape, generator=torch.Generator().manual_seed(2)).to(device)
y = species_labels(names[0], classes).to(device)
states = [*ddim(guided, process, x_T, y, steps=profile.sample_steps, spacing=profile.spacing)]

# %%
chosen = [states[round(i * (len(states) - 1) / 8)] for i in range(9)]
film = [[state.x[0].cpu() for state in chosen], [state.x_start[0].cpu() for state in chosen]]
labels = {"row_labels": ["$x$", r"$\hat x_0$"], "column_labels": [f"t = {s.t}" for s in chosen]}
alt = "Noise turns into a flower in nine frames; below each, the predicted clean image"
demo = filmstrip(film, **labels, arrow="the reverse process", alt=alt)
demo

# %% [markdown]
# `sample_image` does all of this in one call. These are the first samples of one seed, not a
# selection:

# %% tags=["cover"]
settings = guidance | {"sampler": profile.sampler, "steps": profile.sample_steps}
settings |= {"spacing": profile.spacing, "weights": profile.weights, "seed": 3}
alt = "Generated flowers, eight of each species: " + ", ".join(names)
results = image_grid(sample_image(names, 8, **settings), columns=8, row_labels=names, alt=alt)
results

# %%
for name, figure in {"demo.png": demo, "results.png": results}.items():
    figure.save(profile.runs / name)
print(f"saved demo.png and results.png in runs/{profile.name}")

# %% [markdown]
# ## How good are they?
#
# We compare samples with held-out images in simple statistics: the flower's size, its colour and
# the background. 0 means the same distribution, 1 a shift by one standard deviation. For scale: a
# second set of real images, and noise. ([07_evaluation](07_evaluation.ipynb) measures more.)

# %%
order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
count = min(256, len(held_out) // 2)
reference, second = (to_float(held_out.images[part]) for part in order[: 2 * count].split(count))
labels = held_out.labels[order[count : 2 * count]].to(device)  # as many of each species
samples = sample(trained, process, labels, shape=shape, seed=4).cpu()
noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(5))

# %%
sets = {"real": second, "samples": samples, "noise": noise.clamp(-1, 1)}
distance = {name: factor_distance(images, reference)["mean"] for name, images in sets.items()}
label = f"distance to held-out images, {count} images each"
alt = "Distance to held-out images: real images lowest, the samples near them, noise far above"
bars(distance, x_label=label, alt=alt)

# %%
print("mean distance of the samples below 0.3:", distance["samples"] < 0.3)

# %% [markdown]
# [00_quickstart](00_quickstart.ipynb) has the idea in ten minutes; the numbered notebooks take each
# part in turn, beginning with [01_data](01_data.ipynb).
