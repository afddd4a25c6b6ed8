"""Augmentation. The random choices are made by the caller, for the whole global batch, so that they can be repeated."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor


def flip(images: Shaped[Tensor, "b c h w"], coins: Bool[Tensor, " b"]) -> Shaped[Tensor, "b c h w"]:
    """Mirrors the images whose coin is True, left to right."""
    return torch.where(coins[:, None, None, None], images.flip(-1), images)
