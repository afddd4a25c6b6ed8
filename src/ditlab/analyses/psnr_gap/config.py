"""Settings of the PSNR gap."""

from __future__ import annotations

from dataclasses import dataclass

from ditlab.analyses.sigmas import check_sigmas
from ditlab.errors import InvalidConfig
from ditlab.metrics.bands import EDGES, noise_bands
from ditlab.metrics.reduction import REDUCTIONS, Reduction

__all__ = ["PSNRConfig", "PSNROptions"]


@dataclass(frozen=True)
class PSNRConfig:
    """How the gap is measured (An et al. Sec. 3; the defaults are the paper's where it states them)."""

    images: int = 300
    """Images of each side, training and test (the paper's K). If fewer exist, all are used, each with several noise
    draws."""
    points: int = 50
    """Noise levels, spread evenly over the steps of the denoiser's own grid, from its first to its last."""
    sigmas: tuple[float, ...] | None = None
    """Noise levels (sigma) to use instead of the grid."""
    reduction: Reduction = "mse_mean"
    """The reported number: PSNR of the mean error (An et al.) or mean of the images' PSNR (Kadkhodaie et al.)."""
    draws: int = 1
    """Noise draws per image and level (at least; more where there are fewer images than asked for)."""
    bands: tuple[float, ...] = EDGES
    """Noise levels (sigma) at which bands begin, the last without an end; tables show each band's averages beside those
    over all levels. A cached result is shown with any bands."""
    noise_seed: int = 0
    """Seed of the noise. Equal seeds give every denoiser the same noise."""
    clip: bool = False
    """Clip estimates to [-1, 1] first. Matters only at the highest levels. Estimates of latents are never clipped."""
    batch_size: int = 100
    """Images denoised at once. Does not change the result beyond float rounding."""

    def __post_init__(self) -> None:
        for name in ("images", "points", "draws", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidConfig(f"psnr-gap: `{name}` must be at least 1, found {getattr(self, name)}")
        if self.reduction not in REDUCTIONS:
            raise InvalidConfig(
                f"psnr-gap: `reduction` must be one of {', '.join(REDUCTIONS)}, found '{self.reduction}'"
            )
        if self.sigmas is not None:
            check_sigmas(self.sigmas, "psnr-gap")
        noise_bands(self.bands)


@dataclass(frozen=True)
class PSNROptions:
    """What else is measured."""

    baselines: bool = True
    """Also measure the empirical-Bayes and Wiener denoisers of the training images."""
