"""Settings of the encoding of an image set (`ditlab.data.encode`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ditlab.errors import DitlabError

__all__ = ["PART", "EncodeConfig", "Store"]

Store = Literal["moments", "sample", "mean"]
"""What is stored of each picture; see `EncodeConfig.store`."""
PART = 64
"""Pictures in one part file, the most that a killed process loses."""


@dataclass(frozen=True)
class EncodeConfig:
    """How pictures are encoded."""

    store: Store = "moments"
    """Mean and standard deviation, of which training draws a sample each time (as DiT's did); one sample, drawn now; or
    the mean alone. An autoencoder without deviations gives the mean in any case."""
    mirrored: bool = False
    """Also encode the pictures mirrored left to right: needed to train with flips, at twice the size."""
    seed: int = 0
    """Seed of the samples, if one sample is stored."""
    batch: int = 16
    """Pictures encoded at once."""
    precision: Literal["float32", "bf16"] = "float32"
    """Number format that the autoencoder computes in."""

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= PART:
            raise DitlabError(f"data encode: expected a batch of 1 to {PART} pictures, found {self.batch}")
