"""Stage 4, training: Algorithm 1 as an iterator, whose runs can be left and resumed."""

import math
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .batches import DROPOUT, NOISE, Batches, check_integer, stream_seed
from .checkpoints import plain_json
from .ema import EMA
from .forward_process import GaussianDiffusion, check_choice
from .losses import (
    TIMESTEP_DENSITIES,
    WEIGHTINGS,
    check_classes,
    check_weighting,
    held_out_loss,
    logit_normal_timesteps,
    loss_terms,
    relative_weight,
    simple_loss,
    variational_bound_term,
)
from .parallel import gather, has_bfloat16, rank_and_world, wait_for_all
from .training_state import TrainingState, uninterrupted

__all__ = [
    "EMA",
    "RATE_SCHEDULES",
    "WEIGHTINGS",
    "Batches",
    "Run",
    "Settings",
    "Step",
    "held_out_loss",
    "learning_rate_at",
    "relative_weight",
    "simple_loss",
    "train",
    "variational_bound_term",
]


RATE_SCHEDULES = ("cosine", "constant")


def learning_rate_at(
    index: int, steps: int, peak: float, warmup_steps: int = 200, schedule: str = "cosine"
) -> float:
    """The learning rate of step `index`, from 0, of `steps`: a linear warm-up, then `schedule`.

    "cosine" falls from `peak` along half a cosine to zero at the end. "constant" stays at `peak`
    until the last tenth, which falls linearly to zero: such a run can be stopped before that, and
    resumed with more `steps`, at no cost. The warm-up has `warmup_steps`, a tenth of the run at
    most.
    """
    warmup_steps = min(warmup_steps, steps // 10)
    if index < warmup_steps:
        return peak * (index + 1) / warmup_steps
    if schedule == "cosine":
        done = (index - warmup_steps) / max(1, steps - warmup_steps)
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak * min(1, (steps - index) / max(1, steps // 10))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What may change when a run is resumed: keyword arguments of `train`.

    - `steps`: how many in all, those before a resume included.
    - `learning_rate`, `schedule`: its peak, and "cosine" or "constant", see `learning_rate_at`.
    - `label_dropout`: the probability of hiding a label, for classifier-free guidance.
    - `weighting`, `max_weight`: of the loss over timesteps, see `simple_loss`.
    - `timestep_density`: how t is drawn, "uniform" or "logit-normal", the latter for flow matching.
    - `max_gradient_norm`: gradients are clipped to it.
    - `autocast`: the network in bfloat16 where the device computes in it natively, else in float32.

    Raises ValueError for a value that is not allowed.
    """

    steps: int
    learning_rate: float
    schedule: str = "cosine"
    label_dropout: float = 0.1
    weighting: str | None = None
    max_weight: float | None = None
    timestep_density: str = "uniform"
    max_gradient_norm: float = 1.0
    autocast: bool = False

    def __post_init__(self):
        check_integer("steps", self.steps, 1)
        check_weighting(self.weighting, self.max_weight)
        check_choice("timestep_density", self.timestep_density, TIMESTEP_DENSITIES)
        if self.schedule not in RATE_SCHEDULES:
            names = ", ".join(RATE_SCHEDULES)
            raise ValueError(f"unknown schedule {self.schedule!r}: choose one of {names}")
        for name in ("learning_rate", "max_gradient_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be positive and finite")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout is {self.label_dropout}: it must lie in [0, 1]")

    def rate(self, index: int) -> float:
        """The learning rate of step `index`, from 0."""
        return learning_rate_at(index, self.steps, self.learning_rate, schedule=self.schedule)


@dataclass
class Step:
    """What one training step leaves: its index (the first is 1) and its loss."""

    index: int
    loss: float


def train(
    model: nn.Module,
    process: GaussianDiffusion,
    batches: Batches,
    ema: EMA,
    *,
    losses: list[float] | None = None,
    checkpoint: str | Path | None = None,
    save_every: int = 500,
    seed: int = 0,
    **settings,
) -> "Run":
    """Algorithm 1 of Ho et al. 2020: an iterator whose every `next` takes one step, a `Step`.

        with train(model, process, batches, ema, steps=900, learning_rate=2e-3) as run:
            for step in run:
                print(step.index, step.loss)

    `settings` are the fields of `Settings`. Step i takes batch i, t in 0..T-1 and noise, all
    functions of the seeds and i. `losses`, a list, receives the loss of every step, those
    before a resume included.

    `checkpoint`, a file, receives the whole state every `save_every` steps, at the end, and when
    the `with` block is left, however it is left. Where the file exists, the run goes on from it,
    bit for bit on the CPU, and says so. `Run` tells what a loop without `with` leaves.

    Under torchrun the processes share out each batch: any number of them takes the same steps, up
    to rounding and dropout, and can go on from the checkpoint of any other number.

    Raises ValueError for arguments that do not fit together and for a checkpoint that is damaged,
    of another run or beyond `steps`; FloatingPointError for a loss that is not finite.
    """
    chosen = Settings(**settings)
    _check_partners(model, process, batches, ema)
    check_integer("save_every", save_every, 1)
    check_integer("seed", seed)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=chosen.learning_rate, betas=(0.9, 0.99), fused=True
    )
    path = None if checkpoint is None else Path(checkpoint)
    losses = [] if losses is None else losses
    identity = {} if path is None else _identity(model, process, batches, seed)
    known = plain_json(asdict(chosen) | {"ema_decay": ema.decay})
    _close_other_runs(model, path, losses)
    losses.clear()
    state = TrainingState(path, model, optimizer, ema, losses, identity, known)
    state.load()
    return Run(_steps(state, process, batches, chosen, save_every, int(seed)), state)


def _check_partners(
    model: nn.Module, process: GaussianDiffusion, batches: Batches, ema: EMA
) -> None:
    if not isinstance(batches, Batches):
        raise ValueError(
            f"batches is {type(batches).__name__}: train takes Batches(data, batch_size), which "
            "can give any batch again after a resume"
        )
    if not isinstance(ema, EMA):
        raise ValueError(f"ema is {type(ema).__name__}: train takes an EMA(model)")
    ema.check(model)
    check_classes(model, batches.labels)
    devices = {
        "network": next(model.parameters()).device,
        "process": process.betas.device,
        "batches": batches.images.device,
    }
    if len(set(devices.values())) > 1:
        placed = ", ".join(f"the {name} on {device}" for name, device in devices.items())
        raise ValueError(f"{placed}: move all to one device")
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        raise ValueError(
            "the network is in half precision, in which small updates are lost: train it in "
            "float32 (model.float()), with autocast=True for speed"
        )


def _identity(model: nn.Module, process: GaussianDiffusion, batches: Batches, seed: int) -> dict:
    """What must not change when a run is resumed."""
    return plain_json(
        {
            **getattr(model, "config", {}),
            **process.config,
            "data": batches.fingerprint,
            "batch_size": batches.batch_size,
            "batches_seed": batches.seed,
            "flip": batches.flip,
            "seed": seed,
        }
    )


def _steps(
    state: TrainingState,
    process: GaussianDiffusion,
    batches: Batches,
    settings: Settings,
    save_every: int,
    seed: int,
) -> Generator[Step, None, None]:
    """The steps after `state.finished`; each is taken whole or not at all."""
    model, optimizer, ema = state.model, state.optimizer, state.ema
    device, (rank, world) = process.betas.device, rank_and_world()
    network = DistributedDataParallel(model) if world > 1 else model  # averages the gradients
    autocast = settings.autocast and has_bfloat16(device)
    generator, null_label = torch.Generator(device), getattr(model, "null_label", None)
    for index in range(state.finished, settings.steps):
        model.train()  # the caller may have sampled in eval mode since the last step
        x_start, y = batches[index]
        generator.manual_seed(stream_seed(seed, NOISE, index))
        t, noise, hidden = _draw(
            x_start, process.timesteps, settings.timestep_density, settings.label_dropout, generator
        )
        y = None if null_label is None else y.masked_fill(hidden, null_label)
        # shares may be uneven; a process that has none takes one image, which counts nothing
        mine = slice(rank, None, world) if rank < len(t) else slice(1)
        weight = world / len(t) if rank < len(t) else 0.0

        with _dropout_seeded(device, stream_seed(seed, DROPOUT + rank, index)):
            terms = loss_terms(
                *(network, process, x_start[mine], t[mine], noise[mine]),
                None if y is None else y[mine],
                autocast,
                weighting=settings.weighting,
                max_weight=settings.max_weight,
            )
        loss = terms.sum() * weight
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.max_gradient_norm)
        mean_loss = gather(loss.detach()[None], world).mean()
        value, norm = torch.stack([mean_loss, norm]).tolist()  # the step's only synchronisation
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise state.diverged(index + 1, value, norm)

        with uninterrupted():
            optimizer.param_groups[0]["lr"] = settings.rate(index)
            optimizer.step()
            ema.update()
            state.losses.append(value)
            state.finished = index + 1
        if state.finished % save_every == 0 or state.finished == settings.steps:
            state.save()
            wait_for_all()  # nobody goes on before the file is there
        yield Step(state.finished, value)


def _draw(
    x_start: Tensor,
    timesteps: int,
    density: str,
    label_dropout: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """For each image a timestep, noise, and whether its label is hidden."""
    device, count = x_start.device, len(x_start)
    if density == "logit-normal":
        t = logit_normal_timesteps(count, timesteps, generator=generator)
    else:
        t = torch.randint(timesteps, (count,), generator=generator, device=device)
    noise = torch.randn(x_start.shape, generator=generator, device=device)
    hidden = torch.rand(count, generator=generator, device=device) < label_dropout
    return t, noise, hidden


@contextmanager
def _dropout_seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Inside the `with`, dropout is a function of `seed`; the caller's random numbers are kept."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)
        yield


class Run(Iterator[Step]):
    """The steps of one training run, and a context manager that saves the last one.

    Whatever leaves the `with` block (its end, break, an exception, Ctrl-C), the state after the
    last finished step is saved there and then, once. `close()` does the same. So does Ctrl-C inside
    a step, which is not counted. A loop without `with` that is left early is saved at the latest
    when the program ends, or when another run starts on the same network or file. A file that was
    deleted or replaced since the run's last save is left alone.
    """

    def __init__(self, steps: Generator[Step, None, None], state: TrainingState):
        self._steps, self._state = steps, state
        self._leave = weakref.finalize(self, state.leave)
        _open_runs.add(self)

    def __next__(self) -> Step:
        if self._state.ema.is_applied:
            raise ValueError("leave `with ema.applied()` first: the raw weights are to be trained")
        try:
            return next(self._steps)
        except StopIteration:
            raise
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """End the run, and save the state after the last finished step if it is not saved yet."""
        if self._state.ema.is_applied:
            raise ValueError("leave `with ema.applied()` first: the raw weights are to be saved")
        self._steps.close()
        self._leave()
        _open_runs.discard(self)


_open_runs: "weakref.WeakSet[Run]" = weakref.WeakSet()


def _close_other_runs(model: nn.Module, path: Path | None, losses: list[float]) -> None:
    """Save what loops without `with` have left unsaved, before their network is trained on."""
    for run in list(_open_runs):
        state = run._state
        same_network = next(state.model.parameters()) is next(model.parameters())
        same_file = path is not None and state.path == path
        if same_network or same_file or state.losses is losses:
            run.close()
