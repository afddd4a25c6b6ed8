"""The local runner: several jobs at a time, each a chain of `ditlab` processes, in as many slots as fit.

A job that fails ends alone, with what its process said last. Ctrl-C lets every process save and ends them. If the
runner itself is killed, its processes notice (DITLAB_PARENT) and end by themselves: training saves first, and an
analysis that was not finished is measured anew. What was finished stays recorded, so that the same call goes on from
there. A job that another runner works on is waited for, not repeated.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.live import Live
from rich.table import Table

from ditlab.errors import DitlabError

_POLL = 0.2
_SHOW = 0.5
_TELL = 30.0
"""Seconds between looks at the processes, updates of the table, and lines where there is no terminal."""

_ASK = 1.0
"""Seconds after which a job that another runner holds is asked for again."""

_MOST_ROWS = 30
"""A longer table shows only what runs and what failed, and counts the rest."""


@dataclass(frozen=True)
class Slot:
    """Room for one process."""

    threads: int
    """Its CPU threads."""
    device: str = "cpu"
    """What --device it gets."""
    gpu: str | None = None
    """What CUDA_VISIBLE_DEVICES it gets; None leaves the environment's."""


@dataclass(frozen=True)
class Progress:
    """How far a process is."""

    done: int
    total: int
    seconds_left: float | None
    news: str = ""


@dataclass(frozen=True)
class Spent:
    """What a process took."""

    seconds: float
    """By the clock."""
    cpu_seconds: float | None
    """Of all its threads; None where the system does not say."""


@dataclass(frozen=True)
class Stage:
    """One process of a job."""

    name: str
    """What the table calls it ("train")."""
    words: tuple[str, ...]
    """The command line after `ditlab`."""
    record: Callable[[Spent], None] = lambda spent: None
    """Called when the process ended well; keeps what it made. A DitlabError of it fails the job."""
    progress: Callable[[], Progress | None] = lambda: None

    @property
    def command(self) -> str:
        """The command that repeats it."""
        return shlex.join(["ditlab", *self.words])


@dataclass(frozen=True)
class Job:
    """A chain of processes, one after the other."""

    name: str
    output: Path
    """The file to which all that its processes say is appended."""
    stages: Callable[[Slot], Sequence[Stage]]
    """The processes that are still needed; asked when the job starts and its lock is held. None needed: it is done."""
    lock: Callable[[], AbstractContextManager[bool]] = lambda: nullcontext(True)
    """Yields whether the job is this runner's; held until it ends."""
    ended: Callable[[Outcome], None] = lambda outcome: None
    """Told how it ended."""


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
class _Running:
    job: Job
    slot: Slot
    held: ExitStack
    begun: float
    stages: list[Stage]
    process: subprocess.Popen[bytes] | None = None
    stage_begun: float = 0.0
    cpu_seconds: float | None = None


@dataclass
class _Board:
    """What the table shows."""

    names: list[str]
    state: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)


def run_jobs(jobs: Sequence[Job], slots: Sequence[Slot], console: Console, *, title: str) -> list[Outcome]:
    """Runs every job, as many at a time as there are slots, and returns how each ended, in their order.

    Args:
        jobs: with different names.
        slots: at least one.
        console: where the table is shown; plain lines where it is no terminal.
        title: of the table.

    Raises:
        KeyboardInterrupt: after every process has saved and ended.
    """
    runner = _Runner(jobs, slots, console, title)
    try:
        runner.run()
    finally:
        runner.end()
    return [runner.board.outcomes[job.name] for job in jobs]


