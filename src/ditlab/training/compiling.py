"""Compiles a network's blocks one by one (DESIGN 3.3)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ditlab.training.sharding import blocks_of

__all__ = ["compile_blocks"]

LONG_RUN = 5_000
"""Steps from which `auto` compiles on the CPU: compiling takes 15-90 seconds and saves about a tenth of a step."""
WIDE = 192
"""Width from which `auto` compiles on the CPU; narrower networks gained nothing in our measurements."""


def compile_blocks(network: nn.Module, mode: Literal["auto", "on", "off"], *, device: torch.device, steps: int) -> bool:
    """Compiles each of `network.blocks` in place, or a network without as a whole; returns whether it did.

    The names of the weights stay as they are. `auto` compiles on CUDA, and on the CPU wide networks in long runs.
    torch silently runs uncompiled code once it has compiled too many variants of one function, and all blocks count
    against one limit. The limit is therefore sized to the network, and reaching it is an error.
    """
    width = getattr(getattr(network, "config", None), "width", 0)
    worthwhile = device.type == "cuda" or (steps >= LONG_RUN and width >= WIDE)
    if mode == "off" or (mode == "auto" and not worthwhile):
        return False
    parts = blocks_of(network) or [network]
    # Variants of one block: training and evaluation, with and without gradients, and a last batch of another size.
    limit = 8 * max(len(parts), 2)
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, limit)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 4 * limit)
    dynamo.fail_on_recompile_limit_hit = True
    for part in parts:
        part.compile()
    return True
