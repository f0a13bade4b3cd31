"""Training: what a step does, what a loop leaves behind, what goes on from it, what is refused."""

import copy
import gc
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cells import cell
from tiny import DATA, PROCESS, losses_of, network, same, start
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from noisout_nb import training
from noisout_nb.dataset import ImageDataset, to_float
from noisout_nb.files import load_safely
from noisout_nb.forward_process import GaussianDiffusion
from noisout_nb.losses import (
    WEIGHTINGS,
    held_out_loss,
    relative_weight,
    simple_loss,
    variational_bound_term,
)
from noisout_nb.training import EMA, Batches, Settings, learning_rate_at
from noisout_nb.training_state import TrainingState


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The losses and the final state of a run that nothing interrupts."""
    path = tmp_path_factory.mktemp("straight") / "run.pth"
    return losses_of(checkpoint=path), load_safely(path)


def assert_goes_on(path, straight, **options):
    """A new process that knows the file alone ends as the straight run did, in every bit."""
    losses, state = straight
    assert losses_of(checkpoint=path, **options) == losses
    found = load_safely(path)
    for part in ("model", "optimizer", "ema", "ema_updates", "step", "losses"):
        assert same(found[part], state[part]), part


# The step itself


def test_a_step_is_algorithm_1():
    mine, theirs = network(dropout=0.0), network(dropout=0.0)
    batches, generator = Batches(DATA, 4), torch.Generator()
    optimizer = torch.optim.Adam(mine.parameters(), betas=(0.9, 0.99))
    for index in range(3):
        x_0, y = batches[index]
        generator.manual_seed(index)
        t = torch.randint(1000, (4,), generator=generator)
        noise = torch.randn(x_0.shape, generator=generator)
        y[torch.rand(4, generator=generator) < 0.5] = 6
        a_bar = PROCESS.exact_alphas_cumprod[t].float().view(-1, 1, 1, 1)
        x_t = a_bar.sqrt() * x_0 + (1 - a_bar).sqrt() * noise
        optimizer.zero_grad()
        ((mine(x_t, t, y) - x_0) ** 2).mean().backward()
        torch.nn.utils.clip_grad_norm_(mine.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * index / 3)) / 2
        optimizer.step()
    losses_of(theirs, steps=3, learning_rate=1e-2, label_dropout=0.5, max_gradient_norm=0.5)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_callers_random_numbers_and_the_training_do_not_meet(straight):
    losses = []
    torch.manual_seed(3)
    expected = torch.rand(6)
    model = network()
    torch.manual_seed(3)
    mine = [torch.rand(()).item() for _ in start(model, losses=losses)]
    assert torch.equal(torch.tensor(mine), expected)
    assert losses == straight[0]
    assert losses_of(seed=1) != losses


def test_dropout_is_on_while_training_even_after_sampling():
    model, losses = network(), []
    for _ in start(model, losses=losses):
        assert all(module.training for module in model.modules())
        model.eval()
    assert losses == losses_of()


def test_autocast_is_for_devices_that_have_it_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "has_bfloat16", lambda device: False)
    plain = losses_of(autocast=True)
    assert plain == losses_of()
    monkeypatch.setattr(training, "has_bfloat16", lambda device: True)
    half = losses_of(autocast=True)
    assert half != plain
    torch.testing.assert_close(torch.tensor(half), torch.tensor(plain), rtol=0.02, atol=0)
    losses_of(stop=3, autocast=True, checkpoint=tmp_path / "run.pth")
    assert losses_of(autocast=True, checkpoint=tmp_path / "run.pth") == half


class Synchronisations(TorchDispatchMode):
    """Counts what makes the CPU wait for a GPU: values that training.py itself reads."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "_local_scalar_dense" in str(function) and _called_from("training.py"):
            self.count += 1
        return function(*args, **kwargs or {})


def _called_from(name):
    frame = sys._getframe()
    while frame:
        if frame.f_code.co_filename.endswith(f"noisout_nb/{name}"):
            return True
        if "/noisout_nb/" in frame.f_code.co_filename:
            return False
        frame = frame.f_back
    return False


def test_a_step_waits_for_the_device_once():
    run = start()
    next(run)
    with Synchronisations() as seen:
        next(run)
    assert seen.count <= 2, "tolist() of the pair of loss and norm"


