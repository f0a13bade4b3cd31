"""The metrics against closed forms and slow, plain versions of themselves; misuse is refused."""

import math
import os
import subprocess
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
from noisout_nb import protocol
from noisout_nb.data import ProceduralFlowers, to_float
from noisout_nb.forward_process import GaussianDiffusion
from noisout_nb.measurements import fine_power, fine_power_ratio
from noisout_nb.profiles import PROFILES
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


def test_frechet_of_repeated_features_is_as_many_times_as_large():
    # their covariances are singular: rounding makes some eigenvalues negative
    x, y = normal(300, 4), 2 * normal(300, 4, seed=1) + 1
    found = ev.frechet_distance(x.repeat(1, 4), y.repeat(1, 4))
    assert found == pytest.approx(4 * ev.frechet_distance(x, y), rel=1e-6)


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


def test_precision_and_recall_need_k_neighbours():
    assert ev.precision_recall(normal(3, 2), normal(3, 2, seed=1), k=2)
    with pytest.raises(ValueError, match="3 images have no 3-th neighbour"):
        ev.precision_recall(normal(3, 2), normal(4, 2, seed=1), k=3)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_precision_and_recall_agree_with_their_definition(k):
    a, b = normal(40, 8), normal(30, 8, seed=1)

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


@pytest.mark.parametrize("k", [1, 2, 3])
def test_coverage_agrees_with_its_definition(k):
    samples, real = normal(40, 8), normal(30, 8, seed=1)
    expected = 0
    for point in real:
        others = sorted(float((point - r).norm()) for r in real)  # others[0] is the point itself
        expected += float((samples - point).norm(dim=1).min()) <= others[k]
    assert 0 < expected < 30
    for batch_size in (1, 7, 256):
        assert ev.coverage(samples, real, k, batch_size) == expected / 30


@pytest.mark.parametrize("k", [1, 3])
def test_coverage_of_independent_sets_has_its_known_mean(k):
    found = ev.coverage(normal(3000, 2), normal(3000, 2, seed=1), k)
    assert abs(found - (1 - 2**-k)) < 0.02


def test_coverage_is_not_fooled_by_samples_that_lie_far_out():
    real, samples = normal(300, 4), 30 * normal(300, 4, seed=1)
    assert ev.precision_recall(samples, real)[1] > 0.9
    assert ev.coverage(samples, real) < 0.05


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
        (lambda: ev.coverage(normal(9, 4), normal(3, 4)), "3 images have no 3-th"),
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


# --- features that know their extractor, and files of them ---------------------------------------


def linear(seed, outputs=3):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, outputs))


def images(count, seed=0):
    return normal(count, 3, 2, 2, seed=seed).clamp(-1, 1).float()


def test_features_of_two_extractors_are_never_mixed():
    a, b = (ev.extract_features(linear(seed), images(40)) for seed in (0, 1))
    plain = a.as_subclass(torch.Tensor)
    for metric in (
        ev.frechet_distance,
        ev.kernel_distance,
        ev.precision_recall,
        ev.coverage,
        ev.nearest,
    ):
        metric(a, ev.extract_features(linear(0), images(30, seed=1)))
        metric(a, plain)
        for other in (b, b[5:], torch.cat([b, b]), b.split(20)[0], b * 2):
            with pytest.raises(ValueError, match="two extractors"):
                metric(a, other)
    with pytest.raises(ValueError, match="two extractors"):
        torch.cat([a, b])
    with pytest.raises(ValueError, match="two extractors"):
        ev.frechet_distance(a, ev.moments(b))
    assert ev.frechet_distance(a, ev.moments(a)) < 1e-9
    assert type(ev.frechet_distance(a, a)) is float


