"""`python -m noisout_nb evaluate`: runs the protocol, and writes its tables and figures."""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from .checkpoints import load_model, load_safely
from .classifier import classifier_files, load_classifier
from .commands import find_weights
from .data import load_data, to_float
from .evaluation import CopyDetector, InceptionFeatures
from .figures import image_grid, plot_bars, plot_histograms, plot_loss
from .files import atomic_file
from .parallel import get_device, rank_and_world
from .profiles import Profile
from .protocol import (
    Judge,
    Sampler,
    compare,
    inception_table,
    markdown,
    memorisation,
    summarise,
)


def evaluate_command(profile: Profile, options: argparse.Namespace) -> int:
    """Evaluate the profile's weights: evaluation.json, evaluation.md and figures in its folder."""
    if options.samples < 1:
        raise ValueError(f"--samples is {options.samples}: at least 1 per seed")
    device = get_device()
    inception = InceptionFeatures().to(device) if options.features == "inception" else None
    weights = find_weights(profile, options.weights, own_first=True)
    model, process, _ = load_model(weights, device)
    classifier, card = _load_judge(profile, options.classifier, device)
    data, held_out = load_data(profile), load_data(profile, "val")
    if len(card["classes"]) != len(data.classes):
        raise ValueError(
            f"the classifier knows {len(card['classes'])} species, the data has "
            f"{len(data.classes)}: train one for it: python -m noisout_nb train-classifier"
        )
    sampler = Sampler(model, process, profile, options.steps or profile.sample_steps)
    scales = options.guidance_scales or sorted({1.0, profile.guidance_scale})
    rows, images = compare(
        sampler,
        Judge(classifier, data),
        held_out,
        samples=options.samples,
        seeds=options.seeds,
        scales=scales,
    )
    training, real = to_float(data.images), to_float(held_out.images)
    copies, detector = memorisation(images, training, real)
    summary = summarise(rows)
    results = {
        "weights": weights.name,
        "profile": profile.name,
        "sampler": {"name": profile.sampler, "steps": sampler.steps, "spacing": profile.spacing},
        "per_set": len(held_out) // 2,
        "sets": len(next(iter(rows.values()))),
        "seeds": options.seeds,
        "classifier_accuracy": card["held_out_accuracy"],
        "measures": summary,
        "memorisation": copies,
    }
    if inception is not None:
        results["inception"] = inception_table(inception, images, training, real)
    if rank_and_world()[0] == 0:
        _write(profile.runs, results, summary)
        _draw(profile.runs, summary, copies, detector, images, real, training)
        _draw_loss(profile)
        print(_report(results, summary))
        print(f"tables and figures: {profile.runs}")
    return 0


def _load_judge(profile: Profile, given: str | None, device: torch.device):
    files = [Path(given)] if given else classifier_files(profile)
    for path in files:
        if path.exists():
            return load_classifier(path, device)
    raise FileNotFoundError(
        f"no evaluation classifier in {' or '.join(map(str, files))}: train one first: "
        f"python -m noisout_nb train-classifier --profile {profile.name}"
    )


def _report(results: dict, summary: dict) -> str:
    """The tables in markdown, with what is needed to read them."""
    copies, steps = results["memorisation"], results["sampler"]["steps"]
    lines = [
        f"Weights {results['weights']}; {results['sampler']['name']}, {steps} steps; "
        f"{results['sets']} sets of {results['per_set']} images, each compared with as many "
        f"held-out ones; mean ± standard error. The classifier names "
        f"{results['classifier_accuracy']:.1%} of the held-out images.",
        "",
        markdown(summary),
        "| | suspected copies | d1/d2 < 1/3 |",
        "|---|---|---|",
    ]
    groups = [*copies["samples"].items()]
    groups += [(f"planted: {name}", found) for name, found in copies["planted"].items()]
    for name, found in groups:
        lines.append(f"| {name} | {found['suspected']:.1%} | {found['d1/d2']:.1%} |")
    lines += ["", "A model that does not copy has about 1 % suspects. Held-out images that nearly"]
    lines += [f"equal a training image, left out of the threshold: {copies['near_duplicates']}."]
    if "inception" in results:
        lines += ["", "| Inception | Fréchet | kernel, x 1000 | images |", "|---|---|---|---|"]
        for name, row in results["inception"].items():
            frechet = f"{row['frechet'][0]:.2f}" if "frechet" in row else "too few images"
            kernel = "{:.2f} ± {:.2f}".format(*row["kernel"])
            lines.append(f"| {name} | {frechet} | {kernel} | {row['samples']} |")
    return "\n".join(lines) + "\n"


def _write(folder: Path, results: dict, summary: dict) -> None:
    for name, text in (
        ("evaluation.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n"),
        ("evaluation.md", _report(results, summary)),
    ):
        with atomic_file(folder / name) as file:
            file.write(text.encode())


def _draw(
    folder: Path,
    summary: dict,
    copies: dict,
    detector: CopyDetector,
    images: dict[str, Tensor],
    held_out: Tensor,
    training: Tensor,
) -> None:
    """Figures of distances and copies; suspects.png shows training images: not to be published."""
    for key, label in (("kernel", "kernel distance, x 1000"), ("frechet", "Fréchet distance")):
        bars = {name: row[key] for name, row in summary.items() if name != "noise"}
        plot_bars({label: bars}, y_label=label).save(folder / f"evaluation-{key}.png")
    shares = {
        label: {name: found[key] for name, found in copies["planted"].items()}
        for label, key in (("1 % false alarms", "suspected"), ("d1/d2 < 1/3", "d1/d2"))
    }
    plot_bars(shares, y_label="share found", number="{:.2f}", size=(820, 280)).save(
        folder / "evaluation-planted-copies.png"
    )
    ratios = {"held-out images": detector.ratios(held_out)}
    ratios |= {name: detector.ratios(x) for name, x in images.items()}
    plot_histograms(
        ratios, x_label="distance to the nearest training image / mean of the next nine", bins=40
    ).save(folder / "evaluation-copies.png")
    name, samples = list(images.items())[-1]
    image_grid(samples[:64], columns=16, alt=name).save(folder / "evaluation-samples.png")
    suspects = ratios[name].argsort()[:10]
    _, found = detector.neighbours(samples[suspects])
    pairs = torch.cat([samples[suspects], training[found[:, 0]]])
    image_grid(pairs, columns=len(suspects), row_labels=["sample", "nearest"]).save(
        folder / "evaluation-suspects.png"
    )


def _draw_loss(profile: Profile) -> None:
    """The loss of every training step, where the run's checkpoint is there."""
    checkpoint = profile.runs / "checkpoint.pth"
    if checkpoint.exists():
        losses = load_safely(checkpoint)["losses"]
        plot_loss(losses).save(profile.runs / "evaluation-loss.png")