# Batches


def test_batches_are_functions_of_their_number():
    batches, again = Batches(DATA, 4, seed=1), Batches(DATA, 4, seed=1)
    for index in (5, 0, 5, 1):
        for a, b in zip(batches[index], again[index], strict=True):
            assert torch.equal(a, b)
    first = next(iter(batches))
    assert all(map(torch.equal, first, batches[0])) and all(map(torch.equal, first, again[0]))
    assert not torch.equal(batches[0][0], batches[4][0]), "another epoch has another order"
    assert not torch.equal(batches[0][0], Batches(DATA, 4, seed=2)[0][0])


def test_an_epoch_has_every_image_once_and_half_are_flipped():
    numbered = ImageDataset(DATA.images, torch.arange(16), tuple("abcdefghijklmnop"))
    batches = Batches(numbered, 5)
    assert batches.per_epoch == 3
    for epoch in range(4):
        seen = torch.cat([batches[3 * epoch + i][1] for i in range(3)])
        assert len(seen.unique()) == 15
    flips = 0
    for index in range(60):
        x, number = batches[index]
        original = to_float(DATA.images[number])
        flipped = (x == original.flip(-1)).flatten(1).all(1)
        assert (flipped | (x == original).flatten(1).all(1)).all()
        flips += int(flipped.sum())
    assert 110 < flips < 190
    for x, number in (Batches(numbered, 5, flip=False)[i] for i in range(3)):
        assert torch.equal(x, to_float(DATA.images[number]))


def test_a_used_or_shared_batches_trains_every_step():
    batches, model, other = Batches(DATA, 4), network(), network()
    next(iter(batches))
    options = {"steps": 6, "learning_rate": 1e-3}
    first = [step.loss for step in training.train(model, PROCESS, batches, EMA(model), **options)]
    second = [step.loss for step in training.train(other, PROCESS, batches, EMA(other), **options)]
    assert first == second == losses_of()


@pytest.mark.parametrize("data", [DataLoader(DATA, 4), [DATA[0]], DATA.images, None])
def test_data_of_another_kind_is_refused_with_the_way_out(data):
    with pytest.raises(ValueError, match=f"data is {type(data).__name__}.*ImageDataset.images"):
        Batches(data, 4)


@pytest.mark.parametrize("size", [0, -1, 17, 2.0, True, "4", None])
def test_a_batch_size_that_does_not_fit_is_refused(size):
    with pytest.raises(ValueError, match="batch_size is .*integer in 1..16"):
        Batches(DATA, size)
    assert len(Batches(DATA, np.int64(4))[0][0]) == 4


# Who belongs together


def test_an_average_of_another_network_is_refused():
    model = network()
    for stranger in (EMA(network()), EMA(torch.nn.Linear(1, 1)), copy.deepcopy(EMA(model))):
        with pytest.raises(ValueError, match="another network.*EMA.model."):
            start(model, ema=stranger)


def test_partners_that_do_not_fit_are_named():
    model = network()
    cases = {
        "batches is DataLoader": {"batches": DataLoader(DATA, 4)},
        "batches is list": {"batches": []},
        "ema is float": {"ema": 0.999},
        "half precision.*autocast": {"model": network().bfloat16()},
        "0..2": {"model": network(num_classes=3)},
        "the process on meta": {"process": GaussianDiffusion.from_config().to("meta")},
    }
    for message, change in cases.items():
        chosen = {"model": model, "process": PROCESS, "batches": Batches(DATA, 4)} | change
        chosen = {"ema": EMA(chosen["model"])} | chosen
        with pytest.raises(ValueError, match=message):
            training.train(**chosen, steps=6, learning_rate=1e-3)
    from_one = ImageDataset(DATA.images, DATA.labels.clamp(max=5) + 1, tuple("abcdefg"))
    with pytest.raises(ValueError, match="labels run from 1 to 6.*0..5"):
        start(data=from_one)
    losses_of(network(num_classes=None), data=from_one)  # which needs no labels


