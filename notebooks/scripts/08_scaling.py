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
# **What you'll do**: find out where the time of a training step goes, try the usual remedies one by one, train with several processes, and kill a training in the middle.
#
# **What you'll learn**: how many operations a step takes and how near the machine comes to its own limit; which tricks pay here and which do not; what data-parallel
# training is; what a network of the size of Dhariwal & Nichol's would need.
#
# **What you need**: notebooks 03 and 04. About a minute on two CPU cores. All times are those of the machine that ran this last: run it on yours.

# %%
import sys

if "google.colab" in sys.modules:  # there a notebook comes alone: fetch what it imports, once
    import subprocess

    subprocess.run("test -d noisOut || git clone -q --depth 1 https://github.com/noisOut/noisOut", shell=True, check=True)
    sys.path.insert(0, "noisOut")

# %%
import os
import random
import shutil
import statistics
import subprocess
import time

os.environ["KINETO_LOG_LEVEL"] = "99"  # keeps the profiler quiet; it reads this when torch is imported

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from torchvision.io import decode_jpeg, encode_jpeg

# %%
from noisout_nb.data import load_data, to_float
from noisout_nb.display import Picture, plot_lines, styled
from noisout_nb.forward_process import SCHEDULES, GaussianDiffusion
from noisout_nb.parallel import get_device, memory_format
from noisout_nb.profiles import REPOSITORY, get_profile
from noisout_nb.training import EMA, Batches, load_safely, simple_loss
from noisout_nb.unet import UNet

torch.manual_seed(0)
profile, device = get_profile(), get_device()

# %% [markdown]
# One training step, as notebook 04 made it, with everything that may be varied as an argument:

# %%
data = load_data(profile)
process = GaussianDiffusion(SCHEDULES[profile.schedule](profile.timesteps), profile.prediction).to(device)


class Step:
    def __init__(self, batch_size=profile.batch_size, layout=None, autocast=False, size=profile.image_size, **network):
        self.model = UNet(**profile.network | {"image_size": size} | network, num_classes=len(data.classes)).to(device)
        self.model.to(memory_format=layout or memory_format(device, autocast))
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=True)
        self.x_0, self.autocast = torch.randn(batch_size, 3, size, size, device=device).clamp(-1, 1), autocast
        self.t = torch.randint(process.timesteps, (batch_size,), device=device)
        self.y = torch.randint(len(data.classes), (batch_size,), device=device)

    def __call__(self):
        self.optimizer.zero_grad()
        simple_loss(self.model, process, self.x_0, self.t, torch.randn_like(self.x_0), self.y, self.autocast).backward()
        self.optimizer.step()


# %% [markdown]
# A machine is never equally fast twice: it has other things to do, and it warms up. So whatever we compare, we measure *in turns*, within one process, and
# take the median. A ratio measured like this holds when the seconds themselves do not. (The pictures of this notebook show what was measured at its last recording.)

# %%
def seconds(works, rounds=5):
    times = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}  # the first turn warms up


# %%
@styled
def bars(values, x_label, alt, **options):
    figure = Figure(figsize=(7.2, 0.5 + 0.32 * len(values)))
    axes = figure.add_subplot(xlabel=x_label, **options)
    axes.bar_label(axes.barh(list(values), list(values.values()), color="#0072B2", height=0.6), fmt=lambda value: f"{value:,.3g}" if value < 100 else f"{value:,.0f}", padding=4)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.1)
    return Picture.from_figure(figure, alt, colors=256)


# %% [markdown]
# ## How much work is it?
#
# A convolution takes two floating-point operations, a multiplication and an addition, for each weight at each place. PyTorch counts them for a whole network; $10^9$ of them are called a GFLOP,
# $10^{12}$ a TFLOP. First a case that we can count ourselves:

# %%
conv = torch.nn.Conv2d(16, 32, 3, padding=1)
with FlopCounterMode(display=False) as counter:
    conv(torch.zeros(1, 16, 32, 32))
assert counter.get_total_flops() == 2 * 3 * 3 * 16 * 32 * 32 * 32

# %% [markdown]
# Going back through the network costs twice as much as going forward: each convolution has a gradient for its input and one for its weights.
# (Only the very first one needs none for its input, so it is a little less than three times in all.)

