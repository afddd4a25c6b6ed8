"""The two-subset test on samples whose pairs and nearest training images are known."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from ditlab.analyses.two_subsets.compatibility import check_disjoint, check_provenance
from ditlab.analyses.two_subsets.config import TwoSubsetsConfig
from ditlab.analyses.two_subsets.measure import closest, compare_subsets
from ditlab.analyses.two_subsets.result import TwoSubsetsResult
from ditlab.errors import DitlabError
from ditlab.provenance import Provenance

FIRST = Provenance("a", n=6, seed=1, step=5, ema=True, split_family="f", split_hash="1", settings={"preset": "x"})
SECOND = replace(FIRST, name="b", split_hash="2")


def pictures(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 4, 5)).astype(np.uint8)


def parts(images: np.ndarray, size: int, mirror: bool = False):
    for start in range(0, len(images), size):
        part = images[start : start + size]
        yield part, part[..., ::-1] if mirror else None


@pytest.mark.parametrize("mean_removed", [True, False])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_the_closest_is_that_of_all_pairs(size, mean_removed):
    samples, training = pictures(5, 0), pictures(9, 1)
    result = closest(samples, parts(training, size), mean_removed=mean_removed)

    def vector(image):
        flat = image.astype(float).ravel() / 127.5 - 1
        return flat - flat.mean() if mean_removed else flat

    cosines = np.array(
        [
            [vector(s) @ vector(t) / np.linalg.norm(vector(s)) / np.linalg.norm(vector(t)) for t in training]
            for s in samples
        ]
    )
    assert result.index.tolist() == cosines.argmax(1).tolist()
    np.testing.assert_allclose(result.cosine, cosines.max(1))
    assert not result.mirrored.any()


def test_a_mirrored_image_is_found_where_it_counts():
    training = pictures(6, 1)
    samples = training[2:4, :, :, ::-1]
    result = closest(samples, parts(training, 4, mirror=True))
    assert (result.index.tolist(), result.mirrored.tolist()) == ([2, 3], [True, True])
    np.testing.assert_allclose(result.cosine, 1)
    assert closest(samples, parts(training, 4)).cosine.max() < 0.99


def compare(one: np.ndarray, two: np.ndarray, **more) -> TwoSubsetsResult:
    first, second = pictures(6, 1), pictures(6, 2)
    return compare_subsets(
        (FIRST, SECOND), (one, two), (lambda: parts(first, 4), lambda: parts(second, 4)), first,
        seeds=range(len(one)), settings={"sampler": "ddim"}, **more,
    )  # fmt: skip


def test_networks_that_memorize_and_networks_that_generalize():
    memory = compare(pictures(6, 1)[:4], pictures(6, 2)[:4])
    assert memory.nearest[0].index.tolist() == memory.nearest[1].index.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(memory.nearest_cosine, 1)
    assert memory.pair.max() < 0.5
    assert memory.difference == pytest.approx(memory.pair.mean() - 1)
    assert "more like its training images" in memory.sentences()[1]
    same = pictures(4, 9)
    general = compare(same, same)
    np.testing.assert_allclose(general.pair, 1)
    assert general.nearest_cosine.max() < 0.6
    assert general.difference > 0.3
    assert "agree more with each other" in general.sentences()[1]
    # The control knows nothing of the samples: the first set's images, looked for in the second.
    np.testing.assert_array_equal(general.control, memory.control)
    np.testing.assert_allclose(general.control, closest(pictures(6, 1), parts(pictures(6, 2), 6)).cosine)


def test_networks_that_learned_nothing_agree_too():
    """Equal samples that are like no training image: the cosine of the pair alone would praise them."""
    first = pictures(6, 1)
    second = np.clip(first.astype(int) + pictures(6, 2) // 16, 0, 255).astype(np.uint8)
    noise = pictures(4, 9)
    result = compare_subsets(
        (FIRST, SECOND), (noise, noise), (lambda: parts(first, 4), lambda: parts(second, 4)), first, seeds=range(4)
    )
    assert result.difference > 0.5
    assert result.control.min() > 0.9
    assert "networks that have learned nothing agree, too" in result.sentences()[-1]
    assert len(compare(first[:4], pictures(6, 2)[:4]).sentences()) == 3


def test_with_the_mean_bright_images_are_alike():
    bright = [np.clip(pictures(4, seed).astype(int) // 4 + 190, 0, 255).astype(np.uint8) for seed in (3, 4)]
    assert compare(*bright, mean_removed=False).pair.min() > 0.8
    assert compare(*bright).pair.max() < 0.6


def test_results_are_saved_and_loaded(tmp_path):
    result = compare(pictures(20, 5), pictures(20, 6))
    path = result.save(tmp_path)
    again = TwoSubsetsResult.load(path)
    assert again.to_json() == result.to_json() == json.loads(path.read_text())
    assert again.about == (FIRST, SECOND)
    assert again.pictures is not None
    assert again.pictures.shape == (2, 16, 3, 4, 5)
    np.testing.assert_array_equal(again.pictures, result.pictures)
    path.write_text(path.read_text().replace('"pair"', '"couple"'))
    with pytest.raises(DitlabError, match="a field is missing or unknown"):
        TwoSubsetsResult.load(path)


def test_what_cannot_be_compared():
    with pytest.raises(DitlabError, match="expected training sets of one size, found N = 6 of a and N = 7 of b"):
        check_provenance(FIRST, replace(SECOND, n=7))
    with pytest.raises(DitlabError, match="expected runs of one image set, seed and test images"):
        check_provenance(FIRST, replace(SECOND, split_family="g"))
    with pytest.raises(DitlabError, match="found the split families none of a"):
        check_provenance(replace(FIRST, split_family=""), replace(SECOND, split_family=""))
    check_disjoint(FIRST, SECOND, (np.arange(6), np.arange(6, 12)))
    with pytest.raises(DitlabError, match=r"found 2 of a's 6 images in b's too; train one of them with `skip` = 6"):
        check_disjoint(FIRST, SECOND, (np.arange(6), np.arange(4, 10)))
    with pytest.raises(DitlabError, match="expected at least one training image"):
        closest(pictures(2, 0), [])
    with pytest.raises(DitlabError, match="expected training images"):
        closest(pictures(2, 0), [(pictures(2, 0)[..., :4], None)])


def test_samples_that_are_nearly_a_training_image():
    first, second = pictures(6, 1), pictures(6, 2)
    near = np.clip(first[:3].astype(int) + pictures(3, 7) // 8, 0, 255).astype(np.uint8)
    result = compare(np.concatenate([near, pictures(2, 8)]), np.concatenate([pictures(4, 9), second[5:]]))
    assert result.near_copies.tolist() == [[True] * 3 + [False] * 2, [False] * 4 + [True]]


def test_settings():
    for change, text in (
        ({"seeds": "all"}, "`seeds`: expected numbers and ranges"),
        ({"batch": 0}, "`batch` must be at least 1, found 0"),
    ):
        with pytest.raises(DitlabError, match=text):
            replace(TwoSubsetsConfig(), **change)
