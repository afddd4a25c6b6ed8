"""Classifier-free guidance: a denoiser that exaggerates what a class changes in the estimate.

With eps_c the estimate of the noise for the image's class and eps_u the one for no class,

    eps_g = eps_u + w (eps_c - eps_u),

so w = 1 is the conditional estimate and w = 0 the unconditional one. The wrapped denoiser is a denoiser like any other,
whatever it is made of and whatever samples it; both estimates come from one call on a doubled batch.

Sources: Ho and Salimans 2022 (2207.12598), with w + 1 of theirs as w here; Peebles and Xie 2023 (guidance of the first
three channels alone, in the released code of DiT); Gao et al. 2023, MDT (the power-cosine schedule); Kynkäänniemi et
al. 2024 (2404.07724), Eq. 6 (guidance inside an interval of noise levels).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ditlab.diffusion.denoisers import Denoiser, Prediction
from ditlab.diffusion.noise_levels import DiscreteLevels
from ditlab.diffusion.schedules import make_schedule
from ditlab.errors import DitlabError

GuidanceSchedule = Literal["constant", "power-cosine"]


@dataclass(frozen=True)
class GuidanceConfig:
    """How strongly samples are pulled towards their class."""

    scale: float = 1.0
    """The scale w: 1 is no guidance, above 1 exaggerates the class, 0 leaves it out, between 0 and 1 weakens it."""
    schedule: GuidanceSchedule = "constant"
    """How the scale changes along sampling: constant, or power-cosine from 1 at pure noise to w at the image."""
    power: float = 4.0
    """Exponent of power-cosine; the larger it is, the later guidance sets in."""
    interval: tuple[float, float] | None = None
    """(low, high): guide only at noise levels low < sigma <= high; none for all levels."""
    channels: int | Literal["all"] | None = None
    """How many channels are guided, the first ones, or all; none for what was published: 3 of the 4 channels of Stable
    Diffusion's latents, and all of any other image's."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if not 0 <= self.scale < math.inf:  # NaN fails it too
            raise DitlabError(f"guidance: expected a scale of at least 0 (1 is no guidance), found {self.scale:g}")
        if not 0 < self.power < math.inf:
            raise DitlabError(f"guidance: expected a power above 0, found {self.power:g}")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1] < math.inf:
            low, high = self.interval
            raise DitlabError(f"guidance: expected an interval 0 <= low < high < infinity, found {low:g} and {high:g}")
        if isinstance(self.channels, int) and self.channels < 1:
            raise DitlabError(f"guidance: expected channels of at least 1, or 'all', found {self.channels}")

    @property
    def on(self) -> bool:
        """Whether it changes anything."""
        return self.scale != 1

    def guided_channels(self, channels: int) -> int:
        """How many of an image's channels are guided.

        Raises:
            DitlabError: more than the image has.
        """
        if self.channels == "all":
            return channels
        if self.channels is None:
            return 3 if channels == 4 else channels
        if self.channels > channels:
            raise DitlabError(f"guidance: expected channels of at most {channels}, found {self.channels}")
        return self.channels


def guided(denoiser: Denoiser, config: GuidanceConfig) -> Denoiser:
    """A denoiser that gives guided estimates; the denoiser itself where the scale is 1.

    It has to be given a label for each image. The channels that are not guided and the learned variance stay those of
    the conditional estimate. The analyses of attention refuse it, for its network sees every image twice.

    Args:
        denoiser: any that takes labels, the label `num_classes` for "no class" among them.
        config: how strongly, and where.

    Raises:
        DitlabError: the denoiser is unconditional, or knows no "no class", or has fewer channels than are to be guided.
    """
    return GuidedDenoiser(denoiser, config) if config.on else denoiser


class GuidedDenoiser(Denoiser):
    """See `guided`, which makes one."""

    def __init__(self, inner: Denoiser, config: GuidanceConfig) -> None:
        if not inner.num_classes:
            raise DitlabError("guidance: expected a class-conditional denoiser, found an unconditional one")
        if not inner.null_class:
            raise DitlabError(
                "guidance: expected a denoiser that also knows 'no class' (label dropout in training), found none"
            )
        self.inner, self.config = inner, config
        self._known: dict[float, float] = {}
        self.channels = config.guided_channels(inner.shape[0])
        self.shape, self.levels, self.num_classes = inner.shape, inner.levels, inner.num_classes
        self.peak, self.bounded, self.blind = inner.peak, inner.bounded, inner.blind
        self.origin, self.variance = inner.origin, inner.variance

    @property
    def identity(self) -> dict[str, Any]:
        """That of the wrapped denoiser, and the guidance."""
        return super().identity | {"inner": self.inner.identity, "guidance": asdict(self.config)}

    @property
    def module(self) -> nn.Module | None:
        """The wrapped denoiser's."""
        return self.inner.module

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The wrapped denoiser's."""
        return self.inner.device

    def scale(self, sigma: float | Tensor) -> float | Tensor:
        """The wrapped denoiser's."""
        return self.inner.scale(sigma)

    def time(self, sigma: float | Tensor) -> float | Tensor | None:
        """The wrapped denoiser's."""
        return self.inner.time(sigma)

    def passes(self, sigma: float) -> int:
        """Twice the wrapped denoiser's where it is guided."""
        return self.inner.passes(sigma) * (1 if self.weight(sigma) == 1 else 2)

    def check_labels(self, label: Tensor | None, count: int) -> None:
        """Raise a DitlabError where there is no label, or one that the wrapped denoiser does not know."""
        if label is None:
            raise DitlabError("guidance: expected a label for each image, found none")
        self.inner.check_labels(label, count)

    def weight(self, sigma: float | Tensor) -> float | Tensor:
        """The scale w at a level; a tensor of levels gives one of their shape, dtype and device."""
        if isinstance(sigma, Tensor):
            return self._weights(sigma.double()).to(sigma)
        if sigma not in self._known:
            self._known[sigma] = float(self._weights(torch.tensor([sigma], dtype=torch.float64)))
        return self._known[sigma]

    def estimate(self, y: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Prediction:
        """See `Denoiser.estimate`."""
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
        """eps_u + w (eps_c - eps_u), of the noise or, which is the same, of the image. At w = 1 lerp is exact."""
        conditional, without = both.chunk(2)
        count = self.channels
        if count == self.shape[0]:
            return torch.lerp(without, conditional, weight)
        return torch.cat([torch.lerp(without[:, :count], conditional[:, :count], weight), conditional[:, count:]], 1)

    def _weights(self, sigma: Tensor) -> Tensor:
        w = torch.full_like(sigma, self.config.scale)
        if self.config.schedule == "power-cosine":
            w = 1 + (w - 1) * (1 - torch.cos(math.pi * (1 - self._part(sigma)) ** self.config.power)) / 2
        if self.config.interval is not None:
            low, high = self.config.interval
            w = torch.where((sigma > low) & (sigma <= high), w, 1.0)
        return w

    def _part(self, sigma: Tensor) -> Tensor:
        """t / T of power-cosine: by the denoiser's own steps where they are numbered, else by the linear process's.

        That the linear process of 1,000 steps counts for a denoiser without numbered ones is ditlab's inference: no
        publication says what t would be there.
        """
        known = self.levels if isinstance(self.levels, DiscreteLevels) else _linear()
        return known.step(sigma) / (int(known.steps[-1]) + 1)  # pyright: ignore[reportReturnType]


@cache
def _linear() -> DiscreteLevels:
    return DiscreteLevels(make_schedule("linear", 1000).sigmas)
