"""Numbers of a Jacobian: of the whole matrix, of each vector, of each pixel. Pure NumPy.

Vectors are images: rows of D = C H W values, channel by channel, row by row. Singular vectors are the left ones,
directions of the output.

Sources: Kadkhodaie et al., ICLR 2024 (trace as a dimensionality, shrinkage and its oracle); Mohan et al. 2020 (sum of
squared singular values); An et al. 2410.21273 and its later version (harmonic vectors, and where they do not describe
the computation: `homogeneity_gap`); Niedoba et al. 2411.19339 (sensitivity, locality sizes). Participation ratios,
frequencies, edges and rank correlations as measures of "sparse", "harmonic" and "geometry-adaptive" are ditlab's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from ditlab.analyses.jacobian.config import DecompositionKind
from ditlab.analyses.jacobian.result import SHARES, Sensitivity

Shape = tuple[int, int, int]
"""(C, H, W)."""

NEGLIGIBLE = 1e-5
"""Values below this share of the largest one are rounding noise of float32, and so are their vectors."""
LEADING = 64
"""The number of vectors that count as the leading ones."""
EDGE_SHARE = 0.2
"""The share of pixels, those with the largest gradient, that count as edges."""
_CHUNK = 256


def spectrum_numbers(values: np.ndarray, kind: DecompositionKind, *, whole: bool) -> dict[str, float | None]:
    """Returns measures of a spectrum; those that need all values are None if only the leading ones are known.

    participation_ratio: (sum l)^2 / sum l^2 of the moduli, how many values count (D if all are equal).
    leading_over_median: largest modulus over the median; None if the median is negligible (`NEGLIGIBLE`).
    negative: share of values below zero, for `eigh`.
    """
    moduli = np.abs(values)
    numbers: dict[str, float | None] = dict.fromkeys(("participation_ratio", "leading_over_median"))
    if whole:
        squares, median, largest = float((moduli**2).sum()), float(np.median(moduli)), float(moduli.max())
        numbers["participation_ratio"] = float(moduli.sum() ** 2 / squares) if squares else None
        numbers["leading_over_median"] = largest / median if median > NEGLIGIBLE * largest else None
    if kind == "eigh":
        numbers["negative"] = float((values < 0).mean()) if whole else None
    return numbers


def matrix_numbers(matrix: Float[np.ndarray, "d d"]) -> dict[str, float | None]:
    """Returns measures of the matrix itself.

    trace: sum of its eigenvalues, Kadkhodaie et al.'s effective dimensionality.
    sum_of_squares: squared Frobenius norm, the sum of squared singular values, Mohan et al.'s.
    asymmetry: |J - J^T|_F / |J|_F, 0 for a symmetric matrix, 2 for an antisymmetric one; None for zero.
    """
    squares = difference = 0.0
    for start in range(0, len(matrix), _CHUNK):
        part = matrix[start : start + _CHUNK].astype(np.float64)
        squares += float((part**2).sum())
        difference += float(((part - matrix[:, start : start + _CHUNK].T) ** 2).sum())
    return {
        "trace": float(np.trace(matrix, dtype=np.float64)),
        "sum_of_squares": squares,
        "asymmetry": float(np.sqrt(difference / squares)) if squares else None,
    }


def frequencies(vectors: Float[np.ndarray, "k d"], shape: Shape) -> Float[np.ndarray, " k"]:
    """Returns the mean radial frequency of each vector, as a share of the Nyquist frequency, float64 [K].

    The mean of sqrt(fx^2 + fy^2) over the vector's power spectrum, summed over channels; fx and fy are 1 for a wave of
    two pixels. So 0 is a constant, 1 is stripes of single pixels, sqrt(2) a chequerboard; white noise has about 0.77.
    """
    _, height, width = shape
    rows, columns = 2 * np.fft.fftfreq(height)[:, None], 2 * np.fft.fftfreq(width)[None, :]
    radius = np.sqrt(rows**2 + columns**2)
    means = np.empty(len(vectors))
    for start in range(0, len(vectors), _CHUNK):
        images = vectors[start : start + _CHUNK].reshape(-1, *shape)
        power = (np.abs(np.fft.fft2(images)) ** 2).sum(1)
        means[start : start + _CHUNK] = _ratio((power * radius).sum((1, 2)), power.sum((1, 2)))
    return means


def rank_correlation(first: Float[np.ndarray, " k"], second: Float[np.ndarray, " k"]) -> float | None:
    """Returns Spearman's correlation: Pearson's of the ranks, with the mean rank for equal values. None if a side is
    constant, or has fewer than three values."""
    if len(first) < 3:
        return None
    ranks = []
    for values in (first, second):
        _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
        rank = (np.cumsum(counts) - (counts - 1) / 2)[place]
        ranks.append(rank - rank.mean())
    lengths = float(np.linalg.norm(ranks[0]) * np.linalg.norm(ranks[1]))
    return float(ranks[0] @ ranks[1]) / lengths if lengths > 1e-12 else None


def harmonicity(values: np.ndarray, frequency: Float[np.ndarray, " k"], leading: int | None = None) -> float | None:
    """Returns the rank correlation of the vectors' frequency with their index: 1 if frequencies rise as values fall.

    Vectors with a negligible value (`NEGLIGIBLE`) are arbitrary and left out. The order of vectors with equal values is
    arbitrary too, which lowers the correlation. None if fewer than three vectors remain, of the `leading` ones if that
    is given.
    """
    moduli = np.abs(values)
    places = np.flatnonzero(moduli > NEGLIGIBLE * moduli.max(initial=0.0))[:leading]
    return rank_correlation(places.astype(np.float64), frequency[places])


def participation(vectors: Float[np.ndarray, "k d"], shape: Shape) -> Float[np.ndarray, " k"]:
    """Returns the share of the pixels that a vector covers, float64 [K] in (0, 1]: (sum_p e_p^2)^2 / sum_p e_p^4 / P.

    e_p^2 is summed over the channels of a pixel, P is their number: 1 for energy spread evenly, 1 / P for one pixel.
    """
    energy = _energy(vectors, shape)
    pixels = energy.shape[1]
    return _ratio(energy.sum(1) ** 2, (energy**2).sum(1) * pixels)


def edge_pixels(image: Float[np.ndarray, "c h w"], share: float = EDGE_SHARE) -> np.ndarray:
    """Returns which pixels have the largest gradient, bool [H * W]; `share` of them, rounded up.

    The gradient is sqrt(sum over channels of gx^2 + gy^2) of central differences, one-sided at the border. A side of
    one pixel has none.
    """
    squares = np.zeros(image.shape[1:])
    for axis in (1, 2):
        if image.shape[axis] > 1:
            squares += (np.gradient(image.astype(np.float64), axis=axis) ** 2).sum(0)
    flat = squares.reshape(-1)
    marked = np.zeros(flat.size, dtype=bool)
    marked[np.argsort(-flat, kind="stable")[: int(np.ceil(share * flat.size))]] = True
    return marked


def edge_energy(vectors: Float[np.ndarray, "k d"], edges: np.ndarray, shape: Shape) -> Float[np.ndarray, " k"]:
    """Returns the share of each vector's energy on the marked pixels over their share of all pixels, float64 [K].

    1 if edges (`edge_pixels`) are not preferred, more if they are; at most 1 / share.
    """
    energy = _energy(vectors, shape)
    return _ratio(energy[:, edges].sum(1), energy.sum(1)) / edges.mean()


def channel_shares(vectors: Float[np.ndarray, "k d"], shape: Shape) -> Float[np.ndarray, "k c"]:
    """Returns the share of each vector's energy in each channel, float64 [K, C]; rows sum to 1."""
    energy = (vectors.reshape(len(vectors), shape[0], -1) ** 2).sum(2)
    return _ratio(energy, energy.sum(1, keepdims=True))


