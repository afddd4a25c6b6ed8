"""The mean under softmax weights that the baselines compute, from logits and values in parts.

    sum_k exp(l_k) v_k / sum_k exp(l_k)

The running softmax keeps the largest logit so far and rescales its sums when a larger one comes, so the mean is exact
for any division into parts. The released code of Lukoianov et al. (2509.09672) normalizes each part by itself instead,
so its result depends on the batch size.

Source: Milakov and Gimelshein 2018 (1805.02867).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ditlab.errors import DitlabError

__all__ = ["SoftmaxMean", "by_level", "check_images"]


class SoftmaxMean:
    """Means of values under softmax weights, from logits and values in parts.

    Sums are float64; the products of a part have the dtype of its logits.
    """

    def __init__(self) -> None:
        self._best: Tensor | None = None
        self._sums: Tensor | None = None

    def add(self, logits: Tensor, values: Tensor) -> None:
        """Adds a part.

        Args:
            logits: [..., R, K], finite; they are overwritten.
            values: [..., K, V], with the dtype of the logits.
        """
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


def by_level(function: Callable[[Tensor, float], Tensor], y: Tensor, sigma: float | Tensor) -> Tensor:
    """Returns `function(y, sigma)` for images with different noise levels; it is called once for each level.

    Args:
        function: (y [b, C, H, W], level) -> [b, C, H, W].
        y: [B, C, H, W].
        sigma: a float, or [B, 1, 1, 1].
    """
    if not isinstance(sigma, Tensor):
        return function(y, sigma)
    levels, which = sigma.reshape(-1).unique(return_inverse=True)
    places = [(which == i).nonzero()[:, 0] for i in range(len(levels))]
    parts = [function(y[place], float(level)) for place, level in zip(places, levels, strict=True)]
    return torch.cat(parts)[torch.cat(places).argsort()]


def check_images(what: str, images: Tensor, chunk: int | None) -> None:
    """Raises a DitlabError if a denoiser cannot be made of these images, or in chunks of this size."""
    if chunk is not None and chunk < 1:
        raise DitlabError(f"{what} denoiser: expected a chunk of at least 1 image, found {chunk}")
    if images.ndim != 4 or len(images) == 0 or not images.is_floating_point():
        raise DitlabError(
            f"{what} denoiser: expected float images [N, C, H, W] in [-1, 1], N at least 1, "
            f"found {images.dtype} of shape {tuple(images.shape)}"
        )
