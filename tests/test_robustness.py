"""Samplers on what they are not made for: bfloat16."""

import pytest
import torch

from noisout_nb.forward_process import GaussianDiffusion, cosine_beta_schedule
from noisout_nb.sampling import ddpm
from noisout_nb.unet import UNet


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_chain_in_bfloat16_stays_finite(prediction):
    torch.manual_seed(0)
    model = UNet(
        image_size=8,
        channels=16,
        channel_mults=(1,),
        num_res_blocks=1,
        attention_resolutions=(8,),
        head_channels=16,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # an untrained network answers with zeros
    process = GaussianDiffusion(cosine_beta_schedule(), prediction)
    x_T, seen = torch.randn(2, 3, 8, 8), []
    model.conv_out.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        for state in ddpm(model, process, x_T, steps=100):
            assert state.x.dtype == state.x_start.dtype == torch.float32
            # NaN fails these, too
            assert state.x.abs().max() < 10 and state.x_start.abs().max() <= 1
    assert seen == 100 * [torch.bfloat16]
