"""Types of what denoisers, objectives and samplers take."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Images", "Labels", "Shape", "Sigma", "Steps"]

Shape = tuple[int, int, int]
"""(C, H, W) of an image."""
Images = Float[Tensor, "b c h w"]
Labels = Int[Tensor, " b"] | None
"""The class of each image."""
Sigma = float | Float[Tensor, ""] | Float[Tensor, " _"]
"""A noise level for all images, or one for each."""
Steps = Int[Tensor, " b"]
"""Indices into a schedule, one for each image."""
