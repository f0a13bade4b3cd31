"""Editing: RePaint against the exact conditional, inversion against the ODE, seams, errors."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from noisout_nb.checkpoints import load_model
from noisout_nb.data import ProceduralFlowers, to_float, to_uint8
from noisout_nb.editing import Inpainting, first_timesteps, invert, repaint, sdedit
from noisout_nb.forward_process import PREDICTIONS, GaussianDiffusion
from noisout_nb.profiles import PROFILES
from noisout_nb.sampling import SAMPLERS, ddim, ddpm, sample
from noisout_nb.unet import UNet

STD, CORRELATION = 0.25, 0.9  # of two pixels, jointly Gaussian around 0
COVARIANCE = STD**2 * torch.tensor([[1, CORRELATION], [CORRELATION, 1]], dtype=torch.float64)
KNOWN = 0.4  # the left pixel, in the tests of inpainting
LEFT_IS_KNOWN = torch.tensor([[False, True]])


class ExactDenoiser(nn.Module):
    """E[x_0 | x_t] for the two pixels, as the process wants it, and their variance if learned."""

    def __init__(self, process):
        super().__init__()
        self.process, self.seen = process, []

    def forward(self, x, t, y=None):
        self.seen.append(int(t[0]))
        process, alpha_bar = self.process, self.process.exact_alphas_cumprod[t[0]]
        joint = alpha_bar * COVARIANCE + (1 - alpha_bar) * torch.eye(2)
        gain = alpha_bar.sqrt() * COVARIANCE @ torch.linalg.inv(joint)
        x_0 = (x.double().flatten(1) @ gain.T).view(x.shape)
        output = process.training_target(x_0, t, process.predict_noise_from_start(x, t, x_0))
        if process.variance == "posterior":
            return output
        left = COVARIANCE[0, 0] - alpha_bar.sqrt() * (gain @ COVARIANCE)[0, 0]
        i = int((self.spaced.timestep_map == t[0]).nonzero())
        exact = self.spaced.posterior_variance[i] + self.spaced.posterior_mean_coef1[i] ** 2 * left
        low, high = self.spaced.posterior_log_variance[i], self.spaced.betas[i].log()
        return torch.cat(
            [output, ((exact.log() - low) / (high - low) * 2 - 1).expand_as(output)], 1
        )


@pytest.fixture(scope="module")
def process():
    return GaussianDiffusion.from_config("cosine", 1000, "x0")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 2, "channels": 8, "channel_mults": (1,)}
    model = UNet(
        **sizes, num_res_blocks=1, attention_resolutions=(), head_channels=8, num_classes=3
    )
    nn.init.normal_(model.conv_out.weight, std=0.1)
    return model.eval()


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def final(states):
    *_, last = states
    return last.x


def images(count=2, size=8):
    return noise(count, 3, size, size).clamp(-1, 1)


SQUARE = torch.zeros(8, 8, dtype=torch.bool)
SQUARE[2:6, 2:6] = True


# Inpainting


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", [*SAMPLERS, "repaint"])
def test_the_known_region_stays_to_a_grey_level_and_the_rest_is_new(network, sampler, prediction):
    process = GaussianDiffusion.from_config("linear", 1000, prediction)
    x_0, x_T = images(), noise(2, 3, 8, 8)
    model = Inpainting(network, process, x_0, SQUARE)
    found = final((SAMPLERS | {"repaint": repaint})[sampler](model, process, x_T, steps=6))
    same = (to_uint8(found) == to_uint8(x_0)).all(1)
    assert same[:, ~SQUARE].all()
    assert same[:, SQUARE].float().mean() < 0.2


def test_the_unknown_region_is_the_networks_own_and_may_differ_in_each_image(process, network):
    x, t, y = noise(2, 3, 8, 8), torch.tensor([10, 700]), torch.tensor([0, 2])
    mask = torch.stack([SQUARE, ~SQUARE])[:, None]
    for given in (mask, mask.float()):
        found = Inpainting(network, process, images(), given)(x, t, y)
        assert_close(found, torch.where(mask, network(x, t, y), images()))
    wide = UNet(**network.config | {"out_channels": 6})
    learned = GaussianDiffusion.from_config("cosine", 1000, "x0", "learned")
    nn.init.normal_(wide.conv_out.weight, std=0.1)
    assert_close(Inpainting(wide, learned, images(), mask)(x, t)[:, 3:], wide(x, t)[:, 3:])


def test_one_known_image_for_a_batch_of_any_size(process, network):
    model = Inpainting(network, process, images(1), SQUARE)
    found = sample(model, process, torch.tensor([0, 1, 2]), shape=(3, 8, 8), steps=4)
    assert_close(found[:, :, ~SQUARE], images(1)[:, :, ~SQUARE].expand(3, -1, -1))
    assert (found[0] - found[1]).abs().max() > 0.1


def test_the_known_region_is_as_noisy_as_q_has_it_all_the_way(process, network):
    x_0 = images(1, 8)
    model = Inpainting(network, process, x_0, torch.zeros(8, 8))
    for sampler in (ddim, ddpm, repaint):
        for state in sampler(model, process, noise(40, 3, 8, 8), steps=5):
            alpha_bar = process.respace(5).alphas_cumprod_prev[state.t // 200]
            residual = state.x - alpha_bar.sqrt() * x_0
            assert residual.std().item() == pytest.approx(float(1 - alpha_bar) ** 0.5, abs=0.02)


def moments(process, sampler, **options):
    """Mean and standard deviation of the unknown pixel, and how often the network was called."""
    x_0 = torch.tensor([KNOWN, 0.0]).view(1, 1, 1, 2)
    denoiser = ExactDenoiser(process)
    denoiser.spaced = process.respace(options["steps"])
    model = Inpainting(denoiser, process, x_0, LEFT_IS_KNOWN)
    generator = torch.Generator().manual_seed(0)
    found = final(sampler(model, process, noise(4000, 1, 1, 2), generator=generator, **options))
    assert_close(found[..., 0], torch.full_like(found[..., 0], KNOWN))
    unknown = found[..., 1]
    return unknown.mean().item(), unknown.std().item(), len(denoiser.seen)


EXACT = CORRELATION * KNOWN, STD * math.sqrt(1 - CORRELATION**2)


def test_repaint_converges_to_the_exact_conditional_and_replacement_does_not():
    learned = GaussianDiffusion.from_config("cosine", 1000, "x0", "learned")
    for steps in (50, 120):  # more steps do not help replacement
        mean, std, calls = moments(learned, ddpm, steps=steps)
        assert mean < 0.7 * EXACT[0] and std > 1.3 * EXACT[1] and calls == steps
    far = abs(moments(learned, repaint, steps=50, repeats=5)[0] - EXACT[0])
    mean, std, calls = moments(learned, repaint, steps=120, repeats=15)
    assert abs(mean - EXACT[0]) < 0.012 < 0.03 < far < 0.06
    assert std == pytest.approx(EXACT[1], abs=0.006)
    assert calls == 119 * 15 + 1


def test_repaint_without_repeats_is_ddpm(process):
    model = Inpainting(
        ExactDenoiser(process), process, noise(3, 1, 1, 2).clamp(-1, 1), LEFT_IS_KNOWN
    )
    found = []
    for sampler, options in ((ddpm, {}), (repaint, {"repeats": 1})):
        generator = torch.Generator().manual_seed(5)
        states = sampler(model, process, noise(3, 1, 1, 2), steps=7, generator=generator, **options)
        found.append([(state.t, *state.x.flatten().tolist()) for state in states])
    assert found[0] == [pytest.approx(row, abs=1e-5) for row in found[1]]


def seam(images, mask):
    """Mean absolute difference of neighbouring pixels across the mask's border."""
    steps = [images.diff(dim=axis).abs().mean(1)[:, mask.diff(dim=axis - 2)] for axis in (2, 3)]
    return torch.cat(steps, dim=1).mean().item()