# %%
step = Step()
with FlopCounterMode(display=False) as forward:
    step.model(step.x_0, step.t, step.y)
with FlopCounterMode(display=False) as both:
    step()
work = both.get_total_flops()
assert 2.8 < work / forward.get_total_flops() <= (3.02 if profile.attention_resolutions else 3)  # fused attention computes some of its way forward again
print(f"a step with {profile.batch_size} pictures: {work / 1e9:.0f} GFLOP")

# %% [markdown]
# ## How fast could it be?
#
# The machine's own limit is what it reaches in one large matrix product, or in one large convolution, forward and backward, with nothing else to do. Against it we hold
# two training steps: that of our network, and that of a wider one, which the profile `flowers32` has.

# %%
matrix = torch.randn(1024, 1024, device=device)
wide = torch.nn.Conv2d(128, 128, 3, padding=1).to(device, memory_format=torch.channels_last)
picture = torch.randn(16, 128, 32, 32, device=device).to(memory_format=torch.channels_last).requires_grad_()
narrow = torch.nn.Conv2d(profile.channels, profile.channels, 3, padding=1).to(device, memory_format=torch.channels_last)
small = torch.randn(profile.batch_size, profile.channels, 32, 32, device=device).to(memory_format=torch.channels_last).requires_grad_()

# %%
wide_network = {"patch_size": 2, "channels": 64, "channel_mults": (1, 2, 2), "num_res_blocks": 2, "attention_resolutions": (8, 4), "dropout": 0.0}
wider = Step(batch_size=32, size=32, **wide_network)

# %%
with FlopCounterMode(display=False) as both:
    wider()
wider_work = both.get_total_flops()

# %%
works = {
    "matrix product": lambda: matrix @ matrix,
    "wide convolution": lambda: wide(picture).sum().backward(),
    "convolution of our first level": lambda: narrow(small).sum().backward(),
    "training step": step,
    "training step of a wider network": wider,
}
operations = [2 * 1024**3, 3 * 2 * 9 * 128**2 * 16 * 32**2, 3 * 2 * 9 * profile.channels**2 * profile.batch_size * 32**2, work, wider_work]
taken = seconds(works)

# %% tags=["measurement"]
speed = {name: count / 1e9 / taken[name] for count, name in zip(operations, works)}
bars(speed, "GFLOP a second", "Speed in GFLOP a second: the matrix product and the wide convolution reach most, the narrow convolution and the training steps a part of it, the wider network more")

# %% [markdown]
# Our quick network is *narrow*: 16 channels on the first level. For every number that it reads or writes, such a convolution multiplies only 72 times ($9 \cdot 16 \cdot 16$ for 32 numbers), one of 128 channels 576 times. So memory holds it back, and it stays far below the machine's
# limit. A wider network comes nearer. Between convolutions the step spends its time on normalisation, activation, and copying:

# %%
with torch.autograd.profiler.profile(use_kineto=False) as profiler:
    for _ in range(5):
        step()

# %%
events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
total = sum(event.self_cpu_time_total for event in events)

# %% tags=["measurement"]
shares = {event.key.removeprefix("aten::").replace("_", " "): 100 * event.self_cpu_time_total / total for event in events[:8]}
bars(shares, "% of a step's time", "The eight operations that take most of a training step's time: the backward and forward convolutions lead")

# %% [markdown]
# ## The remedies, one by one
#
# Each is measured against the same thing without it. `torch.compile` joins small operations into larger ones; it needs a minute to compile first, which pays on a GPU, so it is tried there only.

# %%
step_in = {"as it is": step, "channels_first": Step(layout=torch.contiguous_format), "bfloat16": Step(autocast=True), "folded": Step(patch_size=2 * profile.patch_size)}
step_in |= {"wider": wider, "wider, bfloat16": Step(batch_size=32, size=32, autocast=True, **wide_network)}
if device.type == "cuda":
    step_in["torch.compile"] = Step()
    step_in["torch.compile"].model.compile()
of_step = seconds(step_in, rounds=4)

# %% [markdown]
# The average of the weights and the optimiser touch every weight, one tensor after the other, or all in one call:

# %%
ema, decay = EMA(step.model), 0.999
loop_adam = torch.optim.Adam(step.model.parameters(), foreach=False)


def ema_loop():
    with torch.no_grad():
        for shadow, parameter in zip(ema.shadow, ema.parameters):
            shadow.mul_(decay).add_(parameter, alpha=1 - decay)


# %%
of_weights = seconds({"EMA in a loop": ema_loop, "EMA at once": ema.update, "Adam in a loop": loop_adam.step, "Adam fused": step.optimizer.step})

# %% [markdown]
# Attention by hand writes down all weights between all positions; the fused one never does. They agree:

# %%
q, k, v = torch.randn(3, profile.batch_size, 4, 256, 32, device=device)


def attention_by_hand():
    return (q @ k.transpose(-1, -2) / 32**0.5).softmax(-1) @ v


assert_close(attention_by_hand(), F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-4)
of_attention = seconds({"by hand": attention_by_hand, "fused": lambda: F.scaled_dot_product_attention(q, k, v)})

# %% [markdown]
# And the data: a JPEG that is decoded again in every epoch, against pictures that lie in memory as bytes.

# %%
files = [encode_jpeg(image) for image in data.images[: profile.batch_size].cpu()]
batches = Batches(data, profile.batch_size, device=device)
of_data = seconds({"decoded": lambda: to_float(torch.stack([decode_jpeg(file) for file in files])).to(device), "in memory": lambda: next(batches)})

# %%
gains = {
    "channels last": of_step["channels_first"] / of_step["as it is"],
    "bfloat16": of_step["as it is"] / of_step["bfloat16"],
    "bfloat16, wider network": of_step["wider"] / of_step["wider, bfloat16"],
    "pixels folded 2 x 2": of_step["as it is"] / of_step["folded"],
    "fused attention": of_attention["by hand"] / of_attention["fused"],
    "EMA at once": of_weights["EMA in a loop"] / of_weights["EMA at once"],
    "fused Adam": of_weights["Adam in a loop"] / of_weights["Adam fused"],
    "pictures decoded once": of_data["decoded"] / of_data["in memory"],
}
if "torch.compile" in of_step:
    gains["torch.compile"] = of_step["as it is"] / of_step["torch.compile"]

# %% tags=["measurement", "cover"]
bars(gains, "times as fast", "How many times as fast each remedy makes the step or its part of the work: folded pixels help the whole step most")

# %% [markdown]
# The first four count for the whole step, the others only for their part of it. What comes out depends on the machine and on the network. bfloat16 pays where the processor
# calculates with it, as GPUs and the newest CPUs do, and where the network is wide enough to have much to calculate; elsewhere it is imitated, which is slow. So `train(..., autocast=True)` takes it only
# where `has_bfloat16` finds it, and `quick` not at all. (`memory_format` chooses the order of the channels in memory that goes with it.) Folding 2 x 2 pixels into channels gives the network a quarter of the places to
# look at: the largest gain for a step, at the price of the finest detail; `flowers32` does it.
#
# What does bfloat16 change in the answer? It has 8 significant bits, so each number is off by up to 0.4 %. The loss of the same batch hardly notices. And a CPU, which always adds up in the same order, gives the same bits again:

# %%
torch.manual_seed(0)
noise = torch.randn_like(wider.x_0)
losses = [simple_loss(wider.model, process, wider.x_0, wider.t, noise, wider.y, autocast).item() for autocast in (False, True, True)]
assert abs(losses[1] / losses[0] - 1) < 0.01
assert losses[1] == losses[2] or device.type == "cuda"

# %% [markdown]
# ## How does the cost grow?
#
# With the batch, the width and the side of the picture, the number of operations is known. Does the time follow it?

# %%
variations = {
    "batch": {size: Step(batch_size=size) for size in (4, 8, 16, 32)},
    "channels": {channels: Step(channels=channels, attention_resolutions=()) for channels in (16, 32, 64)},
    "side": {size: Step(size=size, attention_resolutions=()) for size in (16, 32, 64)},
}


# %%
def cost(works):
    counts = []
    for work in works.values():
        with FlopCounterMode(display=False) as counter:
            work()
        counts.append(counter.get_total_flops() / 1e9)
    return counts, list(seconds(works, rounds=2).values())


