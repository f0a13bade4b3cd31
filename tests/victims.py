"""Programs that the tests kill. Each is a fork of the test, so that it starts at once."""

import multiprocessing
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import tiny
import torch

from noisout_nb.checkpoints import publish, save_model

RUN = {"steps": 40, "batches": {"batch_size": 2}, "save_every": 2}


def weights(folder: Path) -> Iterator[None]:
    """Saves the same weights for ever."""
    model = tiny.network()
    while True:
        save_model(model, folder / "x.pth", tiny.PROCESS, tiny.DATA.classes)
        yield


def publishing(folder: Path) -> Iterator[None]:
    """Publishes new.pth and old.pth over each other for ever, by force."""
    while True:
        for name in ("new.pth", "old.pth"):
            publish(folder / name, folder / "published.pth", force=True)
            yield


def train(folder: Path) -> Iterator[None]:
    """A run of 40 steps that saves every second one, and goes on from its file."""
    with tiny.start(checkpoint=folder / "run.pth", **RUN) as run:
        for _ in run:
            yield


def _work(program, folder: Path, begun) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *received: sys.exit(143))
    with open(folder / "said", "a", encoding="utf-8") as said:
        sys.stdout = sys.stderr = said
        for _ in program(folder):
            begun.set()


def start(program, folder: Path):
    """The process, at work: it has done one round."""
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    process = context.Process(target=_work, args=(program, folder, begun))
    process.start()
    while not begun.wait(0.1) and process.is_alive():
        pass
    return process
