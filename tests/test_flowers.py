"""The embedded flowers: pixels and factors stay those that networks were trained on."""

import ast
from pathlib import Path

import torch

from noisout_nb import flowers
from noisout_nb.data import ProceduralFlowers, to_uint8
from noisout_nb.flowers import SPECIES, draw_factors, paint

# of one flower per species, in SPECIES' order: red, green and blue in the centre, on the upper
# petal, in the background's corner; and the mean over all pixels
PIXELS = [
    [255, 211, 33, 224, 230, 220, 84, 129, 59],
    [36, 27, 32, 234, 29, 31, 21, 44, 35],
    [253, 230, 68, 85, 122, 214, 25, 52, 42],
    [254, 201, 41, 240, 80, 176, 66, 144, 73],
    [105, 58, 29, 242, 179, 17, 85, 165, 75],
    [216, 207, 141, 162, 92, 238, 48, 95, 44],
]
MEANS = [102.59, 50.40, 58.33, 102.09, 91.18, 72.92]


def test_the_pixels_are_those_that_the_shipped_weights_were_trained_on():
    labels = torch.arange(6)
    factors = draw_factors(labels, torch.Generator().manual_seed(7))
    images = to_uint8(paint(32, labels, factors)).int()
    seen = torch.cat([images[:, :, i, j] for i, j in ((16, 16), (8, 16), (1, 1))], dim=1)
    assert (seen - torch.tensor(PIXELS)).abs().max() <= 1  # other processors may round differently
    assert torch.allclose(images.float().mean((1, 2, 3)), torch.tensor(MEANS), atol=0.05)


def test_factors_lie_in_the_ranges_of_their_species():
    data = ProceduralFlowers(16, 300, seed=3)
    for name, species in SPECIES.items():
        own = data.labels == data.classes.index(name)
        assert own.any() and (data.factors["petals"][own] == species.petals).all()
        away = (data.factors["hue"][own] - species.hue + 0.5) % 1 - 0.5
        assert away.abs().max() <= species.hue_range + 1e-6
    assert data.factors["radius"].min() >= 0.60 and data.factors["radius"].max() <= 0.88


def test_a_flower_does_not_depend_on_its_batch():
    labels = torch.arange(6)
    factors = draw_factors(labels, torch.Generator().manual_seed(1))
    alone = {name: values[2:3] for name, values in factors.items()}
    gap = paint(32, labels, factors)[2] - paint(32, labels[2:3], alone)[0]
    assert gap.abs().max() < 1e-5


def test_the_formula_imports_nothing_of_the_package():
    tree = ast.parse(Path(flowers.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [node.module for node in imports if node.level or "noisout" in str(node.module)]
