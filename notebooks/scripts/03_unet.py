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
# # 03 Build the network
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/noisOut/noisOut/blob/main/notebooks/03_unet.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/noisOut/noisOut/main?labpath=notebooks/03_unet.ipynb)
#
# **What you'll do**: build a UNet from its pieces, load trained weights into it, and generate
# flowers with it.
#
# **What you'll learn**: how a network is told the timestep, what keeps a deep stack of blocks
# stable, how distant parts of an image exchange information, why patches suit the prediction of
# $x_0$, and where parameters and computing time go.
#
# **What you need**: notebook 02 and some PyTorch (convolutions, modules). Half a minute on two CPU
# cores.

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
from types import SimpleNamespace

import ipywidgets as widgets
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from noisout_nb.checkpoints import load_pretrained
from noisout_nb.data import load_data, species_labels
from noisout_nb.diagram import draw_unet, unet_layers
from noisout_nb.exercises import check
from noisout_nb.figures import Picture, filmstrip, image_grid, plot_bars, plot_lines, stack
from noisout_nb.generate import sample_image
from noisout_nb.guidance import ClassifierFreeGuidance
from noisout_nb.profiles import PROFILES, get_profile
from noisout_nb.sampling import sample
from noisout_nb.unet import AttentionBlock, ResBlock, UNet, group_norm, zero_init
from noisout_nb.widgets import Explorer

# %%
torch.manual_seed(0)
profile = get_profile()

# %% [markdown]
# ## The job
#
# The network does what the `Denoiser` of notebook 00 did: *given a noisy image $x_t$, the timestep
# $t$ and perhaps a label $y$, predict the clean image $x_0$*. We begin at the end, with a network
# that has learned it: the repository ships weights trained on photographs of flowers (64 x 64
# pixels). It generates a sunflower; then we add noise to that sunflower and let the network predict
# the clean image again.

# %%
trained, process, classes = load_pretrained(PROFILES["flowers64"])
label = species_labels("sunflower", classes)
flower = sample_image("sunflower", seed=1)

# %%
t = torch.tensor([99, 299, 499, 699, 899])
noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
x_t = process.q_sample(flower.expand(5, -1, -1, -1), t, noise)
with torch.no_grad():
    predicted = process.predict_start(x_t, t, trained(x_t, t, label.expand(5)))
filmstrip(
    [x_t, predicted],
    row_labels=["input $x_t$", "predicted $x_0$"],
    column_labels=[f"t = {i}" for i in t.tolist()],
    alt="A generated sunflower with ever more noise, and below what the trained network predicts: "
    "sharp at t = 99, smoother further on, an average sunflower at t = 899",
)

# %% [markdown]
# Input and output have the same shape, (3, H, W), and the network must do two things at once: see
# the whole (is there a flower, and where is its centre?) and keep every detail in its place. A
# **UNet** does both. It halves the resolution several times to see the whole, doubles it again as
# often, and passes the details across by *skip connections*.
#
# ## The map
#
# This is the network of our profile. Each box is a layer or block, with its number of output
# channels; each row is one resolution. (The first row has half the side of the image: the image is
# cut into patches of 2 x 2 pixels first, which we come to below.)

# %% tags=["cover"]
model = UNet(**profile.network, num_classes=6)
draw_unet(model)

# %% [markdown]
# Follow the arrows: from $x_t$ down on the left, through the middle, up on the right. Encoder
# outputs are pushed onto a stack, and decoder blocks pop them (dashed): the last one pushed is
# popped first. Timestep and label become one vector, the *embedding*, which enters every residual
# block (brown).
#
# We build the parts one by one, then put them together.
#
# ## Position embeddings: which timestep?
#
# An integer $t$ has to become something that a network can use. A single number will hardly do:
# scaled to $[0, 1]$, the timesteps $t = 3$ and $t = 4$ would differ by a thousandth. As in
# notebook 00 we use sines and cosines of many frequencies, here those of the transformer (Vaswani
# et al. 2017), from 1 radian per timestep down to one ten-thousandth,
#
# $$\text{emb}(t) = [\sin \omega_0 t, \dots, \sin \omega_k t,\
# \cos \omega_0 t, \dots, \cos \omega_k t], \qquad \omega_i = 10000^{-i/k}$$

# %%
from noisout_nb.unet import SinusoidalPositionEmbeddings


