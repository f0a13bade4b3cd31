"""The ONNX graph against PyTorch's network, and the 12 bits of its weights."""

import json
import zlib

import pytest
import torch

from noisout_nb import export as module
from noisout_nb.__main__ import main
from noisout_nb.checkpoints import save_model
from noisout_nb.forward_process import GaussianDiffusion
from noisout_nb.unet import UNet

pytest.importorskip("onnxruntime", reason="not here: onnxruntime comes with `make site`")
pytest.importorskip("onnx", reason="not here: onnx comes with `make site`")

SMALL = {"channels": 32, "channel_mults": (1, 2), "num_res_blocks": 1}


def network(**options):
    """A small network whose zero-initialised layers are random, so that every branch counts."""
    torch.manual_seed(0)
    model = UNet(**{"image_size": 16, "attention_resolutions": (8,), **SMALL, **options}).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 5, "patch_size": 2},
        {"num_classes": 5, "image_size": (16, 24)},
        {"scale_shift_norm": False, "rescale_residual": True},
        {"resblock_updown": True, "out_channels": 6},
    ],
    ids=["patches", "oblong", "no labels, added embedding", "residual resampling"],
)
def test_the_graph_computes_what_the_network_does(options):
    model = network(**options)
    file = module.to_onnx(model)
    packed = module.packed_model(model)
    for count in (1, 2, 4):
        assert module.compare(file, packed, count) < 1e-4
    assert module.compare(file, network(**options, head_channels=16)) > 1e-3


def test_another_output_is_refused(monkeypatch):
    monkeypatch.setattr(module._Graph, "silu", lambda self, x: self.op("Sigmoid", x))
    with pytest.raises(RuntimeError, match="differs from PyTorch's by"):
        module.to_onnx(network())


def test_packed_weights_are_off_by_half_a_level_at_most():
    weight = torch.randn(7, 5, 3, 3) * torch.logspace(-3, 2, 7)[:, None, None, None]
    weight[3] = 0
    high, low, scale = module.pack(weight)
    assert (high.dtype, low.dtype) == (torch.int8, torch.uint8) and low.max() < 16
    error = (module.unpack(high, low, scale) - weight).abs()
    assert (error <= weight.abs().amax((1, 2, 3), keepdim=True) / 2047 * 0.501).all()


def test_the_program_writes_both_files(tmp_path, capsys):
    model = network(num_classes=2, patch_size=2)
    process = GaussianDiffusion.from_config(timesteps=50)
    save_model(model, tmp_path / "model.pth", process, ["rose", "lily"])
    arguments = ["export", "--weights", str(tmp_path / "model.pth"), "--out", str(tmp_path)]
    arguments += ["--profile", "flowers64"]
    assert main(arguments) == 0
    assert "flowers.bin" in capsys.readouterr().out
    settings = json.loads((tmp_path / "flowers.json").read_text())
    assert settings["classes"] == ["rose", "lily"] and settings["image_size"] == 16
    assert settings["alphas_cumprod"] == process.exact_alphas_cumprod.tolist()
    file = zlib.decompress((tmp_path / "flowers.bin").read_bytes(), 31)
    assert module.compare(file, model) < 0.05


@pytest.mark.parametrize("process", [{"prediction": "eps"}, {"variance": "learned"}])
def test_what_the_page_cannot_sample_from_is_refused(tmp_path, process):
    out = 6 if "variance" in process else 3
    model = network(num_classes=2, out_channels=out)
    made = GaussianDiffusion.from_config(timesteps=50, **process)
    save_model(model, tmp_path / "model.pth", made, ["rose", "lily"])
    with pytest.raises(ValueError, match="the page samples from networks with classes"):
        module.export(tmp_path / "model.pth", tmp_path, None)
