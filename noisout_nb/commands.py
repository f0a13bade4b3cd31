"""What the programs do: `python -m noisout_nb sample`, `species`, `train`, `publish`, ...

Each takes the profile, with the command line's fields in it, and the other options.
"""

import argparse
import signal
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from .checkpoints import load_model, publish, save_model
from .classifier import (
    FlowerClassifier,
    augment,
    classifier_files,
    classify,
    save_classifier,
    train_classifier,
)
from .data import load_data, to_float, to_uint8
from .figures import image_grid
from .forward_process import GaussianDiffusion
from .generate import sample_image
from .parallel import gather, get_device, memory_format, rank_and_world
from .profiles import Profile
from .progress import progress
from .training import EMA, Batches, held_out_loss, train
from .unet import UNet


def find_weights(profile: Profile, given: str | None, own_first: bool = False) -> Path:
    """The file of weights: `given`, else the published one or the one of the profile's run.

    Raises FileNotFoundError where there is none; the message says how to get one.
    """
    if given is not None:
        candidates = [Path(given)]
    else:
        candidates = [path for path in (profile.pretrained, profile.weights) if path is not None]
        candidates = candidates[::-1] if own_first else candidates
    for path in candidates:
        if path.exists():
            return path
    raise FileNotFoundError(
        f"no weights in {' or '.join(map(str, candidates))}: they come with a clone of the "
        f"repository and with pip install, or train some: python -m noisout_nb train --profile "
        f"{profile.name}; or name a file with --weights"
    )


def sample_command(profile: Profile, options: argparse.Namespace) -> int:
    """Generate images, and write them as one grid or as a file each."""
    given = {
        "guidance_scale": options.guidance_scale,
        "steps": options.steps,
        "sampler": options.sampler,
    }
    chosen = {
        "guidance_scale": profile.guidance_scale,
        "guidance_interval": profile.guidance_interval,
        "steps": profile.sample_steps,
        "sampler": profile.sampler,
        "spacing": profile.spacing,
    } | {name: value for name, value in given.items() if value is not None}
    out = Path(options.out)
    if out.suffix and out.suffix != ".png":
        raise ValueError(f"--out is {options.out!r}: name a .png, or a folder for a file per image")
    if options.count < 1:
        raise ValueError(f"--count is {options.count}: at least 1 image per species")
    weights = find_weights(profile, options.weights)
    images = sample_image(
        options.species, options.count, weights=weights, seed=options.seed, **chosen
    )
    if rank_and_world()[0] > 0:
        return 0
    if out.suffix:
        rows = {} if len(options.species) == 1 else {"row_labels": options.species}
        image_grid(images, columns=options.count, alt=", ".join(options.species), **rows).save(out)
    else:
        _save_each(images, options.species, options.count, out)
    print(f"{len(images)} images: {out}")
    return 0


