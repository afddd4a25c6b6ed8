"""Names that configs choose from, and the checks of them that need neither torch nor numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from ditlab.errors import DitlabError, unknown_name

__all__ = [
    "LEVEL_LIMITS",
    "BetweenSteps",
    "Discretization",
    "FlowName",
    "Preconditioning",
    "PredictionTarget",
    "Respacing",
    "ScheduleName",
    "Variance",
    "check_choice",
    "check_levels",
    "check_schedule",
    "respacing_counts",
]

PredictionTarget = Literal["epsilon", "x0"]
"""What a network predicts: the noise or the clean image."""
Variance = Literal["learned-range", "fixed-small", "fixed-large"]
"""Reverse variance of a discrete process: learned between its two bounds, or one of the two."""
Preconditioning = Literal["edm", "vp", "ve"]
"""Scalings of a network's input and output (Karras et al. 2022, Table 1)."""
BetweenSteps = Literal["interpolate", "round"]
"""For a level between two steps: a fractional step, or the nearest one."""
ScheduleName = Literal["linear", "cosine"]
"""Discrete VP processes; see `schedules.make_schedule`."""
Discretization = Literal["edm", "vp", "ve", "iddpm"]
"""Grids of noise levels; see `schedules.noise_levels`."""
FlowName = Literal["linear", "vp", "ve"]
"""Probability flows; see `schedules.FLOWS`."""
Respacing = str | int | Sequence[int]
"""Which steps of a process are taken; see `schedules.respace`."""

LEVEL_LIMITS: dict[str, tuple[float, float]] = {
    "edm": (0.002, 80.0),
    "vp": (0.010485992786702987, 152.1669702839464),  # of times 1e-3 and 1
    "ve": (0.02, 100.0),
    "iddpm": (0.002, 81.0),
}
"""Default lowest and highest level of each discretization (Karras et al. 2022, Table 1)."""


def check_choice(what: str, name: str, kind: Any) -> None:
    """Raises NotFound for a name that is none of a Literal's."""
    if name not in get_args(kind):
        raise unknown_name(what, name, get_args(kind))


def check_schedule(name: str, steps: int) -> None:
    """Raises a DitlabError for an unknown schedule, or one that does not exist with so few steps."""
    check_choice("schedule", name, ScheduleName)
    if name == "linear" and steps <= 20:
        raise DitlabError(f"schedule 'linear': expected more than 20 steps, found {steps}")
    if steps < 1:
        raise DitlabError(f"schedule 'cosine': expected at least 1 step, found {steps}")


def respacing_counts(spec: Respacing) -> list[int]:
    """Returns the number of steps of each section of a respacing that `respace` can read; "ddim50" has one of 50."""
    single = isinstance(spec, str) and spec.startswith("ddim")
    text = str(spec).removeprefix("ddim")
    try:
        parts = [int(part) for part in (text.split(",") if isinstance(spec, str | int) else spec)]
    except ValueError:
        parts = []
    if not parts or min(parts) < 1 or (single and len(parts) > 1):
        raise DitlabError(f"respacing '{spec}': expected counts of at least 1 such as 250, ddim50 or 10,15,20")
    return parts


def check_levels(name: str, steps: int, sigma_min: float | None, sigma_max: float | None) -> tuple[float, float]:
    """Returns the lowest and the highest level of a grid, by default the discretization's, if there are such levels."""
    check_choice("discretization", name, Discretization)
    low = LEVEL_LIMITS[name][0] if sigma_min is None else sigma_min
    high = LEVEL_LIMITS[name][1] if sigma_max is None else sigma_max
    if steps < 1 or not 0 < low < high < math.inf:
        raise DitlabError(f"noise levels: expected steps >= 1 and 0 < lowest < highest, found {steps}, {low}, {high}")
    return low, high