def test_a_file_of_features_gives_back_what_was_written(tmp_path):
    path = tmp_path / "features.pth"
    a, b = (ev.extract_features(linear(0), images(40, seed)) for seed in (0, 1))
    ev.save_features(path, {"a": a, "b": b[:9]}, {"b": b}, weights="x.pth")
    sets, whole, card = ev.load_features(path, linear(0))
    assert_close(
        sets["a"].as_subclass(torch.Tensor), a.as_subclass(torch.Tensor), rtol=1e-3, atol=1e-4
    )
    assert len(sets["b"]) == 9 and whole["b"].count == 40 and card["weights"] == "x.pth"
    assert_close(whole["b"].cov, ev.moments(b).cov, rtol=1e-5, atol=1e-6, check_device=False)
    exact = ev.frechet_distance(a, b)
    assert abs(ev.frechet_distance(sets["a"], whole["b"]) / exact - 1) < 1e-2
    with pytest.raises(ValueError, match="two extractors"):
        ev.frechet_distance(ev.extract_features(linear(1), images(40)), whole["b"])
    with pytest.raises(ValueError, match="load the classifier that made them"):
        ev.load_features(path, linear(1))
    torch.save({"card": {}}, path)
    with pytest.raises(ValueError, match="no file of features"):
        ev.load_features(path)


def test_a_file_of_features_takes_one_extractor_and_stays_small(tmp_path):
    path = tmp_path / "features.pth"
    a, b = (ev.extract_features(linear(seed), images(40)) for seed in (0, 1))
    for sets in ({"a": a, "b": b}, {"a": ev.Features(torch.zeros(4, 3))}):
        with pytest.raises(ValueError, match="a single one"):
            ev.save_features(path, sets)
    with pytest.raises(ValueError, match="half precision"):
        ev.save_features(path, {"a": a * 1e9})
    with pytest.raises(ValueError, match=r"bytes of features: at most"):
        ev.save_features(path, {"a": torch.cat([a] * 4000)})
    assert not path.exists()
    wide = ev.extract_features(linear(0, outputs=192), images(2100))
    ev.save_features(path, {"a": wide}, {"a": wide})
    assert 800_000 < path.stat().st_size < 1_000_000


def test_a_distance_of_moments_needs_enough_images():
    few = ev.moments(normal(8, 8))
    with pytest.raises(ValueError, match="8 images cannot give a covariance of 8"):
        ev.frechet_distance(normal(99, 8), few)
    with pytest.raises(ValueError, match="one and the same"):
        ev.frechet_distance(normal(99, 8), ev.moments(normal(99, 7)))


def test_the_jackknifes_error_of_a_mean_is_the_standard_error():
    a, b = normal(800, 1), normal(800, 1, seed=1)
    value, error = ev.jackknife(lambda x, y: (x.mean() - y.mean()).item(), a, b, blocks=800 // 2)
    assert value == (a.mean() - b.mean()).item()
    assert abs(error / ((a.var() + b.var()) / 800).sqrt().item() - 1) < 0.1
    a, b = normal(64, 4), normal(80, 4, seed=1)
    assert_close(
        ev.jackknife(lambda x, y: ev.kernel_distance(x, y, 2)[0], a, b), ev.kernel_distance(a, b)
    )
    with pytest.raises(ValueError, match="15 images are too few for 8 blocks"):
        ev.jackknife(ev.frechet_distance, normal(15, 2), normal(20, 2))


def test_distances_precision_and_recall_agree_with_torch_fidelity():
    try:
        from torch_fidelity.metric_fid import (  # pyright: ignore[reportMissingImports]
            fid_features_to_statistics,
            fid_statistics_to_metric,
        )
        from torch_fidelity.metric_kid import (  # pyright: ignore[reportMissingImports]
            kid_features_to_metric,
        )
        from torch_fidelity.metric_prc import (  # pyright: ignore[reportMissingImports]
            prc_features_to_metric,
        )
    except ImportError:
        pytest.skip("not here: torch-fidelity is not installed")
    a, b = normal(300, 20) @ normal(20, 20, seed=1), 4 * normal(300, 20, seed=2)
    statistics = [fid_features_to_statistics(x) for x in (a, b)]
    theirs = fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]
    assert abs(ev.frechet_distance(a, b) / theirs - 1) < 1e-3
    subset = {"kid_subsets": 1, "kid_subset_size": 300, "rng_seed": 0, "verbose": False}
    theirs = kid_features_to_metric(a, b, **subset)["kernel_inception_distance_mean"]
    assert abs(ev.kernel_distance(a, b)[0] / theirs - 1) < 1e-3
    whole = {"prc_batch_size": 300, "save_cpu_ram": False, "verbose": False}
    theirs = prc_features_to_metric(a, b, prc_neighborhood=3, **whole)
    expected = (theirs["precision"], theirs["recall"])
    assert 0.02 < min(expected) < max(expected) - 0.05 < 0.95
    assert_close(ev.precision_recall(a, b, 3), expected, rtol=0, atol=1e-3)


