"""The drawing of the UNet shows the network that runs."""

import pytest
import torch

from noisout_nb.diagram import draw_unet, unet_layers
from noisout_nb.profiles import PROFILES
from noisout_nb.unet import AttentionBlock, Block, Downsample, ResBlock, UNet, Upsample

KINDS = {AttentionBlock: "attention", Downsample: "down", Upsample: "up"}


def executed(model: UNet) -> list[tuple[str, int, int]]:
    """Kind, channels and side of what each layer puts out, in the order in which they run."""
    seen, layers = (
        [],
        [*model.down, model.middle1, model.middle_attention, model.middle2, *model.up],
    )

    def note(module, inputs, output):
        resample = getattr(module, "resample", None)
        kind = {"AvgPool2d": "down", "Upsample": "up"}.get(type(resample).__name__)
        kind = kind or KINDS.get(type(module)) or "residual block"
        kind = "convolution" if module in (model.conv_in, model.conv_out) else kind
        seen.append((kind, output.shape[1], output.shape[2]))

    for layer in (model.conv_in, *layers, model.conv_out):
        layer.register_forward_hook(note)
    side = model.config["image_size"]
    model(torch.zeros(1, 3, side, side), torch.zeros(1, dtype=torch.int64))
    return seen


@pytest.mark.parametrize(
    "network",
    [
        PROFILES["quick"].network,
        PROFILES["flowers64"].network | {"channels": 32, "head_channels": 16},
        PROFILES["quick"].network | {"resblock_updown": True, "num_classes": 3},
    ],
)
def test_boxes_are_the_layers_that_run(network):
    model = UNet(**network)
    layers = unet_layers(model)
    drawn = [(layer.kind, layer.channels, model.sides[layer.level]) for layer in layers]
    assert drawn == executed(model)
    assert sum(layer.pushes for layer in layers) == sum(layer.pops for layer in layers)
    blocks = [module for module in model.modules() if isinstance(module, ResBlock)]
    assert sum(layer.embedded for layer in layers) == len(blocks)
    with_attention = [
        m for m in model.modules() if isinstance(m, Block) and [*m.attention.parameters()]
    ]
    assert sum(layer.attention for layer in layers) == len(with_attention)


def test_drawing_names_what_is_predicted():
    model = UNet(**PROFILES["quick"].network)
    assert "predicted v" in draw_unet(model, "predicted $v$").alt
    assert draw_unet(model).png() == draw_unet(model).png()
