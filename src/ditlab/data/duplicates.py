"""Near-duplicates: pairs of images whose small grey versions are almost the same up to brightness and contrast.

Every image is averaged over its channels, reduced by areas to at most 20x20, its mean removed, and scaled to unit
length; two images are near-duplicates where the inner product (Pearson correlation) exceeds a threshold. The products
are taken in tiles, so memory stays bounded while time grows with the square of the number of images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ditlab.progress import Bar

__all__ = ["NearDuplicates", "area_weights", "find_near_duplicates", "thumbnails"]

SIDE = 20
ROWS, COLUMNS = 2048, 8192


@dataclass(frozen=True)
class NearDuplicates:
    """The result of the search.

    Attributes:
        threshold: pairs with a correlation above this were counted.
        searched: how many images were compared with one another, the first of the set.
        pairs, images: numbers of pairs, and of images that are in at least one.
        across_pools: number of pairs of one train-pool and one test-pool image.
        examples: the most similar pairs, (index, index, correlation), at most 100, best first.
    """

    threshold: float
    searched: int
    pairs: int
    images: int
    across_pools: int
    examples: tuple[tuple[int, int, float], ...]


def area_weights(source: int, target: int) -> np.ndarray:
    """Returns the matrix [target, source] that averages `source` samples over `target` equal intervals."""
    edges = np.linspace(0, source, target + 1)
    low, high = np.arange(source), np.arange(1, source + 1)
    overlap = np.minimum(edges[1:, None], high) - np.maximum(edges[:-1, None], low)
    return (overlap.clip(0) * target / source).astype(np.float32)


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Returns unit-length, mean-free grey thumbnails float32 [N, D], D at most 400, of uint8 images [N, C, H, W].

    A flat image, which has no shape to compare, gives zeros.
    """
    height, width = images.shape[2:]
    rows, columns = area_weights(height, min(SIDE, height)), area_weights(width, min(SIDE, width))
    small = np.empty((len(images), len(rows) * len(columns)), np.float32)
    for start in range(0, len(images), 1024):
        grey = images[start : start + 1024].mean(axis=1, dtype=np.float32)
        small[start : start + 1024] = (rows @ grey @ columns.T).reshape(len(grey), -1)
    small -= small.mean(axis=1, keepdims=True)
    length = np.linalg.norm(small, axis=1, keepdims=True)
    # Below a standard deviation of 0.5 grey levels only rounding is left.
    flat = length < 0.5 * small.shape[1] ** 0.5
    return np.where(flat, 0.0, small / np.where(flat, 1.0, length)).astype(np.float32)


def find_near_duplicates(
    images: np.ndarray, pool: np.ndarray | None, *, threshold: float, limit: int, progress: Bar | None = None
) -> NearDuplicates:
    """Compares the first `limit` images, uint8 [N, C, H, W], with one another: 20,000 take seconds, 100,000 minutes.

    Pairs with a correlation above `threshold` are counted. `pool`: uint8 [N] (0 train, 1 test) or None.
    """
    small = thumbnails(images[:limit])
    count = len(small)
    pairs = across = 0
    involved = np.zeros(count, bool)
    best: list[tuple[float, int, int]] = []
    for top in range(0, count, ROWS):
        for left in range(top, count, COLUMNS):
            products = small[top : top + ROWS] @ small[left : left + COLUMNS].T
            first, second = np.nonzero(products > threshold)
            correlation = products[first, second]
            first, second = first + top, second + left
            once = first < second
            first, second, correlation = first[once], second[once], correlation[once]
            pairs += len(first)
            involved[first] = involved[second] = True
            if pool is not None:
                across += int((pool[first] != pool[second]).sum())
            strongest = np.argsort(-correlation, kind="stable")[:100]
            best += [(float(correlation[k]), int(first[k]), int(second[k])) for k in strongest]
            best = sorted(best, key=lambda pair: (-pair[0], *pair[1:]))[:100]
        if progress is not None:
            progress(min(top + ROWS, count), count)
    examples = tuple((first, second, round(correlation, 4)) for correlation, first, second in best)
    return NearDuplicates(threshold, count, pairs, int(involved.sum()), across, examples)
