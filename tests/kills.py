"""Kills at random moments: `python -m pytest tests/kills.py -s` (minutes, so not among the tests).

A run, a program that saves weights and one that publishes them are killed 50 times by SIGKILL,
SIGTERM and SIGINT. Nothing may be lost: every file is whole, the run ends as if it had never been
killed, in every bit, and no temporary files pile up.
"""

import os
import random
import signal
import time

import victims
from tiny import DATA, PROCESS, network
from tiny import same as equal

from noisout_nb.checkpoints import load_model, read_card, save_model
from noisout_nb.files import load_safely

KILLS = int(os.environ.get("NOISOUT_KILLS", 50))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def leftovers(folder):
    return [path for path in folder.iterdir() if path.name.endswith(".part")]


def test_nothing_is_lost(tmp_path):
    dice = random.Random(0)
    straight = tmp_path / "straight"
    straight.mkdir()
    victims.start(victims.train, straight).join()
    whole = load_safely(straight / "run.pth")
    assert whole["step"] == 40
    for name, loss in (("new", 0.1), ("old", 0.2)):
        path = tmp_path / f"{name}.pth"
        save_model(network(), path, PROCESS, DATA.classes, held_out_loss=loss)
    programs = {
        "weights": victims.weights,
        "publish": victims.publishing,
        "train": victims.train,
    }
    checked = dict.fromkeys(programs, 0)
    for attempt in range(KILLS):
        what, number = dice.choice(list(checked)), SIGNALS[attempt % 3]
        victim = victims.start(programs[what], tmp_path)
        time.sleep(dice.random())
        os.kill(victim.pid, number)
        victim.join()
        checked[what] += 1
        assert len(leftovers(tmp_path)) <= 3, "one of each program at most"
        if what == "train" and (tmp_path / "run.pth").exists():
            state = load_safely(tmp_path / "run.pth")
            assert state["losses"] == whole["losses"][: state["step"]]
            print(f"{number.name}: step {state['step']}")
            if state["step"] == 40:
                assert all(
                    equal(state[part], whole[part]) for part in ("model", "ema", "optimizer")
                )
                (tmp_path / "run.pth").unlink()
        if what == "weights":
            load_model(tmp_path / "x.pth")
        if what == "publish":
            losses = [
                read_card(path)["held_out_loss"]
                for path in tmp_path.glob("published*.pth")
                if load_model(path)
            ]
            assert set(losses) <= {0.1, 0.2}
            assert len(losses) <= 3, "the files kept aside are of these two contents"
    victims.start(victims.train, tmp_path).join()
    state = load_safely(tmp_path / "run.pth")
    assert all(equal(state[part], whole[part]) for part in ("model", "ema", "optimizer", "losses"))
    print("killed:", checked)
