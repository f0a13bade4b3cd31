"""Side by side with diffusers and denoising-diffusion-pytorch: one task, data, batch and machine.

    pip install diffusers denoising-diffusion-pytorch
    python tools/peers.py 32                                         about an hour of one thread
    NOISOUT_DATA=folder python tools/peers.py 64 --limit 1200        three hours

Every number comes from a process of its own, and the libraries take turns. Times are those of one
thread (the processor's time, so other programs count little); with CUDA, the clock's. Results are
kept in runs/peers/results.jsonl, and a program that is started anew goes on from there.

Each library is also trained for the same time, on the embedded flowers at 32 x 32 and on the
photographs at 64 x 64, at the better of two learning rates (the lower held-out loss after a tenth
of the time), and the better of its last and its averaged weights are taken. For several samplers
and numbers of steps, its samples are compared with held-out images: at 32 x 32 three times 1,000
with 1,000, at 64 x 64 guided ones, three times each half of the 1,020 photographs with samples of
the other half's species. "Equal distance" then means: the cheapest setting of a library whose
distance is not above the wanted one by more than twice the error of their difference over the
seeds. At 64 x 64 all of this runs in bfloat16. This is no test, and the peers are no requirements.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torchvision  # noqa: F401  (what every contender imports is not part of its own time)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import contenders  # noqa: E402
from contenders import CLASSES, CONTENDERS, DEVICE, GUIDANCE  # noqa: E402

ROUNDS, SEEDS, COUNT = 3, (0, 1, 2), 1000
RATES = (5e-4, 2e-3)
DISTANCES = {"kernel": "kernel distance, x 1000", "factors": "factor distance"}
MEASURES = DISTANCES | {
    "frechet": "Fréchet distance",
    "precision": "precision",
    "recall": "recall",
    "petals": "petals right",
    "recognised": "recognised",
}
FOLDER = Path(os.environ.get("NOISOUT_RUNS") or ROOT / "runs") / "peers"


def clock() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds(work, times: int) -> float:
    """Median seconds of `work()`, after two calls to warm up."""
    taken = []
    for _ in range(times + 2):
        start = clock()
        work()
        taken.append(clock() - start)
    return statistics.median(taken[2:])


# --- jobs: each runs in a process of its own and returns what json can hold ----------------------


def speed(name: str, size: int, bfloat16: bool, turn: int) -> dict:
    """Time to import, to load, to train and to sample, and the most memory of the training."""
    start = clock()
    for module in CONTENDERS[name].imports.split(", "):
        importlib.import_module(module)
    found: dict = {"import": clock() - start}
    contender = CONTENDERS[name](size, bfloat16=bfloat16)
    found["parameters"] = sum(p.numel() for p in contender.model.parameters())
    found["step"] = seconds(contender.step, 10 if size == 32 else 4)
    found["memory"] = peak()
    found["load"] = seconds(contender.load, 10)
    labels = torch.arange(16, device=DEVICE) % CLASSES[size]
    sampler = contender.settings[size][-1][0]
    found["call"] = seconds(lambda: contender.sample(labels, sampler, 4, 0), 2) / 4 / len(labels)
    if size == 64:
        guided = labels[:4], sampler, 20, 0, GUIDANCE
        start = clock()
        contender.sample(*guided)
        found["guided"] = (clock() - start) / 4
    return found


def peak() -> float:
    """The most memory that this process has had, in GB: of the device with CUDA, else resident."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def profile(size: int):
    from noisout_nb.profiles import PROFILES

    return PROFILES["quick" if size == 32 else "flowers64"]


def training(name: str, size: int, rate: float, limit: float, kept: bool) -> dict:
    """Train for about `limit` seconds; of the last and the averaged weights the better are kept.

    The learning rate falls over the whole run, so its steps are counted beforehand and all taken.
    """
    from noisout_nb.data import load_data

    torch.manual_seed(0)
    bfloat16 = size == 64
    trial = CONTENDERS[name](size, bfloat16=bfloat16)
    steps = int(limit / seconds(trial.step, 8))  # the schedules need their number
    contender = CONTENDERS[name](size, steps, rate, bfloat16)
    start = clock()
    for _ in range(steps):
        contender.step()
    found = {"seconds": clock() - start, "steps": steps}
    held_out, losses = load_data(profile(size), "val"), {}
    parts = {"averaged": contender.average(), "last": contender.model.parameters()}
    weights = {part: [p.detach().clone() for p in values] for part, values in parts.items()}
    for part, values in weights.items():
        contenders.put(contender.model, values)
        losses[part] = contender.held_out_loss(held_out)
    better = min(losses, key=lambda part: losses[part])
    if kept:
        torch.save(weights[better], FOLDER / f"{name}-{size}.pth")
    return found | {"loss": losses[better], "weights": better, "losses": losses}


