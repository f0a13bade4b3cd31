"""The forward process against closed forms, formulas written anew and diffusers' numbers."""

import json
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from noisout_nb.forward_process import (
    PREDICTIONS,
    SPACINGS,
    GaussianDiffusion,
    check_integer,
    cosine_beta_schedule,
    linear_beta_schedule,
    straight_beta_schedule,
)

# diffusers 0.42.1, 1000 timesteps, "trailing" spacing, 20 steps, t = 699: x_t and the network's
# output -> mean of DDPM (fixed_small, clip_sample), its variance, and the clamped x_0.
X_T, OUTPUT = (0.7, -1.1, 0.2), (0.4, -0.3, 0.9)
DIFFUSERS_MEANS = {
    ("cosine", "eps"): (0.6792405, -1.0361159, -0.0004118),
    ("cosine", "v"): (0.5510429, -0.9127809, 0.0453928),
    ("cosine", "x0"): (0.6215872, -0.9242902, 0.3031149),
    ("linear", "eps"): (0.5528607, -0.835417, 0.0828908),
    ("linear", "v"): (0.4746112, -0.7649351, 0.0898875),
    ("linear", "x0"): (0.5178283, -0.7945459, 0.1938267),
}
DIFFUSERS_VARIANCES = {"cosine": 0.225034893, "linear": 0.490718395}
DIFFUSERS_STARTS = {
    ("cosine", "eps"): (0.760895, -1.0, -1.0),
    ("cosine", "v"): (-0.0415892, -0.2279548, -0.7132744),
    ("linear", "eps"): (1.0, -1.0, -1.0),
    ("linear", "v"): (-0.3401801, 0.2071437, -0.8801671),
}


@pytest.fixture(scope="module")
def process():
    return GaussianDiffusion.from_config("cosine", 1000, "x0")


def pixels(*values):
    return torch.tensor(values).view(1, -1, 1, 1)


# Schedules


def test_linear_schedule_is_the_papers_and_scales_with_t():
    assert_close(
        linear_beta_schedule(),
        torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64),
        rtol=0,
        atol=0,
    )
    assert linear_beta_schedule(100)[[0, -1]].tolist() == pytest.approx([1e-3, 0.2])
    assert len(linear_beta_schedule(21)) == 21


@pytest.mark.parametrize("timesteps", [1, 5, 10, 20])
def test_linear_schedule_of_few_steps_is_refused(timesteps):
    with pytest.raises(ValueError, match=rf"timesteps is {timesteps}: .*more than 20.*cosine"):
        linear_beta_schedule(timesteps)


def test_cosine_schedule_is_the_papers():
    betas = cosine_beta_schedule(50)
    alpha_bar = torch.cumprod(1 - betas, 0)

    def f(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 10, 30, 48):
        assert alpha_bar[t].item() == pytest.approx(f((t + 1) / 50) / f(0), rel=1e-10)
    assert betas[-1] == 0.999
    assert cosine_beta_schedule(1).tolist() == [0.999]
    assert cosine_beta_schedule(10, s=0.1)[0] > 2 * cosine_beta_schedule(10)[0] * 0.9
    assert betas.dtype == torch.float64


def test_the_straight_schedule_is_that_of_flow_matchings_path():
    betas = straight_beta_schedule()
    alpha_bar = torch.cumprod(1 - betas, 0)
    for t in (0, 1, 250, 998):
        signal, noise = 1 - (t + 1) / 1000, (t + 1) / 1000
        expected = signal**2 / (signal**2 + noise**2)
        assert alpha_bar[t].item() == pytest.approx(expected, rel=1e-10)
    assert len(betas) == 1000 and 0 < betas[-1] < 1 and alpha_bar[-1] < 1e-9
    assert betas.dtype == torch.float64


@pytest.mark.parametrize("bad", [0, -1, True, 2.0, None, "10"])
def test_timesteps_must_be_a_positive_integer(bad):
    for schedule in (linear_beta_schedule, cosine_beta_schedule):
        with pytest.raises(ValueError, match="timesteps is .*integer of at least 1"):
            schedule(bad)
    with pytest.raises(ValueError, match="timesteps is"):
        GaussianDiffusion.from_config("cosine", bad)


