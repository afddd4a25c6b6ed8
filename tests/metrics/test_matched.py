"""Comparisons at equal train PSNR on curves whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from ditlab.errors import InvalidConfig
from ditlab.metrics.matched import FitCurve, matched_difference

STEPS = np.linspace(0, 1, 25)


def run(speed: float, better: float = 0.0, noise: float = 0.0, seed: int = 0) -> FitCurve:
    """A run whose train PSNR rises at this speed and whose test PSNR is a function of it, plus `better`."""
    rng = np.random.default_rng(seed)
    train = 15 + 6 * (1 - np.exp(-3 * speed * STEPS))
    test = 14.5 + 0.9 * (train - 15) - 0.1 * (train - 15) ** 2 + better
    return FitCurve.of(train + noise * rng.normal(size=25), test + noise * rng.normal(size=25))


def test_a_slower_run_is_not_better():
    """At equal steps the slow run's test PSNR differs by up to 1 dB; at equal fit by nothing but interpolation."""
    result = matched_difference([run(1.0)], [run(0.4)])
    assert result is not None
    assert np.abs(result.curves).max() < 0.02
    assert result.low is None


def test_a_better_run_is_better_by_that_much():
    firsts = [run(1.0 + 0.1 * s, noise=0.02, seed=s) for s in range(6)]
    seconds = [run(0.6 + 0.1 * s, better=0.3, noise=0.02, seed=10 + s) for s in range(6)]
    result = matched_difference(firsts, seconds)
    assert result is not None
    assert result.averages == pytest.approx([0.3] * 6, abs=0.05)
    assert ((result.low < 0.3) & (result.high > 0.3)).all()
    assert (result.low > 0).all()


def test_the_common_range():
    result = matched_difference([run(1.0)], [run(0.4)])
    assert result is not None
    assert result.train[0] == pytest.approx(15.0)
    assert result.train[-1] == pytest.approx(15 + 6 * (1 - np.exp(-1.2)))
    low = FitCurve.of([1.0, 2.0], [0.0, 0.0])
    assert matched_difference([low], [FitCurve.of([3.0, 4.0], [0.0, 0.0])]) is None
    touching = matched_difference([low], [FitCurve.of([2.0, 4.0], [1.0, 0.0])])
    assert touching is not None
    assert touching.averages.tolist() == [1.0]


def test_train_psnr_that_falls_back_is_pooled():
    curve = FitCurve.of([1.0, 3.0, 2.0, 4.0], [0.0, 5.0, 7.0, 1.0])
    assert curve.train.tolist() == [1.0, 2.5, 4.0]
    assert curve.values.tolist() == [0.0, 6.0, 1.0]


def test_the_band_covers_the_whole_curve():
    """Where nothing differs, the band leaves zero out somewhere in about one case of twenty, not at one value of 20."""
    rng = np.random.default_rng(0)
    x = np.linspace(0, 1, 25)
    waves = np.stack([np.sin((k + 1) * np.pi * x) for k in range(8)])

    def smooth() -> FitCurve:
        return FitCurve.of(x, rng.normal(size=8) @ waves)

    outside = []
    for _ in range(200):
        result = matched_difference([smooth() for _ in range(6)], [smooth() for _ in range(6)])
        assert result is not None
        outside.append(bool(((result.low > 0) | (result.high < 0)).any()))
    assert np.mean(outside) < 0.12


@pytest.mark.parametrize(("train", "test"), [([], []), ([1.0], [1.0, 2.0]), ([1.0, np.nan], [1.0, 2.0])])
def test_curves_that_cannot_be_used(train, test):
    with pytest.raises(InvalidConfig, match="matched comparison: expected"):
        FitCurve.of(train, test)


def test_sides_of_different_length():
    with pytest.raises(InvalidConfig, match="expected as many runs on both sides"):
        matched_difference([run(1.0)], [])