@pytest.mark.parametrize(
    ("option", "values"),
    {
        "steps": [0, -1, 2.5, True, None, "6"],
        "learning_rate": [0, -1e-3, math.nan, math.inf],
        "max_gradient_norm": [0, math.nan],
        "label_dropout": [-0.1, 1.1, math.nan],
        "weighting": ["snr+2", ""],
        "max_weight": [0, -1, math.nan],
        "schedule": ["linear", None],
        "save_every": [0, 1.5],
        "seed": [None, 0.5],
    }.items(),
)
def test_settings_that_are_not_allowed_are_named(option, values):
    for value in values:
        with pytest.raises(ValueError, match=option):
            start(**{option: value})
    with pytest.raises(TypeError, match="learning_rat"):
        start(learning_rat=1e-3)


# What a loop leaves behind


class Stopped(Exception):
    pass


def leave_by_break(run):
    with run:
        for step in run:
            if step.index == 3:
                break


def leave_by_error(run):
    with run:
        for step in run:
            if step.index == 3:
                raise Stopped


def leave_by_interrupt(run):
    with run:
        for step in run:
            if step.index == 3:
                signal.raise_signal(signal.SIGINT)


def leave_by_close(run):
    for step in run:
        if step.index == 3:
            run.close()


def leave_a_loop_without_with(run):
    for step in run:
        if step.index == 3:
            raise Stopped


WAYS = [leave_by_break, leave_by_error, leave_by_interrupt, leave_by_close]


@pytest.fixture
def saves(monkeypatch):
    """The steps at which a state was saved."""
    steps, save = [], TrainingState.save

    def counted(state):
        save(state)
        steps.append(state.finished)

    monkeypatch.setattr(TrainingState, "save", counted)
    return steps


@pytest.mark.parametrize("leave", WAYS)
def test_the_last_step_is_saved_once_whatever_ends_the_loop(leave, tmp_path, straight, saves):
    path = tmp_path / "run.pth"
    run = start(checkpoint=path)
    try:
        leave(run)
    except (Stopped, KeyboardInterrupt) as error:
        kept = error  # its traceback keeps the loop's frames alive, as a notebook does
        assert kept
    assert saves == [2, 3] and load_safely(path)["step"] == 3
    assert list(run) == [], "a run that was left has ended"
    run.close()
    del run
    gc.collect()
    assert saves == [2, 3]
    assert_goes_on(path, straight)


INSIDE = {
    "the network": (training, "loss_terms", 2),
    "the optimiser": (torch.optim.Adam, "step", 3),
    "the average": (EMA, "update", 3),
    "the batch": (Batches, "__getitem__", 2),
    "the save": (TrainingState, "_file_there", 4),
}


@pytest.mark.parametrize("place", INSIDE)
def test_ctrl_c_inside_a_step_leaves_a_whole_step(place, tmp_path, straight, saves, monkeypatch):
    path, calls = tmp_path / "run.pth", []
    owner, name, finished = INSIDE[place]
    usual = getattr(owner, name)

    def interrupted(*arguments, **options):
        calls.append(name)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return usual(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt), start(checkpoint=path) as run:
            for _ in run:
                pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert load_safely(path)["step"] == finished
    assert place == "the save" or saves == list(dict.fromkeys([2, finished]))
    assert_goes_on(path, straight)


def test_a_loop_without_with_is_saved_before_another_run_starts(tmp_path, straight):
    path, model = tmp_path / "run.pth", network()
    abandoned = start(model, checkpoint=path, save_every=100)
    with pytest.raises(Stopped):
        leave_a_loop_without_with(abandoned)
    assert not path.exists(), "the loop cannot know that it was left"
    assert_goes_on(path, straight)
    del abandoned
    gc.collect()
    assert load_safely(path)["step"] == 6, "the late close did not bring step 3 back"


def test_another_run_on_the_same_network_saves_the_first(tmp_path, straight):
    path, model = tmp_path / "run.pth", network()
    abandoned = start(model, checkpoint=path)
    leave_at = [next(abandoned) for _ in range(3)]
    losses_of(model, steps=1)
    assert load_safely(path)["step"] == leave_at[-1].index == 3
    assert_goes_on(path, straight)


def test_runs_of_different_networks_take_turns():
    alone = losses_of()
    runs = [start(), start(network(dropout=0.0))]
    assert [one.loss for one, _ in zip(*runs, strict=True)] == alone


