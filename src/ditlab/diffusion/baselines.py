"""Denoisers in closed form, made of a set of images: the two ends between which a network lies, and one between them.

`EmpiricalBayesDenoiser` is the optimal denoiser for the images themselves, the limit of memorization: it can return
nothing but averages of them. `WienerDenoiser` is the optimal linear one: it knows their mean and covariance, and
nothing else. `WienerLocalityDenoiser` averages the images as the first one does, but each value by what is seen of the
values that the second one would look at for it. Those that look through windows are in `ditlab.diffusion.local_scores`.

Sources: Kamb and Ganguli 2024 (2412.20292), the ideal score, in our coordinates; Wang and Vastola 2023 (Gaussian
score); Lukoianov et al. 2025 (2509.09672).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ditlab.diffusion.denoisers import Denoiser, Prediction
from ditlab.diffusion.noise_levels import LevelRange
from ditlab.diffusion.softmax_mean import SoftmaxMean, by_level, check_images
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
        check_images("empirical Bayes", images, chunk)
        self.images, self.chunk = images.flatten(1), chunk
        self.half_norms = torch.cat([part.double().square().sum(1) / 2 for part in self.images.split(chunk)])
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        self.levels = LevelRange(0.0, math.inf)
        self.device = images.device

    def estimate(self, y: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Prediction:
        """See `Denoiser.estimate`."""
        flat = y.flatten(1).double()
        variance = (sigma.double().reshape(-1, 1) if isinstance(sigma, Tensor) else sigma) ** 2
        mean = SoftmaxMean()
        for images, half_norms in zip(self.images.split(self.chunk), self.half_norms.split(self.chunk), strict=True):
            wide = images.double()
            # -|y - x|^2 / 2 sigma^2 up to what all images share.
            mean.add((flat @ wide.T - half_norms) / variance, wide)
        x0 = mean.result().reshape(y.shape).to(y.dtype)
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


class WienerLocalityDenoiser(Denoiser):
    """Each value of x0 is the mean of that value over the images, by how near they are where it looks.

    At level sigma the value q (a pixel's channel) looks at those values p with |L_qp / L_qq| at least `threshold` times
    the largest of all such ratios, L = U diag(l / (l + sigma^2)) U^T the Wiener denoiser's matrix, always at itself.
    Its weights are softmax(-(1 / 2 sigma^2) sum_p (y_p - x_ip)^2) over the images i. (The released code sums over the
    columns of that mask; rows, as in the paper, are what the value q depends on.)

    Args:
        images: [N, C, H, W] in [-1, 1]; they stay on their device, where y has to be too.
        threshold: 0.02 in the paper (0.05 for CIFAR-10, 0.005 for MNIST); at 0 every value looks at all of them, which
            is empirical Bayes.
        chunk: images handled at a time, which bounds the memory. Does not change the result.

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
        self._last: tuple[float, Tensor] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """See `Denoiser.identity`."""
        return super().identity | {"threshold": self.threshold}

    def mask(self, sigma: float) -> Bool[Tensor, "d d"]:
        """Which values (columns) each value (row) looks at; D = C H W of them, channel by channel, row by row."""
        if self._last is None or self._last[0] != sigma:
            basis, variances = self.wiener.basis, self.wiener.variances
            shrinkage = (basis * (variances / (variances + sigma**2))) @ basis.T
            own = shrinkage.diagonal()
            # A value that is the same in all images says nothing of any other.
            moves = own > own.max() * torch.finfo(torch.float64).eps * len(own)
            ratios = torch.where(moves[:, None], shrinkage / torch.where(moves, own, 1.0)[:, None], 0.0).abs_()
            mask = (ratios >= self.threshold * ratios.max()).fill_diagonal_(True)
            self._last = sigma, mask
        return self._last[1]

    def estimate(self, y: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Prediction:
        """See `Denoiser.estimate`."""
        x0 = by_level(self._x0, y, sigma).to(y.dtype)
        return Prediction(x0, (y - x0) / sigma, None)

    def _x0(self, y: Tensor, sigma: float) -> Tensor:
        flat, looks = y.flatten(1), self.mask(sigma).to(y.dtype).T
        mean = SoftmaxMean()
        for part in self.images.split(self.chunk):
            images = part.to(y.dtype)
            logits = ((flat[:, None] - images).square() @ looks) * (-0.5 / sigma**2)
            mean.add(logits.permute(2, 0, 1), images.T[:, :, None])
        return mean.result()[..., 0].T.reshape(y.shape)
