"""Make the README's two images with the published weights: results.png and demo.png.

    python tools/readme_images.py

Nothing is selected: of each species the first samples of one seed are shown.
"""

from pathlib import Path

import torch

from noisout_nb.checkpoints import load_model
from noisout_nb.data import species_labels
from noisout_nb.figures import filmstrip, image_grid
from noisout_nb.generate import sample_image
from noisout_nb.guidance import ClassifierFreeGuidance
from noisout_nb.profiles import PROFILES
from noisout_nb.sampling import SAMPLERS

ROOT = Path(__file__).resolve().parent.parent
PROFILE = PROFILES["flowers64"]
SPECIES = (
    "sunflower",
    "rose",
    "water lily",
    "hibiscus",
    "passion flower",
    "pink primrose",
    "bearded iris",
    "english marigold",
    "purple coneflower",
    "fire lily",
)
COUNT = 8
SEED = 3
FRAMES = (0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1)  # of the way from noise to image


def results() -> None:
    """Ten species in rows."""
    images = sample_image(SPECIES, COUNT, seed=SEED)
    image_grid(
        images,
        columns=COUNT,
        scale=2,
        row_labels=SPECIES,
        alt=f"Generated flowers: {COUNT} samples of each of {len(SPECIES)} species",
    ).save(ROOT / "results.png")


def demo() -> None:
    """The reverse process of one sunflower: the image above, the predicted x_0 below."""
    model, process, classes = load_model(PROFILE.published)
    guided = ClassifierFreeGuidance(
        model, PROFILE.guidance_scale, process=process, interval=PROFILE.guidance_interval
    )
    x_T = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(SEED))
    sampler = SAMPLERS[PROFILE.sampler]
    options = {"steps": PROFILE.sample_steps, "spacing": PROFILE.spacing}
    states = list(sampler(guided, process, x_T, species_labels("sunflower", classes), **options))
    shown = [states[round(part * (len(states) - 1))] for part in FRAMES]
    filmstrip(
        [[state.x[0] for state in shown], [state.x_start[0] for state in shown]],
        row_labels=["$x$", r"$\hat{x}_0$"],
        column_labels=[f"t = {state.t}" for state in shown],
        arrow="the reverse process",
        scale=1,
        alt="Noise becomes a sunflower in eight frames; below each the predicted clean image",
    ).save(ROOT / "demo.png")


if __name__ == "__main__":
    demo()
    results()
