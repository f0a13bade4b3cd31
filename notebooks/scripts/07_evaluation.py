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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/noisOut/noisOut/blob/main/notebooks/07_evaluation.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/noisOut/noisOut/main?labpath=notebooks/07_evaluation.ipynb)
#
# **What you'll do**: put numbers on "looks good", check each of the measuring instruments on a case whose answer is known, and look for copies of the training pictures.
#
# **What you'll learn**: bits per dimension, Fréchet and kernel distance, precision and recall, the search for nearest neighbours; what each of them sees, and what it
# overlooks; how many network calls a good sample needs; what the moving average and guidance do to the numbers.
#
# **What you need**: notebooks 02 to 06. Under two minutes on two CPU cores; if 04 has not run on this machine, one or two more, because this
# notebook then runs it first.

# %%
import sys

if "google.colab" in sys.modules:  # there a notebook comes alone: fetch what it imports, once
    import subprocess

    subprocess.run("test -d noisOut || git clone -q --depth 1 https://github.com/noisOut/noisOut", shell=True, check=True)
    sys.path.insert(0, "noisOut")

# %%
import time

import ipywidgets as widgets
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from noisout_nb.data import SPECIES, load_data, measure_factors, to_float
from noisout_nb.display import Explorer, image_grid, plot_histograms, plot_lines, stack
from noisout_nb.evaluation import bits_per_dim, copied_share, extract_features, frechet_distance, kernel_distance, nearest, precision_recall
from noisout_nb.forward_process import GaussianDiffusion, cosine_beta_schedule
from noisout_nb.guidance import ClassifierFreeGuidance, NoisyClassifier
from noisout_nb.parallel import get_device, memory_format
from noisout_nb.profiles import PROFILES, get_profile
from noisout_nb.sampling import sample
from noisout_nb.training import EMA, Batches, load_model, load_or_train, train
from noisout_nb.unet import UNet

torch.manual_seed(0)
profile, device = get_profile(), get_device()

# %%
model, process, classes = load_or_train(profile, device)
data, held_out = load_data(profile), load_data(profile, "val")
shape = (3, profile.image_size, profile.image_size)

# %% [markdown]
# The rules, before any number. Samples are compared with *held-out* pictures, which the network has never seen, without flips. Two halves of them play two parts: the first is the reference, the second
# shows what a perfect model could reach. The samples get the second half's labels. All distances depend on the number of pictures, so that is part of the number: 256 against 256 in the embedded data set.

# %%
order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
first, second = order.chunk(2)
reference, real, labels = to_float(held_out.images[first]), to_float(held_out.images[second]), held_out.labels[second]
print(f"{len(reference)} reference pictures, {len(real)} other real ones")


# %%
def sampled(model, count=None, **options):
    y = labels[:count].to(device)
    return sample(model, process, y, shape=shape, **{"steps": 10, "seed": 1} | options).clamp(-1, 1).cpu()


samples = sampled(model)
image_grid(samples[:24], columns=12, alt="24 of the samples that this notebook examines: ragged blossoms in their species' colours, some with a centre")

# %% [markdown]
# ## Bits per dimension
#
# The only measure that asks the model itself. A model that gives a picture the probability $p(x_0)$ can store it in $-\log_2 p(x_0)$ bits. Diffusion cannot compute $p(x_0)$, but it has an upper bound on the bits
# (Ho et al. 2020, eq. 5), a sum: what $x_T$ still tells of $x_0$, a Kullback-Leibler distance for every step back, and the grey levels at $t = 0$.
#
# First the instrument. If pixels are Gaussian, $\mathcal N(0, 0.3^2)$, the perfect network is known, and so is every term: given $x_t$, the variance of $x_0$ is
# $s_t = 0.3^2 (1 - \bar\alpha_t) / (0.3^2 \bar\alpha_t + 1 - \bar\alpha_t)$, and a term is that, times the squared factor of $x_0$ in $\tilde\mu_t$ (eq. 7), over $2\tilde\beta_t$ (eq. 8).

# %%
toy, std = GaussianDiffusion(cosine_beta_schedule(1000), "eps"), 0.3


class PerfectNetwork(torch.nn.Module):
    def forward(self, x, t, y=None):
        a, b = toy.sqrt_alphas_cumprod[t].view(-1, 1, 1, 1), toy.sqrt_one_minus_alphas_cumprod[t].view(-1, 1, 1, 1)
        return b * x / (a**2 * std**2 + b**2)


