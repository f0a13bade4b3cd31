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
# # 07 How good are the samples?
#
# [![Open in
# Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/noisOut/noisOut/blob/main/notebooks/07_evaluation.ipynb)
# [![Open in
# Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/noisOut/noisOut/main?labpath=notebooks/07_evaluation.ipynb)
#
# **What you'll do**: build the field's measures of sample quality in a few lines each, watch them
# fail on models that cheat, measure a trained network with error bars, and see a network memorise
# its training set.
#
# **What you'll learn**: Fréchet and kernel distance (FID, KID), precision and recall, bits per
# dimension, tests for copies; what each of them misses, and how many samples a claim needs.
#
# **What you need**: notebooks 02 to 06. About a minute and a half on two CPU cores.

# %%
import sys

if "google.colab" in sys.modules:  # there a notebook comes alone: fetch what it imports, once
    import subprocess

    subprocess.run(
        "test -d noisOut || git clone -q --depth 1 https://github.com/noisOut/noisOut noisOut",
        shell=True,
        check=True,
    )
    sys.path.insert(0, "noisOut")

# %%
import math

import torch
import torch.nn.functional as F

from noisout_nb.checkpoints import load_pretrained
from noisout_nb.classifier import (
    ClassifierFeatures,
    FlowerClassifier,
    classify,
    train_classifier,
)
from noisout_nb.data import ImageDataset, ProceduralFlowers, load_data, to_float
from noisout_nb.evaluation import (
    CopyDetector,
    bits_per_dim,
    extract_features,
    factor_distance,
    frechet_distance,
    kernel_distance,
    petal_count,
    planted_copies,
    precision_recall,
)
from noisout_nb.exercises import check
from noisout_nb.figures import (
    image_grid,
    plot_bars,
    plot_histograms,
    plot_lines,
    plot_points,
    stack,
)
from noisout_nb.parallel import get_device
from noisout_nb.profiles import get_profile
from noisout_nb.sampling import sample
from noisout_nb.training import EMA, Batches, train
from noisout_nb.unet import UNet

# %%
torch.manual_seed(0)
profile, device = get_profile(), get_device()


# %% [markdown]
# ## Four models to judge
#
# Before images, points in the plane, where we can see everything. The data are six clusters, like
# the petals of a flower. Four models try to imitate them: a good one; one that has dropped half of
# the clusters; one whose samples are blurred; and one that hands out its training points.

# %%
def petals(count, seed, modes=6, spread=0.15):
    generator = torch.Generator().manual_seed(seed)
    angle = torch.randint(modes, (count,), generator=generator) * (2 * math.pi / 6)
    centre = torch.stack([angle.cos(), angle.sin()], 1)
    return (centre + spread * torch.randn(count, 2, generator=generator)).double()


training_points, real_points = petals(30, seed=0), petals(400, seed=1)
toys = {
    "good": petals(400, seed=2),
    "drops modes": petals(400, seed=3, modes=3),
    "blurred": petals(400, seed=4, spread=0.35),
    "memorises": training_points[torch.randint(30, (400,))],
}
plot_points(
    {"data": real_points, **toys},
    limits=(-2, 2),
    columns=5,
    alt=(
        "Five panels of points: six clusters; the same; three clusters; six that run into "
        "each other; thirty points over and over"
    ),
)


# %% [markdown]
# ## Fréchet distance
#
# Replace both sets by Gaussians of the same mean and covariance and measure how far those lie apart
# (Heusel et al. 2017; with Inception's features this is the FID):
#
# $$ d^2 = |m - m'|^2 + \mathrm{tr}\big(S + S' - 2 (S S')^{1/2}\big) $$
#
# The trace of the root is the sum of the roots of the eigenvalues of $S S'$.

# %%
def my_frechet(a, b):
    shift = (a.mean(0) - b.mean(0)).square().sum()
    S, S_b = a.T.cov(), b.T.cov()
    roots = torch.linalg.eigvals(S @ S_b).real.clamp(min=0).sqrt()
    return (shift + S.trace() + S_b.trace() - 2 * roots.sum()).item()


mine = my_frechet(toys["drops modes"], real_points)
print(
    f"by hand {mine:.6f}, helper package {frechet_distance(toys['drops modes'], real_points):.6f}"
)

