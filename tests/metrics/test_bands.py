"""Bands of noise levels."""

from __future__ import annotations

import math

import pytest

from ditlab.errors import InvalidConfig
from ditlab.metrics.bands import noise_bands


def test_the_default_bands():
    bands = noise_bands()
    assert [(band.name, band.span) for band in bands] == [
        ("low", "0.1-1.5"),
        ("middle", "1.5-6"),
        ("high", "above 6"),
    ]
    # Every level from the first edge on lies in one band, one at an edge in the band that begins there.
    levels = (0.01, 0.1, 1.49, 1.5, 5.9, 6.0, 200.0)
    assert [band.places(levels) for band in bands] == [[1, 2], [3, 4], [5, 6]]


def test_bands_of_ones_own():
    first, second = noise_bands((0.2, 2))
    assert [(band.name, band.span) for band in (first, second)] == [("band 1", "0.2-2"), ("band 2", "above 2")]
    assert math.isinf(second.high)


@pytest.mark.parametrize("edges", [(), (0.0, 1.0), (2.0, 1.0), (1.0, 1.0), (1.0, math.inf), (1.0, math.nan)])
def test_edges_that_cannot_be_used(edges):
    with pytest.raises(InvalidConfig, match="`bands`: expected noise levels above 0, ascending, found"):
        noise_bands(edges)
