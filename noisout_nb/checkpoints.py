"""Files of weights: one file holds the weights and the card that describes them."""

import filecmp
import itertools
import json
import math
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from .ema import EMA
from .files import atomic_file, check_is_file, load_safely, short_name
from .forward_process import GaussianDiffusion
from .losses import check_weighting
from .profiles import Profile
from .unet import UNet

_CARD_KEYS = ("network", "process", "classes")


def plain_json(value: dict) -> dict:
    """The value as JSON gives it back: tuples are lists, NumPy's numbers Python's.

    Raises ValueError for what JSON cannot hold.
    """
    try:
        return json.loads(json.dumps(value, default=lambda odd: odd.item()))
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{value!r} is no plain value of numbers, words and lists") from error


def _plain_name(name: str) -> str:
    return name.replace("_orig_mod.", "")  # which torch.compile puts in


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict under the network's own names, compiled or not."""
    return {_plain_name(name): value for name, value in model.state_dict().items()}


def load_plain_state(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """`load_state_dict` that takes compiled networks' weights into plain ones, and back."""
    own_names = {_plain_name(name): name for name in model.state_dict()}
    plain = {_plain_name(name): value for name, value in weights.items()}
    model.load_state_dict({own_names.get(name, name): value for name, value in plain.items()})


def save_model(
    model: UNet,
    path: str | Path,
    process: GaussianDiffusion,
    classes: Sequence[str],
    *,
    ema: EMA | None = None,
    **facts,
) -> None:
    """Write the plain state_dict in half precision to `path`, with a card inside the same file.

    With `ema` the averaged parameters are written. The card says what is needed to use the weights:
    network, process, the names of the classes, and `facts` (plain JSON values such as
    `held_out_loss`); `read_card` returns it. `torch.load` gives the state_dict alone. Whenever the
    program is killed, `path` is the old file or the new one, whole.

    Raises ValueError for a weight that is not finite in half precision, an average of another
    network, names that do not fit the number of classes, and facts that are no plain values.
    """
    known = model.config["num_classes"]
    if known is not None and known != len(classes):
        raise ValueError(f"{len(classes)} names were given, but this network has {known} classes")
    described = {"network": model.config, "process": process.config, "classes": list(classes)}
    card = plain_json(facts | described)
    if ema is not None:
        ema.check(model)
    with ema.applied() if ema is not None else nullcontext():
        weights = {name: _half(name, value) for name, value in plain_state(model).items()}
    with atomic_file(path) as file:
        torch.save(weights, file)
        file.flush()
        with zipfile.ZipFile(file, "a") as archive:  # torch.save writes a zip of one folder
            folder = archive.namelist()[0].split("/")[0]
            archive.writestr(f"{folder}/card.json", json.dumps(card, indent=1))


def _half(name: str, value: Tensor) -> Tensor:
    """A copy on the CPU, in half precision where it is a floating-point tensor."""
    if not value.is_floating_point():
        return value.detach().cpu().clone()
    half = value.detach().to("cpu", torch.float16, copy=True)
    if not half.isfinite().all():
        largest = value.abs().max().item()
        raise ValueError(
            f"{name} reaches {largest:.3g}, and half precision ends at 65,504: these weights "
            "cannot be saved. Has the training run diverged?"
        )
    return half


def read_card(path: str | Path) -> dict:
    """What `save_model` wrote about the weights in `path`, without loading them.

    Raises FileNotFoundError where there is no file, ValueError where it has no card.
    """
    path = Path(path)
    check_is_file(path)
    card = None
    with open(path, "rb") as file:
        if zipfile.is_zipfile(file):
            try:
                with zipfile.ZipFile(file) as archive:
                    for name in archive.namelist():
                        if name.endswith("/card.json"):
                            card = json.loads(archive.read(name))
            except (zipfile.BadZipFile, ValueError) as error:
                raise ValueError(f"{path}: its card is damaged ({error})") from error
    if not isinstance(card, dict) or not set(_CARD_KEYS) <= card.keys():
        raise ValueError(
            f"{path} has no card of {', '.join(_CARD_KEYS)}, so save_model did not write it. "
            "If it holds a state_dict, load_weights_into(model, path) copies it into a network "
            "that you build"
        )
    return card


def load_model(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[UNet, GaussianDiffusion, tuple[str, ...]]:
    """Read what `save_model` wrote: the network in eval mode and float32, its process, its classes.

    Raises FileNotFoundError where there is no file, ValueError where it is damaged, without a card,
    or its card names what this version does not know.
    """
    weights = load_safely(path)
    card = read_card(path)
    try:
        check_weighting(card.get("weighting"))
        model = UNet(**card["network"])
        process = GaussianDiffusion.from_config(**card["process"])
        load_plain_state(model, weights)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} does not fit this version of noisout_nb: {reason}") from error
    return model.to(device).eval(), process.to(device), tuple(card["classes"])


def load_pretrained(
    profile: Profile, device: torch.device | str = "cpu"
) -> tuple[UNet, GaussianDiffusion, tuple[str, ...]]:
    """The weights to start from: those published for the profile, else those of its own run.

    Prints which file it is, and what differs in it from the profile. Raises FileNotFoundError where
    there is neither, ValueError where its images are of another size than the profile's.
    """
    candidates = [path for path in (profile.pretrained, profile.weights) if path is not None]
    existing = [path for path in candidates if path.exists()]
    if not existing:
        raise FileNotFoundError(
            f"no weights for the profile {profile.name!r}: there is no file "
            f"{' and no '.join(map(str, candidates))}. Train first (04_training or test.ipynb)"
        )
    path = existing[0]
    model, process, classes = load_model(path, device)
    wanted = plain_json(profile.network | profile.process)
    found = plain_json(model.config | process.config)
    changes = [f"{k} {found[k]} instead of {v}" for k, v in wanted.items() if found[k] != v]
    if found["image_size"] != profile.image_size:
        raise ValueError(
            f"{path} is for images of {found['image_size']} pixels, the profile {profile.name!r} "
            f"for {profile.image_size}: train it first, or load_model({str(path)!r}) directly"
        )
    print(f"weights: {short_name(path)}", *([f"({', '.join(changes)})"] if changes else []))
    return model, process, classes


def load_weights_into(model: nn.Module, path: str | Path) -> list[str]:
    """Copy what fits of the weights in `path` into `model`, to fine-tune them on other images.

    A weight fits where name and shape are the same. Returns the names of the model's own weights
    that none was found for, which keep their values: with another number of classes that is
    `["label_emb.weight"]`. `path` may hold any state_dict, with or without a card.

    Raises ValueError where the file holds no state_dict or nothing fits.
    """
    weights = load_safely(path)
    if not isinstance(weights, dict) or not all(torch.is_tensor(w) for w in weights.values()):
        raise ValueError(f"{path} holds no state_dict (names and their tensors)")
    weights = {_plain_name(name): value for name, value in weights.items()}
    own = plain_state(model)
    fitting = [n for n in own if n in weights and weights[n].shape == own[n].shape]
    if not fitting:
        raise ValueError(f"no weight in {path} has the name and shape of one of this network's")
    load_plain_state(model, own | {name: weights[name] for name in fitting})
    return [name for name in own if name not in fitting]


# Settings of the card that make two held-out losses comparable
_PROTOCOL = ("schedule", "timesteps", "image_size", "classes", "weighting", "max_weight")


def publish(source: str | Path, target: str | Path, *, force: bool = False) -> bool:
    """Copy the weights `source` to `target` where their `held_out_loss` is lower; True if done.

    Where `target` has the lower loss, or the two cannot be compared, it stays as it is. With
    `force` it is replaced all the same, and a copy of it kept as NAME.old.pth (NAME.old2.pth, ...).
    A line says what was done and why. Whenever the program is killed, each file is whole.

    Raises what `load_model` raises for a source that is damaged or without a card.
    """
    source, target = Path(source), Path(target)
    load_model(source)  # nothing that cannot be used is published
    verdict, better = _compare(source, target)
    if not better and not force:
        print(
            f"{short_name(target)} stays: {verdict}. To publish {short_name(source)} all the same: "
            "python -m noisout_nb publish --force (which keeps the old file aside)"
        )
        return False
    if force and target.exists() and not filecmp.cmp(source, target, shallow=False):
        verdict = f"{verdict}; the old file is {short_name(_keep_aside(target))}"
    _copy(source, target)
    print(f"{short_name(target)} is now {short_name(source)}: {verdict}")
    return True


def _compare(source: Path, target: Path) -> tuple[str, bool]:
    """What the two cards say about each other, and whether `source` is better."""
    if not target.exists():
        return "there was none before", True
    new = read_card(source)
    try:
        old = read_card(target)
    except ValueError as error:
        return f"the two cannot be compared ({error})", False
    losses = [card.get("held_out_loss") for card in (new, old)]
    known = [loss for loss in losses if isinstance(loss, int | float) and math.isfinite(loss)]
    if len(known) < 2:
        return f"the two cannot be compared (held-out losses {losses[0]} and {losses[1]})", False
    new, old = ({**card["network"], **card["process"], **card} for card in (new, old))
    differing = [name for name in _PROTOCOL if new.get(name) != old.get(name)]
    if differing:
        return f"their losses cannot be compared ({', '.join(differing)} differ)", False
    better = known[0] < known[1]
    relation = "below" if better else "not below"
    return f"the held-out loss {known[0]:.6g} of the new one is {relation} {known[1]:.6g}", better


def _keep_aside(path: Path) -> Path:
    """A copy of the file, under the first of its names that is free or has the same bytes."""
    for number in itertools.count(1):
        aside = path.with_name(f"{path.stem}.old{number if number > 1 else ''}{path.suffix}")
        if not aside.exists():
            _copy(path, aside)
            return aside
        if filecmp.cmp(path, aside, shallow=False):
            return aside
    raise AssertionError  # count() does not end


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as original, atomic_file(target) as copy:
        shutil.copyfileobj(original, copy)