# %% [markdown]
# It sees the lost modes, for they change mean and covariance. But all that it knows of a set is
# one Gaussian, and that is how it fails: a ring has the mean and the covariance of the six
# clusters, and not one cluster. Blur moves the covariance only a little.

# %%
turn = 2 * math.pi * torch.rand(400, dtype=torch.float64)
radius = 1 + 0.15 * torch.randn(400, dtype=torch.float64)
toys["ring"] = torch.stack([radius * turn.cos(), radius * turn.sin()], 1)
plot_bars(
    {"Fréchet": {name: my_frechet(x, real_points) for name, x in toys.items()}},
    y_label="Fréchet distance",
    alt=(
        "Fréchet distances: by far the largest for dropped modes, some for the memoriser; "
        "good, blurred and ring near zero"
    ),
)


# %% [markdown]
# ## Kernel distance
#
# The squared *maximum mean discrepancy* compares all moments up to the kernel's degree, here three
# (Bińkowski et al. 2018, KID): how alike are two points of one set, compared with two of different
# sets? Points are not paired with themselves, and that makes it unbiased.

# %%
def my_kernel_distance(a, b):
    def k(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x):
        gram = k(x, x)
        return (gram.sum() - gram.trace()) / (len(x) * (len(x) - 1))

    return (within(a) + within(b) - 2 * k(a, b).mean()).item()


print(
    f"by hand {my_kernel_distance(toys['blurred'], real_points):.6f}, "
    f"helper package {kernel_distance(toys['blurred'], real_points)[0]:.6f}"
)

# %% [markdown]
# The package adds a standard error: a jackknife, which leaves out an eighth of both sets at a time.

# %%
plot_bars(
    {"kernel": {name: kernel_distance(x, real_points) for name, x in toys.items()}},
    y_label="kernel distance",
    number="{:.3f}",
    alt=(
        "Kernel distances with error bars: by far the largest for dropped modes, some for "
        "the memoriser; good, blurred and ring at zero"
    ),
)


# %% [markdown]
# ## Precision and recall
#
# One number cannot say whether samples are bad or all alike. *Precision* is the share of samples
# within reach of the data, *recall* the share of the data within reach of the samples
# (Kynkäänniemi et al. 2019). A point's reach is the distance to its third neighbour in its own set.

# %%
def my_covered(points, centres, k=3):
    reach = torch.cdist(centres, centres).sort(dim=1).values[:, k]  # column 0: the point itself
    return (torch.cdist(points, centres) <= reach).any(1).double().mean().item()


x = toys["drops modes"]
print("by hand       ", my_covered(x, real_points), my_covered(real_points, x))
print("helper package", *precision_recall(x, real_points))

# %%
both = {name: precision_recall(x, real_points) for name, x in toys.items()}
plot_bars(
    {
        "precision": {name: p for name, (p, _) in both.items()},
        "recall": {name: r for name, (_, r) in both.items()},
    },
    y_label="share",
    number="{:.2f}",
    alt=(
        "Precision and recall: both high for good; recall near a half for dropped modes; "
        "precision lower for blur and ring; no recall for the memoriser"
    ),
)


# %% [markdown]
# Dropped modes cost recall, blur costs precision, and so does the ring, whose points between the
# clusters are out of reach. The memoriser has no recall here only because it repeats its points, so
# each has a copy of itself for a neighbour and no reach. Were its thirty points three thousand, it
# would pass every test so far. It needs a test of its own: **where is the nearest training point?**

# %%
def to_training(points):
    return torch.cdist(points, training_points).amin(1)


plot_histograms(
    {name: to_training(toys[name]).float() for name in ("good", "memorises")}
    | {"data": to_training(real_points).float()},
    x_label="distance to the nearest training point",
    bins=40,
    alt=(
        "Histograms of the distance to the nearest training point: spread out for data and "
        "good model, all at zero for the memoriser"
    ),
)

# %% [markdown]
# | | Fréchet, kernel | precision | recall | nearest training point |
# |---|---|---|---|---|
# | drops modes | far | | low | |
# | blurred | hardly moved | low | | |
# | ring (equal mean and covariance) | not moved | lower | | |
# | memorises | farther, as thirty points are few | | low, if it repeats itself | **zero** |
#
# ## Images: features first
#
# Two flowers may differ in every pixel and still be alike. So images are compared by the features
# of a classifier. The field's is Inception, trained on ImageNet; here a small residual network
# learns to name the species, in a few seconds.

