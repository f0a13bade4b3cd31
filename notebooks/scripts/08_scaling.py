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
# # 08 Faster, larger, and hard to break
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/noisOut/noisOut/blob/main/notebooks/08_scaling.ipynb)
# [![Open in Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/noisOut/noisOut/main?labpath=notebooks/08_scaling.ipynb)
#
# **What you'll do**: find out where the time of a training step goes, try the usual remedies one by
# one, train with several processes, and kill a training run in the middle.
#
# **What you'll learn**: how many operations a step takes and how near the machine comes to its own
# limit; which remedies pay here, in milliseconds; what data-parallel training is; how a run
# survives `kill -9`; and what ImageNet would take.
#
# **What you need**: notebooks 03 and 04. Less than a minute on two CPU cores. All times are those
# of the machine that ran this last: run it on yours.

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
import os
import random
import shutil
import statistics
import subprocess
import time

import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from torchvision.io import decode_jpeg, encode_jpeg

from noisout_nb.checkpoints import load_safely
from noisout_nb.data import load_data, to_float
from noisout_nb.exercises import check
from noisout_nb.figures import bars
from noisout_nb.forward_process import GaussianDiffusion
from noisout_nb.parallel import get_device, memory_format
from noisout_nb.profiles import REPOSITORY, get_profile
from noisout_nb.training import EMA, Batches, simple_loss
from noisout_nb.unet import UNet

# %% [markdown]
# One training step, as notebook 04 made it, with everything that we are going to vary as an
# argument:

# %%
torch.manual_seed(0)
profile, device = get_profile(), get_device()
data = load_data(profile)
process = GaussianDiffusion.from_config(**profile.process).to(device)


class Step:
    def __init__(self, batch_size=profile.batch_size, layout=None, autocast=False, **network):
        network = profile.network | {"num_classes": len(data.classes)} | network
        size = network["image_size"]
        layout = layout or memory_format(device, autocast)
        self.model = UNet(**network).to(device, memory_format=layout)
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=True)
        self.x_0 = torch.randn(batch_size, 3, size, size, device=device).clamp(-1, 1)
        self.t = torch.randint(process.timesteps, (batch_size,), device=device)
        self.y = torch.randint(len(data.classes), (batch_size,), device=device)
        self.autocast = autocast

    def __call__(self):
        noise = torch.randn_like(self.x_0)
        loss = simple_loss(self.model, process, self.x_0, self.t, noise, self.y, self.autocast)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


