"""Guidance: closed forms on Gaussians, the interval's calls, and what is refused."""

import math

import pytest
import torch
from cells import cell
from torch import nn
from torch.testing import assert_close

from noisout_nb.forward_process import PREDICTIONS, GaussianDiffusion
from noisout_nb.guidance import (
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    NoisyClassifier,
)
from noisout_nb.sampling import ddim, dpm_solver, predict, sample


class Labelled(nn.Module):
    """A network with 3 labels whose output is a different linear function of x for each of them."""

    def __init__(self, channels=3):
        super().__init__()
        self.num_classes = self.null_label = 3
        self.channels = channels
        self.batches = []

    def forward(self, x, t, y=None):
        self.batches.append(len(x))
        y = torch.full_like(t, 3) if y is None else y
        factor = torch.tensor([1.0, 2.0, 3.0, 0.5])[y].view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1)
        return (factor * x).repeat(1, self.channels // 3, 1, 1)


@pytest.fixture
def process():
    return GaussianDiffusion.from_config("cosine", 1000, "x0")


@pytest.fixture
def inputs():
    x = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([5, 500, 900]), torch.tensor([0, 1, 2])


# Classifier-free


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, -1.0])
def test_classifier_free_formula(inputs, scale):
    x, t, y = inputs
    model = Labelled()
    conditional, unconditional = model(x, t, y), model(x, t)
    model.batches.clear()
    found = ClassifierFreeGuidance(model, scale)(x, t, y)
    assert_close(found, unconditional + scale * (conditional - unconditional))
    assert model.batches == [6]


def test_one_call_where_there_is_nothing_to_guide(inputs):
    x, t, y = inputs
    model = Labelled()
    assert torch.equal(ClassifierFreeGuidance(model, 1.0)(x, t, y), model(x, t, y))
    assert torch.equal(ClassifierFreeGuidance(model, 5.0)(x, t), model(x, t))
    assert model.batches == [3, 3, 3, 3]


def test_one_scale_per_image(inputs):
    x, t, y = inputs
    model = Labelled()
    found = ClassifierFreeGuidance(model, torch.tensor([0.0, 1.0, 4.0]))(x, t, y)
    for i, scale in enumerate((0.0, 1.0, 4.0)):
        wanted = ClassifierFreeGuidance(model, scale)(x, t, y)
        assert_close(found[i], wanted[i])


def test_only_the_prediction_is_guided(inputs):
    x, t, y = inputs
    model = Labelled(channels=6)
    found = ClassifierFreeGuidance(model, 3.0, rescale=0.5)(x, t, y)
    plain = ClassifierFreeGuidance(Labelled(), 3.0, rescale=0.5)(x, t, y)
    assert_close(found[:, :3], plain)
    assert_close(found[:, 3:], model(x, t, y)[:, 3:])


def test_interval_guides_inside_with_two_and_outside_with_one_call(process, inputs):
    x, _, y = inputs
    model = Labelled()
    sigma = process.sigmas.tolist()
    low, high = sigma[300], sigma[600]
    limited = ClassifierFreeGuidance(model, 3.0, process=process, interval=(low, high))
    always = ClassifierFreeGuidance(model, 3.0)
    for step, inside in ((0, False), (300, False), (301, True), (600, True), (601, False)):
        t = torch.full((3,), step)
        model.batches.clear()
        found = limited(x, t, y)
        assert model.batches == ([6] if inside else [3]), step
        assert_close(found, always(x, t, y) if inside else model(x, t, y))
    mixed = limited(x, torch.tensor([0, 450, 999]), y)
    assert_close(mixed[0], model(x, torch.zeros(3, dtype=torch.int64), y)[0])
    assert_close(mixed[1], always(x, torch.full((3,), 450), y)[1])
    everywhere = ClassifierFreeGuidance(model, 3.0, process=process, interval=(0, math.inf))
    t = torch.tensor([0, 450, 999])
    assert torch.equal(everywhere(x, t, y), always(x, t, y))
    no_interval = ClassifierFreeGuidance(model, 3.0, process=process)
    assert torch.equal(no_interval(x, t, y), always(x, t, y))


def test_interval_in_a_respaced_sampler_counts_original_timesteps(process, inputs):
    x, _, y = inputs
    model = Labelled()
    interval = (process.sigmas[100].item(), process.sigmas[500].item())
    guided = ClassifierFreeGuidance(model, 2.0, process=process, interval=interval)
    for state in ddim(guided, process, x, y, steps=10):
        wanted = 6 if 100 < state.t <= 500 else 3
        assert model.batches[-1] == wanted, state.t
    assert model.batches.count(6) == 4