@pytest.mark.parametrize("change", ["deleted", "replaced"])
@pytest.mark.parametrize("late", ["close", "collected"])
def test_a_late_close_leaves_a_changed_file_alone(change, late, tmp_path):
    path = tmp_path / "run.pth"
    run = start(checkpoint=path)
    for _ in range(3):
        next(run)
    path.unlink()
    if change == "replaced":
        path.write_bytes(b"mine")
    if late == "close":
        run.close()
    del run
    gc.collect()
    assert not path.exists() if change == "deleted" else path.read_bytes() == b"mine"


def test_a_script_that_dies_by_an_error_has_saved_its_last_step(tmp_path, straight):
    script = (
        "from tiny import start\n"
        "run = start(checkpoint='run.pth', save_every=100)\n"
        "for step in run:\n"
        "    1 / (step.index - 3)\n"
    )
    folders = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": folders, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert "ZeroDivisionError" in result.stderr
    assert load_safely(tmp_path / "run.pth")["step"] == 3
    assert_goes_on(tmp_path / "run.pth", straight)


def test_nothing_is_written_without_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    losses_of(stop=3)
    assert not list(tmp_path.iterdir())


# Going on


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_run_goes_on_bit_for_bit(stop, tmp_path, straight, capsys):
    path = tmp_path / "run.pth"
    losses_of(stop=stop, checkpoint=path)
    assert_goes_on(path, straight)
    name = f"{tmp_path.name}/run.pth"
    assert capsys.readouterr().out == f"{name}: goes on after step {stop} of 6\n"
    assert_goes_on(path, straight)
    assert capsys.readouterr().out == f"{name}: all 6 steps are done already\n"


def test_the_list_of_losses_is_that_of_the_run():
    losses = [9.0, 9.0]
    for _ in start(losses=losses, steps=2):
        pass
    assert len(losses) == 2 and 9.0 not in losses


def test_compiled_and_plain_networks_go_on_from_each_other(tmp_path, straight):
    compiled = torch.compile(network(), backend="eager")
    for first, second in ((compiled, network()), (network(), compiled)):
        path = tmp_path / f"{type(first).__name__}.pth"
        losses_of(first, stop=3, checkpoint=path)
        assert not any("_orig_mod" in name for name in load_safely(path)["model"])
        assert losses_of(second, checkpoint=path) == straight[0]
    assert any("_orig_mod" in name for name in compiled.state_dict())


def test_more_steps_are_taken_up_and_fewer_refused(tmp_path, capsys):
    path = tmp_path / "run.pth"
    losses_of(checkpoint=path)
    longer = losses_of(checkpoint=path, steps=8, schedule="constant")
    assert len(longer) == 8
    said = capsys.readouterr().out
    assert "steps is 8 from here on, 6 before" in said and "goes on after step 6 of 8" in said
    before = path.read_bytes()
    model = network()
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="has 8 steps already, 7 are asked for.*rename"):
        start(model, checkpoint=path, steps=7)
    assert path.read_bytes() == before and same(dict(weights), dict(model.state_dict()))


OTHER_RUNS = {
    "data": {"data": ImageDataset(DATA.images.flip(0), DATA.labels, DATA.classes)},
    "labels": {"data": ImageDataset(DATA.images, DATA.labels.flip(0), DATA.classes)},
    "batch_size": {"batches": {"batch_size": 2}},
    "batches_seed": {"batches": {"seed": 1}},
    "flip": {"batches": {"flip": False}},
    "seed": {"seed": 1},
    "channels": {"model": network(channels=32)},
    "prediction": {"process": GaussianDiffusion.from_config(prediction="v")},
    "schedule": {"process": GaussianDiffusion.from_config("linear")},
    "timesteps": {"process": GaussianDiffusion.from_config(timesteps=500)},
}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused(name, tmp_path):
    path = tmp_path / "run.pth"
    losses_of(stop=1, checkpoint=path)
    before = path.read_bytes()
    shown = "data" if name == "labels" else name
    with pytest.raises(ValueError, match=rf"another training run \({shown}: .* there.*rename"):
        start(checkpoint=path, **OTHER_RUNS[name])
    assert path.read_bytes() == before


def test_lists_and_tuples_are_the_same_network(tmp_path, straight):
    path = tmp_path / "run.pth"
    losses_of(network(channel_mults=[1], attention_resolutions=[]), stop=3, checkpoint=path)
    assert_goes_on(path, straight)


