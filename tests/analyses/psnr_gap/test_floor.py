"""The floor: training and test images differ, so even a denoiser that saw neither has a "gap" on them."""

from __future__ import annotations

import pytest

import ditlab


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> ditlab.ImageSet:
    return ditlab.prepare("digits", size=8, out=tmp_path_factory.mktemp("floor") / "digits")


def gap_of(images: ditlab.ImageSet, **split: int):
    """A denoiser that shrinks, and the baselines of its split."""
    shrink = ditlab.Denoiser.wrap(lambda y, sigma, label: y / (1 + sigma.view(-1, 1, 1, 1) ** 2), shape=images.shape)
    model = ditlab.Model(shrink, images, name="shrink", **split)
    return ditlab.psnr_gap(model, images=300, sigmas=(0.3, 1.0, 3.0))


def test_the_floor_of_many_images_is_zero_within_its_interval(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gap = gap_of(digits, n=300, test=300)
    bayes, wiener, floor = gap.baselines
    low, high = floor.interval("gap_untruncated")
    assert low < 0 < high
    assert floor.average("gap_untruncated") < 0.1 * wiener.average("gap_untruncated")
    assert floor.floor == 1797 - 600
    assert not bayes.floor
    assert any(note.startswith("floor: a Wiener denoiser of 1,197 images on neither side.") for note in gap.notes)
    assert [row[0] for row in gap.table().rows] == ["shrink", "empirical Bayes", "Wiener", "floor"]
    assert (tmp_path / "external").exists()


def test_few_images_have_a_floor_above_zero(digits, tmp_path, monkeypatch):
    """Ten images may be easier or harder than 300 others: over splits the truncated floor is well above zero."""
    monkeypatch.chdir(tmp_path)
    floors = [gap_of(digits, n=10, test=300, seed=seed).baselines[-1] for seed in range(4)]
    truncated = [floor.average("gap") for floor in floors]
    assert max(truncated) > 0.1
    assert max(abs(floor.average("gap_untruncated")) for floor in floors) > 0.1


def test_no_image_is_left_for_a_floor(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [r.about.name for r in gap_of(digits, n=1497, test=300).baselines] == ["empirical Bayes", "Wiener"]
