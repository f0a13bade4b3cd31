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
# **What you'll learn**: Fréchet and kernel distance (FID, KID), precision, recall and coverage,
# bits per dimension, tests for copies; what each of them misses, and how many samples a claim
# needs.
#
# **What you need**: notebooks 02 to 06. About a minute and a half on two CPU cores.

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

import torch
import torch.nn.functional as F
from torch import nn

from noisout_nb.checkpoints import load_pretrained
from noisout_nb.classifier import ClassifierFeatures, find_classifier
from noisout_nb.data import ImageDataset, ProceduralFlowers, load_data, to_float
from noisout_nb.evaluation import coverage, frechet_distance, kernel_distance, precision_recall
from noisout_nb.exercises import check
from noisout_nb.figures import image_grid, plot_bars, plot_lines, plot_points, stack
from noisout_nb.forward_process import GaussianDiffusion
from noisout_nb.parallel import get_device
from noisout_nb.profiles import PROFILES, get_profile
from noisout_nb.protocol import in_turn
from noisout_nb.sampling import sample
from noisout_nb.training import EMA, Batches, train

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
# ## Precision, recall, coverage
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


# %% [markdown]
# Recall can be fooled, for its reach is that of the *samples*: one that lies far out reaches far.
# *Coverage* (Naeem et al. 2020) asks with the reach of the data: which share of the data has a
# sample nearer than its third neighbour in the data? Here are 396 copies of one point, and four
# points far away:

# %%
def my_coverage(samples, data, k=3):
    reach = torch.cdist(data, data).sort(dim=1).values[:, k]
    return (torch.cdist(data, samples).amin(1) <= reach).double().mean().item()


corners = torch.tensor([[5, 5], [5, -5], [-5, 5], [-5, -5]]).double()
toys["outliers"] = torch.cat([toys["good"][:1].repeat(396, 1), corners])
both = {name: precision_recall(x, real_points) for name, x in toys.items()}
covered = {name: my_coverage(x, real_points) for name, x in toys.items()}
print(f"outliers: recall {both['outliers'][1]:.2f}, coverage {covered['outliers']:.4f}")
print(f"coverage of the helper package: {coverage(toys['outliers'], real_points):.4f}")

# %%
plot_bars(
    {
        "precision": {name: p for name, (p, _) in both.items()},
        "recall": {name: r for name, (_, r) in both.items()},
        "coverage": covered,
    },
    y_label="share",
    number="{:.2f}",
    alt=(
        "Precision, recall and coverage: all high for good; recall and coverage near a half for "
        "dropped modes; precision and coverage lower for blur and ring; no recall and little "
        "coverage for the memoriser; outliers: full precision and recall, no coverage"
    ),
)

# %% [markdown]
# Dropped modes cost recall and coverage, blur costs precision, and so does the ring, whose points
# between the clusters are out of reach. Outliers make recall perfect. The memoriser has no recall
# here only because it repeats its points, so each has a copy of itself for a neighbour and no
# reach; and little coverage, because thirty points are few. Were they three thousand, it would pass
# every test so far. It needs a test of its own: **where is the nearest training point?**

# %%
from noisout_nb.figures import plot_histograms


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
# ## The bound on the likelihood
#
# All of these compare *samples*. A diffusion model can also be asked for the probability of a
# held-out point: a bound on $-\log_2 p(x_0)$ (Ho et al. 2020, eq. 5) is the sum over the timesteps
# of what each denoising step loses,
#
# $$ \tfrac12 \big(\mathrm{SNR}(t - 1) - \mathrm{SNR}(t)\big) \; |x_0 - \hat x_0(x_t)|^2 $$
#
# nats: a KL divergence between two Gaussians of equal variance (02 has the posterior), and at the
# first step $-\log$ of a Gaussian around $\hat x_0$. (One more term, the *prior*, is the KL
# divergence of $q(x_T \mid x_0)$ from pure noise; with $\bar\alpha_T \approx 2 \cdot 10^{-9}$ it is
# practically zero.) So all it needs is the prediction $\hat x_0$. For mixtures of Gaussians the
# best prediction is known, and so is the true probability.

