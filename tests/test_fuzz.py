"""Odd input for the public functions: each call gives a sound result or a ValueError with words.

    FUZZ_CALLS=10000 python -m pytest tests/test_fuzz.py        `make fuzz`: some minutes

In the suite a few hundred calls are made, always the same. Networks are those of the profiles.
"""

import functools
import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from noisout_nb.data import ProceduralFlowers, species_labels, to_float, to_uint8
from noisout_nb.evaluation import (
    coverage,
    extract_features,
    frechet_distance,
    kernel_distance,
    nearest,
    precision_recall,
)
from noisout_nb.figures import filmstrip, image_grid, plot_histograms, plot_lines, plot_loss
from noisout_nb.forward_process import PREDICTIONS, SCHEDULES, SPACINGS, GaussianDiffusion
from noisout_nb.guidance import ClassifierFreeGuidance
from noisout_nb.profiles import PROFILES
from noisout_nb.sampling import SAMPLERS, sample
from noisout_nb.training import EMA, WEIGHTINGS, Batches, learning_rate_at, simple_loss
from noisout_nb.unet import SinusoidalPositionEmbeddings, UNet, group_norm

TESTS = 15  # in this file
CALLS = int(os.environ.get("FUZZ_CALLS", 20 * TESTS))
settings.register_profile(
    "fuzz",
    max_examples=math.ceil(CALLS / TESTS),
    deadline=None,
    derandomize="FUZZ_CALLS" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("fuzz")

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.uint8, torch.int64, torch.bool]
SIZES, RANKS = st.integers(0, 9), st.integers(0, 5)
ODD = st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -1.5, 0.0])
# quick is the cheapest; all of them in the long run
NAMES = st.sampled_from(["quick"] * 6 + (list(PROFILES) if "FUZZ_CALLS" in os.environ else []))


@functools.cache
def network(name="quick"):
    """A profile's network, untrained but not silent, for three classes."""
    torch.manual_seed(0)
    model = UNet(**PROFILES[name].network, num_classes=3).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


@st.composite
def tensors(draw, axes=RANKS, dtypes=tuple(DTYPES)):
    shape, dtype = [draw(SIZES) for _ in range(draw(axes))], draw(st.sampled_from(dtypes))
    if not dtype.is_floating_point:
        return torch.randint(0, 2, shape).to(dtype)
    x = (torch.rand(shape) * 2 - 1).to(dtype)
    if x.numel() and draw(st.integers(0, 3)) == 0:
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = draw(ODD)
    return x


def answer(function, *arguments, **options):
    """The result, or None where the input was refused with words."""
    try:
        return function(*arguments, **options)
    except ValueError as error:
        assert len(str(error)) > 20, "an error without an explanation"
        return None


@given(
    tensors(),
    st.integers(-1, 9),
    st.one_of(st.none(), st.integers(1, 3)),
    st.lists(st.text("ab 7é", max_size=3), max_size=3),
)
def test_image_grid(images, columns, scale, labels):
    image = answer(image_grid, images, columns=columns, scale=scale, row_labels=labels)
    assert image is None or image.png().startswith(b"\x89PNG")


@given(st.lists(tensors(axes=st.integers(3, 4)), max_size=3))
def test_filmstrip(rows):
    answer(filmstrip, rows)


@given(st.dictionaries(st.sampled_from("abc"), tensors(axes=st.integers(0, 2)), max_size=3))
def test_plots(curves):
    for plot in (plot_lines, plot_histograms):
        answer(plot, curves)
    for values in curves.values():
        answer(plot_loss, values)


@given(st.sampled_from(sorted(SCHEDULES)), st.one_of(st.integers(-2, 30), st.floats(), st.none()))
def test_schedules(name, timesteps):
    betas = answer(SCHEDULES[name], timesteps)
    if betas is not None:
        assert betas.dtype == torch.float64 and len(betas) == timesteps
        assert ((betas > 0) & (betas < 1)).all()


@given(
    st.lists(st.one_of(st.floats(0.001, 0.5), ODD), max_size=6),
    st.sampled_from([*PREDICTIONS, "x", ""]),
    st.integers(-1, 8),
    st.sampled_from([*SPACINGS, "log"]),
)
def test_process(betas, prediction, steps, spacing):
    process = answer(GaussianDiffusion, betas, prediction)
    respaced = process and answer(process.respace, steps, spacing)
    if respaced:
        kept = process.exact_alphas_cumprod[respaced.timestep_map]
        torch.testing.assert_close(respaced.exact_alphas_cumprod, kept)
        again = GaussianDiffusion.from_config(**respaced.config)
        assert again.config == respaced.config


@given(tensors(axes=st.integers(1, 4), dtypes=FLOATS), st.lists(st.integers(-2, 12), max_size=9))
def test_x_0_noise_and_v(x_0, times):
    process = GaussianDiffusion(torch.linspace(0.01, 0.3, 10))
    t = torch.tensor(times, dtype=torch.int64)
    if len(t) not in (1, len(x_0)) or not x_0.numel() or not x_0.abs().max() <= 10:
        return
    noise = torch.randn(x_0.shape)
    x_t = answer(process.q_sample, x_0, t, noise)
    assert (x_t is None) == bool(((t < 0) | (t >= 10)).any())
    if x_t is not None:
        x_0 = x_0.float()
        close = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=1e-3)
        close(process.predict_start_from_noise(x_t, t, noise), x_0)
        close(process.predict_start_from_v(x_t, t, process.predict_v(x_0, t, noise)), x_0)


