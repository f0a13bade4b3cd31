"""The metrics against closed forms and slow, plain versions of themselves; misuse is refused."""

import math
import sys
import types
from urllib.error import URLError

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.testing import assert_close

from noisout_nb import evaluation as ev
from noisout_nb.data import ProceduralFlowers, to_float
from noisout_nb.forward_process import GaussianDiffusion
from noisout_nb.measurements import fine_power, fine_power_ratio
from noisout_nb.unet import UNet


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.fixture(scope="module")
def flowers():
    return ProceduralFlowers(32, 400, seed=3)


def tiny_unet(**options):
    torch.manual_seed(0)
    plain = {"channels": 32, "channel_mults": (1,), "num_res_blocks": 1, "num_classes": 6}
    model = UNet(**plain, attention_resolutions=(), patch_size=4, **options)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    return model


# --- distances ---------------------------------------------------------------------------------


def test_frechet_distance_agrees_with_scipy():
    a = normal(60, 8) @ normal(8, 8, seed=1) + 0.3
    b = normal(50, 8, seed=2) @ normal(8, 8, seed=3)
    cov_a, cov_b = np.cov(a.T.numpy()), np.cov(b.T.numpy())
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    gap = (a.mean(0) - b.mean(0)).square().sum().item()
    expected = gap + np.trace(cov_a + cov_b - 2 * root)
    assert abs(ev.frechet_distance(a, b) - expected) < 1e-8 * expected
    assert abs(ev.frechet_distance(a, a)) < 1e-8


def test_frechet_distance_of_one_feature():
    a, b = normal(30, 1), 3 * normal(40, 1, seed=1) + 2
    expected = (a.mean() - b.mean()) ** 2 + (a.std() - b.std()) ** 2
    assert abs(ev.frechet_distance(a, b) - expected) < 1e-10


@pytest.mark.parametrize("blocks", [2, 8])
def test_kernel_distance_and_its_jackknife_agree_with_plain_loops(blocks):
    a, b = normal(21, 3), normal(17, 3, seed=1) + 0.5

    def plain(a, b):
        def mean_kernel(p, q, same):
            values = [
                (float(p[i] @ q[j]) / 3 + 1) ** 3
                for i in range(len(p))
                for j in range(len(q))
                if not (same and i == j)
            ]
            return sum(values) / len(values)

        return mean_kernel(a, a, True) + mean_kernel(b, b, True) - 2 * mean_kernel(a, b, False)

    def without(i, x):
        return torch.cat([part for j, part in enumerate(x.tensor_split(blocks)) if j != i])

    left_out = np.array([plain(without(i, a), without(i, b)) for i in range(blocks)])
    distance, error = ev.kernel_distance(a, b, blocks)
    assert abs(distance - plain(a, b)) < 1e-10
    assert abs(error - math.sqrt((blocks - 1) * left_out.var())) < 1e-10


def test_precision_and_recall_agree_with_their_definition():
    a, b, k = normal(40, 2), 0.5 * normal(30, 2, seed=1), 3

    def plain(points, centres):
        near = 0
        for point in points:
            for i, centre in enumerate(centres):
                others = sorted(float((centre - c).norm()) for j, c in enumerate(centres) if j != i)
                if (point - centre).norm() <= others[k - 1]:
                    near += 1
                    break
        return near / len(points)

    expected = (plain(a, b), plain(b, a))
    assert 0 < expected[0] < 1 and 0 < expected[1] <= 1
    for batch_size in (1, 7, 256):
        assert_close(ev.precision_recall(a, b, k, batch_size), expected)


def test_nearest_takes_the_nearer_of_image_and_mirror():
    a, mirrored, training = normal(9, 4), normal(9, 4, seed=1), normal(20, 4, seed=2)
    table = torch.stack([torch.cdist(x, training) for x in (a, mirrored)]).amin(0)
    expected = table.sort(dim=1)
    for batch_size in (2, 256):
        distances, indices = ev.nearest(a, training, 5, mirrored=mirrored, batch_size=batch_size)
        assert_close(distances, expected.values[:, :5])
        assert torch.equal(indices, expected.indices[:, :5])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ev.frechet_distance(normal(40, 64), normal(99, 64)), "40 images cannot give"),
        (lambda: ev.kernel_distance(normal(9, 4), normal(99, 4)), "9 images are too few"),
        (lambda: ev.precision_recall(normal(3, 4), normal(9, 4)), "3 images have no 3-th"),
        (lambda: ev.precision_recall(normal(9, 4), normal(9, 5)), "same extractor|one and the"),
        (lambda: ev.nearest(normal(9, 4), normal(3, 4)), "3 images have no 10-th"),
        (lambda: ev.nearest(normal(9, 4), normal(30, 4), mirrored=normal(8, 4)), "mirrored"),
        (lambda: ev.frechet_distance(normal(9, 2) / 0, normal(9, 2)), "NaN or infinite"),
        (lambda: ev.kernel_distance(normal(4), normal(4)), "must be"),
    ],
)
def test_features_that_do_not_fit_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# --- networks in eval mode ---------------------------------------------------------------------


