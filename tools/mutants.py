"""Plant faults one by one: does a test notice each of them?

    python tools/mutants.py            all of them, about a second or two each
    python tools/mutants.py sampling   those whose file, text or test has this word in it

Each fault is planted in a copy of the repository, where the tests named beside it are run. The exit
code is 0 only if they are green without the fault and red with every one. A fault in a notebook is
planted in its cell, whose stored output stays.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat

from notebooks import METADATA, ROOT, canonicalise

GREEN, RED = 0, 1  # pytest's exit codes; any other one means that no test was run


@dataclass(frozen=True)
class Fault:
    """`old`, once in `file`, becomes `new`; then `tests` (those with `words`) must fail."""

    file: str
    old: str
    new: str
    tests: str
    words: str  # pytest's -k

    def __str__(self) -> str:
        return f"{self.file}: {self.old.strip()!r} -> {self.new.strip()!r}"


# file of the package, tests, then for each fault: pytest's -k, the old text, the new text
MODULES = [
    (
        "forward_process.py",
        "tests/test_forward_process.py",
        ("cosine", "/ (1 + s) * math.pi / 2", "/ (1 + s) * math.pi / 4"),
        ("linear", "scale * 1e-4, scale * 0.02", "1e-4, 0.02"),
        ("bayes", "betas * (1 - alpha_bar_prev) / (1 - alpha_bar)\n", "betas\n"),
        ("hand", '"sqrt_alphas_cumprod": alpha_bar.sqrt()', '"sqrt_alphas_cumprod": alpha_bar'),
        ("chain", "return a * x_start.float() + b", "return a * x_start.float() - b"),
        ("target", "return a * noise - b * x_start", "return a * noise + b * x_start"),
        ("learned", "v * high + (1 - v) * low", "v * low + (1 - v) * high"),
        ("uniform", "/ steps).round().long() - 1", "/ steps).long() - 1"),
        ("twice", "self.timestep_map.cpu()[kept]", "kept"),
    ),
    (
        "sampling.py",
        "tests/test_sampling.py",
        ("diffusers", "ratio / 2 * (x_start - previous)", "ratio * (x_start - previous)"),
        ("eta_1", "eta**2 * process.posterior_variance", "eta / 2 * process.posterior_variance"),
        ("sde_dpm", "x_T, y, eta=1.0, **options", "x_T, y, eta=0.9, **options"),
        ("order", "(noise + noise_at_end) / 2", "noise"),
        ("eta_1", "(1 - alpha_bar - variance).clamp(min=0)", "(1 - alpha_bar).clamp(min=0)"),
        ("seed", "(2_654_435_769 * seed + index)", "(2_654_435_769 * seed)"),
        ("learned", "variance = process.p_log_variance(x, t, fraction).exp()", "pass"),
    ),
    (
        "parallel.py",
        "tests/test_parallel.py",
        ("processes_give", "    import torch.distributed.nn  # noqa: F401\n", ""),
    ),
    (
        "training.py",
        "tests/test_training.py",
        ("algorithm", "settings.label_dropout, generator", "0.1, generator"),
        ("cosine", "0.5 * (1 + math.cos(math.pi * done))", "(1 - done)"),
        ("dropout", "model.train()  # the caller", "pass  # the caller"),
        ("do_not_meet", "torch.default_generator.manual_seed(seed)", "pass"),
        ("no_number", "raise state.diverged(index + 1, value, norm)", "pass"),
    ),
    (
        "ema.py",
        "tests/test_training.py",
        ("average", "(1 + self.updates) / (10 + self.updates)", "1 / (10 + self.updates)"),
        ("applied", "self._copy(parameters, own)", "pass"),
    ),
    (
        "unet.py",
        "tests/test_unet.py",
        ("evaluating", "    model.eval()\n", "    pass\n"),
    ),
    (
        "losses.py",
        "tests/test_training.py",
        ("weighting", '"snr+1": lambda snr: snr + 1,', '"snr+1": lambda snr: snr + 2,'),
        ("plain", "* relative_weight(process, t, weighting, max_weight)\n", "* 1.01\n"),
        ("held_out", "mul(process.timesteps / count)", "mul(process.timesteps / count / 2)"),
    ),
    (
        "batches.py",
        "tests/test_training.py",
        ("epoch", "index)) < 0.5", "index)) < 0.1"),
    ),
    (
        "files.py",
        "tests/test_checkpoints.py",
        ("interrupts", "os.replace(partial, path)", "path.write_bytes(b'')"),
    ),
    ("unet.py", "tests/test_evaluation.py", ("mode", "    model.eval()\n", "    pass\n")),
    (
        "evaluation.py",
        "tests/test_evaluation.py",
        ("scipy", "- 2 * root_trace", "- root_trace"),
        ("loops", "@ q.T / dim + 1) ** 3", "@ q.T / dim + 1) ** 2"),
        ("definition", ".kthvalue(k + 1, dim=1)", ".kthvalue(k, dim=1)"),
        (
            "coverage",
            "torch.cdist(part, samples).amin(1) <=",
            "torch.cdist(part, samples).amax(1) <=",
        ),
        ("prior_bits", "- 1 - 2 * noise.log()", "- 1 - noise.log()"),
        ("label", "len(y) != len(images)", "False"),
    ),
    (
        "copies.py",
        "tests/test_evaluation.py",
        ("nearer", "distance = distance.minimum(", "distance = distance.maximum("),
    ),
    (
        "flow_matching.py",
        "tests/test_flow_matching.py",
        ("straight_line", "(1 - s) * x_start.float() + s", "s * x_start.float() + (1 - s)"),
        ("least_loss", "noise.float() - x_start.float()", "noise.float() + x_start.float()"),
        ("order", "(velocity + velocity_at_end) / 2", "velocity"),
        ("direction", "x / ((1 - s) ** 2 + s**2).sqrt()", "x"),
        ("nearest", "(angles[0][1:] + angles[0][:-1]) / 2", "angles[0][1:]"),
        ("range", "x_start.clamp(-1, 1)\n", "x_start.clamp(-2, 2)\n"),
        ("refuse", "check_labels(y.cpu()", "(lambda *_: None)(y.cpu()"),
    ),
    (
        "losses.py",
        "tests/test_flow_matching.py",
        ("logit_normal", "mean + std * torch.randn", "mean + torch.randn"),
        ("flow_matching_s", "(snr.sqrt() + 1) ** 2", "snr.sqrt() + 1"),
    ),
    (
        "forward_process.py",
        "tests/test_flow_matching.py",
        ("gaussian_diffusion", "alpha_bar = (1 - s) ** 2 /", "alpha_bar = (1 - s) /"),
        (
            "gaussian_diffusion",
            '"straight": straight_beta_schedule,',
            '"straight": cosine_beta_schedule,',
        ),
    ),
    (
        "training.py",
        "tests/test_flow_matching.py",
        ("as_told", 'if density == "logit-normal":', "if False:"),
    ),
    (
        "profiles.py",
        "tests/test_programs.py",
        ("takes_flow", 'timestep_density": self.timestep_density', 'timestep_density": "uniform"'),
    ),
    (
        "editing.py",
        "tests/test_editing.py",
        ("grey_level", "torch.where(self.mask, prediction, known)", "prediction"),
        ("unknown_region", "output[:, x.shape[1] :]", "0 * output[:, x.shape[1] :]"),
        ("as_noisy", "beta.sqrt() * noise", "beta * noise"),
        ("conditional", "range(repeats if i > 0 else 1)", "range(1)"),
        ("gaussian_says", "(len(x_0),), count - 1,", "(len(x_0),), count // 2,"),
        ("own", "process.timestep_map[:count]", "torch.arange(count)"),
        ("follows", "rise * noise)", "rise * noise / 2)"),
        ("fixed_point", "predict(model, process, end, t, y)", "predict(model, process, x, t, y)"),
        ("masks_that", "if not ((mask == 0) | (mask == 1)).all():", "if False:"),
        ("strength_outside", "if not 0 <= strength <= 1:", "if strength > 1:"),
    ),
]

# whole entries: tools, notebooks, whatever is no module of the package
OTHERS = [
    Fault(
        "tools/suite.py",
        "if self.parent.timed_out:\n            limit",
        "if False:\n            limit",
        "tests/test_suite.py",
        "one-exceeded",
    ),
    Fault(
        "tools/suite.py",
        "if self.unasked and (exitstatus",
        "if self.failed and (exitstatus",
        "tests/test_suite.py",
        "only_a_skip",
    ),
    Fault(
        "tools/notebooks.py",
        "STARTS = 3",
        "STARTS = 1",
        "tests/test_suite.py",
        "started_again",
    ),
    Fault(
        "tools/notebooks.py",
        "        self.count += 1\n",
        "        return\n",
        "tests/test_suite.py",
        "ends_with_its_images",
    ),
    Fault(
        "noisout_nb/commands.py",
        "        if rank_and_world()[0] == 0:\n            facts",
        "        if True:\n            facts",
        "tests/test_programs.py",
        "torchrun",
    ),
    Fault(
        "tools/notebooks.py",
        'if "KeyboardInterrupt" in errors:',
        'if "SystemExit" in errors:',
        "tests/test_suite.py",
        "recording",
    ),
    Fault(
        "noisout_nb/features.py",
        "if len(names) > 1:",
        "if len(names) > 2:",
        "tests/test_evaluation.py",
        "two_extractors",
    ),
    Fault(
        "noisout_nb/features.py",
        "cov = cov + cov.triu(1).T",
        "pass",
        "tests/test_evaluation.py",
        "gives_back",
    ),
    Fault(
        "noisout_nb/evaluation.py",
        "return metric(a, b), ((blocks - 1) * spread).sqrt().item()",
        "return metric(a, b), spread.sqrt().item()",
        "tests/test_evaluation.py",
        "jackknifes_error",
    ),
    Fault(
        "noisout_nb/copies.py",
        "mirrored = self.features(images.flip(-1))",
        "mirrored = self.features(images)",
        "tests/test_evaluation.py",
        "also_mirrored",
    ),
    Fault(
        "noisout_nb/protocol.py",
        "{self.steps} {self.guidance_scale} {seed}",
        "{self.steps} {seed}",
        "tests/test_evaluation.py",
        "kept_and_used",
    ),
    Fault(
        "noisout_nb/protocol.py",
        "order = order[labels[order].argsort(stable=True)][: len(labels) // 2 * 2]",
        "order = order[: len(labels) // 2 * 2]",
        "tests/test_evaluation.py",
        "halves_and_turns",
    ),
    Fault(
        "notebooks/07_evaluation.ipynb",
        "- 2 * roots.sum()",
        "- roots.sum()",
        "notebooks/07_evaluation.ipynb",
        "ipynb",
    ),
    Fault(
        "notebooks/07_evaluation.ipynb",
        "(gram.sum() - gram.trace())",
        "gram.sum()",
        "notebooks/07_evaluation.ipynb",
        "ipynb",
    ),
]

# the code of notebooks 06 and 09, and what they are about: file, test's words, old text, new text
GUIDANCE = "noisout_nb/guidance.py"
LESSON_06, LESSON_09 = (f"notebooks/scripts/{n}.py" for n in ("06_guidance", "09_improved_ddpm"))
OTHERS += [
    Fault(file, old, new, "tests/test_guidance.py", words)
    for file, words, old, new in (
        (LESSON_06, "posterior_mean", "keep = self.width**2 /", "keep = toy.sigmas[t] ** 2 /"),
        (LESSON_06, "posterior_mean", "-squared / (2 * variance", "-squared / (variance"),
        (LESSON_06, "diversity", "3 * float(shares.min())", "3 * float(shares.max())"),
        (LESSON_06, "towards", "blurred(x, t, y)).flatten(1)", "blurred(x, t, 1 - y)).flatten(1)"),
        (GUIDANCE, "autoguidance_formula", "plain - self.weak(x, t, y)", "plain - self.weak(x, t)"),
        (GUIDANCE, "interval_guides", "(low < sigma) & (sigma <= high)", "(sigma <= high)"),
    )
]
OTHERS += [
    Fault(file, old, new, "tests/test_training.py", words)
    for file, words, old, new in (
        (LESSON_09, "enumerated", "T * root.square().sum() - total**2", "T * root.square().sum()"),
        (LESSON_09, "enumerated", "terms.square().mean(1).sqrt()", "terms.square().mean(1)"),
        (
            LESSON_09,
            "weighted_draws",
            "(1 / (T * probability[t]))",
            "(1 / (T * probability[0 * t]))",
        ),
        (
            LESSON_09,
            "weighted_draws",
            "return weight * variational_bound_term(process",
            "return variational_bound_term(process",
        ),
        ("noisout_nb/losses.py", "hybrid", "process.timesteps / 1000 * bound", "bound"),
        (
            "noisout_nb/losses.py",
            "hybrid",
            "torch.cat([prediction.detach(), f",
            "torch.cat([prediction, f",
        ),
    )
]


def faults() -> list[Fault]:
    """All of them."""
    table = []
    for module, tests, *changes in MODULES:
        for words, old, new in changes:
            table.append(Fault(f"noisout_nb/{module}", old, new, tests, words))
    return table + OTHERS


def copy_repository(target: Path) -> None:
    """What the tests need, without downloads, runs and the environment."""
    for name in ("noisout_nb", "tests", "tools", "notebooks"):
        unwanted = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "images")
        shutil.copytree(ROOT / name, target / name, ignore=unwanted)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, target)
    (target / "models").symlink_to(ROOT / "models")


def pytest_code(folder: Path, tests: str, words: str) -> int:
    """pytest's exit code for some tests of the copy in `folder`."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    paths = os.pathsep.join([str(folder), str(folder / "tools")])
    found = subprocess.run(
        [*command, tests, "-k", words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return found.returncode


def plant(fault: Fault, folder: Path) -> str | None:
    """Change the file in the copy; a sentence where the table is out of date."""
    path = folder / fault.file
    if path.suffix == ".ipynb":
        nb = nbformat.read(path, 4)
        cells = [cell for cell in nb.cells if fault.old in cell.source]
        if len(cells) != 1:
            return f"the text is in {len(cells)} cells"
        cells[0].source = cells[0].source.replace(fault.old, fault.new)
        nb.metadata = METADATA
        path.write_text(nbformat.writes(canonicalise(nb)) + "\n", encoding="utf-8")
        return None
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text.count(fault.old) != 1:
        return f"the text occurs {text.count(fault.old)} times"
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    return None


def check(fault: Fault) -> str:
    """ "red" where the fault was noticed, else what happened."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy_repository(Path(folder))
        problem = plant(fault, Path(folder))
        if problem is None:
            code = pytest_code(Path(folder), fault.tests, fault.words)
            verdicts = {RED: "red", GREEN: "SURVIVED"}
            problem = verdicts.get(code, f"no test ran (pytest: {code})")
    print(f"{problem:10} {time.monotonic() - start:4.0f} s  {fault}", flush=True)
    return problem


def main() -> None:
    word = " ".join(sys.argv[1:])
    chosen = [fault for fault in faults() if word in f"{fault} {fault.tests}"]
    if not chosen:
        raise SystemExit(f"no fault has {word!r} in it")
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy_repository(Path(folder))
        for tests in sorted({fault.tests for fault in chosen}):
            words = " or ".join(sorted({f.words for f in chosen if f.tests == tests}))
            if code := pytest_code(Path(folder), tests, words):
                raise SystemExit(
                    f"not green without a fault (pytest: {code}): {tests} -k '{words}'"
                )
    with ThreadPoolExecutor(int(os.environ.get("WORKERS") or os.cpu_count() or 1)) as pool:
        verdicts = list(pool.map(check, chosen))
    red = verdicts.count("red")
    print(f"{red} of {len(chosen)} faults were noticed")
    sys.exit(red != len(chosen))


if __name__ == "__main__":
    main()
