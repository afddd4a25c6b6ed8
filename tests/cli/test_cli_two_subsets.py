"""`ditlab two-subsets`: two runs on disjoint images, what is written, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ditlab.analyses.two_subsets.result import TwoSubsetsResult

QUICK = ["--seeds", "3-7,20", "--sampler-steps", 3, "--threads", 1, "--device", "cpu"]


@pytest.fixture
def twin(place):
    """The plain run's twin: the next 20 images."""
    return place.trained("twin", skip=20)


def test_two_runs(ditlab, place, plain, twin, tmp_path):
    run, out = place.copy(plain), tmp_path / "out"
    done = ditlab("two-subsets", run, twin, *QUICK, "--out", out, "--json")
    assert done.status == 0, done.err
    printed = json.loads(done.out)
    result = TwoSubsetsResult.load(out / "two-subsets.json")
    assert {**result.to_json(), "files": printed["files"]} == printed
    names = {"two-subsets.json", "two-subsets.npz", "two-subsets.png", "two-subsets-pairs.png"}
    assert {path.name for path in out.iterdir()} == names
    for name in ("two-subsets.png", "two-subsets-pairs.png"):
        with Image.open(out / name) as image:
            assert image.width > 300
    again = ditlab("two-subsets", run, twin, *QUICK, "--batch", 2, "--keep-mean", "--hide-training-images")
    assert again.status == 0, again.err
    assert "samples from the same noise" in again.out
    other = TwoSubsetsResult.load(run / "analysis" / "two-subsets.json")
    assert not other.mean_removed
    np.testing.assert_array_equal(other.pictures, result.pictures)


def test_the_samples_are_those_of_ditlab_sample(ditlab, plain, twin, tmp_path):
    assert ditlab("two-subsets", plain, twin, *QUICK, "--out", tmp_path / "out").status == 0
    sampled = tmp_path / "samples"
    words = ["--seeds", "3-7,20", "--sampler", "ddim", "--sampler-steps", 3, "--out", sampled, "--no-images"]
    assert ditlab("sample", twin, *words, "--device", "cpu").status == 0
    drawn = np.load(sampled / "samples.npz")["arr_0"].transpose(0, 3, 1, 2)
    pictures = TwoSubsetsResult.load(tmp_path / "out" / "two-subsets.json").pictures
    assert pictures is not None
    assert np.abs(drawn.astype(int) - pictures[1]).max() <= 1


def test_bad_input(refused, place, plain, twin):
    half = place.trained("half", skip=10)
    assert "found 10 of plain's 20 images in half's too" in refused("two-subsets", plain, half)
    assert "named twice" in refused("two-subsets", plain, plain)
    assert "expected 2 models, found 1" in refused("two-subsets", plain)
    assert "--batch must be at least 1, found 0" in refused("two-subsets", plain, twin, "--batch", 0)
    assert "expected numbers and ranges" in refused("two-subsets", plain, twin, "--seeds", "all")
    assert "skip must not be negative, found -1" in refused(*place.words(place.folder / "no", "--skip", -1))
    assert "that are skipped" in refused(*place.words(place.folder / "no", "--skip", 5000))