def test_integers():
    assert check_integer("n", np.int64(3), 1, 3) == 3
    assert type(check_integer("n", np.int32(3))) is int
    assert check_integer("n", -5) == -5
    assert check_integer("n", 1, 1) == 1
    assert check_integer("n", 5, high=5) == 5
    for value in (0, 4, True, np.True_, 1.0, None):
        with pytest.raises(ValueError, match=r"n is .*: it must be an integer in 1\.\.3"):
            check_integer("n", value, 1, 3)
    with pytest.raises(ValueError, match="n is 0: it must be an integer of at least 1$"):
        check_integer("n", 0, 1)
    with pytest.raises(ValueError, match="n is None: it must be an integer$"):
        check_integer("n", None)
    assert len(cosine_beta_schedule(np.int64(7))) == 7


# Construction


@pytest.mark.parametrize("betas", [[], [0.1, 0.0], [0.1, 1.0], [[0.1]], [math.nan], [-0.1]])
def test_betas_must_lie_between_0_and_1(betas):
    with pytest.raises(ValueError, match="betas must be one row"):
        GaussianDiffusion(betas)


def test_unknown_names_are_refused_with_the_allowed_ones():
    with pytest.raises(ValueError, match="unknown prediction 'x': choose one of eps, v, x0"):
        GaussianDiffusion.from_config(prediction="x")
    with pytest.raises(ValueError, match="unknown variance 'x': choose one of posterior, learned"):
        GaussianDiffusion.from_config(variance="x")
    with pytest.raises(ValueError, match="unknown schedule 'x': choose one of linear, cosine"):
        GaussianDiffusion.from_config("x")
    with pytest.raises(ValueError, match="unknown spacing 'x': choose one of uniform, lambda, kar"):
        GaussianDiffusion.from_config().respace(3, "x")


