"""`python -m noisout_nb evaluate`: runs the protocol, and writes its tables and figures."""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from .checkpoints import load_model, load_safely, read_card
from .classifier import find_classifier
from .commands import find_weights
from .copies import CopyDetector
from .data import load_data, to_float
from .features import InceptionFeatures, save_features
from .figures import image_grid, plot_bars, plot_histograms, plot_loss
from .files import atomic_file
from .parallel import get_device, rank_and_world
from .profiles import Profile
from .protocol import (
    Judge,
    Sampler,
    compare,
    markdown,
    memorisation,
    public_protocol,
    summarise,
)

RATIO = "distance to the nearest training image / mean of the next nine"


def evaluate_command(profile: Profile, options: argparse.Namespace) -> int:
    """Evaluate weights: evaluation.json, evaluation.md, features.pth and figures in a folder."""
    if options.samples < 1:
        raise ValueError(f"--samples is {options.samples}: at least 1 per seed")
    device = get_device()
    inception = InceptionFeatures().to(device) if options.features == "inception" else None
    out = Path(options.out or profile.runs)
    classifier, card = find_classifier(profile, options.classifier, device)
    weights = find_weights(profile, options.weights, own_first=True)
    samplers = _samplers(profile, options, weights, device)
    losses = _losses(profile, options.checkpoint)
    data, held_out = load_data(profile), load_data(profile, "val")
    if len(card["classes"]) != len(data.classes):
        raise ValueError(
            f"the classifier knows {len(card['classes'])} species, the data has "
            f"{len(data.classes)}: train one for it: python -m noisout_nb train-classifier"
        )
    judge = Judge(classifier, data)
    found = compare(samplers, judge, held_out, samples=options.samples, seeds=options.seeds)
    copies, ratios, detector = memorisation(found.images, data.images, held_out.images)
    summary = summarise(found.rows)
    first = next(iter(samplers.values()))
    results = {
        "weights": weights.name,
        "held_out_loss": read_card(weights).get("held_out_loss"),
        "profile": profile.name,
        "sampler": {"name": profile.sampler, "steps": first.steps, "spacing": profile.spacing},
        "per_set": len(held_out) // 2,
        "sets": len(found.rows["real"]),
        "seeds": options.seeds,
        "classifier_accuracy": card["held_out_accuracy"],
        "measures": summary,
        "memorisation": copies,
    }
    if inception is not None:
        results["inception"] = public_protocol(
            inception, samplers, data, held_out, options.seeds[0]
        )
    training = judge.features(data.images)  # computed by all processes together
    if rank_and_world()[0] == 0:
        _write(out, results, summary)
        _draw(out, summary, copies, ratios, found.images)
        _draw_suspects(profile.runs, ratios, found.images, detector, data.images)
        kept = ("weights", "profile", "sampler", "seeds", "memorisation")
        facts = {key: results[key] for key in kept}
        vectors = _vectors(found.features)
        save_features(out / "features.pth", vectors, {"training": training}, **facts)
        if losses is not None:
            plot_loss(losses).save(out / "evaluation-loss.png")
        print(_report(results, summary))
        print(f"tables, features and figures: {out}; suspicious samples: {profile.runs}")
    return 0


def _samplers(
    profile: Profile, options: argparse.Namespace, weights: Path, device: torch.device
) -> dict[str, Sampler]:
    """The weights at each guidance scale, and those of --also, unguided, by their names."""
    steps, folder = options.steps or profile.sample_steps, profile.runs / "samples"

    def sampler(path: Path, scale: float) -> Sampler:
        model, process, _ = load_model(path, device)
        return Sampler(model, process, profile, steps, scale, folder)

    scales = options.guidance_scales or sorted({1.0, profile.guidance_scale})
    found = {f"samples, guidance {scale:g}": sampler(weights, scale) for scale in scales}
    for given in options.also:
        name, _, path = given.partition("=")
        if not name or not path or name in found or name in ("real", "noise", "held-out"):
            raise ValueError(f"--also is {given!r}: give a new name and a file as NAME=FILE")
        found[name] = sampler(Path(path), 1.0)
    return found