def test_torch_fidelitys_network_takes_our_images_and_gives_2048_features(monkeypatch):
    """With random weights: its own are 91 MB, which a test does not download."""
    inception = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3",
        reason="not here: torch-fidelity is not installed",
    )
    network = inception.FeatureExtractorInceptionV3
    monkeypatch.setattr(inception, "load_state_dict_from_url", lambda *args, **kwargs: {})
    monkeypatch.setattr(network, "load_state_dict", lambda self, weights: None)
    found = ev.extract_features(ev.InceptionFeatures(), images(2))
    assert found.shape == (2, 2048) and found.isfinite().all()


# --- the protocol ------------------------------------------------------------------------------


def tiny_sampler(folder, **options):
    process = GaussianDiffusion.from_config("cosine", 20, "x0")
    settings = {"guidance_scale": 1.0, "steps": 2, "profile": PROFILES["quick"]} | options
    return protocol.Sampler(tiny_unet(), process, folder=folder, **settings)


def test_samples_of_an_evaluation_are_kept_and_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "PART", 4)
    labels = torch.arange(10) % 6
    sampler = tiny_sampler(tmp_path)
    whole = sampler(labels, 3)
    assert whole.dtype == torch.uint8 and len(whole) == 10
    assert len(list(tmp_path.iterdir())) == 3
    assert torch.equal(tiny_sampler(None)(labels, 3), whole)
    assert not torch.equal(whole[:4], whole[6:])  # parts have noise of their own

    def never(*arguments, **options):
        raise AssertionError("sampled again")

    real = protocol.sample
    monkeypatch.setattr(protocol, "sample", never)
    assert torch.equal(tiny_sampler(tmp_path)(labels, 3), whole)
    others = [(sampler, labels, 4), (sampler, labels.flip(0), 3)]
    others += [(tiny_sampler(tmp_path, steps=3), labels, 3)]
    others += [(tiny_sampler(tmp_path, guidance_scale=2.0), labels, 3)]
    changed = tiny_unet()
    next(changed.parameters()).data += 1
    others += [
        (protocol.Sampler(changed, sampler.process, PROFILES["quick"], 2, 1, tmp_path), labels, 3)
    ]
    for other, y, seed in others:
        with pytest.raises(AssertionError, match="sampled again"):
            other(y, seed)
    cut = sorted(tmp_path.iterdir())[0]  # a run that was cut lacks one part
    cut.unlink()
    monkeypatch.setattr(protocol, "sample", real)
    assert torch.equal(tiny_sampler(tmp_path)(labels, 3), whole)


def test_halves_and_turns_have_each_species_as_often():
    labels = torch.arange(101) % 4
    first, second = protocol.halves(labels, 3)
    assert len(first) == len(second) == 50
    assert len({*first.tolist(), *second.tolist()}) == 100
    for species in range(4):
        assert abs((labels[first] == species).sum() - (labels[second] == species).sum()) <= 1
    assert not torch.equal(first, protocol.halves(labels, 4)[0])
    order = protocol.in_turn(labels)
    assert sorted(order.tolist()) == list(range(101))
    assert torch.equal(labels[order[:100]], torch.arange(100) % 4)
    assert not torch.equal(order, protocol.in_turn(labels, seed=1))


def test_the_public_protocol_compares_equal_counts():
    data, held_out = ProceduralFlowers(16, 60, seed=1), ProceduralFlowers(16, 20, seed=2)

    class Echo:
        def __call__(self, labels, seed):
            return ProceduralFlowers(16, len(labels), seed=seed % 1000).images

    torch.manual_seed(0)
    network = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(12, 8))
    table = protocol.public_protocol(network, {"samples": Echo()}, data, held_out, 5)
    found, expected = (
        ev.extract_features(network, to_float(x)) for x in (Echo()([0] * 60, 5), data.images)
    )
    assert abs(table["samples"]["all"] - ev.frechet_distance(found, expected)) < 1e-9
    assert (table["samples"]["all_images"], table["samples"]["half_images"]) == (60, 30)
    assert table["samples"]["kernel_images"] == table["real"]["kernel_images"] == 20
    assert "all" not in table["real"] and table["real"]["half_images"] == 30
    first, second = protocol.halves(data.labels, 0)
    floor = ev.frechet_distance(expected[first], expected[second])
    assert abs(table["real"]["half"] - floor) < 1e-9
    wide = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(48, 48))
    table = protocol.public_protocol(wide, {"samples": Echo()}, data, held_out, 5)
    assert "all" in table["samples"] and "half" not in table["samples"]


