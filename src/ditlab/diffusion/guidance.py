"""Classifier-free guidance: a denoiser that exaggerates the effect of the class on the estimate.

    eps_g = eps_u + w (eps_c - eps_u),  eps_c with the image's class, eps_u without a class

Sources: Ho and Salimans 2022 (2207.12598), with w + 1 of theirs as w here; Peebles and Xie 2023 (guidance of the first
three channels alone, in the released code of DiT); Gao et al. 2023, MDT (the power-cosine schedule); Kynkäänniemi et
al. 2024 (2404.07724), Eq. 6 (guidance inside an interval of noise levels).
"""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ditlab.diffusion.denoisers import Denoiser, Prediction
from ditlab.diffusion.guidance_config import GuidanceConfig
from ditlab.diffusion.noise_levels import DiscreteLevels
from ditlab.diffusion.schedules import make_schedule
from ditlab.errors import DitlabError

__all__ = ["guided"]


def guided(denoiser: Denoiser, config: GuidanceConfig) -> Denoiser:
    """Returns a denoiser with guided estimates, made of one that also knows "no class"; itself if the scale is 1.

    It needs a label for each image. The channels that are not guided and the learned variance are those of the
    conditional estimate. The analyses of attention refuse it, because its network gets every image twice.

    Raises:
        DitlabError: the denoiser is unconditional, or has no "no class", or has fewer channels than are to be guided.
    """
    return GuidedDenoiser(denoiser, config) if config.on else denoiser


class GuidedDenoiser(Denoiser):
    """A denoiser with guidance; made by `guided`. Both estimates come from one call on a doubled batch."""

    def __init__(self, inner: Denoiser, config: GuidanceConfig) -> None:
        if not inner.num_classes:
            raise DitlabError("guidance: expected a class-conditional denoiser, found an unconditional one")
        if not inner.null_class:
            raise DitlabError(
                "guidance: expected a denoiser that also knows 'no class' (label dropout in training), found none"
            )
        self.inner, self.config = inner, config
        self._weight_cache: dict[float, float] = {}
        self.channels = config.guided_channels(inner.shape[0])
        self.shape, self.levels, self.num_classes = inner.shape, inner.levels, inner.num_classes
        self.peak, self.pixel_space, self.blind = inner.peak, inner.pixel_space, inner.blind
        self.origin, self.variance = inner.origin, inner.variance

    def __repr__(self) -> str:
        return f"GuidedDenoiser({self.inner!r}, {self.config!r})"

    @property
    def identity(self) -> dict[str, Any]:
        return super().identity | {"inner": self.inner.identity, "guidance": asdict(self.config)}

    @property
    def module(self) -> nn.Module | None:
        return self.inner.module

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.inner.device

    def scale(self, sigma: float | Tensor) -> float | Tensor:
        return self.inner.scale(sigma)

    def time(self, sigma: float | Tensor) -> float | Tensor | None:
        return self.inner.time(sigma)

    def passes(self, sigma: float) -> int:
        return self.inner.passes(sigma) * (1 if self.weight(sigma) == 1 else 2)

    def check_labels(self, label: Tensor | None, count: int) -> None:
        if label is None:
            raise DitlabError("guidance: expected a label for each image, found none")
        self.inner.check_labels(label, count)

    def weight(self, sigma: float | Tensor) -> float | Tensor:
        """Returns the scale w at a level; for a tensor of levels a tensor of their shape, dtype and device."""
        if isinstance(sigma, Tensor):
            return self._weights(sigma.double()).to(sigma)
        if sigma not in self._weight_cache:
            self._weight_cache[sigma] = float(self._weights(torch.tensor([sigma], dtype=torch.float64)))
        return self._weight_cache[sigma]

    def estimate(self, y: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Prediction:
        if label is None:
            raise DitlabError("guidance: expected a label for each image, found none")
        weight = self.weight(sigma)
        if isinstance(weight, float) and weight == 1:
            return self.inner.estimate(y, sigma, label)
        both = torch.cat([sigma, sigma]) if isinstance(sigma, Tensor) else sigma
        labels = torch.cat([label, torch.full_like(label, self.num_classes)])
        x0, eps, v = self.inner.estimate(torch.cat([y, y]), both, labels)
        return Prediction(self._guide(x0, weight), self._guide(eps, weight), None if v is None else v.chunk(2)[0])

    def _guide(self, both: Tensor, weight: float | Tensor) -> Tensor:
        """Returns u + w (c - u) of the noise estimates or, equally, of the image estimates. At w = 1 lerp is exact."""
        c, u = both.chunk(2)
        count = self.channels
        if count == self.shape[0]:
            return torch.lerp(u, c, weight)
        return torch.cat([torch.lerp(u[:, :count], c[:, :count], weight), c[:, count:]], 1)

    def _weights(self, sigma: Tensor) -> Tensor:
        w = torch.full_like(sigma, self.config.scale)
        if self.config.schedule == "power-cosine":
            # t / T by the denoiser's own steps, else by those of the linear process (ditlab's inference: no publication
            # defines t without numbered steps).
            levels = self.levels if isinstance(self.levels, DiscreteLevels) else _linear()
            part = torch.as_tensor(levels.step(sigma)) / (int(levels.steps[-1]) + 1)
            w = 1 + (w - 1) * (1 - torch.cos(math.pi * (1 - part) ** self.config.power)) / 2
        if self.config.interval is not None:
            low, high = self.config.interval
            w = torch.where((sigma > low) & (sigma <= high), w, 1.0)
        return w


@cache
def _linear() -> DiscreteLevels:
    return DiscreteLevels(make_schedule("linear", 1000).sigmas)
