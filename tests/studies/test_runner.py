"""The local runner, with processes that end at once: what it starts, what it reports, what a failure leaves alone."""

from __future__ import annotations

import io
import json
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

from ditlab.cli.console import Output
from ditlab.cli.jobs_display import jobs_display, jobs_table
from ditlab.errors import DitlabError
from ditlab.progress import RichReporter
from ditlab.studies import runner
from ditlab.studies.runner import Job, Progress, Slot, Snapshot, Stage, clock, make_slots, run_jobs

SLOTS = [Slot(1), Slot(1)]
GOOD, BAD = {"prints": "well", "status": 0}, {"prints": "ditlab: a sentence", "status": 2}
WORKER = "import json, sys; job = json.load(open(sys.argv[1])); print(job['prints']); sys.exit(job['status'])"


@pytest.fixture(autouse=True)
def worker(monkeypatch):
    """In place of the worker, a process that prints what its job says and ends with its status."""
    monkeypatch.setattr(runner, "_worker", lambda file: [sys.executable, "-c", WORKER, str(file)])


def output(**settings) -> Output:
    """An output that can be read again; a terminal with `force_terminal`."""
    made = Output()
    made.console = Console(file=io.StringIO(), highlight=False, soft_wrap=True, **settings)
    made.reporter = RichReporter(made.console)
    return made


def run(jobs, out: Output | None = None, slots=SLOTS):
    out = out or output()
    with jobs_display(out) as show:
        return run_jobs(jobs, slots, title="test", show=show, reporter=out.reporter)


def stage(name: str, folder, job, **more) -> Stage:
    return Stage(name, job, folder / f"{name}.json", **more)


def job(name: str, folder, *jobs, **more) -> Job:
    stages = [stage(f"{name}.stage{i}", folder, content) for i, content in enumerate(jobs)]
    return Job(name, folder / f"{name}.txt", lambda slot: stages, **more)


def test_stages_run_in_order_and_a_failure_ends_its_job_alone(tmp_path):
    out, ended = output(), []
    jobs = [
        job("bad", tmp_path, GOOD, BAD, GOOD, ended=ended.append),
        job("good", tmp_path, GOOD, GOOD, ended=ended.append),
        job("done", tmp_path),
    ]
    outcomes = run(jobs, out)
    assert [(o.name, o.state) for o in outcomes] == [("bad", "failed"), ("good", "done"), ("done", "done")]
    repeat = f"python -m ditlab.studies.worker {tmp_path / 'bad.stage1.json'}"
    assert outcomes[0].reason == f"a sentence (status 2; its whole output: {tmp_path / 'bad.txt'})"
    assert outcomes[0].command == repeat
    assert json.loads((tmp_path / "bad.stage1.json").read_text()) == {"kind": "job", "version": 1, **BAD}
    assert sorted(o.name for o in ended) == ["bad", "good"]
    lines = (tmp_path / "good.txt").read_text().splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["$", "well", "$", "well"]
    # The third stage of the failed job was never started.
    assert (tmp_path / "bad.txt").read_text().count("$ python -m ditlab.studies.worker") == 2
    printed = out.console.file.getvalue()
    assert re.search(r"^\[0/3\] bad: bad.stage0$", printed, re.MULTILINE)
    assert re.search(r"^\[\d/3\] bad: failed: a sentence", printed, re.MULTILINE)


def test_what_a_stage_used_is_recorded(tmp_path):
    uses = []
    stages = [stage("one", tmp_path, GOOD, record=uses.append)]
    run([Job("a", tmp_path / "a.txt", lambda slot: stages)])
    assert len(uses) == 1
    assert uses[0].seconds > 0
    if sys.platform == "linux":
        assert 0 <= uses[0].cpu_seconds < 60


