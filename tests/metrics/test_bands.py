"""Bands of noise levels."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ditlab.errors import InvalidConfig
from ditlab.metrics.bands import noise_bands


def test_the_default_bands():
    low, middle, high = noise_bands()
    assert [band.label for band in (low, middle, high)] == ["low (0.1-1.5)", "middle (1.5-6)", "high (above 6)"]
    levels = (0.01, 0.1, 1.49, 1.5, 5.9, 6.0, 200.0)
    assert low.holds(levels).tolist() == [False, True, True, False, False, False, False]
    # Every level from the first edge on lies in one band.
    assert sum(band.holds(levels).astype(int) for band in (low, middle, high)).tolist() == [0, 1, 1, 1, 1, 1, 1]


def test_the_mean_of_a_band():
    low, middle, high = noise_bands()
    levels, values = (0.05, 0.5, 1.0, 2.0), np.array([[9.0, 1.0, 3.0, 5.0], [0.0, 2.0, 2.0, 7.0]])
    assert low.mean(values, levels).tolist() == [2.0, 2.0]
    assert middle.mean(values, levels).tolist() == [5.0, 7.0]
    assert np.isnan(high.mean(values, levels)).all()


def test_bands_of_ones_own():
    first, second = noise_bands((0.2, 2))
    assert (first.label, second.label) == ("0.2-2", "above 2")
    assert math.isinf(second.high)


@pytest.mark.parametrize("edges", [(), (0.0, 1.0), (2.0, 1.0), (1.0, 1.0), (1.0, math.inf), (1.0, math.nan)])
def test_edges_that_cannot_be_used(edges):
    with pytest.raises(InvalidConfig, match="`bands`: expected noise levels above 0, ascending, found"):
        noise_bands(edges)
