"""Which noise levels a denoiser knows: the numbered steps of a discrete process, or a range.

A level is `sigma` in the variance-exploding sense, y = x0 + sigma * n. Between two steps of a discrete process the step
number is taken linear in log sigma, in which both published schedules are smooth.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ditlab.diffusion.schedules import Respacing, noise_levels, respace
from ditlab.errors import DitlabError

BetweenSteps = Literal["interpolate", "round"]


@dataclass(frozen=True, eq=False)
class DiscreteLevels:
    """The levels of a process with numbered steps."""

    sigmas: np.ndarray
    """float64, ascending, positive."""
    steps: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """int64, ascending: the number of each level's step; 0, 1, ... where not given."""

    def __post_init__(self) -> None:
        sigmas = np.asarray(self.sigmas, dtype=np.float64)
        if sigmas.ndim != 1 or len(sigmas) == 0 or sigmas[0] <= 0 or not (np.diff(sigmas) > 0).all():
            raise DitlabError("discrete levels: expected positive ascending sigmas, found others")
        steps = np.asarray(self.steps, dtype=np.int64)
        object.__setattr__(self, "sigmas", sigmas)
        object.__setattr__(self, "steps", steps if len(steps) else np.arange(len(sigmas)))
        object.__setattr__(self, "_tables", {})

    def __len__(self) -> int:
        return len(self.sigmas)

    @property
    def min(self) -> float:
        """The lowest level."""
        return float(self.sigmas[0])

    @property
    def max(self) -> float:
        """The highest level."""
        return float(self.sigmas[-1])

    @property
    def identity(self) -> dict[str, Any]:
        """What tells these levels from others, as JSON values: how many, and a hash of the sigmas and their steps."""
        digest = hashlib.sha256(self.sigmas.tobytes() + self.steps.tobytes())
        return {"count": len(self), "sha256": digest.hexdigest()}

    def grid(self, spec: Respacing) -> np.ndarray:
        """The levels that a respacing keeps (see `schedules.respace`), ascending."""
        return self.sigmas[respace(len(self), spec)]

    def nearest(self, sigma: float) -> float:
        """The grid point that is nearest to a level, by their ratio."""
        return float(self.sigmas[np.abs(np.log(self.sigmas / sigma)).argmin()])

    def step(self, sigma: float | Tensor, between: BetweenSteps = "interpolate") -> float | Tensor:
        """The step number of a level, linear in log sigma between grid points; exact integers on them.

        Args:
            sigma: a level, or a tensor of levels, inside the grid.
            between: "round" takes the nearest grid point instead.
        """
        if isinstance(sigma, Tensor):
            logs, steps = self._on(sigma.device)
            log = sigma.double().log()
            right = torch.searchsorted(logs, log.contiguous()).clamp(min(1, len(self) - 1), len(self) - 1)
            left = (right - 1).clamp(min=0)
            width = (logs[right] - logs[left]).clamp(min=1e-300)
            part = ((log - logs[left]) / width).clamp(0, 1)
            near = part.round()
            # A level that came through float32 is still the grid point it was.
            part = near if between == "round" else torch.where((part - near).abs() < 1e-3, near, part)
            return torch.lerp(steps[left], steps[right], part)
        right = min(max(int(np.searchsorted(self.sigmas, sigma)), min(1, len(self) - 1)), len(self) - 1)
        left = max(right - 1, 0)
        width = max(math.log(self.sigmas[right] / self.sigmas[left]), 1e-300)
        part = min(max(math.log(sigma / self.sigmas[left]) / width, 0.0), 1.0)
        if between == "round" or abs(part - round(part)) < 1e-3:
            part = float(round(part))
        return float(self.steps[left] + part * (self.steps[right] - self.steps[left]))

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        tables: dict[torch.device, tuple[Tensor, Tensor]] = self.__dict__["_tables"]
        if device not in tables:
            logs = torch.from_numpy(np.log(self.sigmas)).to(device)
            tables[device] = (logs, torch.from_numpy(self.steps.astype(np.float64)).to(device))
        return tables[device]


@dataclass(frozen=True)
class LevelRange:
    """Every level above `min` (or equal to it, where it is not 0) up to `max`, which may be infinite."""

    min: float
    max: float

    def __post_init__(self) -> None:
        if not 0 <= self.min < self.max:
            raise DitlabError(f"level range: expected 0 <= min < max, found {self.min} and {self.max}")

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this range from others, as JSON values; an infinite end as text."""
        return {"min": self.min, "max": self.max if math.isfinite(self.max) else "infinite"}

    def grid(self, spec: Respacing) -> np.ndarray:
        """So many levels, ascending, spaced as Karras et al. 2022 Eq. 5 between 0.002 and 80 or the range's ends.

        Raises:
            DitlabError: a specification other than one number, which only numbered steps could obey.
        """
        if not str(spec).isdigit():
            raise DitlabError(
                f"levels: expected a count of steps, for this denoiser has no numbered ones, found '{spec}'"
            )
        return noise_levels("edm", int(str(spec)), max(self.min, 0.002), min(self.max, 80.0))[::-1].copy()


Levels = DiscreteLevels | LevelRange
