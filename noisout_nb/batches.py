"""Stage 4, the batches of a training run: each a function of the seed and its number."""

import itertools
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .dataset import ImageDataset, to_float
from .files import fingerprint

NOISE, ORDER, FLIP, DROPOUT = 0, 1, 2, 3  # streams; each process has one of its own for dropout


def stream_seed(seed: int, stream: int, index: int) -> int:
    """A seed for each stream (0..999) and index; in stream 0 of seed 0 the index itself."""
    return ((seed * 1000 + stream) * 1_000_000_007 + index) % 2**63


class Batches:
    """An endless sequence of shuffled batches of images and labels.

    `batches[i]` is batch number i, images float32 (B, C, H, W) in [-1, 1] and labels int64 (B,), a
    function of `seed` and i: no image twice in an epoch, each flipped left to right
    with probability 0.5 if `flip`. Iterating starts at batch 0 each time. The images lie on
    `device` as uint8. Raises ValueError for data of another kind and for a
    `batch_size` outside 1..len(data).
    """

    def __init__(
        self,
        data: ImageDataset,
        batch_size: int,
        flip: bool = True,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        if not isinstance(data, ImageDataset):
            raise ValueError(
                f"data is {type(data).__name__}: Batches takes a data set in memory, such as "
                "load_data(profile) or ImageDataset(images, labels, classes)"
            )
        images, labels = data.images, data.labels
        check_integer("batch_size", batch_size, 1, len(images), ", the number of images")
        check_integer("seed", seed)
        self.images, self.labels = images.to(device), labels.to(device)
        self.batch_size, self.flip, self.seed = int(batch_size), bool(flip), int(seed)
        self.per_epoch = len(images) // self.batch_size
        self._epoch, self._order = -1, torch.empty(0)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        check_integer("the number of a batch", index, 0)
        epoch, batch = divmod(int(index), self.per_epoch)
        if epoch != self._epoch:
            order = torch.randperm(len(self.images), generator=self._generator(ORDER, epoch))
            self._epoch, self._order = epoch, order.to(self.images.device)
        picked = self._order[batch * self.batch_size : (batch + 1) * self.batch_size]
        x = to_float(self.images[picked])
        if self.flip:
            flipped = torch.rand(len(x), generator=self._generator(FLIP, index)) < 0.5
            x = torch.where(flipped.to(x.device)[:, None, None, None], x.flip(-1), x)
        return x, self.labels[picked]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return map(self.__getitem__, itertools.count())

    def _generator(self, stream: int, index: int) -> torch.Generator:
        return torch.Generator().manual_seed(stream_seed(self.seed, stream, index))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of images and labels."""
        return fingerprint(self.images, self.labels)


def check_integer(
    name: str, value: Any, low: int | None = None, high: int | None = None, why: str = ""
) -> None:
    """Raises ValueError unless the value is an integer (NumPy's too, no bool) in low..high."""
    try:
        whole = not isinstance(value, bool | float) and int(value) == value  # NumPy's integers too
    except (TypeError, ValueError):
        whole = False
    if not whole or (low is not None and value < low) or (high is not None and value > high):
        span = "" if low is None else f" of at least {low}"
        span = span if high is None else f" in {low}..{high}{why}"
        raise ValueError(f"{name} is {value!r}: it must be an integer{span}")