NEW_SETTINGS = {
    "learning_rate": 5e-4,
    "label_dropout": 0.5,
    "weighting": "snr+1",
    "max_weight": 5.0,
    "schedule": "constant",
    "max_gradient_norm": 0.1,
}


@pytest.mark.parametrize("name", NEW_SETTINGS)
def test_new_settings_are_taken_up_and_said(name, tmp_path, capsys):
    path, value = tmp_path / "run.pth", NEW_SETTINGS[name]
    options = {"weighting": "snr"} if name == "max_weight" else {}
    losses_of(stop=2, checkpoint=path, **options)
    usual = losses_of(**options)
    changed = losses_of(checkpoint=path, **options | {name: value})
    assert f"run.pth: {name} is {value} from here on, " in capsys.readouterr().out
    assert changed[:2] == usual[:2] and changed != usual


def test_another_decay_is_taken_up_and_said(tmp_path, capsys):
    path = tmp_path / "run.pth"
    losses_of(stop=2, checkpoint=path)
    model = network()
    losses_of(model, ema=EMA(model, 0.9), checkpoint=path)
    assert "ema_decay is 0.9 from here on, 0.999 before" in capsys.readouterr().out


@pytest.mark.parametrize("content", [{"format": 2}, {"identity": {}, "step": 1}, [1], "words"])
def test_what_is_no_training_state_is_named_and_left_alone(content, tmp_path):
    path = tmp_path / "run.pth"
    torch.save(content, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="no training state of this version.*rename"):
        start(checkpoint=path)
    assert path.read_bytes() == before


def test_a_loss_that_is_no_number_leaves_weights_and_file(tmp_path):
    path = tmp_path / "run.pth"

    def poison(model):
        with torch.no_grad():
            model.conv_in.bias[0] = math.nan

    model = network()
    poison(model)
    with pytest.raises(FloatingPointError, match="step 1: the loss is nan.*nothing was saved"):
        losses_of(model, checkpoint=path)
    assert not path.exists()

    model = network()
    ema = EMA(model)
    message = "step 4.*run.pth keeps the state after step 2"
    with (
        pytest.raises(FloatingPointError, match=message),
        start(model, ema=ema, checkpoint=path) as run,
    ):
        for step in run:
            if step.index == 3:
                poison(model)
                average = copy.deepcopy(ema.shadow)
    assert load_safely(path)["step"] == 2
    assert same(average, ema.shadow)


# The average


def test_the_average_follows_its_formula():
    model = torch.nn.Linear(1, 1, bias=False)
    ema, by_hand = EMA(model, decay=0.6), model.weight.item()
    for n in range(1, 20):
        torch.nn.init.constant_(model.weight, n)
        ema.update()
        decay = min(0.6, (1 + n) / (10 + n))
        by_hand = decay * by_hand + (1 - decay) * n
    assert ema.shadow[0].item() == pytest.approx(by_hand, rel=1e-5)
    assert ema.updates == 19


@pytest.mark.parametrize("decay", [-0.1, 1, 1.5, math.nan])
def test_a_decay_that_is_no_average_is_refused(decay):
    with pytest.raises(ValueError, match="decay is"):
        EMA(network(), decay)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_average_does_not_depend_on_the_dtype(dtype):
    model = torch.nn.Linear(1, 1, bias=False).to(dtype)
    torch.nn.init.zeros_(model.weight)
    ema = EMA(model, 0.9999)
    ema.updates = 10**6
    torch.nn.init.ones_(model.weight)
    for _ in range(10):
        ema.update()
    assert ema.shadow[0].item() == pytest.approx(1 - 0.9999**10, rel=1e-4)
    with ema.applied():
        assert model.weight.dtype == dtype
    assert model.weight.item() == 1
    assert ema.shadow[0].item() == pytest.approx(1 - 0.9999**10, rel=1e-4)


def test_applied_gives_the_own_weights_back_whatever_happens():
    model = network()
    ema = EMA(model)
    own = copy.deepcopy(model.state_dict())
    for shadow in ema.shadow:
        shadow.fill_(7)
    with pytest.raises(Stopped), ema.applied():
        with ema.applied():
            assert all((p == 7).all() for p in model.parameters())
        assert all((p == 7).all() for p in model.parameters())
        raise Stopped
    assert same(dict(own), dict(model.state_dict()))
    assert all((s == 7).all() for s in ema.shadow) and not ema.is_applied


