"""What is kept of a denoiser's Jacobian: settings, the numbers of each (image, noise level), and some of its vectors.

The Jacobian of a target at one noisy image y = x0 + sigma n is a D x D matrix, D = C H W, rows output values, columns
input values. The three targets are affine functions of one another (D(y) the denoised image, x_t = scale * y what a VP
network sees, eps the estimated unit noise):

    x0      dD/dy                    = sigma^-2 Cov[x0 | y] of the optimal denoiser: symmetric, shrinkages in [0, 1]
    eps     d eps / d x_t            = (I - dD/dy) / (sigma * scale): An et al.'s, their Eq. 5
    I-eps   I - d eps / d x_t        the other reading of their figures (which of the two they drew is not known)

So the leading directions of x0, the signal, are the trailing ones of eps.

Sources: An et al. 2410.21273 (Eq. 5, Figs. 1-3); Kadkhodaie et al., ICLR 2024 (shrinkage, effective dimensionalities);
Niedoba et al. 2411.19339 (sensitivity, locality sizes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ditlab.analysis.psnr import RunFacts

Target = Literal["x0", "eps", "I-eps"]
Decomposition = Literal["svd", "eigh", "eig"]

SHARES = (0.5, 0.75, 0.95)
"""Shares of a pixel's sensitivity whose squares are measured (Niedoba et al.)."""


@dataclass(frozen=True)
class JacobianConfig:
    """Which Jacobians are taken, and how."""

    images: tuple[int, ...] = (0,)
    """Which images of their side, from 0."""
    levels: tuple[float, ...] | None = None
    """Noise levels (sigma), ascending; that of step 100 of the DDPM process (0.34) where not given. The papers name
    none for their figures."""
    steps: tuple[int, ...] | None = None
    """Noise levels as steps of the run's own process, ascending, instead of --levels."""
    target: Target = "x0"
    """Whose Jacobian: the denoised image's by the noisy one (x0), the estimated noise's by x_t (eps), or I minus
    that."""
    decomposition: Decomposition = "svd"
    """Singular vectors (svd), eigenvectors of the symmetric part (eigh), or of the matrix itself (eig)."""
    top: int = 0
    """Only so many leading values and vectors, from products with the matrix, which is never held; 0 for the whole
    matrix and all of them."""
    show: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64, 112, 224)
    """Which vectors are kept and drawn, from 0, the leading one; those that do not exist are left out."""
    pixels: tuple[tuple[int, int], ...] = ()
    """Output pixels (row, column) whose sensitivity is kept and drawn; the middle one where none is given."""
    mode: Literal["auto", "forward", "reverse"] = "auto"
    """How the whole matrix is made: columns by forward mode, rows by reverse mode, or the faster of the two as a few
    rows and columns show."""
    chunk: int = 16
    """Rows or columns at once, which bounds the memory. Does not change the result beyond float rounding."""
    step_size: float = 0.1
    """Length of the random step of r_lin, as a share of the noise."""
    noise_seed: int = 0
    """Seed of the noise. Equal seeds give every denoiser the same noise."""


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """How much each output pixel depends on each input pixel: sums of |J| over both pixels' channels."""

    pixels: tuple[tuple[int, int], ...]
    """Output pixels (row, column) that `maps` are of."""
    maps: np.ndarray
    """float32 [pixels, H, W]; each sums to 1."""
    centred: np.ndarray
    """float32 [2H - 1, 2W - 1]: mean over all output pixels of their maps, shifted so that the output pixel is in the
    middle."""
    sizes: np.ndarray
    """float32 [shares, H, W]: side of the smallest square centred at each output pixel, cut at the border, that holds
    that share (`SHARES`) of its map."""

    @property
    def locality(self) -> tuple[float, ...]:
        """Mean side over the output pixels, in pixels, one for each share."""
        return tuple(float(size.mean()) for size in self.sizes)


@dataclass(frozen=True, eq=False)
class JacobianPoint:
    """One Jacobian: of one image at one noise level."""

    image: int
    """Place on its side."""
    sigma: float
    timestep: int | None
    """The step of the denoiser's own process with this level; None where it has no numbered ones."""
    clean: np.ndarray
    """float32 [C, H, W], x0."""
    noisy: np.ndarray
    """float32 [C, H, W], y = x0 + sigma n."""
    denoised: np.ndarray
    """float32 [C, H, W], D(y)."""
    values: np.ndarray
    """float64 [K], complex128 for `eig`: singular values or eigenvalues, largest first (by modulus for eig)."""
    residuals: np.ndarray
    """float64 [K]: |J v - s u| (svd), |S v - l v| (eigh), |J v - l v| (eig), vectors of length 1."""
    shown: np.ndarray
    """int64 [G]: which vectors are kept."""
    left: np.ndarray
    """float32 [G, C, H, W]: left singular vectors (directions of the output); the eigenvectors for eigh; for eig the
    real part of the right eigenvectors turned so that it is as long as can be. Length 1, sign: largest entry > 0."""
    right: np.ndarray
    """float32 [G, C, H, W]: right singular vectors (directions of the input), signed as J pairs them; else as left."""
    by_vector: Mapping[str, np.ndarray]
    """Measure -> float64 [K], one value a vector (`ditlab.analysis.jacobian_measures`)."""
    channels: np.ndarray
    """float64 [K, C]: share of each vector's energy in each channel; rows sum to 1."""
    numbers: Mapping[str, float | None]
    """Measures of the whole Jacobian (`jacobian_measures`); None where one needs more than was computed."""
    sensitivity: Sensitivity | None = None
    """Needs the whole matrix, target x0."""
    wiener: Sensitivity | None = None
    """The same of the Wiener denoiser of the training images, at this level."""


@dataclass(frozen=True, eq=False)
class JacobianResult:
    """The Jacobians of one denoiser."""

    about: RunFacts
    config: JacobianConfig
    points: tuple[JacobianPoint, ...]
    """Image after image, each at all levels ascending."""

    kind = "jacobian"
    version = 1