def test_the_shipped_networks_seam_is_that_of_whole_images():
    model, process, _ = load_model(PROFILES["quick"].published)
    flowers = ProceduralFlowers(32, 16, seed=9)
    whole = to_float(flowers.images)
    half = (torch.arange(32) >= 16).expand(32, 32)
    known = Inpainting(model, process, whole, half)
    options = {"steps": 15, "repeats": 4, "generator": torch.Generator().manual_seed(0)}
    painted = final(repaint(known, process, noise(16, 3, 32, 32), flowers.labels, **options))
    assert 0.7 < seam(painted, half) / seam(whole, half) < 1.3
    pasted = torch.where(half, whole.roll(1, 0), whole)
    assert seam(pasted, half) / seam(whole, half) > 1.5  # the measure sees a seam that is there


# SDEdit


def test_the_first_timesteps_are_a_process_of_their_own(process):
    spaced = process.respace(50)
    for whole in (process, spaced):
        part = first_timesteps(whole, 20)
        assert part.timestep_map.tolist() == whole.timestep_map[:20].tolist()
        assert_close(part.alphas_cumprod, whole.alphas_cumprod[:20])
        assert_close(part.posterior_variance, whole.posterior_variance[:20])
        assert (part.prediction, part.variance) == (whole.prediction, whole.variance)


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.9])
def test_sdedit_ends_where_the_gaussian_says(process, strength):
    """The ODE keeps x_t / std(x_t): what is left of the image, and of fresh noise, is known."""
    x_0, denoiser = noise(2000, 1, 1, 2).clamp(-1, 1) * STD, ExactDenoiser(process)
    generator = torch.Generator().manual_seed(3)
    found = sdedit(denoiser, process, x_0, strength=strength, steps=200, generator=generator)
    alpha_bar = process.exact_alphas_cumprod[round(1000 * strength) - 1]
    values, vectors = torch.linalg.eigh(COVARIANCE)
    for value, vector in zip(values, vectors.T, strict=True):
        before, after = (x.double().flatten(1) @ vector for x in (x_0, found))
        share = (alpha_bar * value / (alpha_bar * value + 1 - alpha_bar)).sqrt()
        slope = (before * after).mean() / before.square().mean()
        assert slope.item() == pytest.approx(share.item(), abs=0.06)
    assert denoiser.seen[0] == round(1000 * strength) - 1
    assert len(denoiser.seen) == round(200 * strength)


