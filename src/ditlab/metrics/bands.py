"""Bands of noise levels: averages that are not mixed over levels where an effect has opposite signs.

An et al. (2410.21273) average over timesteps that are spread evenly. Of these, 40 % lie above sigma = 6, where a
denoiser returns little more than the mean of its training images. The bands are ours, and declared before results are
read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ditlab.errors import InvalidConfig

__all__ = ["EDGES", "Band", "noise_bands"]

EDGES = (0.1, 1.5, 6.0)
"""Noise levels sigma at which the bands begin; the last has no upper end."""
NAMES = ("low", "middle", "high")


@dataclass(frozen=True)
class Band:
    """Noise levels from `low` up to, but without, `high`."""

    name: str
    low: float
    high: float

    @property
    def label(self) -> str:
        """Name and range, as tables print them: "low (0.1-1.5)"."""
        span = f"above {self.low:g}" if math.isinf(self.high) else f"{self.low:g}-{self.high:g}"
        return f"{self.name} ({span})" if self.name in NAMES else span

    def holds(self, levels: Sequence[float]) -> np.ndarray:
        """Returns which levels sigma [L] lie inside, bool [L]."""
        sigmas = np.asarray(levels, dtype=float)
        return (self.low <= sigmas) & (sigmas < self.high)

    def mean(self, values: np.ndarray, levels: Sequence[float]) -> np.ndarray:
        """Returns the mean over the band's levels of values [..., L]: float64 [...]; NaN where it holds no level."""
        inside = self.holds(levels)
        values = np.asarray(values, dtype=float)
        return values[..., inside].mean(-1) if inside.any() else np.full(values.shape[:-1], np.nan)


def noise_bands(edges: Sequence[float] = EDGES) -> tuple[Band, ...]:
    """Returns the bands that begin at these noise levels, the last one open; three are named low, middle and high.

    Raises:
        InvalidConfig: no edge, or edges that are not positive and ascending.
    """
    ends = [float(edge) for edge in edges]
    ascending = all(a < b for a, b in pairwise(ends))
    if not ends or ends[0] <= 0 or not ascending or not all(map(math.isfinite, ends)):
        raise InvalidConfig(f"`bands`: expected noise levels above 0, ascending, found {list(edges)}")
    names = NAMES if len(ends) == 3 else tuple(f"band {i + 1}" for i in range(len(ends)))
    return tuple(Band(name, a, b) for name, (a, b) in zip(names, pairwise([*ends, math.inf]), strict=True))