@pytest.mark.parametrize("interval", [(1.0, 1.0), (2.0, 1.0), (-1.0, 2.0), (math.nan, 1.0)])
def test_empty_or_reversed_intervals_are_refused(process, interval):
    with pytest.raises(ValueError, match="interval is .*0 <= low < high"):
        ClassifierFreeGuidance(Labelled(), 3.0, process=process, interval=interval)


def test_an_interval_needs_the_process():
    with pytest.raises(ValueError, match="pass process=process"):
        ClassifierFreeGuidance(Labelled(), 3.0, interval=(0.1, 1.0))


def test_rescaling_restores_the_standard_deviation(inputs):
    x, t, y = inputs
    x = x + 0.5
    model = Labelled()
    t = torch.zeros_like(t)
    plain, guided = model(x, t, y), ClassifierFreeGuidance(model, 5.0)(x, t, y)
    full = ClassifierFreeGuidance(model, 5.0, rescale=1.0)(x, t, y)
    assert_close(full.flatten(1).std(1), plain.flatten(1).std(1))
    part = ClassifierFreeGuidance(model, 5.0, rescale=0.7)(x, t, y)
    assert_close(part, 0.7 * full + 0.3 * guided)
    assert full.flatten(1).std(1).ne(guided.flatten(1).std(1)).all()


@pytest.mark.parametrize("rescale", [-0.1, 1.1, math.nan])
def test_rescale_lies_in_0_to_1(rescale):
    with pytest.raises(ValueError, match="rescale is"):
        ClassifierFreeGuidance(Labelled(), 3.0, rescale=rescale)
    for edge in (0.0, 1.0):
        ClassifierFreeGuidance(Labelled(), 3.0, rescale=edge)


@pytest.mark.parametrize("scale", [math.nan, math.inf, torch.ones(2), torch.ones(3, 1)])
def test_scales_that_do_not_fit_are_refused(process, inputs, scale):
    x, t, y = inputs
    model = Labelled()
    for guided in (
        ClassifierFreeGuidance(model, scale),
        AutoGuidance(model, model, scale),
        ClassifierGuidance(model, process, Evidence(), scale),
    ):
        with pytest.raises(ValueError, match="guidance_scale must be .*3 images"):
            guided(x, t, y)


def test_a_network_without_labels_is_refused(process):
    model = Labelled()
    for missing in (nn.Identity(), model):
        if missing is model:
            model.num_classes = None
        with pytest.raises(ValueError, match="guidance needs a network with labels"):
            ClassifierFreeGuidance(missing, 3.0)


def test_guided_sampling_keeps_every_mode_and_checks_labels(process):
    torch.manual_seed(0)
    model = Labelled()
    model.dropout = nn.Dropout(0.5).eval()
    guided = ClassifierFreeGuidance(model, 2.0)
    sample(guided, process, torch.tensor([0, 2]), shape=(3, 2, 2), steps=2)
    assert guided.training and model.training and not model.dropout.training
    with pytest.raises(ValueError, match=r"labels run from 0 to 3, outside 0\.\.2"):
        sample(guided, process, torch.tensor([0, 3]), shape=(3, 2, 2), steps=2)


# Autoguidance


@pytest.mark.parametrize("channels", [3, 6])
def test_autoguidance_formula(inputs, channels):
    x, t, y = (part[:2] for part in inputs)  # fewer images than channels
    model = Labelled(channels)

    class Weak(nn.Module):
        def forward(self, x, t, y=None):
            return y.view(-1, 1, 1, 1) * x

    found = AutoGuidance(model, Weak(), 2.5)(x, t, y)
    good, weak = model(x, t, y), Weak()(x, t, y)
    assert_close(found[:, :3], weak + 2.5 * (good[:, :3] - weak))
    assert_close(found[:, 3:], good[:, 3:])
    assert_close(AutoGuidance(model, Weak(), 1.0)(x, t, y), good)
    assert AutoGuidance(model, Weak(), 1.0).num_classes == 3
    assert AutoGuidance(nn.Identity(), Weak(), 1.0).num_classes is None


# Classifier guidance


class Evidence(nn.Module):
    """log p(class 1 | x) - log p(class 0 | x) = slope . x, so the gradient is known."""

    def forward(self, x, t):
        logit = (2.0 * x).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(logit), logit, torch.zeros_like(logit)], dim=1)