def my_embeddings(t, dim):
    frequencies = 10_000 ** -(torch.arange(dim // 2) / (dim // 2 - 1))
    angles = t[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


t = torch.arange(1000)
embeddings = my_embeddings(t, 64)
assert_close(embeddings, SinusoidalPositionEmbeddings(64)(t), atol=1e-3, rtol=0)

# %%
figure = Figure(figsize=(7.2, 3))
axes = figure.add_subplot(xlabel="timestep t", ylabel="channel", yticks=[0, 16, 32, 48])
axes.set_title("sines (channels 0 to 31) above, cosines (32 to 63) below", fontsize=10)
image = axes.imshow(embeddings[:200].T, aspect="auto", cmap="RdBu", interpolation="nearest")
figure.colorbar(image, label="value")
Picture.from_figure(
    figure,
    "Embeddings of t = 0 to 199 as a heat map: in both halves the first channels change sign every "
    "few timesteps, the last ones hardly change; sines begin at 0, cosines at 1",
    bbox_inches="tight",
)

# %% [markdown]
# The fast channels tell neighbours apart, the slow ones give the rough position. How similar are
# two timesteps? Since $\sin a \sin b + \cos a \cos b = \cos(a - b)$, the similarity depends only on
# the distance between them:

# %%
similarity = F.cosine_similarity(embeddings[500:501], embeddings)
plot_lines(
    {"similarity": similarity},
    x_label="timestep t",
    y_label="cosine similarity with t = 500",
    size=(720, 260),
    alt="Cosine similarity with t = 500: a sharp peak of 1 at 500, below 0.7 within ten timesteps, "
    "about 0.45 at a distance of 100, then a ripple between 0.1 and 0.5 with little trend",
)


# %% [markdown]
# Neighbours are alike, which is what the network needs: it should do much the same at $t = 500$ and
# $t = 501$. Beyond a hundred timesteps or so the curve is mostly ripple: $t = 990$ is about as
# similar to 500 as $t = 600$ is. So the embedding shows well which timesteps are close, but not how
# far away the others are. The layers that follow must learn what a timestep means.
#
# ## The residual block
#
# Most of the network is one kind of block: norm, SiLU, conv, twice, and the result is *added* to
# the input. The embedding enters in the middle. A linear layer turns it into a *scale* and a
# *shift* for each channel; Dhariwal & Nichol (2021, sec. 3) call this adaptive group normalisation.
# (We leave out the dropout of the package's block, which is active in training only.)

# %%
class MyResBlock(nn.Module):
    def __init__(self, in_channels, out_channels, emb_channels):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb_proj = nn.Linear(emb_channels, 2 * out_channels)
        self.norm2 = group_norm(out_channels)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.emb_proj(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


# %%
x, emb = torch.randn(8, 32, 8, 8), torch.randn(8, 128)
print("a new block changes its input:", not torch.equal(MyResBlock(32, 32, 128)(x, emb), x))


# %% [markdown]
# Two choices need explaining. **Group** normalisation does not look at the other images of the
# batch, as BatchNorm would; a sample must not depend on them. And the second convolution starts
# at **zero** (`zero_init`): every new block is the identity, and learns what to add. That matters
# when many are stacked. We send random features through forty untrained blocks, with and without
# it:

# %%
def spread_by_depth(init):
    h, spread = x, [x.std()]
    for _ in range(40):
        block = MyResBlock(32, 32, 128)
        init(block.conv2)
        with torch.no_grad():
            h = block(h, emb)
        spread.append(h.std())
    return torch.stack(spread)


# %%
plot_lines(
    {
        "second convolution zero": spread_by_depth(zero_init),
        "PyTorch's default": spread_by_depth(nn.Conv2d.reset_parameters),
    },
    x_label="number of blocks",
    y_label="standard deviation",
    size=(720, 240),
    alt="Standard deviation against depth: flat at 1 with zero initialisation, growing to 2.6 "
    "without",
)


# %% [markdown]
# ## Attention: distant petals exchange information
#
# A 3 x 3 convolution sees a pixel and its eight neighbours. For the left petal to get the colour of
# the right one, the network has *attention*, as a transformer does: each position has a query, a
# key and a value, and receives an average of all values, weighted by how well its query matches
# their keys. Several heads do so in parallel.

# %%
class MyAttention(nn.Module):
    def __init__(self, channels, head_channels=32):
        super().__init__()
        self.heads = channels // head_channels
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zero_init(nn.Conv2d(channels, channels, 1))

    def weights_and_values(self, x):
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).view(b, 3, self.heads, c // self.heads, height * width)
        q, k, v = qkv.unbind(1)  # each (b, heads, head_channels, positions)
        weights = torch.softmax(q.transpose(2, 3) @ k / math.sqrt(q.shape[2]), dim=-1)
        return weights, v  # weights: (b, heads, to, from), each row sums to 1

    def forward(self, x):
        weights, v = self.weights_and_values(x)
        return x + self.proj((v @ weights.transpose(2, 3)).reshape(x.shape))


# %% [markdown]
# An untrained block attends to nothing in particular, so we load the weights of a trained one: the
# last attention on the way up, at 8 x 8 positions. A hook catches its input while the trained
# network processes the noisy sunflower. Below, three positions (white squares) and what each
# attends to, averaged over the heads.

# %%
block = [module for module in trained.up.modules() if isinstance(module, AttentionBlock)][-1]
seen = []
hook = block.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
with torch.no_grad():
    trained(x_t[1:2], torch.tensor([299]), label)
hook.remove()

mine = MyAttention(seen[0].shape[1])
mine.load_state_dict(block.state_dict())
with torch.no_grad():
    assert_close(mine(seen[0]), block(seen[0]), atol=1e-4, rtol=1e-4)
    weights = mine.weights_and_values(seen[0])[0].mean((0, 1))  # over the heads: (to, from)

print("attention weights:", tuple(weights.shape), f"each row sums to {weights[0].sum():.2f}")

# %%
side = seen[0].shape[-1]  # positions in a row
p = 64 // side  # pixels of a position
border = F.pad(torch.zeros(p - 2, p - 2), (1, 1, 1, 1), value=1).bool()
queries, attended = [], []
for row, column in ((3 * side // 8, 3 * side // 8), (3 * side // 8, side // 8), (0, 0)):
    marked = flower[0].clone()
    square = marked[:, row * p : row * p + p, column * p : column * p + p]
    square[:, border] = 1
    queries.append(marked)
    light = weights[row * side + column].view(1, 1, side, side)
    light = F.interpolate(light / light.max(), size=64)[0]
    attended.append(light.expand(3, -1, -1) * 2 - 1)

filmstrip(
    [queries, attended],
    row_labels=["this position", "attends to"],
    column_labels=["the centre", "a petal", "the background"],
    scale=2,
    alt="Above, the sunflower with a position marked in its centre, on a petal and in a corner; "
    "below, maps of 8 x 8 squares, bright where that position attends: the centre to the centre, "
    "the petal to what surrounds the centre, the corner to the background",
)

# %% [markdown]
# Nobody told the network what a centre is, yet the centre attends to the centre, the petal to what
# surrounds the centre, and the background to the background: each to similar places, even distant
# ones.
# Attention is not cheap: each of the $n$ positions attends to all $n$, so twice the side means four
# times the positions and sixteen times the work. That is why it sits at low resolutions only.
#
# ## Patches, and why they go with $x_0$
#
# The first level is the most expensive one, because it has the most positions. *Patchifying* makes
# it cheaper: each square of p x p pixels becomes one position with $3p^2$ channels
# (`pixel_unshuffle`), and the way back at the output is exact.

# %%
flowers = torch.stack([image for image, _ in load_data(profile, "val")])
for p in (1, 2, 4):
    small = UNet(**profile.network | {"patch_size": p, "attention_resolutions": ()})
    with FlopCounterMode(display=False) as counter:
        small(flowers[:1], torch.tensor([0]))
    shape = tuple(F.pixel_unshuffle(flowers[:1], p).shape[1:])
    millions = counter.get_total_flops() / 1e6
    print(f"patches of {p}: {shape}, {millions:4.0f} million FLOPs per image")

# %% [markdown]
# This has a price. With patches of 4 x 4, each position holds 48 numbers; a network with fewer
# channels cannot carry them all. How much gets through? The best that a *linear* bottleneck of $k$
# channels can do is to keep the first $k$ principal components, so we measure that, for patches of
# flowers and for patches of noise.

# %%
noise = torch.randn(flowers.shape, generator=torch.Generator().manual_seed(0))


def principal_components(images):
    patches = F.pixel_unshuffle(images, 4).permute(0, 2, 3, 1).reshape(-1, 48)
    variances, directions = torch.linalg.eigh(torch.cov(patches.T))
    return variances.flip(0), directions.flip(1)


kept = {"flowers": principal_components(flowers), "noise": principal_components(noise)}
share = {name: variances.cumsum(0) / variances.sum() for name, (variances, _) in kept.items()}
for name, values in share.items():
    print(f"12 of 48 channels keep {values[11]:.0%} of the variance of {name}")


# %%
def through_bottleneck(images, name, k=12):
    patches, directions = F.pixel_unshuffle(images, 4), kept[name][1][:, :k]
    mean = patches.mean((0, 2, 3), keepdim=True)
    h = torch.einsum("bchw,ck->bkhw", patches - mean, directions)  # k channels are left
    return F.pixel_shuffle(torch.einsum("bkhw,ck->bchw", h, directions) + mean, 4)


# %%
pairs = [flowers[3], through_bottleneck(flowers, "flowers")[3]]
pairs += [noise[3], through_bottleneck(noise, "noise")[3]]
channels = torch.arange(1, 49)
stack(
    plot_lines(
        {name: (channels, values) for name, values in share.items()},
        x_label="channels of the bottleneck (of 48)",
        y_label="share of variance kept",
        size=(720, 240),
    ),
    image_grid(
        pairs,
        scale=128 // profile.image_size,
        column_labels=["flower", "through 12 of 48", "noise", "through 12 of 48"],
    ),
    alt="Above, the share of variance kept against the channels: flowers rise to 0.9 within 6 and "
    "0.96 at 12, noise follows the diagonal. Below, a flower and noise through 12 of 48 channels: "
    "the flower is hardly changed, the noise has lost most of its contrast",
)


# %% [markdown]
# That is the argument for predicting $x_0$. Noise has 48 independent numbers per patch, and a
# network that predicts it must carry every one of them from input to output. An image has
# structure, and a quarter of the channels holds nearly all of it. Our profiles use patches of
# 2 x 2, whose 12 numbers would fit through 32 channels; but a network that predicts $x_0$ need not
# reserve channels for noise, and can use all of them for what flowers look like. The larger the
# patches, the more this matters.
#
# ## Timestep and label
#
# The sines and cosines go through a small MLP. Each label has a learned vector of the same length,
# which is added; one extra vector stands for "no label", which guidance (notebook 06) will need.

# %%
def my_time_mlp(channels):
    return nn.Sequential(
        SinusoidalPositionEmbeddings(channels),
        nn.Linear(channels, 4 * channels),
        nn.SiLU(),
        nn.Linear(4 * channels, 4 * channels),
    )


print("embedding of three timesteps:", tuple(my_time_mlp(32)(torch.tensor([0, 500, 999])).shape))

# %% [markdown]
# What does a trained network do with the embedding? Here is the scale that its first residual block
# applies to five of its channels, as a function of $t$:

# %%
with torch.no_grad():
    emb = trained.time_mlp(torch.arange(1000)) + trained.label_emb(label)
    scale = 1 + trained.down[0].res.emb_proj(F.silu(emb)).chunk(2, dim=1)[0]

plot_lines(
    {f"channel {i}": scale[:, i] for i in range(0, 30, 6)},
    x_label="timestep t",
    y_label="scale",
    size=(720, 260),
    alt="The scale of five channels of the trained network's first block against t: smooth curves, "
    "most of which change a great deal between clean and noisy images",
)


# %% [markdown]
# The curves are smooth: the MLP has turned the ripples of the embedding into gradual changes. It
# fades channels in and out as the noise grows, so one network acts like many, one for each noise
# level.
#
# ## The whole network
#
# Now we put the parts together. A block is a residual block, followed by attention at the
# resolutions that have it:

# %%
class MyBlock(nn.Module):
    def __init__(self, in_channels, out_channels, c, level):
        super().__init__()
        side = c.image_size // c.patch_size // 2**level
        self.res = MyResBlock(in_channels, out_channels, 4 * c.channels)
        with_attention = side in c.attention_resolutions
        self.attention = MyAttention(out_channels) if with_attention else nn.Identity()

    def forward(self, x, emb):
        return self.attention(self.res(x, emb))


# %% [markdown]
# And this is all of it; `c` is the configuration. `__init__` makes the layers in the order of the
# drawing. Each output on the way down is kept for a skip connection, so we note how many channels
# it has (its width). The way up has one block more per level, for one more skip connection: the
# output of the layer that halved the side or, at the top, of the first convolution. Input and skip
# connection are concatenated, so their widths add. `forward` follows the arrows. The side is
# doubled by repeating each pixel and smoothing with a convolution; a transposed convolution, whose
# patches overlap unevenly, would leave checkerboard artefacts.

# %%
class MyUNet(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, widths = c, [round(c.channels * mult) for mult in c.channel_mults]
        self.time_mlp = my_time_mlp(c.channels)
        self.label_emb = nn.Embedding(c.num_classes + 1, 4 * c.channels)
        # the way down
        width = widths[0]
        self.conv_in = nn.Conv2d(3 * c.patch_size**2, width, 3, padding=1)
        self.down, self.skip_widths = nn.ModuleList(), [width]
        for level, level_width in enumerate(widths):
            for _ in range(c.num_res_blocks):
                self.down.append(MyBlock(width, level_width, c, level))
                width = level_width
                self.skip_widths.append(width)
            if level < len(widths) - 1:  # half the side
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                self.skip_widths.append(width)
        # the middle
        self.middle1 = MyResBlock(width, width, 4 * c.channels)
        self.middle_attention = MyAttention(width)
        self.middle2 = MyResBlock(width, width, 4 * c.channels)
        # the way up
        skip_widths, self.up = [*self.skip_widths], nn.ModuleList()
        for level, level_width in reversed([*enumerate(widths)]):
            for _ in range(c.num_res_blocks + 1):
                self.up.append(MyBlock(width + skip_widths.pop(), level_width, c, level))
                width = level_width
            if level > 0:  # after the side is doubled
                self.up.append(nn.Conv2d(width, width, 3, padding=1))
        self.norm_out = group_norm(width)
        self.conv_out = zero_init(nn.Conv2d(width, 3 * c.patch_size**2, 3, padding=1))

    def forward(self, x, t, y):
        emb = self.time_mlp(t) + self.label_emb(y)
        h = self.conv_in(F.pixel_unshuffle(x, self.c.patch_size))
        skips = [h]
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, MyBlock) else layer(h)
            skips.append(h)
        h = self.middle2(self.middle_attention(self.middle1(h, emb)), emb)
        for layer in self.up:
            if isinstance(layer, MyBlock):
                h = layer(torch.cat([h, skips.pop()], dim=1), emb)
            else:
                h = layer(F.interpolate(h, scale_factor=2))
        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.c.patch_size)


# %%
my_unet = MyUNet(SimpleNamespace(**trained.config))
takers = sum(isinstance(layer, MyBlock) for layer in my_unet.up)
print(f"{sum(p.numel() for p in my_unet.parameters()):,} parameters")
print(f"{takers} blocks take a skip connection, their widths: {my_unet.skip_widths}")

# %% [markdown]
# The parts have the same names as the package's, so the trained weights fit: `load_state_dict`
# raises an error if a single tensor is missing, left over or of another shape. Does our network
# also predict the same?

# %%
my_unet.load_state_dict(trained.state_dict())
with torch.no_grad():
    ours, theirs = (network(x_t, t[99::200], label.expand(5)) for network in (my_unet, trained))

assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
print(f"{sum(p.numel() for p in trained.parameters()):,} parameters in the package's")
for i in range(3):
    print(f"image {i}, mean: {ours[i].mean():z.2f} ours, {theirs[i].mean():z.2f} the package's")

# %% [markdown]
# It does. So it can generate flowers: the package's sampler calls the network that you have just
# read in full.

# %%
my_unet.num_classes, my_unet.null_label = len(classes), len(classes)  # the last embedding: no label
names = ["rose", "gazania", "passion flower", "water lily"]
samples = sample(
    ClassifierFreeGuidance(my_unet, 3.0),
    process,
    species_labels(names, classes),
    shape=(3, 64, 64),
    steps=20,
    seed=1,
)
image_grid(
    samples,
    scale=2,
    column_labels=names,
    alt="A rose, a gazania, a passion flower and a water lily",
)

# %% [markdown]
# ## Where the work goes
#
# Parameters and FLOPs by resolution, for our profile's network again:

# %%
layers = [model.conv_in, *model.down, model.middle1, model.middle_attention, model.middle2]
layers += [*model.up, model.conv_out]
layer_names = {module: name for name, module in model.named_modules()}
with FlopCounterMode(display=False) as counter:
    model(flowers[:1], torch.tensor([0]))
counts = counter.get_flop_counts()
flops = {name.removeprefix("UNet."): sum(count.values()) for name, count in counts.items()}

parameters, work = [0] * len(model.sides), [0] * len(model.sides)
for layer, box in zip(layers, unet_layers(model), strict=True):
    parameters[box.level] += sum(p.numel() for p in layer.parameters())
    work[box.level] += flops[layer_names[layer]]

total = sum(p.numel() for p in model.parameters())
share = sum(work) / counter.get_total_flops()
print(f"counted: {sum(parameters):,} of {total:,} parameters, {share:.0%} of the work")

# %%
names = [f"{side} x {side}" for side in model.sides]
thousands = dict(zip(names, [count / 1e3 for count in parameters], strict=True))
millions = dict(zip(names, [count / 1e6 for count in work], strict=True))
stack(
    plot_bars(
        {"parameters": thousands},
        y_label="thousand\nparameters",
        number="{:.0f}",
        size=(500, 170),
    ),
    plot_bars(
        {"work": millions},
        y_label="million FLOPs\nper image",
        number="{:.0f}",
        size=(500, 170),
    ),
    alt="Bars by resolution: parameters grow from the highest to the lowest resolution, FLOPs "
    "shrink",
)

# %% [markdown]
# Parameters sit at the bottom, where there are many channels. Work sits at the top, where there are
# many positions. The few parameters left over belong to the time MLP, the labels and the last norm.
#
# ## Two checks before training
#
# A new network predicts exactly zero, because its last convolution is zero: its first predictions
# are mid-grey, as notebook 04 shows. And every parameter must learn: a layer that is defined but
# never used is a classic mistake which the loss does not show. So we fill the zeros, which block
# gradients, and check each parameter's gradient.

# %%
x, t, y = flowers[:4], torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, model.null_label])
print("largest value predicted by a new network:", model(x, t, y).abs().max().item())

for parameter in model.parameters():
    if not parameter.any():
        nn.init.normal_(parameter, std=0.02)
model(x, t, y).square().mean().backward()
learning = [p.grad is not None and bool(p.grad.any()) for p in model.parameters()]
print(f"{sum(learning)} of {len(learning)} parameter tensors have a gradient")

# %% [markdown]
# ## Look inside
#
# What do the layers of a trained network compute? We give it the sunflower at twenty noise levels
# and keep the output of five layers.

# %%
watched = {
    "first convolution": trained.conv_in,
    "half-way down": trained.down[len(trained.down) // 2],
    "end of the middle": trained.middle2,
    "half-way up": trained.up[len(trained.up) // 2],
    "end of the way up": trained.up[-1],
}
times, maps = torch.arange(49, 1000, 50), {}
for name, layer in watched.items():
    layer.register_forward_hook(
        lambda module, inputs, output, name=name: maps.update({name: output})
    )
noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
x_t = process.q_sample(flower.expand(20, -1, -1, -1), times, noise)
with torch.no_grad():
    trained(x_t, times, label.expand(20))


# %% [markdown]
# Move $t$ and choose a layer. Near the input the feature maps are noisy copies of the image; in the
# middle they are very coarse; on the way up the shape of the flower comes back, vaguer the larger
# $t$ is.

# %%
def inside(t, layer):
    at, shown = (t - 49) // 50, maps[layer][:, :9]
    brightest = shown.transpose(0, 1).flatten(1).abs().quantile(0.98, dim=1).view(-1, 1, 1, 1)
    images = F.interpolate((shown[at, :, None] / brightest).expand(-1, 3, -1, -1), size=64)
    return image_grid(
        [x_t[at], *images],
        columns=5,
        scale=2,
        alt=f"The noisy sunflower at t = {t} and nine feature maps of the layer '{layer}'",
    )


# %%
Explorer(
    inside,
    t=widgets.IntSlider(249, 49, 999, 50),
    layer=widgets.Dropdown(options=list(watched), value="end of the way up"),
)

# %% [markdown]
# ## What you know now
#
# - The network takes $x_t$, $t$ and perhaps $y$, and predicts $x_0$. It is a UNet: down, middle,
#   up, with skip connections across.
# - Timestep and label become one embedding, which scales and shifts the channels of every residual
#   block.
# - Zero initialisation makes each new block the identity, and the new network predict zero.
# - Attention lets distant positions exchange information, at low resolutions only.
# - Patches make the network cheap, and suit a network that predicts $x_0$.
#
# ## Your turn
#
# Replace `None` or `...` and run the cell; it says whether you are right.
#
# **1. Count.** How many parameters does `ResBlock(64, 128, emb_channels=256)` have? Work it out:
# two norms (a scale and a shift per channel), two 3 x 3 convolutions, the linear layer for the
# embedding, and the 1 x 1 convolution.

# %% tags=["exercise"]
count = None

check(
    "exercise 1",
    count,
    sum(p.numel() for p in ResBlock(64, 128, emb_channels=256).parameters()),
    hint="A convolution from a to b channels has a * 9 * b weights and b biases.",
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# norms = 2 * 64 + 2 * 128
# convolutions = (64 * 9 + 1) * 128 + (128 * 9 + 1) * 128
# count = norms + convolutions + (256 + 1) * 2 * 128 + (64 + 1) * 128
# ```
#
# 295,936 in all, about half of them in the second convolution.
# </details>
#
# **2. A trap.** Some code feeds the embedding with $t/T$ in $[0, 1]$ instead of $t$. Of the 64
# channels of `my_embeddings`, how many move by more than 0.1 (largest minus smallest value) while
# $t/T$ goes from 0 to 0.999?

# %% tags=["exercise"]
moving = None

check(
    "exercise 2",
    moving,
    lambda n: n == (my_embeddings(torch.tensor([0, 0.999]), 64).diff(dim=0).abs() > 0.1).sum(),
    hint="Embed torch.arange(1000) / 1000, then use amax(0) and amin(0).",
)


# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# squeezed = my_embeddings(torch.arange(1000) / 1000, 64)
# moving = (squeezed.amax(0) - squeezed.amin(0) > 0.1).sum()
# ```
#
# Only 11 of 64; the others are nearly constant, and the network could hardly tell the timesteps
# apart.
# </details>
#
# **3. Without skip connections.** Write `no_skips(x, t, y)`: the trained network's prediction with
# zeros in place of all skip connections. What becomes of the sunflower at $t = 99$?

# %% tags=["exercise"]
def no_skips(x, t, y): ...


# %%
at_99 = (x_t[1:2], torch.tensor([99]), label)
widths = [*my_unet.skip_widths]


def without_skip(block, inputs):  # its last channels are those of the skip connection
    h = inputs[0].clone()
    h[:, -widths.pop() :] = 0
    return h, inputs[1]


blocks = [block for block in my_unet.up if isinstance(block, MyBlock)]
hooks = [block.register_forward_pre_hook(without_skip) for block in blocks]
with torch.no_grad():
    expected = my_unet(*at_99)
for hook in hooks:
    hook.remove()
check(
    "exercise 3",
    no_skips(*at_99),
    expected,
    tolerance=0.01,
    hint="MyUNet.forward needs one change: what is appended to skips?",
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# class Blind(MyUNet):
#     def forward(self, x, t, y):
#         emb = self.time_mlp(t) + self.label_emb(y)
#         h = self.conv_in(F.pixel_unshuffle(x, self.c.patch_size))
#         skips = [torch.zeros_like(h)]  # changed
#         for layer in self.down:
#             h = layer(h, emb) if isinstance(layer, MyBlock) else layer(h)
#             skips.append(torch.zeros_like(h))  # changed
#         h = self.middle2(self.middle_attention(self.middle1(h, emb)), emb)
#         for layer in self.up:
#             if isinstance(layer, MyBlock):
#                 h = layer(torch.cat([h, skips.pop()], dim=1), emb)
#             else:
#                 h = layer(F.interpolate(h, scale_factor=2))
#         h = self.conv_out(F.silu(self.norm_out(h)))
#         return F.pixel_shuffle(h, self.c.patch_size)
#
# blind = Blind(my_unet.c)
# blind.load_state_dict(trained.state_dict())
#
# def no_skips(x, t, y):
#     with torch.no_grad():
#         return blind(x, t, y)
#
# image_grid(no_skips(*at_99), scale=2)
# ```
#
# The flower is gone. At little noise nearly everything reaches the output through the skip
# connections; what comes up from 4 x 4 positions cannot replace it.
# </details>
#
# Next: [04_training](04_training.ipynb) trains the network.
