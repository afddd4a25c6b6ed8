"""Denoisers in closed form, made of a set of images: the two ends between which a network lies.

`EmpiricalBayesDenoiser` is the optimal denoiser for the images themselves, the limit of memorization: it can return
nothing but averages of them. `WienerDenoiser` is the optimal linear one: it knows their mean and covariance, and
nothing else.

Sources: Kamb and Ganguli 2024 (2412.20292), the ideal score, in our coordinates; Wang and Vastola 2023 (Gaussian
score); Lukoianov et al. 2025 (2509.09672), whose streaming softmax depends on the chunk, unlike the exact one here
(Milakov and Gimelshein 2018).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ditlab.diffusion.denoisers import Denoiser, Prediction
from ditlab.diffusion.levels import LevelRange
from ditlab.errors import DitlabError


class EmpiricalBayesDenoiser(Denoiser):
    """E[x0 | y] when x0 is one of N images with equal probability: their mean under softmax(-|y - x_i|^2 / 2 sigma^2).

    Sums run in float64 over chunks of images, with an exact running softmax: the result does not depend on the chunk.
    As sigma goes to 0 it becomes the nearest image (the mean of several equally near ones).

    Args:
        images: [N, C, H, W] in [-1, 1]; they stay on their device, where y has to be too.
        chunk: images handled at a time, which bounds the memory.
    """

    def __init__(self, images: Float[Tensor, "n c h w"], chunk: int = 1024) -> None:
        _check("empirical Bayes", images, chunk)
        self.images, self.chunk = images.flatten(1), chunk
        self.half_norms = torch.cat([part.double().square().sum(1) / 2 for part in self.images.split(chunk)])
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        self.levels = LevelRange(0.0, math.inf)
        self.device = images.device

    def estimate(self, y: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Prediction:
        """See `Denoiser.estimate`."""
        flat = y.flatten(1).double()
        variance = (sigma.double().reshape(-1, 1) if isinstance(sigma, Tensor) else sigma) ** 2
        best = flat.new_full((len(y), 1), -math.inf)
        total, mean = torch.zeros_like(best), torch.zeros_like(flat)
        for images, half_norms in zip(self.images.split(self.chunk), self.half_norms.split(self.chunk), strict=True):
            wide = images.double()
            # -|y - x|^2 / 2 sigma^2 up to what all images share.
            logits = (flat @ wide.T - half_norms) / variance
            higher = torch.maximum(best, logits.amax(1, keepdim=True))
            weights, shrink = (logits - higher).exp(), (best - higher).exp()
            total = total * shrink + weights.sum(1, keepdim=True)
            mean = mean * shrink + weights @ wide
            best = higher
        x0 = (mean / total).reshape(y.shape).to(y.dtype)
        return Prediction(x0, (y - x0) / sigma, None)


class WienerDenoiser(Denoiser):
    """The best linear denoiser: m + U diag(l / (l + sigma^2)) U^T (y - m), from the images' mean and covariance.

    The covariance is that of the N images themselves (divided by N), so that this is the least mean squared error of
    all linear denoisers on them.

    Args:
        images: [N, C, H, W] in [-1, 1]; the denoiser lives on their device.
        chunk: images handled at a time when the covariance is summed.

    Attributes:
        mean: float64 [D], D = C H W.
        variances: float64 [K], the positive eigenvalues l of the covariance, descending, K <= min(N - 1, D).
        basis: float64 [D, K], their eigenvectors.
    """

    def __init__(self, images: Float[Tensor, "n c h w"], chunk: int = 1024) -> None:
        _check("Wiener", images, chunk)
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
            # Fewer images than values: the same eigenvalues from the small N x N matrix of inner products.
            centred = flat.double() - self.mean
            variances, small = torch.linalg.eigh(centred @ centred.T / count)
            basis = torch.nn.functional.normalize(centred.T @ small, dim=0)
        # Directions without variance are rounding noise, and shrink to nothing at every level.
        kept = variances > variances[-1].clamp(min=0) * max(count, size) * torch.finfo(torch.float64).eps
        self.variances, self.basis = variances[kept].flip(0), basis[:, kept].flip(1)

    def estimate(self, y: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Prediction:
        """See `Denoiser.estimate`."""
        variance = (sigma.double().reshape(-1, 1) if isinstance(sigma, Tensor) else sigma) ** 2
        coefficients = (y.flatten(1).double() - self.mean) @ self.basis
        shrunk = coefficients * (self.variances / (self.variances + variance))
        x0 = (self.mean + shrunk @ self.basis.T).reshape(y.shape).to(y.dtype)
        return Prediction(x0, (y - x0) / sigma, None)


def _check(what: str, images: Tensor, chunk: int) -> None:
    if chunk < 1:
        raise DitlabError(f"{what} denoiser: expected a chunk of at least 1 image, found {chunk}")
    if images.ndim != 4 or len(images) == 0 or not images.is_floating_point():
        raise DitlabError(
            f"{what} denoiser: expected float images [N, C, H, W] in [-1, 1], N at least 1, "
            f"found {images.dtype} of shape {tuple(images.shape)}"
        )
