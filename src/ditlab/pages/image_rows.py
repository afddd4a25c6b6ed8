"""Rows of images, each image with a caption below it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ditlab.errors import DitlabError
from ditlab.pages.theme import LIGHT, Theme, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ImageRow", "image_rows"]

_GAP = 0.06
"""Between two images, as a share of their width."""
_CAPTION_ROOM = 0.24
"""Below an image with a caption, as a share of its width."""


@dataclass(frozen=True, eq=False)
class ImageRow:
    """Images side by side."""

    name: str
    """Shown at the left; may have several lines."""
    images: np.ndarray
    """uint8 [n, C, H, W], C 1 or 3."""
    captions: Sequence[str] = ()
    """Shown below the images, one for each; or none."""


def image_rows(
    rows: Sequence[ImageRow], *, titles: Sequence[str] = (), title: str = "", inches: float = 0.9, theme: Theme = LIGHT
) -> Figure:
    """Draws rows of images of one shape and number, with `titles` above columns and `title` above all.

    Raises:
        DitlabError: no rows, or rows of different shapes.
    """
    if not rows or len({row.images.shape for row in rows}) != 1:
        raise DitlabError(
            f"image rows: expected rows of images of one shape and number, found "
            f"{[list(row.images.shape) for row in rows]}"
        )
    count, _, height, width = rows[0].images.shape
    tall = height / width
    tops, bottom = [], 0.0
    for row in rows:
        tops.append(bottom)
        bottom += tall + (_CAPTION_ROOM if row.captions else _GAP)
    # Room for the words, at 8 points.
    left = 0.085 * max(len(line) for row in rows for line in row.name.split("\n")) + 0.2
    above = 0.15 * max((len(word.split("\n")) for word in titles), default=0) + (0.4 if title else 0.1)
    step = 1 + _GAP
    with canvas(max(count * step * inches + left, 3.0), bottom * inches + above, theme) as figure:
        axes = figure.subplots()
        for top, row in zip(tops, rows, strict=True):
            for column, image in enumerate(row.images):
                start = column * step
                pixels = np.broadcast_to(image.transpose(1, 2, 0), (height, width, 3))
                axes.imshow(pixels, extent=(start, start + 1, top + tall, top), interpolation="nearest")
                if row.captions:
                    words = {"ha": "center", "va": "top", "fontsize": 7, "color": theme.muted}
                    axes.text(start + 0.5, top + tall + 0.03, row.captions[column], **words)
        axes.set_xlim(0, count * step - _GAP)
        axes.set_ylim(bottom, 0)
        axes.set_aspect("equal")
        axes.set_yticks([top + tall / 2 for top in tops], [row.name for row in rows])
        axes.set_xticks([column * step + 0.5 for column in range(count)] if titles else [], titles or [])
        axes.tick_params(length=0, pad=3, labeltop=True, labelbottom=False, labelcolor=theme.ink, labelsize=8)
        axes.spines[:].set_visible(False)
        axes.grid(False)
        if title:
            axes.set_title(title, fontsize=9, pad=6)
    return figure
