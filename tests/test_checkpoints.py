"""Files of weights and of training state: whole whatever happens, refused in words if not."""

import errno
import io
import json
import os
import pickle
import random
import signal
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import victims
from tiny import DATA, PROCESS, SIZES, losses_of, network, same, start

from noisout_nb import checkpoints, files
from noisout_nb.checkpoints import (
    load_model,
    load_pretrained,
    load_weights_into,
    publish,
    read_card,
    save_model,
)
from noisout_nb.files import atomic_file, load_safely
from noisout_nb.forward_process import GaussianDiffusion
from noisout_nb.profiles import PROFILES
from noisout_nb.training import EMA


def save(path, model=None, process=PROCESS, **facts):
    model = network() if model is None else model
    save_model(model, path, process, DATA.classes, **facts)
    return path


def rewrite(path, change):
    """The same file with another card, or without one where `change` returns None."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in records if name.endswith("card.json"))
    card = change(json.loads(records.pop(name)))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for record, content in records.items():
            archive.writestr(record, content)
        if card is not None:
            archive.writestr(name, json.dumps(card))


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.endswith(".part")]


# One file


def test_a_file_of_weights_describes_the_process_that_was_trained(tmp_path):
    process = GaussianDiffusion.from_config("linear", 200, "eps")
    model = network()
    torch.nn.init.normal_(model.conv_out.weight)
    path = save(tmp_path / "x.pth", model, process, held_out_loss=0.5, steps=np.int64(3))
    loaded, loaded_process, classes = load_model(path)
    assert loaded_process.config == process.config and classes == DATA.classes
    assert torch.equal(loaded_process.betas, process.betas)
    assert not loaded.training and {p.dtype for p in loaded.parameters()} == {torch.float32}
    for (name, ours), theirs in zip(
        model.state_dict().items(), torch.load(path).values(), strict=True
    ):
        assert theirs.dtype == torch.float16 and torch.equal(ours.half(), theirs), name
    card = read_card(path)
    assert card["network"] == json.loads(json.dumps(model.config))
    assert (card["held_out_loss"], card["steps"]) == (0.5, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["x.pth"]


def test_a_schedule_of_ones_own_is_in_the_card(tmp_path):
    process = GaussianDiffusion(torch.linspace(0.1, 0.3, 7, dtype=torch.float64), "v")
    loaded = load_model(save(tmp_path / "x.pth", process=process))[1]
    assert torch.equal(loaded.exact_betas, process.exact_betas) and loaded.prediction == "v"


def test_facts_do_not_replace_the_description(tmp_path):
    card = read_card(save(tmp_path / "x.pth", network_name="mine"))
    assert card["network_name"] == "mine"
    assert read_card(save(tmp_path / "y.pth", **{"network": "a lie"}))["network"] == card["network"]


@pytest.mark.parametrize("facts", [{"loss": torch.zeros(3)}, {"folder": Path()}, {"f": len}])
def test_facts_that_json_cannot_hold_are_refused(facts, tmp_path):
    with pytest.raises(ValueError, match="no plain value"):
        save(tmp_path / "x.pth", **facts)
    assert not list(tmp_path.iterdir())


def test_the_average_is_saved_and_only_that_of_the_network(tmp_path):
    model = network()
    ema = EMA(model)
    torch.nn.init.ones_(model.conv_out.weight)
    own = model.conv_out.weight.clone()
    save(tmp_path / "x.pth", model, ema=ema)
    assert not torch.load(tmp_path / "x.pth")["conv_out.weight"].any()
    assert torch.equal(model.conv_out.weight, own)
    before = (tmp_path / "x.pth").read_bytes()
    with pytest.raises(ValueError, match="another network"):
        save(tmp_path / "x.pth", network(), ema=ema)
    assert (tmp_path / "x.pth").read_bytes() == before


@pytest.mark.parametrize("value", [1e5, -1e5, float("nan"), float("inf")])
def test_a_weight_that_half_precision_cannot_hold_is_named(value, tmp_path):
    path, model = save(tmp_path / "x.pth"), network()
    before = path.read_bytes()
    with torch.no_grad():
        model.middle1.conv1.bias[3] = value
    with pytest.raises(ValueError, match="middle1.conv1.bias reaches .*half precision ends at 65"):
        save(path, model)
    assert path.read_bytes() == before


def test_names_that_do_not_fit_the_classes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="2 names were given.*6 classes"):
        save_model(network(), tmp_path / "x.pth", PROCESS, ("a", "b"))


def test_a_compiled_network_is_saved_under_plain_names(tmp_path):
    model = network()
    path = save(tmp_path / "x.pth", torch.compile(model, backend="eager"))
    model.middle1 = torch.compile(model.middle1, backend="eager")  # one part alone
    part = save(tmp_path / "y.pth", model)
    for saved in (path, part):
        assert same(dict(load_model(saved)[0].half().state_dict()), dict(torch.load(saved)))
    assert any("_orig_mod" in name for name in model.state_dict())
    assert load_weights_into(model, path) == []


# What is refused, and how


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def torch_save(value, path, **options):
    torch.save(value, path, **options)


def make_pickle(path):
    with open(path, "wb") as file:
        pickle.dump(Evil(), file)


def make_npz(path):
    with open(path, "wb") as file:
        np.savez(file, a=np.zeros(3))


OLD = {"_use_new_zipfile_serialization": False}
FOREIGN = {
    "no file": (lambda path: None, FileNotFoundError, "there is no file.*x.pth"),
    "a folder": (lambda path: path.mkdir(), ValueError, "x.pth is a folder"),
    "an empty file": (lambda path: path.touch(), ValueError, "not a PyTorch file"),
    "words": (lambda path: path.write_text("words"), ValueError, "not a PyTorch file"),
    "numpy's zip": (make_npz, ValueError, "zip file, but not one that torch.save wrote"),
    "a pickle": (make_pickle, ValueError, "not a PyTorch file"),
    "code": (lambda path: torch.save(Evil(), path), ValueError, "mkdir.*could run foreign code"),
    "a whole model": (
        lambda path: torch.save(network(), path),
        ValueError,
        "pickled object .noisout_nb.unet.UNet.*save `model.state_dict",
    ),
    "a whole old model": (
        lambda path: torch_save(network(), path, **OLD),
        ValueError,
        "pickled object .noisout_nb.unet.UNet",
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_told_apart_and_left_alone(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, kind, message = FOREIGN[name]
    path = tmp_path / "x.pth"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    for read in (load_safely, load_model, lambda path: load_weights_into(network(), path)):
        with pytest.raises(kind, match=message) as caught:
            read(path)
        assert not {"delete", "damaged"} & set(str(caught.value).lower().split())
    assert not (tmp_path / "evil").exists()
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize("options", [OLD, {}])
def test_weights_without_a_card_say_so_and_can_be_used(options, tmp_path):
    path, model = tmp_path / "x.pth", network()
    torch.save(model.state_dict(), path, **options)
    assert same(dict(load_safely(path)), dict(model.state_dict()))
    with pytest.raises(ValueError, match="has no card.*load_weights_into"):
        load_model(path)
    with pytest.raises(ValueError, match="has no card"):
        read_card(path)
    other = network()
    torch.nn.init.ones_(other.conv_in.weight)
    assert load_weights_into(other, path) == [] and same(
        dict(other.state_dict()), dict(model.state_dict())
    )


def test_a_training_state_is_no_file_of_weights(tmp_path):
    losses_of(stop=1, checkpoint=tmp_path / "run.pth")
    with pytest.raises(ValueError, match="has no card"):
        load_model(tmp_path / "run.pth")
    with pytest.raises(ValueError, match="no training state"):
        start(checkpoint=save(tmp_path / "x.pth"))


CARDS = {
    "process": {"prediction": "score", "schedule": "cubic", "variance": "large", "colour": 1},
    "network": {"channels": "many", "channel_mults": [1, 2], "depth": 3, "patch_size": 3},
}


@pytest.mark.parametrize(("part", "key"), [(part, key) for part in CARDS for key in CARDS[part]])
def test_cards_that_name_what_is_unknown_are_refused(part, key, tmp_path):
    path = save(tmp_path / "x.pth")
    rewrite(path, lambda card: card | {part: card[part] | {key: CARDS[part][key]}})
    with pytest.raises(ValueError, match="x.pth does not fit this version of noisout_nb: ."):
        load_model(path)


def test_unknown_weightings_and_missing_parts_are_refused_and_unknown_profiles_are_not(tmp_path):
    path = save(tmp_path / "x.pth", weighting="snr+2", profile="flowers32")
    with pytest.raises(ValueError, match="unknown weighting 'snr.2': choose one of x0, snr"):
        load_model(path)
    rewrite(path, lambda card: card | {"weighting": "snr+1"})
    load_model(path)  # the profile is but a name: network and process are in the card
    for missing in ("network", "process", "classes"):
        rewrite(save(path), lambda card, m=missing: {k: v for k, v in card.items() if k != m})
        with pytest.raises(ValueError, match="no card of network, process, classes"):
            load_model(path)
    rewrite(save(path), lambda card: None)
    with pytest.raises(ValueError, match="no card"):
        load_model(path)
    rewrite(save(path), lambda card: [card])
    with pytest.raises(ValueError, match="no card"):
        load_model(path)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of a good file of weights and of a good checkpoint."""
    folder = tmp_path_factory.mktemp("good")
    losses_of(stop=2, checkpoint=folder / "run.pth")
    return save(folder / "x.pth").read_bytes(), (folder / "run.pth").read_bytes()