costs = {name: cost(works) for name, works in variations.items()}

# %% [markdown]
# Twice the batch is twice the work, exactly; twice the side is four times, and twice the width nearly so:

# %%
counts = {name: counted for name, (counted, _) in costs.items()}
assert abs(counts["batch"][1] / counts["batch"][0] - 2) < 1e-3
assert 3.9 < counts["side"][1] / counts["side"][0] < 4.1
assert 3.5 < counts["channels"][1] / counts["channels"][0] < 4

# %% tags=["measurement"]
plot_lines(costs, x_label="GFLOP a step", y_label="seconds a step", log_x=True, log_y=True, markers=True,
           alt="Seconds of a step against its GFLOP, both on log axes, for growing batch, width and side: three lines close together, a little less steep than the operations")

# %% [markdown]
# So what a step costs is, nearly, its number of operations, whichever way they grow. Only the smallest steps are dearer: to call an operation takes its time, too, however small the tensors are.
#
# ## Several processes
#
# More than one GPU, or more cores than one process can use? *Data-parallel* training runs the same program in every process. All of them draw the same batch, the same
# times and the same noise; each takes its share, every N-th picture, and PyTorch's `DistributedDataParallel` averages the gradients. As the mean of the shares' means is the mean of the whole
# batch, N processes take the very step that one would have taken. Our `train` does so whenever it is started by `torchrun`:
#
# ```
# torchrun --nproc-per-node=2 notebooks/scripts/04_training.py
# ```
#
# Here is a small program to try it with. It trains for twelve steps, and writes a checkpoint after every second one.

# %%
lesson = profile.runs / "scaling"
shutil.rmtree(lesson, ignore_errors=True)
lesson.mkdir(parents=True)
program = """
import sys, time
from pathlib import Path
import torch
from noisout_nb.data import ProceduralFlowers
from noisout_nb.forward_process import GaussianDiffusion, cosine_beta_schedule
from noisout_nb.parallel import get_device
from noisout_nb.training import EMA, Batches, train
from noisout_nb.unet import UNet

folder, steps, device = Path(sys.argv[1]), int(sys.argv[2]), get_device()
torch.manual_seed(0)
model = UNet(channels=16, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=()).to(device)
process, batches = GaussianDiffusion(cosine_beta_schedule(), "v").to(device), Batches(ProceduralFlowers(32, 64), 16, device=device)
times = []
for step in train(model, process, batches, EMA(model), steps=12, learning_rate=1e-3, checkpoint=folder / "run.pth", save_every=2):
    times.append(time.perf_counter())
    if step.index == steps:
        break
(folder / "seconds").write_text(str(min((b - a for a, b in zip(times, times[1:])), default=0)))
"""
written = (lesson / "program.py").write_text(program)


# %%
def launch(folder, processes=1, steps=12):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    settings = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([*command, lesson / "program.py", lesson / folder, str(steps)], env=os.environ | settings)


def result(folder):
    return load_safely(lesson / folder / "run.pth")


# %% [markdown]
# One process, and two with half of the batch each. The losses are the same, but for the rounding of sums that are added up in another order:

# %%
assert launch("one").wait() == 0 == launch("two", processes=2).wait()
assert_close(result("one")["losses"], result("two")["losses"], rtol=1e-5, atol=0)

# %% tags=["measurement"]
rates = {name: 16 / float((lesson / folder / "seconds").read_text()) for name, folder in {"one process": "one", "two processes": "two"}.items()}
bars(rates, "pictures a second, one core for each process", "Pictures a second with one process and with two, which are faster, but less than twice as fast")

# %% [markdown]
# Two processes on two cores share the memory and its speed, and they wait for each other to average the gradients; so two are less than twice as fast as one. Two GPUs have memories of their own.
#
# Two processes may also go on where one has stopped, or the other way round. The checkpoint knows nothing of their number:

# %%
assert launch("both", processes=2, steps=5).wait() == 0
assert len(result("both")["losses"]) == 5
assert launch("both").wait() == 0
assert_close(result("one")["losses"], result("both")["losses"], rtol=1e-5, atol=0)

