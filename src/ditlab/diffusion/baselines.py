"""Baselines: denoisers in closed form, made of a set of images x_1 .. x_N.

    empirical Bayes     sum_i w_i x_i,  w = softmax_i(-|y - x_i|^2 / 2 sigma^2)
    Wiener              m + U diag(l / (l + sigma^2)) U^T (y - m),  covariance U diag(l) U^T
    Wiener-locality     empirical Bayes for each value, by the distance on those values that Wiener's matrix links to it

The first is the optimal denoiser of the images themselves and the limit of memorization, the second the optimal linear
denoiser. Baselines with windows are in `ditlab.diffusion.local_scores`.

Sources: Kamb and Ganguli 2024 (2412.20292), the ideal score; Wang and Vastola 2023 (Gaussian score); Lukoianov et al.
2025 (2509.09672).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ditlab.diffusion.denoisers import Denoiser, Prediction
from ditlab.diffusion.noise_levels import LevelRange
from ditlab.errors import DitlabError

__all__ = [
    "ByLevelDenoiser",
    "EmpiricalBayesDenoiser",
    "SoftmaxMean",
    "WienerDenoiser",
    "WienerLocalityDenoiser",
    "check_images",
]


class EmpiricalBayesDenoiser(Denoiser):
    """E[x0 | y] for x0 uniform over N images: their mean under softmax(-|y - x_i|^2 / 2 sigma^2).

    As sigma goes to 0 it becomes the nearest image (the mean of the nearest ones at equal distance).

    Args:
        images: [N, C, H, W] in [-1, 1]; they stay on their device, and y has to be on it too.
        chunk: number of images processed at a time; it limits the memory and does not change the result.
    """

    def __init__(self, images: Float[Tensor, "n c h w"], chunk: int = 1024) -> None:
        check_images("empirical Bayes", images, chunk)
        self.images, self.chunk = images.flatten(1), chunk
        self.half_norms = torch.cat([part.double().square().sum(1) / 2 for part in self.images.split(chunk)])
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        self.levels = LevelRange(0.0, math.inf)
        self.device = images.device

    def estimate(self, y: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Prediction:
        flat = y.flatten(1).double()
        variance = (sigma.double().reshape(-1, 1) if isinstance(sigma, Tensor) else sigma) ** 2
        mean = SoftmaxMean()
        for images, half_norms in zip(self.images.split(self.chunk), self.half_norms.split(self.chunk), strict=True):
            wide = images.double()
            # -|y - x|^2 / 2 sigma^2 up to a constant of all images.
            mean.add((flat @ wide.T - half_norms) / variance, wide)
        x0 = mean.result().reshape(y.shape).to(y.dtype)
        return Prediction(x0, (y - x0) / sigma, None)


class WienerDenoiser(Denoiser):
    """The best linear denoiser: m + U diag(l / (l + sigma^2)) U^T (y - m), from the images' mean and covariance.

    The covariance is the population covariance of the N images (divided by N), so no linear denoiser has a smaller mean
    squared error on them.

    Args:
        images: [N, C, H, W] in [-1, 1]; the denoiser is on their device.
        chunk: number of images processed at a time when the covariance is summed.

    Attributes:
        mean: float64 [D], D = C H W.
        variances: float64 [K], the positive eigenvalues l of the covariance, descending, K <= min(N - 1, D).
        basis: float64 [D, K], their eigenvectors.
    """

    def __init__(self, images: Float[Tensor, "n c h w"], chunk: int = 1024) -> None:
        check_images("Wiener", images, chunk)
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        self.levels = LevelRange(0.0, math.inf)
        self.device = images.device
        flat = images.flatten(1)
        count, size = flat.shape
        self.mean = sum((part.double().sum(0) for part in flat.split(chunk)), flat.new_zeros(size).double()) / count
        if count > size:
            covariance = flat.new_zeros(size, size).double()
            for part in flat.split(chunk):
                centred = part.double() - self.mean
                covariance.addmm_(centred.T, centred, alpha=1 / count)
            variances, basis = torch.linalg.eigh(covariance)
        else:
            # With fewer images than values, the N x N matrix of inner products has the same eigenvalues.
            centred = flat.double() - self.mean
            variances, small = torch.linalg.eigh(centred @ centred.T / count)
            basis = torch.nn.functional.normalize(centred.T @ small, dim=0)
        # Directions without variance are rounding noise; their estimate is 0 at every level.
        positive = variances > variances[-1].clamp(min=0) * max(count, size) * torch.finfo(torch.float64).eps
        self.variances, self.basis = variances[positive].flip(0), basis[:, positive].flip(1)

    def estimate(self, y: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Prediction:
        variance = (sigma.double().reshape(-1, 1) if isinstance(sigma, Tensor) else sigma) ** 2
        coefficients = (y.flatten(1).double() - self.mean) @ self.basis
        shrunk = coefficients * (self.variances / (self.variances + variance))
        x0 = (self.mean + shrunk @ self.basis.T).reshape(y.shape).to(y.dtype)
        return Prediction(x0, (y - x0) / sigma, None)


class ByLevelDenoiser(Denoiser):
    """Base of baselines that estimate images of one noise level at a time."""

    @abstractmethod
    def _x0(self, y: Tensor, sigma: float) -> Tensor:
        """Returns the estimates at one level, float64 [B, C, H, W]."""

    def estimate(self, y: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Prediction:
        if isinstance(sigma, Tensor):
            levels, which = sigma.reshape(-1).unique(return_inverse=True)
            places = [(which == i).nonzero()[:, 0] for i in range(len(levels))]
            parts = [self._x0(y[place], float(level)) for place, level in zip(places, levels, strict=True)]
            x0 = torch.cat(parts)[torch.cat(places).argsort()].to(y.dtype)
        else:
            x0 = self._x0(y, sigma).to(y.dtype)
        return Prediction(x0, (y - x0) / sigma, None)


class WienerLocalityDenoiser(ByLevelDenoiser):
    """Each value of x0 is the mean of that value over the images, weighted by their distance to y on its mask.

    At level sigma the mask of the value q (a channel of a pixel) holds q and all values p with |L_qp / L_qq| at least
    `threshold` times the largest of these ratios; L = U diag(l / (l + sigma^2)) U^T is the Wiener denoiser's matrix.
    The weights are softmax(-(1 / 2 sigma^2) sum_p (y_p - x_ip)^2) over the images i. (The released code sums over the
    columns of the mask. Here it is rows, as in the paper: the values that q depends on.)

    Args:
        images: [N, C, H, W] in [-1, 1]; they stay on their device, and y has to be on it too.
        threshold: 0.02 in the paper (0.05 for CIFAR-10, 0.005 for MNIST). At 0 every mask holds all values, which is
            empirical Bayes.
        chunk: number of images processed at a time; it limits the memory and does not change the result.

    Raises:
        DitlabError: no images, or a threshold outside [0, 1].
    """

    def __init__(self, images: Float[Tensor, "n c h w"], threshold: float = 0.02, chunk: int = 64) -> None:
        check_images("Wiener-locality", images, chunk)
        if not 0 <= threshold <= 1:
            raise DitlabError(f"Wiener-locality denoiser: expected a threshold in [0, 1], found {threshold}")
        self.images, self.threshold, self.chunk = images.flatten(1), threshold, chunk
        self.wiener = WienerDenoiser(images)
        self.shape, self.levels, self.device = self.wiener.shape, self.wiener.levels, images.device
        self._last_mask: tuple[float, Tensor] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        return super().identity | {"threshold": self.threshold}

    def mask(self, sigma: float) -> Bool[Tensor, "d d"]:
        """Returns the mask of each value, a row; D = C H W values, channel by channel, row by row."""
        if self._last_mask is None or self._last_mask[0] != sigma:
            basis, variances = self.wiener.basis, self.wiener.variances
            shrinkage = (basis * (variances / (variances + sigma**2))) @ basis.T
            diagonal = shrinkage.diagonal()
            # A value that is the same in all images has no ratios.
            varies = diagonal > diagonal.max() * torch.finfo(torch.float64).eps * len(diagonal)
            ratios = torch.where(varies[:, None], shrinkage / torch.where(varies, diagonal, 1.0)[:, None], 0.0).abs_()
            mask = (ratios >= self.threshold * ratios.max()).fill_diagonal_(True)
            self._last_mask = sigma, mask
        return self._last_mask[1]

    def _x0(self, y: Tensor, sigma: float) -> Tensor:
        flat, mask = y.flatten(1), self.mask(sigma).to(y.dtype).T
        mean = SoftmaxMean()
        for part in self.images.split(self.chunk):
            images = part.to(y.dtype)
            logits = ((flat[:, None] - images).square() @ mask) * (-0.5 / sigma**2)
            mean.add(logits.permute(2, 0, 1), images.T[:, :, None])
        return mean.result()[..., 0].T.reshape(y.shape)


class SoftmaxMean:
    """Means of values under softmax weights, sum_k exp(l_k) v_k / sum_k exp(l_k), from logits and values in parts.

    It keeps the largest logit so far and rescales its sums when a larger one comes (Milakov and Gimelshein 2018,
    1805.02867), so the mean is exact for any division into parts. The released code of Lukoianov et al. normalizes each
    part by itself instead, so its result depends on the batch size. Sums are float64; the products of a part have the
    dtype of its logits.
    """

    def __init__(self) -> None:
        self._best: Tensor | None = None
        self._sums: Tensor | None = None

    def add(self, logits: Tensor, values: Tensor) -> None:
        """Adds finite logits [..., R, K], which are overwritten, and values [..., K, V] of the same dtype."""
        # The mean does not depend on the subtracted logit, so no gradient has to flow through it.
        best = logits.detach().amax(-1, keepdim=True).double()
        if self._best is not None:
            best = torch.maximum(best, self._best)
        weights = logits.sub_(best.to(logits.dtype)).exp_()
        # A column of ones gives the sum of the weights.
        wide = torch.cat([values, torch.ones_like(values[..., :1])], -1)
        sums = (weights @ wide).double()
        if self._best is not None and self._sums is not None:
            sums = sums + self._sums * (self._best - best).exp()
        self._best, self._sums = best, sums

    def result(self) -> Tensor:
        """Returns the means over all parts, float64 [..., R, V]; at least one part must have been added."""
        assert self._sums is not None
        return self._sums[..., :-1] / self._sums[..., -1:]


def check_images(what: str, images: Tensor, chunk: int | None) -> None:
    """Raises a DitlabError if a denoiser cannot be made of these images, or in chunks of this size."""
    if chunk is not None and chunk < 1:
        raise DitlabError(f"{what} denoiser: expected a chunk of at least 1 image, found {chunk}")
    if images.ndim != 4 or len(images) == 0 or not images.is_floating_point():
        raise DitlabError(
            f"{what} denoiser: expected float images [N, C, H, W] in [-1, 1], N at least 1, "
            f"found {images.dtype} of shape {tuple(images.shape)}"
        )
