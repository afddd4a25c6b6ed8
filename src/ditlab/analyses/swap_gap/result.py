"""The result of a swap: the errors of two models on the training images of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.analyses.stored import StoredResult, config_from_json, stored_config, tuples
from ditlab.errors import Damaged
from ditlab.metrics.bands import Band, places_by_band
from ditlab.metrics.psnr import psnr_of, resampled_psnr, resampling_weights
from ditlab.provenance import Provenance

__all__ = ["SwapResult"]


@dataclass(frozen=True, eq=False)
class SwapResult(StoredResult):
    """Two models with disjoint training sets, each on its own training images and on those of the other."""

    about: tuple[Provenance, Provenance]
    config: PSNRConfig
    levels: tuple[float, ...]
    """Noise levels sigma [L], ascending."""
    peak: float
    own_mse: np.ndarray
    """Mean squared error of each model on its own training images, float64 [2, L, images, draws]."""
    other_mse: np.ndarray
    """The same of the other model on the same images with the same noise."""

    kind = file = "swap-gap"
    needs_arrays = True

    @property
    def names(self) -> str:
        """The names of the two models."""
        return " and ".join(about.name for about in self.about)

    def curve(self, side: int) -> np.ndarray:
        """PSNR of the model that was trained on a side's images minus that of the other, in dB, float64 [L]."""
        own, other = (psnr_of(mse[side], self.peak, self.config.reduction) for mse in (self.own_mse, self.other_mse))
        return own - other

    @property
    def gap(self) -> np.ndarray:
        """Mean of both sides' differences, in dB, float64 [L]: not truncated."""
        return (self.curve(0) + self.curve(1)) / 2

    @property
    def average(self) -> float:
        """Mean of `gap` over the levels, in dB."""
        return float(self.gap.mean())

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of `average` over images: a bootstrap that draws each side's images again, paired.

        None for a single image.
        """
        if self.own_mse.shape[2] < 2:
            return None
        rng, draws = np.random.default_rng(0), []
        for own, other in zip(self.own_mse, self.other_mse, strict=True):
            # The same images for both models: what makes them hard or easy cancels.
            weights = resampling_weights(own.shape[1], rng)
            own, other = (resampled_psnr(mse, weights, self.peak, self.config.reduction) for mse in (own, other))
            draws.append((own - other).mean(1))
        low, high = np.percentile(np.mean(draws, axis=0), [2.5, 97.5])
        return float(low), float(high)

    def by_band(self) -> dict[Band, SwapResult]:
        """Returns the same result at the levels of each band that has any."""
        bands = {}
        for band, places in places_by_band(self.config.bands, self.levels).items():
            levels = tuple(self.levels[i] for i in places)
            own, other = self.own_mse[:, places], self.other_mse[:, places]
            bands[band] = replace(self, levels=levels, own_mse=own, other_mse=other)
        return bands

    def sentences(self) -> tuple[str, ...]:
        """What the interval allows to be said."""
        size = f"{self.average:+.2f} dB over {len(self.levels)} noise levels"
        if self.interval is None:
            return (f"{self.names}: the swap gap is {size}; one image says nothing about others.",)
        low, high = self.interval
        size = f"{size}, 95 % interval {low:+.2f} to {high:+.2f} over images, one pair of trainings"
        if low > 0:
            verdict = "images are denoised better by the model that was trained on them than by the other one"
        else:
            verdict = "no advantage is seen of the model that was trained on the images"
        return (f"{self.names}, on average over the images of both: {verdict} ({size}).",)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "version": self.version,
            "about": [asdict(about) for about in self.about],
            "config": stored_config(self.config),
            "levels": list(self.levels),
            "peak": self.peak,
            "images": self.own_mse.shape[2],
            "draws": self.own_mse.shape[3],
            **self._numbers(),
            "curves": [self.curve(side).tolist() for side in (0, 1)],
            "bands": [{**band.facts(self.levels), **inside._numbers()} for band, inside in self.by_band().items()],
            "sentences": list(self.sentences()),
        }

    def _numbers(self) -> dict[str, Any]:
        return {
            "gap": self.average,
            "interval": None if self.interval is None else list(self.interval),
            "gaps": [float(self.curve(side).mean()) for side in (0, 1)],
        }

    def arrays(self) -> dict[str, np.ndarray]:
        return {"own_mse": self.own_mse, "other_mse": self.other_mse}

    @classmethod
    def read(cls, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> SwapResult:
        first, second = (Provenance(**about) for about in record["about"])
        config, levels = config_from_json(PSNRConfig, record["config"]), tuples(record["levels"])
        result = cls((first, second), config, levels, record["peak"], arrays["own_mse"], arrays["other_mse"])
        expected = (2, len(levels), record["images"], record["draws"])
        for name, mse in result.arrays().items():
            if mse.shape != expected:
                raise Damaged(f"swap-gap result: expected {name} of shape {expected}, found {mse.shape}")
        return result
