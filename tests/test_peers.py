"""The benchmark's rules on made-up numbers; the contenders, as far as they are installed."""

import json
import subprocess
import types

import contenders
import peers
import pytest
import torch
from torch.testing import assert_close

from noisout_nb.data import ProceduralFlowers

NEEDED = {"diffusers": "diffusers", "denoising-diffusion-pytorch": "denoising_diffusion_pytorch"}


def test_a_distance_is_reached_within_twice_the_error_of_the_difference():
    wanted = [1.0, 5.0, 3.0]  # a seed's flowers move all distances, which is no error
    error = 0.2 / 3**0.5
    for excess, expected in ((-1, True), (0, True), (1.99, True), (2.01, False)):
        values = [w + excess * error + x for w, x in zip(wanted, (-0.2, 0.2, 0.0), strict=True)]
        assert peers.reaches(values, wanted) is expected
    assert peers.reaches(wanted, wanted)
    assert not peers.reaches([w + 0.01 for w in wanted], wanted)


def test_the_cheapest_setting_at_equal_distance():
    settings = {
        "20 steps": (20.0, [1.0, 1.1, 1.2]),
        "10 steps": (10.0, [1.0, 1.2, 1.2]),
        "5 steps": (5.0, [3.0, 3.1, 3.2]),
    }
    assert peers.cheapest(settings, [1.0, 1.1, 1.2]) == "10 steps"
    assert peers.cheapest(settings, [3.0, 3.1, 3.2]) == "5 steps"
    assert peers.cheapest(settings, [0.5, 0.5, 0.5]) is None


def test_seconds_at_equal_distance_say_where_a_distance_is_not_reached():
    names = list(peers.CONTENDERS)
    found = {("real", "", 0): [{key: 0.0 for key in peers.DISTANCES}] * 3}
    for quality, name in enumerate(names):  # each library is worse than the one before
        for steps, more in ((10, 0.5), (20, 0.0)):
            value = quality + more
            found[name, "DDIM", steps] = [{key: value for key in peers.DISTANCES}] * 3
    calls = dict(zip(names, (0.001, 0.002, 0.003), strict=True))
    lines = peers.equal_distance(found, calls).splitlines()
    assert len(lines) == 2 + 3 * len(peers.DISTANCES)
    assert lines[2].endswith("| 20 (DDIM 20) | not reached | not reached |")
    assert lines[4].endswith(
        "the best of denoising-diffusion-pytorch | 10 (DDIM 10) | 20 (DDIM 10) | 60 (DDIM 20) |"
    )


def test_a_number_that_is_in_the_file_is_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "FOLDER", tmp_path / "peers")
    asked = []

    def run(command, **options):
        asked.append(json.loads(command[-1]))
        return types.SimpleNamespace(stdout=f'something else\n{{"step": {len(asked)}}}\n')

    monkeypatch.setattr(subprocess, "run", run)
    first = peers.done("speed", name="noisOut", turn=0)
    assert first == {"step": 1} and peers.done("speed", name="noisOut", turn=0) == first
    assert peers.done("speed", name="noisOut", turn=1) == {"step": 2}
    assert asked[0] == {"job": "speed", "name": "noisOut", "turn": 0} and len(asked) == 2


@pytest.mark.parametrize("name", peers.CONTENDERS)
def test_a_contender_trains_and_samples(name):
    if name in NEEDED:
        pytest.importorskip(NEEDED[name], reason=f"not here: {name} is not installed")
    torch.manual_seed(0)
    contender = contenders.CONTENDERS[name](32, steps=4, rate=1e-3)
    before = [p.detach().clone() for p in contender.model.parameters()]
    for _ in range(3):
        contender.step()
    trained = [p.detach().clone() for p in contender.model.parameters()]
    assert sum(not torch.equal(a, b) for a, b in zip(before, trained, strict=True)) > 20
    loss = contender.held_out_loss(ProceduralFlowers(32, 16, seed=5))
    assert 0 < loss < 10 and loss == contender.held_out_loss(ProceduralFlowers(32, 16, seed=5))
    assert all(map(torch.equal, trained, contender.model.parameters()))

    labels, (sampler, steps) = torch.tensor([0, 3]), contender.settings[32][0]
    images = contender.sample(labels, sampler, steps, 0)
    assert images.shape == (2, 3, 32, 32) and images.abs().max() <= 1
    assert torch.equal(images, contender.sample(labels, sampler, steps, 0))
    for other in ((labels.flip(0), sampler, steps, 0), (labels, sampler, steps, 1)):
        assert not torch.allclose(images, contender.sample(*other))
    assert not torch.allclose(images, contender.sample(labels, sampler, steps, 0, 3.0))
    contenders.put(contender.model, contender.average())
    assert_close(list(contender.model.parameters()), list(contender.average()))