def comparisons(size: int, seed: int) -> tuple:
    """The judge, and of each comparison the real images, their labels and the reference."""
    from noisout_nb.classifier import classifier_files, load_classifier
    from noisout_nb.data import ProceduralFlowers, load_data
    from noisout_nb.protocol import Judge, halves

    classifier, _ = load_classifier(classifier_files(profile(size))[0])
    if size == 32:
        reference = ProceduralFlowers(size, COUNT, 2_000_003 + seed)
        real = ProceduralFlowers(size, COUNT, 3_000_003 + seed)
        return Judge(classifier, real), [(real.images, real.labels, reference.images)]
    data = load_data(profile(size), "val")
    first, second = halves(data.labels, seed)
    sets = (first, second), (second, first)
    found = [(data.images[a], data.labels[a], data.images[b]) for a, b in sets]
    return Judge(classifier, data), found


def samples(name: str, size: int, sampler: str, steps: int, seed: int) -> dict:
    """The protocol's measures of samples, or of the "real" images; guided ones at 64 x 64."""
    from noisout_nb.data import to_uint8

    if name != "real":
        contender = CONTENDERS[name](size, bfloat16=size == 64)
        contenders.put(contender.model, torch.load(FOLDER / f"{name}-{size}.pth", DEVICE))
    judge, sets = comparisons(size, seed)
    found, guidance = [], 1.0 if size == 32 else GUIDANCE
    for number, (drawn, labels, reference) in enumerate(sets):
        if name != "real":
            first = 1000 * seed + 100 * number
            parts = enumerate(labels.split(100), first)
            drawn = [contender.sample(y, sampler, steps, i, guidance) for i, y in parts]
            drawn = to_uint8(torch.cat(drawn)).cpu()
        features, expected = judge.features(drawn), judge.features(reference)
        found.append(judge.measure(drawn, labels, features, (reference, expected)))
    return {key: statistics.mean(x[key] for x in found) for key in found[0]}


JOBS = {"speed": speed, "training": training, "samples": samples}


