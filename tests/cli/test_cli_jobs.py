"""The verbs at work, end to end, on tiny networks: train, resume, measure; signals, locks."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ditlab as package
from ditlab.models.run import Run
from ditlab.training.log import read_log


def lines(run: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "machine"} for line in read_log(run / "log.jsonl")]


def weights(run: Path) -> dict[str, bytes]:
    newest = max((run / "checkpoints").iterdir())
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


def start(words: list[str], cwd: Path, **more) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ditlab", *words],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **more,
    )


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_help_and_version(ditlab):
    for words in ([], ["--help"], ["help"]):
        done = ditlab(*words)
        assert done.status == 0
        assert "Start with: ditlab quickstart" in done.out
    assert ditlab("--version").out == f"ditlab {package.__version__}\n"


def test_train_finishes_and_resumes(ditlab, place, plain):
    run = place.copy(plain)
    before = weights(run)
    done = ditlab(*place.words(run))
    assert done.status == 0
    assert done.out.startswith(f"note: {run} is finished (6 steps)\ndone: train PSNR ")
    assert weights(run) == before
    done = ditlab(*place.words(run, steps=9))
    assert done.status == 0
    assert ", resuming from step 6" in done.out
    assert Run.open(run).config.training.steps == 9
    longer = place.trained("longer", **{"training.steps": 9})
    assert weights(run) == weights(longer)
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["000000008", "000000009"]


def test_train_says_its_result_as_json(ditlab, place, plain):
    done = ditlab(*place.words(plain), "--json")
    result = json.loads(done.out)
    assert (result["run"], result["steps"], result["last"]["step"]) == (str(plain), 6, 6)
    assert done.err.startswith(f"note: {plain} is finished (6 steps)\n")
    record = json.loads((plain / "config.json").read_text())
    assert record["config"]["preset"] == "dit-nano/1"
    assert (plain / record["config"]["data"]["path"]).resolve() == place.images.resolve()
    assert {"torch", "python", "processor", "device"} <= record["environment"].keys()
    assert all(
        {"train_loss", "test_loss", "psnr_gap"} <= line.keys() for line in lines(plain) if line["step"] in (3, 6)
    )


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_resumes(ditlab, place, tmp_path):
    """Interrupted and taken up again, a run has the weights and the log of an unbroken one, to the bit."""
    intervals = ["--training.log-every", 10, "--training.eval-every", 100, "--training.save-every", 100]
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    process = start(place.words(broken, *intervals, steps=300), tmp_path)
    wait_for(lambda: any(line["step"] >= 10 for line in read_log(broken / "log.jsonl")))
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    step = max(Run.open(broken).checkpoints.steps())
    assert 10 <= step < 300
    assert said.count("run the same command again to resume") == 1
    assert f"ditlab: stopped and saved after step {step}; run the same command again to resume\n" in said
    assert "Traceback" not in said
    done = ditlab(*place.words(broken, *intervals, steps=300))
    assert f", resuming from step {step}" in done.out
    assert ditlab(*place.words(whole, *intervals, steps=300)).status == 0
    assert weights(broken) == weights(whole)
    assert lines(broken) == lines(whole)


def test_two_processes_do_not_train_one_run(ditlab, place, plain, tmp_path, monkeypatch):
    from ditlab.models import creating

    fcntl = pytest.importorskip("fcntl")
    run = place.copy(plain)
    monkeypatch.setattr(creating, "run_lock", partial(creating.run_lock, wait=0.0))
    with (run / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = ditlab(*place.words(run, steps=7))
    assert (done.status, done.err) == (2, f"ditlab: run {run}: another process is training it\n")


def test_psnr_gap_of_two_runs(ditlab, place, plain, tmp_path):
    local = place.trained("local", **{"network.attention": "3,3"})
    runs = [place.copy(plain), place.copy(local)]
    words = ["psnr-gap", *runs, "--images", 20, "--points", 3, "--out", tmp_path / "out"]
    done = ditlab(*words, "--json")
    assert done.status == 0, done.err
    result = json.loads(done.out)
    assert [g["label"] for g in result["groups"]] == ["global", "3,3"]
    assert {g["n"] for g in result["groups"]} == {20}
    out = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert {"comparison.json", "psnr-curves.png", "gap-bars.png", "wiener-n20.json", "empirical-bayes-n20.npz"} <= {
        *out
    }
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == {
        k: v for k, v in result.items() if k != "files"
    }
    for picture in ("psnr-curves.png", "gap-bars.png"):
        with Image.open(tmp_path / "out" / picture) as image:
            assert image.width > 300
    for run in runs:
        found = sorted(p.name for p in (run / "analysis").iterdir())
        assert found == ["psnr-gap.csv", "psnr-gap.json", "psnr-gap.npz"]
        with (run / "analysis" / "psnr-gap.csv").open() as file:
            assert len(list(csv.reader(file))) == 4
        with np.load(run / "analysis" / "psnr-gap.npz") as arrays:
            assert np.isfinite(arrays["train_mse"]).all()
            assert arrays["train_mse"].shape[:2] == (3, 20)
    for words in (
        ["--sigmas", "0.1", "1.0", "--no-baselines"],
        ["--raw", "--checkpoint", "4", "--reduction", "psnr_mean"],
    ):
        done = ditlab("psnr-gap", runs[0], "--images", 5, "--points", 2, "--out", tmp_path / "more", *words)
        assert done.status == 0, done.err


@pytest.mark.slow
def test_a_reader_that_has_gone_is_no_error(place, plain, tmp_path):
    """`ditlab ... | head` ends quietly."""
    words = [sys.executable, "-m", "ditlab", "data", "info", str(place.images), "--sheet", str(tmp_path / "a.png")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (0, "")


def test_the_network_follows_the_objective(ditlab, place, tmp_path):
    """A variance that is learned, or is not, needs no second flag."""
    for variance, learned in (("fixed-small", False), ("learned-range", True)):
        done = ditlab(*place.words(tmp_path / variance, "--objective.variance", variance, steps=1))
        assert done.status == 0, done.err
        network = Run.open(tmp_path / variance).config.network
        assert network.learn_sigma is learned  # pyright: ignore[reportAttributeAccessIssue]
