"""How the errors of several images become one PSNR."""

from __future__ import annotations

from typing import Literal

__all__ = ["REDUCTIONS", "Reduction"]

Reduction = Literal["mse_mean", "psnr_mean"]
REDUCTIONS: tuple[Reduction, ...] = ("mse_mean", "psnr_mean")
"""PSNR of the mean error (An et al. 2410.21273, Eq. 4), or mean of the images' PSNR (Kadkhodaie et al. 2310.02557)."""
