"""The formats of a conversion, and what files of the original codes do not say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ditlab.diffusion.choices import PredictionTarget, ScheduleName

__all__ = ["Format", "UNetFile"]

Format = Literal["ditlab", "diffusers", "original"]


@dataclass(frozen=True)
class UNetFile:
    """Settings that a checkpoint of improved-diffusion lacks; by default those of the published one of its shape."""

    heads_up: int | None = None
    """Attention heads of the decoder; the same as the encoder's by default."""
    size: int | None = None
    """Side of the images in pixels, if its levels are not the original's for 32, 64 or 256."""
    schedule: ScheduleName | None = None
    """Noise schedule."""
    steps: int | None = None
    """Number of steps of the process."""
    rescale_time: bool | None = None
    """Whether the network gets t * 1000 / T instead of t."""
    prediction: PredictionTarget | None = None
    """Prediction target; the noise by default."""
