"""Grids of images: plain ones, and tables with a word above each column and before each row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ditlab.errors import DitlabError
from ditlab.pages.image_rows import ImageRow, image_rows
from ditlab.pages.theme import LIGHT, Theme, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def labelled_grid(
    images: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str = "",
    inches: float = 0.84,
    theme: Theme = LIGHT,
) -> Figure:
    """Draws images uint8 [R, K, C, H, W] (C 1 or 3) in a table, with a word before each row and above each column.

    Raises:
        DitlabError: no images, or not as many words as there are rows and columns.
    """
    if images.ndim != 5 or images.shape[:2] != (len(rows), len(columns)):
        raise DitlabError(
            f"image table: expected images of {len(rows)} rows and {len(columns)} columns, "
            f"found shape {list(images.shape)}"
        )
    _check("image table", images.reshape(-1, *images.shape[2:]))
    pairs = zip(rows, images, strict=True)
    return image_rows([ImageRow(*pair) for pair in pairs], titles=columns, title=title, inches=inches, theme=theme)


def sample_grid(
    rows: Sequence[tuple[str, np.ndarray]], *, columns: int = 10, inches: float = 0.62, theme: Theme = LIGHT
) -> Figure:
    """Draws small images in captioned rows, e.g. the samples of each run and training images beneath.

    Args:
        rows: (caption, uint8 [N, C, H, W]) pairs; each continues on further lines after `columns` images.
        columns: images in a line.
        inches: width of one image in the figure.
        theme: light or dark.

    Raises:
        DitlabError: no row, or one that is not uint8 [N, C, H, W] with C 1 or 3 and N at least 1.
    """
    if not rows:
        raise DitlabError("sample grid: expected at least one row of images, found none")
    sheets = [montage(caption, images, columns) for caption, images in rows]
    lines = [sheet.shape[0] / sheet.shape[1] * columns for sheet in sheets]
    with canvas(columns * inches + 0.2, sum(lines) * inches + 0.34 * len(rows) + 0.1, theme) as figure:
        grid = figure.subplots(len(rows), 1, squeeze=False, height_ratios=lines)
        for axes, (caption, _), sheet in zip(grid[:, 0], rows, sheets, strict=True):
            axes.imshow(sheet, interpolation="nearest")
            axes.set_axis_off()
            axes.set_title(caption, fontsize=9, fontweight="normal", pad=3)
    return figure


def montage(caption: str, images: np.ndarray, columns: int) -> np.ndarray:
    """Images in lines of `columns`, uint8 [h, w, 4] with transparent gaps, each pixel enlarged so that it stays sharp.

    Raises:
        DitlabError: the images, which the caption names, are not uint8 [N, C, H, W] with C 1 or 3 and N at least 1.
    """
    _check(caption, images)
    count, _, height, width = images.shape
    scale = max(1, round(96 / width))
    h, w, gap = height * scale, width * scale, max(2, 6 * width * scale // 96)
    lines = -(-count // columns)
    sheet = np.zeros((lines * (h + gap) - gap, columns * (w + gap) - gap, 4), np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        big = image.transpose(1, 2, 0).repeat(scale, 0).repeat(scale, 1)
        sheet[top : top + h, left : left + w, :3] = big
        sheet[top : top + h, left : left + w, 3] = 255
    return sheet


def _check(caption: str, images: np.ndarray) -> None:
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1] not in (1, 3) or not len(images):
        raise DitlabError(
            f"sample grid, '{caption}': expected uint8 [N, 1 or 3, H, W], found {images.dtype} {list(images.shape)}"
        )
