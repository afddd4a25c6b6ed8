from __future__ import annotations

import numpy as np
import pytest

from ditlab.metrics.similarity import cosines, mean_squares, r_squared, unit_vectors


def images(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(5, 2, 3, 4)) + seed


def test_they_are_what_numpy_says():
    x, y = images(1), images(2)
    for a, b, correlation, r2, mse in zip(x, y, cosines(x, y), r_squared(x, y), mean_squares(x, y), strict=True):
        assert correlation == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1])
        assert r2 == pytest.approx(1 - ((a - b) ** 2).sum() / (b.size * b.var()))
        assert mse == pytest.approx(((a - b) ** 2).mean())
    plain = cosines(x, y, mean_removed=False)
    assert plain[0] == pytest.approx((x[0] * y[0]).sum() / np.linalg.norm(x[0]) / np.linalg.norm(y[0]))
    assert (plain > cosines(x, y)).all()  # both have a positive mean


def test_the_ends():
    x = images(1)
    np.testing.assert_allclose(cosines(x, 3 * x + 5), 1)
    np.testing.assert_allclose(cosines(x, 7 - x), -1)
    np.testing.assert_allclose(r_squared(x, x), 1)
    means = np.broadcast_to(x.mean((1, 2, 3), keepdims=True), x.shape)
    np.testing.assert_allclose(r_squared(means, x), 0, atol=1e-12)
    assert np.linalg.norm(unit_vectors(x), axis=1) == pytest.approx(1)


def test_flat_images_are_like_nothing():
    flat, x = np.full((2, 1, 3, 3), 0.1), images(3)[:2, :1, :, :3]
    assert (cosines(flat, x) == 0).all()
    assert (r_squared(x, flat) == 0).all()
    assert (unit_vectors(flat) == 0).all()
