"""Samples above their nearest training images, with distances; copies are marked."""

from __future__ import annotations

import numpy as np
import pytest

from ditlab.analyses.samples.figures import SampleRow, samples_with_nearest
from ditlab.errors import DitlabError
from ditlab.metrics.nearest import nearest
from ditlab.pages.theme import DARK, png


@pytest.fixture
def row() -> SampleRow:
    rng = np.random.default_rng(0)
    train = rng.integers(0, 256, (6, 3, 8, 8), np.uint8)
    samples = rng.integers(0, 256, (5, 3, 8, 8), np.uint8)
    samples[1] = train[4]
    found = nearest(samples, train)
    return SampleRow("global", samples, found, train[found.index])


def texts(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_distances_stand_under_the_pairs(row, texts_apart):
    figure = samples_with_nearest([row], columns=3)
    assert len(figure.axes) == 2
    expected = [f"{d:.1f}" for d in row.nearest.first]
    expected[1] = "0.0 copy"
    assert texts(figure) == expected
    assert figure.axes[0].get_title(loc="left") == "global"
    # Two images high with pictures, one without.
    tall = figure.axes[0].images[0].get_array().shape[0]
    alone = SampleRow("global", row.samples, row.nearest)
    low = samples_with_nearest([alone], columns=3, theme=DARK).axes[0].images[0].get_array().shape[0]
    assert tall > 1.9 * low
    texts_apart(figure)
    assert png(figure).startswith(b"\x89PNG")


def test_the_pictures_are_the_nearest_images(row):
    sheet = samples_with_nearest([row], columns=5).axes[0].images[0].get_array()
    scale = 96 // 8
    np.testing.assert_array_equal(sheet[:96:scale, :96:scale, :3], row.samples[0].transpose(1, 2, 0))
    assert row.pictures is not None
    np.testing.assert_array_equal(sheet[-96::scale, :96:scale, :3], row.pictures[0].transpose(1, 2, 0))


def test_with_one_training_image_nothing_is_a_copy(row):
    alone = SampleRow("a", row.samples, nearest(row.samples, row.samples[1:2]))
    assert not any("copy" in text for text in texts(samples_with_nearest([alone])))


def test_the_file_of_the_nearest_image_stands_under_its_distance(row, texts_apart):
    names = ["cats/a.png", "a-very-long-name-of-a-file.png", *[""] * 3]
    figure = samples_with_nearest([SampleRow("global", row.samples, row.nearest, row.pictures, names)], columns=5)
    words = texts(figure)
    assert "a.png" in words
    assert "a-very-…ile.png" in words
    assert len(words) == 5 + 2
    texts_apart(figure)


def test_samples_of_unknown_training_images_stand_alone(row, texts_apart):
    figure = samples_with_nearest([SampleRow("bare", row.samples)])
    assert texts(figure) == []
    texts_apart(figure)


def test_bad_input(row):
    with pytest.raises(DitlabError, match="at least one row"):
        samples_with_nearest([])
    with pytest.raises(DitlabError, match="as many nearest images as samples"):
        samples_with_nearest([SampleRow("a", row.samples[:3], row.nearest)])