@pytest.mark.parametrize("kind", [0, 1])
def test_flipped_bits_and_cut_files_are_noticed(kind, good, tmp_path):
    path, dice, refused = tmp_path / "x.pth", random.Random(kind), 0
    path.write_bytes(good[kind])
    whole, card = load_safely(path), read_card(path) if kind == 0 else None
    for attempt in range(150):
        data = bytearray(good[kind])
        if attempt % 3:
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        else:
            del data[dice.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            assert same(load_safely(path), whole), "a damaged file was taken for good"
            assert card is None or read_card(path) == card
        except ValueError as error:
            assert str(path) in str(error) and "delete" not in str(error).lower()
            refused += 1
        assert path.read_bytes() == data, "the damaged file was touched"
    assert refused > 100


def test_a_flipped_bit_in_the_card_is_noticed(good, tmp_path):
    path, data = tmp_path / "x.pth", bytearray(good[0])
    data[data.index(b'"prediction": "x0"') + 16] ^= 1
    path.write_bytes(data)
    for read in (load_safely, load_model, read_card):
        with pytest.raises(ValueError, match="damaged .*card.json"):
            read(path)


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "denied"), MemoryError(), OSError(errno.EIO, "disk")]
)
def test_errors_of_the_machine_are_not_blamed_on_the_file(error, tmp_path, monkeypatch):
    path = save(tmp_path / "x.pth")

    def fail(*arguments, **options):
        raise error

    for owner, name in ((torch, "load"), (zipfile.ZipFile, "testzip")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(type(error)) as caught:
                load_safely(path)
            assert caught.value is error

    def no_memory(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 GB")

    monkeypatch.setattr(torch, "load", no_memory)
    with pytest.raises(MemoryError, match="x.pth needs more memory"):
        load_safely(path)


# Files that are whole or not there


def test_writers_do_not_meet(tmp_path):
    path = tmp_path / "x.pth"
    with atomic_file(path) as first:
        first.write(b"a" * 10)
        with atomic_file(path) as second:
            second.write(b"b" * 5)
        assert path.read_bytes() == b"b" * 5
        first.write(b"a" * 10)
    assert path.read_bytes() == b"a" * 20
    assert [file.name for file in tmp_path.iterdir()] == ["x.pth"]


def test_what_interrupts_a_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(b"old")
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), atomic_file(path) as file:
            file.write(b"new")
            raise error
    assert path.read_bytes() == b"old" and [f.name for f in tmp_path.iterdir()] == ["x.pth"]


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    keep = [tmp_path / name for name in ("x.pth", ".y.pth.1.part", "x.pth.part", ".x.pth")]
    for path in (*keep, tmp_path / ".x.pth.00ff.part", tmp_path / ".x.pth.abcd.part"):
        path.write_bytes(b"old")
    with atomic_file(tmp_path / "x.pth") as alive:
        alive.write(b"slow")
        with atomic_file(tmp_path / "x.pth") as file:
            file.write(b"quick")
        assert len(leftovers(tmp_path)) == 3, "the other live writer's, .y's and x.pth.part"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in keep)


