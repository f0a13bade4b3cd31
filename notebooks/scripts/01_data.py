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
# **What you'll do**: look at the images that the series learns from, and bring them, or images of
# your own, into the form that diffusion works on.
#
# **What you'll learn**: why values lie in $[-1, 1]$, what resizing can spoil, why some images are
# held out, and how to *measure* whether two sets of images come from the same distribution.
#
# **What you need**: some PyTorch. Half a minute on a laptop; nothing is downloaded unless you ask
# for it.

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
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from noisout_nb.data import (
    FolderImages,
    ProceduralFlowers,
    load_data,
    resize_and_crop,
    to_float,
    to_uint8,
)
from noisout_nb.evaluation import factor_distance, measure_factors
from noisout_nb.exercises import check
from noisout_nb.figures import image_grid, plot_bars, plot_histograms, plot_points
from noisout_nb.flowers import paint
from noisout_nb.generate import sample_image
from noisout_nb.profiles import DATASETS, get_profile

profile = get_profile()

# %% [markdown]
# A *profile* collects the settings that depend on your machine: which data, how large the images,
# how long to train. The same notebooks run on a laptop and on a GPU.
#
# ## The embedded flowers
#
# Small flowers, computed by a formula: six species, no download, learnable in two minutes on a CPU.

# %%
garden = ProceduralFlowers(size=32, count=600, seed=0)
rows = [(garden.labels == label).nonzero()[:4, 0] for label in range(len(garden.classes))]
alt = "Embedded flowers, four of each species, from white daisies to violet starflowers"
flowers = garden.images[torch.cat(rows)]
image_grid(flowers, columns=4, scale=2, row_labels=garden.classes, alt=alt)

# %% [markdown]
# The formula works at any resolution. At 128 pixels:

# %% tags=["cover"]
large = ProceduralFlowers(size=128, count=12, seed=5)
alt = "Six embedded flowers at 128 pixels, with shaded petals and soft backgrounds"
image_grid(large.images[:6], columns=3, scale=1, alt=alt)

# %% [markdown]
# Each flower is determined by a few numbers, its *factors*. We change one of them at a time:

# %%
shown = ["radius", "petals", "hue", "tilt", "background_value"]
flower = {name: values[7:8].repeat(4) for name, values in large.factors.items()}
rows = []
for name in shown:
    values = large.factors[name]
    steps = torch.linspace(float(values.min()), float(values.max()), 4)
    steps = steps.round() if name == "petals" else steps
    rows.append(paint(64, large.labels[7:8].repeat(4), flower | {name: steps}))

# %%
alt = "One flower four times: larger, with more petals, in other hues, tilted, on lighter grounds"
image_grid(torch.cat(rows), columns=4, scale=1, row_labels=shown, alt=alt)

# %% [markdown]
# Photographs come without known factors. Here we know their true distribution, so we can measure
# later whether a network has learned it.
#
# ## The photographs
#
# For real flowers there is **Oxford Flowers102**: 8,189 photographs of 102 species, which
# `load_data` downloads (345 MB) if the profile asks for them. Their licence is unclear, so the
# stored outputs of this series show embedded and generated flowers only. The next cell shows the
# data of your profile: with `NOISOUT_PROFILE=flowers64` they appear here.

# %%
data = load_data(profile)
print(f"{DATASETS[profile.dataset]}: {len(data):,} images of {len(data.classes)} classes")
image_grid(data.images[:16], alt=f"The first sixteen training images: {DATASETS[profile.dataset]}")

# %% [markdown]
# Until then, these give an idea of what the photographs are like. They are generated, by the
# network in `models/` that was trained on the photographs. How it does that is what the series is
# about.

# %%
names = ["oxeye daisy", "corn poppy", "osteospermum"]
generated = sample_image(names, sampler="ddim", steps=15, seed=3)
alt = "Three generated flowers that look like photographs: " + ", ".join(names)
image_grid(generated, columns=3, scale=2, column_labels=names, alt=alt)

# %% [markdown]
# Whatever the data, `data[i]` is an image and its label. Images are decoded once and kept as
# `uint8`, a quarter of the memory that floats take.