def test_strength_0_returns_the_images_and_1_keeps_nothing(process, network):
    x_0, y = images(), torch.tensor([0, 1])
    assert torch.equal(sdedit(network, process, x_0, y, strength=0), x_0)
    ends = []
    for start in (x_0, -x_0):
        generator = torch.Generator().manual_seed(0)
        ends.append(sdedit(network, process, start, y, strength=1, steps=4, generator=generator))
    assert_close(*ends, atol=0.01, rtol=0)
    assert sdedit(network, process, x_0, y, strength=0.001, steps=4).shape == x_0.shape


def test_sdedit_takes_any_sampler_and_a_mask(process, network):
    known = Inpainting(network, process, images(), SQUARE)
    for sampler in SAMPLERS.values():
        found = sdedit(known, process, images(), strength=0.6, steps=5, sampler=sampler)
        assert_close(found[:, :, ~SQUARE], images()[:, :, ~SQUARE])
        assert not torch.allclose(found, images(), atol=0.1)


# Inversion


def test_inversion_follows_the_ode_and_its_error_falls_with_the_steps():
    process = GaussianDiffusion.from_config("cosine", 20_000, "x0")
    x_0, denoiser = noise(50, 1, 1, 2).clamp(-1, 1) * STD, ExactDenoiser(process)
    values, vectors = torch.linalg.eigh(COVARIANCE)
    truth = x_0.double().flatten(1) @ vectors / values.sqrt() @ vectors.T
    errors, returns = [], []
    for steps in (100, 400):
        x_T = final(invert(denoiser, process, x_0, steps=steps, spacing="lambda"))
        errors.append((x_T.flatten(1) - truth).square().mean().sqrt().item())
        back = final(ddim(denoiser, process, x_T, steps=steps, spacing="lambda"))
        returns.append((back - x_0).square().mean().sqrt().item())
    assert errors[1] < errors[0] / 2.5 and errors[1] < 0.08
    assert returns[1] < returns[0] / 2.5 and returns[1] < 0.02


def test_a_fixed_point_inverts_ddim_exactly(process):
    x_0, denoiser = noise(5, 1, 1, 2).clamp(-1, 1) * STD, ExactDenoiser(process)
    errors = {}
    for iterations in (1, 3, 100):
        states = list(invert(denoiser, process, x_0, steps=10, iterations=iterations))
        assert [state.t for state in states] == process.respace(10, "karras").timestep_map.tolist()
        back = final(ddim(denoiser, process, states[-1].x, steps=10, spacing="karras"))
        errors[iterations] = (back - x_0).abs().max().item()
    assert errors[1] > 1.5 * errors[3] and errors[100] < 1e-4