class _Runner:
    def __init__(self, jobs: Sequence[Job], slots: Sequence[Slot], console: Console, title: str) -> None:
        self.board = _Board([job.name for job in jobs], {job.name: "waiting" for job in jobs})
        self._waiting, self._elsewhere, self._ask = list(jobs), list[Job](), 0.0
        self._free, self._running = list(slots), list[_Running]()
        self._console, self._title = console, title
        self._told = time.monotonic()

    def run(self) -> None:
        shown = 0.0
        with (
            Live(console=self._console, auto_refresh=False, transient=True)
            if self._console.is_terminal
            else (nullcontext()) as live
        ):
            while self._waiting or self._running or self._elsewhere:
                self._fill()
                self._look()
                if time.monotonic() - shown > _SHOW:
                    shown = time.monotonic()
                    if live is not None:
                        live.update(self._table(), refresh=True)
                    else:
                        self._tell()
                time.sleep(_POLL)

    def end(self) -> None:
        """Asks every process that still runs to save, and waits for it."""
        for one in self._running:
            if one.process is not None and one.process.poll() is None:
                one.process.send_signal(signal.SIGINT)
        for one in self._running:
            if one.process is not None:
                one.process.wait()
            one.held.close()

    def _fill(self) -> None:
        """Gives free slots to jobs; those that another runner holds are asked again after all others, now and then."""
        if self._free and not self._waiting and time.monotonic() >= self._ask:
            self._waiting, self._elsewhere = self._elsewhere, []
        while self._free and self._waiting:
            job = self._waiting.pop(0)
            held = ExitStack()
            try:
                mine = held.enter_context(job.lock())
            except OSError as error:
                self._finish(job, held, time.monotonic(), f"{job.output.parent}: {error.strerror}", "")
                continue
            if not mine:
                held.close()
                self._say(job.name, "another runner works on it")
                self._elsewhere.append(job)
                self._ask = time.monotonic() + _ASK
                continue
            one = _Running(job, self._free.pop(0), held, time.monotonic(), [])
            try:
                one.stages = list(job.stages(one.slot))
            except (DitlabError, OSError) as error:
                self._free.insert(0, one.slot)
                self._finish(job, held, one.begun, str(error), "")
                continue
            self._running.append(one)
            self._next(one)

    def _next(self, one: _Running) -> None:
        """Starts the first of a job's stages that are left, or ends the job."""
        if not one.stages:
            self._close(one, "", "")
            return
        stage = one.stages[0]
        try:
            one.process = _start(stage, one.slot, one.job.output)
        except OSError as error:
            self._close(one, f"{one.job.output}: could not be written: {error.strerror}", stage.command)
            return
        one.stage_begun, one.cpu_seconds = time.monotonic(), None
        self._say(one.job.name, stage.name)

    def _look(self) -> None:
        """Takes up every process that has ended."""
        for one in list(self._running):
            if one.process is None:
                continue
            # Read before the poll, which takes an ended process out of the system's list.
            found = _cpu_seconds(one.process.pid)
            one.cpu_seconds = one.cpu_seconds if found is None else found
            if one.process.poll() is None:
                continue
            stage, status = one.stages[0], one.process.returncode
            if status:
                self._close(one, _failure(one.job, status), stage.command)
                continue
            try:
                stage.record(Spent(round(time.monotonic() - one.stage_begun, 1), one.cpu_seconds))
            except (DitlabError, OSError) as error:
                self._close(one, str(error), stage.command)
                continue
            one.stages.pop(0)
            self._next(one)

    def _close(self, one: _Running, reason: str, command: str) -> None:
        self._running.remove(one)
        self._free.append(one.slot)
        self._finish(one.job, one.held, one.begun, reason, command)

    def _finish(self, job: Job, held: ExitStack, begun: float, reason: str, command: str) -> None:
        seconds = time.monotonic() - begun
        outcome = Outcome(job.name, "failed" if reason else "done", seconds, reason, command)
        self.board.outcomes[job.name] = outcome
        try:
            job.ended(outcome)
        except (DitlabError, OSError) as error:  # the job has ended all the same, and the others go on
            self._console.print(f"note: {job.name}: {error}", markup=False)
        finally:
            held.close()
        self._say(job.name, f"failed: {reason}" if reason else f"done in {clock(seconds)}")

    def _say(self, name: str, state: str) -> None:
        before, self.board.state[name] = self.board.state[name], state
        if not self._console.is_terminal and state != before:
            ended = len(self.board.outcomes)
            self._console.print(f"[{ended}/{len(self.board.names)}] {name}: {state}", markup=False)

    def _tell(self) -> None:
        """Now and then, where there is no terminal, how far everything that runs is."""
        if time.monotonic() - self._told < _TELL:
            return
        self._told = time.monotonic()
        for one in self._running:
            news = one.stages[0].progress() if one.stages else None
            if news is not None:
                self._console.print(f"{one.job.name}: {_news(news)}", markup=False)

    def _table(self) -> Table:
        ended = self.board.outcomes
        failed = sum(outcome.state == "failed" for outcome in ended.values())
        done = len(ended) - failed
        counts = f"{done} done, {len(self._running)} running, {len(self._waiting) + len(self._elsewhere)} waiting"
        table = Table(title=f"{self._title}: {counts}" + (f", {failed} failed" if failed else ""), title_justify="left")
        for name, justify in (("cell", "left"), ("state", "left"), ("step", "right"), ("left", "right"), ("", "left")):
            table.add_column(name, justify=justify)  # pyright: ignore[reportArgumentType]
        running = {one.job.name: one for one in self._running}
        for name in self.board.names:
            outcome, state = ended.get(name), self.board.state[name]
            if name in running:
                table.add_row(name, state, *_columns(running[name]), style="bold")
            elif outcome is not None and outcome.state == "failed":
                table.add_row(name, "failed", "", "", outcome.reason, style="red")
            elif len(self.board.names) <= _MOST_ROWS:
                table.add_row(name, state, "", "", "", style="dim")
        return table


