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
# **What you'll do**: go from pictures of flowers to a network that draws flowers, in one go: data, forward process, network, training, reverse process.
#
# **What you'll learn**: how the parts that the series takes one by one fit together. Every section names the notebook that explains it.
#
# **What you need**: two CPU cores and two minutes for the embedded flowers. With `NOISOUT_PROFILE=flowers32` the same page trains on photographs, Oxford
# Flowers102, which it downloads itself (345 MB); that takes one to two hours on two CPU cores, may be killed at any time, and goes on where it was when it is started again.
# The paired script does the same from a terminal: `NOISOUT_PROFILE=flowers32 python notebooks/scripts/test.py`.

# %%
import sys

if "google.colab" in sys.modules:  # there a notebook comes alone: fetch what it imports, once
    import subprocess

    subprocess.run("test -d noisOut || git clone -q --depth 1 https://github.com/noisOut/noisOut", shell=True, check=True)
    sys.path.insert(0, "noisOut")

# %%
import torch

from noisout_nb.data import factor_distance, load_data, species_labels, to_float
from noisout_nb.display import Live, filmstrip, image_grid, plot_lines, plot_loss, progress, stack
from noisout_nb.forward_process import SCHEDULES, GaussianDiffusion
from noisout_nb.guidance import ClassifierFreeGuidance
from noisout_nb.parallel import get_device, memory_format
from noisout_nb.profiles import REPOSITORY, get_profile
from noisout_nb.sampling import ddim, sample, sample_image
from noisout_nb.training import EMA, Batches, load_model, save_model, train
from noisout_nb.unet import UNet

torch.manual_seed(0)
profile, device = get_profile(), get_device()
shape = (3, profile.image_size, profile.image_size)

# %% [markdown]
# ## 1 Data ([01_data](01_data.ipynb))
#
# Pictures of one size, the short side resized and the centre cut out, with values in $[-1, 1]$, and the species as a label. One part is held out: the network
# never sees it.

# %%
data, held_out = load_data(profile), load_data(profile, "val")
print(f"{len(data):,} pictures of {len(data.classes)} species to learn from, {len(held_out):,} held out")

# %% [markdown]
# Mirrored at random, in shuffled batches:

# %%
batches = Batches(data, profile.batch_size, device=device)
images, labels = next(batches)
print(f"images {tuple(images.shape)} from -1 to 1, labels {tuple(labels.shape)}")

# %%
image_grid(images[:16].cpu(), columns=8, alt="Sixteen flowers, mirrored at random: what the network learns from")

# %% [markdown]
# ## 2 Forward process ([02_forward_process](02_forward_process.ipynb))
#
# Gaussian noise, added step by step, turns every picture into pure noise. With $\bar\alpha_t$ falling from 1 to 0, the picture after $t$ steps is
# $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon$: one jump instead of $t$ steps.

# %%
process = GaussianDiffusion(SCHEDULES[profile.schedule](profile.timesteps), profile.prediction, variance=profile.variance).to(device)
t = torch.linspace(0, process.timesteps - 1, 9, device=device).long()
x_0 = to_float(held_out.images[:1]).to(device).expand(9, *shape)
x_t = process.q_sample(x_0, t, torch.randn(1, *shape, device=device).expand(9, *shape))

# %%
filmstrip([x_t.cpu()], column_labels=[f"t = {int(i)}" for i in t], arrow="the forward process", alt="A flower dissolving in nine steps from t = 0 to pure noise")

# %% [markdown]
# ## 3 Network ([03_unet](03_unet.ipynb))
#
# A UNet sees $x_t$, $t$ (as sinusoidal position embeddings) and the species, and is asked for what was mixed into the picture. It starts by answering zero.

# %%
model = UNet(**profile.network, num_classes=len(data.classes)).to(device, memory_format=memory_format(device, profile.autocast))
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
with torch.no_grad():
    assert not model(images, torch.zeros_like(labels), labels).any()

# %% [markdown]
# ## 4 Training ([04_training](04_training.ipynb))
#
# Pick a picture, a time and a noise; ask the network; take a step on the squared error. Beside it runs an average of the weights, which draws better
# pictures than the last step's. The whole state is saved now and then, so that nothing is lost if the machine is switched off.