# %%
model, process, classes = load_pretrained(profile, device)
data, held_out = load_data(profile), load_data(profile, "val")
embedded = profile.dataset == "procedural"

# %%
classifier = FlowerClassifier(
    len(classes), profile.image_size, patch_size=profile.image_size // 16, width=8, depth=1
).to(device)
batches = Batches(data, 32, flip=False, device=device)
for _ in train_classifier(classifier, batches, steps=300, learning_rate=3e-3, label_smoothing=0.1):
    pass
features = ClassifierFeatures(classifier)
right = (classify(classifier, to_float(held_out.images)) == held_out.labels).double().mean()
print(
    "names more than 95 % of the held-out images"
    if right > 0.95
    else f"names {right:.0%} of the held-out images"
)

# %% [markdown]
# The rules: compare with *held-out* images; state the number of images, for distances depend on
# it; show beside each distance that of a second real set, the **floor**. We sample three sets of
# 128, and prepare the cheats again: real images blurred, one species only, and noise.

# %%
count, half = 128, len(held_out) // 2
reference, real = to_float(held_out.images[:half]), to_float(held_out.images[half:])
labels = held_out.labels[half : half + count].to(device)
shape = tuple(real.shape[1:])
samples = torch.cat(
    [
        sample(model, process, labels, shape=shape, sampler="ddim", steps=15, seed=seed)
        .clamp(-1, 1)
        .cpu()
        for seed in (1, 2, 3)
    ]
)

# %%
sets = {
    "real": real,
    "samples": samples,
    "blurred": F.avg_pool2d(real, 3, 1, 1, count_include_pad=False),
    "one species": real[held_out.labels[half:] == 0].repeat(20, 1, 1, 1)[: 2 * count],
    "noise": torch.randn(real.shape, generator=torch.Generator().manual_seed(3)).clamp(-1, 1),
}
image_grid(
    torch.cat([x[:10] for x in sets.values()]),
    columns=10,
    row_labels=list(sets),
    alt=(
        "Ten images each: real flowers, samples that look much like them, blurred ones, "
        "daisies only, noise"
    ),
)

# %%
embeddings = {name: extract_features(features, x) for name, x in sets.items()}
expected = extract_features(features, reference)
print("features per image:", expected.shape[1])

# %% [markdown]
# Which species a set happens to hold moves its mean more than the quality of the images does. So
# both sides of a comparison get 30 images of each species, drawn five times; the bars show the mean
# and the scatter of the five.

# %%
asked = {name: held_out.labels[half:] for name in sets} | {"samples": labels.cpu().repeat(3)}


