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
# **What you'll do**: build the UNet piece by piece, and prove each piece equal to the one in `noisout_nb/unet.py`.
#
# **What you'll learn**: how a network can know what time it is, what holds a deep stack of blocks together, how distant parts of a picture talk to
# each other, and where parameters and computing time go.
#
# **What you need**: notebook 02 and some PyTorch (convolutions, modules). Half a minute on two CPU cores.

# %%
import sys

if "google.colab" in sys.modules:  # there a notebook comes alone: fetch what it imports, once
    import subprocess

    subprocess.run("test -d noisOut || git clone -q --depth 1 https://github.com/noisOut/noisOut", shell=True, check=True)
    sys.path.insert(0, "noisOut")

# %%
import math

import ipywidgets as widgets
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from noisout_nb.data import load_data
from noisout_nb.display import Explorer, Picture, image_grid, plot_lines, stack
from noisout_nb.profiles import PROFILES, get_profile
from noisout_nb.sampling import sample
from noisout_nb.training import load_model
from noisout_nb.unet import (
    AttentionBlock, Block, Downsample, ResBlock, SinusoidalPositionEmbeddings, UNet, Upsample, group_norm,
)  # fmt: skip

torch.manual_seed(0)
profile = get_profile()


# %% [markdown]
# ## The job
#
# Sampling asks the same question a thousand times: *here is a noisy picture $x_t$ and the time $t$; what is the noise in it?* The answer has
# the shape of the picture. So the network maps (3, H, W) to (3, H, W), and must do two things at once: see the whole (is this a flower, where is its
# middle?) and keep every pixel in its place. A **UNet** does: it halves the picture again and again to see the whole, doubles it back, and carries the details across by
# *skip connections*.

# %% [markdown]
# ## What time is it?
#
# A thousand integers $t$ must become something that a network can use. One number would hardly do: the difference between $t=3$ and $t=4$ would be a thousandth of the
# input's range. The answer is older than diffusion (Vaswani et al. 2017): a row of clocks. Each turns at its own speed, the first by one radian a step, the last by a ten-thousandth; a
# sine and a cosine read each of them.

