"""What a result was measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Provenance:
    """Which denoiser was measured, trained on what. A result without these cannot be compared honestly."""

    name: str
    """The run's name, or the reference's ("empirical Bayes")."""
    label: str = ""
    """What runs that differ only in seed and N share ("global"); the name where empty. Curves and bars go by it."""
    n: int | None = None
    """Number of training images."""
    seed: int = 0
    """Seed of the run (and of its dataset shuffle)."""
    step: int | None = None
    """Training step of the weights; None for a closed form."""
    ema: bool | None = None
    """Whether the averaged weights were measured; None for a closed form."""
    split_family: str = ""
    """Hash of (image set, seed, test images): equal for nested training sets. Only equal families are comparable."""
    split_hash: str = ""
    """Hash that also covers the training images."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Anything else worth keeping with the numbers; must be JSON."""

    @property
    def group(self) -> str:
        """The label, or the name where there is none."""
        return self.label or self.name
