"""Two runs at equal fit: test PSNR and gap as functions of train PSNR, over the range that both have passed.

At equal steps a network that fits more slowly looks as if it generalized better. So a run's evaluations are read as a
curve over its train PSNR. Train PSNR rises with the step up to noise: it is fitted by isotonic regression (pooled
adjacent violators, `scipy.optimize.isotonic_regression`), and evaluations of one fitted value are averaged. Between
evaluations the curve is linear; beyond them there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from ditlab.errors import InvalidConfig

__all__ = ["FitCurve", "MatchedDifference", "matched_difference"]

POINTS = 33
"""Values of train PSNR at which two curves are compared, evenly spread over the common range."""


@dataclass(frozen=True, eq=False)
class FitCurve:
    """Quantities of one run as functions of its train PSNR."""

    train: np.ndarray
    """Fitted train PSNR in dB, float64 [P], strictly ascending."""
    values: np.ndarray
    """The quantity at each, float64 [P]."""

    @classmethod
    def of(cls, train: Sequence[float], values: Sequence[float]) -> FitCurve:
        """Returns the curve of evaluations in the order of their steps.

        Args:
            train: train PSNR in dB [E].
            values: test PSNR or gap in dB [E].

        Raises:
            InvalidConfig: lengths differ, no evaluation, or a number that is not finite.
        """
        from scipy.optimize import isotonic_regression

        x, y = np.asarray(train, dtype=float), np.asarray(values, dtype=float)
        if x.shape != y.shape or x.ndim != 1 or not len(x) or not np.isfinite([*x, *y]).all():
            raise InvalidConfig(
                f"matched comparison: expected as many finite values as train PSNRs, at least one, found {len(y)} for "
                f"{len(x)}"
            )
        fitted, group = np.unique(isotonic_regression(x).x, return_inverse=True)
        return cls(fitted, np.bincount(group, weights=y) / np.bincount(group))

    def at(self, train: np.ndarray) -> np.ndarray:
        """Returns the quantity at train PSNRs [G] inside the curve's range, float64 [G]."""
        return np.interp(train, self.train, self.values)


@dataclass(frozen=True, eq=False)
class MatchedDifference:
    """second - first at equal train PSNR, over pairs of runs, e.g. seeds."""

    train: np.ndarray
    """Train PSNR in dB, float64 [G]: the range that all runs of both sides have passed."""
    curves: np.ndarray
    """Difference of each pair, float64 [pairs, G]."""
    low: np.ndarray | None
    """Lower edge of the simultaneous band of the mean difference, float64 [G]; None with fewer than three pairs."""
    high: np.ndarray | None

    @property
    def mean(self) -> np.ndarray:
        """Mean difference over pairs, float64 [G]."""
        return self.curves.mean(0)

    @property
    def averages(self) -> np.ndarray:
        """Each pair's mean over the common range, float64 [pairs]: the number that stands for a comparison."""
        return self.curves.mean(1)


def matched_difference(
    first: Sequence[FitCurve], second: Sequence[FitCurve], *, confidence: float = 0.95
) -> MatchedDifference | None:
    """Compares pairs of runs at equal train PSNR; None where no train PSNR was passed by all of them.

    The band is simultaneous over the range: its half-width is c times the standard error at each value, c being that
    quantile of the largest |t| along the range under random signs of the pairs' deviations from their mean (all 2^n
    signs up to 12 pairs, 4,096 drawn ones above), and never below the t quantile of a single value.

    Args:
        first: one curve for each pair.
        second: the same pairs' other curve.
        confidence: of the band, in (0, 1).

    Raises:
        InvalidConfig: no pair, or sides of different length.
    """
    if not first or len(first) != len(second):
        raise InvalidConfig(
            f"matched comparison: expected as many runs on both sides, at least one, found {len(first)} and "
            f"{len(second)}"
        )
    low = max(curve.train[0] for curve in (*first, *second))
    high = min(curve.train[-1] for curve in (*first, *second))
    if low > high:
        return None
    train = np.linspace(low, high, POINTS if high > low else 1)
    curves = np.stack([b.at(train) - a.at(train) for a, b in zip(first, second, strict=True)])
    half = _band(curves, confidence)
    mean = curves.mean(0)
    return MatchedDifference(train, curves, *((None, None) if half is None else (mean - half, mean + half)))


def _band(curves: np.ndarray, confidence: float) -> np.ndarray | None:
    """Half-width of the simultaneous band of the mean of curves [pairs, G], float64 [G]."""
    from scipy.stats import t as student

    pairs = len(curves)
    if pairs < 3:
        return None  # of two pairs, half of all signs leave no spread
    error = curves.std(0, ddof=1) / np.sqrt(pairs)
    if pairs <= 12:
        signs = np.array(list(product((-1.0, 1.0), repeat=pairs)))
    else:
        signs = np.random.default_rng(0).choice((-1.0, 1.0), (4096, pairs))
    flipped = signs[:, :, None] * (curves - curves.mean(0))[None]
    spread = flipped.std(1, ddof=1) / np.sqrt(pairs)
    with np.errstate(divide="ignore", invalid="ignore"):
        largest = np.nan_to_num(np.abs(flipped.mean(1)) / spread, nan=0.0, posinf=np.inf).max(1)
    pointwise = float(student.ppf((1 + confidence) / 2, pairs - 1))
    return max(pointwise, float(np.quantile(largest, confidence, method="higher"))) * error
