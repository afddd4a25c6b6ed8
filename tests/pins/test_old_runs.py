"""Pins of run folders of an earlier ditlab: they open, draw the same images, measure the same numbers and resume.

`data/old` holds an image set of 40 pictures and two runs on it, `vp` and `edm` (conditional). Each config.json has the
command that made its run. They are never written again: a change of a format must still read them.
"""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

RUNS = {"vp": "ddim", "edm": "heun"}
"""Name of the run -> the sampler it is drawn with."""

CPU = ("--device", "cpu", "--threads", 1)

pytestmark = pytest.mark.parametrize("run", RUNS)


@pytest.fixture
def old(pins, tmp_path) -> Path:
    """A copy of the old folders."""
    return shutil.copytree(pins.data / "old", tmp_path / "old")


def test_an_old_run_is_small_and_whole(pins, run):
    assert sum(path.stat().st_size for path in (pins.data / "old").rglob("*") if path.is_file()) < 300_000
    record = json.loads((pins.data / "old" / "runs" / run / "config.json").read_text())
    assert record["format"] == 1
    pins.check(f"old-{run}-hash", pins.trial_hash(record["config"], record["split"]["imageset"]))


def test_an_old_run_draws_the_same_images(pins, old, run):
    words = ("--seeds", "0-3", "--sampler", RUNS[run], "--steps", 4, "--out", "drawn")
    printed = pins.run(old, "sample", f"runs/{run}", *words, *CPU)
    pins.check(f"old-{run}-samples", pins.shape(printed))
    with np.load(old / "drawn" / "samples.npz") as file:
        images = file["arr_0"]
    assert images.shape == (4, 8, 8, 3)
    expected = np.array(json.loads((pins.data / f"old-{run}-pixels.json").read_text()))
    assert expected.std() > 5
    assert np.abs(images[:, ::2, ::2].astype(int) - expected).max() <= 1


def test_an_old_run_measures_the_same_psnr(pins, old, run):
    pins.run(old, "psnr-gap", f"runs/{run}", "--images", 8, "--points", 4, "--no-references", *CPU)
    record = json.loads((old / "runs" / run / "analysis" / "psnr-gap.json").read_text())
    pins.check(f"old-{run}-psnr", {key: record[key] for key in ("averages", "curves", "peak")}, tolerance=1e-4)


def test_an_old_run_measures_the_same_attention(pins, old, run):
    pins.run(old, "attention", f"runs/{run}", "--images", 2, "--levels", 0.5, *CPU)
    record = json.loads((old / "runs" / run / "analysis" / "attention.json").read_text())
    numbers = {key: value for key, value in record.items() if key not in ("about", "environment")}
    pins.check(f"old-{run}-attention", numbers, tolerance=1e-4)


def test_an_old_run_resumes(pins, old, run):
    folder = old / "runs" / run
    before = (folder / "log.jsonl").read_text()
    words = shlex.split(json.loads((folder / "config.json").read_text())["command"])[1:]
    words[words.index("--training.steps") + 1] = "25"
    pins.run(old, *words)
    after = (folder / "log.jsonl").read_text()
    assert after.startswith(before)
    (line,) = [json.loads(line) for line in after.removeprefix(before).splitlines()]
    pins.check(f"old-{run}-resumed", {key: line[key] for key in ("step", "images", "loss", "lr")}, tolerance=1e-4)
