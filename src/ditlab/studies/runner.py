"""Runs several jobs at a time on this machine, each a chain of worker processes (`ditlab.studies.worker`).

A job that fails does not stop the others. Ctrl-C lets every process save and end. If the runner itself is killed, its
workers notice (DITLAB_PARENT) and stop: training saves a checkpoint, an unfinished analysis is lost and measured again.
What was recorded stays recorded, so the same call resumes. A job that another runner works on is waited for.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ditlab.errors import DitlabError, InvalidConfig
from ditlab.files import write_json
from ditlab.memory import available_memory
from ditlab.progress import SILENT, Reporter

__all__ = [
    "JOB_KIND",
    "JOB_VERSION",
    "Job",
    "Outcome",
    "Progress",
    "ResourceUse",
    "RunningJob",
    "Slot",
    "Snapshot",
    "Stage",
    "clock",
    "make_slots",
    "run_jobs",
]

JOB_KIND, JOB_VERSION = "job", 1
"""What the JSON of a job says that it is."""

_POLL_SECONDS = 0.2
_SHOW_SECONDS = 0.5
"""Time between two looks at the processes, and between two snapshots while nothing changes."""

_ASK_SECONDS = 1.0
"""Time after which the lock of a job that another runner holds is tried again."""


@dataclass(frozen=True)
class Slot:
    """Room for one process."""

    threads: int
    """Its CPU threads."""
    device: str = "cpu"
    """Where it computes."""
    gpu: str | None = None
    """Its CUDA_VISIBLE_DEVICES; None leaves the environment's."""


@dataclass(frozen=True)
class Progress:
    """How far a process is."""

    done: int
    total: int
    seconds_left: float | None
    detail: str = ""


@dataclass(frozen=True)
class ResourceUse:
    """What a process used."""

    seconds: float
    """Wall-clock time."""
    cpu_seconds: float | None
    """Processor time of all its threads; None where the system does not report it."""


@dataclass(frozen=True)
class Stage:
    """One process of a job."""

    name: str
    """What tables call it ("train")."""
    job: Mapping[str, Any]
    """What the worker is to do, as JSON values (`ditlab.studies.worker`)."""
    file: Path
    """Where that is written for the worker."""
    record: Callable[[ResourceUse], None] = lambda use: None
    """Called when the process ended well; records what it made. Its DitlabError fails the job."""
    progress: Callable[[], Progress | None] = lambda: None

    @property
    def command(self) -> str:
        """The command that repeats it."""
        return shlex.join(["python", "-m", "ditlab.studies.worker", str(self.file)])


@dataclass(frozen=True)
class Job:
    """A chain of processes, one after the other."""

    name: str
    output: Path
    """The file to which its processes' output is appended."""
    stages: Callable[[Slot], Sequence[Stage]]
    """The processes that are still needed, asked when the job starts and its lock is held; none if it is done."""
    lock: Callable[[], AbstractContextManager[bool]] = lambda: nullcontext(True)
    """Yields whether the job is this runner's; held until it ends."""
    ended: Callable[[Outcome], None] = lambda outcome: None
    """Called with how it ended."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    name: str
    state: Literal["done", "failed"]
    seconds: float
    reason: str = ""
    """Why it failed, a sentence."""
    command: str = ""
    """The command that repeats the process that failed."""


@dataclass
class RunningJob:
    """A job that is running, and its present process."""

    job: Job
    slot: Slot
    lock: ExitStack
    begun: float
    """When the job started, like `stage_begun` of the clock `time.monotonic`."""
    stage: Stage | None = None
    process: subprocess.Popen[bytes] | None = None
    stage_begun: float = 0.0
    work: Iterator[None] = field(init=False)
    """Does the job step by step (`_Runner._work`)."""

    @property
    def name(self) -> str:
        """The job's name."""
        return self.job.name

    @property
    def stage_seconds(self) -> float:
        """How long its present process has been running."""
        return time.monotonic() - self.stage_begun

    def progress(self) -> Progress | None:
        """Returns how far its present process is; None where that is not known."""
        return self.stage.progress() if self.stage else None


@dataclass(frozen=True)
class Snapshot:
    """How far all jobs are."""

    title: str
    states: Mapping[str, str]
    """Name of each job -> "waiting", the name of its stage, "done in 1:02", "failed: ..."."""
    running: Mapping[str, RunningJob]
    outcomes: Mapping[str, Outcome]

    @property
    def failed(self) -> int:
        """How many jobs failed."""
        return sum(outcome.state == "failed" for outcome in self.outcomes.values())

    @property
    def done(self) -> int:
        """How many jobs ended well."""
        return len(self.outcomes) - self.failed

    @property
    def waiting(self) -> int:
        """How many jobs have not started."""
        return len(self.states) - len(self.outcomes) - len(self.running)