# %%
def operations(work):
    """Floating-point operations of a call, in GFLOP (10^9)."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9


conv = torch.nn.Conv2d(16, 32, 3, padding=1)
by_hand = 2 * (3 * 3) * 16 * 32 * (32 * 32) / 1e9
counted = operations(lambda: conv(torch.zeros(1, 16, 32, 32)))
print(f"one convolution: by hand {by_hand:.4f} GFLOP, counted {counted:.4f}")

# %%
step = Step()
forward = operations(lambda: step.model(step.x_0, step.t, step.y))
print(f"{profile.batch_size} images: forward {forward:.1f} GFLOP, the step {operations(step):.1f}")


# %% [markdown]
# PyTorch counts two operations, a multiplication and an addition, per weight and position. Backward
# costs twice as much as forward: each convolution has a gradient for its input and one for its
# weights.
#
# ## How fast could it be?
#
# A machine is never equally fast twice: it warms up, and has other things to do. So we measure what
# we compare *in turns* and take the median. The machine's own limit is what it reaches in one large
# matrix product with nothing else to do. Beside it: a convolution like those of the first level, a
# wide one of 128 channels, the training step, and that of a wider network.

# %%
def seconds(works, rounds=4):
    times = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}  # first: warm-up


def convolution(channels, batch_size, side=16):
    layer = torch.nn.Conv2d(channels, channels, 3, padding=1)
    layer = layer.to(device, memory_format=torch.channels_last)
    x = torch.randn(batch_size, channels, side, side, device=device)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    return lambda: layer(x).sum().backward()


# %% tags=["measurement"]
matrix = torch.randn(1024, 1024, device=device)
wide_network = {"channels": 64, "channel_mults": (1, 2, 2), "num_res_blocks": 2}
works = {
    "matrix product": lambda: matrix @ matrix,
    "convolution, 128 channels": convolution(128, 16),
    f"convolution, {profile.channels} channels": convolution(profile.channels, profile.batch_size),
    "training step": step,
    "training step, wider network": Step(**wide_network),
}
gflop = {name: operations(work) for name, work in works.items()}
taken = seconds(works)
speed = {name: gflop[name] / taken[name] for name in works}
bars(
    speed,
    x_label="GFLOP/s",
    number="{:.0f}",
    alt="Speed in GFLOP per second: highest in the matrix product and the wide convolution, lower "
    "in the narrow convolution and in the training steps, of which the wider network's is the "
    "faster",
)

# %% [markdown]
# A *narrow* convolution has little to compute per number that it reads and writes, so memory holds
# it back. That is why the step stays below the machine's limit, and why a wider network comes
# nearer.
#
# ## Remedies, one by one
#
# Each is measured against the same step without it. What it saves is given in milliseconds per
# step, on one scale, so that the sizes can be compared; a bar to the left is a loss.
# `torch.compile` joins small operations into larger ones; it compiles for a minute first, so it is
# tried on a GPU only.

# %%
variants = {
    "as it is": step,
    "channels first": Step(layout=torch.contiguous_format),
    "bfloat16": Step(autocast=True),
    "larger patches": Step(patch_size=2 * profile.patch_size),
}
if device.type == "cuda":
    variants["torch.compile"] = Step()
    variants["torch.compile"].model.compile()
of_step = seconds(variants)

# %%
ema, decay = EMA(step.model), 0.999
adam_in_a_loop = torch.optim.Adam(step.model.parameters(), foreach=False)


@torch.no_grad()
def ema_in_a_loop():
    for shadow, parameter in zip(ema.shadow, step.model.parameters(), strict=True):
        shadow.mul_(decay).add_(parameter, alpha=1 - decay)


files = [encode_jpeg(image) for image in data.images[: profile.batch_size].cpu()]
batches = Batches(data, profile.batch_size, device=device)
parts = seconds(
    {
        "EMA in a loop": ema_in_a_loop,
        "EMA at once": ema.update,
        "Adam in a loop": adam_in_a_loop.step,
        "Adam fused": step.optimizer.step,
        "decoded": lambda: to_float(torch.stack([decode_jpeg(file) for file in files])).to(device),
        "in memory": lambda: batches[0],
    }
)

# %% tags=["measurement", "cover"]
saved = {
    "channels last": of_step["channels first"] - of_step["as it is"],
    "bfloat16": of_step["as it is"] - of_step["bfloat16"],
    "patches twice as large": of_step["as it is"] - of_step["larger patches"],
    "EMA of all weights at once": parts["EMA in a loop"] - parts["EMA at once"],
    "fused Adam": parts["Adam in a loop"] - parts["Adam fused"],
    "images decoded once": parts["decoded"] - parts["in memory"],
}
if "torch.compile" in of_step:
    saved["torch.compile"] = of_step["as it is"] - of_step["torch.compile"]
bars(
    {name: 1000 * value for name, value in saved.items()},
    x_label=f"milliseconds saved per step (of {1000 * of_step['as it is']:.0f})",
    number="{:.1f}",
    alt="Milliseconds saved per step by each remedy, on one scale: larger patches save most; "
    "channels last, fused Adam and, where it is native, bfloat16 save less; the EMA at once and "
    "decoding once save next to nothing",
)

# %% [markdown]
# bfloat16 pays where the processor computes in it natively, as GPUs since Ampere and the newest
# CPUs do, and where the network is wide. So `train(..., autocast=True)` uses it only where
# `has_bfloat16` finds it. It has 8 significant bits, and in such numbers nothing lies between 0.996
# and 1, so only the network runs in it; the tables of the process, the loss and the average stay in
# float32. *Channels last* is the memory layout in which all channels of a pixel lie next to each
# other, which convolutions read fastest here.
#
# ## Several processes
#
# *Data-parallel* training runs the same program in every process. All of them draw the same batch,
# timesteps and noise; each takes its share, every N-th image, and `DistributedDataParallel`
# averages the gradients. So N processes take the very step that one would have taken. `train` does
# so when it is started by `torchrun`:
#
# ```
# torchrun --nproc-per-node=2 -m noisout_nb train
# ```
#
# A small program to try it with: twelve steps, and a checkpoint after every second one.

# %%
program = """
import sys, time
from pathlib import Path
import torch
from noisout_nb.data import ProceduralFlowers
from noisout_nb.forward_process import GaussianDiffusion
from noisout_nb.parallel import get_device
from noisout_nb.training import Batches, EMA, train
from noisout_nb.unet import UNet

