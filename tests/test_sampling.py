"""The samplers against closed forms, diffusers' numbers, and the promise of one image per seed."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from noisout_nb import sampling
from noisout_nb.checkpoints import save_model
from noisout_nb.forward_process import PREDICTIONS, SPACINGS, GaussianDiffusion
from noisout_nb.generate import sample_image
from noisout_nb.sampling import (
    SAMPLERS,
    ddim,
    ddpm,
    dpm_solver,
    heun,
    image_generator,
    p_mean_variance,
    predict,
    sample,
    sde_dpm_solver,
)
from noisout_nb.unet import UNet

STD = 0.2  # of the data N(0, STD^2) whose denoiser is known
T = 1000


class ExactDenoiser(nn.Module):
    """E[x_0 | x_t] for data N(0, STD^2), as the process wants it; counts its calls."""

    def __init__(self, process):
        super().__init__()
        self.process = process
        self.seen = []

    def forward(self, x, t, y=None):
        self.seen.append(int(t[0]))
        alpha_bar = self.process.exact_alphas_cumprod[t].view(-1, 1, 1, 1)
        gain = alpha_bar.sqrt() * STD**2 / (alpha_bar * STD**2 + 1 - alpha_bar)
        x_0 = gain * x.double()
        noise = (x - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0
        return {"eps": noise, "v": v, "x0": x_0}[self.process.prediction]


class Constant(nn.Module):
    """Predicts `value` at every call, times 1 - 0.15 per call before."""

    def __init__(self, value, decay=0.15):
        super().__init__()
        self.value, self.decay, self.calls = value, decay, 0
        self.num_classes = 4

    def forward(self, x, t, y=None):
        output = self.value * (1 - self.decay * self.calls)
        self.calls += 1
        return output.expand(len(x), -1, -1, -1)


class Small(nn.Module):
    """A cheap network with dropout and labels; its output depends on x, t and y of its image."""

    def __init__(self):
        super().__init__()
        self.num_classes = self.null_label = 3
        self.layer = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Dropout(0.5))
        self.frozen = nn.Dropout(0.5).eval()

    def forward(self, x, t, y=None):
        shift = t.float() / T + (0 if y is None else y.float())
        h = self.frozen(self.layer(x)) + 0.1 * shift.view(-1, 1, 1, 1)
        return h.tanh()


@pytest.fixture(scope="module")
def process():
    return GaussianDiffusion.from_config("cosine", T, "x0")


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Small()


def final(states):
    for state in states:
        last = state
    return last.x


def noise(count=4, *shape):
    return torch.randn(count, *(shape or (3, 2, 2)), generator=torch.Generator().manual_seed(1))


# Order of convergence on the closed-form Gaussian


def errors(sampler, process, spacing, counts):
    """Largest relative error at the last timestep visited, against the probability-flow ODE.

    The ODE keeps x_t / std(x_t). The jump from there to alpha_bar = 1 is the same for every
    number of steps, so it is left out.
    """
    x_T = torch.linspace(-2, 2, 9).view(-1, 1, 1, 1)
    found = []
    for steps in counts:
        states = list(sampler(ExactDenoiser(process), process, x_T, steps=steps, spacing=spacing))
        alpha_bar = process.exact_alphas_cumprod
        variance = alpha_bar * STD**2 + 1 - alpha_bar
        truth = x_T.double() * (variance[states[-1].t] / variance[-1]).sqrt()
        found.append(((states[-2].x - truth).abs().max() / truth.abs().max()).item())
    return found


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize(
    ("sampler", "order", "error"), [(ddim, 1, 0.05), (dpm_solver, 2, 0.004), (heun, 2, 0.004)]
)
def test_order_of_convergence(sampler, order, error, schedule):
    process = GaussianDiffusion.from_config(schedule, 20_000, "x0")
    for spacing in ("lambda", "karras"):
        found = errors(sampler, process, spacing, (40, 80, 160))
        slopes = [math.log2(a / b) for a, b in zip(found, found[1:], strict=False)]
        assert slopes == pytest.approx([order, order], abs=0.2), spacing
        assert found[1] < error, spacing


def test_second_order_pays_at_few_steps(process):
    first, second = (errors(s, process, "lambda", [20])[0] for s in (ddim, dpm_solver))
    assert second < first / 5
    assert first < 0.15


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", [ddim, dpm_solver, heun])
def test_deterministic_samplers_reach_the_data(sampler, prediction):
    process = GaussianDiffusion.from_config("cosine", T, prediction)
    x_T = noise(50, 1, 1, 1)
    x = final(sampler(ExactDenoiser(process), process, x_T, steps=200, spacing="lambda"))
    assert_close(x, STD * x_T, atol=0.02 * STD, rtol=0.02)


@pytest.mark.parametrize(
    ("sampler", "eta"),
    [(ddpm, None), (ddim, 0.5), (ddim, 1.0), (dpm_solver, 0.5), (sde_dpm_solver, None)],
)
def test_stochastic_samplers_reach_the_data(process, sampler, eta):
    x_T, generator = noise(4000, 1, 1, 1), torch.Generator().manual_seed(0)
    options = {"steps": 200, "spacing": "karras", "generator": generator}
    options |= {} if eta is None else {"eta": eta}
    x = final(sampler(ExactDenoiser(process), process, x_T, **options))
    assert x.std().item() == pytest.approx(STD, rel=0.04)
    assert abs(x.mean().item()) < 4 * STD / math.sqrt(4000)
    assert abs((x * x_T).mean().item()) < STD - 0.02, "some of the noise must be fresh"


def test_the_last_call_of_20_uniform_steps_is_at_49_and_of_the_others_at_0(process):
    for spacing, last in (("uniform", 49), ("lambda", 0), ("karras", 0)):
        model = ExactDenoiser(process)
        states = list(ddim(model, process, noise(), steps=20, spacing=spacing))
        assert [state.t for state in states] == model.seen
        assert (model.seen[0], model.seen[-1], len(model.seen)) == (999, last, 20)


def test_calls(process):
    wanted = {ddpm: 6, ddim: 6, dpm_solver: 6, sde_dpm_solver: 6, heun: 10}
    for sampler, calls in wanted.items():
        model = ExactDenoiser(process)
        assert len(list(sampler(model, process, noise(), steps=6))) == 6
        assert len(model.seen) == calls
    for sampler in SAMPLERS.values():
        few = GaussianDiffusion.from_config("cosine", 7, "x0")
        assert len(list(sampler(ExactDenoiser(few), few, noise(), steps=None))) == 7
        state, *rest = sampler(ExactDenoiser(few), few, noise(), steps=1)
        assert rest == []
        assert torch.equal(state.x, state.x_start)
    few = GaussianDiffusion.from_config("cosine", 60, "x0")
    defaults = {ddpm: 60, ddim: 50, dpm_solver: 20, sde_dpm_solver: 20, heun: 20}
    for sampler, steps in defaults.items():
        assert len(list(sampler(ExactDenoiser(few), few, noise()))) == steps


# One step, by independent formulas


def test_dpm_solver_is_diffusers():
    """diffusers 0.42.1, DPMSolverMultistepScheduler, dpmsolver++, trailing, euler_at_final."""
    wanted = {
        "cosine": [
            (0.78892, -1.138985, 0.466323),
            (0.781618, -1.053059, 0.642271),
            (0.668407, -0.842704, 0.68753),
            (0.452704, -0.522532, 0.580967),
            (0.16, -0.12, 0.36),
        ],
        "linear": [
            (0.712595, -1.109017, 0.229365),
            (0.742531, -1.124421, 0.313576),
            (0.750815, -1.078975, 0.455746),
            (0.589259, -0.777705, 0.522929),
            (0.16, -0.12, 0.36),
        ],
    }
    x_T = torch.tensor([0.7, -1.1, 0.2]).view(1, 3, 1, 1)
    for schedule, rows in wanted.items():
        process = GaussianDiffusion.from_config(schedule, T, "x0")
        model = Constant(torch.tensor([0.4, -0.3, 0.9]).view(1, 3, 1, 1))
        states = dpm_solver(model, process, x_T, steps=5)
        for state, row in zip(states, rows, strict=True):
            assert_close(state.x.flatten(), torch.tensor(row), atol=3e-5, rtol=0)


def test_sde_dpm_solver_is_diffusers(monkeypatch):
    """diffusers 0.42.1 as above, sde-dpmsolver++; the noise of call k is k (0.5, -1, 0.25).

    Its first cosine step, from sigma = 20,000 in float32, is 1e-4 off.
    """
    wanted = {
        "cosine": [
            (0.598678, -1.043977, 0.513985),
            (1.112019, -1.968718, 0.913425),
            (1.334559, -2.384821, 1.065284),
            (1.029688, -1.81833, 0.852304),
            (0.16, -0.12, 0.36),
        ],
        "linear": [
            (0.621689, -1.175705, 0.313214),
            (1.153598, -2.231166, 0.661314),
            (1.717929, -3.286747, 1.061122),
            (1.624357, -3.044093, 1.097128),
            (0.16, -0.12, 0.36),
        ],
    }
    x_T = torch.tensor([0.7, -1.1, 0.2]).view(1, 3, 1, 1)
    for schedule, rows in wanted.items():
        drawn = (torch.tensor([0.5, -1.0, 0.25]).view(1, 3, 1, 1) * k for k in range(1, 5))
        monkeypatch.setattr(sampling, "_randn", lambda x, generator, drawn=drawn: next(drawn))
        process = GaussianDiffusion.from_config(schedule, T, "x0")
        model = Constant(torch.tensor([0.4, -0.3, 0.9]).view(1, 3, 1, 1))
        states = sde_dpm_solver(model, process, x_T, steps=5)
        for state, row in zip(states, rows, strict=True):
            assert_close(state.x.flatten(), torch.tensor(row), atol=2e-4, rtol=0)


def test_ddim_is_diffusers():
    """diffusers 0.42.1, DDIMScheduler, use_clipped_model_output, from t = 699 to 649."""
    wanted = {
        ("cosine", "eps"): (0.7367176, -1.1406339, 0.1043284),
        ("cosine", "v"): (0.6667374, -1.0733083, 0.1293321),
        ("cosine", "x0"): (0.705246, -1.0795909, 0.2700165),
        ("linear", "eps"): (0.731766, -1.1303934, 0.1651455),
        ("linear", "v"): (0.6859745, -1.0891476, 0.16924),
        ("linear", "x0"): (0.7112651, -1.1064757, 0.230065),
    }
    x = torch.tensor([0.7, -1.1, 0.2]).view(1, 3, 1, 1)
    model = Constant(torch.tensor([0.4, -0.3, 0.9]).view(1, 3, 1, 1), decay=0)
    for (schedule, prediction), row in wanted.items():
        process = GaussianDiffusion.from_config(schedule, T, prediction)
        kept = process.respace(20)
        rest = GaussianDiffusion(kept.exact_betas[:14], prediction, kept.timestep_map[:14])
        state = next(ddim(model, rest, x, steps=14))
        assert_close(state.x.flatten(), torch.tensor(row), atol=3e-5, rtol=0)


def test_eta_1_is_ddpm(small, process):
    options = {"steps": 30, "spacing": "karras"}
    a, b = (
        final(f(small, process, noise(), generator=torch.Generator().manual_seed(3), **o))
        for f, o in ((ddpm, options), (ddim, options | {"eta": 1.0}))
    )
    assert_close(a, b, atol=1e-4, rtol=0)


def test_the_mean_without_the_clamp_is_equation_11(small):
    process = GaussianDiffusion.from_config("linear", T, "eps")
    x, t = noise(2), torch.tensor([5, 900])
    mean, variance, _ = p_mean_variance(small, process, x, t, clip=False)
    with torch.no_grad():
        eps = small.eval()(x, t)
    beta, alpha_bar = (v[t].view(-1, 1, 1, 1) for v in (process.betas, process.alphas_cumprod))
    assert_close(
        mean, (x - beta / (1 - alpha_bar).sqrt() * eps) / (1 - beta).sqrt(), atol=1e-4, rtol=1e-4
    )
    assert_close(variance.flatten(), process.posterior_variance[t])
    x_start = p_mean_variance(small, process, 5 * x, t)[2]
    assert x_start.abs().max() == 1
    unclipped = predict(small, process, 5 * x, t, clip=False)[0]
    assert unclipped.abs().max() > 1.5


def test_a_learned_variance_is_used():
    process = GaussianDiffusion.from_config("cosine", T, "x0", "learned")

    class Learned(nn.Module):
        def forward(self, x, t, y=None):
            return torch.cat([torch.zeros_like(x), torch.ones_like(x)], dim=1)

    x, t = noise(2), torch.tensor([300, 600])
    variance = p_mean_variance(Learned(), process, x, t)[1]
    assert variance.shape == x.shape
    assert_close(variance, process.betas[t].view(-1, 1, 1, 1).expand_as(x))
    state, *_ = ddpm(Learned(), process, x, steps=2, generator=torch.Generator().manual_seed(0))
    respaced = process.respace(2)
    fresh = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    mean = respaced.posterior_mean_coef2[1] * x
    assert_close(state.x, mean + respaced.betas[1].sqrt() * fresh)
    assert predict(Learned(), process, x, t)[2] is not None
    *_, last = ddpm(Learned(), process, x, steps=2)
    assert torch.equal(last.x, last.x_start), "the last step adds no noise"


def test_the_network_sees_its_own_timesteps_and_labels(process):
    seen = []

    class Spy(nn.Module):
        def forward(self, x, t, y=None):
            seen.append((t.tolist(), None if y is None else y.tolist()))
            return torch.zeros_like(x)

    y = torch.tensor([2, 0, 1, 2])
    for sampler in SAMPLERS.values():
        seen.clear()
        final(sampler(Spy(), process, noise(), y, steps=2))
        assert seen == [([999] * 4, [2, 0, 1, 2]), ([499] * 4, [2, 0, 1, 2])]
        assert final(sampler(Spy(), process, noise().half(), steps=2)).dtype == torch.float32


# Modes


def test_every_module_keeps_its_mode_and_the_network_runs_in_eval_mode(small, process):
    small.train()
    small.frozen.eval()
    for sampler in SAMPLERS.values():
        generator = torch.Generator().manual_seed(0)
        states = sampler(small, process, noise(), steps=3, generator=generator)
        next(states)
        assert small.training and small.layer[1].training and not small.frozen.training
        a = final(states)
        generator.manual_seed(0)
        small.eval()
        assert_close(a, final(sampler(small, process, noise(), steps=3, generator=generator)))
        small.train()
        small.frozen.eval()
    x = sample(small, process, shape=(3, 2, 2), steps=2)
    assert small.training and not small.frozen.training
    assert not x.requires_grad


# One image per seed


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_depends_on_its_seed_and_number_alone(small, process, sampler):
    y = torch.tensor([0, 1, 2, 0, 1])
    options = {"shape": (3, 4, 4), "sampler": sampler, "steps": 6, "seed": 7}
    whole = sample(small, process, y, **options)
    assert (whole[0] - whole[3]).abs().max() > 0.01, "the same label, another image"
    for other in (
        sample(small, process, y, batch_size=1, **options),
        sample(small, process, y, batch_size=2, **options),
        torch.cat([sample(small, process, y[:2], **options), whole[2:]]),
    ):
        assert_close(other, whole, atol=1e-5, rtol=0)
    other_seed = sample(small, process, y, **options | {"seed": 8})
    assert (other_seed - whole).abs().max() > 0.01
    assert whole.shape == (5, 3, 4, 4)
    assert whole.dtype == torch.float32
    assert whole.abs().max() <= 1


@pytest.mark.parametrize("world", [2, 3, 8])
def test_the_number_of_processes_changes_nothing(small, process, world, monkeypatch):
    options = {"shape": (3, 4, 4), "count": 5, "sampler": "ddpm", "steps": 4, "batch_size": 2}
    whole = sample(small, process, **options)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(sampling, "share", lambda x, rank=rank: x[rank::world])
        monkeypatch.setattr(sampling, "gather", lambda part, count: part)
        parts.append(sample(small, process, **options))
    for rank, part in enumerate(parts):
        assert_close(part, whole[rank::world], atol=1e-5, rtol=0)


def test_noise_and_generators(process):
    """x_T of image i is the first that its generator gives; its later noise comes after it."""
    model = Constant(torch.zeros(1, 1, 1, 1), decay=0)
    found = sample(model, process, shape=(1, 3, 2), count=3, sampler="ddim", steps=1, seed=4)
    assert not found.any()
    generators = [image_generator(4, i) for i in range(3)]
    x_T = torch.stack([torch.randn(1, 3, 2, generator=g) for g in generators])
    state = next(ddpm(model, process, x_T, steps=2, generator=generators))
    first = image_generator(4, 1)
    start, fresh = torch.randn(1, 3, 2, generator=first), torch.randn(1, 3, 2, generator=first)
    respaced = process.respace(2)
    wanted = (
        respaced.posterior_mean_coef2[1] * start + respaced.posterior_variance[1].sqrt() * fresh
    )
    assert_close(state.x[1], wanted)
    with pytest.raises(ValueError, match="3 generators for 4 images"):
        next(ddpm(model, process, noise(4, 1, 3, 2), steps=2, generator=generators))


def test_seeds_lie_far_apart():
    starts = sorted(image_generator(seed, 0).initial_seed() for seed in range(-50, 200))
    gaps = np.diff([*starts, starts[0] + 2**32])
    assert gaps.min() > 1_000_000
    assert image_generator(0, 3).initial_seed() == 3
    assert image_generator(1, 3).initial_seed() == 2_654_435_769 + 3
    assert image_generator(2**40, 5).initial_seed() < 2**32


def test_defaults_of_sample(small, process, monkeypatch):
    calls = []

    def spy(model, process, x_T, y, **options):
        calls.append((tuple(x_T.shape), options["steps"], options["spacing"]))
        yield from ddim(model, process, x_T, y, steps=1)

    monkeypatch.setitem(SAMPLERS, "dpm_solver", spy)
    assert torch.equal(sample(small, process), sample(small, process, seed=0))
    sample(small, process, count=130, steps=3, spacing="karras", shape=(3, 2, 2))
    assert calls[0] == ((1, 3, 32, 32), 20, "uniform")
    assert calls[2:] == [((n, 3, 2, 2), 3, "karras") for n in (64, 64, 2)]


# Bad input


BAD = {
    "steps is 0": {"steps": 0},
    "steps is True": {"steps": True},
    "steps is 2.0": {"steps": 2.0},
    r"steps is 1001: it must be an integer in 1\.\.1000": {"steps": 1001},
    "unknown spacing 'even'": {"spacing": "even"},
    "y is a list": {"y": [0, 1]},
    "y is a ndarray": {"y": np.array([0, 1])},
    "x_T is a ndarray": {"x_T": np.zeros((2, 3, 4, 4))},
    "y is on meta": {"y": torch.zeros(2, dtype=torch.int64, device="meta")},
    "x_T is on meta": {"x_T": torch.zeros(2, 3, 4, 4, device="meta")},
    r"x_T is torch.float32 of shape \(0, 3": {"x_T": torch.zeros(0, 3, 4, 4)},
    r"x_T is torch.int64 of shape": {"x_T": torch.zeros(2, 3, 4, 4, dtype=torch.int64)},
    r"x_T is torch.float32 of shape \(3, 4, 4\)": {"x_T": torch.zeros(3, 4, 4)},
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_all_samplers_refuse_bad_input_alike(small, process, sampler, message):
    options = {"x_T": torch.zeros(2, 3, 4, 4)} | BAD[message]
    with pytest.raises(ValueError, match=message):
        next(SAMPLERS[sampler](small, process, **options))


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_lies_in_0_to_1(small, process, eta):
    for sampler in (ddim, dpm_solver):
        with pytest.raises(ValueError, match="eta is"):
            next(sampler(small, process, noise(), eta=eta))


BAD_SAMPLE = {
    "unknown sampler 'euler': choose one of ddpm, ddim, dpm_solver, ": {"sampler": "euler"},
    "batch_size is 0": {"batch_size": 0},
    "seed is None": {"seed": None},
    "seed is 1.5": {"seed": 1.5},
    "count is 0": {"count": 0},
    "count is True": {"count": True},
    "steps is 0": {"steps": 0},
    "unknown spacing 'even'": {"spacing": "even"},
    "y is a list": {"y": [0, 1]},
    r"y is torch.float32 of shape \(2,\)": {"y": torch.zeros(2)},
    r"y is torch.int64 of shape \(2, 1\).*y.flatten": {"y": torch.zeros(2, 1, dtype=torch.int64)},
    r"y is torch.int64 of shape \(\)": {"y": torch.tensor(1)},
    r"labels run from 1 to 3, outside 0\.\.2": {"y": torch.tensor([1, 2, 3])},
    "count is 0: it must": {"y": torch.zeros(0, dtype=torch.int64)},
}


@pytest.mark.parametrize("message", BAD_SAMPLE)
def test_sample_refuses_bad_input(small, process, message):
    with pytest.raises(ValueError, match=message):
        sample(small, process, shape=(3, 2, 2), **BAD_SAMPLE[message])


def test_numpy_integers_are_integers(small, process):
    options = {"count": np.int64(2), "steps": np.int32(2), "seed": np.int64(1)}
    assert len(sample(small, process, shape=(3, 2, 2), batch_size=np.int64(1), **options)) == 2


def test_every_spacing_is_taken(small, process):
    ends = [sample(small, process, shape=(3, 2, 2), steps=5, spacing=s) for s in SPACINGS]
    assert len({tuple(end.flatten().tolist()) for end in ends}) == len(SPACINGS)


def test_sample_image_takes_size_and_channels_from_the_weights(tmp_path):
    process = GaussianDiffusion.from_config("cosine", 20, "x0")
    options = {
        "image_size": (8, 4),
        "in_channels": 1,
        "channels": 8,
        "channel_mults": (1,),
        "num_res_blocks": 1,
        "attention_resolutions": (),
        "head_channels": 8,
    }
    wide = tmp_path / "wide.pth"
    save_model(UNet(**options, num_classes=2), wide, process, ("rose", "daisy"))
    found = sample_image(["daisy", "rose"], 2, weights=wide, steps=2)
    assert (found.shape, found.dtype) == ((4, 1, 8, 4), torch.float32)
    assert sample_image(None, np.int64(3), weights=wide, steps=2).shape == (3, 1, 8, 4)
    assert sample_image("rose", weights=wide, steps=2, shape=(1, 4, 4)).shape == (1, 1, 4, 4)
    interval = {"guidance_scale": 2.0, "guidance_interval": (0.1, 1.0), "rescale": 0.5}
    assert (
        sample_image("rose", weights=wide, steps=3, spacing="karras", **interval).isfinite().all()
    )
    with pytest.raises(ValueError, match="interval is"):
        sample_image("rose", weights=wide, guidance_interval=(1.0, 0.1))
    with pytest.raises(ValueError, match="count is 0"):
        sample_image("rose", 0, weights=wide)
    with pytest.raises(ValueError, match="weights is None"):
        sample_image("rose", weights=None)
    plain = tmp_path / "plain.pth"
    save_model(UNet(**options), plain, process, ())
    assert sample_image(None, weights=plain, steps=2).shape == (1, 1, 8, 4)
    with pytest.raises(ValueError, match=r"no classes: sample_image\(None, count\)"):
        sample_image("rose", weights=plain)
