"""Differences between paired seeds, and what may be said about them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from ditlab.errors import DitlabError
from ditlab.metrics.paired import paired_difference


def _pair(differences: list[float], margin: float | None = None):
    return paired_difference(
        "global", "local", dict.fromkeys(range(len(differences)), 1.0), {i: 1 + d for i, d in enumerate(differences)},
        margin=margin,
    )  # fmt: skip


def test_the_interval_is_scipys_paired_t_interval() -> None:
    differences = [0.3, -0.1, 0.25, 0.4]
    found = _pair(differences)
    interval = stats.ttest_rel(1 + np.array(differences), np.ones(4)).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize(
    ("differences", "margin", "verdict"),
    [
        ([-1.0, -1.1, -0.9], None, "local is lower"),
        ([1.0, 1.1, 0.9], 0.2, "local is higher"),
        ([0.01, -0.02, 0.01], 0.2, "similar, within the margin of 0.2 dB that was fixed beforehand"),
        ([0.01, -0.02, 0.01], None, "no difference seen"),
        ([0.5, -0.6, 0.1], 0.2, "no difference seen"),  # a wide interval is not similarity
        ([0.10, 0.11, 0.09], 0.2, "local is higher, but within the margin of 0.2 dB that was fixed beforehand"),
        ([0.0], 0.2, "one seed only, nothing can be said"),
    ],
)
def test_no_claim_goes_beyond_the_interval(differences: list[float], margin: float | None, verdict: str) -> None:
    found = _pair(differences, margin)
    assert found.verdict() == verdict
    if len(differences) > 1:
        assert found.sentence("Gap").startswith(f"Gap: {verdict} (local minus global: ")


def test_one_seed_says_so() -> None:
    assert "with one seed (0), so nothing can be said about its spread" in _pair([0.4], 0.2).sentence("Gap")


@pytest.mark.parametrize("margin", [0.0, -0.1])
def test_a_margin_that_is_none_is_refused(margin: float) -> None:
    with pytest.raises(DitlabError, match="margin above 0"):
        _pair([0.1, 0.2], margin)