def test_five_thousand_samples_need_less_than_four_gibibytes():
    """A process of its own, for the peak of this one is of all tests before."""
    resource = pytest.importorskip("resource", reason="not here: Windows")
    code = """
import resource, torch
from torch import nn
from noisout_nb import evaluation as ev, protocol
training = torch.zeros(7169, 3, 64, 64, dtype=torch.uint8).random_(256)
held_out = training[:400].flip(0) // 2 + 20
samples = {"samples": training[-5000:] // 2 + 30}
protocol.memorisation(samples, training, held_out)
network = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(192, 192))
a = ev.extract_features(network, samples["samples"].float() / 127.5 - 1)
ev.frechet_distance(a, a[:1000]), ev.kernel_distance(a, a), ev.precision_recall(a, a[:1000])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NOISOUT_RECORD": "1"}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    unit = 1 if sys.platform == "darwin" else 1024
    assert resource and int(found.stdout) * unit < 4 * 2**30


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


def test_prior_bits_are_the_kl_of_the_last_step():
    process = GaussianDiffusion(torch.full((4,), 0.3, dtype=torch.float64), "x0")
    images = 2 * torch.rand(3, 3, 32, 32) - 1
    prior, _ = ev.bits_per_dim(tiny_unet(), process, images)
    kept = 0.7**4
    last = torch.distributions.Normal(kept**0.5 * images.double(), (1 - kept) ** 0.5)
    nats = torch.distributions.kl_divergence(last, torch.distributions.Normal(0.0, 1.0))
    assert prior == pytest.approx(nats.mean().item() / math.log(2), rel=1e-5)


def test_bits_per_dim_takes_predictions_in_range():
    class Far(nn.Module):
        def forward(self, x, t, y=None):
            return 5 * torch.ones_like(x)

    class Clamped(Far):
        def forward(self, x, t, y=None):
            return super().forward(x, t, y).clamp(-1, 1)

    process = GaussianDiffusion.from_config("cosine", 5, "x0")
    images = torch.full((2, 3, 8, 8), 0.5)
    assert_close(
        ev.bits_per_dim(Far(), process, images), ev.bits_per_dim(Clamped(), process, images)
    )


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
        verdict = detector.examine(planted[name])
        assert verdict.suspected.double().mean() >= 0.99, name
        assert verdict.third.double().mean() >= 0.99, name
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
    twins = dict(zip(spoilt.duplicates.tolist(), spoilt.originals.tolist(), strict=True))
    assert {5: 3, 17: 4, 60: 5}.items() <= twins.items()
    assert abs(spoilt.threshold - clean.threshold) < 0.02


def test_a_threshold_needs_enough_held_out_images(flowers):
    images = to_float(flowers.images)
    with pytest.raises(ValueError, match="50 held-out images cannot place"):
        ev.CopyDetector(images[:100], images[100:150])
    with pytest.raises(ValueError, match="as many images"):
        ev.planted_copies(images[:3], images[:2])


def test_changes_of_a_copy_grow_with_their_strength(flowers):
    training, others = to_float(flowers.images[:20]), to_float(flowers.images[20:40])
    for name, same in ev.altered(training, others, 0.0).items():
        assert_close(same, training, rtol=0, atol=1e-6, msg=name)
    weak, strong = (ev.altered(training, others, strength) for strength in (0.1, 0.4))
    for name in weak:
        assert strong[name].abs().max() <= 1.001
        near, far = ((x[name] - training).abs().mean() for x in (weak, strong))
        assert 0 < near < far, name
    assert torch.equal(ev.altered(training, others, 1.0)["part"], others)
    assert torch.equal(strong["part"][..., :19], training[..., :19])