# %%
image, label = data[0]
print(f"stored: {data.images.dtype}, {data.images.nbytes / 1e6:.1f} MB for all")
print(f"given:  {image.dtype}, shape {tuple(image.shape)}, a {data.classes[label]}")


# %% [markdown]
# ## From pixels to $[-1, 1]$
#
# Diffusion mixes images with Gaussian noise of mean 0 and variance 1. Pixels should be on the same
# scale, so their 256 levels are mapped to $[-1, 1]$:

# %%
def my_to_float(pixels):
    return pixels / 255 * 2 - 1


levels = torch.tensor([0, 64, 128, 255], dtype=torch.uint8)
torch.testing.assert_close(my_to_float(levels), to_float(levels))
print(*[f"{float(value):+.3f}" for value in my_to_float(levels)])

# %%
grid = torch.linspace(-3, 3, 121)
normal = (-(grid**2) / 2).exp() / (2 * torch.pi) ** 0.5
pixels, bell = to_float(data.images[:200]), {"standard normal noise": (grid, normal)}
alt = "Pixel values lie between -1 and 1, most of them dark; the noise's bell is wider"
plot_histograms({"pixels": pixels}, curves=bell, x_label="value", size=(720, 260), alt=alt)

# %% [markdown]
# The scales agree; most pixels are darker than mid-grey, 0. On the way back, values must be
# *rounded*. A cast to `uint8` truncates, which makes every generated image darker. In grey levels,
# on average:

# %%
exact = 255 * torch.rand(100_000, generator=torch.Generator().manual_seed(0))
rounded = to_uint8(exact / 127.5 - 1).float()
print(f"a cast is off by {(exact - exact.to(torch.uint8)).mean():.1f} levels")
print(f"rounding is off by {(exact - rounded).mean().abs():.1f} levels")

# %% [markdown]
# ## One size for all
#
# Photographs come in all shapes, a batch has one. Two ways to bring a wide image to a
# square: squash it, or resize the short side and crop the centre.

# %%
wide = ProceduralFlowers(size=256, count=4, seed=5).images[3].float()
wide = F.pad(wide[None], (128, 128, 0, 0), mode="replicate")
squashed = F.interpolate(wide, (64, 64), mode="bilinear", antialias=True)[0].to(torch.uint8)
cropped = resize_and_crop(wide[0].to(torch.uint8), 64)
alt = "A flower squashed to half its width, and the same flower cropped in its true shape"
image_grid([squashed, cropped], columns=2, scale=2, column_labels=["squashed", "cropped"], alt=alt)

# %% [markdown]
# A network trained on squashed flowers generates squashed flowers. Shrinking has a trap of its own:
# detail too fine for the small image turns into patterns that were never there if single pixels are
# picked. This is *aliasing*. It is plain in a test pattern, and spoils the edges of a flower:

# %%
axis = torch.linspace(-1, 1, 512)
rings = torch.cos(150 * (axis[:, None] ** 2 + axis**2)).expand(3, 512, 512)
factors = {name: values[7:8] for name, values in large.factors.items()}
originals = torch.stack([rings, paint(512, large.labels[7:8], factors)[0]])

# %%
bilinear = F.interpolate(originals, (64, 64), mode="bilinear")
antialiased = F.interpolate(originals, (64, 64), mode="bilinear", antialias=True)
whole = F.interpolate(originals, (128, 128), mode="bilinear", antialias=True)
small = [originals[:, :, ::8, ::8], bilinear, antialiased]
panels = [whole, *[F.interpolate(images, (128, 128)) for images in small]]

# %%
names = ["original", "every 8th pixel", "bilinear", "antialiased"]
images = torch.stack(panels, dim=1).flatten(0, 1)  # rings in the first row, flowers in the second
alt = "Rings and a flower at 64 pixels: false rings and jagged petals without antialiasing"
image_grid(images, columns=4, scale=1, column_labels=names, alt=alt)


