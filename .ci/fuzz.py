"""Odd input for the public functions, made by hypothesis: each call gives a correct result or its documented ValueError.

    pip install hypothesis
    python -m pytest .ci/fuzz.py            some minutes; not part of `make test`, and hypothesis is no requirement
"""

import math

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from noisout_nb.data import ProceduralFlowers, species_labels, to_float, to_uint8
from noisout_nb.display import filmstrip, image_grid, plot_histograms, plot_lines, plot_loss
from noisout_nb.evaluation import copied_share, extract_features, frechet_distance, kernel_distance, nearest, precision_recall
from noisout_nb.forward_process import SCHEDULES, GaussianDiffusion
from noisout_nb.guidance import ClassifierFreeGuidance
from noisout_nb.sampling import SAMPLERS, sample
from noisout_nb.training import EMA, Batches, learning_rate_at, simple_loss
from noisout_nb.unet import SinusoidalPositionEmbeddings, UNet, group_norm

settings.register_profile("fuzz", max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("fuzz")
torch.manual_seed(0)
NETWORK = UNet(image_size=8, channels=32, channel_mults=(1, 2), num_res_blocks=1, attention_resolutions=(), num_classes=3).eval()
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool]
sizes, odd = st.integers(0, 9), st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -1.5, 0.0])


@st.composite
def tensors(draw, axes=st.integers(0, 5), dtypes=tuple(DTYPES)):
    shape, dtype = [draw(sizes) for _ in range(draw(axes))], draw(st.sampled_from(dtypes))
    x = (torch.rand(shape) * 2 - 1).to(dtype) if dtype.is_floating_point else torch.randint(0, 2, shape).to(dtype)
    if x.numel() and dtype.is_floating_point and draw(st.integers(0, 3)) == 0:
        x.view(-1)[draw(st.integers(0, x.numel() - 1))] = min(max(draw(odd), -6e4), 6e4) if draw(st.booleans()) else draw(odd)
    return x


def answer(function, *arguments, **options):
    """The result, or None where the input was refused with words."""
    try:
        return function(*arguments, **options)
    except ValueError as error:
        assert len(str(error)) > 20, "an error without an explanation"


@given(tensors(), st.integers(-1, 9), st.one_of(st.none(), st.integers(1, 3)), st.lists(st.text(max_size=3), max_size=3))
def test_image_grid(images, columns, scale, labels):
    labels = [label.replace("$", "").replace("\\", "") for label in labels]
    picture = answer(image_grid, images, columns=columns, scale=scale, row_labels=labels)
    assert picture is None or picture.png().startswith(b"\x89PNG")


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
    assert betas is None or (betas.dtype == torch.float64 and len(betas) == timesteps and ((0 < betas) & (betas < 1)).all())


@given(st.lists(st.one_of(st.floats(0.001, 0.5), odd), max_size=6), st.sampled_from(["eps", "v", "x", ""]), st.integers(-1, 8))
def test_process(betas, prediction, steps):
    process = answer(GaussianDiffusion, betas, prediction)
    respaced = process and answer(process.respace, steps)
    if respaced:
        kept = process.exact_alphas_cumprod[respaced.timestep_map]
        torch.testing.assert_close(respaced.exact_alphas_cumprod, kept)


@given(tensors(axes=st.integers(1, 4), dtypes=(torch.float32, torch.float64, torch.bfloat16)), st.lists(st.integers(-2, 12), max_size=9))
def test_x_0_noise_and_v(x_0, times):
    process, t = GaussianDiffusion(torch.linspace(0.01, 0.3, 10)), torch.tensor(times, dtype=torch.int64)
    if len(t) not in (1, len(x_0)) or not x_0.float().isfinite().all() or x_0.abs().amax().item() > 10 if x_0.numel() else True:
        return
    noise = torch.randn(x_0.shape)
    x_t = answer(process.q_sample, x_0, t, noise)
    assert (x_t is None) == bool(((t < 0) | (t >= 10)).any())
    if x_t is not None:
        torch.testing.assert_close(process.predict_start_from_noise(x_t, t, noise), x_0.float(), atol=1e-4, rtol=1e-3)
        v = process.predict_v(x_0.float(), t, noise)
        torch.testing.assert_close(process.predict_start_from_v(x_t, t, v), x_0.float(), atol=1e-4, rtol=1e-3)


