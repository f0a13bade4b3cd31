"""Images from trained weights in one call: `sample_image`."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from .checkpoints import load_model
from .data import species_labels
from .forward_process import check_integer
from .guidance import ClassifierFreeGuidance
from .parallel import get_device
from .profiles import PROFILES
from .sampling import sample

_DEFAULTS = PROFILES["flowers64"]


def sample_image(
    species: str | Sequence[str] | None,
    count: int = 1,
    *,
    guidance_scale: float = _DEFAULTS.guidance_scale,
    guidance_interval: tuple[float, float] | None = _DEFAULTS.guidance_interval,
    rescale: float = 0.0,
    weights: str | Path | None = _DEFAULTS.pretrained,
    **options,
) -> Tensor:
    """`count` images of each species, in order: float32 (N, C, H, W) in [-1, 1] on the CPU.

    `weights` is a file that `save_model` wrote, by default the published one of 64 x 64 pixels; it
    sets the images' channels and size. `species` None samples without labels, which every network
    can. Guidance is that of `ClassifierFreeGuidance`; `options` are those of `sample`: shape,
    sampler, steps, spacing, seed and batch_size, by default the profile flowers64's. Raises
    ValueError for an unknown species, and what `load_model` and `sample` raise.

    >>> sample_image(["sunflower", "rose"], 2, steps=2).shape
    torch.Size([4, 3, 64, 64])
    """
    count = check_integer("count", count, 1)
    if weights is None:
        raise ValueError("weights is None: give the file that a training run wrote")
    model, process, classes = load_model(weights, get_device())
    size = model.config["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    defaults = {
        "shape": (model.in_channels, height, width),
        "sampler": _DEFAULTS.sampler,
        "steps": _DEFAULTS.sample_steps,
        "spacing": _DEFAULTS.spacing,
    }
    options = defaults | options
    if species is None:
        return sample(model, process, count=count, **options).cpu()
    if not classes:
        raise ValueError(
            f"the network in {weights} has no classes: sample_image(None, count) samples from it"
        )
    guided = ClassifierFreeGuidance(
        model, guidance_scale, process=process, interval=guidance_interval, rescale=rescale
    )
    y = species_labels(species, classes).repeat_interleave(count)
    return sample(guided, process, y, **options).cpu()
