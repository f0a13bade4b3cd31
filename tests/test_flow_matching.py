"""The straight path against closed forms, against Gaussian diffusion, and against bad input."""

import math
import shutil
from collections import deque

import pytest
import torch
from tiny import network, start
from torch import nn
from torch.testing import assert_close

from noisout_nb import training
from noisout_nb.checkpoints import load_model, publish, read_card
from noisout_nb.data import load_data, to_float
from noisout_nb.evaluation import petal_count
from noisout_nb.flow_matching import (
    AsVelocity,
    StraightPath,
    flow_euler,
    flow_heun,
    flow_matching_loss,
    rectified_pairs,
)
from noisout_nb.forward_process import PREDICTIONS, GaussianDiffusion
from noisout_nb.guidance import ClassifierFreeGuidance
from noisout_nb.losses import loss_terms
from noisout_nb.profiles import PROFILES
from noisout_nb.sampling import SAMPLERS, State, ddim

STD = 0.2  # of the data N(0, STD^2) whose velocity is known
PATH = StraightPath()
T = PATH.timesteps


class ExactVelocity(nn.Module):
    """E[eps - x_0 | x_s] for data N(0, STD^2), times `factor`; counts its calls."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.factor, self.seen = factor, []

    def forward(self, x, t, y=None):
        self.seen.append(int(t[0]))
        s = ((t + 1) / T).double().view(-1, *[1] * (x.ndim - 1))
        gain = (s - (1 - s) * STD**2) / ((1 - s) ** 2 * STD**2 + s**2)
        return self.factor * gain * x.double()


class Small(nn.Module):
    """A cheap network with dropout and labels; its output depends on x, t and y of its image."""

    num_classes = null_label = 4

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Dropout(0.5))

    def forward(self, x, t, y=None):
        shift = t.float() / T + (0 if y is None else y.float())
        return (self.layer(x) + 0.1 * shift.view(-1, 1, 1, 1)).tanh()


def images(count=T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.rand(count, 3, 4, 4, generator=generator) * 2 - 1
    return x_0, torch.randn(x_0.shape, generator=generator)


def radius(s):
    return ((1 - s) ** 2 + s**2) ** 0.5


# The path


def test_the_path_is_a_straight_line_from_image_to_noise():
    x_0, eps = images()
    t = torch.arange(T)
    x = PATH.q_sample(x_0, t, eps)
    assert_close(x[-1], eps[-1])
    assert_close(x[249], 0.75 * x_0[249] + 0.25 * eps[249])
    assert_close(PATH.predict_start(x, t, eps - x_0), x_0, atol=1e-6, rtol=0)


def test_levels_are_logit_normal():
    t = PATH.draw(100_000, mean=0.5, std=0.8, generator=torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() < T
    s = (t + 0.5) / T  # the middle of each level
    assert_close(s.logit().mean().item(), 0.5, atol=0.02, rtol=0)
    assert_close(s.logit().std().item(), 0.8, atol=0.02, rtol=0)


def test_levels_stay_in_range_at_both_ends():
    for mean in (-50.0, 50.0):
        t = PATH.draw(10, mean=mean)
        assert t.tolist() == 10 * [0 if mean < 0 else T - 1]


# It is a Gaussian diffusion


def test_it_is_a_gaussian_diffusion_and_its_target_v_turned():
    process = PATH.as_diffusion()
    x_0, eps = images()
    t = torch.arange(T)
    s = ((t + 1) / T).view(-1, 1, 1, 1)
    x_s, v = PATH.q_sample(x_0, t, eps), process.predict_v(x_0, t, eps)
    assert_close(process.q_sample(x_0, t, eps), x_s / radius(s), atol=1e-5, rtol=0)
    assert_close(v / radius(s) + (2 * s - 1) / radius(s) ** 2 * x_s, eps - x_0, atol=1e-5, rtol=0)
    # x_t and v are x_0 and eps turned by phi, and the velocity is v turned on to 45 degrees
    turn = (process.exact_alphas_cumprod.sqrt().acos() - math.pi / 4).view(-1, 1, 1, 1)
    turned = math.sqrt(2) * (turn.cos() * v + turn.sin() * x_s / radius(s))
    assert_close(turned.float(), eps - x_0, atol=1e-5, rtol=0)


def test_the_loss_is_a_weighted_loss_of_v():
    x_0, eps = images(64)
    t = PATH.draw(64, generator=torch.Generator().manual_seed(1))
    s = PATH.level(t, 4)

    def velocity(x, t, y=None):
        return 0.3 * x.sin() + 0.1

    def v(x_t, t, y=None):
        return radius(s) * velocity(radius(s) * x_t, t) - (2 * s - 1) * x_t

    terms = loss_terms(v, PATH.as_diffusion("v"), x_0, t, eps) / radius(s).flatten() ** 2
    assert_close(
        flow_matching_loss(velocity, PATH, x_0, t, eps), terms.mean(), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_train_s_loss_is_flow_matching_s(prediction):
    process, model = PATH.as_diffusion(prediction), Small().eval()
    assert process.config["schedule"] == "straight"
    x_0, eps = images(64)
    t, y = torch.arange(64) * 15 + 9, torch.arange(64) % 4
    terms = loss_terms(model, process, x_0, t, eps, y, weighting="flow")
    flow = AsVelocity(model, process, PATH)
    for chosen in (slice(0, 8), slice(28, 36), slice(56, 64)):  # each end and the middle
        found = flow_matching_loss(flow, PATH, x_0[chosen], t[chosen], eps[chosen], y[chosen])
        assert_close(terms[chosen].mean(), found, atol=0, rtol=1e-4)


@pytest.mark.parametrize("density, spread", [("uniform", math.pi / 3**0.5), ("logit-normal", 1.0)])
def test_train_draws_timesteps_as_told(density, spread, monkeypatch):
    drawn = []

    def record(model, process, x_start, t, *others, **options):
        drawn.append(t)
        return loss_terms(model, process, x_start, t, *others, **options)

    monkeypatch.setattr(training, "loss_terms", record)
    options = {"timestep_density": density, "weighting": "flow", "steps": 60}
    with start(process=PATH.as_diffusion("x0"), batches={"batch_size": 16}, **options) as run:
        deque(run, maxlen=0)
    logit = ((torch.cat(drawn) + 0.5) / T).logit()  # the logistic distribution, or the normal one
    assert_close(logit.std().item(), spread, atol=0.12, rtol=0)
    assert abs(logit.mean()) < 0.2


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 7, 40])
def test_euler_is_ddim(prediction, steps):
    process, model = PATH.as_diffusion(prediction), Small()
    flow, (_, noise), y = AsVelocity(model, process, PATH), images(4), torch.tensor([0, 1, 2, 3])
    theirs = list(ddim(model, process, noise, y, steps=steps))
    ours = list(flow_euler(flow, PATH, noise, y, steps=steps))
    visited = [state.t for state in ours]
    assert [state.t for state in theirs] == visited and len(ours) == steps
    ends = [(t + 1) / T for t in visited[1:]] + [0.0]
    # predicting the noise leaves x_0 undetermined where there is no signal: clipping decides it
    for s, a, b in zip(ends, theirs, ours, strict=True):
        if prediction != "eps":
            assert_close(a.x, b.x / radius(s), atol=1e-5, rtol=0)
            assert_close(a.x_start, b.x_start, atol=1e-5, rtol=0)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_diffusion_network_is_told_the_nearest_noise_level(schedule):
    process = GaussianDiffusion.from_config(schedule, prediction="x0")
    flow = AsVelocity(Small(), process, PATH)
    s = torch.arange(1, T, dtype=torch.float64) / T
    angle = torch.atan2(s, 1 - s)
    angles = process.exact_alphas_cumprod.sqrt().acos()
    nearest = (angle[:, None] - angles).abs().argmin(1)
    assert torch.equal(flow.matched[:-1], nearest)
    assert flow.matched[-1] == T - 1


def test_the_velocity_is_the_direction_away_from_the_predicted_image():
    process, model = GaussianDiffusion.from_config(), Small().eval()
    flow, (x_0, noise), t = (
        AsVelocity(model, process, PATH),
        images(4),
        torch.tensor([9, 99, 499, 999]),
    )
    x, s = PATH.q_sample(x_0, t, noise), PATH.level(t, 4)
    predicted = model(x / radius(s), flow.matched[t])
    assert_close(PATH.predict_start(x, t, flow(x, t)), predicted, atol=1e-5, rtol=0)


def test_training_the_velocity_trains_the_network():
    model = network()
    nn.init.normal_(model.conv_out.weight, std=0.1)
    flow = AsVelocity(model, GaussianDiffusion.from_config(), PATH)
    x_0 = torch.rand(4, 3, 16, 16) * 2 - 1
    loss = flow_matching_loss(flow, PATH, x_0, PATH.draw(4), torch.randn_like(x_0))
    loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_guidance_takes_a_flow():
    flow = AsVelocity(Small(), GaussianDiffusion.from_config(), PATH)
    (_, noise), y = images(2), torch.tensor([0, 2])
    *_, plain = flow_euler(flow, PATH, noise, y, steps=3)
    *_, same = flow_euler(ClassifierFreeGuidance(flow, 1.0), PATH, noise, y, steps=3)
    *_, more = flow_euler(ClassifierFreeGuidance(flow, 2.0), PATH, noise, y, steps=3)
    assert_close(same.x, plain.x, atol=1e-5, rtol=0)
    assert not torch.allclose(more.x, plain.x, atol=1e-3)


# The flow in models/, and the diffusion network of the same size

QUICK = PROFILES["quick"].published
FLOW = QUICK.with_name("quick_flow.pth")


def test_the_shipped_flow_s_card_says_how_it_was_trained():
    card, diffusion = read_card(FLOW), read_card(QUICK)
    assert card["process"] == PATH.as_diffusion("x0").config
    known = [card[name] for name in ("weighting", "max_weight", "timestep_density")]
    assert known == ["flow", None, "logit-normal"]
    for name in ("steps", "network", "classes"):  # equal work
        assert card[name] == diffusion[name]


def test_the_shipped_flow_flows_to_flowers():
    held_out = load_data(PROFILES["quick"], "val")
    x_0, y = to_float(held_out.images[:64]), held_out.labels[:64]
    generator = torch.Generator().manual_seed(0)
    t, eps = PATH.draw(64, generator=generator), torch.randn(x_0.shape, generator=generator)
    model, process, _ = load_model(FLOW)
    flow = AsVelocity(model, process, PATH)
    assert torch.equal(flow.matched, torch.arange(T))
    with torch.no_grad():
        assert flow_matching_loss(flow, PATH, x_0, t, eps, y) < 0.06
    y = torch.arange(12) % 6
    *_, last = flow_euler(flow, PATH, eps[:12], y, steps=16)
    petals = torch.stack([held_out.factors["petals"][held_out.labels == k][0] for k in range(6)])
    assert (petal_count(last.x.clamp(-1, 1)) == petals[y]).sum() >= 11


def test_the_shipped_flow_never_takes_the_diffusion_network_s_place(tmp_path, capsys):
    target = shutil.copy(QUICK, tmp_path / "quick_model.pth")
    assert not publish(FLOW, target)
    assert "schedule" in capsys.readouterr().out
    assert target.read_bytes() == QUICK.read_bytes()


# The loss


def test_the_mean_velocity_has_the_least_loss():
    generator = torch.Generator().manual_seed(0)
    x_0 = STD * torch.randn(100_000, 1, generator=generator)
    eps = torch.randn(100_000, 1, generator=generator)
    t = torch.randint(T, (100_000,), generator=generator)
    s = ((t + 1) / T).double()[:, None]
    least = (STD**2 / ((1 - s) ** 2 * STD**2 + s**2)).mean()  # Var(eps - x_0 | x_s)
    loss = {
        f: flow_matching_loss(ExactVelocity(f), PATH, x_0, t, eps).item() for f in (0.9, 1, 1.1)
    }
    assert_close(loss[1], least.item(), atol=0, rtol=0.02)
    assert loss[1] < loss[0.9] and loss[1] < loss[1.1]


# The samplers


@pytest.mark.parametrize("sampler, order", [(flow_euler, 1), (flow_heun, 2)])
def test_samplers_have_their_order(sampler, order):
    noise = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
    error = {}
    for steps in (50, 100):
        *_, last = sampler(ExactVelocity(), PATH, noise, steps=steps, clip=False)
        error[steps] = (last.x - STD * noise).square().mean().sqrt().item()
    assert abs(math.log2(error[50] / error[100]) - order) < 0.15


@pytest.mark.parametrize("sampler, calls", [(flow_euler, 5), (flow_heun, 9)])
def test_samplers_visit_even_levels_and_yield_states(sampler, calls):
    model = ExactVelocity()
    states = list(sampler(model, PATH, torch.randn(3, 2), steps=5))
    assert all(isinstance(state, State) for state in states)
    assert [state.t for state in states] == [999, 799, 599, 399, 199]
    assert len(model.seen) == calls and set(model.seen) == {999, 799, 599, 399, 199}
    assert states[-1].x.dtype == torch.float32 and states[-1].x.shape == (3, 2)


def test_clipping_keeps_predicted_images_in_range():
    noise = 3 * torch.randn(50, 1)
    clipped = list(flow_euler(ExactVelocity(2.0), PATH, noise, steps=4))
    free = list(flow_euler(ExactVelocity(2.0), PATH, noise, steps=4, clip=False))
    assert all(state.x_start.abs().max() <= 1 for state in clipped)
    assert_close(clipped[-1].x, clipped[-1].x_start, atol=1e-6, rtol=0)
    assert free[0].x_start.abs().max() > 1


def test_networks_are_called_in_eval_mode_and_keep_their_own():
    model = Small().train()
    a, b = (list(flow_heun(model, PATH, torch.ones(2, 3, 4, 4), steps=3))[-1].x for _ in range(2))
    assert torch.equal(a, b) and model.layer[1].training


def test_rectified_pairs_are_where_the_flow_ends_whatever_the_batches():
    noise = torch.randn(7, 1, generator=torch.Generator().manual_seed(0))
    ends = rectified_pairs(ExactVelocity(), PATH, noise, steps=100, clip=False, batch_size=3)
    assert_close(ends, STD * noise, atol=2e-3, rtol=0)
    noise, y = torch.randn(5, 3, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    whole, parts = (
        rectified_pairs(Small(), PATH, noise, y, steps=3, batch_size=size) for size in (5, 2)
    )
    assert_close(whole, parts)


def test_flows_and_diffusion_samplers_meet_on_one_process():
    """The straight path as a process: every sampler of stage 5 runs on it."""
    process = PATH.as_diffusion("v")
    for sampler in SAMPLERS.values():
        *_, last = sampler(Small(), process, torch.randn(2, 3, 4, 4), steps=6)
        assert last.x.isfinite().all() and last.x.abs().max() <= 1.01


# Bad input

NOISE = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize("sampler", [flow_euler, flow_heun])
@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1001}, r"steps is 1001.*1\.\.1000"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"x_T": torch.zeros(0, 3, 4, 4)}, "at least one image"),
        ({"x_T": torch.zeros(3)}, "must be float"),
        ({"x_T": torch.zeros(2, 3, 4, 4).long()}, "int64"),
        ({"x_T": [0.0]}, "must be a tensor"),
        ({"y": torch.zeros(3).long()}, "y is"),
        ({"y": torch.zeros(2)}, "y is"),
        ({"y": [0, 1]}, "must be a tensor"),
        ({"y": torch.tensor([0, 9])}, "labels run"),
    ],
)
def test_samplers_refuse(sampler, arguments, words):
    arguments = {"x_T": NOISE, "steps": 2} | arguments
    with pytest.raises(ValueError, match=words):
        list(sampler(Small(), PATH, **arguments))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: StraightPath(1), "timesteps is 1"),
        (lambda: StraightPath(2.5), "timesteps is 2.5"),
        (lambda: PATH.q_sample(NOISE, torch.tensor([0, 1000]), NOISE), "1000"),
        (lambda: PATH.q_sample(NOISE, torch.tensor([-1, 0]), NOISE), "-1"),
        (lambda: PATH.q_sample(NOISE, torch.tensor([0.5, 0.5]), NOISE), "float32"),
        (lambda: PATH.draw(0), "count is 0"),
        (lambda: PATH.draw(3, std=0.0), "std 0.0"),
        (lambda: PATH.draw(3, mean=math.nan), "mean is nan"),
        (lambda: PATH.as_diffusion("velocity"), "unknown prediction"),
        (lambda: start(timestep_density="normal"), "unknown timestep_density 'normal'.*logit-n"),
        (
            lambda: flow_matching_loss(Small(), PATH, NOISE, torch.tensor([0, 1]), NOISE[:1]),
            "one shape",
        ),
        (lambda: flow_matching_loss(Small(), PATH, NOISE, torch.tensor([0]), NOISE), "t"),
        (
            lambda: AsVelocity(Small(), GaussianDiffusion.from_config(variance="learned"), PATH),
            "learned variance",
        ),
        (lambda: rectified_pairs(Small(), PATH, NOISE, batch_size=0), "batch_size is 0"),
        (lambda: rectified_pairs(Small(), PATH, NOISE[:0]), "at least one image"),
        (lambda: rectified_pairs(Small(), PATH, NOISE, torch.tensor([0])), "y is"),
    ],
)
def test_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