@pytest.mark.parametrize("bad", [[0], [1, 1], [1, 0], [-1, 1], [0.0, 1.0], [[0, 1]]])
def test_timestep_map_must_rise(bad):
    with pytest.raises(ValueError, match="timestep_map must be 2 rising integers"):
        GaussianDiffusion([0.1, 0.2], timestep_map=bad)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["posterior", "learned"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", [0.1, 0.25, 1 / 3]])
def test_config_makes_the_same_process_again_by_way_of_json(schedule, variance, prediction):
    timesteps = 30 if isinstance(schedule, str) else 3
    process = GaussianDiffusion.from_config(schedule, timesteps, prediction, variance)
    config = json.loads(json.dumps(process.config))
    assert config == {
        "schedule": schedule,
        "timesteps": timesteps,
        "prediction": prediction,
        "variance": variance,
    }
    again = GaussianDiffusion.from_config(**config)
    assert torch.equal(again.exact_betas, process.exact_betas)
    assert (again.prediction, again.variance) == (prediction, variance)


def test_config_of_a_respaced_process_keeps_its_timesteps():
    respaced = GaussianDiffusion.from_config("cosine", 100, "v").respace(7, "lambda")
    config = json.loads(json.dumps(respaced.config))
    again = GaussianDiffusion.from_config(**config)
    assert again.config == config
    assert torch.equal(again.exact_betas, respaced.exact_betas)
    assert torch.equal(again.timestep_map, respaced.timestep_map)


def test_defaults_are_those_of_the_series_and_few_betas_are_named_too():
    assert GaussianDiffusion.from_config().config == {
        "schedule": "cosine",
        "timesteps": 1000,
        "prediction": "x0",
        "variance": "posterior",
    }
    assert GaussianDiffusion.from_config("cosine", 5).config["schedule"] == "cosine"
    assert GaussianDiffusion([0.5]).prediction == "eps"
    with pytest.raises(ValueError, match="schedule has 2 betas, but timesteps is 3"):
        GaussianDiffusion.from_config([0.1, 0.2], 3)


def test_tables_are_buffers_but_no_part_of_the_state():
    process = GaussianDiffusion([0.1, 0.2])
    assert process.state_dict() == {}
    assert process.to(torch.device("meta")).betas.device.type == "meta"
    assert {b.dtype for n, b in process.named_buffers() if n != "timestep_map"} == {torch.float32}


def test_tables_by_hand():
    process = GaussianDiffusion([0.1, 0.2, 0.5])
    bar = [0.9, 0.72, 0.36]
    assert process.alphas.tolist() == pytest.approx([0.9, 0.8, 0.5])
    assert process.alphas_cumprod.tolist() == pytest.approx(bar)
    assert process.alphas_cumprod_prev.tolist() == pytest.approx([1, *bar[:2]])
    assert process.sqrt_alphas_cumprod.tolist() == pytest.approx([b**0.5 for b in bar])
    assert process.sqrt_one_minus_alphas_cumprod.tolist() == pytest.approx(
        [(1 - b) ** 0.5 for b in bar]
    )
    assert process.sigmas.tolist() == pytest.approx([((1 - b) / b) ** 0.5 for b in bar])
    variance = [0, 0.2 * 0.1 / 0.28, 0.5 * 0.28 / 0.64]
    assert process.posterior_variance.tolist() == pytest.approx(variance)
    logs = [math.log(v) for v in (variance[1], *variance[1:])]
    assert process.posterior_log_variance.tolist() == pytest.approx(logs)
    assert GaussianDiffusion([0.5]).posterior_log_variance.tolist() == pytest.approx(
        [math.log(0.5)]
    )


# Closed forms


def test_posterior_is_bayes_rule():
    """Multiply q(x_t | x_{t-1}) and q(x_{t-1} | x_0) on a grid, and compare the moments."""
    process = GaussianDiffusion([0.1, 0.2, 0.5])
    x_0, x_t = 0.5, -0.8
    grid = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    prior = -((grid - 0.72**0.5 * x_0) ** 2) / (2 * (1 - 0.72))
    likelihood = -((x_t - 0.5**0.5 * grid) ** 2) / (2 * 0.5)
    weight = (prior + likelihood).exp()
    weight /= weight.sum()
    mean = (weight * grid).sum()
    variance = (weight * (grid - mean) ** 2).sum()
    found = process.q_posterior_mean_variance(
        torch.tensor([x_0]), torch.tensor([x_t]), torch.tensor([2])
    )
    assert_close(found[0].double(), mean[None], atol=1e-6, rtol=0)
    assert_close(found[1].double(), variance[None], atol=1e-6, rtol=0)


def test_q_sample_is_the_chain_of_single_steps():
    """Mean and variance of x_t after three single steps, against the jump's coefficients."""
    process = GaussianDiffusion([0.1, 0.2, 0.5])
    mean, variance = 1.0, 0.0
    for beta in (0.1, 0.2, 0.5):
        mean, variance = (1 - beta) ** 0.5 * mean, (1 - beta) * variance + beta
    one, zero, t = torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([2])
    assert process.q_sample(one, t, zero).item() == pytest.approx(mean)
    assert process.q_sample(zero, t, one).item() == pytest.approx(variance**0.5)
    half = process.q_sample(one.half(), t, one.bfloat16())
    assert half.dtype == torch.float32


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_predicts_the_start(prediction):
    process = GaussianDiffusion.from_config("linear", 1000, prediction)
    x_0, noise = torch.rand(5, 3, 4, 4) * 2 - 1, torch.randn(5, 3, 4, 4)
    t = torch.tensor([0, 1, 250, 700, 999])
    x_t = process.q_sample(x_0, t, noise)
    target = process.training_target(x_0, t, noise)
    assert_close(process.predict_start(x_t, t, target), x_0, atol=2e-4, rtol=0)
    assert_close(process.predict_noise_from_start(x_t, t, x_0), noise, atol=2e-3, rtol=0)
    half = process.training_target(x_0.half(), t, noise.half())
    assert half.dtype == torch.float32
    assert process.predict_start(x_t.half(), t, target.half()).dtype == torch.float32


def test_targets_by_hand():
    """At alpha_bar = 0.36: v = 0.6 eps - 0.8 x_0 for x_0 = 1, eps = 2."""
    x_0, noise, t = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([0])
    wanted = {"eps": 2.0, "v": 0.4, "x0": 1.0}
    for prediction, value in wanted.items():
        process = GaussianDiffusion([0.64], prediction)
        assert process.training_target(x_0, t, noise).item() == pytest.approx(value)
        start = process.predict_start(torch.tensor([2.2]), t, torch.tensor([value]))
        assert start.item() == pytest.approx(1.0)


def test_signal_to_noise_ratio(process):
    t = torch.tensor([0, 500, 999])
    alpha_bar = process.exact_alphas_cumprod[t]
    assert_close(
        process.signal_to_noise_ratio(t).double(), alpha_bar / (1 - alpha_bar), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(("schedule", "prediction"), DIFFUSERS_MEANS)
def test_means_and_variances_are_those_of_diffusers(schedule, prediction):
    process = GaussianDiffusion.from_config(schedule, 1000, prediction).respace(20)
    t = torch.tensor([13])
    assert process.timestep_map[13] == 699
    x_start = process.predict_start(pixels(*X_T), t, pixels(*OUTPUT)).clamp(-1, 1)
    start = DIFFUSERS_STARTS.get((schedule, prediction), OUTPUT)
    assert_close(x_start, pixels(*start), atol=2e-5, rtol=0)
    mean, variance = process.q_posterior_mean_variance(x_start, pixels(*X_T), t)
    assert_close(mean, pixels(*DIFFUSERS_MEANS[schedule, prediction]), atol=2e-5, rtol=0)
    assert variance.item() == pytest.approx(DIFFUSERS_VARIANCES[schedule], abs=2e-6)


# Learned variance


def test_learned_variance_lies_between_beta_tilde_and_beta():
    process = GaussianDiffusion([0.1, 0.2, 0.5], variance="learned")
    x, t = torch.zeros(1, 1, 1, 1), torch.tensor([2])
    low, high = math.log(0.5 * 0.28 / 0.64), math.log(0.5)
    for fraction, wanted in ((-1, low), (1, high), (0, (low + high) / 2), (None, low)):
        fraction = None if fraction is None else torch.full((1, 1, 1, 1), float(fraction)).half()
        found = process.p_log_variance(x, t, fraction)
        assert found.item() == pytest.approx(wanted, rel=1e-5)
        assert found.dtype == torch.float32


def test_output_is_split_only_where_the_variance_is_learned():
    x, output = torch.zeros(2, 3, 1, 1), torch.arange(12.0).view(2, 6, 1, 1)
    fixed, learned = (GaussianDiffusion([0.1], variance=v) for v in ("posterior", "learned"))
    prediction, fraction = learned.split_output(output, x)
    assert torch.equal(prediction, output[:, :3])
    assert torch.equal(fraction, output[:, 3:])
    assert fixed.split_output(x, x) == (x, None)
    with pytest.raises(ValueError, match=r"6 output channels.*need 3: build UNet\(out_channels=3"):
        fixed.split_output(output, x)
    with pytest.raises(ValueError, match=r"3 output channels.*need 6: build UNet\(out_channels=6"):
        learned.split_output(x, x)


# t


@pytest.mark.parametrize("t", [[-1], [3], [0, 5]])
def test_t_out_of_range_is_refused(t):
    process = GaussianDiffusion([0.1, 0.2, 0.3])
    message = rf"t runs from {min(t)} to {max(t)}, outside 0\.\.2"
    with pytest.raises(ValueError, match=message):
        process.q_sample(torch.zeros(len(t), 1), torch.tensor(t), torch.zeros(len(t), 1))


@pytest.mark.parametrize(
    "t", [torch.tensor([0.0]), torch.tensor([0], dtype=torch.int32), torch.tensor(0)]
)
def test_t_must_be_a_row_of_int64(t):
    with pytest.raises(ValueError, match="t must be an int64 tensor of shape"):
        GaussianDiffusion([0.1]).signal_to_noise_ratio(t)


def test_extract_gives_one_entry_per_image():
    process = GaussianDiffusion([0.1, 0.2, 0.3])
    found = process.extract(process.betas, torch.tensor([2, 0]), 4)
    assert found.shape == (2, 1, 1, 1)
    assert found.flatten().tolist() == pytest.approx([0.3, 0.1])
    assert process.extract(process.betas, torch.tensor([], dtype=torch.int64), 2).shape == (0, 1)


# Fewer steps


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 999, 1000])
def test_respaced_processes_visit_distinct_timesteps_and_keep_alpha_bar(process, steps, spacing):
    respaced = process.respace(steps, spacing)
    kept = respaced.timestep_map
    assert kept.shape == (steps,)
    assert kept[-1] == 999
    assert kept[0] >= 0
    assert (kept.diff() > 0).all()
    assert_close(
        respaced.exact_alphas_cumprod, process.exact_alphas_cumprod[kept], rtol=1e-6, atol=0
    )
    assert respaced.config["prediction"] == "x0"


