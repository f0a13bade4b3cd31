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
# # 01 Meet the flowers
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/noisOut/noisOut/blob/main/notebooks/01_data.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/noisOut/noisOut/main?labpath=notebooks/01_data.ipynb)
#
# **What you'll do**: look at the pictures that the whole series is about, and bring them into the form that diffusion works on.
#
# **What you'll learn**: why values lie in $[-1, 1]$, what resizing and cropping can do wrong, why part of the data is locked away, and
# how one can *measure* whether two sets of pictures come from the same distribution.
#
# **What you need**: some PyTorch. Half a minute on a laptop; nothing is downloaded unless you ask for it.

# %%
import sys

if "google.colab" in sys.modules:  # there a notebook comes alone: fetch what it imports, once
    import subprocess

    subprocess.run("test -d noisOut || git clone -q --depth 1 https://github.com/noisOut/noisOut", shell=True, check=True)
    sys.path.insert(0, "noisOut")

# %%
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from noisout_nb.data import (
    ProceduralFlowers, factor_distance, load_data, measure_factors, resize_and_crop, to_float, to_uint8,
)  # fmt: skip
from noisout_nb.display import image_grid, plot_histograms, plot_lines
from noisout_nb.profiles import get_profile
from noisout_nb.training import Batches

torch.manual_seed(0)
profile = get_profile()

# %% [markdown]
# The line above says which *profile* was chosen. A profile is the one place for every number that depends on the machine: which data, how large
# the pictures, how long to train. These notebooks never contain such a number themselves, so they run on a laptop and on a GPU alike.

# %% [markdown]
# ## Two gardens
#
# The series trains on one of two data sets. **Oxford Flowers102** holds 8,189 photographs of 102 species; it downloads itself when a profile asks for it. The
# **embedded flowers** need no download: they are drawn by formula. Here are some, a row for each species.

# %%
garden = ProceduralFlowers(size=32, count=600, seed=0)
rows = torch.cat([(garden.labels == label).nonzero()[:8, 0] for label in range(len(garden.classes))])
image_grid(garden.images[rows], columns=8, row_labels=garden.classes, alt="Embedded flowers at 32 pixels, eight of each of six species, from white daisies to violet starflowers")

# %% [markdown]
# They are made to be learned in two minutes on two CPU cores. And they teach something that photographs cannot: each is drawn from *known factors*, so later
# we can measure whether a network has learned the right distribution. The same formula draws any size:

# %% tags=["cover"]
large = ProceduralFlowers(size=128, count=12, seed=5)
image_grid(large.images, columns=6, scale=1, alt="Twelve embedded flowers at 128 pixels, with shaded petals, centres and soft backgrounds")

# %% [markdown]
# The factors of the first three flowers:

# %%
for name, values in garden.factors.items():
    print(f"{name:17}", *[f"{value:6.2f}" for value in values[:3]])

# %% [markdown]
# The seed decides: the same seed gives the same flowers, another seed gives others of the same kind.

# %%
assert torch.equal(ProceduralFlowers(size=32, count=20, seed=1).images, ProceduralFlowers(size=32, count=20, seed=1).images)
assert not torch.equal(ProceduralFlowers(size=32, count=20, seed=1).images, ProceduralFlowers(size=32, count=20, seed=2).images)

# %% [markdown]
# ## One item
#
# Both data sets behave as torchvision's do: `data[i]` is a picture and its label. Inside, pictures are kept as `uint8`, decoded once, so that no epoch decodes a
# JPEG again; floats would take four times the memory.

# %%
data = load_data(profile)
image, label = data[0]
print(f"{len(data):,} pictures; stored as {data.images.dtype}, given as {image.dtype} of shape {tuple(image.shape)}; this one is a {data.classes[label]}")


# %% [markdown]
# Diffusion adds Gaussian noise, which knows neither 0 nor 255: it is centred on zero with spread one. So the pictures are centred, too, on $[-1, 1]$:

# %%
def my_to_float(pixels):
    return pixels / 255 * 2 - 1


every_value = torch.arange(256, dtype=torch.uint8)
assert_close(my_to_float(every_value), to_float(every_value))

# %% [markdown]
# On the way back, values must be *rounded*. A plain cast cuts off, which makes every generated picture darker by half a level on average, and
# a value that arithmetic has moved down by a hair falls a full level:

# %%
assert torch.equal(to_uint8(to_float(every_value)), every_value)
a_hair_less = to_float(every_value) - 1e-6
cut_off = ((a_hair_less + 1) * 127.5).clamp(0, 255).to(torch.uint8)
print("levels that a plain cast gets wrong:", "most" if (cut_off != every_value).sum() > 128 else "few", "of 256; rounding:", int((to_uint8(a_hair_less) != every_value).sum()))

# %% [markdown]
# ## To one size
#
# Photographs come in all shapes; a batch needs one. Three ways to do it, on a flower in a wide picture:

# %%
wide = F.pad(large.images[3].float(), (64, 64, 0, 0), mode="replicate").to(torch.uint8)
squashed = F.interpolate(wide[None].float(), (32, 32), mode="bilinear", antialias=True)[0].to(torch.uint8)
aliased = F.interpolate(wide[None, :, :, 64:-64].float(), (32, 32), mode="nearest")[0].to(torch.uint8)
cropped = resize_and_crop(wide, 32)

# %%
image_grid([squashed, aliased, cropped], columns=3, scale=6, column_labels=["squashed", "cropped, no antialiasing", "cropped, antialiased"],
           alt="The same flower three times: squashed to half its width; cropped with jagged edges; cropped and smooth")