folder, last, device = Path(sys.argv[1]), int(sys.argv[2]), get_device()
torch.manual_seed(0)
model = UNet(channels=16, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=())
model, process = model.to(device), GaussianDiffusion.from_config("cosine").to(device)
batches = Batches(ProceduralFlowers(32, 64), 16, device=device)
options = {"checkpoint": folder / "run.pth", "save_every": 2, "steps": 12, "learning_rate": 1e-3}
times = []
with train(model, process, batches, EMA(model), **options) as run:
    for step in run:
        times.append(time.perf_counter())
        if step.index == last:
            break
(folder / "seconds").write_text(str(min((b - a for a, b in zip(times, times[1:])), default=0)))
"""

# %%
lesson = profile.runs / "scaling"
shutil.rmtree(lesson, ignore_errors=True)
lesson.mkdir(parents=True)
_ = (lesson / "program.py").write_text(program)


def launch(folder, processes=1, last=12):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    settings = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += [lesson / "program.py", lesson / folder, str(last)]
    with open(lesson / f"{folder}.log", "a") as log:
        return subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log)


def result(folder):
    return load_safely(lesson / folder / "run.pth")


# %% [markdown]
# One run by one process; another that two processes begin, with half of the batch each, that is
# stopped after step 5, and that one process resumes from the checkpoint. The losses agree, but for
# the rounding of sums in another order:

# %%
assert launch("one").wait() == 0 == launch("both", processes=2, last=5).wait()
pace = {name: float((lesson / name / "seconds").read_text()) for name in ("one", "both")}
print("steps in the file of the stopped run:", len(result("both")["losses"]))
assert launch("both").wait() == 0
one, both = (torch.tensor(result(folder)["losses"]) for folder in ("one", "both"))
assert_close(one, both, rtol=1e-4, atol=0)
print(f"after the resume: {len(both)} losses, which differ by {(one / both - 1).abs().max():.3f}")

# %% tags=["measurement"]
bars(
    {"one process": 16 / pace["one"], "two processes": 16 / pace["both"]},
    x_label="images/s, one core per process",
    number="{:.0f}",
    alt="Images per second with one process and with two, which are faster, but less than twice as "
    "fast",
)

# %% [markdown]
# Two processes on two cores share the memory and wait for each other at every step, so they are
# less than twice as fast as one. Two GPUs have memories of their own.
#
# ## Kill it
#
# Runs that take days get interrupted. `kill -9` leaves a program no time to tidy up, so `train`
# writes a checkpoint under another name and then renames it, which the file system does at once or
# not at all. We kill a run twice, each time at a random moment within two steps of a checkpoint,
# and then let it run to its end. It must end as if nothing had happened, in every bit:

# %%
checkpoint, moment = lesson / "killed" / "run.pth", random.Random(0)
two_steps = 2 * pace["one"]


def written():
    return checkpoint.stat().st_mtime_ns if checkpoint.exists() else None


for _ in range(2):
    before = written()
    victim = launch("killed")
    while victim.poll() is None and written() == before:
        time.sleep(0.001)
    time.sleep(moment.random() * two_steps)
    victim.kill()
    victim.wait()
assert launch("killed").wait() == 0
straight, killed = result("one"), result("killed")
same = [torch.equal(straight["model"][name], killed["model"][name]) for name in straight["model"]]
print("losses equal:", straight["losses"] == killed["losses"])
print(f"tensors equal in every bit: {sum(same)} of {len(same)}")
assert straight["losses"] == killed["losses"] and all(same)

# %% [markdown]
# ## On paper: ImageNet
#
# What would Dhariwal & Nichol's network for ImageNet at 64 x 64 need? We build it on the device
# "meta", where tensors have shapes but no values, and count.

# %%
with torch.device("meta"):
    adm = UNet(
        image_size=64,
        channels=192,
        channel_mults=(1, 2, 3, 4),
        num_res_blocks=3,
        attention_resolutions=(32, 16, 8),
        head_channels=64,
        num_classes=1000,
        out_channels=6,
        resblock_updown=True,
    )
    one_image = torch.empty(1, 3, 64, 64), torch.zeros(1, dtype=torch.int64)
    per_image = operations(lambda: adm(*one_image))
parameters = sum(p.numel() for p in adm.parameters())
print(f"{parameters / 1e6:.0f} M parameters, {per_image:.0f} GFLOP forward for one image")

# %% [markdown]
# Weights, gradients, Adam's two averages and the EMA make five numbers per parameter. The paper
# trained for 540,000 steps of 2,048 images, each forward and backward. Let a GPU be rated at 300
# TFLOP/s, of which a training step reaches 40 %:

# %%
work = 540_000 * 2048 * 3 * per_image * 1e9
gpu_days = work / (0.4 * 3e14) / 86_400
print(f"{5 * 4 * parameters / 1e9:.1f} GB before the first image, {work:.1e} operations in all")
print(f"{gpu_days:.0f} days of such a GPU, {gpu_days / 64:.1f} with 64 of them")
days = {
    "the machine of this recording": work / (speed["training step"] * 1e9) / 86_400,
    "one such GPU": gpu_days,
    "64 of them": gpu_days / 64,
}

# %% tags=["measurement"]
bars(
    days,
    x_label="days of training",
    log_x=True,
    number="{:,.1f}",
    alt="Days of training on a log axis: very many on the machine that recorded this, dozens "
    "on one GPU, about one on 64 of them",
)

# %% [markdown]
# ## Your turn
#
# Replace `None` and run the cell; it says whether you are right.
#
# **1. Twice the side.** How many times the operations does a step take when both sides of the image
# are doubled, without attention?

# %% tags=["exercise"]
times_the_operations = None

check(
    "exercise 1",
    times_the_operations,
    4,
    tolerance=0.1,
    hint="A convolution does the same at each position: how many more positions are there?",
)

# %% [markdown]
# <details><summary>Solution</summary>
#
# `times_the_operations = 4`: a convolution does the same at each position, and there are four times
# as many. Attention compares each position with each, so its products would take 16 times the
# operations.
# </details>
#
# **2. Memory.** How many GB do weights, gradients, Adam's averages and EMA of a network of 1,000 M
# parameters take in float32?

# %% tags=["exercise"]
gigabytes = None

check("exercise 2", gigabytes, 20, tolerance=0.5, hint="Five numbers of four bytes per parameter.")

# %% [markdown]
# <details><summary>Solution</summary>
#
# `gigabytes = 5 * 4 * 1_000e6 / 1e9`: 20 GB, before any activations.
# </details>
#
# Next: [09_improved_ddpm](09_improved_ddpm.ipynb) takes the network apart that was counted here.