# %%
six = torch.arange(6).double() * math.pi / 3
six = torch.stack([six.cos(), six.sin()], 1)
mixtures = {  # each model as a mixture of Gaussians: its centres and their spread
    "good": (six, 0.15),
    "drops modes": (six[:3], 0.15),
    "blurred": (six, 0.35),
    "memorises": (training_points, 0.03),
}


def best_prediction(x_t, alpha_bar, centres, spread):
    variance = alpha_bar * spread**2 + 1 - alpha_bar  # of x_t around each centre
    distance = torch.cdist(x_t, alpha_bar.sqrt() * centres)
    which = (-(distance**2) / (2 * variance)).softmax(1)
    gain = alpha_bar.sqrt() * spread**2 / variance
    return gain * x_t + (1 - gain * alpha_bar.sqrt()) * (which @ centres)


# %%
alpha_bar = GaussianDiffusion.from_config("cosine", 1000).exact_alphas_cumprod
snr = alpha_bar / (1 - alpha_bar)


def my_bound(x, predict):
    nats = 0
    for t in range(1000):
        x_t = alpha_bar[t].sqrt() * x + (1 - alpha_bar[t]).sqrt() * torch.randn_like(x)
        error = (x - predict(x_t, alpha_bar[t])).square().sum(1).mean()
        if t > 0:
            nats += (snr[t - 1] - snr[t]) / 2 * error
        else:  # a Gaussian of variance 1 / SNR, in two dimensions
            nats += snr[0] / 2 * error + (2 * math.pi / snr[0]).log()
    return nats.item() / 2 / math.log(2)  # bits per dimension


def exact_bits(x, centres, spread):
    log_p = (-torch.cdist(x, centres).square() / (2 * spread**2)).logsumexp(1)
    log_p = log_p - math.log(len(centres) * 2 * math.pi * spread**2)
    return -log_p.mean().item() / 2 / math.log(2)


# %%
bound = {
    name: my_bound(real_points, lambda x, a, m=mixture: best_prediction(x, a, *m))
    for name, mixture in mixtures.items()
}
exact = {name: exact_bits(real_points, *mixture) for name, mixture in mixtures.items()}
plot_bars(
    {"bound": bound, "exact": exact},
    y_label="bits per dimension",
    number="{:.1f}",
    alt=(
        "Bound and exact bits per dimension agree: lowest for the good model, a little higher for "
        "the blurred one, far higher for dropped modes and for the memoriser"
    ),
)

# %% [markdown]
# The bound lies above the truth, as it must, and keeps the order. (The gap arises at the first few
# steps, where the SNR falls fastest, by a factor of two at the first; a learned variance narrows
# it, 09.) It punishes what the others forgive: a lost mode, whose points the model holds
# impossible, and memorising, for held-out points are not among the thirty. Blur costs little. And
# it fails where the others are strong: among images it is ruled by details too faint to see.
#
# | | Fréchet, kernel | precision | recall | coverage | bound | nearest training point |
# |---|---|---|---|---|---|---|
# | drops modes | far | | low | low | **high** | |
# | blurred | hardly moved | low | | lower | higher | |
# | ring (equal mean and covariance) | not moved | lower | | lower | | |
# | memorises (30 points) | farther | | low, if it repeats itself | low | **high** | **zero** |
#
# ## Images: features first
#
# Two flowers may differ in every pixel and still be alike. So images are compared by the features
# of a classifier. The field's is Inception, trained on ImageNet; ours is a small residual network
# that has learned to name the species. A distance is a distance *in these features*: those of two
# networks do not compare, and the package refuses to mix them.

# %%
model, process, classes = load_pretrained(profile, device)
data, held_out = load_data(profile), load_data(profile, "val")
embedded = profile.dataset == "procedural"
classifier, card = find_classifier(profile, device=device)
features = ClassifierFeatures(classifier)
print(f"the classifier names {card['held_out_accuracy']:.0%} of the held-out images")