# %% [markdown]
# A network that is shown squashed flowers draws squashed flowers. One that is shown jagged edges learns the jags, which are an accident of where pixels
# happened to fall. So the short side is resized with antialiasing, which keeps the shape, and the centre is cut out.

# %%
assert cropped.shape == (3, 32, 32)
centre = resize_and_crop(large.images[3], 32)
assert (cropped.float() - centre.float()).abs().max() <= 2, "padding the sides must not change the middle"

averaged = F.avg_pool2d(large.images[3].float(), 4)  # each small pixel the mean of the 4 x 4 that it stands for
assert (cropped - averaged).abs().mean() < 0.7 * (aliased - averaged).abs().mean()

# %% [markdown]
# ## What is locked away
#
# A network that has copied its training pictures would pass any test on them. So some are held out, and every evaluation uses only those. For
# Flowers102: torchvision's train and test parts together (7,169 photographs) are for learning, its val part (1,020, ten of each species) is locked away. The embedded
# flowers have 512 of their own.

# %%
held_out = load_data(profile, "val")
print(f"{len(data):,} to learn from, {len(held_out):,} held out")
if profile.dataset == "procedural":
    shared = {image.numpy().tobytes() for image in data.images} & {image.numpy().tobytes() for image in held_out.images}
    assert not shared

# %% [markdown]
# One liberty is taken in training only: half of the pictures are mirrored, left to right. A mirrored flower is as likely as the
# flower itself; an upside-down one is not (light comes from above), so there is no vertical flip.

# %%
flipping = Batches(held_out, batch_size=8, flip=True)
plain = Batches(held_out, batch_size=8, flip=False)
(flipped, _), (as_is, _) = next(flipping), next(plain)
mirrored = [torch.equal(a, b.flip(-1)) and not torch.equal(a, b) for a, b in zip(flipped, as_is)]
print(sum(mirrored), "of", len(mirrored), "mirrored")
assert all(m or torch.equal(a, b) for m, a, b in zip(mirrored, flipped, as_is))

# %% [markdown]
# ## Are two sets of pictures alike?
#
# At the end of the series we shall ask: are the drawn flowers like the real ones? Not each like one of them, but as a set. We prepare the ruler now.
#
# `measure_factors` looks only at pixels. Where the colour is far from the border's, there is the flower; that gives its size, its colour on two axes
# (red against green, yellow against blue) and the background's brightness. The known factors tell whether that works:

# %%
measured = measure_factors(to_float(garden.images))


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


round_species = garden.factors["tilt"] < 0.4  # a tilted flower covers less than its radius says
assert correlation(measured["background"], garden.factors["background_value"]) > 0.95
assert correlation(measured["size"][round_species], garden.factors["radius"][round_species]) > 0.8

# %% [markdown]
# One number per picture and factor makes a distribution per set. Two halves of the garden agree, and noise is somewhere else entirely:

# %%
a, b = to_float(garden.images[:300]), to_float(garden.images[300:])
noise = torch.randn(300, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
sizes = {"half of the garden": a, "other half": b, "noise": noise}
plot_histograms({name: measure_factors(images)["size"] for name, images in sizes.items()}, x_label="share of the picture that the flower covers", bins=40,
                alt="Histograms of the flower's size: the two halves overlap, noise stands alone at the right end")

# %% [markdown]
# `factor_distance` puts a number to it: how far the sorted values of one set must be moved to become those of the other (Wasserstein's distance), in units of the spread of the
# reference. Between two real samples it is small but never zero; that is the floor, the best that any generator can reach with so many pictures.

# %%
floor, far = factor_distance(b, a), factor_distance(noise, a)
names = list(floor)
assert floor["mean"] < 0.15 and far["mean"] > 10 * floor["mean"]
plot_lines({"other half": [floor[name] for name in names], "noise": [far[name] for name in names]}, x_ticks=names, markers=True, log_y=True,
           y_label="distance to half of the garden", alt="Distance in each factor, log axis: the other half stays near 0.1, noise lies between 1 and 10")

# %% [markdown]
# ## When something is missing
#
# Bad input gets a plain answer:

# %%
for call in (lambda: ProceduralFlowers(size=8), lambda: load_data(profile, "test"), lambda: get_profile("huge")):
    try:
        call()
    except ValueError as error:
        print(error)

# %% [markdown]
# ## Your turn
#
# 1. How much memory do the 7,169 training photographs take at 64 x 64 as `uint8`, and how much as float32? Fill in `megabytes`.
# 2. Is the hue of a daisy a good factor to measure? Look at the table of species in `noisout_nb/data.py` and think of what hue means for white.

# %% tags=["exercise"]
megabytes = None  # your answer to 1, as (uint8, float32)

# %% [markdown]
# ## Solutions
#
# 1. Three bytes a pixel, or four times as many:

# %% tags=["solution"]
pixels = 7_169 * 3 * 64 * 64
megabytes = (pixels / 1e6, 4 * pixels / 1e6)
print("{:.0f} MB and {:.0f} MB".format(*megabytes))

# %% [markdown]
# 2. A daisy's petals have a saturation of 0.08: whatever the hue, they are white. Its hue cannot be seen, so it cannot be measured; the two colour axes have no such problem, since
# white simply lies near their origin.

# %% tags=["solution"]
daisies = garden.labels == garden.classes.index("daisy")
assert measured["red_green"][daisies].abs().mean() < measured["red_green"][~daisies].abs().mean()

# %% [markdown]
# Next: [02_forward_process](02_forward_process.ipynb) dissolves a flower in noise.