@given(
    NAMES,
    tensors(axes=st.sampled_from([3, 4, 4, 4]), dtypes=(torch.float32,)),
    tensors(axes=st.integers(0, 2)),
    st.one_of(st.none(), tensors(axes=st.integers(0, 2))),
)
def test_unet(name, x, t, y):
    out = answer(network(name), x, t, y)
    assert out is None or (out.shape == x.shape and out.dtype == torch.float32)


@given(
    NAMES,
    st.sampled_from([(3, 16, 16), (3, 16, 32), (1, 16, 16), (3, 7, 8), (3, 0, 0)]),
    st.integers(0, 3),
    st.sampled_from([*SAMPLERS, "euler"]),
    st.integers(-1, 6),
    st.one_of(st.none(), st.lists(st.integers(-1, 5), max_size=3)),
    st.one_of(st.floats(-10, 10), st.sampled_from([math.nan, math.inf])),
    st.sampled_from([*SPACINGS, ""]),
)
def test_sampling(name, shape, count, sampler, steps, labels, scale, spacing):
    profile = PROFILES[name]
    process = GaussianDiffusion.from_config("cosine", 5, profile.prediction)
    y = None if labels is None else torch.tensor(labels, dtype=torch.int64)
    guided = answer(ClassifierFreeGuidance, network(name), scale)
    if guided is None:
        return
    options = {"shape": shape, "count": count, "sampler": sampler, "steps": steps}
    out = answer(sample, guided, process, y, spacing=spacing, **options)
    expected = (count if y is None else len(y), *shape)
    assert out is None or (out.shape == expected and out.isfinite().all())


@given(
    tensors(axes=st.integers(1, 3), dtypes=FLOATS[:2]),
    tensors(axes=st.integers(1, 3), dtypes=FLOATS[:2]),
)
def test_distances(a, b):
    distance = answer(frechet_distance, a, b)
    assert distance is None or distance > -1e-3
    answer(kernel_distance, a, b)
    answer(precision_recall, a, b, 1)
    answer(coverage, a, b, 1)
    found = answer(nearest, a, b, 1)
    assert found is None or found[0].shape == (len(a), 1)


@given(tensors())
def test_features(images):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(4))
    found = answer(extract_features, model, images)
    assert found is None or found.shape == (len(images), 4)


@given(st.integers(-1, 40), st.integers(-1, 5))
def test_flowers(size, count):
    flowers = answer(ProceduralFlowers, size, count)
    if flowers is None:
        return
    assert flowers.images.shape == (count, 3, size, size)
    assert torch.equal(to_uint8(to_float(flowers.images)), flowers.images)
    batches = answer(Batches, flowers, count - 1)
    assert batches is None or next(iter(batches))[0].abs().max() <= 1


NAMES_OF_SPECIES = st.lists(st.sampled_from(["daisy", "rose", "Daisy ", ""]), max_size=3)


@given(st.one_of(st.text(max_size=8), NAMES_OF_SPECIES))
def test_species(names):
    found = answer(species_labels, names, ("daisy", "rose"))
    assert found is None or found.dtype == torch.int64


@given(
    st.integers(-3, 40),
    st.one_of(st.floats(), st.integers(-2, 2)),
    st.integers(0, 50),
    st.integers(1, 50),
)
def test_small_things(dim, decay, index, steps):
    embedding = answer(SinusoidalPositionEmbeddings, dim)
    assert embedding is None or embedding(torch.tensor([0, 999])).shape == (2, dim)
    answer(EMA, torch.nn.Linear(1, 1), decay)
    assert 0 <= learning_rate_at(min(index, steps - 1), steps, 1.0) <= 1
    assert dim < 1 or dim % group_norm(dim).num_groups == 0


@given(
    tensors(axes=st.just(4), dtypes=(torch.float32, torch.bfloat16)),
    st.sampled_from(PREDICTIONS),
    st.sampled_from([None, *WEIGHTINGS, "none"]),
)
def test_loss(x_0, prediction, weighting):
    process = GaussianDiffusion.from_config("cosine", 10, prediction)
    t, noise = torch.zeros(len(x_0), dtype=torch.int64), torch.randn(x_0.shape)
    loss = answer(simple_loss, network(), process, x_0, t, noise, weighting=weighting)
    assert loss is None or (loss.dtype == torch.float32 and loss.ndim == 0)


@given(st.sampled_from(list(PROFILES)), st.data())
def test_every_profile_describes_itself(name, data):
    profile = PROFILES[name]
    process = GaussianDiffusion.from_config(**profile.process)
    steps = data.draw(st.integers(1, process.timesteps))
    spacing = data.draw(st.sampled_from(SPACINGS))
    kept = process.respace(steps, spacing).timestep_map
    assert len(kept) == steps and kept[-1] == process.timesteps - 1


@pytest.mark.parametrize("name", ["quick", "flowers64", "flowers64-gpu"])
def test_every_network_predicts_at_its_own_size(name):
    side = PROFILES[name].image_size
    x = torch.randn(1, 3, side, side)
    assert network(name)(x, torch.tensor([500]), torch.tensor([2])).shape == x.shape