def done(job: str, **arguments) -> dict:
    """The job's result: from the file where it is there, else from a new process."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    file, wanted = FOLDER / "results.jsonl", {"job": job, **arguments}
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    for line in map(json.loads, lines):
        if line["wanted"] == wanted:
            return line["found"]
    told = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--job", json.dumps(wanted)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "NOISOUT_RECORD": "1"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found = json.loads(told.stdout.splitlines()[-1])
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"wanted": wanted, "found": found}) + "\n")
    return found


# --- tables --------------------------------------------------------------------------------------


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def reaches(values: list[float], wanted: list[float]) -> bool:
    """Is the mean not above the wanted one by more than twice the error of the difference?

    The difference is taken seed by seed, since a seed's flowers and labels move all distances.
    """
    excess, error = mean_and_error([a - b for a, b in zip(values, wanted, strict=True)])
    return excess <= 2 * error


def cheapest(settings: dict, wanted: list[float]) -> str | None:
    """Of `settings`, name -> (seconds, distances), the cheapest that reaches the distances wanted.

    None where none does.
    """
    good = [name for name, (_, distances) in settings.items() if reaches(distances, wanted)]
    return min(good, key=lambda name: settings[name][0], default=None)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def speeds(size: int) -> tuple[str, dict[str, float]]:
    """The table of speed and memory, and the seconds of a step of sampling, per image.

    At 64 x 64 a step is one with guidance, in bfloat16.
    """
    columns = [(name, False) for name in CONTENDERS]
    columns += [(name, True) for name in CONTENDERS] if size == 64 else []
    turns = [
        {c: done("speed", name=c[0], size=size, bfloat16=c[1], turn=turn) for c in columns}
        for turn in range(ROUNDS)
    ]

    def row(title, value, digits=3):
        medians = [statistics.median(value(turn[c]) for turn in turns) for c in columns]
        return [title, *(f"{x:.{digits}g}" for x in medians)]

    def ratio(key):
        """noisOut's time of the same turn and precision over each column's: lowest to highest."""
        cells = []
        for name, bfloat16 in columns:
            found = [turn["noisOut", bfloat16][key] / turn[name, bfloat16][key] for turn in turns]
            same = name == "noisOut"
            cells.append("1" if same else f"{min(found):.2f} to {max(found):.2f}")
        return ["ratio to noisOut, lowest to highest turn", *cells]

    batch = contenders.BATCH
    rows = [
        row("parameters (M)", lambda x: x["parameters"] / 1e6),
        row("training, images/s", lambda x: batch / x["step"]),
        ratio("step"),
        row("of that, loading the images (ms per image)", lambda x: 1e3 * x["load"] / batch, 2),
        row("one network call, sampling (ms per image)", lambda x: 1e3 * x["call"]),
        ratio("call"),
        row("peak memory, training (GB)", lambda x: x["memory"]),
        row("import, after torch (s)", lambda x: x["import"], 2),
    ]
    if size == 64:
        rows.insert(6, row("s per guided sample, 20 steps", lambda x: x["guided"]))
    head = ["", *(name + (", bfloat16" if bfloat16 else "") for name, bfloat16 in columns)]
    costs = {}
    for name in CONTENDERS:
        if size == 32:
            costs[name] = statistics.median(turn[name, False]["call"] for turn in turns)
        else:
            costs[name] = statistics.median(turn[name, True]["guided"] / 20 for turn in turns)
    return table(head, rows), costs


def trained(size: int, limit: float) -> str:
    """Train every library at the better of two learning rates; a table of what that took."""
    rows = []
    for name in CONTENDERS:
        tried = {
            rate: done("training", name=name, size=size, rate=rate, limit=limit / 10, kept=False)[
                "loss"
            ]
            for rate in RATES
        }
        rate = min(tried, key=lambda rate: tried[rate])
        found = done("training", name=name, size=size, rate=rate, limit=limit, kept=True)
        spent = str(found["steps"]), f"{found['seconds']:.0f}", found["weights"]
        rows.append([name, f"{rate:g}", *spent])
    steps = f"steps of {contenders.BATCH} images"
    return table(["", "learning rate", steps, "seconds", "weights"], rows)


def distances(size: int, costs: dict[str, float]) -> str:
    """Distances of every setting, and the seconds per sample at equal distance."""
    names = {"real": [("", 0)]} | {name: c.settings[size] for name, c in CONTENDERS.items()}
    jobs = [(seed, name, *s) for seed in SEEDS for name in names for s in names[name]]
    found: dict = {}
    for seed, name, sampler, steps in sorted(jobs, key=lambda job: job[3]):
        result = done("samples", name=name, size=size, sampler=sampler, steps=steps, seed=seed)
        found.setdefault((name, sampler, steps), []).append(result)
    rows, left = [], "recognised" if size == 32 else "petals"
    measures = {key: title for key, title in MEASURES.items() if key != left}
    for name, sampler, steps in found:
        if name == "real":
            continue
        cells = [f"{1e3 * costs[name] * steps:.0f}"]
        for key in measures:
            pairs = zip(found[name, sampler, steps], found["real", "", 0], strict=True)
            is_distance = key in (*DISTANCES, "frechet")
            values = [x[key] - real[key] * is_distance for x, real in pairs]
            cells.append("{:.3g} ± {:.1g}".format(*mean_and_error(values)))
        rows.append([f"{name}, {sampler} {steps}", *cells])
    head = ["distances above real flowers'", "ms per sample", *measures.values()]
    return table(head, rows) + "\n" + equal_distance(found, costs)


def equal_distance(found: dict, costs: dict[str, float]) -> str:
    rows = []
    for key, title in DISTANCES.items():
        settings = {name: {} for name in CONTENDERS}
        for (name, sampler, steps), results in found.items():
            if name != "real":
                cost = 1e3 * costs[name] * steps
                settings[name][f"{sampler} {steps}"] = (cost, [x[key] for x in results])
        for goal in CONTENDERS:
            _, best = min(settings[goal].values(), key=lambda s: statistics.mean(s[1]))
            cells = []
            for name in CONTENDERS:
                chosen = cheapest(settings[name], best)
                at = None if chosen is None else settings[name][chosen][0]
                cells.append("not reached" if at is None else f"{at:.0f} ({chosen})")
            rows.append([f"{title}: {statistics.mean(best):.3g}, the best of {goal}", *cells])
    return table(["ms per sample at equal distance", *CONTENDERS], rows)


def versions() -> str:
    found = [f"Python {platform.python_version()}", f"PyTorch {torch.__version__}"]
    for name in ("diffusers", "denoising-diffusion-pytorch"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            raise SystemExit(f"{name} is missing: pip install {name}") from None
    return ", ".join(found)


def main():
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("size", type=int, choices=sorted(CLASSES), nargs="?", default=32)
    arguments.add_argument("--limit", type=float, default=300, help="seconds of a training run")
    arguments.add_argument("--job", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.job:
        torch.set_num_threads(1)
        given = json.loads(options.job)
        print(json.dumps(JOBS[given.pop("job")](**given)))
        return
    print(f"{versions()}\n")
    text, costs = speeds(options.size)
    print(text)
    print(trained(options.size, options.limit))
    print(distances(options.size, costs))


if __name__ == "__main__":
    main()
