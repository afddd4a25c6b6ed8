"""Nearest training images: exact against brute force, whatever the chunks; copies; what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ditlab.errors import DitlabError
from ditlab.metrics.nearest import Nearest, NearestResult, nearest, nearest_in
from ditlab.provenance import Provenance


@pytest.fixture
def sets() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (7, 3, 4, 5), np.uint8), rng.integers(0, 256, (23, 3, 4, 5), np.uint8)


def brute_force(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Distances [images, references], one pair at a time."""
    return np.array([[np.sqrt(((a.astype(float) - b) ** 2).mean()) for b in references] for a in images])


@pytest.mark.parametrize("chunk", [1, 2, 5, 22, 23, 1000])
@pytest.mark.parametrize("mirror", [False, True])
def test_as_brute_force(sets, chunk, mirror):
    images, references = sets
    distances = brute_force(images, references)
    if mirror:
        turned = brute_force(images, references[..., ::-1])
        expected_turned = turned.argmin(1)
        distances = np.minimum(distances, turned)
    found = nearest(images, references, mirror=mirror, chunk=chunk)
    order = np.sort(distances, axis=1)
    np.testing.assert_array_equal(found.index, distances.argmin(1))
    np.testing.assert_allclose(found.first, order[:, 0], rtol=1e-12)
    np.testing.assert_allclose(found.second, order[:, 1], rtol=1e-12)
    if mirror:
        assert found.mirrored.any()
        np.testing.assert_array_equal(found.index[found.mirrored], expected_turned[found.mirrored])
    else:
        assert not found.mirrored.any()


def test_parts_with_twins_of_their_own(sets):
    """Places count through the parts, and a twin need not be the mirrored image."""
    images, references = sets
    twins = np.random.default_rng(1).integers(0, 256, references.shape, np.uint8)
    bounds = [(0, 1), (1, 9), (9, 23)]
    found = nearest_in(images, ((references[a:b], twins[a:b]) for a, b in bounds))
    plain, turned = brute_force(images, references), brute_force(images, twins)
    both = np.minimum(plain, turned)
    np.testing.assert_array_equal(found.index, both.argmin(1))
    np.testing.assert_allclose(found.second, np.sort(both, axis=1)[:, 1], rtol=1e-12)
    np.testing.assert_array_equal(found.mirrored, turned.min(1) < plain.min(1))
    assert 0 < found.mirrored.sum() < 7
    assert found.take(3, 2).index.tolist() == found.index[2:5].tolist()


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_equal_images_and_ties(sets, chunk):
    images, references = sets
    references = references.copy()
    references[[4, 9]] = images[2]
    found = nearest(images, references, chunk=chunk)
    assert found.index[2] == 4
    assert (found.first[2], found.second[2], found.ratio[2]) == (0, 0, 1)
    references[9] = 255 - images[2]
    found = nearest(images, references, chunk=chunk)
    assert (found.index[2], found.first[2], found.ratio[2]) == (4, 0, 0)
    assert found.second[2] > 0
    assert found.copied.tolist() == [i == 2 for i in range(7)]
    assert found.copies == 1


def test_units_are_grey_levels():
    black, grey = np.zeros((1, 3, 8, 8), np.uint8), np.full((1, 3, 8, 8), 10, np.uint8)
    assert nearest(black, grey).first == [10.0]
    assert nearest(np.full((1, 3, 8, 8), 255, np.uint8), black).first == [255.0]


def test_one_reference_says_nothing_about_copies(sets):
    images, references = sets
    found = nearest(images, references[:1])
    assert np.isinf(found.second).all()
    assert found.copies is None
    result = NearestResult(Provenance("a"), found)
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["samples"]["second"] == [None] * 7
    assert "copies" not in result.sentence()


def test_the_sentence_counts_copies(sets):
    images, references = sets
    replayed = references[[3, 3, 8, 0]]
    result = NearestResult(Provenance("a", "global", 23), nearest(replayed, references), nearest(images, references))
    assert "4 of 4 are copies (d1/d2 < 1/3)." in result.sentence()
    assert result.sentence().startswith(
        "global, N = 23: median distance of 4 samples to their nearest training image 0.0"
    )
    assert "for 7 held-out images" in result.sentence()
    assert isinstance(result.samples.take(2), Nearest)
    assert result.samples.take(2).index.tolist() == [3, 3]


def test_bad_input(sets):
    images, references = sets
    with pytest.raises(DitlabError, match="at least one image on each side, found 7 and 0"):
        nearest(images, references[:0])
    with pytest.raises(DitlabError, match="expected at least one image, found none"):
        nearest(images[:0], references)
    with pytest.raises(DitlabError, match="one shape"):
        nearest(images, references[..., :4])
