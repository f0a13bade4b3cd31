"""The numbers that change with the machine: one frozen dataclass, one table.

Notebooks read `profile.image_size`, never a literal, so the same code runs from a laptop to a GPU.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

_ABOVE = Path(__file__).resolve().parent.parent
# where runs/, data/ and models/ lie: the clone, or, for an installed package, where Python started
REPOSITORY = _ABOVE if (_ABOVE / "pyproject.toml").exists() else Path.cwd()


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One size of the same experiment.

    - `dataset`: "procedural" (the embedded flowers), "flowers102" or "folder" (your own images).
    - `train_images`: how many embedded flowers the training set has; None for photographs.
    - From `patch_size` to `dropout`: arguments of the `UNet`, see `network`.
    - From `schedule` to `variance`: arguments of the `GaussianDiffusion`, see `process`.
    - From `weighting` to `flip`: the training run. `autocast` runs the network in bfloat16 where
      the device computes in it natively.
    - `guidance_scale`, `guidance_interval`, `sampler`, `spacing` and `sample_steps`: how the final
      images are sampled.
    """

    name: str
    dataset: str
    image_size: int
    train_images: int | None = None

    patch_size: int
    channels: int
    channel_mults: tuple[float, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...] = ()
    dropout: float = 0.0

    schedule: str = "cosine"
    timesteps: int = 1000
    prediction: str = "x0"
    variance: str = "posterior"

    weighting: str = "snr+1"
    max_weight: float | None = 100.0
    timestep_density: str = "uniform"
    batch_size: int
    train_steps: int
    learning_rate: float
    ema_decay: float
    label_dropout: float = 0.1
    autocast: bool = True
    flip: bool = True

    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    sampler: str = "ddim"
    spacing: str = "uniform"
    sample_steps: int = 20

    @property
    def network(self) -> dict:
        """Arguments of the `UNet`; `num_classes` is added once the data set is known."""
        return {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "channels": self.channels,
            "channel_mults": self.channel_mults,
            "num_res_blocks": self.num_res_blocks,
            "attention_resolutions": self.attention_resolutions,
            "dropout": self.dropout,
            "out_channels": 6 if self.variance == "learned" else 3,
        }

    @property
    def process(self) -> dict:
        """Arguments of `GaussianDiffusion.from_config`."""
        return {
            "schedule": self.schedule,
            "timesteps": self.timesteps,
            "prediction": self.prediction,
            "variance": self.variance,
        }

    @property
    def training(self) -> dict:
        """Keyword arguments of `train`."""
        return {
            "steps": self.train_steps,
            "learning_rate": self.learning_rate,
            "label_dropout": self.label_dropout,
            "weighting": self.weighting,
            "max_weight": self.max_weight,
            "timestep_density": self.timestep_density,
            "autocast": self.autocast,
        }

    @property
    def runs(self) -> Path:
        """Folder of this profile's training state, weights and images; git ignores it.

        It lies in NOISOUT_RUNS where that is set, else in `runs/` of the repository.
        """
        return Path(os.environ.get("NOISOUT_RUNS") or REPOSITORY / "runs") / self.name

    @property
    def weights(self) -> Path:
        """The file that this profile's training run writes."""
        return self.runs / "model.pth"

    @property
    def published(self) -> Path | None:
        """Where weights are published, `models/` in the repository; None for your own images."""
        files = {"procedural": "quick_model.pth", "flowers102": "Flowers102_model.pth"}
        return REPOSITORY / "models" / files[self.dataset] if self.dataset in files else None

    @property
    def pretrained(self) -> Path | None:
        """The published weights; without such a file, those inside the installed package."""
        path = self.published
        if path is None or path.exists():
            return path
        inside = Path(__file__).with_name("models") / path.name
        return inside if inside.exists() else path


_QUICK = Profile(
    name="quick",
    dataset="procedural",
    image_size=32,
    train_images=2000,
    patch_size=2,
    channels=32,
    channel_mults=(1, 2, 2),
    num_res_blocks=1,
    max_weight=10.0,
    batch_size=16,
    train_steps=900,
    learning_rate=2e-3,
    ema_decay=0.99,
    autocast=False,
    flip=False,  # the embedded flowers are lit from the left
    sample_steps=50,
)
_FLOWERS64 = Profile(
    name="flowers64",
    dataset="flowers102",
    image_size=64,
    patch_size=2,
    channels=64,
    channel_mults=(0.5, 1, 2, 2),
    num_res_blocks=2,
    attention_resolutions=(8, 4),
    dropout=0.1,
    batch_size=32,
    train_steps=24_000,
    learning_rate=5e-4,
    ema_decay=0.999,
    guidance_scale=2.0,
    guidance_interval=(0.3, 8.0),
    sampler="dpm_solver",
)
_FLOWERS64_GPU = replace(
    _FLOWERS64,
    name="flowers64-gpu",
    channels=128,
    channel_mults=(1, 2, 3),
    attention_resolutions=(16, 8),
    dropout=0.2,
    batch_size=256,
    train_steps=20_000,
    learning_rate=4e-4,
    ema_decay=0.9995,
)
_FOLDER = replace(_FLOWERS64, name="folder", dataset="folder", train_steps=4_000)

PROFILES = {profile.name: profile for profile in (_QUICK, _FLOWERS64, _FLOWERS64_GPU, _FOLDER)}
DATASETS = {
    "procedural": "embedded flowers",
    "flowers102": "Flowers102",
    "folder": "your own images",
}


def get_profile(name: str | None = None) -> Profile:
    """The named profile; without a name that of NOISOUT_PROFILE, else `quick`.

    Prints which one it is, why, and how to choose another. Raises ValueError for an unknown name.
    """
    if name:
        reason = "asked for by name"
    elif name := os.environ.get("NOISOUT_PROFILE"):
        reason = "set by NOISOUT_PROFILE"
    else:
        name, reason = "quick", "the default"
    if name not in PROFILES:
        raise ValueError(
            f"unknown profile {name!r} ({reason}): choose one of {', '.join(PROFILES)}"
        )
    profile = PROFILES[name]
    size = f"{profile.image_size} x {profile.image_size} pixels"
    print(f"profile {name!r} ({reason}): {DATASETS[profile.dataset]}, {size}")
    print(f"for another, set NOISOUT_PROFILE to one of {', '.join(PROFILES)} before you start")
    return profile
