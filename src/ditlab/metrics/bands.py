"""Bands of noise levels: averages that are not mixed over levels where an effect has opposite signs.

An et al. (2410.21273) average over timesteps that are spread evenly. Of these, 40 % lie above sigma = 6, where a
denoiser returns little more than the mean of its training images. The bands are ours, and declared before results are
read. Nothing is imported here but Python's own, for settings that name bands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ditlab.errors import InvalidConfig

__all__ = ["EDGES", "Band", "noise_bands", "places_by_band"]

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
    def span(self) -> str:
        """The range, as tables print it: "0.1-1.5"."""
        return f"above {self.low:g}" if math.isinf(self.high) else f"{self.low:g}-{self.high:g}"

    def places(self, levels: Sequence[float]) -> list[int]:
        """Returns the places of the levels sigma that lie inside."""
        return [place for place, sigma in enumerate(levels) if self.low <= sigma < self.high]

    def facts(self, levels: Sequence[float]) -> dict[str, Any]:
        """Returns name, lower end and number of levels, as JSON values."""
        return {"name": self.name, "from": self.low, "levels": len(self.places(levels))}


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


def places_by_band(edges: Sequence[float], levels: Sequence[float]) -> dict[Band, list[int]]:
    """Returns the places of the levels sigma in each band that has any (`noise_bands`)."""
    return {band: places for band in noise_bands(edges) if (places := band.places(levels))}