def test_a_copied_average_is_that_of_a_copied_network():
    model = network()
    ema = EMA(model, 0.5)
    twin, twin_ema = copy.deepcopy((model, ema))
    twin_ema.check(twin)
    alone = copy.deepcopy(ema)
    torch.nn.init.ones_(model.conv_in.weight)
    ema.update()
    assert not same(ema.shadow, alone.shadow) and alone.updates == 0
    with alone.applied():
        assert same(list(alone.model.parameters()), alone.shadow)


def test_training_from_the_average_is_refused(tmp_path, straight):
    path, model = tmp_path / "run.pth", network()
    ema = EMA(model)
    with start(model, ema=ema, checkpoint=path) as run:
        next(run)
        with ema.applied():
            for forbidden in (lambda: next(run), run.close):
                with pytest.raises(ValueError, match=r"leave `with ema.applied\(\)` first"):
                    forbidden()
    assert load_safely(path)["step"] == 1
    assert_goes_on(path, straight)


# The learning rate


def test_the_cosine_rises_and_falls_to_zero():
    rates = [learning_rate_at(i, 1000, 2.0) for i in range(1000)]
    assert rates[0] == pytest.approx(0.02) and rates[99] == rates[100] == 2
    assert rates[550] == pytest.approx(1.0) and 0 < rates[-1] < 1e-4
    assert learning_rate_at(199, 10_000, 2.0) == 2 > learning_rate_at(198, 10_000, 2.0)


def test_a_constant_rate_can_be_cut_and_extended():
    short = [learning_rate_at(i, 3000, 2.0, schedule="constant") for i in range(3000)]
    long = [learning_rate_at(i, 9000, 2.0, schedule="constant") for i in range(9000)]
    assert short[:2701] == long[:2701] and set(long[200:8101]) == {2.0}
    assert short[2850] == pytest.approx(1.0) and 0 < short[-1] < 0.01
    assert learning_rate_at(0, 1, 2.0) == learning_rate_at(0, 1, 2.0, schedule="constant") == 2


# The weighting


def weighted_loss(prediction, weighting, error, max_weight=None):
    """The loss of a network whose x_0 is `error` off, whatever it predicts."""
    process = GaussianDiffusion.from_config("linear", 100, prediction)
    generator = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(8, 3, 4, 4, generator=generator) for _ in range(2))
    t = torch.arange(8) * 12 + 3

    def model(x_t, t, y):
        guess = x_0 + error
        if prediction == "x0":
            return guess
        eps = process.predict_noise_from_start(x_t, t, guess)
        return eps if prediction == "eps" else process.predict_v(guess, t, eps)

    options = {"weighting": weighting, "max_weight": max_weight}
    return simple_loss(model, process, x_0, t, noise, **options), process.signal_to_noise_ratio(t)


FORMULAS = {
    "x0": lambda snr: 1.0,
    "snr": lambda snr: snr,
    "snr+1": lambda snr: snr + 1,
    "truncated-snr": lambda snr: max(snr, 1.0),
    "min-snr-5": lambda snr: min(snr, 5.0),
    "flow": lambda snr: (math.sqrt(snr) + 1) ** 2,
}


@pytest.mark.parametrize("max_weight", [None, 3.0])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_weighting_is_the_same_whatever_the_network_predicts(weighting, max_weight):
    assert FORMULAS.keys() == WEIGHTINGS.keys()
    for prediction in ("eps", "v", "x0"):
        loss, snr = weighted_loss(prediction, weighting, 0.1, max_weight)
        weights = [min(FORMULAS[weighting](s), max_weight or math.inf) for s in snr.tolist()]
        assert loss.item() == pytest.approx(0.01 * sum(weights) / 8, rel=1e-3), prediction


