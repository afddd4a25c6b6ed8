"""Settings of the two-subset test."""

from __future__ import annotations

from dataclasses import dataclass

from ditlab.errors import InvalidConfig
from ditlab.sampling.options import SamplerName
from ditlab.sampling.seeds import parse_seeds

__all__ = ["TwoSubsetsConfig", "TwoSubsetsOptions"]


@dataclass(frozen=True)
class TwoSubsetsConfig:
    """How the two runs are compared."""

    seeds: str = "0-63"
    """Seeds of the samples, the same for both runs: numbers and ranges such as 0-9,20."""
    sampler: SamplerName = "ddim"
    """The sampler; run: the first run's own. Fresh noise in a step is the same for both runs, too."""
    sampler_steps: int | str | None = None
    """Steps of the sampler; its default if not given."""
    keep_mean: bool = False
    """Compare images as they are. By default each image's mean is subtracted first, as in Kadkhodaie et al."""
    batch: int = 64
    """Images drawn at once. Does not change the result beyond float rounding."""

    def __post_init__(self) -> None:
        parse_seeds(self.seeds)
        if self.batch < 1:
            raise InvalidConfig(f"two-subsets: `batch` must be at least 1, found {self.batch}")


@dataclass(frozen=True)
class TwoSubsetsOptions:
    """What the figures show."""

    hide_training_images: bool = False
    """Show no training images, and mask samples that are nearly one."""
