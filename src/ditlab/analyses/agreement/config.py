"""Settings of the agreement with closed-form denoisers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from ditlab.errors import InvalidConfig, unknown_name

__all__ = ["BASELINES", "TITLES", "AgreementConfig", "AgreementOptions", "BaselineName", "DeterministicSampler"]

BaselineName = Literal["empirical-bayes", "wiener", "ls", "els", "bbels", "wiener-locality"]
DeterministicSampler = Literal["ddim", "euler", "heun"]

BASELINES: tuple[BaselineName, ...] = get_args(BaselineName)
TITLES: Mapping[BaselineName, str] = {
    "empirical-bayes": "empirical Bayes",
    "wiener": "Wiener",
    "ls": "LS",
    "els": "ELS",
    "bbels": "bbELS",
    "wiener-locality": "Wiener locality",
}
"""The baselines' names in tables and figures."""


@dataclass(frozen=True)
class AgreementConfig:
    """How a model is compared with baselines."""

    baselines: tuple[BaselineName, ...] = BASELINES
    """Closed-form denoisers of the training images: empirical Bayes, Wiener, the local score (ls) and the equivariant
    local score without and with borders (els, bbels) of Kamb and Ganguli, Wiener locality of Lukoianov et al."""
    images: int = 8
    """Images that the model and each baseline draw from the same noise, of the seeds 0, 1, ..."""
    sampler: DeterministicSampler = "ddim"
    """The sampler, one without fresh noise, on the model's own noise levels."""
    sampler_steps: int = 20
    """Steps of the sampler."""
    window: int | None = None
    """Side of the windows of ls, els and bbels in pixels at all noise levels; calibrated at each level if not given."""
    candidates: tuple[int, ...] = (3, 5, 7, 9, 11, 13, 15, 17)
    """Sides that calibration chooses from, odd and ascending; sides above the image's side are left out."""
    trajectories: int = 4
    """Number of images whose sampling trajectories are used to calibrate windows and to compare single estimates."""
    training_images: int | None = None
    """Make the baselines of the first training images, this many; of all if not given."""

    def __post_init__(self) -> None:
        if not self.baselines or len(set(self.baselines)) < len(self.baselines):
            raise InvalidConfig(
                f"agreement: `baselines` must be different ones, at least one, found {list(self.baselines)}"
            )
        for name in self.baselines:
            if name not in BASELINES:
                raise unknown_name("baseline", name, BASELINES)
        for name in ("images", "sampler_steps", "trajectories", "training_images"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidConfig(f"agreement: `{name}` must be at least 1, found {value}")
        if not self.candidates or any(b <= a for a, b in pairwise(self.candidates)):
            raise InvalidConfig(
                f"agreement: `candidates` must be ascending, at least one, found {list(self.candidates)}"
            )
        for name, sizes in (("candidates", self.candidates), ("window", (self.window,))):
            for size in sizes:
                if size is not None and (size < 1 or size % 2 == 0):
                    raise InvalidConfig(f"agreement: `{name}` must be odd (1, 3, 5, ...), found {size}")


@dataclass(frozen=True)
class AgreementOptions:
    """What the figures show."""

    hide_training_images: bool = False
    """Leave out the images of empirical Bayes and Wiener locality, which are training images or nearly so, and mask
    others that are nearly one."""