def test_a_new_file_that_was_taken_for_a_leftover_is_made_anew(tmp_path, monkeypatch):
    flock, taken = files.fcntl.flock, []

    def meddle(file, flags):
        if not taken:
            taken.extend(tmp_path.glob(".x.pth.*.part"))
            taken[0].unlink()
        return flock(file, flags)

    monkeypatch.setattr(files.fcntl, "flock", meddle)
    with atomic_file(tmp_path / "x.pth") as file:
        file.write(b"whole")
    assert taken and (tmp_path / "x.pth").read_bytes() == b"whole"


@pytest.mark.parametrize("how", ["no locks on this drive", "Windows"])
def test_files_are_whole_without_locks(how, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "no locks")

    if how == "Windows":
        monkeypatch.setattr(files, "fcntl", None)
    else:
        monkeypatch.setattr(files.fcntl, "flock", refuse)
    with atomic_file(tmp_path / "x.pth") as file:
        file.write(b"whole")
    assert (tmp_path / "x.pth").read_bytes() == b"whole"


def test_a_link_stays_a_link_and_a_folder_is_refused(tmp_path):
    (tmp_path / "drive").mkdir()
    (tmp_path / "x.pth").symlink_to(tmp_path / "drive" / "x.pth")
    with atomic_file(tmp_path / "x.pth") as file:
        file.write(b"far")
    assert (tmp_path / "x.pth").is_symlink()
    assert (tmp_path / "drive" / "x.pth").read_bytes() == b"far"
    with (
        pytest.raises(IsADirectoryError, match="drive is a folder"),
        atomic_file(tmp_path / "drive"),
    ):
        pass
    with pytest.raises(OSError, match="x.pth"), atomic_file(tmp_path / "x.pth" / "y.pth"):
        pass