# %% [markdown]
# Only the last column is faithful; from the others a network would learn jagged petals.
# `resize_and_crop` antialiases. (Many resizing functions do not by default, `F.interpolate` above
# among them.)
#
# ## Your own images
#
# The series runs on any folder of images: set `NOISOUT_DATA=path/to/images` and
# `NOISOUT_PROFILE=folder`, and the notebooks and `python -m noisout_nb train` learn from them. Each
# subfolder is a class. Until you name a folder, this cell makes one with the kinds of files that
# real folders hold: wide and tall, with a palette, in print colours (CMYK), transparent, grey,
# rotated by EXIF.

# %%
def save_mixed(folder):
    for i, label in enumerate(large.labels.tolist()):
        path = folder / large.classes[label]
        path.mkdir(parents=True, exist_ok=True)
        image = to_pil_image(large.images[i])
        wide, tall = image.crop((0, 14, 128, 114)), image.crop((14, 0, 114, 128))
        turned = image.getexif()
        turned[0x0112] = 6  # EXIF's orientation: to be shown turned by 90 degrees
        kind = i % 6
        if kind == 0:
            wide.save(path / f"{i} wide.bmp")
        elif kind == 1:
            tall.convert("P").save(path / f"{i} palette.gif")
        elif kind == 2:
            image.convert("CMYK").save(path / f"{i} print colours.jpg", quality=95)
        elif kind == 3:
            image.putalpha(Image.radial_gradient("L").resize((128, 128)).point(lambda p: 255 - p))
            image.save(path / f"{i} transparent.webp")
        elif kind == 4:
            tall.convert("L").save(path / f"{i} grey.tif")
        else:
            image.rotate(90).save(path / f"{i} turned.jpg", exif=turned, quality=95)


# %%
folder = profile.runs / "mixed"  # or name yours here: Path("path/to/images")
if folder == profile.runs / "mixed":
    save_mixed(folder)
files = sorted(file for file in folder.rglob("*.*") if file.is_file())
for file in files[:6]:
    with Image.open(file) as opened:
        print(f"{file.name:20} {opened.mode:5} {opened.width} x {opened.height}")

# %%
own = FolderImages(64, "train", folder)
own_held_out = FolderImages(64, "val", folder)
print(f"{len(own)} images to learn from, {len(own_held_out)} held out, {len(own.classes)} classes")
alt = "Images read from the folder: upright, square and in RGB"
image_grid(own.images[:6], columns=3, scale=2, alt=alt)

# %% [markdown]
# Whatever the format, the result is an upright RGB image of one size. Files that cannot be read are
# reported and left out.
#
# ## What is held out
#
# A network that memorised its training images would pass every test on them. So some images are
# *held out*: all evaluation uses these, and the network is never trained on them. Of Flowers102
# they are the 1,020 images of its validation split, of the embedded flowers 512 with another seed,
# of a folder about one image in eight, chosen by a hash of its name.

# %%
held_out = load_data(profile, "val")
training_set = {image.numpy().tobytes() for image in data.images}
shared = sum(image.numpy().tobytes() in training_set for image in held_out.images)
print(f"{len(data):,} to learn from, {len(held_out):,} held out, in both: {shared}")

# %% [markdown]
# ## When an image may be flipped
#
# If a mirrored image is as likely as the image itself, random flips double the data. Is it? We
# compare the mean of all training images with its mirror image. In the difference, grey means
# equal:

# %%
mean = to_float(data.images).mean(0)
difference = 4 * (mean - mean.flip(-1))
shown = [mean, mean.flip(-1), difference]
labels = ["mean image", "mirrored", "difference x 4"]
alt = "The mean image, its mirror image, and their difference: the flower's left half is brighter"
image_grid(shown, columns=3, scale=4, column_labels=labels, alt=alt)

# %%
print(f"profile {profile.name!r} flips: {profile.flip}")

# %% [markdown]
# The embedded flowers are lit from the left, so a mirrored one is not in their distribution: `flip`
# is off. In photographs the light comes from either side: there it is on. A vertical flip is never
# right, since light comes from above.
#
# ## Are two sets of images alike?
#
# Later we shall ask whether generated flowers are like real ones, not one by one, but as a
# set. `measure_factors` sees the pixels only, and takes those whose colour is far from the border's
# for the flower. This gives its size and colour, and the background's brightness. Since the true
# factors are known, we can see whether the measurement is any good:

# %%
measured = measure_factors(to_float(garden.images))
known = garden.factors
pairs = {
    "background": (known["background_value"], measured["background"]),
    "size": (known["radius"], measured["size"]),
    "red - green": (known["hue"], measured["red_green"]),
    "yellow - blue": (known["hue"], measured["yellow_blue"]),
}

# %%
names = ["grey", "firebrick", "cornflowerblue", "orchid", "orange", "rebeccapurple"]
species = torch.tensor([to_rgb(name) for name in names])[garden.labels]
alt = "Background and size rise with the known factors; the colours form a cluster per species"
label = "known factor"
plot_points(pairs, colors=species, point_size=6, x_label=label, y_label="measured", alt=alt)

# %% [markdown]
# Each species has its colour in the figure; the daisies are grey. The background's brightness is
# measured closely. The size follows the radius, spread by the tilt and by the shapes of the petals.
# The hue is an angle that jumps from 1 to 0 at red; measured as two numbers, red minus green and
# yellow minus blue, it does not jump.

# %%
for name in ("background", "size"):
    x, y = pairs[name]
    print(f"correlation of {name}: {float(torch.corrcoef(torch.stack([x, y]))[0, 1]):.2f}")

# %% [markdown]
# One number per image makes a distribution per set of images. Two halves of our 600 flowers agree,
# noise is far away:

# %%
half, other = to_float(garden.images[:300]), to_float(garden.images[300:])
noise = torch.randn(300, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
sets = {"one half of the flowers": half, "other half": other, "noise": noise}

# %%
sizes = {name: measure_factors(images)["size"] for name, images in sets.items()}
label = "share of the image that the flower covers"
alt = "Histograms of the flower's size: the two halves overlap, noise stands apart on the right"
plot_histograms(sizes, x_label=label, bins=40, size=(720, 260), alt=alt)

# %% [markdown]
# `factor_distance` turns this into numbers: how far, on average, the sorted values of one set must
# move to become those of the other (the *Wasserstein distance*), in standard deviations.

# %%
floor, far = factor_distance(other, half), factor_distance(noise, half)
bars = {"other half": floor, "noise": far}
alt = "Distance in each factor: the other half near 0.1, noise over ten times as far"
plot_bars(bars, y_label="distance to the first half", alt=alt)

# %% [markdown]
# Two finite sets of real images are never at distance 0: what is left is chance, and with as many
# samples no generator can be expected to do better. [07_evaluation](07_evaluation.ipynb) builds on
# this.
#
# ## Exercises
#
# Write your answers into the first cell; the next one checks them.
#
# 1. How many megabytes (millions of bytes) do the 7,169 training photographs take at 64 x 64
#    pixels: as `uint8`, and as float32? Two numbers.
# 2. For which species of the embedded flowers is the factor `hue` invisible in the image?
# 3. Write the way back from floats to `uint8`: nearest level, and values beyond -1 and 1 clamped.

# %%
megabytes = None  # (as uint8, as float32)
species_without_hue = None  # a name


def my_to_uint8(images):
    return None


# %%
pixels = 7_169 * 3 * 64 * 64
check(
    "exercise 1", megabytes, (pixels / 1e6, 4 * pixels / 1e6), 1, "An RGB pixel is three numbers."
)
check("exercise 2", species_without_hue, "daisy", hint="Look for grey points in the scatter plots.")
x = torch.tensor([-1.2, -1.0, -0.501, 0.003, 0.999, 1.0, 7.0])
check("exercise 3", my_to_uint8(x), to_uint8(x), hint=f"For {x.tolist()} it differs from to_uint8.")

# %% [markdown]
# <details><summary>Solutions</summary>
#
# 1. One byte per number, or four:
#
# ```python
# megabytes = (88, 352)
# ```
#
# 2. A daisy's petals are white, and white has no hue:
#
# ```python
# species_without_hue = "daisy"
# ```
#
# 3. The inverse of `my_to_float`, rounded before it is cast:
#
# ```python
# def my_to_uint8(images):
#     return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
# ```
#
# </details>
#
# Next: [02_forward_process](02_forward_process.ipynb) dissolves a flower in noise.