def test_what_cannot_be_recorded_fails_the_job(tmp_path):
    def full(use):
        raise DitlabError("cell.json: could not be written (No space left on device)")

    def refuse(slot):
        raise DitlabError("run x: it is damaged")

    def forbid(argument):
        raise PermissionError(13, "Permission denied", "runs/x")

    nowhere = Stage("train", GOOD, tmp_path / "full.txt" / "x" / "job.json")
    jobs = [
        Job("full", tmp_path / "full.txt", lambda slot: [stage("train", tmp_path, GOOD, record=full)]),
        Job("damaged", tmp_path / "damaged.txt", refuse),
        Job("forbidden", tmp_path / "forbidden.txt", forbid),
        Job("unnoted", tmp_path / "unnoted.txt", lambda slot: [], ended=forbid),
        Job("nowhere", tmp_path / "full.txt" / "x" / "out.txt", lambda slot: [nowhere]),
        Job("no job", tmp_path / "job.txt", lambda slot: [nowhere]),
        job("good", tmp_path, GOOD),
    ]
    (tmp_path / "full.txt").touch()
    out = output()
    outcomes = {o.name: o for o in run(jobs, out)}
    assert outcomes["full"].reason == "cell.json: could not be written (No space left on device)"
    assert outcomes["full"].command == f"python -m ditlab.studies.worker {tmp_path / 'train.json'}"
    assert outcomes["damaged"].reason == "run x: it is damaged"
    assert "Permission denied" in outcomes["forbidden"].reason
    assert outcomes["unnoted"].state == "done"
    assert "note: unnoted: [Errno 13] Permission denied" in out.console.file.getvalue()
    assert "could not be written" in outcomes["nowhere"].reason
    assert "could not be written" in outcomes["no job"].reason
    assert outcomes["good"].state == "done"


def test_a_job_of_another_runner_is_waited_for(tmp_path, monkeypatch):
    """Its lock is free only at the third time of asking; the other jobs do not wait for that."""
    monkeypatch.setattr(runner, "_ASK_SECONDS", 0.01)
    asked, order = [], []

    @contextmanager
    def lock():
        asked.append(1)
        yield len(asked) > 2

    jobs = [
        Job("theirs", tmp_path / "a.txt", lambda slot: [], lock, lambda outcome: order.append("theirs")),
        job("mine", tmp_path, ended=lambda outcome: order.append("mine")),
    ]
    outcomes = run(jobs)
    assert [o.state for o in outcomes] == ["done", "done"]
    assert order == ["mine", "theirs"]
    assert len(asked) == 3


def test_a_job_set_aside_is_asked_for_again_while_others_run(tmp_path, monkeypatch):
    """A free slot does not wait for the jobs in the other slots."""
    monkeypatch.setattr(runner, "_ASK_SECONDS", 0.01)
    asked, order = [], []

    @contextmanager
    def lock():
        asked.append(1)
        yield len(asked) > 1

    jobs = [
        Job("theirs", tmp_path / "a.txt", lambda slot: [], lock, lambda outcome: order.append("theirs")),
        job("long", tmp_path, GOOD, ended=lambda outcome: order.append("long")),
    ]
    run(jobs)
    assert order == ["theirs", "long"]