# %%
def my_embeddings(t, dim):
    frequencies = 10_000 ** -(torch.arange(dim // 2) / (dim // 2 - 1))
    angles = t[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


t = torch.arange(1000)
embeddings = SinusoidalPositionEmbeddings(64)(t)
assert_close(my_embeddings(t, 64), embeddings, atol=1e-3, rtol=0)

# %% [markdown]
# Implementations differ in the order of sines and cosines and in the frequencies, and then trained weights are not interchangeable. So we pin it to values that
# anyone can compute: all sines of $t=0$ are 0 and all cosines 1; at $t=1$ the first clock reads $\sin 1$, the last one $\cos 0.0001$.

# %%
assert_close(embeddings[0], torch.cat([torch.zeros(32), torch.ones(32)]))
assert_close(embeddings[1, [0, 63]], torch.tensor([math.sin(1), math.cos(1e-4)]))

# %%
image_grid(embeddings[:200].T[None, None], scale=3, arrow="t = 0 to 199", alt="Embeddings of t = 0 to 199, a column each: stripes that are fast in the first channels and ever slower further on, sines above cosines")

# %% [markdown]
# Two times that are close have similar embeddings, two that are far do not. That is what the network will need: it behaves alike at $t = 500$ and $t = 501$.

# %%
similarity = F.cosine_similarity(embeddings[500:501], embeddings)
plot_lines({"similarity": similarity}, x_label="t", y_label="cosine similarity with t = 500", vlines={"500": 500},
           alt="Cosine similarity with the embedding of t = 500: a sharp peak of 1 at 500, falling off to both sides")

# %% [markdown]
# A trap: the clocks are made for integers up to a thousand. Fed with $t/T$ in $[0, 1]$, most of them hardly move:

# %%
squeezed = SinusoidalPositionEmbeddings(64)(t / 1000)
moving = (squeezed.amax(0) - squeezed.amin(0) > 0.1).sum(), (embeddings.amax(0) - embeddings.amin(0) > 0.1).sum()
print(f"channels that move by more than 0.1: {moving[0]} of 64 for t in 0..1, {moving[1]} of 64 for t in 0..999")
assert moving[0] < moving[1] / 2

# %% [markdown]
# ## A block that cannot do harm
#
# Most of the network is one kind of block: normalise, bend (SiLU), convolve, twice, and *add* the result to the input. Its second convolution starts with all weights
# zero. So every block begins as "change nothing": a deep stack of them starts as the identity, neither blowing up nor wiping out what goes through it, and each block
# learns what to add.

# %%
block = ResBlock(32, 32, emb_channels=128)
x, emb = torch.randn(2, 32, 8, 8), torch.randn(2, 128)
assert torch.equal(block(x, emb), x)


# %% [markdown]
# The time enters in the middle: from the embedding, a linear layer makes a *scale* and a *shift* for each channel. Dhariwal & Nichol (2021, sec. 3) call this adaptive group
# normalisation, and found it better than adding the embedding, as Ho et al. had done. To see it work, the zeros must go.

# %%
def my_block(block, x, emb):
    h = block.conv1(F.silu(block.norm1(x)))
    scale, shift = block.emb_proj(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
    h = block.norm2(h) * (1 + scale) + shift
    return x + block.conv2(F.silu(h))


torch.nn.init.normal_(block.conv2.weight, std=0.05)
assert_close(my_block(block, x, emb), block(x, emb))
assert not torch.allclose(block(x, emb), block(x, -emb)), "another time, another answer"

# %% [markdown]
# *Group* normalisation does not look at the other pictures of the batch, as BatchNorm would: a sampled picture must not depend on its neighbours. The number of groups has to divide the
# channels, also where these are few, and a group should hold more than one channel, or it would wipe out how bright the picture is.

# %%
for channels in (4, 12, 32, 64, 128, 192):
    norm = group_norm(channels)
    print(f"{channels:3} channels: {norm.num_groups:2} groups of {channels // norm.num_groups}")
alone, among_others = norm(x := torch.randn(1, 192, 4, 4)), norm(torch.cat([x, 5 * torch.randn(3, 192, 4, 4)]))[:1]
assert_close(alone, among_others)


# %% [markdown]
# ## Distant petals talk to each other
#
# A convolution of 3 x 3 sees a pixel and its eight neighbours. That the left petal has the colour of the right one takes *attention*: each position asks a question (query), each offers a
# key and a value, and everyone receives a mixture of all values, weighed by how well key and query agree. Several heads do so side by side.

# %%
def my_attention(block, x):
    b, c, height, width = x.shape
    q, k, v = block.qkv(block.norm(x)).flatten(2).reshape(b, 3, block.heads, c // block.heads, -1).unbind(1)
    weights = torch.softmax(q.transpose(2, 3) @ k / math.sqrt(c // block.heads), dim=-1)  # (b, heads, from, to)
    mixture = (v @ weights.transpose(2, 3)).reshape(b, c, height, width)
    return x + block.proj(mixture)


attention, x = AttentionBlock(64, head_channels=32), torch.randn(2, 64, 8, 8)
torch.nn.init.normal_(attention.proj.weight, std=0.05)
assert_close(my_attention(attention, x), attention(x), atol=1e-5, rtol=1e-4)

# %% [markdown]
# Attention knows nothing of places: shuffle the positions, and the answer is shuffled alike. What it does know of them comes from the convolutions around it.

# %%
order = torch.randperm(64)
shuffled = x.flatten(2)[:, :, order].view_as(x)
assert_close(attention(shuffled).flatten(2), attention(x).flatten(2)[:, :, order], atol=1e-5, rtol=1e-4)


# %% [markdown]
# Each of the $n = h \cdot w$ positions looks at all others, so the cost grows with $n^2$: twice the side, sixteen times the work. That is why attention sits at the
# small levels only.

# %%
def flops(function, *inputs):
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_total_flops()


def mixing(side):
    q = torch.randn(1, 2, side * side, 32)
    return flops(lambda: torch.softmax(q @ q.transpose(2, 3), -1) @ q)


assert mixing(32) == 16 * mixing(16)

# %% [markdown]
# ## Down and up
#
# Half the size by a convolution of stride 2; double by repeating each pixel and smoothing with a convolution. (A transposed convolution would do it in one, but where its
# patches overlap unevenly it leaves a chessboard.)

# %%
x = torch.randn(1, 32, 16, 16)
print("down:", tuple(Downsample(32)(x).shape), "  up:", tuple(Upsample(32)(x).shape))

# %% [markdown]
# One more way to make a picture smaller, without losing anything: *fold* each square of 2 x 2 pixels into the channels. The network then works at half the side, which makes the
# expensive first level four times cheaper; at the exit the picture is unfolded. The profile `flowers32` does that.

# %%
flower = load_data(profile, "val")[3][0][None]
folded = F.pixel_unshuffle(flower, 2)
print(tuple(flower.shape), "->", tuple(folded.shape))
assert torch.equal(F.pixel_shuffle(folded, 2), flower)

# %%
quarters = folded[0].view(3, 4, *folded.shape[2:]).transpose(0, 1)
image_grid([F.interpolate(q[None], scale_factor=2)[0] for q in quarters], columns=4, column_labels=["pixel 0, 0", "pixel 0, 1", "pixel 1, 0", "pixel 1, 1"],
           alt="A flower's four folded pictures: the same flower four times at half the resolution, each shifted by one pixel")

# %% [markdown]
# ## The whole
#
# The pieces, put together. The profile says how wide and how deep:

# %%
model = UNet(**profile.network, num_classes=6)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")

# %% [markdown]
# We let a picture run through and note what each block turns out: the number of channels and the side.

# %%
trace, hooks = [], []
for name, module in model.named_modules():
    if isinstance(module, (Block, Downsample, Upsample)) or name.startswith(("conv_", "middle")) and "." not in name:
        kind = type(module).__name__ + " + attention" * isinstance(getattr(module, "attention", None), AttentionBlock)
        note = lambda m, i, out, name=name, kind=kind: trace.append((name, kind, out.shape[1], out.shape[2]))
        hooks.append(module.register_forward_hook(note))
size = profile.image_size
answer = model(torch.randn(1, 3, size, size), torch.tensor([500]))
assert answer.shape == (1, 3, size, size)
for hook in hooks:
    hook.remove()

# %%
for name, kind, channels, side in trace:
    print(f"{name:16} {kind:17} {channels:4} x {side} x {side}")

# %% [markdown]
# The same as a drawing: down on the left, up on the right, each level half as large as the one above. Dashed are the skip connections: whatever a piece on the way down turns out,
# the convolution at the entrance included, is kept, and each block on the way up takes one of these off the pile, the last one first.

# %%
colors = {"residual block": "#56B4E9", "attention": "#CC79A7", "down": "#E69F00", "up": "#009E73", "convolution": "#999999"}
parts = {"Block": "residual block", "ResBlock": "residual block", "AttentionBlock": "attention", "Downsample": "down", "Upsample": "up", "Conv2d": "convolution"}


def draw_unet(trace):
    figure = Figure(figsize=(7.6, 3.7))
    axes = figure.add_axes([0.02, 0.02, 0.96, 0.96])
    sides = sorted({side for *_, side in trace}, reverse=True)
    for column, (name, kind, channels, side) in enumerate(trace):
        y = -sides.index(side) * 1.4
        axes.bar(column, 0.8, 0.72, y - 0.4, color=colors[parts[kind.split()[0]]], edgecolor="#333333", linewidth=0.6)
        if kind.endswith("+ attention"):
            axes.bar(column, 0.2, 0.72, y - 0.4, color=colors["attention"], edgecolor="#333333", linewidth=0.6)
        axes.text(column, y, channels, ha="center", va="center", fontsize=7)
    for level, side in enumerate(sides):
        axes.text(-0.9, -level * 1.4, f"{side} x {side}", ha="right", va="center", fontsize=9)
    draw_skips(axes, trace, sides)
    for label, color in colors.items():
        axes.bar(0, 0, color=color, label=label)
    axes.legend(loc="lower right", frameon=False, fontsize=8, ncols=2)
    axes.set(xlim=(-3, len(trace)), ylim=(-1.4 * len(sides) - 0.1, 0.9))
    axes.axis("off")
    return figure


# %%
def draw_skips(axes, trace, sides):
    kept, lanes = [column for column, (name, *_) in enumerate(trace) if name.startswith(("conv_in", "down"))], dict.fromkeys(sides, 0)
    for column, (name, kind, _, side) in enumerate(trace):
        if name.startswith("up") and kind.startswith("Block"):
            source, top, lanes[side] = kept.pop(), 0.4 - sides.index(side) * 1.4, lanes[side] + 1
            lane = top + 0.12 * lanes[side]
            axes.plot([source, source, column], [top, lane, lane], "--", color="#333333", linewidth=0.9)
            axes.annotate("", (column, top - 0.02), (column, lane), arrowprops={"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 7, "color": "#333333"})
    assert kept == [], "all are taken"


# %% tags=["cover"]
Picture.from_figure(draw_unet(trace), "The UNet as a U: residual blocks go down on the left to smaller sides with more channels, through the bottom, and up on the right, with skip connections across")


# %% [markdown]
# Where does the work go? Count by level: parameters live at the bottom, where there are many channels; the computing is spread more evenly, for at the top there are few channels but
# many pixels.

# %%
def by_level(model):
    levels = {}
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, size, size), torch.tensor([0]))
    work = {name.split(".", 1)[1]: sum(ops.values()) for name, ops in counter.get_flop_counts().items() if "." in name}
    for name, _, _, side in trace:
        parameters, flops_here = levels.get(side, (0, 0))
        parameters += sum(p.numel() for p in model.get_submodule(name).parameters())
        levels[side] = parameters, flops_here + work[name]
    return levels, counter.get_total_flops()


levels, total = by_level(model)
for side, (parameters, work) in levels.items():
    print(f"{side:2} x {side:2}: {parameters:9,} parameters, {work / 1e6:6.1f} million FLOPs for a picture")

# %% [markdown]
# Did we count everything? What is left is the small network that digests the time and the label, and the last norm:

# %%
rest = sum(p.numel() for name, p in model.named_parameters() if name.startswith(("time_mlp", "label_emb", "norm_out", "input_skip")))
print(f"the rest: {rest:,} parameters")
assert sum(parameters for parameters, _ in levels.values()) + rest == sum(p.numel() for p in model.parameters())
assert 0.99 * total < sum(work for _, work in levels.values()) < total

# %% [markdown]
# And folding? The same network, once on pixels and once on 2 x 2 patches:

# %%
plain, folding = (UNet(**profile.network | {"patch_size": p, "attention_resolutions": ()}) for p in (1, 2))
work = [flops(m, torch.randn(1, 3, size, size), torch.tensor([0])) for m in (plain, folding)]
print(f"folding 2 x 2 pixels makes it {work[0] / work[1]:.1f} times cheaper")
assert work[0] > 3.5 * work[1]


# %% [markdown]
# Folding has a price. Where a picture is hardly noisy, the answer is mostly its finest noise, number by number, and a folded picture has many numbers at each place: 48 for 4 x 4 pixels in three colours. Through
# sixteen channels sixteen of them can pass; the other two thirds are lost. The option `input_skip` adds the input itself to the answer, times a small matrix that depends on $t$. The test: learn to repeat pure noise.

# %%
def error_of_repeating(input_skip):
    torch.manual_seed(0)
    narrow = UNet(channels=16, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(), patch_size=4, input_skip=input_skip)
    optimizer = torch.optim.Adam(narrow.parameters(), lr=1e-2)
    for _ in range(150):
        noise = torch.randn(16, 3, 32, 32)
        loss = F.mse_loss(narrow(noise, torch.full((16,), 100)), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


# %%
without, with_skip = error_of_repeating(False), error_of_repeating(True)
print(f"error without input_skip: {without:.1f}, with it: {with_skip:.1f}")
assert without > 2 / 3 and with_skip < 0.01

# %% [markdown]
# The profile `flowers64-folded` has it. For pictures of 64 x 64 pixels it puts a narrow level on top of the network of `flowers32`: four times as many pixels for less than twice the work.

# %%
by_profile = []
for name in ("flowers32", "flowers64-folded"):
    side = PROFILES[name].image_size
    by_profile.append(flops(UNet(**PROFILES[name].network), torch.randn(1, 3, side, side), torch.tensor([0])))
print(f"work at 64 x 64 over work at 32 x 32: {by_profile[1] / by_profile[0]:.1f}")
assert by_profile[1] < 2 * by_profile[0]

# %% [markdown]
# ## What must hold
#
# **It starts by answering zero**, since its last convolution is all zeros. Stage 4 uses that to know what loss to beat.

# %%
x, t, y = torch.randn(4, 3, size, size), torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, 6])
assert torch.equal(model(x, t, y), torch.zeros_like(x))

# %% [markdown]
# **Every parameter learns.** A layer that is defined but never used is a classic mistake, and the loss does not tell. We ask for gradients. At the very first step the zeros block
# them (what is multiplied by zero gets none), so we first fill the zeros.

# %%
for parameter in model.parameters():
    if not parameter.any():
        torch.nn.init.normal_(parameter, std=0.02)
model(x, t, y).square().mean().backward()
without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
assert without == [], without

# %% [markdown]
# **Labels count**, and one label means "none": the label after the last, which is what the network takes if it is given no labels at all.

# %%
model.eval()
with torch.no_grad():
    nothing = model(x, t)
    assert_close(nothing, model(x, t, torch.full((4,), model.null_label)))
    assert not torch.allclose(nothing[:3], model(x, t, y)[:3])

# %% [markdown]
# **Any size will do** that can be halved often enough, though it was built for one. Where it cannot, the error says why:

# %%
with torch.no_grad():
    multiple = model.size_multiple
    assert model(torch.randn(1, 3, 3 * multiple, 5 * multiple), t[:1]).shape[2:] == (3 * multiple, 5 * multiple)
for bad in (lambda: model(x[:, :, :-2], t), lambda: model(x, t[:1]), lambda: model(x, t, y + 1)):
    try:
        bad()
    except ValueError as error:
        print(error)

# %% [markdown]
# **The memory layout does not matter** for the answer. (For the speed it does: `channels_last` suits today's convolutions better.)

# %%
with torch.no_grad():
    rows = model(x, t, y)
    columns = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t, y)
assert_close(rows, columns, atol=1e-4, rtol=1e-3)

# %% [markdown]
# ## Look inside
#
# What does such a network see once it is trained? The repository has two in `models/`, which stages 4 and 5 explain; we let the smaller one draw a sunflower.

# %%
trained, process, classes = load_model(PROFILES["flowers32"].weights)
sunflower = torch.tensor([classes.index("sunflower")])
x_0 = sample(trained, process, sunflower, sampler="ddim", steps=50, seed=1)

# %% [markdown]
# Then we show it that flower at twenty noise levels, and keep what five of its blocks turn out.

# %%
blocks = {"first convolution": "conv_in", "down, 16 x 16": "down.1", "bottom, 4 x 4": "middle2", "up, 8 x 8": "up.4", "up, 16 x 16": "up.9"}
times, seen = torch.arange(49, 1000, 50), {}
for label, name in blocks.items():
    trained.get_submodule(name).register_forward_hook(lambda module, inputs, out, label=label: seen.update({label: out}))
x_t = process.q_sample(x_0.expand(20, -1, -1, -1), times, torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
with torch.no_grad():
    trained(x_t, times, sunflower.expand(20))

# %%
every_t = torch.arange(1000)
clocks = plot_lines({f"clock {i}": SinusoidalPositionEmbeddings(64)(every_t)[:, i] for i in (12, 16, 20, 26)}, x_label="t", y_label="sine", size=(720, 190))


def inside(t, block):
    at, maps = (t - 49) // 50, seen[block][:, :9]
    bright = maps.transpose(0, 1).flatten(1).abs().quantile(0.98, dim=1).view(-1, 1, 1, 1)
    pictures = [x_t[at], *F.interpolate((maps[at, :, None] / bright).expand(-1, 3, -1, -1), size=32)]
    return stack(image_grid(pictures, columns=10, scale=2, column_labels=["$x_t$", *(f"map {i}" for i in range(9))]), clocks.marked(t),
                 alt=f"The noisy sunflower at t = {t} and nine feature maps of the block '{block}'; below, a line at t = {t} across four of the clocks")


# %% [markdown]
# Move the time and choose a block. The clocks under the line are all that the network is told of $t$ (four of them are drawn); near the input the maps are noisy copies of the picture, deeper down they are
# coarse and calm, and on the way up the flower's shape comes back, ever less sure of itself as $t$ grows.

# %%
Explorer(inside, t=widgets.IntSlider(249, 49, 999, 50), block=widgets.Dropdown(options=list(blocks), value="up, 16 x 16"))

# %% [markdown]
# ## Your turn
#
# 1. How many parameters has `ResBlock(64, 128, emb_channels=256)`? Work it out by hand, in `count`.
# 2. What if there were no skip connections? Zero what comes across, and look at how much the answer changes.

# %% tags=["exercise"]
count = None  # your answer to 1

# %% [markdown]
# ## Solutions
#
# 1. Two norms (a scale and a shift a channel), two convolutions of 3 x 3, the layer for the time, and a 1 x 1 convolution, because input and output differ in width:

# %% tags=["solution"]
norms, convolutions = 2 * 64 + 2 * 128, (64 * 9 + 1) * 128 + (128 * 9 + 1) * 128
count = norms + convolutions + (256 + 1) * 2 * 128 + (64 + 1) * 128
assert count == sum(p.numel() for p in ResBlock(64, 128, emb_channels=256).parameters())


# %% [markdown]
# 2. On the way up, each block takes what comes from below and what comes across, one after the other in the channels. We zero the second part:

# %% tags=["solution"]
def without_skips(module, inputs):
    h, emb = inputs
    from_below = width_below[module]
    return torch.cat([h[:, :from_below], torch.zeros_like(h[:, from_below:])], dim=1), emb


widths = [channels for name, _, channels, _ in trace if name == "middle2" or name.startswith("up")]
ups = [module for module in model.up]
width_below = {module: width for module, width in zip(ups, widths) if isinstance(module, Block)}
hooks = [module.register_forward_pre_hook(without_skips) for module in width_below]
with torch.no_grad():
    blind = model(x, t, y)
for hook in hooks:
    hook.remove()
assert (blind - rows).norm() > 0.5 * rows.norm()

# %% [markdown]
# Next: [04_training](04_training.ipynb) teaches it.