def balanced(names, seed, number=180):
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    each = max(1, number // len(classes))
    return torch.cat([order[names[order] == i][:each] for i in range(len(classes))])


# %%
def repeated(metric, name, draws=5):
    values = []
    for seed in range(draws):
        a = embeddings[name][balanced(asked[name], seed)]
        b = expected[balanced(held_out.labels[:half], seed + 100)]
        values.append(metric(a, b))
    return torch.tensor(values).mean().item(), torch.tensor(values).std().item()


plot_bars(
    {"Fréchet": {name: repeated(frechet_distance, name) for name in sets}},
    y_label="Fréchet distance, equal species",
    log_y=True,
    alt=(
        "Fréchet distances on a log axis, with error bars: real, samples and blurred low, one "
        "species and noise more than ten times higher"
    ),
)

# %% [markdown]
# The distance finds noise, missing species and, between equal species, even the blur. Our samples
# it does not place above the floor, and that is all it says: a set less varied than the data can
# come out below a second real set, for its few images scatter less. Recall says whether it is.

# %%
plot_bars(
    {
        "precision": {name: precision_recall(e, expected)[0] for name, e in embeddings.items()},
        "recall": {name: precision_recall(e, expected)[1] for name, e in embeddings.items()},
    },
    y_label="share",
    number="{:.2f}",
    alt=(
        "Precision and recall of the five sets: real high in both; one species precise "
        "without recall; noise near zero; samples lower in recall than in precision"
    ),
)

# %% [markdown]
# ## How many images does a claim need?
#
# The embedded flowers never run out, so we can ask: two sets of *real* flowers, what do the
# distances say for N images each? Five pairs for every N.

# %%
pool = (
    to_float(ProceduralFlowers(profile.image_size, 2560, seed=11).images)
    if embedded
    else to_float(held_out.images)
)
pool = extract_features(features, pool)
sizes = [n for n in (80, 128, 256, 512, 1024) if 2 * n <= len(pool)]


def pairs(n):
    for seed in range(5):
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        yield pool[order[:n]], pool[order[n : 2 * n]]


frechets = {n: torch.tensor([frechet_distance(a, b) for a, b in pairs(n)]) for n in sizes}
kernels = {n: torch.tensor([kernel_distance(a, b)[0] for a, b in pairs(n)]) for n in sizes}


# %%
def with_error(found):
    return {str(n): (x.mean().item(), (x.std() / len(x) ** 0.5).item()) for n, x in found.items()}


stack(
    plot_bars({"Fréchet": with_error(frechets)}, y_label="Fréchet, real to real", size=(720, 200)),
    plot_bars({"kernel": with_error(kernels)}, y_label="kernel, real to real", size=(720, 200)),
    alt=(
        "Real against real for growing N: the Fréchet distance falls steadily towards zero, "
        "the kernel distance scatters about zero, less and less"
    ),
)

# %% [markdown]
# Both sets come from one source, so the true distance is 0. The Fréchet distance is far above,
# and the more so the fewer images there are: **Fréchet distances of different N do not compare.**
# The kernel distance scatters about 0 instead. How wide is the scatter, and what difference can
# it tell? (Between equal sources it falls faster than the usual $1/\sqrt N$.)

# %%
scatter = torch.stack([x.std() for x in kernels.values()])
ideal = scatter[0] * (sizes[0] / torch.tensor(sizes).float()) ** 0.5
plot_lines(
    {"scatter of the kernel distance": (sizes, scatter), "1 / sqrt(N)": (sizes, ideal)},
    markers=True,
    log_x=True,
    log_y=True,
    x_label="images per set",
    y_label="standard deviation",
    size=(720, 260),
    alt=(
        "The scatter of the kernel distance falls with the number of images, about as one "
        "over its square root or faster"
    ),
)

# %%
near = max(n for n in sizes if n <= 512)
smallest = 2 * 2**0.5 * kernels[near].std()  # two standard deviations of a difference of two
gap = kernel_distance(embeddings["samples"], expected)[0]
print(f"{near} images can tell our samples from real ones:", bool(gap > smallest))

# %% [markdown]
# Two networks whose distances lie nearer to each other than `smallest` cannot be ranked by one
# set of that many images: take more images, and several seeds.
#
# ## What the embedded flowers can tell
#
# Their factors are known, and so is each species' number of petals. `petal_count` finds it from the
# pixels alone: the strongest frequency on a ring around the centre.

# %%
flowers = ProceduralFlowers(32, 300, seed=5)
counted = petal_count(to_float(flowers.images))
print(f"petals counted rightly: {(counted == flowers.factors['petals']).double().mean():.0%}")

# %%
truth = {
    i: flowers.factors["petals"][flowers.labels == i][0] for i in flowers.labels.unique().tolist()
}
if embedded:
    found, wanted = (
        petal_count(samples),
        torch.stack([truth[i] for i in labels.cpu().repeat(3).tolist()]),
    )
    shares = {}
    for i, name in enumerate(classes):
        hit = (found == wanted)[labels.cpu().repeat(3) == i].double()
        shares[name] = (hit.mean().item(), (hit.std() / len(hit) ** 0.5).item())
plot_bars(
    {"samples": shares},
    y_label="share with the right petals",
    number="{:.2f}",
    alt="Share of samples with the right number of petals for each species, with error bars",
) if embedded else None

# %%
floor, ours = factor_distance(real, reference), factor_distance(samples, reference)
plot_bars(
    {"real": floor, "samples": ours},
    y_label="factor distance",
    alt=(
        "Distance of each factor's distribution, real and samples: samples a little farther "
        "than real in most"
    ),
)

# %% [markdown]
# ## Likelihood: bits per dimension
#
# A model that gives an image the probability $p(x_0)$ can store it in $-\log_2 p(x_0)$ bits. The
# probability-flow ODE computes that number; far cheaper is the bound of training (Ho et al. 2020,
# eq. 5): a KL divergence for every step, between the true posterior and the network's. Both are
# Gaussians of equal variance $\tilde\beta_t$, so each term is
# $|\tilde\mu(x_t, x_0) - \tilde\mu(x_t, \hat x_0)|^2 / (2 \tilde\beta_t)$.

# %%
short = process.respace(100)  # the bound over 100 of the 1,000 steps: ten times cheaper
images, names = real[:16].to(device), held_out.labels[half : half + 16].to(device)
prior, terms = bits_per_dim(model, short, images.cpu(), names.cpu())
print(f"{prior + terms.sum():.1f} bits per dimension (8 without compression)")

# %%
i = 40
t, noise = torch.full((16,), i, device=device), torch.randn(images.shape).to(device)
x_t = short.q_sample(images, t, noise)
with torch.no_grad():
    predicted = short.predict_start(x_t, t, model(x_t, short.timestep_map[t], names)).clamp(-1, 1)
(true_mean, variance), (mean, _) = (
    short.q_posterior_mean_variance(x, x_t, t) for x in (images, predicted)
)
by_hand = ((true_mean - mean).square() / (2 * variance)).mean().item() / math.log(2)
agree = abs(by_hand / terms[i] - 1) < 0.1  # each has noise of its own
print(f"term {i} by hand agrees with the package's: {agree}")

# %%
plot_lines(
    {"bits per dimension": (range(1, 101), terms)},
    x_label="t + 1",
    y_label="bits per dimension",
    log_x=True,
    log_y=True,
    size=(720, 260),
    alt=(
        "The terms of the bound on log axes: by far the largest at the first steps, then "
        "falling by orders of magnitude"
    ),
)

# %% [markdown]
# Most bits describe noise too faint to see, at the first few $t$. That is why likelihood and
# looks may disagree.
#
# ## Is it copying?
#
# For each sample the nearest *training* image, in pixels, mirrored or not:

# %% tags=["cover"]
training = to_float(data.images)
detector = CopyDetector(training, to_float(held_out.images))
suspects = detector.ratios(samples).argsort()[:10]
_, nearest_ones = detector.neighbours(samples[suspects])
image_grid(
    torch.cat([samples[suspects], training[nearest_ones[:, 0]]]),
    columns=10,
    row_labels=["sample", "nearest"],
    alt=(
        "The ten most suspicious samples above their nearest training images: alike, but not "
        "the same"
    ),
) if embedded else None

# %% [markdown]
# Alike, not copied? To decide without eyes: a copy is far nearer to one training image than to
# the next ones, so divide the distance to the nearest by the mean distance to the next nine. A
# sample is suspicious where that ratio is lower than for 99 % of the held-out images. An honest
# model has about 1 % suspects.

# %%
caught = detector.copied(samples).double().mean().item()
print("no more suspects than chance allows" if caught < 0.04 else "suspicious!")
plot_histograms(
    {"held-out": detector.ratios(to_float(held_out.images)), "samples": detector.ratios(samples)},
    x_label="distance to the nearest / mean of the next nine",
    bins=30,
    size=(720, 240),
    alt="Histograms of the ratio: samples have no lower ratios than held-out images",
)

# %% [markdown]
# What would it catch? We plant copies, and compare with the criterion in common use: nearest
# distance less than a third of the second (Yoon et al. 2023).

# %%
planted = planted_copies(training[:100], training[100:200])
stack(
    plot_bars(
        {
            "1 % false alarms": {
                name: detector.copied(x).double().mean() for name, x in planted.items()
            },
            "d1 / d2 < 1/3": {
                name: detector.a_third_of_the_second(x).double().mean()
                for name, x in planted.items()
            },
        },
        y_label="share found",
        number="{:.2f}",
        size=(820, 250),
    ),
    alt=(
        "Share of planted copies found: all exact and mirrored ones by both criteria, hardly "
        "any of the blurred, recoloured, shifted and partial ones"
    ),
)

# %% [markdown]
# A copy moved by two pixels passes in silence, so "no copies found" means: no exact or mirrored
# ones. It also depends on the data: among photographs, far apart from each other, more is caught
# (see the [model card](../models/README.md)).
#
# ## Memorisation as it happens
#
# Two equal networks of 16 x 16 pixels, one trained on 16 flowers, the other on 2,000, for equally
# many steps. From time to time both sample, and we count the copies.

# %%
small = ProceduralFlowers(16, 2512, seed=20)
unseen = to_float(small.images[2000:])


def subset(n):
    return ImageDataset(small.images[:n], small.labels[:n], small.classes)


def watched(n, moments):
    """Trains on n flowers; yields the step and 96 samples at each of `moments`."""
    network = {"channels": 32, "channel_mults": (1, 2), "num_res_blocks": 1, "patch_size": 4}
    net = UNet(image_size=16, attention_resolutions=(), num_classes=6, **network).to(device)
    batches, ema = Batches(subset(n), 16, flip=False, device=device), EMA(net, 0.98)
    settings = profile.training | {"steps": max(moments), "learning_rate": 3e-3, "label_dropout": 0}
    y = torch.arange(96, device=device) % 6
    with train(net, process, batches, ema, **settings) as run:
        for step in run:
            if step.index in moments:
                with ema.applied():
                    drawn = sample(net, process, y, shape=(3, 16, 16), sampler="ddim", steps=10)
                yield step.index, drawn.clamp(-1, 1).cpu()


# %%
def copies(n, moments):
    watch, found = CopyDetector(to_float(small.images[:n]), unseen), {}
    for step, drawn in watched(n, moments):
        share = watch.copied(drawn).double().mean().item()
        found[f"{step} steps"] = (share, (share * (1 - share) / len(drawn)) ** 0.5)
    _, at = watch.neighbours(drawn[:10])
    return found, torch.cat([drawn[:10], to_float(small.images[at[:, 0]])])


# %%
outcome = {n: copies(n, moments=(100, 200, 400)) for n in (16, 2000)}
plot_bars(
    {f"{n:,} training images": found for n, (found, _) in outcome.items()},
    y_label="share of copies",
    number="{:.2f}",
    alt=(
        "Share of copies against training steps: with 16 training images it rises to more than "
        "half, with 2,000 it stays near zero"
    ),
)

# %%
stack(
    *(
        image_grid(pairs, columns=10, scale=3, row_labels=["sample", "nearest"])
        for _, pairs in outcome.values()
    ),
    alt=(
        "Samples above their nearest training images. Trained on 16: nearly the same images. "
        "Trained on 2,000: different flowers"
    ),
)

# %% [markdown]
# Trained on 16 images, most samples of the network end up as one of them, nearly pixel by pixel.
# After as many steps on 2,000 images its samples are rough still, but none is a copy; nor was any
# alarm raised above by the network that had 7,000 steps on 2,000. A distance to the *training* set
# would reward copies: that is why the reference is held out, and why a test for copies belongs
# beside every distance.
#
# ## Exercises
#
# 1. For which of the sets in `sets` is precision at least 0.5 and recall below 0.5? Give its name.

# %% tags=["exercise"]
answer_1 = None

# %%
check("exercise 1", answer_1, "one species", hint="Read the bars of precision and recall.")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `answer_1 = "one species"`: its images are real, so they lie among the real ones; most real images
# have no such neighbour.
#
# </details>
#
# 2. How far is a Gaussian $\mathcal N(0, 1)$ from $\mathcal N(3, 2^2)$ in Fréchet distance (the
# formula above, which is a square)? Compute it by hand.

# %% tags=["exercise"]
answer_2 = None

# %%
check("exercise 2", answer_2, 10, tolerance=0.01, hint="In one dimension: (m - m')^2 + (s - s')^2.")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `answer_2 = 3**2 + (2 - 1) ** 2`: for one dimension $S + S' - 2\sqrt{S S'} = (s - s')^2$.
#
# </details>
#
# 3. The scatter of a kernel distance is 0.004 with 500 images per set. About how many are needed
# for 0.001, if it falls as $1/\sqrt N$?

# %% tags=["exercise"]
answer_3 = None

# %%
check(
    "exercise 3",
    answer_3,
    8000,
    tolerance=10,
    hint="A quarter of the scatter: how many times the images?",
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# `answer_3 = 500 * 4**2`.
#
# </details>
#
# All of this, for any profile's network, with more samples and three seeds:
#
#     python -m noisout_nb evaluate --profile quick
#
# The tables of the networks in `models/` are in the [model card](../models/README.md). Stage 8 asks
# what limits the speed, and what a larger machine brings.
