"""The noise levels that a denoiser takes: the numbered steps of a discrete process, or a range.

A level is `sigma` in y = x0 + sigma * n. Between two steps of a discrete process the step number is linear in log
sigma, in which both published schedules are smooth; this interpolation is ditlab's own.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditlab.diffusion.choices import BetweenSteps, Respacing
from ditlab.diffusion.schedules import noise_levels, respace
from ditlab.errors import DitlabError

__all__ = ["DiscreteLevels", "LevelRange", "Levels"]


@dataclass(frozen=True, eq=False)
class DiscreteLevels:
    """The levels of a process with numbered steps."""

    sigmas: np.ndarray
    """float64, ascending, positive."""
    steps: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """int64, ascending: the number of each level's step; by default 0, 1, ..."""

    def __post_init__(self) -> None:
        sigmas, steps = np.asarray(self.sigmas, dtype=np.float64), np.asarray(self.steps, dtype=np.int64)
        if sigmas.ndim != 1 or len(sigmas) == 0 or sigmas[0] <= 0 or not (np.diff(sigmas) > 0).all():
            raise DitlabError("discrete levels: expected positive ascending sigmas, found others")
        object.__setattr__(self, "sigmas", sigmas)
        object.__setattr__(self, "steps", steps if len(steps) else np.arange(len(sigmas)))
        object.__setattr__(self, "_tables", {})

    def __len__(self) -> int:
        return len(self.sigmas)

    def __repr__(self) -> str:
        return f"DiscreteLevels({len(self)} levels, {self.min:.3g} to {self.max:.3g})"

    @property
    def min(self) -> float:
        """Returns the lowest level."""
        return float(self.sigmas[0])

    @property
    def max(self) -> float:
        """Returns the highest level."""
        return float(self.sigmas[-1])

    @property
    def identity(self) -> dict[str, Any]:
        """Returns the number of levels and a hash of the sigmas and their steps, as JSON values."""
        digest = hashlib.sha256(self.sigmas.tobytes() + self.steps.tobytes())
        return {"count": len(self), "sha256": digest.hexdigest()}

    def grid(self, spec: Respacing) -> np.ndarray:
        """Returns the levels of a respacing (see `schedules.respace`), ascending."""
        return self.sigmas[respace(len(self), spec)]

    def nearest(self, sigma: float) -> float:
        """Returns the level of the grid that is nearest to a level, by their ratio."""
        return float(self.sigmas[np.abs(np.log(self.sigmas / sigma)).argmin()])

    def step(self, sigma: float | Tensor, between: BetweenSteps = "interpolate") -> float | Tensor:
        """Returns the step number of a level, or of each of a tensor's, inside the grid.

        It is linear in log sigma between two grid points, or with "round" that of the nearest one, and an exact integer
        on a grid point.
        """
        if isinstance(sigma, Tensor):
            logs, steps = self._on(sigma.device)
            log = sigma.double().log()
            right = torch.searchsorted(logs, log.contiguous()).clamp(min(1, len(self) - 1), len(self) - 1)
            left = (right - 1).clamp(min=0)
            width = (logs[right] - logs[left]).clamp(min=1e-300)
            part = ((log - logs[left]) / width).clamp(0, 1)
            near = part.round()
            # A grid point that was rounded to float32 is still a grid point.
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
    """All levels from `min` (0 excluded) to `max`, which may be infinite."""

    min: float
    max: float

    def __post_init__(self) -> None:
        if not 0 <= self.min < self.max:
            raise DitlabError(f"level range: expected 0 <= min < max, found {self.min} and {self.max}")

    @property
    def identity(self) -> dict[str, Any]:
        """Returns the range as JSON values; an infinite end is text."""
        return {"min": self.min, "max": self.max if math.isfinite(self.max) else "infinite"}

    def grid(self, spec: Respacing) -> np.ndarray:
        """Returns `spec` levels, ascending, spaced as in Karras et al. 2022, Eq. 5, from 0.002 to 80 in the range."""
        if not str(spec).isdigit():
            raise DitlabError(
                f"levels: expected a count of steps, for this denoiser has no numbered ones, found '{spec}'"
            )
        return noise_levels("edm", int(str(spec)), max(self.min, 0.002), min(self.max, 80.0))[::-1].copy()


Levels = DiscreteLevels | LevelRange