@pytest.mark.parametrize(("prediction", "own"), [("eps", "snr"), ("v", "snr+1"), ("x0", "x0")])
def test_without_a_weighting_the_loss_is_the_plain_error_in_every_bit(prediction, own):
    process = GaussianDiffusion.from_config(prediction=prediction)
    model = network()
    torch.nn.init.normal_(model.conv_out.weight, std=0.1)
    x_0, noise = torch.rand(2, 8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    t = torch.arange(8) * 142
    x_t = process.q_sample(x_0, t, noise)
    with torch.no_grad():
        model.eval()
        plain = (model(x_t, t) - process.training_target(x_0, t, noise)).square()
        losses = [simple_loss(model, process, x_0, t, noise, weighting=w) for w in (None, own)]
    assert losses[0] == losses[1] == plain.flatten(1).mean(1).mean()
    assert (relative_weight(process, t, own) == 1).all()


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_v_s_loss_is_that_of_v(prediction):
    loss, _ = weighted_loss(prediction, "snr+1", 0.1)
    v_s_own, _ = weighted_loss("v", None, 0.1)
    torch.testing.assert_close(loss, v_s_own, rtol=1e-5, atol=0)


@pytest.mark.parametrize("weighting", [None, *WEIGHTINGS])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_weights_are_finite_where_nothing_or_everything_is_noise(prediction, weighting):
    betas = torch.tensor([1e-30, 1e-14, 1e-3, *[0.999] * 30], dtype=torch.float64)
    process = GaussianDiffusion(betas, prediction)
    weights = relative_weight(process, torch.arange(33), weighting)
    assert weights.isfinite().all() and (weights > 0).all()
    capped = relative_weight(process, torch.arange(33), weighting, 1e-3)
    assert (capped <= weights).all() and capped.isfinite().all()


# The held-out loss


def test_the_held_out_loss_is_the_same_on_every_run_and_leaves_the_network_alone():
    model = network()
    torch.nn.init.normal_(model.conv_out.weight, std=0.1)
    model.down[0].eval()  # a module in a mode of its own
    modes = [module.training for module in model.modules()]
    torch.manual_seed(7)
    rng = torch.get_rng_state()
    first = held_out_loss(model, PROCESS, DATA, count=40)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    model.eval()
    for options in ({}, {"batch_size": 7}, {"batch_size": 1000}):
        found = held_out_loss(model, PROCESS, DATA, count=40, **options)
        assert found == pytest.approx(first, rel=1e-6)
    assert held_out_loss(model, PROCESS, DATA, count=40, seed=1) != pytest.approx(first, rel=1e-3)
    with torch.no_grad():
        model.conv_out.weight.mul_(2)
    assert held_out_loss(model, PROCESS, DATA, count=40) != pytest.approx(first, rel=1e-3)


def test_the_held_out_loss_spreads_timesteps_and_images_evenly():
    seen, labels = [], []

    class Spy(torch.nn.Module):
        num_classes = 6

        def forward(self, x_t, t, y):
            seen.extend(t.tolist())
            labels.extend(y.tolist())
            return torch.zeros_like(x_t)

    loss = held_out_loss(Spy(), PROCESS, DATA, count=32, weighting="x0", max_weight=None)
    strata = sorted(t * 32 // 1000 for t in seen)
    assert strata == list(range(32)) and seen != sorted(seen)
    assert sorted(labels) == sorted([*DATA.labels.tolist()] * 2)
    assert loss == pytest.approx(to_float(DATA.images).square().mean().item(), rel=1e-5)


def test_the_held_out_loss_does_not_depend_on_what_is_predicted():
    found = []
    for prediction in ("eps", "v", "x0"):
        process = GaussianDiffusion.from_config(prediction=prediction)

        class Guess(torch.nn.Module):
            """x_0 is grey, said in the words of its prediction."""

            def forward(self, x_t, t, y, process=process):
                grey = torch.zeros_like(x_t)
                eps = process.predict_noise_from_start(x_t, t, grey)
                v = process.predict_v(grey, t, eps)
                return {"eps": eps, "v": v, "x0": grey}[process.prediction]

        found.append(held_out_loss(Guess(), process, DATA, count=64))
    assert found == pytest.approx([found[0]] * 3, rel=1e-4)


def test_the_held_out_loss_refuses_what_it_cannot_measure():
    with pytest.raises(ValueError, match="count is 0"):
        held_out_loss(network(), PROCESS, DATA, count=0)
    with pytest.raises(ValueError, match="0..2"):
        held_out_loss(network(num_classes=3), PROCESS, DATA)


def test_settings_are_plain_values():
    assert Settings(steps=np.int64(3), learning_rate=1e-3).steps == 3


# The learned variance (notebook 09)


@pytest.mark.parametrize("timesteps", [50, 1000])
def test_hybrid_loss_adds_the_bound_summed_over_all_timesteps(timesteps):
    process = GaussianDiffusion.from_config(timesteps=timesteps, variance="learned")
    model = network(out_channels=6, dropout=0.0)
    torch.nn.init.normal_(model.conv_out.weight, std=0.1)
    x_0 = to_float(DATA.images[:4])
    t = torch.tensor([1, 7, 20, timesteps - 1])
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1))
    x_t = process.q_sample(x_0, t, noise)

    prediction, f = process.split_output(model(x_t, t, DATA.labels[:4]), x_t)
    mean, _ = process.q_posterior_mean_variance(prediction.detach(), x_t, t)
    true_mean, true_variance = process.q_posterior_mean_variance(x_0, x_t, t)
    upper, lower = process.betas[t].log(), process.posterior_variance[t].log()
    w = (f + 1) / 2
    log_variance = w * upper.view(-1, 1, 1, 1) + (1 - w) * lower.view(-1, 1, 1, 1)
    q = torch.distributions.Normal(true_mean, true_variance.sqrt())
    p = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    bound = torch.distributions.kl_divergence(q, p).mean() / math.log(2)
    simple = (prediction - x_0).square().mean()
    wanted = simple + 0.001 * timesteps * bound

    found = simple_loss(model, process, x_0, t, noise, DATA.labels[:4])
    assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    [hybrid] = torch.autograd.grad(found, [model.conv_out.weight])
    [plain] = torch.autograd.grad(simple, [model.conv_out.weight])
    half = len(plain) // 2
    assert_close(hybrid[:half], plain[:half], rtol=1e-3, atol=1e-6)
    assert hybrid[half:].abs().max() > 0 == plain[half:].abs().max()


