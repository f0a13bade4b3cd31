"""Compare eps-, v- and x0-prediction at patch sizes 1, 2 and 4, at equal work.

    python tools/ablation.py                 # 36 training runs, about two hours on two cores
    python tools/ablation.py --seeds 2 --steps 300 --patches 2

Data: the embedded flowers. Every run has the network of the profile `quick` but for its patch
size, and as many steps as cost the same number of floating-point operations: `--steps` at patch
size 2, fewer at 1, more at 4. "v" and "x0, snr+1" minimise the same function of the predicted x_0
(but for the cap `max_weight`, where there is hardly any noise): only the network's output differs.

Two numbers are measured on samples of the averaged weights: the mean `factor_distance` to held-out
flowers (0: same distribution), and the power of the finest details relative to that of held-out
flowers (1: as much as they have; above 1: grain; below 1: blur). Given are the mean over the seeds
and its standard error.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from noisout_nb.data import load_data, to_float
from noisout_nb.evaluation import factor_distance
from noisout_nb.forward_process import GaussianDiffusion
from noisout_nb.parallel import get_device
from noisout_nb.profiles import PROFILES, Profile
from noisout_nb.progress import progress
from noisout_nb.sampling import sample
from noisout_nb.training import EMA, Batches, train
from noisout_nb.unet import UNet

QUICK = PROFILES["quick"]
ARMS = {  # name in the table -> fields of the profile
    "eps": {"prediction": "eps", "weighting": None, "max_weight": None},
    "v": {"prediction": "v", "weighting": None, "max_weight": None},
    "x0": {"prediction": "x0", "weighting": None, "max_weight": None},
    "x0, snr+1": {"prediction": "x0", "weighting": "snr+1", "max_weight": 25.0},
}


def work(profile: Profile) -> int:
    """Floating-point operations of the network for one image."""
    model = UNet(**profile.network, num_classes=6)
    image = torch.zeros(1, 3, profile.image_size, profile.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image, torch.zeros(1, dtype=torch.int64))
    return counter.get_total_flops()


def detail(images: torch.Tensor) -> float:
    """Power of what 2 x 2 pixels have beyond their mean, for images (N, 3, H, W)."""
    smooth = F.interpolate(F.avg_pool2d(images, 2), scale_factor=2)
    return float((images - smooth).square().mean())


def run(profile: Profile, seed: int, device: torch.device, count: int = 256) -> dict[str, float]:
    """Train from scratch, sample `count` images: their distance and their detail."""
    data, held_out = load_data(profile), load_data(profile, "val")
    reference, labels = to_float(held_out.images), held_out.labels[:count]
    torch.manual_seed(seed)
    process = GaussianDiffusion.from_config(**profile.process).to(device)
    model = UNet(**profile.network, num_classes=len(data.classes)).to(device)
    ema = EMA(model, profile.ema_decay)
    batches = Batches(data, profile.batch_size, flip=profile.flip, seed=seed, device=device)
    steps = train(model, process, batches, ema, seed=seed, **profile.training)
    for _ in progress(steps, total=profile.train_steps, description="training"):
        pass
    with ema.applied():
        images = sample(
            model,
            process,
            labels.to(device),
            shape=tuple(reference.shape[1:]),
            sampler="ddim",
            steps=20,
            seed=seed,
        ).cpu()
    return {
        "distance": factor_distance(images, reference)["mean"],
        "detail": detail(images.clamp(-1, 1)) / detail(reference),
    }


def with_error(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.2f} ± {error:.2f}"


def table(found: dict[tuple[str, int], list[dict[str, float]]]) -> str:
    rows = ["| prediction | patch size | runs | distance | detail |", "|---|---|---|---|---|"]
    for (arm, patch_size), runs in found.items():
        cells = [with_error([one[name] for one in runs]) for name in ("distance", "detail")]
        rows.append(f"| {arm} | {patch_size} | {len(runs)} | {cells[0]} | {cells[1]} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs per row of the table")
    parser.add_argument(
        "--steps", type=int, default=QUICK.train_steps, help="training steps at patch size 2"
    )
    parser.add_argument("--patches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, help="a file that gets one JSON line per run")
    arguments = parser.parse_args()
    device, found = get_device(), {}
    for seed in range(arguments.seeds):
        for patch_size in arguments.patches:
            sized = replace(QUICK, patch_size=patch_size)
            steps = round(arguments.steps * work(QUICK) / work(sized))
            for arm in arguments.arms:
                profile = replace(sized, train_steps=steps, **ARMS[arm])
                result = run(profile, seed, device)
                found.setdefault((arm, patch_size), []).append(result)
                line = {"arm": arm, "patch_size": patch_size, "seed": seed, "steps": steps}
                print(json.dumps(line | result), flush=True)
                if arguments.out:
                    with open(arguments.out, "a", encoding="utf-8") as file:
                        file.write(json.dumps(line | result) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