# %%
ema = EMA(model, profile.ema_decay)
batches = Batches(data, profile.batch_size, device=device)
species = torch.arange(8, device=device) * (len(data.classes) // 8 or 1) % len(data.classes)
losses, previews = [], {}


def dashboard():
    latest = previews[max(previews)] if previews else torch.zeros(8, *shape)
    return stack(plot_loss(losses), image_grid(latest, scale=2))


# %%
checkpoint = profile.runs / "checkpoint.pth"
steps = train(model, process, batches, ema, steps=profile.train_steps, learning_rate=profile.learning_rate,
              label_dropout=profile.label_dropout, losses=losses, checkpoint=checkpoint, autocast=profile.autocast)
with Live("The loss falls, first fast and then slowly; below it the latest samples") as live:
    for step in progress(steps, total=profile.train_steps, description="training"):
        if step.index % (profile.train_steps // 5) == 0:
            with ema.applied():
                previews[step.index] = sample(model, process, species, shape=shape, seed=1).cpu()
        live.update(dashboard)
        if live.stopped:
            steps.close()  # which writes the checkpoint

# %%
assert len(losses) == profile.train_steps, "stopped early: run the two cells above once more, and the training goes on where it was"
assert sum(losses[-50:]) / 50 < 0.2, "the answer 0 would have 0.66"

# %% [markdown]
# What stays are the averaged weights: a plain `state_dict`, with a small text beside it that says which network it belongs to.

# %%
with ema.applied():
    save_model(model, profile.weights, profile, data.classes)
checkpoint.unlink(missing_ok=True)
model, process, classes = load_model(profile.weights, device)

# %% [markdown]
# ## 5 Reverse process ([05_sampling](05_sampling.ipynb))
#
# Start from pure noise, ask the network what the clean picture may be, go a little way towards it, ask again. *Guidance* weighs the species
# more heavily than the network does by itself (scale 1 is none). We draw six species:

# %%
if len(classes) == 102:  # some whose form few pixels can still show
    names = ["sunflower", "rose", "water lily", "osteospermum", "hibiscus", "passion flower"]
else:
    names = list(classes)
species = species_labels(names, classes).to(device)

# %%
guided = ClassifierFreeGuidance(model, profile.guidance_scale)
x_T = torch.randn(len(species), *shape, generator=torch.Generator().manual_seed(2)).to(device)
states = list(ddim(guided, process, x_T, species, steps=profile.sample_steps))

# %%
shown = [round(i * (len(states) - 1) / 8) for i in range(9)]
demo = filmstrip([[states[i].x[0].cpu() for i in shown], [states[i].x_start[0].cpu() for i in shown]], row_labels=["after the step", r"$\hat x_0$"],
                 column_labels=[f"t = {states[i].t}" for i in shown], arrow="the reverse process",
                 alt="Noise turns into a flower in nine frames; below each, the clean flower that the network believes in at that moment")
demo

# %% [markdown]
# `sample_image` does it in one call: it reads the file of weights, looks up the names, guides, and runs the reverse process. Nobody has chosen these: they are the first ones from this seed.

# %% tags=["cover"]
samples = sample_image(names, 8, guidance_scale=profile.guidance_scale, weights=profile.weights, sampler="ddim", steps=profile.sample_steps, seed=3)
results = image_grid(samples, columns=8, row_labels=names, alt="Generated flowers, eight of each of six species: " + ", ".join(names))
results

# %% [markdown]
# The two pictures go to the profile's folder of runs. Those of `flowers64-folded`, the network that the README shows, go to the top of the repository.

# %%
folder = REPOSITORY if profile.name == "flowers64-folded" else profile.runs
for name, picture in {"demo.png": demo, "results.png": results}.items():
    picture.save(folder / name)
print("saved demo.png and results.png")

# %% [markdown]
# The repository has the weights of longer trainings on photographs, too; `sample_image` takes those for 64 x 64 pixels where it is told of no others. Two sunflowers, two roses and so on:

# %%
wanted = ["sunflower", "rose", "water lily", "hibiscus"]
photographic = sample_image(2 * wanted, sampler="ddim", steps=20, seed=3)
image_grid(photographic, columns=4, scale=2, column_labels=wanted, alt="Generated flowers by a network that learned from photographs: two each of four species")

# %% [markdown]
# ## How good are they?
#
# 256 samples against 256 held-out pictures, in simple statistics: the flower's size and colour, and the background. 0 is perfect, 1 a shift by the data's own
# spread. For scale: a second set of real pictures, and noise.

# %%
order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
reference, second = to_float(held_out.images[order[:256]]), to_float(held_out.images[order[256:512]])
labels = held_out.labels[order[256:512]].to(device)  # as many of each species as in the second set
samples = sample(model, process, labels, shape=shape, seed=4).cpu()
noise = torch.randn(256, *shape, generator=torch.Generator().manual_seed(5))
distance = {name: factor_distance(x, reference)["mean"] for name, x in [("real", second), ("samples", samples), ("noise", noise)]}
assert distance["samples"] < 0.6 < distance["noise"]

# %% [markdown]
# The figures themselves differ a little from machine to machine, so they are drawn and not printed:

# %%
plot_lines({"distance to the data": list(distance.values())}, x_ticks=list(distance), markers=True, log_y=True, y_label="mean distance", size=(480, 260),
           alt="Mean distance to the data, log axis: a second real set about 0.1, the samples a few times that, noise far above")

# %% [markdown]
# From here: the numbered notebooks take each step apart, beginning with [01_data](01_data.ipynb).
