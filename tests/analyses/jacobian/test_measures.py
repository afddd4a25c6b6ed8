"""Measures of Jacobians against numbers that follow from their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from ditlab.analyses.jacobian.measures import (
    alignment,
    channel_shares,
    edge_energy,
    edge_pixels,
    frequencies,
    harmonicity,
    image_correlations,
    matrix_numbers,
    oracle_shrinkage,
    participation,
    rank_correlation,
    relative_gap,
    sensitivity,
    shrinkage_distance,
    spectral_distance,
    spectrum_numbers,
)
from ditlab.rng import numpy_generator

SHAPE = (2, 6, 8)


def rng(name: str = "test") -> np.random.Generator:
    return numpy_generator(0, name)


def wave(rows: int, columns: int, shape=(1, 8, 8)) -> np.ndarray:
    """A cosine of so many periods down and across, as a row vector."""
    down, across = np.arange(shape[1])[:, None] / shape[1], np.arange(shape[2])[None, :] / shape[2]
    return np.broadcast_to(np.cos(2 * np.pi * (rows * down + columns * across)), shape).reshape(1, -1)


def test_the_numbers_of_a_spectrum():
    found = spectrum_numbers(np.array([4.0, 2.0, 1.0]), "svd", whole=True)
    assert found == {"participation_ratio": pytest.approx(49 / 21), "leading_over_median": 2.0}
    assert spectrum_numbers(np.ones(7), "svd", whole=True)["participation_ratio"] == pytest.approx(7)
    assert spectrum_numbers(np.array([3.0, 0, 0]), "svd", whole=True) == {
        "participation_ratio": 1.0,
        "leading_over_median": None,
    }
    assert spectrum_numbers(np.array([3.0, -1.0, -2.0, 1.0]), "eigh", whole=True)["negative"] == 0.5
    assert spectrum_numbers(np.array([3 + 4j, 5j]), "eig", whole=True)["participation_ratio"] == pytest.approx(2)
    assert set(spectrum_numbers(np.ones(3), "eigh", whole=False).values()) == {None}
    assert set(spectrum_numbers(np.zeros(3), "svd", whole=True).values()) == {None}


def test_the_numbers_of_the_original(golden):
    kad = golden("04_kad_unet_a")
    matrix = kad["out.J"].double().numpy()
    identity = np.eye(len(matrix))
    rounding = len(matrix) * 2**-24 * max(1, np.abs(matrix).max())  # of the matrix, which is stored in float32
    for name, whole in (("J", matrix), ("ImJ", identity - matrix)):
        result = matrix_numbers(whole)
        assert result["trace"] == pytest.approx(float(kad[f"out64.{name}.trace"]), abs=rounding)
        assert result["asymmetry"] == pytest.approx(float(kad[f"out64.{name}.asymmetry"]), abs=1e-6)
        squares = float((kad[f"out64.{name}.singular_values"] ** 2).sum())
        assert result["sum_of_squares"] == pytest.approx(squares, rel=1e-5)


def test_asymmetry_goes_from_0_to_2():
    matrix = rng().standard_normal((300, 300))  # more than one chunk
    assert matrix_numbers(matrix + matrix.T)["asymmetry"] == 0
    assert matrix_numbers(matrix - matrix.T)["asymmetry"] == pytest.approx(2)
    expected = np.linalg.norm(matrix - matrix.T) / np.linalg.norm(matrix)
    assert matrix_numbers(matrix)["asymmetry"] == pytest.approx(expected)
    assert matrix_numbers(np.zeros((3, 3)))["asymmetry"] is None


def test_the_frequency_of_waves():
    for rows, columns, expected in ((0, 0, 0.0), (0, 4, 1.0), (4, 0, 1.0), (4, 4, 2**0.5), (1, 0, 0.25), (3, 4, 1.25)):
        assert frequencies(wave(rows, columns), (1, 8, 8))[0] == pytest.approx(expected, abs=1e-9)
    both = np.concatenate([wave(0, 1), 2 * wave(0, 4)], axis=1)  # channels weigh by their energy
    # A cosine at Nyquist's frequency has twice the energy of one below it.
    assert frequencies(both, (2, 8, 8))[0] == pytest.approx((1 * 0.25 + 8 * 1.0) / 9)
    assert frequencies(np.zeros((1, 64)), (1, 8, 8))[0] == 0


def test_the_frequency_of_white_noise():
    noise = rng().standard_normal((600, 3 * 32 * 32))
    assert frequencies(noise, (3, 32, 32)).mean() == pytest.approx(0.77, abs=0.01)


def test_rank_correlations_share_ranks_among_equals():
    from scipy.stats import spearmanr

    first, second = rng("a").integers(0, 5, 40).astype(float), rng("b").integers(0, 5, 40).astype(float)
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert rank_correlation(np.arange(5.0), np.exp(np.arange(5.0))) == pytest.approx(1)
    assert rank_correlation(np.arange(5.0), -np.arange(5.0)) == pytest.approx(-1)
    assert rank_correlation(np.arange(5.0), np.ones(5)) is None
    assert rank_correlation(np.arange(2.0), np.arange(2.0)) is None


def test_cosines_in_the_order_of_their_frequency_are_harmonic():
    down, across = np.meshgrid(np.arange(8), np.arange(8), indexing="ij")
    basis = np.stack(
        [
            np.cos(np.pi * i * (down + 0.5) / 8) * np.cos(np.pi * j * (across + 0.5) / 8)
            for i in range(8)
            for j in range(8)
        ]
    ).reshape(64, 64)
    order = np.argsort([np.hypot(i, j) for i in range(8) for j in range(8)], kind="stable")
    values, basis = np.linspace(1, 0.1, 64), basis[order]
    assert harmonicity(values, frequencies(basis, (1, 8, 8))) > 0.9
    assert harmonicity(values, frequencies(basis[::-1], (1, 8, 8))) < -0.9
    shuffled = basis[:, rng().permutation(64)]
    assert abs(harmonicity(values, frequencies(shuffled, (1, 8, 8)))) < 0.3


def test_vectors_on_single_patches_are_harmonic_too():
    """The number does not tell waves from patches: Haar vectors on 2x2 patches are ordered by frequency as well."""
    kinds = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]).reshape(4, 2, 2) / 2
    basis = []
    for kind in kinds:
        for row, column in np.ndindex(8, 8):
            vector = np.zeros((16, 16))
            vector[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = kind
            basis.append(vector.ravel())
    basis = np.stack(basis)
    assert np.allclose(basis @ basis.T, np.eye(256))
    assert harmonicity(np.linspace(1, 0.5, 256), frequencies(basis, (1, 16, 16))) == pytest.approx(0.86, abs=0.01)


def test_negligible_and_trailing_vectors_do_not_count():
    values, rising = np.array([1.0, 0.5, 0.2, 1e-9, 1e-9]), np.array([0.1, 0.2, 0.3, 0.0, 0.0])
    assert harmonicity(values, rising) == pytest.approx(1)
    assert harmonicity(np.linspace(1, 0.5, 5), np.array([0.1, 0.2, 0.3, 0.0, 0.0])) < 0.1
    assert harmonicity(np.linspace(1, 0.5, 5), np.array([0.1, 0.2, 0.3, 0.0, 0.0]), leading=3) == pytest.approx(1)
    assert harmonicity(np.zeros(5), rising) is None


def test_participation_counts_pixels():
    vectors = np.zeros((3, *SHAPE))
    vectors[0, 0, 2, 3] = 5.0
    vectors[1, :, :2] = [[[1.0]], [[-2.0]]]  # a third of the pixels, in unequal channels
    vectors[2] = -1.0
    found = participation(vectors.reshape(3, -1), SHAPE)
    np.testing.assert_allclose(found, [1 / 48, 1 / 3, 1], atol=1e-12)


def test_edges_are_where_the_image_changes():
    image = np.zeros((2, 5, 10))
    image[1, :, 5:] = 1.0
    edges = edge_pixels(image, 0.2)
    np.testing.assert_array_equal(edges.reshape(5, 10).nonzero()[1], [4, 5] * 5)
    on, off, everywhere = np.zeros((3, 2, 5, 10))
    on[:, :, 4:6], off[:, :, :3], everywhere[:] = 1.0, 1.0, 1.0
    found = edge_energy(np.stack([on, off, everywhere]).reshape(3, -1), edges, (2, 5, 10))
    np.testing.assert_allclose(found, [5, 0, 1])
    assert edge_pixels(np.zeros((1, 1, 7)), 0.2).sum() == 2  # rounded up; a side of one pixel is no error


def test_channels_share_the_energy():
    vectors = np.zeros((2, *SHAPE))
    vectors[0, 0], vectors[0, 1], vectors[1, 1] = 1.0, 3.0, 2.0
    np.testing.assert_allclose(channel_shares(vectors.reshape(2, -1), SHAPE), [[0.1, 0.9], [0, 1]])


def test_correlations_with_an_image_ignore_sign_mean_and_length():
    image = rng().standard_normal(SHAPE)
    centred = (image - image.mean()).reshape(-1)
    other = rng("other").standard_normal(96)
    other -= other.mean()
    other -= (other @ centred) / (centred @ centred) * centred
    found = image_correlations(np.stack([3 - 2 * centred, other, np.ones(96), centred + other]), 5 + image)
    expected = np.linalg.norm(centred) / np.hypot(np.linalg.norm(centred), np.linalg.norm(other))
    np.testing.assert_allclose(found, [1, 0, 0, expected], atol=1e-9)


def test_shrinkage_of_the_oracle():
    np.testing.assert_allclose(oracle_shrinkage(np.array([0.0, 0.5, -1.0]), 0.5), [0, 0.5, 0.8])
    assert shrinkage_distance(np.array([1.0, 0.5]), np.array([0.0, 0.5])) == pytest.approx(0.5**0.5)
    assert shrinkage_distance(np.array([1j]), np.array([0.0])) == pytest.approx(1)


def test_alignment_of_pairs():
    left = np.array([[1.0, 0], [1.0, 0], [0.6, 0.8]])
    np.testing.assert_allclose(alignment(left, np.array([[-1.0, 0], [0, 1.0], [1.0, 0]])), [1, 0, 0.6])


def test_gaps_are_relative():
    assert relative_gap(np.array([3.0, 4.0]), np.array([3.0, 4.0])) == 0
    assert relative_gap(np.array([3.0, 4.0]), np.zeros(2)) == pytest.approx(1)
    assert relative_gap(np.zeros(2), np.ones(2)) is None
    assert relative_gap(np.array([0.0, 2.0]), np.array([0.0, 1.0])) == pytest.approx(0.5)


def test_the_identity_looks_at_one_pixel():
    found = sensitivity(np.eye(96), SHAPE, [(0, 0), (5, 7)])
    assert found.locality == (1, 1, 1)
    assert found.pixels == ((0, 0), (5, 7))
    assert found.maps[0, 0, 0] == found.maps[1, 5, 7] == 1
    np.testing.assert_allclose(found.maps.sum((1, 2)), 1)
    assert found.centred[5, 7] == 1
    assert found.centred.sum() == pytest.approx(1)


def test_no_pixel_named_is_the_middle_one():
    assert sensitivity(np.eye(96), SHAPE).pixels == ((3, 4),)


def blur(side: int, width: int) -> np.ndarray:
    """The mean over a window of that width, cut at the border, of one channel."""
    near = np.abs(np.arange(side)[:, None] - np.arange(side)) <= width // 2
    matrix = np.kron(near, near).astype(float)
    return matrix / matrix.sum(1, keepdims=True)


@pytest.mark.parametrize(("width", "expected"), [(3, (3, 3, 3)), (5, (5, 5, 5)), (7, (5, 7, 7))])
def test_a_box_blur_has_its_width(width, expected):
    # Inside, the w x w square holds all, the next smaller one (w - 2)^2 / w^2: 0.11, 0.36 and 0.51.
    found = sensitivity(blur(16, width), (1, 16, 16), [(8, 8)])
    np.testing.assert_array_equal(found.sizes[:, 8, 8], expected)
    # At a corner, cut by the border, the square still has the reach of the window.
    assert found.sizes[2, 0, 0] == width
    np.testing.assert_allclose(found.maps[0, 8 - width // 2 : 9 + width // 2, 8], 1 / width**2, rtol=1e-6)
    assert found.centred.sum() == pytest.approx(1, rel=1e-5)
    assert (found.centred > 0).sum() == width**2


def test_looking_everywhere_is_as_wide_as_the_image():
    found = sensitivity(np.ones((25, 25)), (1, 5, 5))
    # From the middle 1 + 8 pixels hold 36 % within 3 x 3, and 5 x 5 all.
    np.testing.assert_array_equal(found.sizes[:, 2, 2], [5, 5, 5])
    # From the corner squares of reach 0 .. 4 hold 1, 4, 9, 16, 25 of 25 pixels.
    np.testing.assert_array_equal(found.sizes[:, 0, 0], [7, 9, 9])
    np.testing.assert_allclose(found.maps, 1 / 25)


def test_channels_and_signs_add_up():
    # Output channel 0 of every pixel reads input channel 1 of the pixel to its right, with weight -2, and itself, 1.
    count = 48
    right = np.zeros((count, count))
    for pixel in range(count):
        if pixel % 8 < 7:
            right[pixel, pixel + 1] = -2.0
    matrix = np.block([[np.eye(count), right], [np.zeros((count, 2 * count))]])
    found = sensitivity(matrix, SHAPE, [(2, 3)])
    assert found.maps[0, 2, 3] == pytest.approx(1 / 3)
    assert found.maps[0, 2, 4] == pytest.approx(2 / 3)
    np.testing.assert_array_equal(found.sizes[:, 2, 3], [3, 3, 3])
    np.testing.assert_array_equal(found.sizes[:, 2, 7], [1, 1, 1])


def test_a_pixel_that_depends_on_nothing():
    found = sensitivity(np.diag([1.0, 0, 0, 1.0]), (1, 2, 2), [(0, 1)])
    np.testing.assert_array_equal(found.sizes[0], [[1, 0], [0, 1]])
    assert not found.maps.any()
    assert found.centred.sum() == 1


def test_spectra_are_compared_up_to_a_factor():
    values = np.array([4.0, 2.0, 1.0, 1.0])
    assert spectral_distance(values, 3 * values[::-1]) == 0
    assert spectral_distance(np.array([1.0, 0, 0, 0]), np.ones(4)) == pytest.approx(0.75)
    assert spectral_distance(np.array([1.0]), np.ones(4)) == pytest.approx(0.75)
    assert spectral_distance(values, np.array([3.0, 3.0, 1.0, 1.0])) == pytest.approx(0.125)
    assert spectral_distance(np.array([1j, -1.0]), np.ones(2)) == 0