def test_the_slots_environment_reaches_the_process(tmp_path, monkeypatch):
    seen, real = [], subprocess.Popen

    def start(words, *, env, **more):
        seen.append((words[-1], {name: env.get(name) for name in environment}))
        return real(words, env=env, **more)

    environment = {"CUDA_VISIBLE_DEVICES": "5", "OMP_NUM_THREADS": "3", "DITLAB_PARENT": str(os.getpid())}
    monkeypatch.setattr(runner.subprocess, "Popen", start)
    run([job("a", tmp_path, GOOD)], slots=[Slot(3, "cuda", "5")])
    assert seen == [(str(tmp_path / "a.stage0.json"), environment)]


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
    monkeypatch.setattr(runner._Runner, "_check_processes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run([job("a", tmp_path, GOOD)])
    assert started[0].returncode in (-signal.SIGINT, 1, 130)


def test_a_process_ended_by_a_signal(tmp_path, monkeypatch):
    real = subprocess.Popen
    monkeypatch.setattr(
        runner.subprocess,
        "Popen",
        lambda words, **more: real([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], **more),
    )
    (outcome,) = run([job("a", tmp_path, GOOD)])
    assert outcome.reason == "its process was ended by SIGKILL, perhaps because memory ran out"


def test_the_live_table(tmp_path, monkeypatch):
    """On a terminal: what runs with its step and the time left, what waits, what failed and why."""
    screen = output(force_terminal=True, width=110)
    progress = lambda: Progress(1500, 6000, 75.0, "loss 0.1")  # noqa: E731
    running = stage("train", tmp_path, GOOD, progress=progress)
    jobs = [job("bad", tmp_path, BAD), Job("runs", tmp_path / "r.txt", lambda slot: [running]), job("waits", tmp_path)]
    # Two looks at the processes are skipped, so that the table is drawn while they run.
    real, skipped = runner._Runner._check_processes, []
    monkeypatch.setattr(runner, "_SHOW_SECONDS", 0.0)

    def check(self):
        skipped.append(1)
        if len(skipped) > 2:
            real(self)

    monkeypatch.setattr(runner._Runner, "_check_processes", check)
    run(jobs, screen)
    printed = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.console.file.getvalue())
    assert "test: 0 done, 2 running, 1 waiting" in printed
    assert re.search(r"runs +│ train +│ 1,500 of 6,000 +│ 1:15 +│ loss 0\.1", printed)
    assert re.search(r"waits +│ waiting", printed)
    assert re.search(r"bad +│ failed +│ +│ +│ a sentence", printed)


def test_a_long_table_only_counts_what_waits():
    table = jobs_table(Snapshot("a study", {f"job{i}": "waiting" for i in range(40)}, {}, {}))
    assert table.row_count == 0
    assert "40 waiting" in str(table.title)


def test_without_a_display_the_reporter_shows_a_bar(tmp_path):
    drawn = []

    class Bars(RichReporter):
        @contextmanager
        def bar(self, title, total=None):
            yield lambda done, total=total, **fields: drawn.append((title, done, total))

    run_jobs([job("a", tmp_path, GOOD)], SLOTS, title="test", reporter=Bars(Console(file=io.StringIO())))
    assert drawn[-1] == ("test", 1, 1)


def test_slots_fit_cores_memory_and_gpus(monkeypatch):
    monkeypatch.setattr(runner.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(runner, "available_memory", lambda: 10 * 2**30)
    assert make_slots(20, device="cpu", parallel=None, memory=2**30) == [Slot(1)] * 8
    assert make_slots(20, device="cpu", parallel=None, memory=4 * 2**30) == [Slot(1)] * 2
    # Memory decides how many there are, and never their threads, on which the bits of a result depend.
    assert make_slots(20, device="cpu", parallel=None, memory=2**40) == [Slot(1)]
    assert make_slots(2, device="cpu", parallel=None, memory=1) == [Slot(1)] * 2
    assert make_slots(20, device="cpu", parallel=3, memory=2**40) == [Slot(2)] * 3
    assert make_slots(0, device="cpu", parallel=None, memory=1) == [Slot(1)]
    monkeypatch.setattr(runner, "available_memory", lambda: None)
    assert make_slots(20, device="cpu", parallel=None, memory=2**40) == [Slot(1)] * 8
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [s.gpu for s in make_slots(5, device="cuda", parallel=None, memory=1)] == ["0", "1"]
    assert [s.gpu for s in make_slots(5, device="cuda:1", parallel=None, memory=1)] == ["1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    assert [s.gpu for s in make_slots(5, device="cuda", parallel=3, memory=1)] == ["3", "7", "3"]
    with pytest.raises(DitlabError, match="`parallel`: expected at least 1, found 0"):
        make_slots(5, device="cpu", parallel=0, memory=1)


def test_times():
    assert [clock(s) for s in (0.0, 59.6, 61.0, 3723.0)] == ["0:00", "1:00", "1:01", "1:02:03"]
    assert runner._cpu_seconds(2**22 + 1) is None
    began = time.process_time()
    assert abs((runner._cpu_seconds(os.getpid()) or began) - time.process_time()) < 30
