"""The settings of the objectives (`ditlab.diffusion.objectives`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ditlab.diffusion.choices import (
    BetweenSteps,
    Preconditioning,
    PredictionTarget,
    ScheduleName,
    Variance,
    check_schedule,
)
from ditlab.diffusion.short_repr import ShortRepr
from ditlab.errors import DitlabError

if TYPE_CHECKING:
    from ditlab.diffusion.objectives import Objective

__all__ = ["BlindObjectiveConfig", "EDMObjectiveConfig", "VPObjectiveConfig"]


class _ObjectiveConfig(ShortRepr):
    def build(self) -> Objective:
        """Returns the objective."""
        from ditlab.diffusion.objectives import OBJECTIVES

        return OBJECTIVES[type(self)](self)


@dataclass(frozen=True, repr=False)
class VPObjectiveConfig(_ObjectiveConfig):
    """Training on the steps of a discrete VP process, as DDPM, improved-diffusion and DiT do."""

    kind: Literal["vp"] = "vp"
    """Names this objective in config.json."""
    schedule: ScheduleName = "linear"
    """Noise schedule."""
    steps: int = 1000
    """Number of steps T of the process."""
    prediction: PredictionTarget = "epsilon"
    """What the network predicts: the noise or the clean image."""
    variance: Variance = "learned-range"
    """Reverse variance: learned between its two bounds (the network then has twice the channels), or one of the two."""
    loss: Literal["mse", "rescaled-mse", "kl", "kl-unscaled"] = "mse"
    """mse: mean squared error, plus the variational bound in bits if the variance is learned; rescaled-mse: the
    bound times T / 1000; kl: T times the bound alone; kl-unscaled: the bound of one step alone."""
    time_sampling: Literal["uniform", "loss-second-moment"] = "uniform"
    """How t is drawn in training: loss-second-moment draws steps of large loss more often and weights them down."""
    rescale_time: bool = False
    """Give the network t * 1000 / T instead of t."""
    between: BetweenSteps = "interpolate"
    """For a level between two steps, the denoiser takes a fractional t or the nearest step's."""
    label_dropout: float = 0.1
    """Probability that an image's label is replaced by "no class" (conditional networks only)."""

    def __post_init__(self) -> None:
        check_schedule(self.schedule, self.steps)
        _check_dropout(self.label_dropout)


@dataclass(frozen=True, repr=False)
class EDMObjectiveConfig(_ObjectiveConfig):
    """Training on continuous levels with a preconditioned network, as EDM does."""

    kind: Literal["edm"] = "edm"
    """Names this objective in config.json."""
    precond: Preconditioning = "edm"
    """Preconditioning, with the distribution of levels and the loss weight that belong to it."""
    sigma_data: float = 0.5
    """Standard deviation of the images (precond edm)."""
    p_mean: float = -1.2
    """Mean of ln sigma in training (precond edm)."""
    p_std: float = 1.2
    """Standard deviation of ln sigma in training (precond edm)."""
    label_dropout: float = 0.1
    """Probability that an image's label is replaced by "no class" (conditional networks only)."""

    def __post_init__(self) -> None:
        if self.sigma_data <= 0 or self.p_std <= 0:
            raise DitlabError(
                f"objective: expected sigma_data > 0 and p_std > 0, found {self.sigma_data} and {self.p_std}"
            )
        _check_dropout(self.label_dropout)


@dataclass(frozen=True, repr=False)
class BlindObjectiveConfig(_ObjectiveConfig):
    """Training of a network that gets the noisy image alone, in its own units, and returns the noise.

    The loss is the squared error summed over an image, as in Kadkhodaie et al.'s code. The values -1 and 1 of an
    image are `low` and `high` for the network; a bias-free network is homogeneous about its zero.
    """

    kind: Literal["blind"] = "blind"
    """Names this objective in config.json."""
    low: float = 0.0
    """The network's value for -1."""
    high: float = 1.0
    """The network's value for 1."""
    max_level: float = 1.0
    """Highest noise level, in the network's units: 1 in Kadkhodaie et al., 100 / 255 in Mohan et al.'s BF-CNN."""

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise DitlabError(f"objective: expected finite low < high, found {self.low} and {self.high}")
        if not 0 < self.max_level < math.inf:
            raise DitlabError(f"objective: expected a finite max_level > 0, found {self.max_level}")


def _check_dropout(probability: float) -> None:
    if not 0 <= probability < 1:
        raise DitlabError(f"objective: expected label_dropout in [0, 1), found {probability}")
