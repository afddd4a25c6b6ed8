"""`ditlab two-subsets`: two runs on disjoint images, what is written, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ditlab.analyses.two_subsets.measure import TwoSubsetsResult
from ditlab.models.run import Run

QUICK = ["--seeds", "3-7,20", "--sampler-steps", 3, "--threads", 1, "--device", "cpu"]


@pytest.fixture
def twin(place):
    """The plain run's twin: the next 20 images."""
    return place.trained("twin", "--skip", 20)


def test_skipping_gives_a_disjoint_set(plain, twin):
    first, second = Run.open(plain), Run.open(twin)
    assert (first.split_record.skip, second.split_record.skip, second.config.data.skip) == (0, 20, 20)
    assert not np.intersect1d(first.split.train, second.split.train).size
    assert (first.split.test == second.split.test).all()
    assert first.split.test_hash == second.split.test_hash


def test_two_runs(ditlab, place, plain, twin, tmp_path):
    run, out = place.copy(plain), tmp_path / "out"
    done = ditlab("two-subsets", run, twin, *QUICK, "--out", out, "--json")
    assert done.status == 0, done.err
    told = json.loads(done.out)
    found = TwoSubsetsResult.load(out / "two-subsets.json")
    assert {**found.to_json(), "files": told["files"]} == told
    assert (found.seeds, found.mean_removed, [facts.n for facts in found.about]) == (
        (3, 4, 5, 6, 7, 20),
        True,
        [20, 20],
    )
    names = {"two-subsets.json", "two-subsets.npz", "two-subsets.png", "two-subsets-pairs.png"}
    assert {path.name for path in out.iterdir()} == names
    for name in ("two-subsets.png", "two-subsets-pairs.png"):
        with Image.open(out / name) as image:
            assert image.width > 300
    # The batch does not matter, and each run's samples are those that `sample` draws of these seeds.
    again = ditlab("two-subsets", run, twin, *QUICK, "--batch", 2, "--keep-mean", "--hide-training-images")
    assert again.status == 0, again.err
    other = TwoSubsetsResult.load(run / "analysis" / "two-subsets.json")
    assert not other.mean_removed
    np.testing.assert_array_equal(other.pictures, found.pictures)
    sampled = tmp_path / "samples"
    words = ["--seeds", "3-7,20", "--sampler", "ddim", "--steps", 3, "--out", sampled, "--no-images", "--device", "cpu"]
    assert ditlab("sample", twin, *words).status == 0
    drawn = np.load(sampled / "samples.npz")["arr_0"].transpose(0, 3, 1, 2)
    assert found.pictures is not None
    assert np.abs(drawn.astype(int) - found.pictures[1]).max() <= 1


def test_runs_that_replay_are_told_from_the_control(ditlab, place, plain, twin, monkeypatch, tmp_path):
    """Where each run draws its own training images, every sample's closest one is found, and is not the other's."""
    monkeypatch.setattr(
        "ditlab.cli.two_subsets.draw",
        lambda denoiser, config, seeds, **more: images.pop(0),
    )
    images = [run.images.batch(run.split.train[5:11]) for run in (Run.open(plain), Run.open(twin))]
    done = ditlab("two-subsets", plain, twin, *QUICK, "--out", tmp_path / "out")
    assert done.status == 0, done.err
    found = TwoSubsetsResult.load(tmp_path / "out" / "two-subsets.json")
    assert [side.index.tolist() for side in found.nearest] == [list(range(5, 11))] * 2
    np.testing.assert_allclose(found.nearest_cosine, 1)
    assert found.difference < 0
    assert len(found.control) == 20
    assert found.control.max() < 1


def test_another_recipe_is_noted(ditlab, place, plain, tmp_path):
    other = place.trained("quick", "--skip", 20, "--training.lr", 0.01, "--training.seed", 3)
    done = ditlab("two-subsets", plain, other, *QUICK, "--out", tmp_path / "out")
    assert done.status == 0, done.err
    assert "note: training.lr is 0.001 in plain and 0.01 in quick" in done.out
    assert done.out.count("note: ") == 1  # the seed may differ


def test_bad_input(refused, place, plain, twin, conditional):
    assert "two-subsets: expected disjoint training sets, found 20 of plain's 20 images" in refused(
        "two-subsets", plain, place.trained("again", "--training.seed", "7")
    )
    half = place.trained("half", "--skip", 10)
    assert "found 10 of plain's 20 images in half's too; train one of them with --skip 20" in refused(
        "two-subsets", plain, half
    )
    assert "found network.attention = global in plain and 3,3 in local-twin" in refused(
        "two-subsets", plain, place.trained("local-twin", "--network.attention", "3,3", "--skip", 20)
    )
    assert "found objective.kind = vp in plain and edm in edm-twin" in refused(
        "two-subsets", plain, place.trained("edm-twin", "--skip", 20, preset="dit-nano/1-edm")
    )
    assert "expected training sets of one size" in refused(
        "two-subsets", plain, place.trained("fewer", "--n", 10, "--skip", 20)
    )
    assert "expected runs of one image set, seed and test images" in refused(
        "two-subsets", plain, place.trained("seed1", "--seed", 1)
    )
    assert "have different splits" in refused("two-subsets", plain, place.trained("held", "--test", 10, "--skip", 20))
    assert "named twice" in refused("two-subsets", plain, plain)
    assert "--batch: expected at least 1, found 0" in refused("two-subsets", plain, twin, "--batch", 0)
    assert "expected numbers and ranges" in refused("two-subsets", plain, twin, "--seeds", "all")
    assert "skip must not be negative, found -1" in refused(*place.words(place.folder / "no", "--skip", -1))
    assert "that are skipped" in refused(*place.words(place.folder / "no", "--skip", 5000))