def test_a_network_in_training_mode_gives_the_features_of_eval_mode():
    network = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(12, 5)).train()
    images = normal(6, 3, 2, 2).clamp(-1, 1)
    features = ev.extract_features(network, images, batch_size=4)
    assert network[1].training
    expected = network.eval()(images.float()).double()
    assert_close(features, expected, check_dtype=True)
    with pytest.raises(ValueError, match=r"features must be \(B, D\)"):
        ev.extract_features(nn.Conv2d(3, 2, 1), images)


def test_inception_gets_uint8_and_says_what_to_do_without_its_weights(monkeypatch):
    """torch-fidelity's network takes images as uint8 and returns a tuple of features."""
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")

    class Extractor(nn.Module):
        def __init__(self, name, features):
            super().__init__()
            assert features == ["2048"]
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            assert x.dtype == torch.uint8
            return (x.float().mean((2, 3)) * self.scale,)

    module.FeatureExtractorInceptionV3 = Extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    images = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    found = ev.extract_features(ev.InceptionFeatures(), images)
    assert_close(found[:, 0], torch.tensor([0.0, 128.0, 255.0], dtype=torch.float64))

    def offline(name, features):
        raise URLError("no route to host")

    module.FeatureExtractorInceptionV3 = offline
    with pytest.raises(RuntimeError, match=r"could not be downloaded .*no route to host.*put the"):
        ev.InceptionFeatures()


# --- bits per dimension ------------------------------------------------------------------------


def test_bits_per_dim_of_gaussian_pixels_is_the_closed_form():
    """The best network for N(0, s^2) is known, and so is every term (eq. 7 and 8 of Ho et al.)."""
    std, process = 0.3, GaussianDiffusion.from_config("cosine", 100, "x0")
    alpha_bar = process.exact_alphas_cumprod
    gain = (alpha_bar.sqrt() * std**2 / (std**2 * alpha_bar + 1 - alpha_bar)).float()

    class Best(nn.Module):
        def forward(self, x, t, y=None):
            return gain[t].view(-1, 1, 1, 1) * x

    images = (std * normal(8, 3, 64, 64)).clamp(-1, 1).float()
    _, terms = ev.bits_per_dim(Best(), process, images)
    left = std**2 * (1 - alpha_bar) / (std**2 * alpha_bar + 1 - alpha_bar)
    expected = process.posterior_mean_coef1.double() ** 2 * left
    expected = expected / (2 * process.posterior_variance.double()) / math.log(2)
    assert_close(terms[1:], expected[1:], rtol=2e-2, atol=1e-5)
    assert abs(terms[1:].sum() / expected[1:].sum() - 1) < 2e-3


def test_bits_per_dim_does_not_depend_on_batches_or_on_the_networks_mode():
    process = GaussianDiffusion.from_config("cosine", 5, "x0")
    model, images = tiny_unet(dropout=0.5).train(), normal(5, 3, 32, 32).clamp(-1, 1).float()
    labels = torch.arange(5)
    prior, terms = ev.bits_per_dim(model, process, images, labels)
    assert all(module.training for module in model.modules())
    for batch_size in (2, 3):
        again = ev.bits_per_dim(model.eval(), process, images, labels, batch_size=batch_size)
        assert again[0] == prior
        assert_close(again[1], terms, rtol=1e-5, atol=1e-9)
    other = ev.bits_per_dim(model, process, images, labels.flip(0))[1]
    assert not torch.allclose(other, terms, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 4, 9])
def test_bits_per_dim_needs_a_label_per_image(count):
    process = GaussianDiffusion.from_config("cosine", 5, "x0")
    images = torch.zeros(8, 3, 32, 32)
    with pytest.raises(ValueError, match=f"{count} labels for 8 images"):
        ev.bits_per_dim(tiny_unet(), process, images, torch.zeros(count, dtype=torch.int64))


# --- measurements of pixels --------------------------------------------------------------------