def _losses(profile: Profile, given: str | None) -> list[float] | None:
    """The losses of the run that trained the weights; None where its checkpoint is not there."""
    path = Path(given) if given else profile.runs / "checkpoint.pth"
    if given is None and not path.exists():
        return None
    saved = load_safely(path)
    losses = saved.get("losses") if isinstance(saved, dict) else saved
    if not isinstance(losses, list | Tensor) or len(losses) == 0:
        raise ValueError(f"{path} holds no losses: give a checkpoint that training wrote")
    return [float(loss) for loss in losses]


def _vectors(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """All held-out images' features, and as many of each sampler as a small file has room for."""
    real = features["held-out"][:1500]
    dim, others = real.shape[1], [name for name in features if name != "held-out"]
    room = 900_000 - 2 * dim * (len(real) + dim + 3)  # bytes, less the training images' moments
    count = max(0, min(1500, room // (2 * dim * len(others))))
    return {"held-out": real} | {name: features[name][:count] for name in others}


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
    pairs = ", ".join(f"{i} ({j})" for i, j in copies["near_duplicates"]) or "none"
    lines += ["", "A model that does not copy has about 1 % suspects. Held-out images that nearly"]
    lines += [f"equal a training image (its index), left out of the threshold: {pairs}."]
    if "inception" in results:
        lines += ["", "| Inception | Fréchet, all | Fréchet, half | kernel, x 1000 |"]
        lines += ["|---|---|---|---|"]
        for name, row in results["inception"].items():
            cells = [_frechet(row, which) for which in ("all", "half")]
            kernel = "{:.2f} ± {:.2f}".format(*row["kernel"])
            lines.append(f"| {name} | {' | '.join(cells)} | {kernel} ({row['kernel_images']:,}) |")
        lines += [
            "",
            "In brackets: how many samples are compared with as many photographs. All and",
        ]
        lines += ["half: with training images; kernel: with held-out ones; real: the floor."]
    return "\n".join(lines) + "\n"


def _frechet(row: dict, which: str) -> str:
    return f"{row[which]:.2f} ({row[f'{which}_images']:,})" if which in row else ""


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
    ratios: dict[str, Tensor],
    images: dict[str, Tensor],
) -> None:
    """Figures of distances, copies and samples: none of them shows a training image."""
    for key, label in (("kernel", "kernel distance, x 1000"), ("frechet", "Fréchet distance")):
        bars = {name: row[key] for name, row in summary.items() if name != "noise"}
        plot_bars({label: bars}, y_label=label).save(folder / f"evaluation-{key}.png")
    near = {
        key: {name: row[key] for name, row in summary.items()}
        for key in ("precision", "recall", "coverage")
    }
    plot_bars(near, y_label="share", number="{:.2f}").save(folder / "evaluation-precision.png")
    shares = {
        label: {name: found[key] for name, found in copies["planted"].items()}
        for label, key in (("1 % false alarms", "suspected"), ("d1/d2 < 1/3", "d1/d2"))
    }
    plot_bars(shares, y_label="share found", number="{:.2f}", size=(820, 280)).save(
        folder / "evaluation-planted-copies.png"
    )
    plot_histograms(ratios, x_label=RATIO, bins=40).save(folder / "evaluation-copies.png")
    for name, x in images.items():
        words = name.replace(",", "").replace(" ", "-")
        grid = image_grid(x[:64], columns=16, alt=name)
        grid.save(folder / f"evaluation-{words}.png")


def _draw_suspects(
    folder: Path,
    ratios: dict[str, Tensor],
    images: dict[str, Tensor],
    detector: CopyDetector,
    training: Tensor,
) -> None:
    """The ten most suspicious samples of each set above training images, which stay unpublished."""
    for name, x in images.items():
        suspects = x[ratios[name].argsort()[:10]]
        nearest = detector.examine(to_float(suspects)).nearest
        words = name.replace(",", "").replace(" ", "-")
        image_grid(
            torch.cat([suspects, training[nearest]]),
            columns=len(suspects),
            row_labels=["sample", "nearest"],
        ).save(folder / f"suspects-{words}.png")
