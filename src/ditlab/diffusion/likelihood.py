"""The variational bound of images in bits per dimension, through any denoiser: -log2 p(x_0) / D <= L_T + sum_t L_t.

Source: Ho et al. 2020, Eq. 5; Nichol and Dhariwal 2021, section 3 (bits per dimension).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ditlab.diffusion.choices import Respacing
from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.gaussian import GaussianProcess, flat_mean
from ditlab.diffusion.schedules import VPSchedule
from ditlab.diffusion.short_repr import ShortRepr
from ditlab.diffusion.tensors import Images, Labels
from ditlab.errors import DitlabError

__all__ = ["BitsPerDimension", "bits_per_dimension"]


@dataclass(frozen=True, eq=False, repr=False)
class BitsPerDimension(ShortRepr):
    """The bound of B images and its terms at S steps, the noisiest first."""

    total: Tensor
    """[B]: prior plus all terms."""
    prior: Tensor
    """[B]: L_T, the information about the image in the noisiest state."""
    terms: Tensor
    """[B, S]: L_t."""
    x0_mse: Tensor
    """[B, S]: mean squared error of the clean image."""
    eps_mse: Tensor
    """[B, S]: mean squared error of the unit noise."""
    sigmas: np.ndarray
    """[S]: levels, descending."""


def bits_per_dimension(
    denoiser: Denoiser,
    images: Images,
    noise: Callable[[int], Tensor],
    *,
    steps: Respacing = "250",
    label: Labels = None,
    clip: bool = True,
) -> BitsPerDimension:
    """Returns an upper bound on the images' negative log likelihood, with one draw of noise at each step.

    Args:
        denoiser: any denoiser; the reverse variance is the learned one if there is one, else `denoiser.variance`.
        images: 8-bit images in [-1, 1].
        noise: step -> unit normal noise like `images`, 0 at the noisiest step; see `samplers.ImageNoise`.
        steps: respacing of the denoiser's levels.
        label: the class of each image.
        clip: clip estimates to [-1, 1].

    Raises:
        DitlabError: a shape or label that the denoiser does not take, or a denoiser of latents, which have no bits.
    """
    if not denoiser.pixel_space:
        raise DitlabError("bits per dimension: expected a denoiser of 8-bit images, found one of latents")
    process = GaussianProcess(VPSchedule.from_sigmas(denoiser.levels.grid(steps)), "x0", denoiser.variance)
    sigmas = process.schedule.sigmas
    images = images.to(denoiser.device)
    label = None if label is None else label.to(images.device)
    denoiser.check(images, float(sigmas[-1]), label)
    rows = []
    with torch.no_grad():
        for k, index in enumerate(reversed(range(len(sigmas)))):
            sigma = float(sigmas[index])
            unit = noise(k).to(images)
            t = torch.full((len(images),), index, device=images.device)
            x = process.q_sample(images, t, unit)
            y = images + sigma * unit
            x0, _, v = denoiser.estimate(y, sigma, label)
            x0 = x0.clamp(-1, 1) if clip else x0
            term = process.bound(images, x, t, process.reverse(x0, v, x, t))
            rows.append((term, flat_mean((x0 - images) ** 2), flat_mean(((y - x0) / sigma - unit) ** 2)))
        prior = process.prior(images)
    terms, x0_mse, eps_mse = (torch.stack(part, 1) for part in zip(*rows, strict=True))
    return BitsPerDimension(terms.sum(1) + prior, prior, terms, x0_mse, eps_mse, sigmas[::-1].copy())
