"""The network: each block against a formula written anew, and what it refuses."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from noisout_nb.forward_process import GaussianDiffusion
from noisout_nb.unet import (
    AttentionBlock,
    Block,
    Downsample,
    Encoder,
    ResBlock,
    SinusoidalPositionEmbeddings,
    UNet,
    Upsample,
    check_labels,
    evaluating,
    group_norm,
    zero_init,
)

TINY = {
    "image_size": 8,
    "channels": 8,
    "channel_mults": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (),
    "head_channels": 8,
}


def randomised(module, std=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = std * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def tiny(**options):
    return randomised(UNet(**TINY | options))


# Parts


def test_embedding_by_hand():
    found = SinusoidalPositionEmbeddings(6, max_period=100)(torch.tensor([0, 3]))
    angles = [3.0, 0.3, 0.03]
    assert found[0].tolist() == [0, 0, 0, 1, 1, 1]
    wanted = [*map(math.sin, angles), *map(math.cos, angles)]
    assert found[1].tolist() == pytest.approx(wanted, abs=1e-6)
    default = SinusoidalPositionEmbeddings(4)(torch.tensor([1.5]))
    assert default[0].tolist() == pytest.approx(
        [math.sin(1.5), math.sin(1.5e-4), math.cos(1.5), math.cos(1.5e-4)], abs=1e-6
    )


@pytest.mark.parametrize("dim", [0, 2, 5])
def test_embedding_needs_an_even_dim_of_at_least_4(dim):
    with pytest.raises(ValueError, match=f"dim is {dim}: it must be even and at least 4"):
        SinusoidalPositionEmbeddings(dim)


def test_group_norm_has_the_groups_of_its_docstring():
    groups = {1: 1, 2: 1, 4: 1, 8: 2, 12: 1, 20: 1, 32: 8, 64: 16, 96: 8, 128: 32, 192: 16, 512: 32}
    for channels, wanted in groups.items():
        assert group_norm(channels).num_groups == wanted, channels
        assert wanted == 1 or channels // wanted >= 4


def test_zero_init():
    layer = zero_init(nn.Linear(2, 2))
    assert not layer.weight.any() and not layer.bias.any()


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("resample", [None, "down", "up"])
@pytest.mark.parametrize("width", [8, 12])
def test_res_block(width, resample, scale_shift, rescale):
    block = randomised(
        ResBlock(
            8,
            width,
            16,
            scale_shift_norm=scale_shift,
            resample=resample,
            rescale_residual=rescale,
        )
    )
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 16)
    change = {
        None: lambda x: x,
        "down": lambda x: F.avg_pool2d(x, 2),
        "up": lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3),
    }[resample]
    h = block.conv1(change(F.silu(block.norm1(x))))
    embedded = block.emb_proj(F.silu(emb))[..., None, None]
    if scale_shift:
        h = block.norm2(h) * (1 + embedded[:, :width]) + embedded[:, width:]
    else:
        h = block.norm2(h + embedded)
    shortcut = change(x)
    if width != 8:
        shortcut = F.conv2d(shortcut, block.skip.weight, block.skip.bias)
    wanted = shortcut + block.conv2(F.silu(h))
    assert_close(block(x, emb), wanted / math.sqrt(2) if rescale else wanted)
    assert block.conv1.kernel_size == block.conv2.kernel_size == (3, 3)


def test_res_block_starts_as_its_shortcut_and_drops_out():
    block = ResBlock(8, 8, 16, 0.5)
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 16)
    assert torch.equal(block(x, emb), x)
    assert block.scale_shift_norm and not block.rescale_residual
    assert block.dropout.p == 0.5
    assert ResBlock(8, 8, 16).dropout.p == 0
    randomised(block).train()
    assert not torch.equal(block(x, emb), block(x, emb))


@pytest.mark.parametrize("rescale", [False, True])
def test_attention(rescale):
    block = AttentionBlock(8, head_channels=4, rescale_residual=rescale)
    x = torch.randn(2, 8, 2, 3)
    assert_close(block(x), x / math.sqrt(2) if rescale else x)
    randomised(block)
    q, k, v = block.qkv(block.norm(x)).flatten(2).view(2, 3, 2, 4, 6).unbind(1)
    weights = (q.transpose(2, 3) @ k / math.sqrt(4)).softmax(-1)
    mixture = (v @ weights.transpose(2, 3)).reshape(2, 8, 2, 3)
    wanted = x + block.proj(mixture)
    assert_close(block(x), wanted / math.sqrt(2) if rescale else wanted)
    with pytest.raises(ValueError, match="8 channels do not split into heads of 3"):
        AttentionBlock(8, head_channels=3)
    assert AttentionBlock(64).heads == 2


def test_changes_of_resolution():
    x = torch.randn(1, 4, 6, 8)
    down, up = randomised(Downsample(4)), randomised(Upsample(4))
    assert_close(down(x), F.conv2d(x, down.weight, down.bias, padding=1)[..., ::2, ::2])
    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert_close(up(x, "ignored"), F.conv2d(doubled, up.weight, up.bias, padding=1))


# The whole


@pytest.mark.parametrize("updown", [False, True])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_unet_is_its_blocks_in_order(patch_size, updown):
    """A UNet of two levels, its blocks called by hand."""
    model = tiny(patch_size=patch_size, num_classes=3, resblock_updown=updown, dropout=0.3)
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), torch.tensor([2, 0])
    emb = model.time_mlp(t) + model.label_emb(y)
    a = model.conv_in(F.pixel_unshuffle(x, patch_size))
    b = model.down[0](a, emb)
    c = model.down[1](b, emb)
    d = model.down[2](c, emb)
    h = model.middle2(model.middle_attention(model.middle1(d, emb)), emb)
    encoded, skips, embedding = model.encode(x, t, y)
    assert_close(encoded, h)
    assert_close(embedding, emb)
    for skip, wanted in zip(skips, (a, b, c, d), strict=True):
        assert_close(skip, wanted)
    h = model.up[0](torch.cat([h, d], 1), emb)
    h = model.up[1](torch.cat([h, c], 1), emb)
    h = model.up[2](h, emb)
    h = model.up[3](torch.cat([h, b], 1), emb)
    h = model.up[4](torch.cat([h, a], 1), emb)
    h = F.pixel_shuffle(model.conv_out(F.silu(model.norm_out(h))), patch_size)
    assert_close(model(x, t, y), h)
    kinds = (ResBlock, ResBlock) if updown else (Downsample, Upsample)
    assert isinstance(model.down[1], kinds[0]) and isinstance(model.up[2], kinds[1])
    assert len(model.down) == 3 and len(model.up) == 5


def test_widths_levels_and_attention():
    model = UNet(
        image_size=32,
        channels=16,
        channel_mults=(0.5, 1, 2),
        num_res_blocks=2,
        attention_resolutions=(8, 4),
        head_channels=16,
        patch_size=2,
    )
    assert (model.widths, model.sides, model.size_multiple) == ([8, 16, 32], [16, 8, 4], 8)
    assert model.skip_widths == [8, 8, 8, 8, 16, 16, 16, 32, 32]
    blocks = [m for m in [*model.down, *model.up] if isinstance(m, Block)]
    found = [isinstance(block.attention, AttentionBlock) for block in blocks]
    assert found == [False, False, True, True, True, True] + 3 * [True] + 3 * [True] + 3 * [False]
    assert blocks[2].attention.heads == 1
    assert blocks[4].attention.heads == model.middle_attention.heads == 2
    assert model.time_mlp[1].out_features == model.time_mlp[3].out_features == 64
    assert not hasattr(model, "label_emb")
    assert model(torch.zeros(1, 3, 16, 24), torch.tensor([0])).shape == (1, 3, 16, 24)


def test_options_reach_every_block():
    options = {"dropout": 0.25, "scale_shift_norm": False, "rescale_residual": True}
    model = UNet(**TINY | options | {"attention_resolutions": (8,), "resblock_updown": True})
    blocks = [m for m in model.modules() if isinstance(m, ResBlock)]
    assert len(blocks) == 10
    for block in blocks:
        assert (block.dropout.p, block.scale_shift_norm, block.rescale_residual) == (
            0.25,
            False,
            True,
        )
        assert block.emb_proj.in_features == 32
    attention = [m for m in model.modules() if isinstance(m, AttentionBlock)]
    assert len(attention) == 4 and all(block.rescale_residual for block in attention)
    assert {m.resample.__class__.__name__ for m in blocks} == {"Identity", "AvgPool2d", "Upsample"}


def test_an_untrained_network_predicts_zero_and_learns_with_every_parameter():
    model = UNet(**TINY, num_classes=2)
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([0, 10, 999])
    assert not model(x, t).any()
    randomised(model)(x, t, torch.tensor([0, 1, 2])).square().mean().backward()
    assert [name for name, p in model.named_parameters() if not p.grad.any()] == []


def test_no_label_is_a_label_of_its_own():
    model = tiny(num_classes=3)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0, 10])
    assert model.null_label == model.num_classes == 3
    assert torch.equal(model(x, t), model(x, t, torch.tensor([3, 3])))
    assert not torch.allclose(model(x, t), model(x, t, torch.tensor([2, 2])))
    assert model.label_emb.num_embeddings == 4
    assert torch.equal(model(x, t.float()), model(x, t))


def test_shapes_channels_and_dtypes():
    t = torch.tensor([5])
    assert tiny()(torch.randn(1, 3, 4, 12), t).shape == (1, 3, 4, 12)
    assert tiny(in_channels=1)(torch.randn(1, 1, 8, 8), t).shape == (1, 1, 8, 8)
    assert tiny(out_channels=6)(torch.randn(1, 3, 8, 8), t).shape == (1, 6, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny()(torch.randn(1, 3, 8, 8), t).dtype == torch.float32
    wide = UNet(**TINY | {"image_size": [16, 8], "attention_resolutions": (16,)})
    assert wide.sides == [16, 8]
    assert wide(torch.randn(1, 3, 16, 8), t).shape == (1, 3, 16, 8)


# Configuration


def test_config_builds_the_same_network_by_way_of_json():
    model = tiny(
        num_classes=np.int64(3), channel_mults=[1, 1.5], attention_resolutions=[4], head_channels=4
    )
    config = json.loads(json.dumps(model.config))
    again = UNet(**config)
    assert again.config == model.config
    again.load_state_dict(model.state_dict())
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([7])
    assert torch.equal(again.eval()(x, t), model(x, t))
    assert model.config["num_classes"] == 3 and type(model.config["num_classes"]) is int
    assert model.config["channel_mults"] == (1, 1.5)
    assert model.config["out_channels"] == 3
    assert model.config["scale_shift_norm"] is True


def test_defaults():
    assert UNet(attention_resolutions=()).config == {
        "image_size": 32,
        "in_channels": 3,
        "channels": 64,
        "channel_mults": (1, 2, 2),
        "num_res_blocks": 2,
        "attention_resolutions": (),
        "head_channels": 32,
        "dropout": 0.0,
        "num_classes": None,
        "patch_size": 1,
        "scale_shift_norm": True,
        "resblock_updown": False,
        "rescale_residual": False,
        "out_channels": 3,
    }


def test_arguments_are_named():
    with pytest.raises(TypeError):
        UNet(32)
    with pytest.raises(TypeError):
        Encoder(32)


@pytest.mark.parametrize(
    "name",
    ["in_channels", "channels", "num_res_blocks", "head_channels", "patch_size"]
    + ["num_classes", "out_channels"],
)
@pytest.mark.parametrize("value", [0, 1.5, True])
def test_counts_are_positive_integers(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}: it must be an integer of at least 1"):
        UNet(**TINY | {name: value})


def test_sizes_and_attention_resolutions_that_do_not_fit():
    for size in (7, 0, (8, 7), (7, 8), (0, 8)):
        with pytest.raises(
            ValueError, match="images of .*halves the sides 1 times.*multiples of 2"
        ):
            UNet(**TINY | {"image_size": size})
    with pytest.raises(ValueError, match=r"attention_resolutions is \(16,\).*heights \[8, 4\]"):
        UNet(**TINY | {"attention_resolutions": (16,)})
    with pytest.raises(ValueError, match="patches of 4 pixels .* multiples of 8"):
        UNet(**TINY | {"image_size": 12, "patch_size": 4})


# Input


BAD_INPUT = {
    r"x is torch.float32 of shape \(2, 1, 8, 8\)": {"x": torch.zeros(2, 1, 8, 8)},
    r"x is torch.float32 of shape \(3, 8, 8\)": {"x": torch.zeros(3, 8, 8)},
    r"x is torch.uint8": {"x": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)},
    r"images of 8 x 7": {"x": torch.zeros(2, 3, 8, 7)},
    r"images of 7 x 8": {"x": torch.zeros(2, 3, 7, 8)},
    r"images of 0 x 8": {"x": torch.zeros(2, 3, 0, 8)},
    r"images of 8 x 0": {"x": torch.zeros(2, 3, 8, 0)},
    r"t has the shape \(1,\): it must be \(2,\)": {"t": torch.tensor([1])},
    r"y is torch.float32 .*int64": {"y": torch.zeros(2)},
    r"y is torch.int64 of shape \(2, 3\).*argmax": {"y": torch.zeros(2, 3, dtype=torch.int64)},
    r"y is torch.int64 of shape \(2, 1\).*flatten": {"y": torch.zeros(2, 1, dtype=torch.int64)},
    r"labels run from 0 to 4, outside 0\.\.2 \(3 stands for 'no label'\)": {
        "y": torch.tensor([0, 4])
    },
    r"labels run from -1 to 0, outside": {"y": torch.tensor([-1, 0])},
}


@pytest.mark.parametrize("message", BAD_INPUT)
def test_bad_input_is_refused(message):
    inputs = {"x": torch.zeros(2, 3, 8, 8), "t": torch.tensor([1, 2]), "y": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        tiny(num_classes=3)(**inputs | BAD_INPUT[message])


def test_labels_for_a_network_without_labels():
    with pytest.raises(ValueError, match="labels were given, but this network has none"):
        tiny()(torch.zeros(1, 3, 8, 8), torch.tensor([1]), torch.tensor([0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_refused(dtype):
    with pytest.raises(ValueError, match=r"weights are torch.*call model.float\(\)"):
        tiny().to(dtype)(torch.zeros(1, 3, 8, 8).to(dtype), torch.tensor([1]))


def test_check_labels():
    check_labels(torch.tensor([0, 2, 5]), 3, 3, 5)
    check_labels(torch.tensor([-7, 100]), 2, None)
    check_labels(torch.zeros(0, dtype=torch.int64), 0, 3)
    check_labels(torch.zeros(2, dtype=torch.int64, device="meta"), 2, 3)
    for bad in ([0, 3], [-1, 0], [0, 4]):
        with pytest.raises(ValueError, match=r"outside 0\.\.2 \(5 stands"):
            check_labels(torch.tensor(bad), 2, 3, 5)
    with pytest.raises(ValueError, match=r"outside 0\.\.2$"):
        check_labels(torch.tensor([3]), 1, 3)


def test_evaluating_restores_every_mode_also_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    model[1][0].train()
    modes = [module.training for module in model.modules()]
    with evaluating(model) as inside:
        assert inside is model
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes == [True, True, False, True]
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert [module.training for module in model.modules()] == modes


def test_a_training_step_compiles_without_a_graph_break():
    """With labels: q_sample, the network and the target in one graph."""
    model = tiny(num_classes=3)
    process = GaussianDiffusion.from_config("cosine", 100, "v")

    def step(x, t, y, noise):
        output = model(process.q_sample(x, t, noise), t, y)
        return (output - process.training_target(x, t, noise)).square().mean()

    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3, 90]), torch.tensor([1, 3])
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert_close(compiled(x, t, y, x.flip(0)), step(x, t, y, x.flip(0)))
