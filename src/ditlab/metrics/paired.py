"""Differences between two kinds of runs, paired by seed: a mean, its interval, and the claim that it allows.

Split and seed noise is as large as many effects here (An et al. Table 1, plain against dagger rows), so a difference is
claimed only where the t interval of the paired differences leaves zero out. Similarity is claimed only where the whole
interval lies inside a margin that was fixed beforehand: an interval that contains zero may merely be wide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ditlab.errors import DitlabError


@dataclass(frozen=True)
class PairedDifference:
    """second - first over paired seeds, with a t interval."""

    first: str
    second: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    low: float | None
    """Lower end of the interval; None with a single seed."""
    high: float | None
    confidence: float = 0.95
    margin: float | None = None
    """Differences smaller than this count as none; fixed beforehand. None where no margin was fixed."""

    @property
    def similar(self) -> bool:
        """Whether the whole interval lies inside the margin. Never so without a margin or with a single seed."""
        if self.margin is None or self.low is None or self.high is None:
            return False
        return -self.margin < self.low and self.high < self.margin

    @property
    def seen(self) -> bool:
        """Whether the interval leaves zero out. Never so with a single seed."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def sentence(self, what: str, unit: str = "dB") -> str:
        """One sentence about a quantity ("gap at equal steps") that claims no more than was measured."""
        largest = max(abs(self.mean), abs(self.low or 0), abs(self.high or 0))
        digits = 2 if largest >= 0.1 else 4  # so that a small difference does not print as -0.00
        size = f"{self.second} minus {self.first}: {self.mean:+.{digits}f} {unit}"
        if self.low is None or self.high is None:
            return f"{what}: {size} with one seed ({self.seeds[0]}), so nothing can be said about its spread."
        ends = f"{self.low:+.{digits}f} to {self.high:+.{digits}f}"
        interval = f"{self.confidence:.0%} interval {ends}, {len(self.seeds)} paired seeds"
        return f"{what}: {self.verdict(unit)} ({size}, {interval})."

    def verdict(self, unit: str = "dB") -> str:
        """What the interval allows to be said, in a few words without numbers of its own."""
        if self.low is None:
            return "one seed only, nothing can be said"
        within = "" if self.margin is None else f"within the margin of {self.margin:g} {unit} that was fixed beforehand"
        if not self.seen:
            return f"similar, {within}" if self.similar else "no difference seen"
        side = f"{self.second} is {'higher' if self.mean > 0 else 'lower'}"
        return f"{side}, but {within}" if self.similar else side


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Returns the 95 % t interval of the mean of independent values; None with fewer than two."""
    from scipy.stats import t as student

    if len(values) < 2:
        return None
    mean, count = float(np.mean(values)), len(values)
    half = float(student.ppf((1 + 0.95) / 2, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
    return mean - half, mean + half


def paired_difference(
    first: str,
    second: str,
    first_values: Mapping[int, float],
    second_values: Mapping[int, float],
    margin: float | None = None,
) -> PairedDifference:
    """The 95 % t interval of second - first over the seeds that both have.

    Args:
        first: name of the first kind of run; `second` that of the second.
        first_values: a number for each seed, as in `second_values`.
        margin: below which two kinds of runs count as similar, fixed before looking at the results; None for no claim.

    Raises:
        DitlabError: no seed in common, or a margin that is not positive.
    """
    if margin is not None and not margin > 0:
        raise DitlabError(f"comparison of '{first}' and '{second}': expected a margin above 0, found {margin}")
    seeds = tuple(sorted(set(first_values) & set(second_values)))
    if not seeds:
        raise DitlabError(f"comparison of '{first}' and '{second}': expected at least one seed in common, found none")
    differences = [second_values[s] - first_values[s] for s in seeds]
    low, high = mean_interval(differences) or (None, None)
    mean = float(np.mean(differences))
    return PairedDifference(first, second, seeds, tuple(differences), mean, low, high, margin=margin)
