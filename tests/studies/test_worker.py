"""The process of a stage: what it refuses, and that it ends with the process that started it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ditlab.analyses import analysis
from ditlab.analyses.stored import stored_config
from ditlab.data.preparing import prepare
from ditlab.models.run import Run
from ditlab.studies.pipeline import train_job
from ditlab.studies.trial import trial_config

SETTINGS = {
    "network.depth": 1, "network.width": 16, "data.test": 20, "training.steps": 400, "training.batch_size": 8,
    "training.log_every": 10, "training.eval_every": 400, "training.save_every": 400, "evaluation.images": 5,
    "evaluation.levels": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return prepare("digits", tmp_path_factory.mktemp("sets") / "digits", size=4)


def write(path: Path, job: dict) -> Path:
    path.write_text(json.dumps({"kind": "job", "version": 1, **job}))
    return path


def start(file: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ditlab.studies.worker", str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(file: Path, **environment: str) -> tuple[int, str]:
    process = start(file, **environment)
    printed, _ = process.communicate(timeout=120)
    return process.returncode, printed


def training(digits, out: Path, steps: int = 400) -> dict:
    config = trial_config("dit-nano/1", {**SETTINGS, "training.steps": steps}, digits, attention="g", n=10, seed=1)
    return train_job(config, digits, out, device="cpu", threads=1, command="the study's command")


def measuring(digits, run: Path) -> dict:
    room = analysis("psnr-gap")
    return {
        "call": "analyze", "analysis": "psnr-gap", "model": str(run), "images": str(digits.path),
        "config": stored_config(room.Config(images=4, points=2)), "options": {"baselines": False},
        "names": ["global"], "device": "cpu", "threads": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"call": "nonsense"}, "job: expected a call of train, analyze, found 'nonsense'"),
        ({"call": "train"}, "job: expected the key 'threads', which is missing"),
        (
            {"call": "analyze", "analysis": "psnr-gap", "threads": 1, "config": {"nonsense": 1}, "options": {}},
            "job: expected settings of psnr-gap, found others",
        ),
        ({"kind": "plan"}, "expected a result of kind 'job', found 'plan'"),
    ],
)
def test_what_it_refuses(tmp_path, job, message):
    status, printed = finish(write(tmp_path / "job.json", job))
    assert status == 2
    assert printed.startswith("ditlab: ")
    assert message in printed
    assert len(printed.splitlines()) == 1


def test_it_trains_and_measures_what_the_files_say(digits, tmp_path):
    """An orphaned worker ends: a training saves first, an analysis leaves no result."""
    run = tmp_path / "run"
    file = write(tmp_path / "train.json", training(digits, run, steps=20))
    status, printed = finish(file, DITLAB_PARENT="1")
    assert (status, "stopped and saved after step" in printed) == (130, True), printed
    assert finish(file, DITLAB_PARENT=str(os.getpid()))[0] == 0
    trained = Run.open(run)
    assert trained.finished
    assert trained.record.command == "the study's command"
    file = write(tmp_path / "measure.json", measuring(digits, run))
    assert finish(file, DITLAB_PARENT="1")[0] == 130
    assert not (run / "analysis" / "psnr-gap.json").exists()
    assert finish(file)[0] == 0
    record = json.loads((run / "analysis" / "psnr-gap.json").read_text())
    assert (record["about"]["label"], record["config"]["images"]) == ("global", 4)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_training(digits, tmp_path, number):
    file = write(tmp_path / "train.json", training(digits, tmp_path / "run"))
    process = start(file)
    end = time.monotonic() + 60
    while not (tmp_path / "run" / "log.jsonl").is_file():
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to resume" in printed
    assert Run.open(tmp_path / "run").checkpoints.steps()[-1] < 400
