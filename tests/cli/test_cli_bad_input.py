"""Input that cannot be used: one sentence (where, expected, found), exit status 2, and not a byte written."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress

import pytest

import ditlab as package


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("trian", "unknown verb 'trian' (nearest: train)"),
        ("xyzzy", "unknown verb 'xyzzy' (known: agreement, "),
        ("data", "'data' needs one of: data prepare, data encode, data info; found nothing"),
        ("data make", "'data' needs one of: data prepare, data encode, data info; found make"),
        ("train", "train: expected a preset first (dit-nano/1, "),
        ("train --data digits", "train: expected a preset first ("),
        ("train dit-nona/1 --data digits", "unknown preset 'dit-nona/1' (nearest: dit-nano/1, "),
        ("train unet --data digits", "unknown preset 'unet' ("),
        ("train dit-nano/1", "--data: expected an image set's folder or a source of images, found nothing"),
        ("train dit-nano/1 --data none", "expected a folder at none, found nothing"),
        ("train dit-nano/1 --data folder:none", "folder source: expected a folder at none, found nothing"),
        ("train dit-nano/1 --data digits --device tpu9", "--device: expected 'cpu', 'cuda' or 'cuda:N', found 'tpu9'"),
        ("train dit-nano/1 --data digits --threads 0", "--threads: expected at least 1, found 0"),
        ("train dit-nano/1 --data x --network.attention 4,g,g,g", "expected an odd size (3, 5, 7, ...), found 4"),
        ("train dit-nano/1 --data x --network.attention 3,g", "one entry for each of 4 layers, found 2"),
        ("train dit-nano/1 --data x --network.attention locl", "unknown attention plan 'locl' (nearest: local"),
        ("train dit-nano/1 --data x --training.steps 0", "training: steps must be at least 1, found 0"),
        ("train dit-nano/1 --data x --network.width 30", "width must be a multiple of 4 (position table), found 30"),
        ("sample none", "run none: expected a run's folder, found nothing"),
        ("psnr-gap none", "run none: expected a run's folder, found nothing"),
        ("report none", "run none: expected a run's folder, found nothing"),
        ("psnr-gap", "psnr-gap: expected at least 1 model, found 0"),
        ("report", "models: expected at least one model, found none"),
        ("quickstart --seeds 1 1", "expected different values of --seeds, found [1, 1]"),
        ("data prepare folder:none set", "folder source: expected a folder at none, found nothing"),
        ("data info none", "image set: expected a folder at none, found nothing"),
    ],
)
def test_names_and_numbers(refused, words, says):
    assert says in refused(*words.split())


def test_text_offered_as_images(refused, tmp_path):
    (tmp_path / "notes.txt").write_text("not a picture\n")
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a.png", "b.jpg"):
        (texts / name).write_text("not a picture\n")
    says = refused("data", "prepare", "folder:texts", "set")
    assert "expected at least 2 usable images, found 0 (skipped 2 not images: a.png, b.jpg" in says
    says = refused("train", "dit-nano/1", "--data", "folder:texts", "--size", "8")
    assert "expected at least 2 usable images, found 0" in says
    says = refused("data", "prepare", "folder:notes.txt", "set")
    assert says == "folder source: expected a folder at notes.txt, found a file"
    says = refused("data", "prepare", "array:notes.txt", "set")
    assert says == "notes.txt: expected a .npy or .npz file, found another format (pickles are not read)"
    assert "notes.txt" in refused("train", "dit-nano/1", "--data", "notes.txt")
    assert refused("sample", "notes.txt") == "run notes.txt: expected a run's folder, found a file"


def test_more_images_than_there_are(refused, place, tmp_path):
    out = tmp_path / "run"
    says = refused(*place.words(out, "--n", 5000))
    assert says == f"split: N = 5000 train images asked for, but {place.images} has 1777 besides 20 test images"
    says = refused(*place.words(out, "--test", 5000))
    assert says == f"split: expected at most 1797 test images, which {place.images} has, found 5000"
    assert "n must be at least 1, found 0" in refused(*place.words(out, "--n", 0))


def test_windows_that_do_not_fit(refused, ditlab, place, tmp_path):
    out = tmp_path / "run"
    says = refused(*place.words(out, "--network.attention", "13,g"))
    assert says == "attention window 13: expected a size of at most 8 on a grid of 8x8 tokens, found 13"
    assert "odd size" in refused(*place.words(out, "--network.attention", "6,g"))
    # Patches make the grid coarser; 7 fits on 8x8 pixels, not on 4x4 tokens.
    says = refused(*place.words(out, "--network.attention", "7,g", "--network.patch", 2))
    assert says == "attention window 7: expected a size of at most 4 on a grid of 4x4 tokens, found 7"
    says = refused(*place.words(out, "--network.patch", 3))
    assert says == "DiT config: image_size must be multiples of the patch 3, found (8, 8)"


def test_folders_that_are_something_else(refused, place, plain, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter.txt").write_text("mine")
    for verb in ("sample", "psnr-gap", "report"):
        says = refused(verb, tmp_path / "folder")
        assert says == f"{tmp_path}/folder/config.json: expected a run's config.json, found nothing"
    assert refused(*place.words(tmp_path / "folder")).endswith("the folder exists and is not a run; give another --out")
    assert refused(*place.words(tmp_path / "file")).endswith("expected a new folder or a run's, found a file")
    assert "its folder could not be written: Not a directory" in refused(*place.words(tmp_path / "file" / "run"))
    sample = ["sample", plain, "--seeds", 0, "--steps", 2, "--out"]
    assert refused(*sample, tmp_path / "folder").endswith(
        "expected a new folder or one of samples, found something else"
    )
    assert refused(*sample, tmp_path / "file").endswith("expected a new folder or one of samples, found something else")


def test_other_settings_for_the_same_run(refused, place, plain):
    says = refused(*place.words(plain, "--training.lr", 0.01))
    assert "it was started with training.lr = 0.001, now 0.01 is asked for; give another --out" in says
    says = refused(*place.words(plain, "--network.attention", "3,3", "--n", 10))
    assert "(2 settings differ)" in says
    says = refused(*place.words(plain, steps=3))
    assert "it has already made 6 steps, now training.steps = 3 is asked for" in says


def test_batches_that_cannot_be_cut(refused, place, tmp_path):
    says = refused(*place.words(tmp_path / "run", "--training.accumulate", 3))
    assert says == "training: batch_size 8 must be a multiple of accumulate 3"


def test_labels(refused, place, plain):
    conditional = place.trained("conditional", conditional=True)
    for label in (11, -1):
        says = refused("sample", conditional, "--seeds", "0-1", "--steps", 2, "--labels", label)
        assert says == f"--classes: expected classes 0..9 (or 10 for none), found {label}"
    says = refused("sample", plain, "--labels", 1)
    assert says == "--classes: the model is unconditional; expected no classes"
    says = refused(*place.words(plain, "--network.num-classes", 3))
    assert says == "config: expected network.num_classes 10 or 0, found 3"


def test_sampling_and_measuring_settings(refused, plain):
    assert "--batch: expected at least 1, found 0" in refused("sample", plain, "--batch", 0)
    assert "expected counts of at least 1 such as 250" in refused("sample", plain, "--steps", "many")
    assert refused("sample", plain, "--step", 5).endswith("no checkpoint of step 5, found 4, 6")
    assert "takes a count, found 'ddim5'" in refused("sample", plain, "--sampler", "heun", "--steps", "ddim5")
    assert "named twice" in refused("psnr-gap", plain, plain)
    assert "--names: expected 1 names, one for each model, found 2" in refused("psnr-gap", plain, "--labels", "a", "b")
    assert "images must be at least 1, found 0" in refused("psnr-gap", plain, "--images", 0)
    assert "report: --samples must be from 0 to 64, found -1" in refused("report", plain, "--samples", -1)


def test_runs_with_different_splits(refused, place, plain):
    other = place.trained("other-split", **{"test": 30, "training.steps": 1})
    for verb in ("psnr-gap", "report"):
        says = refused(verb, plain, other)
        assert f"models {plain} and {other} have different splits" in says
        assert says.endswith("so they cannot be compared")


def test_a_full_disk(ditlab, place, small_disk):
    """The first checkpoint fits, the second does not: it is said, the first stays, and with room the run goes on."""
    run = small_disk / "run"
    words = place.words(run, "--training.keep", 2)
    done = ditlab(*words)
    assert done.status == 2
    assert done.err == (
        f"ditlab: {run}/checkpoints/000000004: the checkpoint could not be written: the disk is full (0 MiB free); "
        "earlier checkpoints are as they were\n"
    )
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["000000002"]
    package.load(run)
    with (small_disk / "fill").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"\0" * 4096):
            pass
    kept = sorted(p.name for p in run.rglob("*"))
    done = ditlab(*words)
    assert (done.status, len(done.err.splitlines())) == (2, 1)
    assert "No space left on device" in done.err
    done = ditlab("sample", run, "--seeds", "0-1", "--steps", 2)
    assert (done.status, len(done.err.splitlines())) == (2, 1)
    assert done.err.endswith("could not be written (No space left on device); nothing was kept\n")
    assert sorted(p.name for p in run.rglob("*")) == kept
    done = ditlab(*place.words(small_disk / "new"))
    assert done.err == f"ditlab: run {small_disk}/new: its folder could not be written: No space left on device\n"
    done = ditlab("data", "prepare", "digits", small_disk / "set", "--size", 8)
    assert done.status == 2
    assert sorted(p.name for p in small_disk.iterdir()) == ["fill", "run"]
    (small_disk / "fill").unlink()
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    assert ditlab(*words).status == 0
    unbroken = place.trained("plain")
    for name in ("model", "ema", "optimizer"):
        part = f"checkpoints/000000006/{name}.safetensors"
        assert (run / part).read_bytes() == (unbroken / part).read_bytes()


@pytest.mark.slow
def test_a_process_of_its_own_ends_the_same_way(tmp_path):
    for words, says in (
        (["trian"], "unknown verb 'trian' (nearest: train)"),
        (["sample", "model.pt"], "model.pt: expected a checkpoint, found nothing"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "ditlab", *words], capture_output=True, text=True, cwd=tmp_path, timeout=60
        )
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"ditlab: {says}\n")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["psnr-gap", "attention", "jacobian", "agreement", "report"])
def test_a_place_for_results_that_is_none_is_refused_before_the_work(refused, plain, tmp_path, verb, monkeypatch):
    file = tmp_path / "file"
    file.write_text("mine")
    says = f"--out {file / 'deep'}: expected a folder, found a file at {file}"
    assert says in refused(verb, plain, "--out", file / "deep" / ("page.html" if verb == "report" else ""))
    monkeypatch.setattr("os.access", lambda place, mode: False)
    assert "expected a folder that can be written to, found" in refused(verb, plain, "--out", tmp_path / "new" / "page")
    assert file.read_text() == "mine"


def test_two_subsets_refuse_such_a_place_too(refused, plain, tmp_path):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file"
    assert f"--out {out}: expected a folder, found a file at {out}" in refused(
        "two-subsets", plain, plain, "--out", out
    )


def test_a_damaged_checkpoint_is_passed_over_with_a_note(refused, ditlab, place, plain):
    run = place.copy(plain)
    newest = run / "checkpoints" / "000000006" / "model.safetensors"
    whole = newest.read_bytes()
    newest.write_bytes(whole[:1000])
    note = f"{newest}: expected {len(whole)} bytes, found 1000 (truncated?); going back to the checkpoint of step 4"
    done = ditlab("sample", run, "--seeds", 0, "--sampler-steps", 2, "--out", "images")
    assert done.status == 0
    assert f"note: {note}" in done.out
    assert "found 1000 (truncated?)" in refused("sample", run, "--checkpoint", 6)
    # Training does not call a damaged last step finished: it makes the steps again.
    done = ditlab(*place.words(run))
    assert done.status == 0
    assert note in done.out
    assert newest.read_bytes() == whole


@pytest.mark.parametrize("verb", ["sample", "psnr-gap", "report"])
def test_a_run_that_is_damaged(refused, place, plain, verb):
    run = place.copy(plain)
    (run / "config.json").write_text("steps: 3\n")
    assert refused(verb, run) == f"{run}/config.json: expected JSON, found something else"
