"""The smallest training run that the tests share: 16 x 16 flowers, a network of one level."""

import torch

from noisout_nb.data import ProceduralFlowers
from noisout_nb.forward_process import GaussianDiffusion
from noisout_nb.training import EMA, Batches, train
from noisout_nb.unet import UNet

DATA = ProceduralFlowers(16, 16)
PROCESS = GaussianDiffusion.from_config()
SIZES = {
    "image_size": 16,
    "patch_size": 4,
    "channels": 16,
    "channel_mults": (1,),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "head_channels": 16,
    "dropout": 0.1,
    "num_classes": 6,
}


def network(**options):
    torch.manual_seed(0)
    return UNet(**SIZES | options)


def start(model=None, *, ema=None, data=DATA, process=PROCESS, batches=None, **options):
    """A run of six steps, unless the options say otherwise."""
    model = network() if model is None else model
    batches = {"batch_size": 4} | (batches or {})
    options = {"steps": 6, "learning_rate": 1e-3, "save_every": 2} | options
    return train(model, process, Batches(data, **batches), ema or EMA(model), **options)


def losses_of(model=None, stop=None, **options):
    """The losses of a run that is left after step `stop`."""
    losses = []
    with start(model, losses=losses, **options) as run:
        for step in run:
            if step.index == stop:
                break
    return losses


def same(a, b):
    """Are two nested states equal in every bit?"""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
