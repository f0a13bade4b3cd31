"""Start a training from the weights of a network for pictures of half the size: it goes inside, the new level around it.

    NOISOUT_PROFILE=flowers64-folded python .ci/grow.py models/Flowers102_model.pth
    NOISOUT_PROFILE=flowers64-folded python notebooks/scripts/04_training.py

The large network has one level more at the top; all others are as wide as the small one's. What fits is taken over, what does not (the new
level, and the layers that meet it) starts as usual. The result is the checkpoint of step 1 of a training whose first step changed nothing.
Given weights of the profile's own network, it starts a new training from all of them.
"""

import argparse
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from noisout_nb.data import load_data
from noisout_nb.forward_process import SCHEDULES, GaussianDiffusion
from noisout_nb.profiles import get_profile
from noisout_nb.training import EMA, Batches, load_model, train
from noisout_nb.unet import UNet


def grow(small: UNet, large: UNet) -> list[str]:
    """Copy into `large` what fits of `small`, and name what does not. Raises ValueError unless `large` has the same levels, or one more on top."""
    if small.widths not in (large.widths, large.widths[1:]):
        raise ValueError(f"levels of {small.widths} and {large.widths} channels: the second must be the first, with one more before them or as they are")
    deeper = len(large.down) - len(small.down)  # the way up begins at the bottom, so its blocks keep their numbers
    weights = {re.sub(r"^down\.(\d+)", lambda number: f"down.{int(number[1]) + deeper}", name): value for name, value in small.state_dict().items()}
    places = large.state_dict()
    fitting = {name: value for name, value in weights.items() if name in places and places[name].shape == value.shape}
    return large.load_state_dict(fitting, strict=False).missing_keys


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("weights", type=Path, help="a file of weights, with its .json beside it")
    arguments.add_argument("--seed", type=int, default=0, help="of noise and t: where weights are trained a second time, another than the first time")
    options, profile = arguments.parse_args(), get_profile()
    checkpoint = profile.runs / "checkpoint.pth"
    if checkpoint.exists():
        sys.exit(f"{checkpoint} is there already: a training would go on from it. Delete it to start anew.")
    data = load_data(profile)
    torch.manual_seed(0)
    model = UNet(**profile.network, num_classes=len(data.classes))
    fresh = grow(load_model(options.weights)[0], model)
    print(f"{len(fresh)} of {len(model.state_dict())} tensors start anew")
    process = GaussianDiffusion(SCHEDULES[profile.schedule](profile.timesteps), profile.prediction, variance=profile.variance)
    batches, ema = Batches(data, profile.batch_size), EMA(model, profile.ema_decay)
    for step in train(model, process, batches, ema, steps=1, learning_rate=0.0, checkpoint=checkpoint, seed=options.seed):
        print(f"loss before the training: {step.loss:.3f}")


if __name__ == "__main__":
    main()