@given(tensors(axes=st.sampled_from([3, 4, 4, 4]), dtypes=(torch.float32,)), tensors(axes=st.integers(0, 2)), st.one_of(st.none(), tensors(axes=st.integers(0, 2))))
def test_unet(x, t, y):
    with torch.no_grad():
        out = answer(NETWORK, x, t, y)
    assert out is None or (out.shape == x.shape and out.dtype == torch.float32)


@given(st.sampled_from([(3, 8, 8), (3, 4, 12), (1, 8, 8), (3, 7, 8), (3, 0, 0)]), st.integers(0, 3), st.sampled_from([*SAMPLERS, "euler"]),
       st.integers(-1, 6), st.one_of(st.none(), st.lists(st.integers(-1, 5), max_size=3)), st.floats(allow_nan=True))  # fmt: skip
@settings(max_examples=150)
def test_sampling(shape, count, sampler, steps, labels, scale):
    process = GaussianDiffusion(SCHEDULES["cosine"](5), "v")
    y = None if labels is None else torch.tensor(labels, dtype=torch.int64)
    guided = answer(ClassifierFreeGuidance, NETWORK, max(-10.0, min(scale, 10.0)) if scale == scale else scale)
    out = answer(sample, guided, process, y, shape=shape, count=count, sampler=sampler, steps=steps)
    assert out is None or (out.shape == (count if y is None else len(y), *shape) and out.isfinite().all())


@given(tensors(axes=st.integers(1, 3), dtypes=(torch.float32, torch.float64)), tensors(axes=st.integers(1, 3), dtypes=(torch.float32, torch.float64)))
def test_distances(a, b):
    finite = a.isfinite().all() and b.isfinite().all()
    for distance in (frechet_distance, kernel_distance, precision_recall, nearest):
        found = answer(distance, a, b, *([1] if distance in (precision_recall, nearest) else []))
        assert not finite or found is None or distance is not frechet_distance or found > -1e-3
    answer(copied_share, a, b, b, 2)


@given(tensors())
def test_features(images):
    found = answer(extract_features, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(4)), images)
    assert found is None or found.shape == (len(images), 4)


@given(st.integers(-1, 40), st.integers(-1, 5))
@settings(max_examples=40)
def test_flowers(size, count):
    flowers = answer(ProceduralFlowers, size, count)
    assert flowers is None or (flowers.images.shape == (count, 3, size, size) and torch.equal(to_uint8(to_float(flowers.images)), flowers.images))
    batches = flowers and answer(Batches, flowers, count - 1)
    assert not batches or next(batches)[0].abs().max() <= 1


@given(st.one_of(st.text(max_size=8), st.lists(st.sampled_from(["daisy", "rose", "Daisy ", ""]), max_size=3)))
def test_species(names):
    found = answer(species_labels, names, ("daisy", "rose"))
    assert found is None or found.dtype == torch.int64


@given(st.integers(-3, 40), st.one_of(st.floats(), st.integers(-2, 2)), st.integers(0, 50), st.integers(1, 50))
def test_small_things(dim, decay, index, steps):
    embedding = answer(SinusoidalPositionEmbeddings, dim)
    assert embedding is None or embedding(torch.tensor([0, 999])).shape == (2, dim)
    answer(EMA, torch.nn.Linear(1, 1), decay)
    assert 0 <= learning_rate_at(min(index, steps - 1), steps, 1.0) <= 1
    assert dim < 1 or dim % group_norm(dim).num_groups == 0


@given(tensors(axes=st.just(4), dtypes=(torch.float32, torch.bfloat16)), st.sampled_from(["eps", "v"]))
def test_loss(x_0, prediction):
    process = GaussianDiffusion(SCHEDULES["linear"](10), prediction)
    loss = answer(simple_loss, NETWORK, process, x_0, torch.zeros(len(x_0), dtype=torch.int64), torch.randn(x_0.shape))
    assert loss is None or (loss.dtype == torch.float32 and loss.ndim == 0)
