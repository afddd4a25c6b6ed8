"""The exponential moving average of a network's weights, as a dictionary of tensors.

A dictionary and one fused update rather than a copy of the module: the same code then serves sharded parameters, which
cannot be deep-copied; of those each process averages its own part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ditlab.training.sharding import local, placed_like


def ema_decay(step: int, limit: float) -> float:
    """The decay of the update after `step` steps: min(limit, (1 + step) / (10 + step)).

    The constant decay 0.9999 remembers 10,000 steps, so in a run of 3,000 the average would still be mostly the random
    initial weights. With this warm-up the average spans about the last ninth of the run until the limit is reached
    (near step 90,000 for 0.9999), and is the usual constant-decay average from then on.
    """
    return min(limit, (1 + step) / (10 + step))


class EMA:
    """Moving average of the floating-point entries of a network's state; other entries (counters) are copied."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        """Starts from the network's present weights, in float32.

        Args:
            network: whose weights are averaged; it is never changed, except inside `applied`.
            decay: the limit that the warm-up approaches, in [0, 1).
        """
        self.decay = decay
        self.weights = {
            name: value.detach().clone().float() if value.is_floating_point() else value.detach().clone()
            for name, value in network.state_dict().items()
        }

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Moves the average towards the network's weights after optimizer step number `step` (the first is 1)."""
        state = network.state_dict()
        averaged = [name for name, value in self.weights.items() if value.is_floating_point()]
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            [local(self.weights[name]) for name in averaged],
            [local(state[name].detach()).float() for name in averaged],
            1.0 - ema_decay(step, self.decay),
        )
        for name, value in self.weights.items():
            if not value.is_floating_point():
                value.copy_(state[name])

    @contextmanager
    @torch.no_grad()
    def applied(self, network: nn.Module) -> Iterator[None]:
        """Within the block the network has the averaged weights; after it, its own again, to the bit."""
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
        """Takes over saved averages: whole tensors of the same names and shapes."""
        for name, value in self.weights.items():
            value.copy_(placed_like(weights[name], value))
