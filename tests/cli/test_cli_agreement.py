"""`ditlab agreement`: files, table, JSON, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from ditlab.analyses.agreement.result import REFERENCES, AgreementResult
from ditlab.models.run import Run

QUICK = ["--images", 3, "--sampler-steps", 4, "--trajectories", 2, "--threads", 1, "--device", "cpu"]


def test_all_references(ditlab, place, plain, tmp_path):
    run, out = place.copy(plain), tmp_path / "figures"
    done = ditlab("agreement", run, *QUICK, "--out", out, "--json")
    assert done.status == 0, done.err
    told = json.loads(done.out)
    found = AgreementResult.load(run / "analysis" / "agreement.json")
    assert {**found.to_json(), "files": told["files"]} == told
    assert [one.name for one in found.references] == list(REFERENCES)
    assert (found.about.n, found.about.step, found.about.ema, found.training_images) == (20, 6, True, 20)
    assert sorted(path.name for path in out.iterdir()) == ["agreement-images.png", "agreement.png"]
    assert len(told["files"]) == 3
    for path in out.iterdir():
        with Image.open(path) as image:
            assert image.width > 300
    # The references know the run's own training images.
    opened = Run.open(run)
    train = opened.images.batch(opened.split.train).numpy()
    memory = found.references[0].images
    assert memory is not None
    assert min(np.abs(train - image).max((1, 2, 3)).min() for image in memory) < 1e-3


def test_a_fixed_window_raw_weights_and_few_images(ditlab, place, plain):
    run = place.copy(plain)
    words = ["--references", "ls", "wiener", "--window", 3, "--raw", "--step", 4, "--training-images", 5]
    done = ditlab("agreement", run, *QUICK, *words, "--hide-training-images")
    assert done.status == 0, done.err
    found = AgreementResult.load(run / "analysis" / "agreement.json")
    assert [one.name for one in found.references] == ["ls", "wiener"]
    assert (found.about.step, found.about.ema, found.training_images) == (4, False, 5)
    assert found.references[0].windows is not None
    assert set(found.references[0].windows.sizes) == {3}
    assert "note: References were made of the first 5 of 20 training images." in done.out
    assert "medians over 3 images" in done.out
    assert (run / "analysis" / "agreement-images.png").is_file()


def test_a_conditional_run_is_told_no_class(ditlab, place, conditional):
    run = place.copy(conditional)
    done = ditlab("agreement", run, *QUICK, "--references", "wiener")
    assert done.status == 0, done.err
    assert "note: The denoiser was told no class; references know none." in done.out


def test_a_run_that_mirrors_is_compared_with_both_sides(ditlab, place):
    run = place.copy(place.trained("mirroring", "--training.flip"))
    done = ditlab("agreement", run, *QUICK, "--references", "empirical-bayes")
    assert done.status == 0, done.err
    assert "references know each of them both ways" in done.out
    found = AgreementResult.load(run / "analysis" / "agreement.json")
    opened = Run.open(run)
    train = opened.images.batch(opened.split.train).numpy()
    both, memory = np.concatenate([train, train[..., ::-1]]), found.references[0].images
    assert memory is not None
    assert max(np.abs(both - image).max((1, 2, 3)).min() for image in memory) < 1e-2
    assert found.training_images == 20


def test_bad_input(refused, plain):
    for words, says in (
        (["--window", 4], "expected an odd size (1, 3, 5, ...), found 4"),
        (["--window", 9], "expected at most 8, the images' side in pixels, found 9"),
        (["--candidates", 9, 11], "--candidates: expected one of at most 8"),
        (["--images", 0], "images must be at least 1, found 0"),
        (["--references", "ls", "ls"], "expected different ones"),
        (["--sampler-steps", 5000], "5000"),
        (["--step", 5], "no checkpoint of step 5"),
    ):
        assert says in refused("agreement", plain, *words)
    assert "expected a run's folder, found nothing" in refused("agreement", "nowhere")