@pytest.mark.parametrize("spacing", SPACINGS)
def test_all_timesteps_are_the_process_itself(process, spacing):
    assert process.respace(1000, spacing).timestep_map.tolist() == list(range(1000))


def test_uniform_spacing_is_trailing(process):
    assert process.spaced_timesteps(20).tolist() == list(range(49, 1000, 50))
    assert process.spaced_timesteps(3).tolist() == [332, 666, 999]


def test_lambda_and_karras_spacing_are_even_in_their_own_measure():
    """Between the noise level 80 and t = 0, on a fine grid so that rounding is small."""
    process = GaussianDiffusion.from_config("cosine", 100_000)
    sigma = process.sigmas.double()
    for spacing, measure in (("lambda", torch.log), ("karras", lambda s: s ** (1 / 7))):
        kept = process.spaced_timesteps(15, spacing)
        assert kept[0] == 0
        levels = measure(sigma[kept])
        levels[-1] = measure(torch.tensor(80.0))
        steps = levels.diff()
        assert_close(steps, steps.mean().expand(14), rtol=0.05, atol=0)
    low = GaussianDiffusion([0.1, 0.2, 0.3, 0.4, 0.5])  # its noise never reaches 80
    assert low.spaced_timesteps(3, "lambda").tolist() == [0, 2, 4]


