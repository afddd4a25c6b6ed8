"""The peak signal-to-noise ratio of a denoiser's estimates by noise level.

An et al. (2410.21273), Eq. 4: PSNR(sigma) = 10 log10(M^2 / ((1/K) sum_k MSE_k)), with M the intensity range
(2 for images in [-1, 1]). Kadkhodaie et al. (2310.02557) average the PSNR of each image instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor

from ditlab.diffusion.denoisers import Denoiser
from ditlab.metrics.denoising_errors import denoising_errors
from ditlab.metrics.reduction import Reduction

EXACT_DB = 100.0
"""An estimate nearer than this many dB is counted as exactly this near. Only a denoiser that returns a stored training
image gets there (8-bit images are themselves rounded at 59 dB), and without a bound its average would be infinite."""


RESAMPLES = 2000
"""Draws of a bootstrap over images."""


def mse_floor(peak: float) -> float:
    """Returns the mean squared error that counts as exact: `EXACT_DB` below the peak."""
    return peak**2 * 10 ** (-EXACT_DB / 10)


def psnr_of(mse: np.ndarray, peak: float, reduction: Reduction = "mse_mean") -> np.ndarray:
    """PSNR in dB at each level, float64 [L] up to `EXACT_DB`, from per-image errors.

    Args:
        mse: float64 [L, images, draws], mean squared errors.
        peak: the intensity range M.
        reduction: "mse_mean" takes the mean error inside the logarithm (An et al. Eq. 4), "psnr_mean" the mean of the
            logarithms (Kadkhodaie et al.); by Jensen's inequality the first is never above the second.
    """
    floor = mse_floor(peak)
    if reduction == "mse_mean":
        return 10 * np.log10(peak**2 / np.maximum(mse.mean(axis=(1, 2)), floor))
    return (10 * np.log10(peak**2 / np.maximum(mse, floor))).mean(axis=(1, 2))


def resampling_weights(images: int, rng: np.random.Generator) -> np.ndarray:
    """Returns how often each image is drawn by a bootstrap of `RESAMPLES` draws, as shares: float64 [R, images]."""
    return rng.multinomial(images, np.full(images, 1 / images), RESAMPLES) / images


def resampled_psnr(mse: np.ndarray, weights: np.ndarray, peak: float, reduction: Reduction = "mse_mean") -> np.ndarray:
    """Returns the PSNR in dB of images drawn again with replacement, for a bootstrap.

    Args:
        mse: float64 [L, images, draws], mean squared errors.
        weights: float64 [R, images], how often each image is drawn, as shares that sum to 1.
        peak: the intensity range M.
        reduction: as in `psnr_of`.

    Returns:
        float64 [R, L].
    """
    if reduction == "psnr_mean":
        return weights @ np.stack([psnr_of(mse[:, [i]], peak, reduction) for i in range(mse.shape[1])])
    return 10 * np.log10(peak**2 / np.maximum(weights @ mse.mean(2).T, mse_floor(peak)))


@dataclass(frozen=True)
class PSNRPoint:
    """One point of a training trajectory: averages over levels, in dB."""

    train: float
    test: float
    gap: float
    """Mean of the gap truncated at each level; at least train - test."""


def psnr_point(
    denoiser: Denoiser,
    train_images: Float[Tensor, "n c h w"],
    test_images: Float[Tensor, "m c h w"],
    levels: Sequence[float],
    noise_seed: int = 0,
    *,
    train_labels: Int64[Tensor, " n"] | None = None,
    test_labels: Int64[Tensor, " m"] | None = None,
) -> PSNRPoint:
    """Train and test PSNR and their gap averaged over a few levels, one noise draw: what a training run logs.

    Arguments as `denoising_errors`; both sides share the noise. Cost: one forward pass per image and level.
    """
    train, test = (
        psnr_of(denoising_errors(denoiser, images, levels, noise_seed=noise_seed, labels=labels), denoiser.peak)
        for images, labels in ((train_images, train_labels), (test_images, test_labels))
    )
    return PSNRPoint(float(train.mean()), float(test.mean()), float(np.maximum(train - test, 0.0).mean()))
