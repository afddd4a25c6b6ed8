"""Families of paired contrasts: adjusted p-values and intervals, floors under the spread of few seeds, and power.

Holm, "A simple sequentially rejective multiple test procedure" (1979). Few seeds may agree by chance: three differences
of -0.0070, -0.0065 and -0.0075 dB have a t interval that leaves zero out, and mean nothing. So the standard deviation
has a floor, and a difference counts only where it is as large as the smallest effect of interest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ditlab.errors import InvalidConfig

__all__ = ["SD_FLOOR", "SMALLEST_EFFECT", "Contrast", "contrasts", "half_width", "holm", "power", "seeds_for"]

SMALLEST_EFFECT = 0.1
"""Smallest difference of interest, in dB. Ours."""
SD_FLOOR = 0.05
"""Floor under the standard deviation over seeds of a paired difference, in dB: half the smallest
effect. Ours."""

Verdict = Literal["higher", "lower", "similar", "not resolved", "one seed"]


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Returns Holm's adjusted p-values of one family, float64 [M], in the order given (Holm 1979)."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted


@dataclass(frozen=True)
class Contrast:
    """The mean of paired differences, and what its adjusted interval allows to be said."""

    name: str
    differences: tuple[float, ...]
    """One for each pair, e.g. each seed."""
    mean: float
    sd: float | None
    """Standard deviation that was used: the differences' own (n - 1), or the floor where that is higher."""
    p: float | None
    """Two-sided, of the paired t test; None with one pair."""
    p_adjusted: float | None
    """The same after Holm's adjustment over the family."""
    low: float | None
    """Lower end of the interval at the level at which Holm's procedure tests this contrast."""
    high: float | None
    family: int
    """How many contrasts the family has."""
    smallest_effect: float

    @property
    def verdict(self) -> Verdict:
        """Higher or lower: the interval leaves zero out and the mean is no smaller than the smallest effect.

        Similar: the whole interval lies within the smallest effect of zero. Else not resolved.
        """
        if self.low is None or self.high is None:
            return "one seed"
        if -self.smallest_effect < self.low and self.high < self.smallest_effect:
            return "similar"
        if abs(self.mean) >= self.smallest_effect and (self.low > 0 or self.high < 0):
            return "higher" if self.mean > 0 else "lower"
        return "not resolved"


def contrasts(
    differences: dict[str, Sequence[float]],
    *,
    confidence: float = 0.95,
    smallest_effect: float = SMALLEST_EFFECT,
    sd_floor: float = SD_FLOOR,
) -> dict[str, Contrast]:
    """Tests a family of paired differences against zero, adjusted by Holm's procedure.

    The interval of the contrast with the k-th smallest p-value of M has the level 1 - (1 - confidence) / (M - k + 1),
    so that it leaves zero out wherever Holm's procedure rejects.

    Args:
        differences: name -> one difference for each pair; contrasts with one pair are left out of the family's count.
        confidence: of the family, in (0, 1).
        smallest_effect: as in `Contrast.verdict`, in the unit of the differences.
        sd_floor: floor under the standard deviation, in the same unit.

    Raises:
        InvalidConfig: a contrast without differences, or settings out of range.
    """
    if not 0 < confidence < 1 or smallest_effect <= 0 or sd_floor < 0:
        raise InvalidConfig(
            "contrasts: expected a confidence in (0, 1), a smallest effect above 0 and a floor of at least 0, found "
            f"{confidence:g}, {smallest_effect:g} and {sd_floor:g}"
        )
    if empty := [name for name, values in differences.items() if len(values) == 0]:
        raise InvalidConfig(f"contrasts: expected at least one difference for '{empty[0]}', found none")
    tested = [name for name, values in differences.items() if len(values) > 1]
    means = {name: float(np.mean(values)) for name, values in differences.items()}
    sds = {name: max(float(np.std(differences[name], ddof=1)), sd_floor) for name in tested}
    p = {name: _p_value(means[name], sds[name], len(differences[name])) for name in tested}
    adjusted = dict(zip(tested, holm([p[name] for name in tested]).tolist(), strict=True))
    rank = {name: k for k, name in enumerate(sorted(tested, key=lambda name: p[name]))}
    results = {}
    for name, values in differences.items():
        low = high = None
        if name in rank:
            level = 1 - (1 - confidence) / (len(tested) - rank[name])
            half = half_width(sds[name], len(values), level)
            low, high = means[name] - half, means[name] + half
        results[name] = Contrast(
            name,
            tuple(float(v) for v in values),
            means[name],
            sds.get(name),
            p.get(name),
            adjusted.get(name),
            low,
            high,
            len(tested),
            smallest_effect,
        )
    return results


def _p_value(mean: float, sd: float, count: int) -> float:
    from scipy.stats import t as student

    if sd == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * student.sf(abs(mean) * math.sqrt(count) / sd, count - 1))


def half_width(sd: float, count: int, confidence: float = 0.95) -> float:
    """Returns half the width of the t interval of a mean of `count` values with this standard deviation."""
    from scipy.stats import t as student

    return float(student.ppf((1 + confidence) / 2, count - 1) * sd / math.sqrt(count))


def power(effect: float, sd: float, count: int, alpha: float = 0.05) -> float:
    """Returns the probability that the two-sided paired t test finds a true mean difference (noncentral t).

    Args:
        effect: the true mean difference.
        sd: true standard deviation of the differences, above 0.
        count: pairs, at least 2.
        alpha: level of the test; that of one contrast where a family has several.

    Raises:
        InvalidConfig: a value out of range.
    """
    from scipy.stats import nct
    from scipy.stats import t as student

    if sd <= 0 or count < 2 or not 0 < alpha < 1:
        raise InvalidConfig(
            "power: expected a standard deviation above 0, at least 2 pairs and a level in (0, 1), found "
            f"{sd:g}, {count} and {alpha:g}"
        )
    critical = student.ppf(1 - alpha / 2, count - 1)
    shift = effect * math.sqrt(count) / sd
    return float(nct.sf(critical, count - 1, shift) + nct.cdf(-critical, count - 1, shift))


def seeds_for(effect: float, sd: float, wanted: float = 0.8, alpha: float = 0.05, most: int = 1000) -> int | None:
    """Returns the smallest number of pairs with at least this power, None where more than `most` are needed."""
    return next((count for count in range(2, most + 1) if power(effect, sd, count, alpha) >= wanted), None)
