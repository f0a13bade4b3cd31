"""The figures of the model card: how good are the weights of a profile?

    export NOISOUT_PROFILE=flowers32 NOISOUT_DATA=folder
    python .ci/card.py                                  the table: some twenty minutes on two cores
    python .ci/card.py --weights old.pth new.pth        a row for each of these files (each with its .json)
    python .ci/card.py --samplers                       quality against network calls, 5 to 1,000: half an hour more
    python .ci/card.py --samplers --calls 20 --seed 2   how much one point of that plot scatters
    python .ci/card.py --autocast ...                   the samples are drawn in bfloat16: faster where the device has it

The protocol is that of notebook 07: one half of the held-out photographs is the reference, the other one shows what a perfect model could
reach, and lends the samples its labels. The features are those of a classifier like the notebook's, but larger (32 channels, 1,200
steps), trained on the same training photographs as the network and kept in runs/. Results go to runs/PROFILE/card.json, pictures beside it.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from noisout_nb.data import atomic_file, factor_distance, load_data, to_float
from noisout_nb.display import image_grid, plot_histograms, plot_lines, progress
from noisout_nb.evaluation import bits_per_dim, copied_share, extract_features, frechet_distance, kernel_distance, nearest, precision_recall
from noisout_nb.guidance import ClassifierFreeGuidance, NoisyClassifier
from noisout_nb.parallel import get_device, has_bfloat16
from noisout_nb.profiles import get_profile
from noisout_nb.sampling import SAMPLERS, sample
from noisout_nb.training import Batches, load_model, load_safely

STEPS = 1200  # of the classifier
CALLS = (5, 10, 20, 50, 100, 250, 1000)
FEW = 80  # samples for each point of the samplers' plot


class Features(torch.nn.Module):
    """What the classifier holds just before its verdict, averaged over the picture."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier.eval().requires_grad_(False)

    def forward(self, x):
        h, *_ = self.classifier.encode(x, torch.zeros(len(x), dtype=torch.int64, device=x.device))
        return self.classifier.norm(h).mean((2, 3))


@torch.no_grad()
def noise_left(model, process, x_0, y, t):
    """Of the noise in the finest details at time t, that which is left in the predicted x_0, as a part of its power (lost details count, too)."""
    t = torch.full_like(y, t)
    x_t = process.q_sample(x_0, t, torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1)).to(x_0.device))
    answer, _ = process.split_output(model(x_t, t, y), x_t)

    def finest_power(x):
        return (x - F.interpolate(F.avg_pool2d(x, 2), scale_factor=2)).square().mean().item()

    before, after = x_t / process.alphas_cumprod[t[0]].sqrt() - x_0, process.predict_start(x_t, t, answer) - x_0
    return finest_power(after) / finest_power(before)