def test_gradient(process, inputs):
    x, t, y = inputs
    gradient = ClassifierGuidance(Labelled(), process, Evidence(), 1.0).gradient(x, t, y)
    probability = Evidence()(x, t).softmax(1)[:, 1]
    wanted = 2 * ((y == 1).float() - probability)
    assert_close(gradient, wanted.view(-1, 1, 1, 1).expand_as(x), atol=1e-5, rtol=1e-4)
    assert not gradient.requires_grad


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_guided_score_is_the_sum_of_both_scores(prediction):
    """eps moves by -scale sqrt(1 - alpha_bar) g in every parameterisation."""
    process = GaussianDiffusion.from_config("cosine", 1000, prediction)
    x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 1])
    model = Labelled()
    for step in (20, 400, 700):
        t = torch.full((4,), step)
        for scale in (0.0, 0.01, -0.02):
            guided = ClassifierGuidance(model, process, Evidence(), scale)
            shift = scale * guided.gradient(x, t, y)
            _, eps, _ = predict(model, process, x, t, clip=False)
            _, guided_eps, _ = predict(guided, process, x, t, y, clip=False)
            b = process.sqrt_one_minus_alphas_cumprod[step]
            size = eps.abs().max().item() + 1
            assert_close(guided_eps, eps - b * shift, atol=2e-5 * size, rtol=1e-4)


def test_x0_moves_by_the_gradient_times_its_known_factor(process, inputs):
    x, _, y = inputs
    t = torch.full((3,), 600)
    guided = ClassifierGuidance(Labelled(), process, Evidence(), 3.0)
    alpha_bar = process.exact_alphas_cumprod[600]
    factor = float(3 * (1 - alpha_bar) / alpha_bar.sqrt())
    wanted = Labelled()(x, t) + factor * guided.gradient(x, t, y)
    assert_close(guided(x, t, y), wanted, atol=1e-3, rtol=1e-5)


def test_one_scale_per_image_for_the_classifier_and_only_the_prediction(process, inputs):
    x, t, y = inputs
    t = torch.full_like(t, 300)
    model = Labelled(channels=6)
    scales = torch.tensor([0.0, 1.0, 2.0])
    found = ClassifierGuidance(model, process, Evidence(), scales)(x, t, y)
    assert_close(found[0], model(x, t)[0])
    assert_close(found[:, 3:], model(x, t)[:, 3:])
    for i in (1, 2):
        alone = ClassifierGuidance(model, process, Evidence(), scales[i].item())(x, t, y)
        assert_close(found[i], alone[i])


def test_a_gaussian_guided_by_a_gaussian_classifier_ends_where_bayes_says():
    """Data N(0, 1) and p(y | x_0) Gaussian: the samples have the product's mean and deviation."""
    process = GaussianDiffusion.from_config("cosine", 1000, "x0")
    mean, std = 0.4, 0.5  # of the likelihood as a function of x_0

    class Prior(nn.Module):
        def forward(self, x, t, y=None):
            return 0.3**2 * self.gain(t) * x / (self.gain(t) ** 2 * 0.3**2 + 1 - self.gain(t) ** 2)

        def gain(self, t):
            return process.alphas_cumprod[t].sqrt().view(-1, 1, 1, 1)

    class Gauge(nn.Module):
        """p(y | x_t) by integrating over x_0 | x_t; two classes share the rest."""

        def forward(self, x, t):
            a = Prior().gain(t)
            noise = 1 - a**2
            expected = 0.3**2 * a * x / (a**2 * 0.3**2 + noise)
            variance = 0.3**2 * noise / (a**2 * 0.3**2 + noise) + std**2
            log_p = -((mean - expected) ** 2) / (2 * variance) - variance.log() / 2 - 3
            log_p = log_p.flatten(1).sum(1)
            return torch.stack([log_p, torch.log1p(-log_p.exp())], dim=1)

    guided = ClassifierGuidance(Prior(), process, Gauge(), 1.0)
    x_T = torch.linspace(-2, 2, 5).view(-1, 1, 1, 1)
    y = torch.zeros(5, dtype=torch.int64)
    for state in ddim(guided, process, x_T, y, steps=200, spacing="lambda"):
        last = state.x
    precision = 1 / 0.3**2 + 1 / std**2
    wanted = mean / std**2 / precision + x_T * precision**-0.5
    assert_close(last, wanted, atol=0.01, rtol=0)