def test_petals_of_the_embedded_flowers_are_counted(flowers):
    images, petals = to_float(flowers.images), flowers.factors["petals"]
    assert (ev.petal_count(images) == petals).double().mean() > 0.99
    noisy = (images + 0.1 * normal(*images.shape).float()).clamp(-1, 1)
    assert (ev.petal_count(noisy) == petals).double().mean() > 0.95
    wide = nn.functional.pad(images, (8, 8, 0, 0), mode="replicate")
    assert (ev.petal_count(wide) == petals).double().mean() > 0.95
    assert ev.petal_count(torch.zeros(2, 3, 32, 32)).tolist() == [0, 0]


def test_factors_need_colour_and_take_wide_images(flowers):
    images = to_float(flowers.images[:40])
    wide = nn.functional.pad(images, (8, 8, 0, 0), mode="replicate")
    narrow, broad = ev.measure_factors(images), ev.measure_factors(wide)
    assert_close(broad["size"], narrow["size"] * 32 / 48, rtol=0.1, atol=0.02)
    for measure in (ev.measure_factors, ev.petal_count):
        with pytest.raises(ValueError, match=r"1 channels.*needs 3"):
            measure(images[:, :1])
    for bad in (images * 2, flowers.images, images[0], images / 0):
        with pytest.raises(ValueError, match="must be float"):
            ev.measure_factors(bad)


def test_fine_power_of_a_checkerboard_and_of_a_plane():
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(24), indexing="ij")
    board = (1 - 2 * ((rows + columns) % 2)).float().expand(2, 3, 16, 24)
    assert_close(fine_power(0.5 * board), torch.full((2, 6), 0.25))
    flat = torch.tensor([-0.5, 0.5]).repeat_interleave(8).repeat(2)[:24]
    assert fine_power(flat.expand(1, 3, 16, 24)).abs().max() == 0  # edges between 2 x 2 blocks
    images = normal(4, 3, 32, 32).clamp(-1, 1).float()
    ratio = fine_power_ratio(0.5 * images, images)
    assert_close(ratio, {"plain": 0.25, "median": 0.25})
    with pytest.raises(ValueError, match="16 x 20 pixels"):
        fine_power(torch.zeros(1, 3, 16, 20))


def test_fine_power_ratio_tells_grain_from_lacking_texture(flowers):
    real, other = to_float(flowers.images[:200]), to_float(flowers.images[200:])
    same = fine_power_ratio(other, real)
    grain = fine_power_ratio((other + 0.02 * normal(*other.shape).float()).clamp(-1, 1), real)
    smooth = fine_power_ratio(nn.functional.avg_pool2d(other, 3, 1, 1), real)
    assert 0.8 < same["median"] < 1.25 and 0.8 < same["plain"] < 1.25
    assert grain["plain"] > 1.5
    assert smooth["median"] < 0.7


# --- memorisation ------------------------------------------------------------------------------


def test_copies_are_found_also_mirrored_and_new_flowers_are_not(flowers):
    training, held_out = to_float(flowers.images[:200]), to_float(flowers.images[200:])
    detector = ev.CopyDetector(training, held_out)
    assert len(detector.duplicates) == 0
    assert detector.copied(held_out).double().mean() <= 0.015
    new = to_float(ProceduralFlowers(32, 200, seed=4).images)
    assert detector.copied(new).double().mean() < 0.05
    planted = ev.planted_copies(training, held_out)
    for name in ("exact", "mirrored"):
        assert detector.copied(planted[name]).double().mean() >= 0.99, name
        assert detector.a_third_of_the_second(planted[name]).double().mean() >= 0.99, name
    assert ev.copied_share(planted["mirrored"], training, held_out) >= 0.99
    assert planted.keys() >= {"blurred", "recoloured", "shifted", "half"}


def test_near_duplicates_are_listed_and_take_no_part_in_the_threshold():
    """Images of noise lie far from each other, as photographs do, so a planted one stands out."""
    noise = (0.3 * normal(400, 3, 8, 8)).clamp(-1, 1).float()
    training, held_out = noise[:200], noise[200:].clone()
    clean = ev.CopyDetector(training, held_out)
    held_out[[5, 17, 60]] = 0.95 * training[[3, 4, 5]]
    spoilt = ev.CopyDetector(training, held_out)
    assert {5, 17, 60}.isdisjoint(clean.duplicates.tolist())
    assert set(spoilt.duplicates.tolist()) == {5, 17, 60, *clean.duplicates.tolist()}
    assert abs(spoilt.threshold - clean.threshold) < 0.02


def test_a_threshold_needs_enough_held_out_images(flowers):
    images = to_float(flowers.images)
    with pytest.raises(ValueError, match="50 held-out images cannot place"):
        ev.CopyDetector(images[:100], images[100:150])
    with pytest.raises(ValueError, match="as many images"):
        ev.planted_copies(images[:3], images[:2])