# %% [markdown]
# The rules: compare with *held-out* images; state the number of images, for distances depend on
# it; show beside each distance that of a second real set, the **floor**. We take 192 samples, and
# prepare the cheats again: real images blurred, one species only, and noise.

# %%
half = len(held_out) // 2
count = min(192, half)
reference, real = to_float(held_out.images[:half]), to_float(held_out.images[half:])
labels = held_out.labels[half : half + count]
shape = tuple(real.shape[1:])
samples = sample(model, process, labels.to(device), shape=shape, sampler="ddim", steps=12, seed=1)
samples = samples.clamp(-1, 1).cpu()

# %%
sets = {
    "real": real[:count],
    "samples": samples,
    "blurred": F.avg_pool2d(real[:count], 3, 1, 1, count_include_pad=False),
    "one species": real[held_out.labels[half:] == 0].repeat(20, 1, 1, 1)[:count],
    "noise": torch.randn(count, *shape, generator=torch.Generator().manual_seed(3)).clamp(-1, 1),
}
image_grid(
    torch.cat([x[:3] for x in sets.values()]),
    columns=3,
    scale=2,
    row_labels=list(sets),
    alt=(
        "Three images each: real flowers, samples that look much like them, blurred ones, "
        "daisies only, noise"
    ),
)

# %%
from noisout_nb.evaluation import extract_features

embeddings = {name: extract_features(features, x) for name, x in sets.items()}
expected = extract_features(features, reference)[:count]
print("features per image:", expected.shape[1])

# %% [markdown]
# An error belongs to every number. The *jackknife* leaves out an eighth of both sets at a time and
# looks at how much the metric changes.

# %%
from noisout_nb.evaluation import jackknife