def image_correlations(vectors: Float[np.ndarray, "k d"], image: Float[np.ndarray, "c h w"]) -> Float[np.ndarray, " k"]:
    """Returns |correlation| of each vector with an image over all values, means removed, float64 [K] in [0, 1].

    0 if a side is constant."""
    flat = image.reshape(-1).astype(np.float64)
    flat = flat - flat.mean()
    centred = vectors - vectors.mean(1, keepdims=True)
    lengths = np.linalg.norm(centred, axis=1)
    # A constant vector without its mean is rounding noise.
    lengths[lengths < 1e-9 * np.linalg.norm(vectors, axis=1)] = 0.0
    return np.minimum(_ratio(np.abs(centred @ flat), lengths * np.linalg.norm(flat)), 1.0)


def oracle_shrinkage(coefficients: Float[np.ndarray, " k"], sigma: float) -> Float[np.ndarray, " k"]:
    """Returns <x, e>^2 / (<x, e>^2 + sigma^2), float64 [K]: the factor by which an oracle that knows the clean image
    shrinks the coefficients of the noisy image (Kadkhodaie et al.)."""
    squares = coefficients**2
    return squares / (squares + sigma**2)


def shrinkage_distance(values: np.ndarray, oracle: Float[np.ndarray, " k"]) -> float:
    """Returns the root mean square of (value - oracle's shrinkage) over the vectors: 0 for the oracle's denoiser."""
    return float(np.sqrt((np.abs(values - oracle) ** 2).mean()))


