"""The evaluation classifier: a small residual network that names species.

The distances compare its features, and "recognised" is its verdict. It sees clean images, never
noisy ones, and takes no part in sampling: a judge, not a guide.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import atomic_file, load_safely
from .forward_process import GaussianDiffusion
from .parallel import has_bfloat16
from .profiles import Profile
from .training import Batches, Step, learning_rate_at
from .unet import evaluating


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut (He et al. 2016): channels `inside` -> `outside`."""

    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(inside),
            nn.ReLU(),
            nn.Conv2d(inside, outside, 3, padding=1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, padding=1, bias=False),
        )
        self.shortcut = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inside, H, W) -> (B, outside, H, W)."""
        return self.shortcut(x) + self.layers(x)


class FlowerClassifier(nn.Module):
    """A pre-activation ResNet in three stages: images float (B, 3, H, W) in [-1, 1] -> logits.

    `image_size` is the side that it is trained with; images of another one are resized to it. The
    first convolution takes steps of `patch_size` pixels. `width` doubles from stage to stage, each
    of `depth` residual blocks. `features` gives (B, 4 width): the last stage's mean over the image.
    """

    def __init__(
        self,
        classes: int,
        image_size: int,
        *,
        patch_size: int = 2,
        width: int = 32,
        depth: int = 2,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.config = {
            "classes": classes,
            "image_size": image_size,
            "patch_size": patch_size,
            "width": width,
            "depth": depth,
            "dropout": dropout,
        }
        self.image_size = image_size
        stages: list[nn.Module] = [
            nn.Conv2d(3, width, patch_size + 2, stride=patch_size, padding=1)
        ]
        channels = width
        for level in range(3):
            if level:
                stages.append(nn.AvgPool2d(2))
            for _ in range(depth):
                stages.append(ResidualBlock(channels, width * 2**level))
                channels = width * 2**level
        self.stages = nn.Sequential(*stages, nn.BatchNorm2d(channels), nn.ReLU())
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(channels, classes)

    def features(self, x: Tensor, every_stage: bool = False) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 4 width), or of every stage (B, 7 width)."""
        if min(x.shape[2:]) != self.image_size:
            size = [side * self.image_size // min(x.shape[2:]) for side in x.shape[2:]]
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
        found = []
        for layer in self.stages:
            if every_stage and isinstance(layer, nn.AvgPool2d):  # where a stage ends
                found.append(x.mean((2, 3)))
            x = layer(x)
        return torch.cat([*found, x.mean((2, 3))], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> logits (B, classes)."""
        return self.head(self.dropout(self.features(x)))


class ClassifierFeatures(nn.Module):
    """A classifier's features as a network of its own, as `extract_features` takes them; frozen.

    Those of its last stage, or, where they are at most 128 in all, of every stage: the last one of
    a small classifier that is never wrong knows the species and little else.
    """

    def __init__(self, classifier: FlowerClassifier):
        super().__init__()
        self.classifier = classifier.eval().requires_grad_(False)
        self.every_stage = 7 * classifier.config["width"] <= 128

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, D)."""
        return self.classifier.features(x, self.every_stage)


@torch.no_grad()
def classify(classifier: FlowerClassifier, images: Tensor, batch_size: int = 64) -> Tensor:
    """The species that the classifier names, in eval mode: float (N, 3, H, W) -> int64 (N,)."""
    device = next(classifier.parameters()).device
    with evaluating(classifier):
        batches = images.split(batch_size)
        return torch.cat([classifier(x.to(device)).argmax(1) for x in batches]).cpu()


def augment(
    x: Tensor, generator: torch.Generator | None = None, *, crop: float = 0.75, colour: float = 0.2
) -> Tensor:
    """Random crops and slight changes of colour, another for each image: (B, 3, H, W) in [-1, 1].

    A crop keeps `crop` to 1 of each side and is scaled back up; brightness, contrast and saturation
    change by up to `colour`. (`Batches` flips.)
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(x), generator=generator).to(x.device)

    theta = torch.zeros(len(x), 2, 3, device=x.device)
    for axis in (0, 1):
        side = uniform(crop, 1)
        theta[:, axis, axis] = side
        theta[:, axis, 2] = uniform(-1, 1) * (1 - side)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    brightness, contrast, saturation = (
        uniform(-colour, colour).view(-1, 1, 1, 1) for _ in range(3)
    )
    grey = x.mean(1, keepdim=True)
    x = grey + (1 + saturation) * (x - grey)
    mean = x.mean((1, 2, 3), keepdim=True)
    return (mean + (1 + contrast) * (x - mean) + brightness).clamp(-1, 1)


def train_classifier(
    classifier: nn.Module,
    batches: Batches,
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.05,
    label_smoothing: float = 0.0,
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    process: GaussianDiffusion | None = None,
    highest_t: int = 1000,
    autocast: bool = False,
    seed: int = 0,
) -> Iterator[Step]:
    """Train a classifier with cross-entropy: a generator that yields a `Step` per optimiser step.

    Without `process` the classifier sees clean images, `classifier(x)`; with it noisy ones at
    uniform timesteps below `highest_t`, `classifier(x_t, t)`. The optimiser is AdamW; its learning
    rate warms up, then falls to zero along a cosine. `autocast`: bfloat16 in the network where the
    device computes in it natively.
    """
    device = next(classifier.parameters()).device
    autocast = autocast and has_bfloat16(device)
    optimizer = torch.optim.AdamW(
        classifier.parameters(), lr=learning_rate, weight_decay=weight_decay
    )
    generator = torch.Generator().manual_seed(seed)
    for index, (x, y) in zip(range(1, steps + 1), batches, strict=False):
        classifier.train()
        x = x if augment is None else augment(x, generator)
        inputs = (x,)
        if process is not None:
            t = torch.randint(highest_t, y.shape, generator=generator).to(device)
            noise = torch.randn(x.shape, generator=generator).to(device)
            inputs = (process.q_sample(x, t, noise), t)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = classifier(*inputs)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = learning_rate_at(index - 1, steps, learning_rate)
        optimizer.step()
        yield Step(index, loss.item())


def classifier_files(profile: Profile) -> list[Path]:
    """Where a profile's classifier is looked for: the published file, then that of its own run."""
    own = profile.runs / "classifier.pth"
    if profile.pretrained is None:
        return [own]
    name = profile.pretrained.name.replace("_model", "_classifier")
    return [profile.pretrained.with_name(name), own]


def save_classifier(
    classifier: FlowerClassifier, path: str | Path, classes: tuple[str, ...], **facts
) -> None:
    """Write weights in half precision and a card: network, species and `facts`, plain values."""
    weights = {
        name: value.half() if value.is_floating_point() else value
        for name, value in classifier.state_dict().items()
    }
    card = {"network": classifier.config, "classes": list(classes), **facts}
    with atomic_file(path) as file:
        torch.save({"card": card, "weights": weights}, file)


def load_classifier(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[FlowerClassifier, dict]:
    """Read what `save_classifier` wrote: the classifier in eval mode and float32, and its card.

    Raises FileNotFoundError where the file is missing, ValueError where it is damaged or not ours.
    """
    saved = load_safely(Path(path))
    if not isinstance(saved, dict) or saved.keys() != {"card", "weights"}:
        raise ValueError(
            f"{path} is no evaluation classifier: such a file is written by "
            "`python -m noisout_nb train-classifier`"
        )
    classifier = FlowerClassifier(**saved["card"]["network"])
    classifier.load_state_dict(saved["weights"])
    return classifier.to(device).eval(), saved["card"]


def find_classifier(
    profile: Profile, given: str | Path | None = None, device: torch.device | str = "cpu"
) -> tuple[FlowerClassifier, dict]:
    """The classifier in the file `given`, or the profile's, with its card.

    Raises FileNotFoundError where there is none; the message says how to train one.
    """
    files = [Path(given)] if given else classifier_files(profile)
    for path in files:
        if path.exists():
            return load_classifier(path, device)
    raise FileNotFoundError(
        f"no evaluation classifier in {' or '.join(map(str, files))}: train one first: "
        f"python -m noisout_nb train-classifier --profile {profile.name}"
    )