def my_jackknife(metric, a, b, blocks=8):
    keep = [[j for j in range(len(a)) if j * blocks // len(a) != i] for i in range(blocks)]
    left_out = torch.tensor([metric(a[k], b[k]) for k in keep])
    return metric(a, b), ((blocks - 1) * left_out.var(correction=0)).sqrt().item()


def kernel(a, b):
    return kernel_distance(a, b)[0]


by_hand = torch.tensor(my_jackknife(kernel, embeddings["noise"], expected))
package = torch.tensor(jackknife(kernel, embeddings["noise"], expected))
print("value and error by hand agree with the package's:", by_hand.allclose(package, rtol=1e-3))

# %%
plot_bars(
    {"Fréchet": {name: jackknife(my_frechet, x, expected) for name, x in embeddings.items()}},
    y_label=f"Fréchet distance, N = {count}",
    log_y=True,
    alt=(
        "Fréchet distances on a log axis, with error bars: real, samples and blurred near each "
        "other, one species and noise farther by orders of magnitude"
    ),
)

# %%
shares_of = {
    "precision": lambda a, b: precision_recall(a, b)[0],
    "recall": lambda a, b: precision_recall(a, b)[1],
    "coverage": coverage,
}
plot_bars(
    {
        label: {name: jackknife(metric, x, expected) for name, x in embeddings.items()}
        for label, metric in shares_of.items()
    },
    y_label="share",
    number="{:.2f}",
    alt=(
        "Precision, recall and coverage of the five sets, with error bars: real high in all; one "
        "species precise with little else; noise near zero in all"
    ),
)

# %% [markdown]
# Noise and missing species are found at once. Blur, which any eye sees, hardly moves the distance,
# for a blurred daisy is still a daisy: **a distance sees what its features see**. And are our
# samples as good as real ones? Their errors are larger than their differences. That needs more
# images.
#
# ## Can it tell a good network from a better one?
#
# A test for the metrics themselves: networks whose order we know. One had 24,000 training steps
# (the shipped one), one 900 (notebook 04's), one 90. `models/` has features of samples of each, of
# several seeds, and nothing else: a small file, with which anybody can compare. Which species a set
# happens to hold moves its mean more than the quality of its images, so in all sets the species
# take turns. (Balanced sets are not independent images, and their kernel distances come out lower,
# below 0 for real ones, so we count from there.)

# %%
from noisout_nb.evaluation import load_features

folder = PROFILES["quick"].published.parent
judge, _ = find_classifier(PROFILES["quick"])
stored, _, facts = load_features(folder / "quick_features.pth", ClassifierFeatures(judge))
pool = ProceduralFlowers(32, 1500, seed=11)
turns = in_turn(pool.labels)  # one image of each species after the other
pool = extract_features(ClassifierFeatures(judge), to_float(pool.images[turns]))
noise = torch.randn(512, 3, 32, 32, generator=torch.Generator().manual_seed(4)).clamp(-1, 1)
noise = extract_features(ClassifierFeatures(judge), noise)
networks = {
    "real": pool,
    "24,000 steps": stored["samples, guidance 1"],
    "900 steps": stored["900 steps"],
    "90 steps": stored["90 steps"],
    "noise": torch.cat([noise] * 3),
}
N = min(len(stored["held-out"]), *(len(x) // 3 for x in networks.values()))
networks = {name: x[: 3 * N] for name, x in networks.items()}
real_ones = stored["held-out"][:N]
print(f"three sets of N = {N} for each: {', '.join(networks)}")

# %%
metrics = {"Fréchet": frechet_distance, "kernel": kernel, **shares_of}
found = {
    label: {
        name: torch.tensor([metric(part, real_ones) for part in x.split(N)])
        for name, x in networks.items()
    }
    for label, metric in metrics.items()
}

floor = found["kernel"]["real"].mean()  # below 0, as the sets are balanced
found["kernel"] = {name: x - floor for name, x in found["kernel"].items()}


# %%
def mean_and_error(values):
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def charts(rows):
    """Two distances, without the noise, which is too far away for one axis; then the shares."""
    panels = []
    for label in ("Fréchet", "kernel"):
        near = {name: value for name, value in rows[label].items() if name != "noise"}
        panels.append(plot_bars({label: near}, y_label=label, number="{:.3f}", size=(720, 190)))
    shares = {label: rows[label] for label in shares_of}
    return [*panels, plot_bars(shares, y_label="share", number="{:.2f}", size=(720, 220))]


# %%
rows = {
    label: {name: mean_and_error(x) for name, x in values.items()}
    for label, values in found.items()
}
stack(
    *charts(rows),
    alt=(
        "Fréchet distance, kernel distance, precision, recall and coverage of real images and "
        "three networks with error bars over three sets: the distances rise and recall and "
        "coverage fall with fewer training steps; noise has no precision, recall or coverage"
    ),
)


# %%
def separated(rows):
    """For neighbours in the order: is the step more than twice its error?"""
    ranked, verdicts = list(rows.items()), {}
    for (better, a), (worse, b) in zip(ranked, ranked[1:], strict=False):
        step = (b.mean() - a.mean()).abs() if len(a) else 0
        error = (a.var() / len(a) + b.var() / len(b)).sqrt()
        verdicts[f"{better} < {worse}"] = bool(step > 2 * error)
    return verdicts


for label, rows in found.items():
    blind = [pair for pair, verdict in separated(rows).items() if not verdict]
    print(f"{label:10} cannot separate: {', '.join(blind) or 'none'}" if embedded else "")

# %% [markdown]
# Each metric finds the 90 steps and the noise at once. Precision cannot tell 900 steps from 24,000:
# it asks whether a sample looks like some flower, and the samples of both networks do. Between real
# flowers and the best network, so few images are not enough for kernel distance and coverage;
# recall sees what is missing. With 3,072 samples of each, all but precision rank all five (the
# [model card](../models/README.md) has that table).
#
# ## How many images does a claim need?
#
# Two sets of *real* flowers: the true distance is 0. What do the metrics say for N images each?
# Five pairs for every N, with the standard error of their mean.

# %%
sizes = [125, 250, 500, 750]


def pairs(n):
    for seed in range(5):
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        yield pool[order[:n]], pool[order[n : 2 * n]]


frechets = {n: torch.tensor([frechet_distance(a, b) for a, b in pairs(n)]) for n in sizes}
kernels = {n: torch.tensor([kernel(a, b) for a, b in pairs(n)]) for n in sizes}
stack(
    *(
        plot_bars(
            {label: {f"N = {n}": mean_and_error(x) for n, x in found.items()}},
            y_label=f"{label}, real to real",
            size=(720, 200),
        )
        for label, found in {"Fréchet": frechets, "kernel": kernels}.items()
    ),
    alt=(
        "Real against real for growing N: the Fréchet distance falls steadily towards zero, "
        "the kernel distance scatters about zero, less and less"
    ),
)

# %% [markdown]
# The Fréchet distance is far above 0, and the more so the fewer images there are: **Fréchet
# distances of different N do not compare.** The kernel distance scatters about 0 instead. So the
# question is how wide it scatters, for real images and for samples:

# %%
shipped, some = networks["24,000 steps"], [n for n in (62, 125, 250, 500) if n <= N]
scatter = torch.stack([x.std() for x in kernels.values()])
errors = [jackknife(kernel, shipped[:n], real_ones[:n])[1] for n in some]
ideal = errors[0] * (some[0] / torch.tensor(some).float()) ** 0.5
plot_lines(
    {
        "scatter, real to real": (sizes, scatter),
        "jackknife's error, samples to real": (some, errors),
        "1 / sqrt(N)": (some, ideal),
    },
    markers=["scatter, real to real", "jackknife's error, samples to real"],
    log_x=True,
    log_y=True,
    x_label="images per set",
    y_label="standard error",
    size=(720, 260),
    alt=(
        "The error of the kernel distance falls with the number of images, that of samples about "
        "as one over its square root, that between two real sets faster"
    ),
)

# %% [markdown]
# (Pairs taken from the pool at random scatter far more than the samples' sets, in which the species
# take turns.) What can so many images tell? Two networks are ranked if their distances differ by
# more than twice the error of a difference, which is $\sqrt 2$ times that of one distance.

# %%
_, error = jackknife(kernel, shipped[:N], real_ones)
values = {name: kernel(x[:N], real_ones) for name, x in networks.items()}
gaps = {f"{name} - real": abs(x - values["real"]) for name, x in list(values.items())[1:]}
plot_bars(
    {"difference in kernel distance": gaps},
    log_y=True,
    y_label="difference of kernel distances",
    hlines={"": 2 * 2**0.5 * error},
    title=f"dashed: the smallest difference that N = {N} can tell",
    size=(820, 240),
    alt=(
        "Differences of the kernel distance of three networks and noise from that of real images, "
        "on a log axis, beside a line: what lies below it cannot be told with so many images"
    ),
)

# %% [markdown]
# A difference below the line needs more images or more seeds: one set of samples decides nothing
# there. The tables of the [model card](../models/README.md) are of three seeds, each with at least
# 2,000 samples (photographs) or 1,024 (embedded flowers).
#
# ## Photographs
#
# The same for the 64 x 64 network, from the features of the held-out photographs and of its
# samples at three scales of guidance (06), of which 1 is none. What does guidance gain, and cost?

# %%
photographs = PROFILES["flowers64"]
judge, judged = find_classifier(photographs)
photo, whole, facts = load_features(folder / "Flowers102_features.pth", ClassifierFeatures(judge))
photo_noise = torch.randn(510, 3, 64, 64, generator=torch.Generator().manual_seed(5)).clamp(-1, 1)
first, second = photo["held-out"].tensor_split(2)  # five photographs of each species in both
rows = {
    "real": second,
    **{name.removeprefix("samples, "): x[:510] for name, x in photo.items() if "samples" in name},
    "noise": extract_features(ClassifierFeatures(judge), photo_noise),
}
measured = {
    label: {name: jackknife(metric, x, first) for name, x in rows.items()}
    for label, metric in metrics.items()
}
far = all(measured[k]["noise"][0] > 5 * measured[k]["guidance 1"][0] for k in ("Fréchet", "kernel"))
print("noise is more than five times as far as unguided samples:", far)
stack(
    *charts(measured),
    alt=(
        "Fréchet and kernel distance, precision, recall and coverage of photographs, of samples at "
        "three scales of guidance, and of noise: scale 2 is the nearest, scale 3 has less recall"
    ),
)

# %% [markdown]
# Scale 2 takes the samples nearer to photographs. At scale 3 the Fréchet distance grows again, as
# guidance favours what is most typical, and recall falls. So `sample_image` guides with scale 2.
#
# Each bar is of 510 images against 510 photographs. Distances to all training photographs, of which
# the file has the moments, are smaller numbers for the same samples: another N.

# %%
several = {
    f"{len(first)} photographs": frechet_distance(rows["guidance 2"], first),
    f"{whole['training'].count:,} photographs": frechet_distance(
        rows["guidance 2"], whole["training"]
    ),
}
plot_bars(
    {"guidance 2": several},
    y_label="Fréchet distance",
    number="{:.2f}",
    size=(520, 200),
    alt="Fréchet distance of the same samples to 510 held-out and to all training photographs",
)

# %% [markdown]
# ## What the embedded flowers can tell
#
# Their factors are known, and so is each species' number of petals. `petal_count` finds it from the
# pixels alone: the strongest frequency on a ring around the centre.

# %%
from noisout_nb.evaluation import petal_count

flowers = ProceduralFlowers(32, 200, seed=5)
counted = petal_count(to_float(flowers.images))
print(f"petals counted rightly: {(counted == flowers.factors['petals']).double().mean():.0%}")

# %%
shares = {}
if embedded:
    petals_of = {int(i): n for i, n in zip(flowers.labels, flowers.factors["petals"], strict=True)}
    hits = petal_count(samples) == torch.stack([petals_of[int(i)] for i in labels])
    for i, name in enumerate(classes):
        hit = hits[labels == i].double()
        share = (hit.sum() + 1) / (len(hit) + 2)  # Laplace's rule: no certainty from few
        shares[name] = (share.item(), (share * (1 - share) / (len(hit) + 3)).sqrt().item())
plot_bars(
    {"samples": shares},
    y_label="share with the right petals",
    number="{:.2f}",
    alt="Share of samples with the right number of petals for each species, with error bars",
) if embedded else None

# %%
from noisout_nb.evaluation import factor_distance

floor, ours = factor_distance(real, reference), factor_distance(samples, reference)
plot_bars(
    {f"real, N = {len(real)}": floor, f"samples, N = {len(samples)}": ours},
    y_label="factor distance",
    alt=(
        "Distance of each factor's distribution, real and samples: samples about two and four "
        "times as far in size and background, no farther in the two colours"
    ),
)

# %% [markdown]
# ## Bits per dimension of images
#
# The same sum for the network, and over 50 of the 1,000 steps (a looser bound, twenty times
# cheaper). The package draws the noises one after the other from the seed, and so do we.

# %%
from noisout_nb.evaluation import bits_per_dim

short = process.respace(50)
images, names = real[:8].to(device), held_out.labels[half : half + 8].to(device)
prior, terms = bits_per_dim(model, short, images.cpu(), names.cpu(), seed=0)

alpha_bar = short.exact_alphas_cumprod
snr, generator, by_hand = alpha_bar / (1 - alpha_bar), torch.Generator().manual_seed(0), []
for t in range(50):
    ts = torch.full((8,), t, device=device)
    x_t = short.q_sample(images, ts, torch.randn(images.shape, generator=generator).to(device))
    with torch.no_grad():
        output = model(x_t, short.timestep_map[ts], names)
        predicted = short.predict_start(x_t, ts, output).clamp(-1, 1)
    error = (images - predicted).square().mean().item()
    by_hand.append((snr[t - 1] - snr[t]).item() / 2 * error / math.log(2) if t else float("nan"))
agree = torch.tensor(by_hand[1:]).allclose(terms[1:].float(), rtol=1e-2, atol=1e-5)
print(f"all 49 terms by hand agree with the package's: {agree}")

# %%
plot_lines(
    {"bits per dimension": (range(1, 51), terms)},
    x_label="step",
    y_label="bits per dimension",
    log_y=True,
    size=(720, 240),
    alt=(
        "The terms of the bound on a log axis: by far the largest at the first steps, then "
        "falling by orders of magnitude"
    ),
)

# %% [markdown]
# Most bits describe noise too faint to see, at the first few $t$. That is why likelihood and
# looks may disagree.
#
# ## Is it copying?
#
# For each sample the nearest *training* image, mirrored or not. Pixels would be misled by noise, so
# images are compared as thumbnails, the means on a grid of 8 x 8:

# %% tags=["cover"]
from noisout_nb.evaluation import CopyDetector

training = to_float(data.images)
detector = CopyDetector(training, to_float(held_out.images))
verdict = detector.examine(samples)
suspects = verdict.ratio.argsort()[:8]
image_grid(
    torch.cat([samples[suspects], training[verdict.nearest[suspects]]]),
    columns=8,
    row_labels=["sample", "nearest"],
    alt=(
        "The eight most suspicious samples above their nearest training images: alike, but not "
        "the same"
    ),
)

# %% [markdown]
# Alike, not copied? To decide without eyes: a copy is far nearer to one training image than to
# the next ones, so divide the distance to the nearest by the mean distance to the next nine. A
# sample is suspicious where that ratio is lower than for 99 % of the held-out images. An honest
# model has about 1 % suspects.

# %%
caught = verdict.suspected.double().mean().item()
print("no more suspects than chance allows" if caught < 0.05 else "suspicious!")
plot_histograms(
    {"held-out": detector.ratios(to_float(held_out.images)), "samples": verdict.ratio},
    x_label="distance to the nearest / mean of the next nine",
    bins=30,
    size=(720, 240),
    alt="Histograms of the ratio: samples have no lower ratios than held-out images",
)

# %% [markdown]
# What would it catch? We plant copies. Exact and mirrored ones first, with the criterion in common
# use beside ours: nearest distance less than a third of the second (Yoon et al. 2023).

# %%
from noisout_nb.evaluation import planted_copies

plain = planted_copies(training[:100], training[100:200])
verdicts = {name: detector.examine(plain[name]) for name in ("exact", "mirrored")}
for name, found in verdicts.items():
    ours, usual = (x.double().mean() for x in (found.suspected, found.third))
    print(f"{name}: {ours:.0%} found at 1 % false alarms, {usual:.0%} by d1 / d2 < 1/3")

# %% [markdown]
# Then copies that are changed, from 0 (an exact copy) to 50 %: noise, a blur and a shift as wide as
# that share of the image, colours that lose it, and that share of the image from another one.

# %%
from noisout_nb.evaluation import altered

strengths = [0, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5]
power = {}
for strength in strengths:
    changed = altered(training[:100], training[100:200], strength)
    for name, images in changed.items():
        power.setdefault(name, []).append(detector.copied(images).double().mean())
plot_lines(
    {name: ([100 * x for x in strengths], shares) for name, shares in power.items()},
    markers=True,
    x_label="change, %",
    y_label="share found",
    hlines={"false alarms": 0.01},
    alt=(
        "Share of planted copies found against the strength of five changes: all at 0; blur and "
        "noise are found up to about 10 %, colour and partial copies less, a shift is missed"
    ),
)

# %% [markdown]
# A copy moved by one pixel passes in silence, so "no copies found" means: no exact, mirrored, noisy
# or slightly blurred ones. It depends on the data: embedded flowers are all alike. Photographs lie
# farther apart, and the same detector finds more. And some held-out photographs *are* training
# photographs: the detector lists these near-duplicates and leaves them out of its threshold.

# %%
copies = facts["memorisation"]
print("held-out photographs with a twin among the training images:", len(copies["near_duplicates"]))
plot_bars(
    {
        "1 % false alarms": {name: x["suspected"] for name, x in copies["planted"].items()},
        "d1 / d2 < 1/3": {name: x["d1/d2"] for name, x in copies["planted"].items()},
    },
    y_label="share found",
    number="{:.2f}",
    size=(820, 240),
    alt=(
        "Share of planted copies of photographs found by the two criteria: exact, mirrored, noisy "
        "and blurred ones nearly all, partial ones seldom; the usual criterion finds fewer"
    ),
)

# %%
plot_bars(
    {"1 % by chance": {name: x["suspected"] for name, x in copies["samples"].items()}},
    y_label="share suspected",
    number="{:.3f}",
    size=(520, 220),
    alt="Share of suspicious samples of the 64 x 64 network, unguided and guided, below 1 %",
)

# %% [markdown]
# ## Memorisation as it happens
#
# Two equal networks for 16 x 16 pixels, one trained on 32 flowers, the other on 2,000, for equally
# many steps. A plain MLP is enough, and fast. From time to time both sample, and we count copies.

# %%
small = ProceduralFlowers(16, 2400, seed=20)
unseen = to_float(small.images[2000:])


class MLP(nn.Module):
    """x_t and t -> the prediction of x_0; without labels."""

    def __init__(self, pixels=3 * 16 * 16, width=256):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(pixels + 16, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, pixels),
        )

    def forward(self, x, t, y=None):
        phase = t[:, None] / 1000 * math.pi * torch.arange(1, 9, device=t.device)
        inputs = torch.cat([x.flatten(1), phase.cos(), phase.sin()], dim=1)
        return self.layers(inputs).view_as(x)


# %%
def watched(n, moments):
    """Trains on n flowers; yields the step and 96 samples at each of `moments`."""
    net = MLP().to(device)
    subset = ImageDataset(small.images[:n], small.labels[:n], small.classes)
    batches, ema = Batches(subset, 32, flip=False, device=device), EMA(net, 0.95)
    settings = profile.training | {"steps": max(moments), "learning_rate": 4e-3, "label_dropout": 0}
    with train(net, process, batches, ema, **settings) as run:
        for step in run:
            if step.index in moments:
                with ema.applied():
                    drawn = sample(
                        net, process, count=96, shape=(3, 16, 16), sampler="ddim", steps=50
                    )
                yield step.index, drawn.clamp(-1, 1).cpu()


# %%
def copies_of(n, moments):
    watch, found = CopyDetector(to_float(small.images[:n]), unseen), {}
    for step, drawn in watched(n, moments):
        verdict = watch.examine(drawn)
        share = verdict.suspected.double().mean().item()
        found[f"{step} steps"] = (share, (share * (1 - share) / len(drawn)) ** 0.5)
    return found, torch.cat([drawn[:10], to_float(small.images[verdict.nearest[:10]])])


outcome = {n: copies_of(n, moments=(200, 400, 800)) for n in (32, 2000)}
plot_bars(
    {f"{n:,} training images": found for n, (found, _) in outcome.items()},
    y_label="share of copies",
    number="{:.2f}",
    alt=(
        "Share of copies against training steps: with 32 training images it rises to more than a "
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
        "Samples above their nearest training images. Trained on 32: many of the same images. "
        "Trained on 2,000: different flowers"
    ),
)

# %% [markdown]
# Trained on 32 images, the network reproduces them: a large share of its samples is flagged. After
# as many steps on 2,000 images its samples are rough still, but hardly one is a copy. A distance to
# the *training* set would reward copies: that is why the reference is held out, and why a test for
# copies belongs beside every distance.
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
# All of this, for any profile's network, with more samples and three seeds; an interrupted
# evaluation resumes:
#
#     python -m noisout_nb evaluate --profile quick
#     python -m noisout_nb evaluate --profile flowers64 --features inception
#
# The second also gives distances as others publish them, where Inception's weights can be had.
#
# The tables of the networks in `models/` are in the [model card](../models/README.md). Stage 8 asks
# what limits the speed, and what a larger machine brings.
