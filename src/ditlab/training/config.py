"""How long and how a network is trained: the training section of a run's config.json."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ditlab.errors import InvalidConfig

__all__ = ["TrainingConfig"]


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how a network is trained."""

    steps: int = 400_000
    """Optimizer steps (An et al. 400,000)."""
    batch_size: int = 64
    """Images a step, over all processes and micro-batches (An et al.'s is unknown; 64 is a default of ditlab's)."""
    accumulate: int = 1
    """Micro-batches that a step's batch is cut into, to save memory."""
    lr: float = 1e-4
    """AdamW's learning rate (DiT's), constant unless one of the next two settings changes it."""
    lr_halve_every: int = 0
    """Halve the learning rate each time after this many steps (Kadkhodaie et al.); 0 for never."""
    lr_anneal: bool = False
    """Let the learning rate fall linearly to 0 at the last step (improved-diffusion's option)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    ema: float = 0.9999
    """Limit of the decay of the averaged weights; the decay rises as (1 + step) / (10 + step) until it reaches it."""
    flip: bool = False
    """Mirror each image left to right with probability 1/2."""
    precision: Literal["float32", "bf16"] = "float32"
    """Precision of the forward and backward pass; weights, averages and the optimizer stay in float32."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Compile the network's blocks; auto: on CUDA, and on the CPU for wide networks in long runs."""
    shard: bool = False
    """Keep one part of the weights, gradients, averages and optimizer state in each process (FSDP2), to save memory."""
    checkpoint_activations: bool = False
    """Compute each block a second time in the backward pass instead of keeping its activations, to save memory."""
    seed: int = 0
    """Seed of the initial weights, the order of images, noise, flips and dropout."""
    log_every: int = 100
    """Steps between lines of the log."""
    eval_every: int = 1000
    """Steps between measurements of the averaged weights; 0 for none."""
    save_every: int = 1000
    """Steps between checkpoints; there is always one at the end."""
    keep: int = 2
    """How many of the newest checkpoints are kept."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are never removed; 0 for none."""

    def __post_init__(self) -> None:
        """Raises InvalidConfig for settings that cannot be trained with."""
        for name in ("steps", "batch_size", "accumulate", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise InvalidConfig(f"training: {name} must be at least 1, found {getattr(self, name)}")
        for name in ("eval_every", "keep_every", "weight_decay", "lr_halve_every"):
            if getattr(self, name) < 0:
                raise InvalidConfig(f"training: {name} must not be negative, found {getattr(self, name)}")
        if self.keep < 1:
            raise InvalidConfig(
                f"training: keep must be at least 1 (the last checkpoint is the run), found {self.keep}"
            )
        if not 0 < self.lr < math.inf:
            raise InvalidConfig(f"training: lr must be positive, found {self.lr}")
        if self.lr_halve_every and self.lr_anneal:
            raise InvalidConfig(
                f"training: expected lr_halve_every 0 or no lr_anneal, found lr_halve_every {self.lr_halve_every} and "
                "lr_anneal"
            )
        if not 0 <= self.ema < 1:
            raise InvalidConfig(f"training: ema must be in [0, 1), found {self.ema}")
        if self.batch_size % self.accumulate:
            raise InvalidConfig(
                f"training: batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}"
            )

    def rate(self, step: int) -> float:
        """Returns the learning rate of the step that follows `step` steps."""
        if self.lr_halve_every:
            return self.lr * 0.5 ** (step // self.lr_halve_every)
        return self.lr * (1 - step / self.steps) if self.lr_anneal else self.lr