def run_jobs(
    jobs: Sequence[Job],
    slots: Sequence[Slot],
    *,
    title: str,
    show: Callable[[Snapshot], None] | None = None,
    reporter: Reporter = SILENT,
) -> list[Outcome]:
    """Runs every job, as many at a time as there are slots, and returns how each ended, in their order.

    Args:
        jobs: with different names.
        slots: at least one.
        title: of the table or bar of progress.
        show: called at each change of a job's state, and twice a second; None draws a bar of the reporter.
        reporter: takes notes and, without `show`, the progress.

    Raises:
        KeyboardInterrupt: after every process has saved and ended.
    """
    with reporter.bar(title, len(jobs)) if show is None else nullcontext() as bar:

        def draw(snapshot: Snapshot) -> None:
            if show is not None:
                show(snapshot)
            elif bar is not None:
                bar(len(snapshot.outcomes), running=str(len(snapshot.running)), failed=str(snapshot.failed))

        runner = _Runner(jobs, slots, title, draw, reporter)
        try:
            runner.run()
        finally:
            runner.end()
    return [runner.outcomes[job.name] for job in jobs]


@dataclass
class _Runner:
    jobs: Sequence[Job]
    slots: Sequence[Slot]
    title: str
    show: Callable[[Snapshot], None]
    reporter: Reporter
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._states = {job.name: "waiting" for job in self.jobs}
        self._waiting, self._elsewhere, self._ask_at = list(self.jobs), list[Job](), 0.0
        self._free, self._running = list(self.slots), list[RunningJob]()
        self._shown_at = 0.0

    def run(self) -> None:
        while self._waiting or self._running or self._elsewhere:
            self._start_jobs()
            self._check_processes()
            if time.monotonic() - self._shown_at > _SHOW_SECONDS:
                self._show()
            time.sleep(_POLL_SECONDS)

    def end(self) -> None:
        """Asks every process that still runs to save, and waits for it."""
        for running in self._running:
            if running.process is not None and running.process.poll() is None:
                running.process.send_signal(signal.SIGINT)
        for running in self._running:
            if running.process is not None:
                running.process.wait()
            running.lock.close()

    def _start_jobs(self) -> None:
        """Gives free slots to jobs; the locks of those that another runner holds are tried again from time to time."""
        if self._free and not self._waiting and time.monotonic() >= self._ask_at:
            self._waiting, self._elsewhere = self._elsewhere, []
        while self._free and self._waiting:
            job = self._waiting.pop(0)
            lock = ExitStack()
            try:
                mine = lock.enter_context(job.lock())
            except OSError as error:
                self._finish(job, lock, time.monotonic(), f"{job.output.parent}: {error.strerror}")
                continue
            if not mine:
                lock.close()
                self._set_state(job.name, "another runner works on it")
                self._elsewhere.append(job)
                self._ask_at = time.monotonic() + _ASK_SECONDS
                continue
            running = RunningJob(job, self._free.pop(0), lock, time.monotonic())
            running.work = self._work(running)
            self._running.append(running)
            self._advance(running)

    def _check_processes(self) -> None:
        for running in list(self._running):
            self._advance(running)

    def _advance(self, running: RunningJob) -> None:
        """Goes on with a job as far as it can now, and ends it where it is done or has failed."""
        reason = command = ""
        try:
            next(running.work)
            return
        except StopIteration:
            pass
        except (DitlabError, OSError) as error:
            reason, command = str(error), running.stage.command if running.stage else ""
        self._running.remove(running)
        self._free.append(running.slot)
        self._finish(running.job, running.lock, running.begun, reason, command)

    def _work(self, running: RunningJob) -> Iterator[None]:
        """Runs a job's processes one after the other and records what they made; yields while one runs."""
        for stage in list(running.job.stages(running.slot)):
            running.stage = stage
            process = running.process = _start(stage, running.slot, running.job.output)
            running.stage_begun, cpu_seconds, status = time.monotonic(), None, None
            self._set_state(running.name, stage.name)
            while status is None:
                yield
                # Read before the poll, which takes an ended process out of the system's list.
                now = _cpu_seconds(process.pid)
                cpu_seconds = cpu_seconds if now is None else now
                status = process.poll()
            if status:
                raise DitlabError(_failure(running.job, status))
            stage.record(ResourceUse(round(running.stage_seconds, 1), cpu_seconds))

    def _finish(self, job: Job, lock: ExitStack, begun: float, reason: str, command: str = "") -> None:
        seconds = time.monotonic() - begun
        outcome = Outcome(job.name, "failed" if reason else "done", seconds, reason, command)
        self.outcomes[job.name] = outcome
        try:
            job.ended(outcome)
        except (DitlabError, OSError) as error:  # the job has ended all the same, and the others continue
            self.reporter.note(f"{job.name}: {error}")
        finally:
            lock.close()
        self._set_state(job.name, f"failed: {reason}" if reason else f"done in {clock(seconds)}")

    def _set_state(self, name: str, state: str) -> None:
        before, self._states[name] = self._states[name], state
        if state != before:
            self._show()

    def _show(self) -> None:
        self._shown_at = time.monotonic()
        running = {running.name: running for running in self._running}
        self.show(Snapshot(self.title, dict(self._states), running, dict(self.outcomes)))


