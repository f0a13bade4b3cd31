"""Stage 4, training: the loss, the moving average of the weights, the training generator, checkpoints."""

import hashlib
import json
import math
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .data import FlowerImages, atomic_file, to_float
from .forward_process import SCHEDULES, GaussianDiffusion
from .parallel import gather, has_bfloat16, rank_and_world, share
from .profiles import REPOSITORY, Profile
from .unet import UNet


def simple_loss(model: nn.Module, process: GaussianDiffusion, x_start: Tensor, t: Tensor, noise: Tensor, y: Tensor | None = None, autocast: bool = False) -> Tensor:
    """L_simple, the mean squared error of the network's answer (Ho et al. 2020, eq. 14): a float32 scalar.

    With a learned variance it is L_hybrid = L_simple + 0.001 L_vlb (Nichol & Dhariwal 2021, eq. 16): L_vlb is a sum over
    all T terms, so that one random t stands for T of them. There the answer is detached: the bound teaches the variance alone.
    `autocast` runs the network, and only the network, in bfloat16; x_t, target and loss stay in float32.
    """
    x_t = process.q_sample(x_start, t, noise)
    with torch.autocast(x_start.device.type, torch.bfloat16, enabled=autocast):
        output = model(x_t, t, y)
    answer, fraction = process.split_output(output.float(), x_t)
    loss = F.mse_loss(answer, process.training_target(x_start, t, noise))
    if fraction is not None:
        bound = variational_bound_term(process, x_start, x_t, t, torch.cat([answer.detach(), fraction], dim=1))
        loss = loss + process.timesteps / 1000 * bound.mean()
    return loss


