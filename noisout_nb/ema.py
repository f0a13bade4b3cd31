"""Stage 4, training: the exponential moving average of the weights."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """The exponential moving average of the parameters, which samples better than the last step.

    shadow <- decay shadow + (1 - decay) parameter at each `update()`, with the decay warmed up as
    min(decay, (1 + n) / (10 + n)) at update n, so the random start is soon forgotten. The average
    is kept in float32 (at least), whatever the parameters' dtype. A deep copy averages a deep copy
    of the model. Raises ValueError for a decay outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(
                f"decay is {decay}: it must lie in [0, 1); 0.999 averages over about 1,000 steps"
            )
        self.model, self.decay, self.updates = model, decay, 0
        self.is_applied = False
        self.shadow = [
            p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for p in model.parameters()
        ]

    def check(self, model: nn.Module) -> None:
        """Raises ValueError unless this is the average of the model's own parameters."""
        pairs = itertools.zip_longest(self.model.parameters(), model.parameters())
        if any(a is not b for a, b in pairs):
            raise ValueError(
                "this EMA averages the parameters of another network: make a new one, EMA(model), "
                "whenever you build the network anew"
            )

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = list(zip(self.shadow, self.model.parameters(), strict=True))
        self.shadow = [s.to(p.device) for s, p in pairs]  # no copy where the device is the same
        parameters = [p.to(s.dtype) for s, p in pairs]
        torch._foreach_lerp_(self.shadow, parameters, 1 - decay)  # pyright: ignore

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the `with`, the model has the averaged parameters; afterwards its own again."""
        parameters = list(self.model.parameters())
        own = [p.detach().clone() for p in parameters]
        before, self.is_applied = self.is_applied, True
        try:
            self._copy(parameters, self.shadow)
            yield
        finally:
            self._copy(parameters, own)
            self.is_applied = before

    def load(self, shadow: list[Tensor], updates: int) -> None:
        """Take over a saved average."""
        self._copy(self.shadow, shadow)
        self.updates = updates

    @torch.no_grad()
    def _copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)
