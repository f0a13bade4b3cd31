"""The programs of noisOut: `python -m noisout_nb COMMAND`."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, get_args

from .profiles import DATASETS, PROFILES, Profile

DESCRIPTION = """\
Denoising diffusion from the command line: generate flowers from trained weights, train a network,
measure how good its samples are, publish its weights. Everything runs on a laptop's CPU."""

EXAMPLES = """\
examples:
  python -m noisout_nb sample sunflower --count 8 --out sunflowers.png
  python -m noisout_nb sample rose "water lily" --seed 3
  python -m noisout_nb train                        the embedded flowers, under two minutes
  python -m noisout_nb train --profile flowers64 --train-steps 24000
  python -m noisout_nb evaluate --profile quick --samples 512
  torchrun --nproc-per-node=2 -m noisout_nb train --profile flowers64

`python -m noisout_nb COMMAND --help` explains each command."""

HELP = {
    "name": "folder below runs/ that the run writes to",
    "dataset": f"one of {', '.join(DATASETS)}",
    "image_size": "side of the images in pixels",
    "train_images": "how many embedded flowers are in the training set",
    "patch_size": "side of the patches that the network takes as one position",
    "channels": "width of the network",
    "channel_mults": "width of each level, in multiples of channels, such as 1,2,2",
    "num_res_blocks": "residual blocks per level",
    "attention_resolutions": "sides of the levels with attention, such as 8,4",
    "schedule": "of the noise: cosine, linear or straight, flow matching's",
    "timesteps": "T, the diffusion steps",
    "prediction": "what the network predicts: eps, v or x0",
    "variance": "of the reverse process: posterior or learned",
    "weighting": "of the loss over timesteps, such as snr+1",
    "max_weight": "upper limit of that weight; none for no limit",
    "timestep_density": "how t is drawn: uniform or logit-normal",
    "batch_size": "images per step, of all processes together",
    "train_steps": "training steps in all, those before a resume included",
    "learning_rate": "its peak",
    "ema_decay": "of the moving average of the weights",
    "label_dropout": "probability of hiding a label, for classifier-free guidance",
    "autocast": "compute in bfloat16 where the device does so natively",
    "flip": "flip images left to right with probability 0.5",
    "guidance_interval": "noise levels between which guidance acts, such as 0.3,5",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 2 bad input, 130 stopped by Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        if options.debug:
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"error: {lines[0]}", file=sys.stderr)
        return 2


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except where there is none to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, argparse.SUPPRESS):
            return action.help
        return super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m noisout_nb",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        _add_sample,
        _add_species,
        _add_train,
        _add_evaluate,
        _add_publish,
        _add_judge,
        _add_export,
    ):
        add(commands)
    return parser


def _command(commands, name: str, run, summary: str, details: str = "") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {details}".strip(),
        formatter_class=_Formatter,
    )
    parser.set_defaults(run=run)
    parser.usage = f"python -m noisout_nb {name} [options]"
    return parser


def _add_profile(parser: argparse.ArgumentParser, default: str = "quick") -> None:
    parser.add_argument(
        "--profile",
        default=os.environ.get("NOISOUT_PROFILE") or default,
        help=f"one of {', '.join(PROFILES)}; the environment's NOISOUT_PROFILE sets the default",
    )