def variational_bound_term(process: GaussianDiffusion, x_start: Tensor, x_t: Tensor, t: Tensor, output: Tensor, clip: bool = False) -> Tensor:
    """L_t of the variational bound (Ho et al. 2020, eq. 5) for the network's `output` at x_t: float32 (B,), bits per dimension.

    For t > 0 the Kullback-Leibler distance of p(x_{t-1} | x_t) from the true posterior; at t = 0 the surprise of the
    discretised decoder at x_0. `clip` clamps the predicted x_0 to [-1, 1], as sampling does.
    """
    answer, fraction = process.split_output(output, x_t)
    predicted = process.predict_start(x_t, t, answer)
    mean, _ = process.q_posterior_mean_variance(predicted.clamp(-1, 1) if clip else predicted, x_t, t)
    log_variance = process.p_log_variance(x_t, t, fraction)
    true_mean, _ = process.q_posterior_mean_variance(x_start, x_t, t)
    gap = process.extract(process.posterior_log_variance, t, x_t.ndim) - log_variance
    kl = 0.5 * (gap.exp() - 1 - gap + (true_mean - mean) ** 2 * (-log_variance).exp())
    nll = -discretized_gaussian_log_likelihood(x_start, mean, (0.5 * log_variance).exp())
    return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log probability of each 8-bit value x in [-1, 1] under a Gaussian, in nats (Ho et al. 2020, eq. 13), shaped like x.

    A value owns the interval of half a grey level to both sides, the darkest and the brightest all that lies beyond.
    """
    above = torch.special.ndtr((x + 1 / 255 - mean) / std)
    below = torch.special.ndtr((x - 1 / 255 - mean) / std)
    above, below = above.where(x < 0.999, 1.0), below.where(x > -0.999, 0.0)
    return (above - below).clamp(min=1e-12).log()


class EMA:
    """The exponential moving average of a model's parameters, which draws better pictures than the last step's.

    shadow <- decay shadow + (1 - decay) parameter at each `update()`, with the decay warmed up as
    min(decay, (1 + n) / (10 + n)) at update n, so that the random start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}: it must lie in [0, 1); 0.999 forgets in some thousand steps")
        self.decay, self.updates, self.parameters = decay, 0, list(model.parameters())
        self.shadow = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.shadow, self.parameters, 1 - decay)

    @torch.no_grad()
    def _swap(self) -> None:
        current = [p.clone() for p in self.parameters]
        torch._foreach_copy_(self.parameters, self.shadow)
        torch._foreach_copy_(self.shadow, current)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the `with`, the model has the averaged parameters; afterwards its own again, whatever happened."""
        self._swap()
        try:
            yield
        finally:
            self._swap()


class Batches(Iterator):
    """An endless iterator of shuffled batches: images float32 (B, 3, size, size) in [-1, 1], labels int64 (B,).

    Order and horizontal flips are functions of `seed` and `index`, the number of batches drawn so far: a training that
    is resumed at the same index meets the same pictures. The data lies on `device` as uint8.
    """

    def __init__(self, data: FlowerImages, batch_size: int, flip: bool = True, seed: int = 0, device: torch.device | str = "cpu"):
        if not 1 <= batch_size <= len(data):
            raise ValueError(f"batch_size is {batch_size}: it must lie in 1..{len(data)}, the number of pictures")
        self.images, self.labels = data.images.to(device), data.labels.to(device)
        self.batch_size, self.flip, self.seed, self.index = batch_size, flip, seed, 0
        self.per_epoch = len(data) // batch_size

    def __next__(self) -> tuple[Tensor, Tensor]:
        epoch, batch = divmod(self.index, self.per_epoch)
        if batch == 0 or not hasattr(self, "order"):
            self.order = torch.randperm(len(self.images), generator=_generator(self.seed, 2 * epoch))
        picked = self.order[batch * self.batch_size : (batch + 1) * self.batch_size].to(self.images.device)
        x = to_float(self.images[picked])
        if self.flip:
            flipped = torch.rand(len(x), generator=_generator(self.seed, 2 * self.index + 1)) < 0.5
            x = torch.where(flipped.to(x.device)[:, None, None, None], x.flip(-1), x)
        self.index += 1
        return x, self.labels[picked]


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_000_007 + stream)


def learning_rate_at(index: int, steps: int, peak: float, warmup_steps: int = 200) -> float:
    """A straight climb to `peak` over the warm-up, then half a cosine down to zero at the last step."""
    warmup_steps = min(warmup_steps, steps // 10)
    if index < warmup_steps:
        return peak * (index + 1) / warmup_steps
    return peak * 0.5 * (1 + math.cos(math.pi * (index - warmup_steps) / max(1, steps - warmup_steps)))


@dataclass
class Step:
    """What one training step leaves: its index (the first is 1) and its loss."""

    index: int
    loss: float


def train(model: UNet, process: GaussianDiffusion, batches: Batches, ema: EMA, *, steps: int, learning_rate: float,
          label_dropout: float = 0.1, max_gradient_norm: float = 1.0, losses: list[float] | None = None,
          checkpoint: Path | None = None, save_every: int = 500, seed: int = 0, autocast: bool = False) -> Iterator[Step]:  # fmt: skip
    """Algorithm 1 of Ho et al. 2020 as a generator: each `next` is one optimiser step, yielded as a `Step`.

    t is uniform over 0..T-1; the label of each picture is dropped with probability `label_dropout` (for
    classifier-free guidance); gradients are clipped to `max_gradient_norm`. With `checkpoint`, the whole state is
    written there every `save_every` steps, at the end and where the loop is left early; if the file is there at the
    start, training goes on from it, bit for bit on the CPU. `losses`, a list, is filled with the loss of every step, those
    before a resume included. `autocast`: bfloat16 in the network where the device calculates with it, else float32 all the same.

    Under torchrun the processes share out each batch, so that N of them take the steps that one would take, up to
    rounding (and dropout). The first one writes the checkpoint, from which any number of processes can go on.

    Raises ValueError for a batch that cannot be shared out, for pictures outside [-1, 1] and for a checkpoint that is damaged or of another training,
    FloatingPointError for a loss that is not finite.
    """
    device = process.betas.device
    autocast = autocast and has_bfloat16(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), fused=True)
    generator = torch.Generator(device).manual_seed(seed)
    losses = [] if losses is None else losses
    run = _Run(model, process, batches, ema, optimizer, generator, losses)
    if checkpoint is not None and Path(checkpoint).exists():
        run.load(checkpoint)
    _, world = rank_and_world()
    if batches.batch_size % world:
        raise ValueError(f"a batch of {batches.batch_size} cannot be shared out evenly among {world} processes: choose a multiple of {world}")
    network = DistributedDataParallel(model) if world > 1 else model  # which averages the gradients
    for index in range(batches.index + 1, steps + 1):
        model.train()  # the caller may have looked at samples in eval mode since the last step
        x_start, y = next(batches)
        if not x_start.abs().max() <= 1.001:
            raise ValueError(f"pictures reach from {x_start.min():.3g} to {x_start.max():.3g}: they must lie in [-1, 1]; see data.to_float")
        t = torch.randint(process.timesteps, (len(x_start),), generator=generator, device=device)
        noise = torch.randn(x_start.shape, generator=generator, device=device)
        dropped = torch.rand(len(y), generator=generator, device=device) < label_dropout
        y = None if model.num_classes is None else share(y.masked_fill(dropped, model.null_label))

        loss = simple_loss(network, process, share(x_start), share(t), share(noise), y, autocast)
        optimizer.zero_grad()
        loss.backward()
        gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), max_gradient_norm)
        if not (loss.isfinite() and gradient_norm.isfinite()):
            saved = f"the checkpoint {checkpoint} is from before and still good" if checkpoint else "nothing was saved"
            causes = f"Likely causes: a learning rate that is too high ({learning_rate:g} here), or bad values in the data."
            raise FloatingPointError(f"step {index}: the loss is {loss.item()}, its gradient's norm {gradient_norm.item()}; {saved}. {causes}")
        optimizer.param_groups[0]["lr"] = learning_rate_at(index - 1, steps, learning_rate)
        optimizer.step()
        ema.update()
        losses.append(gather(loss.detach()[None], world).mean().item())

        due = checkpoint is not None and (index % save_every == 0 or index == steps)
        if due:
            run.save(checkpoint)
        try:
            yield Step(index, losses[-1])
        except GeneratorExit:  # the caller left the loop
            if checkpoint is not None and not due:
                run.save(checkpoint)
            raise


class _Run:
    """Everything that a training needs to go on as if it had never stopped."""

    def __init__(self, model, process, batches, ema, optimizer, generator, losses):
        self.model, self.process, self.batches, self.losses = model, process, batches, losses
        self.ema, self.optimizer, self.generator = ema, optimizer, generator
        self.identity = {  # what must not change from one session to the next
            **model.config, "prediction": process.prediction, "betas": process.betas.tolist(),
            "pictures": len(batches.images), "batch_size": batches.batch_size, "batches_seed": batches.seed,
        }  # fmt: skip

    def save(self, path: Path) -> None:
        state = {
            "identity": self.identity, "step": self.batches.index, "losses": self.losses,
            "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.shadow, "ema_updates": self.ema.updates,
            "generator": self.generator.get_state(), "rng": torch.get_rng_state(),
        }  # fmt: skip
        rank, world = rank_and_world()
        if rank == 0:
            with atomic_file(path) as file:
                torch.save(state, file)
        if world > 1:
            dist.barrier()  # nobody goes on before the file is there

    def load(self, path: Path) -> None:
        state = load_safely(path)
        way_out = f"Rename or delete {path} to start anew."
        if not isinstance(state, dict) or "identity" not in state:
            raise ValueError(f"{path} is not a training checkpoint. {way_out}")
        for name, value in self.identity.items():
            saved = state["identity"].get(name)
            if saved != value:
                shown = "other ones there" if name == "betas" else f"{saved} there, {value} here"
                raise ValueError(f"{path} comes from another training ({name}: {shown}). {way_out}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch._foreach_copy_(self.ema.shadow, [s.to(p.device) for s, p in zip(state["ema"], self.ema.parameters)])
        self.losses[:] = state["losses"]
        self.ema.updates, self.batches.index = state["ema_updates"], state["step"]
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["rng"])


def load_safely(path: Path) -> object:
    """torch.load(weights_only=True) on the CPU. FileNotFoundError where there is no file, ValueError where it is damaged."""
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no file {path}: train first (04_training or test.ipynb), or check the path")
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load itself overlooks flipped bits
            raise zipfile.BadZipFile("checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in zip, pickle or tensor code
        raise ValueError(f"{path} is damaged or no PyTorch file of tensors ({type(error).__name__}). Delete it or fetch it again.") from error


def save_model(model: UNet, path: Path, profile: Profile, classes: tuple[str, ...]) -> None:
    """Write the plain state_dict in half precision to `path`, and beside it, as .json, what is needed to build the network."""
    path = Path(path)
    with atomic_file(path) as file:
        torch.save({name: value.half() for name, value in model.state_dict().items()}, file)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    card = {"sha256": sha256, "network": model.config, "profile": asdict(profile), "classes": list(classes)}
    with atomic_file(path.with_suffix(".json")) as file:
        file.write((json.dumps(card, indent=1) + "\n").encode())


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[UNet, GaussianDiffusion, tuple[str, ...]]:
    """Read what `save_model` wrote: the network in eval mode and float32, its process, and the species' names.

    Raises FileNotFoundError where a file is missing, ValueError where the weights are damaged or of another network.
    """
    path = Path(path)
    weights = load_safely(path)
    card = json.loads(path.with_suffix(".json").read_text())
    if hashlib.sha256(path.read_bytes()).hexdigest() != card["sha256"]:
        raise ValueError(f"{path} is not the file that {path.with_suffix('.json').name} describes (checksum). Fetch both again or train anew.")
    model = UNet(**card["network"])
    model.load_state_dict(weights)
    profile = card["profile"]
    process = GaussianDiffusion(SCHEDULES[profile["schedule"]](profile["timesteps"]), profile["prediction"], variance=profile.get("variance", "posterior"))
    return model.to(device).eval(), process.to(device), tuple(card["classes"])


def load_or_train(profile: Profile, device: torch.device | str = "cpu") -> tuple[UNet, GaussianDiffusion, tuple[str, ...]]:
    """The profile's network, as `load_model` gives it. Where there is none yet, the script of 04_training makes it first."""
    if not profile.weights.exists():
        script, settings = REPOSITORY / "notebooks" / "scripts" / "04_training.py", {"PYTHONPATH": str(REPOSITORY), "NOISOUT_PROFILE": profile.name}
        subprocess.run([sys.executable, script], check=True, stdout=subprocess.DEVNULL, env=os.environ | settings)
    return load_model(profile.weights, device)
