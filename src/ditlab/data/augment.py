"""Augmentation. The random choices are made by the caller, for the whole global batch, so that they can be repeated."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

__all__ = ["flip"]


def flip(images: Shaped[Tensor, "b c h w"], flip_mask: Bool[Tensor, " b"]) -> Shaped[Tensor, "b c h w"]:
    """Mirrors the images whose entry in `flip_mask` is True, left to right."""
    return torch.where(flip_mask[:, None, None, None], images.flip(-1), images)