def _add_fields(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """Every field of the profile as an option; what is not given stays as the profile has it."""
    group = parser.add_argument_group("the profile's fields", "by default the profile's own values")
    for field in fields(Profile):
        if field.name in without:
            continue
        option: dict[str, Any] = {"dest": f"field_{field.name}", "default": argparse.SUPPRESS}
        option["help"] = HELP.get(field.name, field.name.replace("_", " "))
        if field.type is bool:
            option["action"] = argparse.BooleanOptionalAction
        else:
            option |= {"type": _value_of(field.type), "metavar": "VALUE"}
        group.add_argument(f"--{field.name.replace('_', '-')}", **option)


def _value_of(kind):
    """A function from the command line's words to a value of a profile's field."""
    optional = type(None) in get_args(kind)
    kind = get_args(kind)[0] if optional else kind

    def number(text: str):
        return float(text) if "." in text or "e" in text else int(text)

    def parse(text: str):
        if optional and text.lower() == "none":
            return None
        if get_args(kind):
            return tuple(number(part) for part in text.split(",") if part.strip())
        return kind(text)

    parse.__name__ = "numbers such as 1,2,2" if get_args(kind) else kind.__name__
    return parse


def _profile(options: argparse.Namespace) -> Profile:
    if options.profile not in PROFILES:
        names = ", ".join(PROFILES)
        raise ValueError(f"unknown profile {options.profile!r}: choose one of {names}")
    given = {
        name.removeprefix("field_"): value
        for name, value in vars(options).items()
        if name.startswith("field_")
    }
    return replace(PROFILES[options.profile], **given)


def _add_sample(commands) -> None:
    parser = _command(
        commands,
        "sample",
        sample,
        "generate images of a species",
        "`python -m noisout_nb species` lists the names.",
    )
    parser.usage = "python -m noisout_nb sample SPECIES [SPECIES ...] [options]"
    parser.add_argument("species", nargs="+", help='one species or several, such as "water lily"')
    parser.add_argument("--count", type=int, default=8, help="images of each species")
    parser.add_argument(
        "--out",
        default="samples.png",
        help="a .png for one image of all, side by side; or a folder for one file per image",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, other images")
    scale = "1: the species alone; above 1: more typical, less varied"
    parser.add_argument("--guidance-scale", type=float, help=f"{scale} (the profile's own)")
    parser.add_argument("--steps", type=int, help="sampling steps (the profile's own)")
    parser.add_argument("--sampler", help="ddpm, ddim, dpm_solver, sde_dpm_solver or heun")
    parser.add_argument("--weights", help="file of weights (those of the profile)")
    _add_profile(parser, "flowers64")


def _add_species(commands) -> None:
    parser = _command(commands, "species", species, "list the species that a network knows")
    parser.add_argument("--weights", help="file of weights (those of the profile)")
    _add_profile(parser, "flowers64")


def _add_train(commands) -> None:
    parser = _command(
        commands,
        "train",
        train,
        "train a network",
        "Writes runs/PROFILE/model.pth, the moving average of the weights, and a checkpoint from "
        "which the same command goes on after an interruption.",
    )
    _add_profile(parser)
    parser.add_argument("--seed", type=int, default=0, help="of network, batches and noise")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument(
        "--start", metavar="WEIGHTS", help="start from these weights where they fit"
    )
    parser.add_argument(
        "--publish",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="photographs: publish the weights if their held-out loss is lower",
    )
    _add_fields(parser)


def _add_evaluate(commands) -> None:
    parser = _command(
        commands,
        "evaluate",
        evaluate,
        "measure how good samples are",
        "Compares samples with held-out images and looks for copies of training images. Writes "
        "evaluation.json, evaluation.md, features.pth and figures to runs/PROFILE/. Samples are "
        "kept in runs/PROFILE/samples/, so that a run that was cut goes on with them.",
    )
    _add_profile(parser)
    parser.add_argument("--weights", help="file of weights (the profile's run, else the published)")
    parser.add_argument("--classifier", help="file of the evaluation classifier (the profile's)")
    parser.add_argument("--samples", type=int, default=2000, help="samples per seed, at least")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the samples")
    parser.add_argument("--steps", type=int, help="sampling steps (the profile's own)")
    parser.add_argument(
        "--guidance-scales", type=float, nargs="+", help="1 and the profile's own, if not given"
    )
    parser.add_argument(
        "--features",
        choices=["classifier", "inception"],
        default="classifier",
        help="inception: also distances as others publish them (pip install torch-fidelity)",
    )
    parser.add_argument(
        "--also",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="other weights to compare with, sampled without guidance",
    )
    parser.add_argument("--checkpoint", help="training state with the losses (the profile's run)")
    parser.add_argument("--out", help="folder to write to (runs/PROFILE)")
    _add_fields(parser)


def _add_publish(commands) -> None:
    parser = _command(
        commands,
        "publish",
        publish,
        "copy a run's weights to models/",
        "Only where their held-out loss is lower than that of the file there.",
    )
    _add_profile(parser)
    parser.add_argument("--weights", help="file of weights (the profile's run)")
    parser.add_argument(
        "--force", action="store_true", help="publish all the same; the old file is kept aside"
    )


def _add_judge(commands) -> None:
    parser = _command(
        commands,
        "train-classifier",
        train_judge,
        "train the classifier that `evaluate` needs",
        "It learns to name the species of clean images, and the distances compare its features. "
        "Writes runs/PROFILE/classifier.pth and prints the accuracy on held-out images.",
    )
    _add_profile(parser)
    parser.add_argument("--steps", type=int, help="training steps (chosen for the data set)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step")
    parser.add_argument("--width", type=int, help="channels of the first stage (by data set)")
    parser.add_argument("--seed", type=int, default=0, help="of network, batches, augmentation")
    parser.add_argument("--out", help="file to write (runs/PROFILE/classifier.pth)")
    _add_fields(parser, without=("batch_size",))


def _add_export(commands) -> None:
    parser = _command(
        commands,
        "export",
        export,
        "write a network as ONNX, for the web page that runs it",
        "Compares its output with PyTorch's. Needs onnx and onnxruntime.",
    )
    parser.add_argument("--weights", help="file of weights (those of the profile)")
    parser.add_argument("--out", default="onnx", help="folder to write flowers.bin and .json to")
    _add_profile(parser, "flowers64")


# Programs are imported when they run, so that --help and errors of usage come at once.


def sample(options: argparse.Namespace) -> int:
    """`sample`: images of some species, as one PNG or as a file each."""
    from .commands import sample_command

    return sample_command(_profile(options), options)


def species(options: argparse.Namespace) -> int:
    """`species`: the names that a network knows."""
    from .commands import species_command

    return species_command(_profile(options), options)


def train(options: argparse.Namespace) -> int:
    """`train`: a training run, resumed where there is a checkpoint."""
    from .commands import train_command

    return train_command(_profile(options), options)


def evaluate(options: argparse.Namespace) -> int:
    """`evaluate`: tables and figures about the quality of samples."""
    from .reports import evaluate_command

    return evaluate_command(_profile(options), options)


def publish(options: argparse.Namespace) -> int:
    """`publish`: weights to models/, if they are better."""
    from .commands import publish_command

    return publish_command(_profile(options), options)


def train_judge(options: argparse.Namespace) -> int:
    """`train-classifier`: the evaluation classifier."""
    from .commands import train_classifier_command

    return train_classifier_command(_profile(options), options)


def export(options: argparse.Namespace) -> int:
    """`export`: the network as ONNX."""
    from .commands import export_command

    return export_command(_profile(options), options)


if __name__ == "__main__":
    sys.exit(main())