def alignment(left: Float[np.ndarray, "k d"], right: Float[np.ndarray, "k d"]) -> Float[np.ndarray, " k"]:
    """Returns |u . v| of each pair of singular vectors, float64 [K]: 1 for a symmetric matrix with distinct values."""
    return np.abs((left * right).sum(1))


def relative_gap(exact: Float[np.ndarray, " d"], product: Float[np.ndarray, " d"]) -> float | None:
    """Returns |f - J x| / |f|; None for f = 0.

    With f = f(x) it is r_hom: 0 if f(x) = J x, so that vectors describe the computation. With f = f(x + d) - f(x) and
    the product J d it is r_lin: 0 if f is linear as far as d reaches.
    """
    length = float(np.linalg.norm(exact))
    return float(np.linalg.norm(exact - product)) / length if length else None


def sensitivity(matrix: Float[np.ndarray, "d d"], shape: Shape, pixels: Sequence[tuple[int, int]] = ()) -> Sensitivity:
    """Measures how much each output pixel depends on each input pixel, and how near those are (Niedoba et al.).

    A pixel that depends on nothing has a map of zeros and the size 0. It does not count in the centred mean. The maps
    of `pixels`, (row, column) each, are saved; the middle one's if there are none. Rows of the matrix are outputs.
    """
    channels, height, width = shape
    count = height * width
    blocks = matrix.reshape(channels, count, channels, count)
    maps = np.zeros((count, count))
    for out in range(channels):
        for into in range(channels):
            maps += np.abs(blocks[out, :, into])
    totals = maps.sum(1, keepdims=True)
    maps = _ratio(maps, totals)
    alive = int((totals > 0).sum())
    centred = np.zeros((2 * height - 1, 2 * width - 1))
    sizes = np.zeros((len(SHARES), height, width), dtype=np.float32)
    rows, columns = np.divmod(np.arange(count), width)
    for place, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        picture = maps[place].reshape(height, width)
        top, left = height - 1 - row, width - 1 - column
        centred[top : top + height, left : left + width] += picture
        if not totals[place, 0] > 0:
            continue
        # The Chebyshev distance of each pixel is the reach of the square that first holds it.
        reach = np.maximum(np.abs(rows - row), np.abs(columns - column))
        held = np.cumsum(np.bincount(reach, maps[place]))
        for which, share in enumerate(SHARES):
            sizes[which, row, column] = 2 * int(np.argmax(held >= share - 1e-9)) + 1
    places = tuple(pixels) or ((height // 2, width // 2),)
    return Sensitivity(
        pixels=places,
        maps=np.stack([maps[row * width + column].reshape(height, width) for row, column in places]).astype(np.float32),
        centred=(centred / max(alive, 1)).astype(np.float32),
        sizes=sizes,
    )


def spectral_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the distance of two normalized spectra, in [0, 1]: half the L1 distance of moduli over their sum.

    It is the share of the sum that would have to move to other ranks: 0 for spectra that differ only by a factor, near
    1 for a single value against many. The shorter spectrum is filled up with zeros, so compare whole spectra, or
    equally many leading values.
    """
    length = max(len(first), len(second))
    padded = []
    for values in (first, second):
        moduli = np.zeros(length)
        moduli[: len(values)] = np.sort(np.abs(values))[::-1]
        padded.append(_ratio(moduli, moduli.sum(keepdims=True)))
    return float(np.abs(padded[0] - padded[1]).sum() / 2)


def _energy(vectors: np.ndarray, shape: Shape) -> np.ndarray:
    """Returns squares summed over channels, [K, pixels]."""
    return (vectors.reshape(len(vectors), shape[0], -1) ** 2).sum(1)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Returns above / below, 0 where below is 0."""
    return np.where(below > 0, above / np.where(below > 0, below, 1.0), 0.0)