def _columns(one: _Running) -> tuple[str, str, str]:
    news = one.stages[0].progress() if one.stages else None
    if news is None:
        return "", "", f"{clock(time.monotonic() - one.stage_begun)} so far"
    left = "" if news.seconds_left is None else clock(news.seconds_left)
    return f"{news.done:,} of {news.total:,}", left, news.news


def _news(news: Progress) -> str:
    left = "" if news.seconds_left is None else f", {clock(news.seconds_left)} left"
    return f"step {news.done:,} of {news.total:,}{left}" + (f", {news.news}" if news.news else "")


def clock(seconds: float) -> str:
    """A time as hours, minutes and seconds ("1:02:03", "2:03")."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _start(stage: Stage, slot: Slot, output: Path) -> subprocess.Popen[bytes]:
    output.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "DITLAB_PARENT": str(os.getpid()), "OMP_NUM_THREADS": str(slot.threads)}
    if slot.gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = slot.gpu
    with output.open("ab") as file:
        file.write(f"$ {stage.command}\n".encode())
        file.flush()
        # A session of its own: Ctrl-C reaches it once, through `end`, and not a second time from the terminal.
        return subprocess.Popen(
            [sys.executable, "-m", "ditlab", *stage.words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _cpu_seconds(pid: int) -> float | None:
    """Processor time of a process so far, one that has just ended included; None where the system does not say."""
    try:
        # After the name in brackets, which may hold spaces, the 12th and 13th fields are user and system time.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return round((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), 1)
    except (OSError, ValueError, IndexError):
        return None


def _failure(job: Job, status: int) -> str:
    """Why a process failed: the last line it said, or the signal that ended it."""
    if status < 0:
        name = signal.Signals(-status).name
        hint = ", perhaps for want of memory" if -status == signal.SIGKILL else ""
        return f"its process was ended by {name}{hint}"
    try:
        text = job.output.read_text(errors="replace")
    except OSError:
        text = ""
    lines = [line for line in text.splitlines() if line.strip()]
    said = lines[-1].removeprefix("ditlab: ") if lines and not lines[-1].startswith("$ ") else "it said nothing"
    return f"{said} (status {status}; all it said: {job.output})"


def make_slots(jobs: int, *, device: str, parallel: int | None, memory: int) -> list[Slot]:
    """As many slots as fit this machine.

    On CUDA one a GPU, or `parallel` shared out among them; on the CPU one a core, with one thread, as many as fit into
    the free memory, or `parallel` with the cores shared out among them.

    Args:
        jobs: never more slots than these.
        device: "cpu", "cuda" for all GPUs, or "cuda:N" for one.
        parallel: how many instead.
        memory: what one process takes on the CPU, in bytes, an estimate.

    Raises:
        DitlabError: `parallel` is below 1.
    """
    if parallel is not None and parallel < 1:
        raise DitlabError(f"--parallel: expected at least 1, found {parallel}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpus = _gpus() if device.startswith("cuda") else []
    if ":" in device and gpus:
        gpus = [gpus[int(device.partition(":")[2])]]
    fit = len(gpus) if gpus else min(cores, max(1, free_memory() // max(memory, 1)))
    # Threads depend neither on how many jobs are left nor on the memory that is free now: the rounding of sums depends
    # on threads, and a study that was interrupted is to give the numbers of one that was not.
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


def free_memory() -> int:
    """Bytes of memory that processes can take now; where the system does not say, none are counted against it."""
    found = Path("/proc/meminfo")
    if found.is_file():
        for line in found.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return sys.maxsize


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts of how jobs ended, and why those that failed did."""
    counts = Counter(outcome.state for outcome in outcomes)
    failed = [{"name": o.name, "reason": o.reason, "command": o.command} for o in outcomes if o.state == "failed"]
    return {"done": counts["done"], "failed": failed}
