"""`ditlab agreement`: files, table, JSON, and what it refuses."""

from __future__ import annotations

import json

from PIL import Image

from ditlab.analyses.agreement.result import AgreementResult

QUICK = ["--images", 3, "--sampler-steps", 4, "--trajectories", 2, "--threads", 1, "--device", "cpu"]


def test_files_and_json(ditlab, place, plain, tmp_path):
    run, out = place.copy(plain), tmp_path / "figures"
    done = ditlab("agreement", run, *QUICK, "--out", out, "--json")
    assert done.status == 0, done.err
    printed = json.loads(done.out)
    result = AgreementResult.load(run / "analysis" / "agreement.json")
    assert {**result.to_json(), "files": printed["files"]} == printed
    assert sorted(path.name for path in out.iterdir()) == ["agreement-images.png", "agreement.png"]
    assert len(printed["files"]) == 3
    for path in out.iterdir():
        with Image.open(path) as image:
            assert image.width > 300


def test_what_is_printed(ditlab, place, plain):
    """`--references` and `--step` are the names of earlier versions."""
    run = place.copy(plain)
    words = ["--references", "ls", "wiener", "--window", 3, "--step", 4, "--training-images", 5]
    done = ditlab("agreement", run, *QUICK, *words, "--hide-training-images")
    assert done.status == 0, done.err
    assert f"note: {run.name}: Baselines were made of the first 5 of 20 training images." in done.out
    assert "Medians over 3 images from the same noise" in done.out
    assert "agree most with those of" in done.out
    assert (run / "analysis" / "agreement-images.png").is_file()


def test_bad_input(refused, plain):
    for words, text in (
        (["--window", 4], "--window must be odd (1, 3, 5, ...), found 4"),
        (["--window", 9], "--window must be at most 8, the images' side in pixels, found 9"),
        (["--images", 0], "--images must be at least 1, found 0"),
        (["--baselines", "ls", "ls"], "--baselines must be different ones"),
    ):
        assert text in refused("agreement", plain, *words)
    assert "expected a run's folder, found nothing" in refused("agreement", "nowhere")
