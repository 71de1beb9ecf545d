"""The exponential moving average of what is trained, which is saved in its place with --use_ema.

    s ← s + (1 − d) (p − s)      d = min(max_decay, n / (n + 9)) after update n,  0 after the first

References: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; the decay is that of
diffusers' `EMAModel`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """The averages s of the trained `parameters` p, by their names; they start as copies."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], max_decay: float) -> None:
        self.parameters, self.max_decay = dict(parameters), max_decay
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._in_use = False

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Take in the parameters as they are after update `number`, counted from 1."""
        decay = 0.0 if number < 2 else min(self.max_decay, number / (number + 9))
        torch._foreach_lerp_(list(self.values.values()), list(self.parameters.values()), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Run the body with the averages as the parameters, which are as before afterwards; may be nested."""
        if self._in_use:
            yield
            return
        self._in_use = True
        try:
            with replaced(self.parameters, self.values):
                yield
        finally:
            self._in_use = False

    def state(self) -> dict[str, Tensor]:
        """The averages by the names that they have in checkpoints."""
        return {f"average.{name}": value for name, value in self.values.items()}


@contextmanager
def replaced(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Run the body with `values` in `parameters`, by name; afterwards these are as before."""
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        _copy(values, parameters)
        yield
    finally:
        _copy(before, parameters)


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
