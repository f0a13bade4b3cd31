"""The state of a training run, and the file from which it goes on as if never stopped."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from .checkpoints import load_plain_state, plain_state
from .ema import EMA
from .files import atomic_file, load_safely, short_name
from .parallel import rank_and_world


class TrainingState:
    """Everything that a run needs to go on: network, optimiser, average, losses, finished steps.

    All random numbers of a step are functions of its index, so no generator's state is among it.
    `identity` are the values that must not change when a run is resumed, `settings` those that may;
    both plain JSON. Without a `path` nothing is ever written.
    """

    def __init__(
        self,
        path: Path | None,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: EMA,
        losses: list[float],
        identity: dict,
        settings: dict,
    ):
        self.path, self.model, self.optimizer = path, model, optimizer
        self.ema, self.losses = ema, losses
        self.identity, self.settings = identity, settings
        self.finished = 0  # steps taken
        self.saved = 0  # steps in the file
        self._left_there = self._file_there()

    def _file_there(self) -> tuple[int, int, int] | None:
        if self.path is None or not self.path.exists():
            return None
        found = self.path.stat()
        return found.st_ino, found.st_mtime_ns, found.st_size

    def save(self) -> None:
        """Write the state after the last finished step; under torchrun the first process does."""
        if self.path is None:
            return
        if rank_and_world()[0] == 0:
            state = {
                "identity": self.identity,
                "settings": self.settings,
                "step": self.finished,
                "losses": self.losses,
                "model": plain_state(self.model),
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.shadow,
                "ema_updates": self.ema.updates,
            }
            with atomic_file(self.path) as file:
                torch.save(state, file)
        self.saved = self.finished
        self._left_there = self._file_there()

    def leave(self) -> None:
        """Save what is not yet saved, unless the file was deleted or replaced meanwhile."""
        if self.saved < self.finished and self._left_there == self._file_there():
            self.save()

    def diverged(self, step: int, loss: float, norm: float) -> FloatingPointError:
        """The error to raise; the file keeps the state of the last save."""
        if self.saved:
            kept = f"{self.path} keeps the state after step {self.saved}"
        else:
            kept = "nothing was saved before"
        self.saved = self.finished  # the weights of the last step may be on the way to ruin already
        return FloatingPointError(
            f"step {step}: the loss is {loss}, its gradient's norm {norm}; {kept}. Likely causes: "
            f"too high a learning rate ({self.settings['learning_rate']:g} here), or bad values in "
            "the data"
        )

    def load(self) -> None:
        """Go on from the file, if there is one. It is checked whole before anything is changed.

        Raises ValueError where it is damaged, no training state, of another run, or beyond the
        steps that are asked for.
        """
        if self.path is None or not self.path.exists():
            return
        state = load_safely(self.path)
        self._check(state)
        load_plain_state(self.model, state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load(state["ema"], state["ema_updates"])
        self.losses[:] = state["losses"]
        self.finished = self.saved = state["step"]
        if rank_and_world()[0] == 0:
            self._tell(short_name(self.path), state["settings"])

    def _check(self, state: object) -> None:
        way_out = f"To start anew, rename {self.path} or name another checkpoint"
        if not isinstance(state, dict) or not {"identity", "settings", "step"} <= state.keys():
            raise ValueError(f"{self.path} is no training state of this version. {way_out}")
        there, here = state["identity"], self.identity
        for name in here | there:
            if there.get(name) != here.get(name):
                shown = f"{there.get(name)} there, {here.get(name)} here"
                if len(shown) > 200 or name == "data":
                    shown = "other ones there"
                raise ValueError(
                    f"{self.path} comes from another training run ({name}: {shown}). {way_out}"
                )
        if state["step"] > self.settings["steps"]:
            raise ValueError(
                f"{self.path} has {state['step']} steps already, {self.settings['steps']} are "
                f"asked for: ask for more. {way_out}"
            )

    def _tell(self, name: str, settings: dict) -> None:
        for key, value in self.settings.items():
            if settings.get(key) != value:
                print(f"{name}: {key} is {value} from here on, {settings.get(key)} before")
        if self.finished == self.settings["steps"]:
            print(f"{name}: all {self.finished} steps are done already")
        else:
            print(f"{name}: goes on after step {self.finished} of {self.settings['steps']}")


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and other signals that Python handles wait until the `with` block is done.

    Only the main thread is ever interrupted, so elsewhere nothing needs to be done.
    """
    usual, waiting = {}, []
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            if callable(handler := signal.getsignal(number)):
                usual[number] = handler
    try:
        for number in usual:
            signal.signal(number, lambda *received: waiting.append(received))
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
    for number, frame in waiting:
        usual[number](number, frame)
