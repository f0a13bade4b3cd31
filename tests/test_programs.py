"""`python -m noisout_nb`: every command with tiny settings, and what it says about bad input."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from noisout_nb import __main__ as programs
from noisout_nb.checkpoints import load_model, read_card
from noisout_nb.classifier import (
    ClassifierFeatures,
    FlowerClassifier,
    load_classifier,
    save_classifier,
)
from noisout_nb.data import load_data
from noisout_nb.evaluation import CopyDetector, load_features
from noisout_nb.profiles import PROFILES
from noisout_nb.training import held_out_loss

REPOSITORY = Path(__file__).resolve().parent.parent
TINY = ["--name", "tiny", "--train-images", "40", "--batch-size", "8"]
TINY += ["--channels", "32", "--channel-mults", "1"]


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Runs go to a folder of the test's own, and the working directory is another one."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("NOISOUT_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("NOISOUT_PROFILE", raising=False)
    return tmp_path


def program(*arguments):
    return programs.main([str(argument) for argument in arguments])


def started(*arguments):
    """A process of its own, as a user starts it."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    environment.pop("NOISOUT_RECORD", None)  # the suite sets it; a user sees the progress bar
    command = [sys.executable, "-m", "noisout_nb", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def test_train_writes_averaged_weights_and_goes_on(workplace, capsys):
    assert program("train", *TINY, "--train-steps", 3, "--save-every", 2) == 0
    weights = workplace / "runs/tiny/model.pth"
    card = read_card(weights)
    assert (card["steps"], card["profile"]) == (3, "tiny")
    assert 0 < card["held_out_loss"] < 1000
    assert f"{card['held_out_loss']:.5f}" in capsys.readouterr().out
    model, process, classes = load_model(weights)
    assert model.config["channels"] == 32 and model.config["channel_mults"] in ([1], (1,))
    assert process.prediction == "x0" and len(classes) == 6
    # with the one measure by which all files are compared, whatever the run's own weighting
    loss = held_out_loss(model, process, load_data(PROFILES["quick"], "val"))
    assert card["held_out_loss"] == pytest.approx(loss, rel=1e-2)

    straight = program("train", *TINY, "--name", "straight", "--train-steps", 5)
    further = program("train", *TINY, "--train-steps", 5)
    assert (straight, further) == (0, 0)
    assert read_card(weights)["steps"] == 5


def test_train_takes_flow_matching(workplace):
    """The options of the model card's command for `quick_flow.pth`."""
    options = "--schedule straight --weighting flow --max-weight none"
    options += " --timestep-density logit-normal --train-steps 1"
    assert program("train", *TINY, *options.split()) == 0
    card = read_card(workplace / "runs/tiny/model.pth")
    assert (card["process"]["schedule"], card["weighting"]) == ("straight", "flow")
    assert (card["max_weight"], card["timestep_density"]) == (None, "logit-normal")
    state = torch.load(workplace / "runs/tiny/checkpoint.pth", weights_only=True)
    assert state["settings"]["timestep_density"] == "logit-normal"


def test_the_weights_written_are_the_moving_average(workplace):
    program("train", *TINY, "--train-steps", 4)
    state = torch.load(workplace / "runs/tiny/checkpoint.pth", weights_only=True)
    weights = torch.load(workplace / "runs/tiny/model.pth", weights_only=True)
    parameters = dict(load_model(workplace / "runs/tiny/model.pth")[0].named_parameters())
    for name, averaged in zip(parameters, state["ema"], strict=True):
        assert torch.equal(weights[name], averaged.half())
    assert not torch.equal(weights["conv_out.weight"], state["model"]["conv_out.weight"].half())


def test_ctrl_c_says_how_to_go_on(workplace):
    process = started("train", *TINY, "--train-steps", 100_000)
    limit = threading.Timer(240, process.kill)
    limit.start()
    seen = ""
    while "loss" not in seen:
        read = process.stderr.read(40)  # the progress bar
        assert read, "the program ended, or showed no loss within its time limit"
        seen += read
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate()
    limit.cancel()
    assert process.returncode == 130
    step = int(out.split("stopped at step ")[1].split(";")[0])
    assert "run again to go on" in out
    state = torch.load(workplace / "runs/tiny/checkpoint.pth", weights_only=True)
    assert len(state["losses"]) == step > 0


def test_sample_writes_a_grid_or_single_files(workplace, capsys):
    program("train", *TINY, "--train-steps", 1)
    weights = workplace / "runs/tiny/model.pth"
    common = ["--weights", weights, "--steps", 1, "--count", 2]
    assert program("sample", "daisy", "forget-me-not", *common, "--out", "grid.png") == 0
    assert Path("grid.png").stat().st_size > 1000
    assert program("sample", "daisy", *common, "--out", "single") == 0
    from PIL import Image

    assert [f.name for f in sorted(Path("single").iterdir())] == ["daisy-0.png", "daisy-1.png"]
    assert Image.open("single/daisy-0.png").size == (32, 32)
    program("sample", "daisy", *common, "--out", "again")
    program("sample", "daisy", *common, "--out", "other", "--seed", 1)
    first, again, other = (
        Path(folder, "daisy-0.png").read_bytes() for folder in ("single", "again", "other")
    )
    assert first == again != other
    capsys.readouterr()
    assert program("species", "--weights", weights) == 0
    assert "forget-me-not" in capsys.readouterr().out.splitlines()


def test_evaluate_writes_tables_and_figures(workplace, capsys):
    program("train", *TINY, "--train-steps", 1)
    judge = workplace / "judge.pth"
    torch.manual_seed(0)
    classes = tuple(load_model(workplace / "runs/tiny/model.pth")[2])
    save_classifier(
        FlowerClassifier(6, 32, width=8, depth=1), judge, classes, held_out_accuracy=0.5
    )
    options = ["--weights", workplace / "runs/tiny/model.pth", "--classifier", judge]
    options += ["--train-images", 250, "--also", f"twin={workplace / 'runs/tiny/model.pth'}"]
    options += ["--checkpoint", workplace / "runs/tiny/checkpoint.pth"]
    assert program("evaluate", *options, "--samples", 10, "--seeds", 1, 2, "--steps", 1) == 0
    folder = workplace / "runs/quick"
    results = json.loads((folder / "evaluation.json").read_text())
    assert results["sets"] == 2 and results["per_set"] == 256
    measures = results["measures"]
    assert set(measures) == {"real", "samples, guidance 1", "twin", "noise"}
    assert measures["twin"] == measures["samples, guidance 1"]
    assert measures["real"]["factors"][0] < measures["samples, guidance 1"]["factors"][0]
    assert measures["real"]["petals"][0] > 0.99
    assert measures["real"]["kernel"][1] > 0
    planted = results["memorisation"]["planted"]
    assert planted["exact"]["suspected"] >= 0.99 and planted["mirrored"]["suspected"] >= 0.99
    table = (folder / "evaluation.md").read_text()
    assert "| real |" in table and "planted: mirrored" in table
    assert table.strip() in capsys.readouterr().out
    for name in ("kernel", "frechet", "precision", "copies", "planted-copies", "loss", "twin"):
        assert (folder / f"evaluation-{name}.png").stat().st_size > 1000
    assert {path.name for path in folder.glob("suspects-*")} == {
        "suspects-samples-guidance-1.png",
        "suspects-twin.png",
    }
    sets, whole, card = load_features(
        folder / "features.pth", ClassifierFeatures(load_classifier(judge)[0])
    )
    assert {name: len(x) for name, x in sets.items()} == {
        "held-out": 512,
        "samples, guidance 1": 512,
        "twin": 512,
    }
    assert whole["training"].count == 250 and card["memorisation"] == results["memorisation"]
    assert program("evaluate", *options, "--also", "twin") == 2
    assert "NAME=FILE" in capsys.readouterr().err


def test_train_classifier_reports_what_it_can(workplace, capsys):
    assert (
        program(
            "train-classifier",
            "--steps",
            12,
            "--train-images",
            40,
            "--width",
            8,
            "--batch-size",
            16,
        )
        == 0
    )
    path = workplace / "runs/quick/classifier.pth"
    classifier, card = load_classifier(path)
    assert f"{card['held_out_accuracy']:.1%}" in capsys.readouterr().out
    assert not classifier.training and card["steps"] == 12
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert classifier.features(images).shape == (2, 32)
    assert classifier(images).shape == (2, 6)


def test_publish_takes_the_better_weights_only(workplace, monkeypatch, capsys):
    target = workplace / "models/quick_model.pth"
    monkeypatch.setattr("noisout_nb.profiles.REPOSITORY", workplace)
    program("train", *TINY, "--train-steps", 2, "--learning-rate", 0.002)
    program("train", *TINY, "--name", "worse", "--train-steps", 1, "--learning-rate", 1e-9)
    better, worse = (workplace / f"runs/{name}/model.pth" for name in ("tiny", "worse"))
    capsys.readouterr()
    assert program("publish", "--weights", better) == 0
    assert program("publish", "--weights", worse) == 0
    assert "--force" in capsys.readouterr().out
    assert target.read_bytes() == better.read_bytes()
    assert program("publish", "--weights", worse, "--force") == 0
    assert target.read_bytes() == worse.read_bytes()
    assert any(file.read_bytes() == better.read_bytes() for file in target.parent.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sample", "sunflowr"], "sunflower"),
        (["sample", "sunflower", "--out", "a.gif"], ".png"),
        (["sample", "sunflower", "--count", "0"], "--count is 0"),
        (["sample", "sunflower", "--weights", "missing.pth"], "missing.pth"),
        (["train", "--profile", "flower64"], "quick, flowers64"),
        (["train", *TINY, "--prediction", "epsilon"], "eps"),
        (["train", "--dataset", "flower102"], "flowers102"),
        (["train", *TINY, "--train-steps", "0"], "steps"),
        (["evaluate", "--samples", "0"], "--samples is 0"),
        (["publish", "--profile", "folder"], "your own"),
        (["publish", "--profile", "quick"], "no weights in"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, capsys, monkeypatch, workplace):
    monkeypatch.setattr("noisout_nb.profiles.REPOSITORY", REPOSITORY)
    if arguments == ["publish", "--profile", "quick"]:
        monkeypatch.setattr("noisout_nb.profiles.REPOSITORY", workplace)
    assert program(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and words in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [["train", "--channel-mults", "wide"], ["train", "--channels", "1.5"], ["paint"], []],
)
def test_errors_of_usage_have_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        program(*arguments)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_every_field_of_the_profile_is_an_option():
    given = "--channel-mults 0.5,1 --max-weight none --guidance-interval 0.3,5 --no-flip --autocast"
    parsed = programs._parser().parse_args(["train", "--profile", "flowers64", *given.split()])
    profile = programs._profile(parsed)
    assert profile.channel_mults == (0.5, 1) and profile.max_weight is None
    assert profile.guidance_interval == (0.3, 5) and not profile.flip and profile.autocast
    assert profile.image_size == PROFILES["flowers64"].image_size
    help_text = programs._parser().format_help()
    assert all(name in help_text for name in ("sample", "train", "evaluate", "publish", "species"))


def test_the_environment_sets_the_default_profile(monkeypatch):
    monkeypatch.setenv("NOISOUT_PROFILE", "flowers64-gpu")
    for command in (["train"], ["evaluate"], ["sample", "rose"]):
        assert programs._parser().parse_args(command).profile == "flowers64-gpu"


def test_weights_missing_from_an_installed_package_are_explained(monkeypatch, workplace, capsys):
    monkeypatch.setattr("noisout_nb.profiles.REPOSITORY", workplace)
    assert program("sample", "rose") == 2
    assert "clone" in capsys.readouterr().err


def test_torchrun_shares_out_a_training_run(workplace):
    settings = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "noisout_nb", "train", *TINY, "--train-steps", "2"]
    found = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-4000:]
    assert found.stdout.count("held-out loss") == 1  # one process speaks for both
    card = read_card(workplace / "runs/tiny/model.pth")
    assert card["steps"] == 2 and 0 < card["held_out_loss"] < 1000


def test_inception_without_its_package_is_explained(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    assert program("evaluate", "--features", "inception") == 2
    assert "pip install torch-fidelity" in capsys.readouterr().err


def test_a_detector_in_features_of_a_classifier_finds_mirrored_copies():
    torch.manual_seed(0)
    classifier = FlowerClassifier(6, 32, width=8, depth=1).eval()
    images = torch.rand(300, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        detector = CopyDetector(images[:100], images[100:], features=classifier.features)
        assert detector.copied(images[:50].flip(-1)).double().mean() > 0.98