def notebook_09(words, **names):
    """Run one cell of notebook 09 with these names in place of what the cells before it left."""
    scope = {"torch": torch, "np": np, "F": torch.nn.functional, "device": "cpu"} | names
    scope |= {"to_float": to_float, "variational_bound_term": variational_bound_term}
    exec(cell("09_improved_ddpm", words), scope)
    return scope


def test_notebook_09_scatter_of_a_draw_is_that_of_all_draws_enumerated():
    mean = 12 * torch.arange(1.0, 1001.0, dtype=torch.float64) ** -3
    terms = mean[:, None] * torch.tensor([0.5, 1.5])  # of two images
    given = {"terms": terms, "some_t": range(1000), "T": 1000}
    found = notebook_09("scatter = {", bars=lambda *_, **__: None, **given)
    wanted = {"uniform": torch.full((1000,), 0.001), "importance sampling": mean / mean.sum()}
    for name, p in wanted.items():
        draws = terms / p[:, None]
        variance = (p[:, None] / 2 * (draws - mean.sum()) ** 2).sum()
        assert found["scatter"][name] == pytest.approx(float(variance) ** 0.5, rel=1e-4)
    assert_close(found["importance"], mean / mean.sum())


def test_notebook_09_weighted_draws_of_t_estimate_the_sum_of_all_terms():
    process = GaussianDiffusion.from_config(timesteps=8)
    model = network(dropout=0.0)
    torch.nn.init.normal_(model.conv_out.weight, std=0.05)
    names = {"T": 8, "process": process, "learned": None, "model": model.eval()}
    scope = notebook_09("def draws(", profile=None, **names)
    probability = torch.tensor([0.4, 0.05, 0.05, 0.1, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    estimates = []
    for p in (probability, torch.full((8,), 1 / 8, dtype=torch.float64)):
        drawn = scope["draws"](3000, p, DATA, 0)
        with torch.no_grad():
            values = 8 * scope["bound"](None, *drawn)
        estimates.append((values.mean(), values.std() / 3000**0.5))
    (mean, error), (uniform, uniform_error) = estimates
    assert abs(mean - uniform) < 3 * (error**2 + uniform_error**2) ** 0.5
    assert error < 0.05 * mean
