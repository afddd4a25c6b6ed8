"""The quickstart: which runs it trains with which settings, what its page gets, and that it resumes after a kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import ditlab as package
from ditlab.data.preparing import prepare
from ditlab.errors import DitlabError
from ditlab.models.run import Run
from ditlab.reporting import report
from ditlab.studies import quickstart
from ditlab.studies.quickstart_config import QuickstartConfig

SMALL = QuickstartConfig(n=10, size=4, steps=40, seeds=(0, 1))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return prepare("photos", tmp_path_factory.mktemp("sets") / "photos", size=4)


def test_both_kinds_differ_in_attention_alone(photos):
    first, second = (quickstart.run_config(SMALL, photos, plan, 1).network for plan in quickstart.PLANS.values())
    assert (first.attention, second.attention) == ("global", "3*4")
    config = quickstart.run_config(SMALL, photos, "global", 1)
    assert (config.data.n, config.data.seed, config.training.seed) == (10, 1, 1)
    training = config.training
    assert (training.steps, training.lr, training.eval_every, training.save_every) == (40, 2e-3, 2, 2)
    assert config.network.image_size == (4, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": (1, 1)}, r"expected different values of `seeds`, found \[1, 1\]"),
        ({"seeds": ()}, r"expected different values of `seeds`, found \[\]"),
        ({"stps": 5}, "unknown setting of quickstart 'stps'"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(DitlabError, match=message):
        package.quickstart("out", **settings)


@pytest.fixture
def pages(monkeypatch):
    """What would be written as pages: (models, keywords) of each."""
    made = []

    def write_report(models, out, **keywords):
        made.append((models, keywords))
        return SimpleNamespace(path=out, sentences=["A sentence."])

    monkeypatch.setattr(report, "write_report", write_report)
    return made


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "ditlab", "quickstart", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def free(run: Path) -> bool:
    """Whether no process trains the run."""
    import fcntl

    with (run / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


@pytest.mark.slow
def test_it_resumes_after_kill_9(in_process, pages, tmp_path, monkeypatch):
    """Killed while both runs train, its processes save and end by themselves; the same command resumes."""
    pytest.importorskip("fcntl")
    monkeypatch.chdir(tmp_path)
    words = ["--out", "quick", "--size", "4", "--steps", "40", "--n", "10", "--device", "cpu"]
    runs = [tmp_path / "quick" / "runs" / name for name in ("global-seed0", "local-seed0")]
    first = start(tmp_path, *words)
    wait_for(lambda: all((run / "checkpoints").is_dir() and any((run / "checkpoints").glob("0*")) for run in runs))
    first.kill()
    first.communicate()
    wait_for(lambda: all(free(run) for run in runs), 60)
    steps = [Run.open(run).checkpoints.steps()[-1] for run in runs]
    assert all(2 <= step < 40 for step in steps), steps
    done = in_process("quickstart", *words)
    assert done.status == 0, done.err
    for run, step in zip(runs, steps, strict=True):
        assert Run.open(run).finished
        printed = (run.parent / f"{run.name}.txt").read_text()
        assert f"stopped and saved after step {step}" in printed
        assert f"resuming from step {step}" in printed
    ((models, page),) = pages
    assert [model.name for model in models] == ["global-seed0", "local-seed0"]
    assert list(models.kinds) == list(quickstart.PLANS)
    command = "ditlab quickstart --out quick --size 4 --steps 40 --n 10 --device cpu"
    assert page["commands"] == [("everything on this page", command)]
    assert Run.open(runs[0]).record.command == command
    assert "10 images of 4x4 pixels for 40 steps" in page["foreword"][0]
    assert f"The result: {tmp_path}/quick/report.html" in done.out
