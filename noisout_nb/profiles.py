"""Every number that depends on the machine: one frozen dataclass, one table. Notebooks read `profile.image_size`, never a literal."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One size of the same experiment.

    `dataset`: "procedural" or "flowers102". `train_images`: how many flowers to draw (procedural only).
    The fields from `patch_size` to `input_skip` are the UNet's arguments, the next four the GaussianDiffusion's,
    those from `batch_size` on the training's (`autocast`: in bfloat16 where the device calculates with it);
    `guidance_scale` and `sample_steps` are used to draw the final pictures.
    """

    name: str
    dataset: str
    image_size: int
    train_images: int | None
    patch_size: int
    channels: int
    channel_mults: tuple[float, ...]
    num_res_blocks: int
    attention_resolutions: tuple[int, ...]
    dropout: float
    input_skip: bool = False
    schedule: str = "cosine"
    timesteps: int = 1000
    prediction: str = "v"
    variance: str = "posterior"
    batch_size: int
    train_steps: int
    learning_rate: float
    ema_decay: float
    label_dropout: float = 0.1
    autocast: bool = True
    guidance_scale: float
    sample_steps: int

    @property
    def network(self) -> dict:
        """The UNet's arguments; `num_classes` is added where the data set is at hand."""
        names = ("image_size", "patch_size", "channels", "channel_mults", "num_res_blocks", "attention_resolutions", "dropout", "input_skip")
        return {name: getattr(self, name) for name in names} | {"out_channels": 6 if self.variance == "learned" else 3}

    @property
    def runs(self) -> Path:
        """Folder of this profile's checkpoint and pictures, ignored by git."""
        return Path(os.environ.get("NOISOUT_RUNS") or REPOSITORY / "runs") / self.name

    @property
    def weights(self) -> Path:
        """Where the trained weights go: those of two profiles to the repository's models/, others to `runs`."""
        shipped = {"flowers32": "Flowers102_model.pth", "flowers64-folded": "Flowers102_64_model.pth"}
        return REPOSITORY / "models" / shipped[self.name] if self.name in shipped else self.runs / "model.pth"


PROFILES = {profile.name: profile for profile in (
    Profile(name="quick", dataset="procedural", image_size=32, train_images=2000,
            patch_size=1, channels=16, channel_mults=(1, 2, 4), num_res_blocks=1, attention_resolutions=(), dropout=0.0,
            batch_size=16, train_steps=750, learning_rate=3e-3, ema_decay=0.99, autocast=False, guidance_scale=1.0, sample_steps=50),
    Profile(name="flowers32", dataset="flowers102", image_size=32, train_images=None,
            patch_size=2, channels=64, channel_mults=(1, 2, 2), num_res_blocks=2, attention_resolutions=(8, 4), dropout=0.05,
            batch_size=32, train_steps=12_000, learning_rate=1e-3, ema_decay=0.9995, guidance_scale=3.0, sample_steps=50),
    Profile(name="flowers64-folded", dataset="flowers102", image_size=64, train_images=None,
            patch_size=2, channels=64, channel_mults=(0.5, 1, 2, 2), num_res_blocks=2, attention_resolutions=(8, 4), dropout=0.05, input_skip=True,
            batch_size=32, train_steps=5_000, learning_rate=1e-3, ema_decay=0.999, guidance_scale=3.0, sample_steps=20),
    Profile(name="flowers64", dataset="flowers102", image_size=64, train_images=None,
            patch_size=1, channels=128, channel_mults=(1, 2, 3, 4), num_res_blocks=2, attention_resolutions=(16, 8), dropout=0.1,
            batch_size=128, train_steps=50_000, learning_rate=3e-4, ema_decay=0.9999, guidance_scale=2.0, sample_steps=100),
)}  # fmt: skip


def get_profile(name: str | None = None) -> Profile:
    """The named profile; without a name that of NOISOUT_PROFILE, else flowers64 on a CUDA device with 64 GB, else quick.

    Prints what was chosen, why, and how to change it. Raises ValueError for an unknown name.
    """
    named = {"asked for by name": name, "set by NOISOUT_PROFILE": os.environ.get("NOISOUT_PROFILE")}
    large = torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > 64e9
    by_device = {"there is a large CUDA device": "flowers64"} if large else {"there is no CUDA device of 64 GB": "quick"}
    reason, name = next((reason, name) for reason, name in (named | by_device).items() if name)
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r} ({reason}): choose one of {', '.join(PROFILES)}")
    profile = PROFILES[name]
    pictures = "embedded flowers" if profile.dataset == "procedural" else "Flowers102"
    print(f"profile {name!r} ({reason}): {pictures}, {profile.image_size} x {profile.image_size} pixels")
    print(f"to change it: set NOISOUT_PROFILE to one of {', '.join(PROFILES)} before starting, or call get_profile(name)")
    return profile