def test_the_shipped_network_inverts_and_returns():
    model, process, _ = load_model(PROFILES["quick"].published)
    flowers = ProceduralFlowers(32, 4, seed=9)
    x_0, y = to_float(flowers.images), flowers.labels
    x_T = final(invert(model, process, x_0, y, steps=15, iterations=4))
    back = final(ddim(model, process, x_T, y, steps=15, spacing="karras"))
    assert (back - x_0).square().mean().sqrt() < 0.05


# What is refused


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.zeros(4, 4), r"the mask is torch.float32 \(4, 4\).* \(8, 8\) or \(2, 1, 8, 8\)"),
        (torch.zeros(3, 1, 8, 8), r"the mask is .*\(3, 1, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8), r"the mask is .*\(2, 3, 8, 8\)"),
        (torch.full((8, 8), 0.5), "values other than 0 .* mask > 0.5"),
        (torch.full((8, 8), math.nan), "values other than 0"),
        (torch.full((8, 8), 255, dtype=torch.uint8), "the mask is torch.uint8"),
        (SQUARE.long(), "the mask is torch.int64 .*must be bool or float"),
        (SQUARE.tolist(), "the mask is list"),
    ],
)
def test_masks_that_do_not_fit(process, network, mask, words):
    with pytest.raises(ValueError, match=words):
        Inpainting(network, process, images(), mask)


@pytest.mark.parametrize(
    ("x_0", "words"),
    [
        (2 * noise(2, 3, 8, 8), "x_0 reaches .* must lie in -1..1"),
        (torch.full((2, 3, 8, 8), math.nan), "x_0 reaches nan"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "x_0 is torch.uint8 .*data.to_float"),
        (torch.zeros(3, 8, 8), r"x_0 is torch.float32 \(3, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), "x_0 is"),
        (None, "x_0 is NoneType"),
    ],
)
def test_images_that_do_not_fit(process, network, x_0, words):
    for call in (
        lambda: Inpainting(network, process, x_0, SQUARE),
        lambda: sdedit(network, process, x_0, strength=0.5),
        lambda: next(invert(network, process, x_0)),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_images_of_a_size_or_with_labels_that_the_network_has_not(process, network):
    odd, y = images(2, 9), torch.tensor([0, 1, 2])
    calls = [
        lambda x_0, y: sdedit(network, process, x_0, y, strength=0.5, steps=2),
        lambda x_0, y: final(invert(network, process, x_0, y, steps=2)),
        lambda x_0, y: final(
            repaint(
                Inpainting(network, process, x_0, torch.zeros(x_0.shape[2:])),
                process,
                noise(*x_0.shape),
                y,
                steps=2,
            )
        ),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="images of 9 x 9"):
            call(odd, None)
        with pytest.raises(ValueError, match=r"labels are int64 of shape \(2,\)"):
            call(images(), y)
        with pytest.raises(ValueError, match=r"labels run from 2 to 4, outside 0\.\.2"):
            call(images(), y[:2] * 2 + 2)
    model = Inpainting(network, process, images(), SQUARE)
    for x_T in (noise(3, 3, 8, 8), noise(2, 3, 6, 6)):
        with pytest.raises(ValueError, match="x is .*x_0 .*must agree"):
            final(ddim(model, process, x_T, steps=2))


@pytest.mark.parametrize("strength", [-0.1, 1.1, math.nan])
def test_strength_outside_0_to_1(process, network, strength):
    with pytest.raises(ValueError, match=r"strength is .*0\.\.1"):
        sdedit(network, process, images(), strength=strength)


def test_counts_that_do_not_fit(process, network):
    for steps in (0, 2000):
        with pytest.raises(ValueError, match="steps is"):
            sdedit(network, process, images(), strength=1.0, steps=steps)
        with pytest.raises(ValueError, match="steps is"):
            next(repaint(network, process, images(), steps=steps))
        with pytest.raises(ValueError, match="steps is"):
            next(invert(network, process, images(), steps=steps))
    with pytest.raises(ValueError, match="repeats is 0"):
        next(repaint(network, process, images(), repeats=0))
    with pytest.raises(ValueError, match="iterations is 1.5"):
        next(invert(network, process, images(), iterations=1.5))
