"""The local runner, with processes that end at once: what it starts, what it says, what a failure leaves alone."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial

import pytest
from rich.console import Console

from ditlab.errors import DitlabError
from ditlab.studies import runner
from ditlab.studies.runner import Job, Progress, Slot, Stage, clock, make_slots, run_jobs, summary

SLOTS = [Slot(1), Slot(1)]
GOOD, BAD = ("--version",), ("nonsense",)


def quiet() -> Console:
    return Console(file=io.StringIO())


def job(name: str, folder, *commands: tuple[str, ...], **more) -> Job:
    stages = [Stage(f"stage{i}", words) for i, words in enumerate(commands)]
    return Job(name, folder / f"{name}.txt", lambda slot: stages, **more)


def test_stages_run_in_order_and_a_failure_ends_its_job_alone(tmp_path):
    console, ended = quiet(), []
    jobs = [
        job("bad", tmp_path, GOOD, BAD, GOOD, ended=ended.append),
        job("good", tmp_path, GOOD, GOOD, ended=ended.append),
        job("done", tmp_path),
    ]
    outcomes = run_jobs(jobs, SLOTS, console, title="test")
    assert [(o.name, o.state) for o in outcomes] == [("bad", "failed"), ("good", "done"), ("done", "done")]
    assert outcomes[0].reason.startswith("unknown verb 'nonsense' (known: ")
    assert outcomes[0].reason.endswith(f"(status 2; all it said: {tmp_path / 'bad.txt'})")
    assert outcomes[0].command == "ditlab nonsense"
    assert sorted(o.name for o in ended) == ["bad", "good"]
    assert (tmp_path / "good.txt").read_text().count("$ ditlab --version\nditlab ") == 2
    # The third stage of the failed one was never started.
    assert (tmp_path / "bad.txt").read_text().count("$ ditlab") == 2
    assert summary(outcomes) == {
        "done": 2, "failed": [{"name": "bad", "reason": outcomes[0].reason, "command": "ditlab nonsense"}]
    }  # fmt: skip
    said = console.file.getvalue()
    assert re.search(r"^\[0/3\] bad: stage0$", said, re.MULTILINE)
    assert re.search(r"^\[\d/3\] bad: failed: unknown verb", said, re.MULTILINE)


def test_what_a_stage_took_is_told(tmp_path):
    spent = []
    stages = [Stage("one", GOOD, spent.append)]
    run_jobs([Job("a", tmp_path / "a.txt", lambda slot: stages)], SLOTS, quiet(), title="test")
    assert len(spent) == 1
    assert spent[0].seconds > 0
    if sys.platform == "linux":
        assert 0 <= spent[0].cpu_seconds < 60


def test_what_cannot_be_recorded_fails_the_job(tmp_path):
    def full(spent):
        raise DitlabError("cell.json: could not be written (No space left on device)")

    def refuse(slot):
        raise DitlabError("run x: it is damaged")

    def forbid(argument):
        raise PermissionError(13, "Permission denied", "runs/x")

    jobs = [
        Job("full", tmp_path / "full.txt", lambda slot: [Stage("train", GOOD, full)]),
        Job("damaged", tmp_path / "damaged.txt", refuse),
        Job("forbidden", tmp_path / "forbidden.txt", forbid),
        Job("unnoted", tmp_path / "unnoted.txt", lambda slot: [], ended=forbid),
        Job("nowhere", tmp_path / "full.txt" / "x" / "out.txt", lambda slot: [Stage("train", GOOD)]),
        job("good", tmp_path, GOOD),
    ]
    (tmp_path / "full.txt").touch()
    console = quiet()
    outcomes = {o.name: o for o in run_jobs(jobs, SLOTS, console, title="test")}
    assert outcomes["full"].reason == "cell.json: could not be written (No space left on device)"
    assert outcomes["full"].command == "ditlab --version"
    assert outcomes["damaged"].reason == "run x: it is damaged"
    assert "Permission denied" in outcomes["forbidden"].reason
    assert outcomes["unnoted"].state == "done"
    assert "note: unnoted: [Errno 13] Permission denied" in console.file.getvalue()
    assert "could not be written" in outcomes["nowhere"].reason
    assert outcomes["good"].state == "done"


def test_a_job_of_another_runner_is_waited_for(tmp_path, monkeypatch):
    """Its lock is free only at the third time of asking; the other jobs do not wait for that."""
    monkeypatch.setattr(runner, "_ASK", 0.01)
    asked, order = [], []

    @contextmanager
    def lock():
        asked.append(1)
        yield len(asked) > 2

    jobs = [
        Job("theirs", tmp_path / "a.txt", lambda slot: [], lock, lambda outcome: order.append("theirs")),
        job("mine", tmp_path, ended=lambda outcome: order.append("mine")),
    ]
    outcomes = run_jobs(jobs, SLOTS, quiet(), title="test")
    assert [o.state for o in outcomes] == ["done", "done"]
    assert order == ["mine", "theirs"]
    assert len(asked) == 3


def test_a_job_set_aside_is_asked_for_again_while_others_run(tmp_path, monkeypatch):
    """A free slot does not wait for the jobs in the other slots."""
    monkeypatch.setattr(runner, "_ASK", 0.01)
    asked, order = [], []

    @contextmanager
    def lock():
        asked.append(1)
        yield len(asked) > 1

    jobs = [
        Job("theirs", tmp_path / "a.txt", lambda slot: [], lock, lambda outcome: order.append("theirs")),
        job("long", tmp_path, GOOD, ended=lambda outcome: order.append("long")),
    ]
    run_jobs(jobs, SLOTS, quiet(), title="test")
    assert order == ["theirs", "long"]


def test_the_slots_environment_reaches_the_process(tmp_path, monkeypatch):
    seen, real = [], subprocess.Popen

    def start(words, *, env, **more):
        seen.append((words[1:], {name: env.get(name) for name in environment}))
        return real(words, env=env, **more)

    environment = {"CUDA_VISIBLE_DEVICES": "5", "OMP_NUM_THREADS": "3", "DITLAB_PARENT": str(os.getpid())}
    monkeypatch.setattr(runner.subprocess, "Popen", start)
    run_jobs([job("a", tmp_path, GOOD)], [Slot(3, "cuda", "5")], quiet(), title="test")
    assert seen == [(["-m", "ditlab", "--version"], environment)]


def test_ctrl_c_ends_the_processes(tmp_path, monkeypatch):
    started = []
    real = subprocess.Popen

    def sleeper(words, **more):
        # What started the tests may ignore Ctrl-C, and processes inherit that.
        more["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        started.append(real([sys.executable, "-c", "import time; time.sleep(100)"], **more))
        return started[-1]

    def interrupt(self):
        if started:
            raise KeyboardInterrupt

    monkeypatch.setattr(runner.subprocess, "Popen", sleeper)
    monkeypatch.setattr(runner._Runner, "_look", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_jobs([job("a", tmp_path, GOOD)], SLOTS, quiet(), title="test")
    assert started[0].returncode in (-signal.SIGINT, 1, 130)


def test_a_process_ended_by_a_signal_is_said_so(tmp_path, monkeypatch):
    real = subprocess.Popen
    monkeypatch.setattr(
        runner.subprocess,
        "Popen",
        lambda words, **more: real([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], **more),
    )
    (outcome,) = run_jobs([job("a", tmp_path, GOOD)], SLOTS, quiet(), title="test")
    assert outcome.reason == "its process was ended by SIGKILL, perhaps for want of memory"


def test_the_live_table(tmp_path, monkeypatch):
    """On a terminal: what runs with its step and the time left, what waits, what failed and why."""
    screen = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(runner, "_SHOW", 0.0)
    stage = Stage("train", GOOD, progress=lambda: Progress(1500, 6000, 75.0, "loss 0.1"))
    jobs = [job("bad", tmp_path, BAD), Job("runs", tmp_path / "r.txt", lambda slot: [stage]), job("waits", tmp_path)]
    monkeypatch.setattr(runner._Runner, "_look", slowly(runner._Runner._look))
    run_jobs(jobs, SLOTS, screen, title="a study")
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.file.getvalue())
    assert "a study: 0 done, 2 running, 1 waiting" in said
    assert re.search(r"runs +│ train +│ 1,500 of 6,000 +│ 1:15 +│ loss 0\.1", said)
    assert re.search(r"waits +│ waiting", said)
    assert re.search(r"bad +│ failed +│ +│ +│ unknown verb", said)
    many = [job(f"job{i}", tmp_path) for i in range(40)]
    table = runner._Runner(many, SLOTS, screen, "a study")._table()
    assert table.row_count == 0
    assert "40 waiting" in str(table.title)


def slowly(look):
    """Two looks are skipped, so that the table is drawn while processes run."""
    skipped = []

    def _look(self):
        skipped.append(1)
        if len(skipped) > 2:
            look(self)

    return _look


def test_slots_fit_cores_memory_and_gpus(monkeypatch):
    monkeypatch.setattr(runner.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(runner, "free_memory", lambda: 10 * 2**30)
    assert make_slots(20, device="cpu", parallel=None, memory=2**30) == [Slot(1)] * 8
    assert make_slots(20, device="cpu", parallel=None, memory=4 * 2**30) == [Slot(1)] * 2
    # Memory decides how many there are, and never their threads, on which the bits of a result depend.
    assert make_slots(20, device="cpu", parallel=None, memory=2**40) == [Slot(1)]
    assert make_slots(2, device="cpu", parallel=None, memory=1) == [Slot(1)] * 2
    assert make_slots(20, device="cpu", parallel=3, memory=2**40) == [Slot(2)] * 3
    assert make_slots(0, device="cpu", parallel=None, memory=1) == [Slot(1)]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [s.gpu for s in make_slots(5, device="cuda", parallel=None, memory=1)] == ["0", "1"]
    assert [s.gpu for s in make_slots(5, device="cuda:1", parallel=None, memory=1)] == ["1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    assert [s.gpu for s in make_slots(5, device="cuda", parallel=3, memory=1)] == ["3", "7", "3"]
    with pytest.raises(DitlabError, match="--parallel: expected at least 1, found 0"):
        make_slots(5, device="cpu", parallel=0, memory=1)


def test_free_memory_and_times():
    assert runner.free_memory() > 2**20
    assert [clock(s) for s in (0.0, 59.6, 61.0, 3723.0)] == ["0:00", "1:00", "1:01", "1:02:03"]
    assert runner._cpu_seconds(2**22 + 1) is None
    began = time.process_time()
    assert abs((runner._cpu_seconds(os.getpid()) or began) - time.process_time()) < 30