def test_classifier_guidance_needs_fitting_labels(process, inputs):
    x, t, y = inputs
    guided = ClassifierGuidance(Labelled(), process, Evidence(), 1.0)
    with pytest.raises(ValueError, match="needs labels y to steer to"):
        guided(x, t)
    with pytest.raises(ValueError, match=r"labels run from 1 to 3, outside 0\.\.2"):
        guided(x, t, y + 1)
    with pytest.raises(ValueError, match="labels are int64 of shape"):
        guided(x, t, y[:2])


def test_noisy_classifier():
    process = GaussianDiffusion.from_config("cosine", 1000, "x0")
    torch.manual_seed(0)
    classifier = NoisyClassifier(
        process,
        5,
        image_size=8,
        channels=16,
        channel_mults=(1, 2, 3),
        num_res_blocks=1,
        attention_resolutions=(),
        head_channels=8,
    )
    assert classifier.pool.num_heads == 6
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([10, 999])
    logits = classifier(x, t)
    assert logits.shape == (2, 5)
    with torch.no_grad():
        h, _, _ = classifier.encode(x, t)
        tokens = classifier.norm(h).flatten(2).transpose(1, 2)
        pooled = classifier.pool(tokens.mean(1, keepdim=True), tokens, tokens)[0][:, 0]
        wanted = process.sqrt_alphas_cumprod[t][:, None] * classifier.head(pooled)
    assert_close(logits, wanted)
    assert logits[1].abs().max() < 1e-3 < logits[0].abs().max()


# What notebook 06 builds by hand


@pytest.fixture(scope="module")
def plane():
    """The names that the notebook's cells on the plane leave."""
    scope = {"torch": torch, "assert_close": assert_close, "GaussianDiffusion": GaussianDiffusion}
    scope |= {"AutoGuidance": AutoGuidance, "ClassifierGuidance": ClassifierGuidance}
    scope |= {"ClassifierFreeGuidance": ClassifierFreeGuidance, "dpm_solver": dpm_solver}
    scope["start"] = lambda count, seed, shape: torch.randn(
        count, *shape, generator=torch.Generator().manual_seed(seed)
    )
    scope |= {"found": {}, "plot_bars": lambda *_, **__: None}
    for words in ("class Blobs(", "class BlobClassifier(", "def push(", "def quality("):
        exec(cell("06_guidance", words), scope)
    return scope


@pytest.mark.parametrize("y", [0, 1, None])
def test_notebook_06_blobs_predict_the_posterior_mean(plane, y):
    """By summing over a fine grid of x_0 instead."""
    width, toy, centres = 0.15, plane["toy"], plane["centres"]
    axis = torch.linspace(-1.6, 1.6, 321, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    blobs = centres.flatten(0, 1) if y is None else centres[y]
    prior = (-(grid[:, None] - blobs).square().sum(-1) / (2 * width**2)).logsumexp(1)
    t = torch.tensor([100, 300, 600])
    x_bar = torch.tensor([[0.1, 0.3], [-0.4, 0.5], [0.6, -0.2]])
    labels = None if y is None else torch.full((3,), y)
    x = (toy.sqrt_alphas_cumprod[t, None] * x_bar)[:, :, None, None]
    found = plane["Blobs"](width)(x, t, labels).flatten(1)
    for i in range(3):
        squared = (grid - x_bar[i]).square().sum(1) / toy.sigmas[t[i]] ** 2
        weight = (prior - squared / 2).softmax(0)
        assert_close(found[i].double(), weight @ grid, atol=2e-3, rtol=0)


def test_notebook_06_fidelity_and_diversity(plane):
    quality, centres = plane["quality"], plane["centres"][0]
    assert quality(centres.repeat(4, 1)) == pytest.approx((1.0, 1.0))
    assert quality(centres[:1].repeat(4, 1)) == pytest.approx((1.0, 0.0))
    assert quality(centres + torch.tensor([0.0, 0.2])) == pytest.approx((0.0, 1.0))


def test_notebook_06_autoguidance_pushes_a_blurred_prediction_towards_the_sharp_one(plane):
    start, arrows, _ = plane["push"](plane["methods"]["autoguidance"](2.0))
    t = torch.full((81,), int((plane["toy"].sigmas < 0.5).sum()))
    x = (plane["toy"].sqrt_alphas_cumprod[t, None] * start)[:, :, None, None]
    target = plane["Blobs"](0.05)(x, t, torch.zeros(81, dtype=torch.int64)).flatten(1)
    blurred = plane["blurred"](x, t, torch.zeros(81, dtype=torch.int64)).flatten(1)
    assert torch.cosine_similarity(target - blurred, arrows).mean() > 0.8
