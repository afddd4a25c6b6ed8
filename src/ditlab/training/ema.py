"""The exponential moving average of a network's weights, as a dictionary of tensors.

A dictionary and one fused update, not a copy of the module: sharded parameters cannot be deep-copied. Of those each
process averages its own part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ditlab.training.sharding import like_placement, to_local

__all__ = ["EMA", "ema_decay"]


def ema_decay(step: int, limit: float) -> float:
    """Returns the decay of the update after `step` steps: min(limit, (1 + step) / (10 + step)).

    The constant decay 0.9999 remembers 10,000 steps, so in a run of 3,000 the average would still be mostly the random
    initial weights. With this warm-up the average spans about the last ninth of the run until the limit is reached
    (near step 90,000 for 0.9999), and is the usual constant-decay average from then on.
    """
    return min(limit, (1 + step) / (10 + step))


class EMA:
    """Moving average of the floating-point entries of a network's state; other entries (counters) are copied."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        """Starts from a copy of the network's weights, in float32; `decay` is the limit of the warm-up, in [0, 1)."""
        self.decay = decay
        self.weights = {
            name: value.detach().clone().float() if value.is_floating_point() else value.detach().clone()
            for name, value in network.state_dict().items()
        }

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Moves the average towards the network's weights after optimizer step `step` (counted from 1)."""
        state = network.state_dict()
        averaged = [name for name, value in self.weights.items() if value.is_floating_point()]
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            [to_local(self.weights[name]) for name in averaged],
            [to_local(state[name].detach()).float() for name in averaged],
            1.0 - ema_decay(step, self.decay),
        )
        for name, value in self.weights.items():
            if not value.is_floating_point():
                value.copy_(state[name])

    @contextmanager
    @torch.no_grad()
    def applied(self, network: nn.Module) -> Iterator[None]:
        """Gives the network the averaged weights within the block, and its own back afterwards, to the bit."""
        state = network.state_dict()
        own = {name: value.clone() for name, value in state.items()}
        try:
            for name, value in state.items():
                value.copy_(self.weights[name])
            yield
        finally:
            for name, value in network.state_dict().items():
                value.copy_(own[name])

    def load(self, weights: dict[str, Tensor]) -> None:
        """Loads saved averages: whole tensors of the same names and shapes."""
        for name, value in self.weights.items():
            value.copy_(like_placement(weights[name], value))
