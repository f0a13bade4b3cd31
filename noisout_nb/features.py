"""Features of images, which know the network they come from, and small files of them.

Distances between sets of images are distances between features. Features of two networks do not
compare, whatever their shapes, so a set carries its network's fingerprint and refuses to be mixed.
A file holds what evaluation needs of images that it may not contain: features and moments.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .files import atomic_file, fingerprint, load_safely
from .measurements import check_images
from .parallel import gather, share
from .progress import progress
from .unet import evaluating

FILE_LIMIT = 950_000  # bytes of features and moments in a file


class Features(Tensor):
    """A tensor of features, float64 (N, D), with the fingerprint of its extractor.

    It behaves as a tensor; what is cut or joined from it keeps the fingerprint. Any operation on
    features of two extractors raises ValueError.
    """

    extractor: str = ""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        found = super().__torch_function__(func, types, args, kwargs or {})
        given = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else [arg])]
        names = {x.extractor for x in given if isinstance(x, Features) and x.extractor}
        if len(names) > 1:
            raise ValueError(
                f"features of two extractors ({' and '.join(sorted(names))}) do not compare: "
                "extract both sets with one and the same network"
            )
        for part in found if isinstance(found, (list, tuple)) else [found]:
            if names and isinstance(part, Features):
                part.extractor = next(iter(names))
        return found


def label(values: Tensor, extractor: str) -> Features:
    """Features of a known extractor."""
    features = values.as_subclass(Features)
    features.extractor = extractor
    return features


def extractor_name(network: nn.Module) -> str:
    """A network's fingerprint: that of its weights, in whatever precision they are."""
    return fingerprint(*(value.detach().float() for value in network.state_dict().values()))


@torch.no_grad()
def extract_features(network: nn.Module, images: Tensor, batch_size: int = 64) -> Features:
    """Features of images, float (N, C, H, W) in [-1, 1]: float64 (N, D) on the CPU.

    `network` maps a batch to (B, D); it runs in eval mode. Under torchrun the processes share out
    the work, and each gets all features. Raises ValueError for images out of range and for a
    network whose output has another shape.
    """
    check_images(images)
    device = next(network.parameters()).device
    found = []
    with evaluating(network):
        batches = share(images).split(batch_size)
        for batch in progress(batches, total=len(batches), description="features"):
            found.append(network(batch.to(device, torch.float32)))
    if found[0].ndim != 2:
        shape = tuple(found[0].shape)
        raise ValueError(f"the network gives {shape}: features must be (B, D), one row per image")
    values = gather(torch.cat(found), len(images)).cpu().double()
    return label(values, extractor_name(network))


class InceptionFeatures(nn.Module):
    """The Inception network of the original FID: (B, 3, H, W) in [-1, 1] -> (B, 2048).

    It is torch-fidelity's conversion, which resizes as the original program does, so distances
    compare with published ones. Raises RuntimeError where the package or its weights (91 MB,
    downloaded on first use) cannot be had; the message says what to do.
    """

    def __init__(self):
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import (  # pyright: ignore[reportMissingImports]
                FeatureExtractorInceptionV3,
            )
        except ImportError as error:
            raise RuntimeError(
                "Inception's features need the package torch-fidelity: pip install torch-fidelity"
            ) from error
        try:
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"Inception's weights could not be downloaded ({error}). Connect to the network, "
                f"or put the file that torch-fidelity names into {torch.hub.get_dir()}/checkpoints"
            ) from error
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Features (B, 2048)."""
        return self.network(((x + 1) * 127.5).clamp(0, 255).round().to(torch.uint8))[0]


@dataclass(frozen=True)
class Moments:
    """Mean (D,), covariance (D, D) and number of images: all that a Fréchet distance needs."""

    mean: Tensor
    cov: Tensor
    count: int


def moments(features: Tensor) -> Moments:
    """The moments of features (N, D), in float64. One image has no covariance: it is NaN."""
    values, dim = features.double(), features.shape[1]
    return Moments(values.mean(0), values.T.cov().view(dim, dim), len(values))


def save_features(
    path: str | Path,
    sets: Mapping[str, Tensor],
    whole: Mapping[str, Tensor] = {},  # noqa: B006  (never changed)
    **facts,
) -> None:
    """Write features of `sets` in half precision, moments of `whole`, and a card with `facts`.

    Raises ValueError for features of two extractors or of an unknown one, for values that half
    precision cannot hold, and for more than such a small file should have.
    """
    known = {getattr(x, "extractor", "") for x in (*sets.values(), *whole.values())}
    if len(known) != 1 or "" in known:
        raise ValueError(f"features of the extractors {sorted(known)}: give those of a single one")
    dim = next(iter(sets.values())).shape[1]
    size = 2 * dim * (sum(map(len, sets.values())) + (dim + 3) * len(whole))
    if size > FILE_LIMIT:
        raise ValueError(f"{size:,} bytes of features: at most {FILE_LIMIT:,}, so give fewer")
    kept = {name: features.as_subclass(Tensor).half() for name, features in sets.items()}
    for name, values in kept.items():
        if not values.isfinite().all():
            raise ValueError(f"features of {name!r} are too large for half precision")
    upper = torch.triu_indices(dim, dim)
    parts = {name: moments(features.as_subclass(Tensor)) for name, features in whole.items()}
    saved = {
        "card": {"extractor": known.pop(), "dim": dim, **facts},
        "vectors": kept,
        "moments": {
            name: {"mean": m.mean.float(), "cov": m.cov[*upper].float(), "count": m.count}
            for name, m in parts.items()
        },
    }
    with atomic_file(path) as file:
        torch.save(saved, file)


def load_features(
    path: str | Path, network: nn.Module | None = None
) -> tuple[dict[str, Features], dict[str, Moments], dict]:
    """What `save_features` wrote: the sets' features, the moments, and the card.

    With `network`, ValueError where another network made them. Raises FileNotFoundError where the
    file is missing, ValueError where it is damaged or of another kind.
    """
    saved = load_safely(path)
    if not isinstance(saved, dict) or saved.keys() != {"card", "vectors", "moments"}:
        raise ValueError(
            f"{path} is no file of features: such a file is written by "
            "`python -m noisout_nb evaluate`"
        )
    card = saved["card"]
    if network is not None and (own := extractor_name(network)) != card["extractor"]:
        raise ValueError(
            f"{path} has features of the extractor {card['extractor']}, and the network is {own}: "
            "load the classifier that made them, or write the file anew: "
            "python -m noisout_nb evaluate"
        )
    sets = {name: label(x.double(), card["extractor"]) for name, x in saved["vectors"].items()}
    upper = torch.triu_indices(card["dim"], card["dim"])
    found = {}
    for name, part in saved["moments"].items():
        cov = torch.zeros(card["dim"], card["dim"], dtype=torch.float64)
        cov[*upper] = part["cov"].double()
        cov = cov + cov.triu(1).T
        mean = label(part["mean"].double(), card["extractor"])
        found[name] = Moments(mean, cov, part["count"])
    return sets, found, card