def get_classifier(process, data, profile, device):
    """The classifier, trained at the first call."""
    torch.manual_seed(1)
    classifier = NoisyClassifier(process, len(data.classes), image_size=profile.image_size, channels=32, channel_mults=(1, 2, 2),
                                 num_res_blocks=1, attention_resolutions=(), patch_size=profile.image_size // 16).to(device)  # fmt: skip
    path = profile.runs / "classifier.pth"
    if path.exists():
        classifier.load_state_dict(load_safely(path))
        return classifier
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    for _, (x_0, y) in zip(progress(range(STEPS), description="classifier"), Batches(data, 32, device=device)):
        t = torch.randint(300, y.shape, device=device)
        optimizer.zero_grad()
        F.cross_entropy(classifier(process.q_sample(x_0, t, torch.randn_like(x_0)), t), y).backward()
        optimizer.step()
        schedule.step()
    with atomic_file(path) as file:
        torch.save(classifier.state_dict(), file)
    return classifier


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--weights", type=Path, nargs="+", help="files of weights; by default the profile's")
    arguments.add_argument("--steps", type=int, default=50, help="of DPM-Solver++, for each sample of the table")
    arguments.add_argument("--samplers", action="store_true", help="only the samplers' plot, of the first of the weights")
    arguments.add_argument("--calls", type=int, nargs="+", default=CALLS, help="the numbers of calls in that plot")
    arguments.add_argument("--seed", type=int, default=1, help="of the samples")
    arguments.add_argument("--autocast", action="store_true", help="draw the samples in bfloat16, where the device has it")
    options = arguments.parse_args()
    profile, device = get_profile(), get_device()
    weights = options.weights or [profile.weights]
    data, held_out = load_data(profile), load_data(profile, "val")
    model, process, _ = load_model(weights[0], device)
    classifier = get_classifier(process, data, profile, device)
    look = Features(classifier)

    first, second = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0)).chunk(2)
    reference, real, labels = to_float(held_out.images[first]), to_float(held_out.images[second]), held_out.labels[second].to(device)
    reference_features, shape = extract_features(look, reference), tuple(real.shape[1:])
    card = profile.runs / "card.json"
    results = json.loads(card.read_text()) if card.exists() else {}

    def keep(name, result):
        results[name] = result
        with atomic_file(card) as file:
            file.write(json.dumps(results, indent=1, ensure_ascii=False).encode())
        print(name, json.dumps(result, ensure_ascii=False), flush=True)

    autocast = options.autocast and has_bfloat16(device)

    @torch.autocast(device.type, torch.bfloat16, enabled=autocast)
    def drawn(model, count=None, **settings):
        return sample(model, process, labels[:count], shape=shape, **{"steps": options.steps, "seed": options.seed, "batch_size": 64} | settings).clamp(-1, 1).cpu()

    def measure(pictures):
        features = extract_features(look, pictures)
        kernel, error = kernel_distance(features, reference_features)
        precision, recall = precision_recall(features, reference_features)
        with torch.no_grad():
            verdicts = torch.cat([classifier(x.to(device), torch.zeros(len(x), dtype=torch.int64, device=device)).argmax(1) for x in pictures.split(64)])
        return {
            "Fréchet": frechet_distance(features, reference_features), "kernel": kernel, "error": error, "precision": precision, "recall": recall,
            "recognised": (verdicts == labels[: len(pictures)]).double().mean().item(), "factors": factor_distance(pictures, reference)["mean"],
        }  # fmt: skip

    if options.samplers:
        title = f"samplers, seed {options.seed}"  # so that a run with another seed leaves this one's figures alone
        quality, clock = {name: [] for name in SAMPLERS}, {name: [] for name in SAMPLERS}
        for steps in options.calls:
            for name in SAMPLERS:
                start = time.perf_counter()
                pictures = drawn(model, FEW, sampler=name, steps=steps)
                clock[name].append((time.perf_counter() - start) / FEW)
                quality[name].append(frechet_distance(extract_features(look, pictures), reference_features))
                keep(title, {"calls": options.calls, "Fréchet": quality, "seconds": clock, "samples": FEW, "bfloat16": autocast})
        floor = frechet_distance(extract_features(look, real[:FEW]), reference_features)
        keep(title, results[title] | {"photographs": floor})
        plot_lines({name: (options.calls, values) for name, values in quality.items()}, x_label="network calls", y_label="Fréchet distance", log_x=True, log_y=True, markers=True,
                   hlines={"photographs": floor}, alt="Fréchet distance against network calls for three samplers").save(profile.runs / f"card-{title}.png")  # fmt: skip
        return

    keep("photographs", measure(real))
    keep("noise", measure(torch.randn(real.shape, generator=torch.Generator().manual_seed(3)).clamp(-1, 1)))
    for path in weights:
        model, process, _ = load_model(path, device)
        samples = drawn(model)
        left = {f"noise left at {t}": noise_left(model, process, real[:64].to(device), labels[:64], t) for t in (30, 80)}
        keep(path.name, measure(samples) | left)
        if path == weights[0]:
            mine = samples
            keep(f"{path.name}, guidance {profile.guidance_scale:g}", measure(drawn(ClassifierFreeGuidance(model, profile.guidance_scale))))

    training, held = to_float(data.images), to_float(held_out.images)
    pixels = [pictures.flatten(1) for pictures in (mine, training, held)]
    keep("copies, in pixels", copied_share(*pixels))
    keep("copies, in features", copied_share(*(extract_features(look, pictures) for pictures in (mine, training, held))))
    ratios = {}
    for name, pictures in {"samples": pixels[0], "held-out photographs": pixels[2]}.items():
        distances, found = nearest(pictures, pixels[1])
        ratios[name] = distances[:, 0] / distances[:, 1:].mean(1)
        if name == "samples":
            suspects = ratios[name].argsort()[:10]
            pairs = torch.cat([mine[suspects], training[found[suspects, 0]]])  # shows photographs: not for the repository
            image_grid(pairs, columns=10, row_labels=["sample", "nearest"], alt="The ten most suspicious samples, and their nearest training photographs").save(profile.runs / "card-nearest.png")
    plot_histograms(ratios, x_label="distance to the nearest training photograph / mean of the next nine", bins=40,
                    alt="Histograms of the ratio for samples and for held-out photographs").save(profile.runs / "card-copies.png")  # fmt: skip

    model, process, _ = load_model(weights[0], device)  # last, because it takes longest: a thousand calls a picture
    prior, terms = bits_per_dim(model, process, real[:32], labels[:32])
    keep("bits per dimension", prior + terms.sum().item())


if __name__ == "__main__":
    main()