def test_a_read_only_folder_is_named_and_the_file_stays(tmp_path, monkeypatch):
    path = save(tmp_path / "x.pth")
    before = path.read_bytes()

    def refuse(name, mode="r"):
        raise PermissionError(errno.EACCES, "Permission denied", str(name))

    monkeypatch.setattr(files, "open", refuse, raising=False)  # root may write everywhere
    with pytest.raises(PermissionError, match=str(tmp_path)):
        save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before


@pytest.mark.parametrize("what", ["weights", "checkpoint", "publish"])
def test_a_full_disk_leaves_the_old_file(what, tmp_path):
    resource = pytest.importorskip("resource", reason="not here: Windows has no resource module")
    path = tmp_path / "x.pth"
    source = save(tmp_path / "source.pth", held_out_loss=1.0)
    if what == "checkpoint":
        losses_of(stop=1, checkpoint=path)
    else:
        save(path, held_out_loss=2.0)
    before = path.read_bytes()
    work = {
        "weights": lambda: save(path),
        "checkpoint": lambda: losses_of(checkpoint=path),
        "publish": lambda: publish(source, path),
    }[what]
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, usual[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            work()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        signal.signal(signal.SIGXFSZ, ignored)
    assert what == "publish" or caught.value.filename == str(path)
    assert path.read_bytes() == before and not leftovers(tmp_path)
    work()
    assert path.read_bytes() != before


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "run.pth"
    with start(checkpoint=path) as run:
        for step in run:
            if path.exists():
                os.utime(path, (0, 0))
                run._state._left_there = run._state._file_there()
            monkeypatch.setattr(time, "time", lambda s=step.index: -1000.0 * s)
            if step.index == 5:
                break
    assert load_safely(path)["step"] == 5


def test_two_writers_and_a_kill_leave_whole_files(tmp_path):
    """Two processes save the same file again and again; one of them is killed."""
    path = tmp_path / "x.pth"
    killed, other = (victims.start(victims.weights, tmp_path) for _ in range(2))
    for attempt in range(30):
        load_model(path)
        if attempt == 15:
            killed.kill()
    other.kill()
    for process in (killed, other):
        process.join()
    load_model(path)
    save(path)
    assert not leftovers(tmp_path)


# Weights to start from


def profile_in(folder, monkeypatch, **changes):
    monkeypatch.setenv("NOISOUT_RUNS", str(folder))
    values = {
        name: SIZES[name] for name in ("image_size", "patch_size", "channels", "num_res_blocks")
    }
    values |= {"channel_mults": (1,), "attention_resolutions": (), "dropout": 0.1, "channels": 32}
    return replace(PROFILES["quick"], name="mine", dataset="folder", **values | changes)


def test_weights_of_the_profile_are_named_with_what_differs(tmp_path, monkeypatch, capsys):
    profile = profile_in(tmp_path, monkeypatch)
    with pytest.raises(
        FileNotFoundError, match="no weights for the profile 'mine'.*mine/model.pth"
    ):
        load_pretrained(profile)
    save(profile.weights, network(channels=32, head_channels=32))
    load_pretrained(profile)
    assert capsys.readouterr().out == "weights: mine/model.pth\n"
    load_pretrained(replace(profile, channels=64, prediction="v"))
    said = capsys.readouterr().out
    assert (
        said == "weights: mine/model.pth (channels 32 instead of 64, prediction x0 instead of v)\n"
    )
    with pytest.raises(ValueError, match="images of 16 pixels.*'mine' for 32"):
        load_pretrained(replace(profile, image_size=32))


def test_published_weights_come_first(tmp_path, monkeypatch, capsys):
    profile = replace(profile_in(tmp_path, monkeypatch), dataset="procedural")
    monkeypatch.setattr("noisout_nb.profiles.REPOSITORY", tmp_path)
    (tmp_path / "models").mkdir()
    for path in (profile.weights, profile.published):
        save(path, network(channels=32, head_channels=32))
        load_pretrained(profile)
    said = capsys.readouterr().out.splitlines()
    assert said == ["weights: mine/model.pth", "weights: models/quick_model.pth"]


def test_fine_tuning_copies_what_fits_and_names_what_does_not(tmp_path):
    trained = network()
    torch.nn.init.normal_(trained.conv_out.weight)
    path = save(tmp_path / "x.pth", trained)
    model = network(num_classes=2)
    before = model.label_emb.weight.clone()
    assert load_weights_into(model, path) == ["label_emb.weight"]
    assert torch.equal(model.label_emb.weight, before)
    assert torch.equal(model.conv_out.weight, trained.conv_out.weight.half().float())
    assert load_weights_into(network(num_classes=None), path) == []
    larger = load_weights_into(network(channel_mults=(1, 1)), path)
    assert "down.2.res.conv1.weight" in larger and "conv_in.weight" not in larger
    with pytest.raises(ValueError, match="no weight in .* has the name and shape"):
        load_weights_into(torch.nn.Linear(1, 1), path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="no state_dict"):
        load_weights_into(network(), path)
    data = type(DATA)(16, 8)
    data.labels, data.classes = data.labels % 2, ("cat", "dog")
    losses_of(model, data=data, stop=1)


# Publishing


def test_only_better_weights_are_published(tmp_path, capsys):
    source, target = tmp_path / "x.pth", tmp_path / "models" / "y.pth"
    assert publish(save(source, held_out_loss=0.5), target)
    assert "there was none before" in capsys.readouterr().out
    first = target.read_bytes()
    for loss in (0.5, 0.6):
        assert not publish(save(source, held_out_loss=loss), target)
        said = capsys.readouterr().out
        assert (
            f"models/y.pth stays: the held-out loss {loss} of the new one is not below 0.5" in said
        )
        assert "publish --force" in said and target.read_bytes() == first
    assert publish(save(source, held_out_loss=0.4), target)
    assert "0.4 of the new one is below 0.5" in capsys.readouterr().out
    assert target.read_bytes() == source.read_bytes() and len(list(target.parent.iterdir())) == 1


def test_force_keeps_every_old_file_aside(tmp_path, capsys):
    source, target = tmp_path / "x.pth", tmp_path / "y.pth"
    contents = []
    for loss in (0.1, 0.2, 0.3):
        publish(save(source, held_out_loss=loss), target, force=True)
        contents.append(source.read_bytes())
    assert "the old file is" in capsys.readouterr().out
    kept = [tmp_path / name for name in ("y.old.pth", "y.old2.pth", "y.pth")]
    assert [path.read_bytes() for path in kept] == contents
    assert publish(source, target, force=True) and len(list(tmp_path.iterdir())) == 4


INCOMPARABLE = {
    "no loss here": ({}, {"held_out_loss": 1.0}, "losses None and 1.0"),
    "no loss there": ({"held_out_loss": 0.1}, {}, "losses 0.1 and None"),
    "nan": ({"held_out_loss": float("nan")}, {"held_out_loss": 1.0}, "losses nan and 1.0"),
    "another weighting": (
        {"held_out_loss": 0.1, "weighting": "snr"},
        {"held_out_loss": 1.0, "weighting": "x0"},
        "weighting differ",
    ),
    "another schedule": (
        {"held_out_loss": 0.1, "process": GaussianDiffusion.from_config("linear")},
        {"held_out_loss": 1.0},
        "schedule differ",
    ),
}


@pytest.mark.parametrize("name", INCOMPARABLE)
def test_what_cannot_be_compared_is_not_published(name, tmp_path, capsys):
    new, old, reason = INCOMPARABLE[name]
    source, target = save(tmp_path / "x.pth", **new), save(tmp_path / "y.pth", **old)
    before = target.read_bytes()
    assert not publish(source, target) and target.read_bytes() == before
    said = capsys.readouterr().out
    assert "cannot be compared" in said and reason in said and "--force" in said
    assert publish(source, target, force=True)


def test_unusable_weights_are_never_published(good, tmp_path):
    source, target = tmp_path / "x.pth", save(tmp_path / "y.pth", held_out_loss=1.0)
    before = target.read_bytes()
    damaged = bytearray(good[0])
    damaged[len(damaged) // 2] ^= 1
    for content in (damaged, good[1], b""):
        source.write_bytes(content)
        for force in (False, True):
            with pytest.raises(ValueError, match="x.pth"):
                publish(source, target, force=force)
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "none.pth", target, force=True)
    assert target.read_bytes() == before and len(list(tmp_path.iterdir())) == 2
    target.write_bytes(damaged)
    save(source, held_out_loss=0.1)
    assert not publish(source, target) and publish(source, target, force=True)
    assert (tmp_path / "y.old.pth").read_bytes() == damaged


@pytest.mark.parametrize("point", [1, 2, 3])
def test_a_publish_that_is_broken_off_loses_nothing(point, tmp_path, monkeypatch):
    source, target = save(tmp_path / "x.pth"), save(tmp_path / "y.pth", steps=1)
    old, new = target.read_bytes(), source.read_bytes()
    usual, calls = os.replace, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == point:
            raise KeyboardInterrupt
        return usual(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        try:
            publish(source, target, force=True)
        except KeyboardInterrupt:
            assert target.read_bytes() == old
    publish(source, target, force=True)
    assert target.read_bytes() == new and (tmp_path / "y.old.pth").read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pth", "y.old.pth", "y.pth"]


def test_the_weights_in_this_repository_load_into_memory_alone():
    """`torch.load` of a stream, as a reader without the package would do it."""
    stream = io.BytesIO()
    torch.save(checkpoints.plain_state(network()), stream)
    stream.seek(0)
    assert same(dict(torch.load(stream)), dict(network().state_dict()))
