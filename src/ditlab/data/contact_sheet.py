"""Contact sheets: many small images in one picture."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ditlab.errors import DitlabError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["fitting_scale", "image_grid"]


def image_grid(
    images: np.ndarray, columns: int | None = None, scale: int = 1, *, gap: int = 2, background: int = 255
) -> Image.Image:
    """Lays images out row by row, in a PIL image of mode RGB.

    Args:
        images: uint8 [N, C, H, W], C 1 or 3.
        columns: images in a row; about as many as rows if None.
        scale: every pixel becomes `scale` x `scale` pixels, without smoothing.
        gap: pixels between images and around them.
        background: grey value of the gaps, 0 to 255.

    Raises:
        DitlabError: there are no images, or they are not uint8 [N, C, H, W].
    """
    from PIL import Image

    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise DitlabError(
            f"image grid: expected uint8 images [N, C, H, W], C 1 or 3, found {images.dtype} {list(images.shape)}"
        )
    count, _, height, width = images.shape
    across = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / across)
    height, width = height * scale, width * scale
    sheet = np.full((rows * (height + gap) + gap, across * (width + gap) + gap, 3), background, np.uint8)
    for index, image in enumerate(images):
        top = gap + index // across * (height + gap)
        left = gap + index % across * (width + gap)
        sheet[top : top + height, left : left + width] = image.transpose(1, 2, 0).repeat(scale, 0).repeat(scale, 1)
    return Image.fromarray(sheet)


def fitting_scale(size: int, target: int = 64) -> int:
    """Returns the whole scale at which images of `size` pixels become about `target` pixels wide."""
    return max(1, target // size)
