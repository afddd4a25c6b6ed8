"""Samples above the training images that are nearest to them, with the distances between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ditlab.errors import DitlabError
from ditlab.metrics.nearest import Nearest
from ditlab.pages.grids import montage
from ditlab.pages.theme import LIGHT, Theme, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INCHES = 0.84
"""Width of one image."""


@dataclass(frozen=True, eq=False)
class SampleRow:
    """The samples of one run, and what is nearest to them."""

    caption: str
    samples: np.ndarray
    """uint8 [N, C, H, W]."""
    nearest: Nearest | None = None
    """One entry for each sample; None where the training images are unknown."""
    pictures: np.ndarray | None = None
    """The nearest training images, uint8 [N, C, H, W]; None where no picture of a real image may be shown."""
    sources: Sequence[str] = ()
    """The file of each nearest training image; empty where no name may be shown."""


def samples_with_nearest(rows: Sequence[SampleRow], *, columns: int = 8, theme: Theme = LIGHT) -> Figure:
    """Draws each sample above its nearest training image, with their distance in grey levels; copies are marked.

    A row continues on further lines after `columns` samples.

    Raises:
        DitlabError: no row; as `montage`; distances or pictures of another number than the samples.
    """
    if not rows:
        raise DitlabError("samples: expected at least one row of images, found none")
    for row in rows:
        beside = [row.samples, None if row.nearest is None else row.nearest.first, row.pictures]
        counts = {len(part) for part in beside if part is not None}
        if len(counts) != 1:
            raise DitlabError(f"samples, '{row.caption}': expected as many nearest images as samples, found {counts}")
    lines = [
        (row, start, _sheet(row, start, columns), _side(row.samples))
        for row in rows
        for start in range(0, len(row.samples), columns)
    ]
    wide = max(sheet.shape[1] / side for _, _, sheet, side in lines)
    heights = [sheet.shape[0] / side * _INCHES for _, _, sheet, side in lines]
    total = sum(heights) + sum(0.38 if any(row.sources) else 0.26 for row, *_ in lines) + 0.34 * len(rows)
    with canvas(max(wide * _INCHES, 4.6) + 0.2, total, theme) as figure:
        grid = figure.subplots(len(lines), 1, squeeze=False, height_ratios=heights)
        for axes, (row, start, sheet, side) in zip(grid[:, 0], lines, strict=True):
            axes.imshow(sheet, interpolation="nearest")
            # A line with fewer images than the others keeps their size.
            axes.set_xlim(-0.5, wide * side - 0.5)
            axes.set_anchor("W")
            axes.axis("off")
            if not start:
                axes.set_title(row.caption, fontsize=9, pad=12 if row is not rows[0] and any(row.sources) else 4)
            for i in range(start, min(start + columns, len(row.samples))):
                _write_distance(axes, row, i, ((i - start + 0.5) * side, sheet.shape[0]), theme)
    return figure


def _side(images: np.ndarray) -> int:
    """Width of one image on a sheet with its share of the gaps, in the sheet's pixels."""
    scale = max(1, round(96 / images.shape[-1]))
    return images.shape[-1] * scale + max(2, 6 * images.shape[-1] * scale // 96)


def _sheet(row: SampleRow, start: int, columns: int) -> np.ndarray:
    parts = [part[start : start + columns] for part in (row.samples, row.pictures) if part is not None]
    return montage(row.caption, np.concatenate(parts), len(parts[0]))


def _write_distance(axes: Axes, row: SampleRow, i: int, below: tuple[float, int], theme: Theme) -> None:
    """Writes below the i-th pair the distance, and in small letters the file of the training image."""
    if row.nearest is None:
        return
    place: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "top", "annotation_clip": False}
    copied = row.nearest.copies is not None and row.nearest.copied[i]
    weight, color = ("bold", theme.ink) if copied else ("normal", theme.muted)
    text = f"{row.nearest.first[i]:.1f}" + (" copy" if copied else "")
    axes.annotate(text, below, (0, -3), fontsize=8, fontweight=weight, color=color, **place)
    if row.sources and row.sources[i]:
        axes.annotate(_short(row.sources[i]), below, (0, -14), fontsize=5.5, color=theme.muted, **place)


def _short(source: str, letters: int = 15) -> str:
    """The last part of a path, its middle left out where it is too long to be written under an image."""
    name = source.rpartition("/")[2]
    half = (letters - 1) // 2
    return name if len(name) <= letters else f"{name[:half]}…{name[-half:]}"
