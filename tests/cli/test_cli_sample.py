"""`ditlab sample`: flags, what it prints, and how it refuses. The work itself is tested in tests/sampling."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

import ditlab as package

QUICK = ("--seeds", "0-3", "--sampler", "ddim", "--sampler-steps", 4, "--device", "cpu")


def test_samples_into_a_folder(ditlab, plain, tmp_path):
    done = ditlab("sample", plain, *QUICK, "--out", "a")
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "wrote 4 images to a (grid.png, samples.npz, images/)"
    assert lines[1].startswith("4 network calls per image, ")
    in_python = package.sample(plain, seeds=range(4), sampler="ddim", steps=4, device="cpu")
    assert np.array_equal(np.load(tmp_path / "a" / "samples.npz")["arr_0"], in_python.images)


def test_json_is_what_the_folder_keeps(ditlab, plain, tmp_path):
    done = ditlab("sample", plain, *QUICK, "--out", "a", "--strip", 2, "--no-images", "--json")
    result = json.loads(done.out)
    assert result.pop("out") == "a"
    assert json.loads((tmp_path / "a" / "samples.json").read_text()) == result
    assert "wrote 4 images to a (grid.png, samples.npz, strip.png)" in done.err


def test_a_finished_folder(ditlab, plain):
    assert ditlab("sample", plain, *QUICK, "--out", "a").status == 0
    done = ditlab("sample", plain, *QUICK, "--out", "a", "--batch", 2)
    assert (done.status, done.out) == (0, "a is finished (4 images)\n")
    assert json.loads(ditlab("sample", plain, *QUICK, "--out", "a", "--json").out)["count"] == 4


def test_the_default_folder_and_the_flags_of_earlier_versions(ditlab, place, conditional):
    run = place.copy(conditional)
    old = ["--seeds", "0-1", "--steps", 2, "--labels", 3, 5, "--step", 4, "--sampler", "euler", "--levels", "edm"]
    assert ditlab("sample", run, *old).status == 0
    new = ["--seeds", "0-1", "--sampler-steps", 2, "--classes", 3, 5, "--checkpoint", 4]
    done = ditlab("sample", run, *new, "--sampler", "euler", "--schedule", "edm")
    folder = run / "samples" / "000000004-euler2-edm-seeds0-1-labels3,5"
    assert done.out == f"{folder} is finished (2 images)\n"


def test_guidance(ditlab, conditional):
    done = ditlab("sample", conditional, *QUICK, "--guidance.scale", 3, "--guidance.interval", 0.2, 5, "--out", "a")
    assert "4 network calls per image (with guidance each image passes through it " in done.out
    done = ditlab("sample", conditional, *QUICK, "--guidance-sweep", 1, 2.5, "--out", "b")
    assert "wrote 8 images to b (sweep.png, images/)" in done.out
    assert "(each image passes through it 4 to 8 times)" in done.out


def test_an_interrupted_command_resumes(ditlab, plain, monkeypatch):
    words = ["sample", plain, *QUICK, "--batch", 2, "--out", "a"]

    def interrupted(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ditlab.sampling.outputs.overview_png", interrupted)
        done = ditlab(*words)
    assert (done.status, done.err) == (130, "ditlab: interrupted; run the same command again to resume\n")
    done = ditlab(*words)
    assert done.out.startswith("note: resuming: 2 of 2 batches are finished\nwrote 4 images to a ")


def test_only_the_first_process_prints(ditlab, plain, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    done = ditlab("sample", plain, *QUICK, "--out", "a", "--json")
    assert (done.status, done.out, done.err) == (0, "", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--seeds 3-1", "--seeds: expected numbers and ranges such as 0-63 or 0-9,20,30-39, found '3-1'"),
        ("--strip 65", "--strip: expected 0 to 64, the number of images, found 65"),
        ("--batch 0", "--batch: expected at least 1, found 0"),
        ("--threads 0", "--threads: expected at least 1, found 0"),
        ("--classes 1", "--classes: the model is unconditional; expected no classes"),
        ("--sampler euler --steps ddim9", "--sampler-steps: the euler sampler takes a count, found 'ddim9'"),
        ("--levels edm", "--schedule: the ddpm sampler takes the denoiser's levels; expected none, found edm"),
        ("--guidance-sweep 1 2 --guidance.scale 2", "--guidance-sweep gives the scales; expected no --guidance.scale"),
        ("--guidance-sweep 1 2 --strip 1", "expected --strip or --guidance-sweep, found both"),
    ],
)
def test_bad_input(refused, plain, words, message):
    assert refused("sample", plain, *words.split()).startswith(message)


def test_an_output_that_holds_something_else(refused, plain, tmp_path):
    (tmp_path / "file").write_text("mine")
    message = refused("sample", plain, *QUICK, "--out", "file")
    assert message == "--out file: expected a new folder or one of samples, found something else"


def test_the_help_needs_no_torch():
    code = "import sys, ditlab.cli.sample; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"torch", "numpy", "matplotlib", "PIL"} & set(done.stdout.split())