def _save_each(images: torch.Tensor, species: list[str], count: int, folder: Path) -> None:
    """One PNG per image, at its own size: folder/SPECIES-NUMBER.png."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
    for i, image in enumerate(pixels):
        name = species[i // count].replace(" ", "-").replace("/", "-")
        Image.fromarray(image).save(folder / f"{name}-{i % count}.png")


def species_command(profile: Profile, options: argparse.Namespace) -> int:
    """List the species that the weights know."""
    _, _, classes = load_model(find_weights(profile, options.weights))
    print("\n".join(sorted(classes)))
    return 0


class StopRequest:
    """Inside the `with`, Ctrl-C and SIGTERM only set a flag, so that a loop ends between two steps.

    A second Ctrl-C strikes at once. Under torchrun all processes stop at the same step.
    """

    def __init__(self, device: torch.device):
        self.asked, self.device, self.before = False, device, {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def __exit__(self, *error: object) -> None:
        self._restore()

    def __bool__(self) -> bool:
        _, world = rank_and_world()
        if world == 1:
            return self.asked
        flags = gather(torch.tensor([self.asked], dtype=torch.uint8, device=self.device), world)
        return bool(flags.any())


def train_command(profile: Profile, options: argparse.Namespace) -> int:
    """Train, or go on training; then write the averaged weights with their held-out loss."""
    device = get_device()
    process = GaussianDiffusion.from_config(**profile.process).to(device)
    data, held_out = load_data(profile), load_data(profile, "val")
    torch.manual_seed(options.seed)
    model = UNet(**profile.network, num_classes=len(data.classes))
    if options.start is not None:
        _start_from(model, options.start)
    model = model.to(device).to(memory_format=memory_format(device, profile.autocast))
    ema = EMA(model, profile.ema_decay)
    batches = Batches(data, profile.batch_size, profile.flip, options.seed, device)
    checkpoint = profile.runs / "checkpoint.pth"
    said = rank_and_world()[0] == 0
    if said:
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{profile.name}: {len(data)} images, {parameters / 1e6:.1f} M parameters, {device}")

    losses: list[float] = []
    run = train(
        model,
        process,
        batches,
        ema,
        losses=losses,
        checkpoint=checkpoint,
        save_every=options.save_every,
        seed=options.seed,
        **profile.training,
    )
    bar = progress((), total=profile.train_steps, description="training")
    with StopRequest(device) as stop, run, bar:
        for step in run:
            recent = losses[-50:]
            bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", refresh=False)
            bar.update(step.index - bar.n)
            if step.index < profile.train_steps and stop:
                break
    if len(losses) < profile.train_steps:
        if said:
            print(f"stopped at step {len(losses)}; run again to go on")
        return 130
    return _finish(model, process, ema, held_out, profile, options.publish and said)


def _start_from(model: UNet, weights: str) -> None:
    from .checkpoints import load_weights_into

    missing = load_weights_into(model, weights)
    if missing:
        print(f"not in {weights}, so left as they are: {', '.join(missing)}")


def _finish(model, process, ema, held_out, profile: Profile, publishing: bool) -> int:
    """Write the averaged weights and say how good they are; publish those of photographs."""
    with ema.applied():
        loss = held_out_loss(model, process, held_out)
        if rank_and_world()[0] == 0:
            facts = {
                "profile": profile.name,
                "steps": profile.train_steps,
                "held_out_loss": loss,
                "weighting": profile.weighting,
                "max_weight": profile.max_weight,
                "timestep_density": profile.timestep_density,
            }
            save_model(model, profile.weights, process, held_out.classes, **facts)
            print(f"held-out loss {loss:.5f}; weights: {profile.weights}")
    photographs = profile.dataset == "flowers102"
    if publishing and photographs and profile.published is not None:
        publish(profile.weights, profile.published)
    return 0


def publish_command(profile: Profile, options: argparse.Namespace) -> int:
    """Copy a run's weights to models/."""
    target = profile.published
    if target is None:
        raise ValueError(
            f"weights of the profile {profile.name!r} are your own and are not published: copy "
            f"{profile.weights} wherever you like"
        )
    publish(find_weights(profile, options.weights, True), target, force=options.force)
    return 0


def train_classifier_command(profile: Profile, options: argparse.Namespace) -> int:
    """Train the evaluation classifier, and say how many held-out species it names."""
    device = get_device()
    data, held_out = load_data(profile), load_data(profile, "val")
    embedded = profile.dataset == "procedural"
    torch.manual_seed(options.seed)
    classifier = FlowerClassifier(
        len(data.classes),
        profile.image_size,
        patch_size=max(1, profile.image_size // (16 if embedded else 32)),
        width=options.width or (16 if embedded else 40),
    )
    classifier = classifier.to(device).to(memory_format=torch.channels_last)
    steps = options.steps or (400 if embedded else 6000)
    batches = Batches(data, options.batch_size, profile.flip, options.seed, device)
    bar = progress(
        train_classifier(
            classifier,
            batches,
            steps=steps,
            learning_rate=3e-3,
            label_smoothing=0.1,
            augment=partial(augment, crop=0.6),
            autocast=profile.autocast,
            seed=options.seed,
        ),
        total=steps,
        description="classifier",
    )
    for step in bar:
        bar.set_postfix(loss=f"{step.loss:.3f}", refresh=False)
    named = classify(classifier, to_float(held_out.images)) == held_out.labels
    accuracy = named.double().mean().item()
    path = Path(options.out or classifier_files(profile)[-1])
    save_classifier(classifier, path, data.classes, held_out_accuracy=accuracy, steps=steps)
    print(f"names {accuracy:.1%} of {len(held_out)} held-out images; classifier: {path}")
    return 0


def export_command(profile: Profile, options: argparse.Namespace) -> int:
    """Write the network as ONNX, with what a page needs to sample from it."""
    from .export import export  # its packages are needed for nothing else

    sizes = export(find_weights(profile, options.weights), options.out, profile)
    written = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in sizes.items())
    print(f"{options.out}: {written}; the output is PyTorch's to 1e-4")
    return 0