# %% [markdown]
# `sample`, `extract_features` and `bits_per_dim` share out their work in the same way: each process takes its part of the pictures, and in the end all have the whole answer.
#
# ## Kill it
#
# A training of days will be killed: by the power, by the system, by somebody else. `kill -9` leaves a program no time to tidy up. So `train` writes a checkpoint under another name and then
# renames it, which the file system does at once or not at all; and what is continued must end as if nothing had happened, in every bit. We kill it twice, each time at a random moment
# within two steps of a checkpoint, and then let it run to its end:

# %%
checkpoint, dice = lesson / "killed" / "run.pth", random.Random(0)
two_steps = 2 * float((lesson / "one" / "seconds").read_text())
for attempt in range(2):
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
    victim = launch("killed")
    while victim.poll() is None and (checkpoint.stat().st_mtime_ns if checkpoint.exists() else None) == before:
        time.sleep(0.001)
    time.sleep(dice.random() * two_steps)
    victim.kill()
    victim.wait()
assert launch("killed").wait() == 0

# %%
straight, killed = result("one"), result("killed")
assert straight["losses"] == killed["losses"]
assert all(torch.equal(straight["model"][name], killed["model"][name]) for name in straight["model"])

# %% [markdown]
# ## On paper: ImageNet
#
# What would Dhariwal & Nichol's network for ImageNet at 64 x 64 need? We build it on the device "meta", where tensors have shapes but no numbers, and count.

# %%
with torch.device("meta"):
    adm = UNet(image_size=64, channels=192, channel_mults=(1, 2, 3, 4), num_res_blocks=3, attention_resolutions=(32, 16, 8), head_channels=64,
               num_classes=1000, out_channels=6, scale_shift_norm=True, resblock_updown=True)
    with FlopCounterMode(display=False) as counter:
        adm(torch.empty(1, 3, 64, 64), torch.zeros(1, dtype=torch.int64))
forward_work = counter.get_total_flops()
weights = sum(p.numel() for p in adm.parameters())
print(f"{weights / 1e6:.0f} million weights, {forward_work / 1e9:.0f} GFLOP for one picture")

# %% [markdown]
# Weights, their gradients, Adam's two averages and the EMA make five numbers for each weight. The paper trained for 540 thousand steps of 2048 pictures (its appendix has the settings), and each picture goes forward and backward:

# %%
gigabytes = 5 * 4 * weights / 1e9
training = 540_000 * 2048 * 3 * forward_work
print(f"{gigabytes:.1f} GB before the first picture; {training:.1e} operations in all")

# %% [markdown]
# How long that takes is this number divided by what a machine reaches. Let a GPU be rated at 300 TFLOP a second, and let a training step reach 40 % of it (you have
# seen above what share of its limit our step reaches); and for comparison, the machine of this recording at the speed of the step above:

# %%
gpu_days = training / (0.4 * 3e14) / 86_400
print(f"{gpu_days:.0f} days of such a GPU, {gpu_days / 64:.1f} with 64 of them")

# %% tags=["measurement"]
days = {"the machine of this recording": training / (speed["training step"] * 1e9) / 86_400, "one such GPU": gpu_days, "64 of them": gpu_days / 64}
bars(days, "days of training", "Days of training on a log axis: very many on the machine that recorded this, dozens on one GPU, about one on 64 of them", xscale="log")

# %% [markdown]
# ## Your turn
#
# 1. Why must the processes draw the same random numbers, but different ones for dropout would do no harm?
# 2. Measure your own remedy: does a batch of 64 train more pictures a second than one of 16?

# %% tags=["exercise"]
my_gain = None  # your answer to 2

# %% [markdown]
# ## Solutions
#
# 1. If the orders differed, two processes could train on the same picture, and others would be missed. If times or noise differed, the training would still be right, but no longer the very step of a single
#    process. Dropout is drawn anew for each picture anyway.

# %% tags=["solution"]
of_batch = seconds({16: Step(batch_size=16), 64: Step(batch_size=64)}, rounds=2)
my_gain = 4 * of_batch[16] / of_batch[64]
assert 0.2 < my_gain < 20

# %% [markdown]
# Back to [the whole path on one page](test.ipynb).
