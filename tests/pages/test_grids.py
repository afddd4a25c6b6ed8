"""A table of images: every image in its place, enlarged without smoothing, and words that fit."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ditlab.errors import DitlabError
from ditlab.pages.grids import labelled_grid
from ditlab.pages.theme import DARK, LIGHT, png

ROWS, COLUMNS = ["seed 0\nclass 3", "estimate of\nthe image"], ["t = 999", "t = 500", "image"]


def table(channels: int = 3) -> np.ndarray:
    """Each image of one grey level of its own: 30, 60, ..., 180."""
    levels = 30 * np.arange(1, 7, dtype=np.uint8).reshape(2, 3, 1, 1, 1)
    return np.broadcast_to(levels, (2, 3, channels, 8, 8)).copy()


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
@pytest.mark.parametrize("channels", [1, 3])
def test_images_lie_where_their_words_say(theme, channels):
    figure = labelled_grid(table(channels), ROWS, COLUMNS, title="a sweep", theme=theme)
    with Image.open(io.BytesIO(png(figure))) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    found = {}
    for level in range(30, 181, 30):
        rows, columns = np.nonzero((pixels == level).all(-1))
        # A square of one colour, with no other between.
        assert abs(np.ptp(rows) - np.ptp(columns)) <= 2
        assert len(rows) > 0.95 * (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        found[level] = rows.mean(), columns.mean()
    for row in (0, 1):
        first, second, third = (found[90 * row + 30 * i] for i in (1, 2, 3))
        assert first[0] == pytest.approx(second[0], abs=1)
        assert first[1] < second[1] < third[1]
        assert third[1] - second[1] == pytest.approx(second[1] - first[1], abs=2)
    assert found[30][0] < found[120][0]
    axes = figure.axes[0]
    figure.canvas.draw()
    inside = figure.bbox
    for words in (*axes.get_xticklabels(), *axes.get_yticklabels(), axes.title):
        box = words.get_window_extent()
        assert inside.x0 <= box.x0, words
        assert box.x1 <= inside.x1, words
        assert inside.y0 <= box.y0, words
        assert box.y1 <= inside.y1, words
    assert [words.get_text() for words in axes.get_xticklabels()] == COLUMNS
    assert [words.get_text() for words in axes.get_yticklabels()] == ROWS


def test_tables_that_cannot_be_drawn():
    with pytest.raises(DitlabError, match=r"expected images of 2 rows and 2 columns, found shape \[2, 3, 3, 8, 8\]"):
        labelled_grid(table(), ROWS, COLUMNS[:2])
    with pytest.raises(DitlabError, match="expected uint8"):
        labelled_grid(table().astype(float), ROWS, COLUMNS)