# %%
pixels = (std * torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
_, terms = bits_per_dim(PerfectNetwork(), toy, pixels)

# %%
alpha_bar = toy.exact_alphas_cumprod
left = std**2 * (1 - alpha_bar) / (std**2 * alpha_bar + 1 - alpha_bar)
expected = toy.posterior_mean_coef1.double() ** 2 * left / (2 * toy.posterior_variance.double()) / torch.log(torch.tensor(2.0, dtype=torch.float64))
assert abs(terms[1:].sum() / expected[1:].sum() - 1) < 2e-3
assert_close(terms[1:].cumsum(0), expected[1:].cumsum(0), rtol=5e-3, atol=0)

# %% [markdown]
# The sum agrees within 0.2 %, and every part of it within 0.5 %. Now the network, on held-out flowers. (Eight of them, to save time.)

# %%
count = 8
prior, terms = bits_per_dim(model, process, real[:count], labels[:count])
assert prior < 1e-3 < terms.sum() < 8  # a picture without any compression has 8 bits per dimension

# %%
plot_lines({f"{prior + terms.sum():.2f} bits per dimension": (range(1, 1001), terms)}, x_label="t + 1", y_label="bits per dimension", log_x=True, log_y=True,
           alt="The terms of the bound against t on log axes: by far the largest at the first steps, falling over six orders of magnitude")

# %% [markdown]
# Most bits describe noise that is too faint to be seen: the ten terms at $t < 10$ hold more than half of the sum. That is why likelihood and looks may disagree, and why we need measures of looks as well.

# %%
assert terms[:10].sum() > (0.7 if profile.dataset == "procedural" else 0.5) * terms.sum()

# %% [markdown]
# ## Features
#
# Two flowers may differ in every pixel and yet be alike. So pictures are compared by what a classifier sees in them. The field uses InceptionV3, trained on ImageNet; `InceptionFeatures` in the helper fetches it. But it expects photographs of
# 299 pixels, and it must be downloaded. For flowers of our own we train a small classifier of our own, the encoder of stage 6 (on slightly noisy pictures, so that it learns flowers and not pixels), and average what it holds just before its verdict.

# %%
torch.manual_seed(1)
half = {"image_size": profile.image_size, "channels": 16, "channel_mults": (1, 2, 4), "num_res_blocks": 1, "attention_resolutions": (), "patch_size": 2}
classifier = NoisyClassifier(process, len(classes), **half).to(device)
optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=300)

# %%
for _, (x_0, y) in zip(range(300), Batches(data, 32, device=device)):
    t = torch.randint(300, y.shape, device=device)
    optimizer.zero_grad()
    F.cross_entropy(classifier(process.q_sample(x_0, t, torch.randn_like(x_0)), t), y).backward()
    optimizer.step()
    schedule.step()


# %%
class Features(torch.nn.Module):
    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier.eval().requires_grad_(False)

    def forward(self, x):
        h, *_ = self.classifier.encode(x, torch.zeros(len(x), dtype=torch.int64, device=x.device))
        return self.classifier.norm(h).mean((2, 3))


# %%
look = Features(classifier)
reference_features = extract_features(look, reference)
print("features of a picture:", reference_features.shape[1])


# %% [markdown]
# ## Two distances
#
# *Fréchet distance* (with Inception's features: FID) takes both sets for Gaussians and compares means and covariances. For two such Gaussians the answer is known, for instance
# $|m|^2 + \sum_i (\sigma_i - \sigma'_i)^2$ for diagonal covariances. To test it we need points whose mean and covariance are *exactly* the given ones:

# %%
def exactly(mean, std, count=200):
    points = torch.randn(count, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points = points - points.mean(0)
    white = points @ torch.linalg.inv(torch.linalg.cholesky(points.T.cov())).T
    return mean + std * white


# %%
ones = torch.ones(5, dtype=torch.float64)
assert abs(frechet_distance(exactly(0 * ones, ones), exactly(0.5 * ones, 3 * ones)) - 5 * (0.5**2 + 2**2)) < 1e-6
assert abs(frechet_distance(reference_features, reference_features)) < 1e-6

# %% [markdown]
# It is biased: two finite sets from the very same source are never at 0. *Kernel distance* (KID) is not: its mean for equal sources is 0, and it comes with a standard error.

# %%
source = torch.randn(400, 2000, 16, generator=torch.Generator().manual_seed(1))
biased = torch.tensor([frechet_distance(pair[:100], pair[100:200]) for pair in source[:50]])
unbiased = torch.tensor([kernel_distance(pair[:100], pair[100:200])[0] for pair in source[:50]])
assert biased.min() > 1 and abs(unbiased.mean()) < 3 * unbiased.std() / 50**0.5

# %% [markdown]
# ## Precision and recall
#
# One number cannot tell whether samples are ugly or all the same. Kynkäänniemi et al. (2019) use two. *Precision*: how many samples lie among real pictures, that is, within reach of some real picture's third neighbour? *Recall*: how many real pictures lie among the
# samples? Equal sets have 1 and 1, disjoint ones 0 and 0. A model that draws one perfect flower over and over has precision without recall:

# %%
assert precision_recall(reference_features, reference_features) == (1, 1)
assert precision_recall(reference_features, reference_features + 100) == (0, 0)

# %%
one_flower = reference_features[:1] + 1e-3 * torch.randn(256, reference_features.shape[1], generator=torch.Generator().manual_seed(2))
precision, recall = precision_recall(one_flower, reference_features)
assert precision == 1 and recall < 0.05

# %% [markdown]
# ## The verdict
#
# Four sets: real pictures, the network's samples, those of a network that was trained for a tenth of the time, and noise. If an instrument is any good it puts them in this order.

# %%
beginner = UNet(**model.config).to(device, memory_format=memory_format(device, profile.autocast))
ema, batches = EMA(beginner, profile.ema_decay), Batches(data, profile.batch_size, device=device)
for _ in train(beginner, process, batches, ema, steps=profile.train_steps // 10, learning_rate=profile.learning_rate, autocast=profile.autocast):
    pass
with ema.applied():
    sets = {"real": real, "trained": samples, "beginner": sampled(beginner)}
sets["noise"] = torch.randn(real.shape, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)


# %%
def measure(pictures):
    features = extract_features(look, pictures)
    distance, error = kernel_distance(features, reference_features)
    precision, recall = precision_recall(features, reference_features)
    return {"Fréchet": frechet_distance(features, reference_features), "kernel": distance, "error": error, "precision": precision, "recall": recall}


table = {name: measure(pictures) for name, pictures in sets.items()}

# %%
for instrument in ("Fréchet", "kernel"):
    values = [row[instrument] for row in table.values()]
    assert values[1:] == sorted(values[1:]) and (values[0] < values[1] or profile.dataset == "flowers102"), instrument
precisions = [row["precision"] for row in table.values()]
assert precisions == sorted(precisions, reverse=True) or profile.dataset == "flowers102"


# %% [markdown]
# The kernel distance of real pictures has the mean 0, so it may fall below 0, where a log axis has no place for its point.
# (On photographs, see the [model card](../models/README.md), the order of the distances holds as well, but not that of the precisions: among 102 species spread far and wide, nearly any picture lies within reach of some real one. Precision needs thousands of pictures there.)

# %%
def points(key):
    return [row[key] for row in table.values()]


above_zero = [value if value > 0 else float("nan") for value in points("kernel")]
stack(
    plot_lines({"Fréchet distance": points("Fréchet"), "kernel distance": above_zero}, x_ticks=list(table), markers=True, log_y=True, size=(720, 240)),
    plot_lines({"precision": points("precision"), "recall": points("recall")}, x_ticks=list(table), markers=True, size=(720, 220)),
    alt="Above, Fréchet and kernel distance on a log axis: rising from real to trained to beginner to noise. Below, precision and recall: falling from real to trained to beginner",
)

# %% [markdown]
# Do the samples show all species? And do their known factors agree with the data's? These two questions only our embedded data set can answer so plainly.

# %%
with torch.no_grad():
    seen = classifier(samples.to(device), torch.zeros_like(labels, device=device)).argmax(1).cpu()
coverage = len(seen.unique()) / len(labels.unique())
print("all species are drawn" if coverage == 1 else "some species are never seen")
assert coverage == 1 or profile.dataset == "flowers102"

# %%
shown, known = measure_factors(samples), measure_factors(reference)
if profile.dataset == "procedural":
    petals = torch.tensor([float(SPECIES[name][0]) for name in classes])
    shown["petals"], known["petals"] = petals[seen], petals[held_out.labels[first]]

# %%
stack(*(plot_histograms({"real": known[name], "samples": shown[name]}, x_label=name, bins=30, size=(720, 180)) for name in known if name != "red_green"),
      alt="Histograms of size, background, colour and number of petals for real pictures and samples: sizes and backgrounds of the samples vary less than the real ones")

# %% [markdown]
# (The petals are those of the species that the classifier sees.) All species are there, though most of the cosmos, which has 8 petals, are taken for others. And sizes and backgrounds vary less than they should: two minutes of training taught the network
# the typical flower before its extremes. That was invisible in the grid of samples.

# %%
assert shown["background"].std() < known["background"].std() or profile.dataset == "flowers102"

# %% [markdown]
# ## Is it copying?
#
# A perfect score is easy to get: store the training pictures and hand them out. None of the measures above would object. So for each sample we look up the nearest *training* picture:

# %% tags=["cover"]
training = to_float(data.images).flatten(1)
distances, found = nearest(samples.flatten(1), training)
closest = distances[:, 0].argsort()[:10]
image_grid(torch.cat([samples[closest], to_float(data.images[found[closest, 0]])]), columns=10, row_labels=["sample", "nearest"],
           alt="The ten samples that are nearest to a training picture, above it: similar in colour and place, different in petals") if profile.dataset == "procedural" else None

# %% [markdown]
# The ten most suspicious cases: alike, not copied. Browse all samples, the most suspicious first, each before its five nearest training pictures with their distances:

# %%
suspicion = distances[:, 0].argsort()


def neighbours(rank):
    i = suspicion[rank]
    labels = ["sample", *(f"{d:.1f}" for d in distances[i, :5])]
    return image_grid(torch.cat([samples[i][None], to_float(data.images[found[i, :5]])]), columns=6, scale=128 // profile.image_size, column_labels=labels,
                      alt=f"Sample {rank} in the order of suspicion, and its five nearest training pictures")


# %%
Explorer(neighbours, rank=widgets.IntSlider(0, 0, len(samples) - 1)) if profile.dataset == "procedural" else None


# %% [markdown]
# How to decide without eyes? A copy is much nearer to one training picture than to any other; a new flower is about as near to several. So we take the distance to the nearest, divided by the mean
# distance to the next nine, and ask how many samples have less than 99 % of the held-out pictures have. An honest model has about one in a hundred.

# %%
def ratio(pictures):
    distances, _ = nearest(pictures.flatten(1), training)
    return distances[:, 0] / distances[:, 1:].mean(1)


real_ones = to_float(held_out.images).flatten(1)
assert abs(copied_share(real_ones, training, real_ones) - 0.01) < 0.005, "held-out pictures themselves: one in a hundred"
honest = copied_share(samples.flatten(1), training, real_ones)
assert honest < 0.05, "this model copies its training pictures"


# %% [markdown]
# Does the alarm work? It must go off for a model that has learned its training pictures by heart. Such a model can be written down: for a finite set of pictures $x^{(i)}$, the answer that makes the training loss as small as it can be is
# $\hat x_0 = \sum_i w_i\, x^{(i)}$, with $w_i \propto \exp\big(-|x_t - \sqrt{\bar\alpha_t}\, x^{(i)}|^2 / (2 (1 - \bar\alpha_t))\big)$. No network can have a smaller training loss on these pictures.

# %%
class ByHeart(torch.nn.Module):
    def __init__(self, pictures):
        super().__init__()
        self.pictures = pictures.flatten(1)

    def forward(self, x, t, y=None):
        a, b = process.sqrt_alphas_cumprod[t].view(-1, 1), process.sqrt_one_minus_alphas_cumprod[t].view(-1, 1)
        weights = (-torch.cdist(x.flatten(1), a[:1] * self.pictures).square() / (2 * b**2)).softmax(1)
        x_start = (weights @ self.pictures).view_as(x)
        return (a.view(-1, 1, 1, 1) * x - x_start) / b.view(-1, 1, 1, 1)  # as v


# %%
by_heart = sampled(ByHeart(to_float(data.images[:64]).to(device)), count=64)
copied = copied_share(by_heart.flatten(1), training, real_ones)
print(f"learned by heart: {copied:.0%} of the samples are copies")
assert copied > 0.9

# %%
plot_histograms({"held-out pictures": ratio(real_ones), "samples": ratio(samples), "learned by heart": ratio(by_heart)}, x_label="nearest distance / mean of the next nine",
                alt="Histograms of the ratio: the samples lie near 1, held-out pictures mostly between 0.5 and 0.9, the copies at 0")


# %% [markdown]
# None of the other instruments asks where a sample comes from. So a number on quality without this check proves little.
#
# ## What does quality cost?
#
# The price of a sample is the number of times that the network is called. The three samplers of stage 5, from the same noise:

# %%
def frechet(pictures):
    return frechet_distance(extract_features(look, pictures), reference_features)


# %%
step_counts = (5, 10, 20)
calls, clock = {}, {}
for sampler in ("ddpm", "ddim", "dpm_solver"):
    calls[sampler], clock[sampler] = [], []
    for steps in step_counts:
        start = time.perf_counter()
        pictures = sampled(model, count=80, sampler=sampler, steps=steps)
        clock[sampler].append((time.perf_counter() - start) / 80)
        calls[sampler].append(frechet(pictures))

# %%
real_few, look_alike = frechet(real[:80]), {"y_label": "Fréchet distance", "log_x": True, "log_y": True, "markers": True, "size": (720, 250)}
assert real_few < min(min(values) for values in calls.values()) or profile.dataset == "flowers102"

# %% tags=["measurement"]
stack(
    plot_lines({name: (step_counts, values) for name, values in calls.items()}, x_label="network calls", hlines={"real": real_few}, **look_alike),
    plot_lines({name: (clock[name], values) for name, values in calls.items()}, x_label="seconds for a sample", **look_alike),
    alt="Fréchet distance against network calls and against seconds: DPM-Solver++ and DDIM hardly change from five calls to twenty, DDPM does",
).save(profile.runs / "samplers.png")

# %% [markdown]
# A call costs the same in all three, so both plots look alike. The deterministic two are nearly at their best with five calls; what is missing to the real pictures is the network's fault, and more calls do not mend it. (80 samples each make all distances, the real pictures' too, larger than those above with 256: compare only equal numbers.) For the network of photographs, up to a thousand calls, this plot is in the [model card](../models/README.md).
#
# And the moving average of stage 4? We compare the beginner with and without it. At the end of a training whose learning rate falls to zero the two are close:

# %%
with_average, without = table["beginner"]["Fréchet"], measure(sampled(beginner))["Fréchet"]
assert 0.5 < with_average / without < 2

# %% [markdown]
# Last, guidance, seen through these instruments. Up to scale 1 both rise: without labels our small network draws mixtures. Beyond 1 guidance trades diversity away: recall falls. In the paper's large networks precision goes on rising
# meanwhile; in ours the glaring colours of high scales spoil that, too.

# %%
scales = (0.0, 1.0, 2.0, 4.0)
guided = [measure(sampled(ClassifierFreeGuidance(model, scale), count=96)) for scale in scales]
assert guided[3]["recall"] < guided[1]["recall"] or profile.dataset == "flowers102"

# %%
plot_lines({"precision": (scales, [row["precision"] for row in guided]), "recall": (scales, [row["recall"] for row in guided])}, x_label="guidance scale", markers=True, size=(720, 260),
           alt="Precision and recall against the guidance scale: both rise from 0 to 1; beyond, recall falls steeply, and at 4 both are low")

# %% [markdown]
# Instruments that are misused must say so:

# %%
few = reference_features[:40]
for call in (
    lambda: frechet_distance(few, reference_features),
    lambda: kernel_distance(few[:10], reference_features),
    lambda: precision_recall(few[:3], reference_features),
    lambda: precision_recall(few, reference_features[:, :10]),
    lambda: extract_features(look, held_out.images[:4]),
    lambda: bits_per_dim(model, process, 2 * real[:4]),
):
    try:
        call()
    except ValueError as error:
        print(error, "\n")

# %% [markdown]
# ## Exercises
#
# 1. How much does the Fréchet distance of a second real set grow when fewer pictures are compared? Compute it in `shrinking` for 256, 160 and 100 of them.

# %% tags=["exercise"]
shrinking = ...

# %% tags=["solution"]
real_features = extract_features(look, real)
shrinking = [frechet_distance(real_features[:n], reference_features[:n]) for n in (256, 160, 100)]
assert shrinking[0] < shrinking[1] < shrinking[2]

# %% [markdown]
# 2. A cheat: a "model" that hands out held-out pictures, slightly blurred. Which of the instruments notices?

# %% tags=["exercise"]
blurred = ...

# %% tags=["solution"]
blurred = F.avg_pool2d(real, 3, 1, 1, count_include_pad=False)
noticed = measure(blurred)
assert noticed["Fréchet"] > table["real"]["Fréchet"]

# %% [markdown]
# And photographs? These are samples of the 32 x 32 network in `models/`, without guidance, the first 24 of their seed. Its table, with the same instruments, is in the [model card](../models/README.md).

# %%
flowers, flower_process, names = load_model(PROFILES["flowers32"].weights, device)
pictures = sample(flowers, flower_process, torch.arange(0, 96, 4, device=device), steps=15, seed=1)
image_grid(pictures.cpu(), columns=12, scale=2, alt="24 generated flowers of 24 species of Flowers102, of many colours and forms")

# %% [markdown]
# From here: every number above took seconds, because the pictures are small. Stage 8 asks what limits the speed, and what a larger machine brings.
