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


def samples_with_nearest(
    rows: Sequence[SampleRow], *, columns: int = 8, inches: float = 0.84, theme: Theme = LIGHT
) -> Figure:
    """Draws each sample above its nearest training image, with their distance in grey levels; copies are marked.

    Args:
        rows: one for each model; each continues on further lines after `columns` samples.
        columns: samples in a line.
        inches: width of one image.
        theme: light or dark.

    Raises:
        DitlabError: no row; as `montage`; distances or pictures of another number than the samples.
    """
    if not rows:
        raise DitlabError("samples: expected at least one row of images, found none")
    for row in rows:
        beside = [
            part for part in (None if row.nearest is None else row.nearest.first, row.pictures) if part is not None
        ]
        counts = {len(row.samples), *map(len, beside)}
        if len(counts) != 1:
            raise DitlabError(f"samples, '{row.caption}': expected as many nearest images as samples, found {counts}")
    lines = [(row, start) for row in rows for start in range(0, len(row.samples), columns)]
    sheets = [_sheet(row, start, columns) for row, start in lines]
    wide = max(sheet.shape[1] / _side(row.samples) for sheet, (row, _) in zip(sheets, lines, strict=True))
    heights = [sheet.shape[0] / _side(row.samples) * inches for sheet, (row, _) in zip(sheets, lines, strict=True)]
    total = sum(heights) + sum(0.38 if any(row.sources) else 0.26 for row, _ in lines) + 0.34 * len(rows)
    with canvas(max(wide * inches, 4.6) + 0.2, total, theme) as figure:
        grid = figure.subplots(len(lines), 1, squeeze=False, height_ratios=heights)
        for axes, (row, start), sheet in zip(grid[:, 0], lines, sheets, strict=True):
            axes.imshow(sheet, interpolation="nearest")
            # A line with fewer images than the others keeps their size.
            axes.set_xlim(-0.5, wide * _side(row.samples) - 0.5)
            axes.set_anchor("W")
            axes.axis("off")
            if not start:
                axes.set_title(row.caption, fontsize=9, pad=12 if row is not rows[0] and any(row.sources) else 4)
            _write_distances(axes, row, start, columns, sheet.shape[0], theme)
    return figure


def _side(images: np.ndarray) -> int:
    """Width of one image on a sheet with its share of the gaps, in the sheet's pixels."""
    scale = max(1, round(96 / images.shape[-1]))
    return images.shape[-1] * scale + max(2, 6 * images.shape[-1] * scale // 96)


def _sheet(row: SampleRow, start: int, columns: int) -> np.ndarray:
    above = row.samples[start : start + columns]
    if row.pictures is None:
        return montage(row.caption, above, len(above))
    return montage(row.caption, np.concatenate([above, row.pictures[start : start + columns]]), len(above))


def _write_distances(axes: Axes, row: SampleRow, start: int, columns: int, bottom: int, theme: Theme) -> None:
    """Writes under each pair the distance, and in small letters the file of the training image."""
    nearest = row.nearest
    if nearest is None:
        return
    copied = nearest.copied if nearest.copies is not None else np.zeros(len(row.samples), dtype=bool)
    for i in range(start, min(start + columns, len(row.samples))):
        middle = (i - start) * _side(row.samples) + _side(row.samples) / 2
        text = f"{nearest.first[i]:.1f}" + (" copy" if copied[i] else "")
        bold = {"fontweight": "bold", "color": theme.ink} if copied[i] else {"color": theme.muted}
        _write(axes, text, middle, bottom, 3, fontsize=8, **bold)
        if row.sources and row.sources[i]:
            _write(axes, _short(row.sources[i]), middle, bottom, 14, fontsize=5.5, color=theme.muted)


def _write(axes: Axes, text: str, middle: float, bottom: int, below: int, **style: Any) -> None:
    axes.annotate(
        text, (middle, bottom), (0, -below), textcoords="offset points", ha="center", va="top", annotation_clip=False,
        **style,
    )  # fmt: skip


def _short(source: str, letters: int = 15) -> str:
    """The last part of a path, its middle left out where it is too long to be written under an image."""
    name = source.rpartition("/")[2]
    half = (letters - 1) // 2
    return name if len(name) <= letters else f"{name[:half]}…{name[-half:]}"
