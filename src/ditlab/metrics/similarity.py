"""How alike two images are: the cosine between them, as a rule about their means, R^2 and the mean squared error.

Sources: Kamb and Ganguli (2412.20292), whose agreement is the mean-removed cosine (their code calls it r^2, but it is
the correlation); Lukoianov et al. (2509.09672), whose agreement is R^2; Kadkhodaie et al. (2310.02557), who compare
samples and training images by the mean-removed cosine.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Num


def unit_vectors(images: Num[np.ndarray, "n c h w"], *, mean_removed: bool = True) -> Float[np.ndarray, "n d"]:
    """Images as vectors of length 1, float64, with each image's mean over all its values taken off first or not.

    One that has no length (a flat one, about its mean) stays zero.
    """
    flat = images.reshape(len(images), -1).astype(np.float64)
    if mean_removed:
        # Of a flat image the mean is not always exact, and the rest must not be taken for a direction.
        flat = np.where(np.ptp(flat, axis=1, keepdims=True) > 0, flat - flat.mean(1, keepdims=True), 0.0)
    length = np.linalg.norm(flat, axis=1, keepdims=True)
    return flat / np.where(length > 0, length, 1.0)


def cosines(
    first: Num[np.ndarray, "n c h w"], second: Num[np.ndarray, "n c h w"], *, mean_removed: bool = True
) -> Float[np.ndarray, " n"]:
    """The cosine between the images of each pair, float64 in [-1, 1]; about their means it is the correlation."""
    a, b = (unit_vectors(images, mean_removed=mean_removed) for images in (first, second))
    return (a * b).sum(1).clip(-1, 1)


def mean_squares(first: Num[np.ndarray, "n c h w"], second: Num[np.ndarray, "n c h w"]) -> Float[np.ndarray, " n"]:
    """The mean squared difference of the images of each pair, float64."""
    return np.square(first.astype(np.float64) - second).reshape(len(first), -1).mean(1)


def r_squared(first: Num[np.ndarray, "n c h w"], second: Num[np.ndarray, "n c h w"]) -> Float[np.ndarray, " n"]:
    """1 - |x - y|^2 / (n Var y) of each pair (x, y), float64: 1 where equal, 0 where x is no nearer than y's own mean.

    Where y is flat it is 0.
    """
    variance = second.reshape(len(second), -1).astype(np.float64).var(1)
    share = mean_squares(first, second) / np.where(variance > 0, variance, 1.0)
    return np.where(variance > 0, 1 - share, 0.0)