@pytest.mark.parametrize("steps", [10, 20, 35])
def test_spacing_matches_the_papers_formulas(steps):
    """Karras et al. 2022, eq. 5 with rho = 7, and Lu et al. 2022, between sigma_0 and 80."""
    process = GaussianDiffusion.from_config("linear", 1000)
    sigma = process.sigmas.double()
    for spacing, there, back in (
        ("karras", lambda s: s ** (1 / 7), lambda r: r**7),
        ("lambda", math.log, math.exp),
    ):
        low, high = there(sigma[0].item()), there(80.0)
        levels = [back(low + i / (steps - 1) * (high - low)) for i in range(steps - 1)]
        measured = torch.tensor([there(s) for s in sigma.tolist()])
        nearest = [int((measured - there(level)).abs().argmin()) for level in levels]
        kept = process.spaced_timesteps(steps, spacing).tolist()
        for i in range(1, steps - 1):  # each timestep once: the next one is taken instead
            nearest[i] = max(nearest[i], nearest[i - 1] + 1)
        assert kept == [*nearest, 999], spacing


@pytest.mark.parametrize("steps", [0, -1, 11, True, 2.0, None])
def test_steps_must_be_in_range(steps):
    process = GaussianDiffusion.from_config("cosine", 10)
    for spacing in SPACINGS:
        with pytest.raises(ValueError, match=r"steps is .*integer in 1\.\.10"):
            process.respace(steps, spacing)


def test_respacing_twice_keeps_the_original_timesteps_and_options():
    process = GaussianDiffusion.from_config("cosine", 100, "v", "learned")
    twice = process.respace(10).respace(5)
    assert twice.timestep_map.tolist() == [19, 39, 59, 79, 99]
    assert (twice.prediction, twice.variance) == ("v", "learned")