def clock(seconds: float) -> str:
    """Returns a time as hours, minutes and seconds ("1:02:03", "2:03")."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _worker(file: Path) -> list[str]:
    """The words of the worker's command line."""
    return [sys.executable, "-m", "ditlab.studies.worker", str(file)]


def _start(stage: Stage, slot: Slot, output: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "DITLAB_PARENT": str(os.getpid()), "OMP_NUM_THREADS": str(slot.threads)}
    if slot.gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = slot.gpu
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(stage.file, {"kind": JOB_KIND, "version": JOB_VERSION, **stage.job})
        with output.open("ab") as file:
            file.write(f"$ {stage.command}\n".encode())
            file.flush()
            return subprocess.Popen(
                _worker(stage.file),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                # Then Ctrl-C reaches it once, through `end`, and not a second time from the terminal.
                start_new_session=True,
            )
    except OSError as error:
        raise DitlabError(f"{output}: could not be written: {error.strerror}") from error


def _cpu_seconds(pid: int) -> float | None:
    """Processor time of a process so far, or of one that has just ended; None where the system does not report it."""
    try:
        # After the name in brackets, which may hold spaces, the 12th and 13th fields are user and system time.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return round((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), 1)
    except (OSError, ValueError, IndexError):
        return None


def _failure(job: Job, status: int) -> str:
    """Why a process failed: the last line of its output, or the signal that ended it."""
    if status < 0:
        name = signal.Signals(-status).name
        hint = ", perhaps because memory ran out" if -status == signal.SIGKILL else ""
        return f"its process was ended by {name}{hint}"
    try:
        text = job.output.read_text(errors="replace")
    except OSError:
        text = ""
    lines = [line for line in text.splitlines() if line.strip()]
    silent = not lines or lines[-1].startswith("$ ")
    last = "it printed nothing" if silent else lines[-1].removeprefix("ditlab: ")
    return f"{last} (status {status}; its whole output: {job.output})"


def make_slots(jobs: int, *, device: str, parallel: int | None, memory: int) -> list[Slot]:
    """Returns as many slots as fit this machine, at most one for each of `jobs`; `parallel` says how many instead.

    On CUDA ("cuda", or "cuda:N" for one GPU) one for each GPU, or `parallel` spread over them. On the CPU one for each
    core, with one thread, as many as fit into the free memory at `memory` bytes each; or `parallel` with the cores
    spread over them.
    """
    if parallel is not None and parallel < 1:
        raise InvalidConfig(f"`parallel`: expected at least 1, found {parallel}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = _gpus() if device.startswith("cuda") else []
    if ":" in device and gpus:
        gpus = [gpus[int(device.partition(":")[2])]]
    available = available_memory()
    fitting = cores if available is None else max(1, available // max(memory, 1))
    fit = len(gpus) if gpus else min(cores, fitting)
    # Threads depend neither on how many jobs are left nor on the memory that is free now: the rounding of sums depends
    # on threads, and an interrupted study must give the numbers of an uninterrupted one.
    threads = max(1, cores // (parallel or len(gpus) or cores))
    count = min(parallel or fit, max(jobs, 1))
    if not gpus:
        return [Slot(threads, device)] * count
    return [Slot(threads, "cuda", gpus[i % len(gpus)]) for i in range(count)]


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [gpu.strip() for gpu in named.split(",")][:count] if named else [str(i) for i in range(count)]
