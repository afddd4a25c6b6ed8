"""Training several runs at once, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ditlab.errors import DitlabError
from ditlab.training.log import read_log


@dataclass(frozen=True)
class Job:
    """One run to train."""

    name: str
    """What the progress bar calls it."""
    folder: Path
    """The run's folder."""
    steps: int
    """Its last step."""
    words: tuple[str, ...]
    """The command line after `ditlab`."""


def train_all(jobs: Sequence[Job], *, parallel: int, console: Console) -> None:
    """Trains runs, a few at a time; those that are finished or half done go on where they were.

    Ctrl-C lets every process save and ends them; if this process is killed they notice, save and end by themselves.

    Args:
        jobs: the runs.
        parallel: processes at a time.
        console: where bars are shown.

    Raises:
        DitlabError: a process failed: the last line that it said, and where the rest is.
        KeyboardInterrupt: after every process has saved.
    """
    waiting, running = list(jobs), list[tuple[Job, subprocess.Popen[bytes]]]()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[news]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        speed_estimate_period=120,
    ) as bars:
        tasks = {job.name: bars.add_task(job.name, total=job.steps, start=False, news="waiting") for job in jobs}
        told = time.monotonic()
        try:
            while waiting or running:
                while waiting and len(running) < parallel:
                    job = waiting.pop(0)
                    running.append((job, _start(job)))
                    bars.start_task(tasks[job.name])
                time.sleep(0.5)
                for job, process in list(running):
                    _show(bars, tasks[job.name], job)
                    if process.poll() is not None:
                        running.remove((job, process))
                        if process.returncode:
                            raise DitlabError(_failure(job, process.returncode))
                if not console.is_terminal and time.monotonic() - told > 30:
                    told = time.monotonic()
                    console.print("; ".join(f"{job.name}: {_news(job)}" for job, _ in running))
        finally:
            _end(running)


def _start(job: Job) -> subprocess.Popen[bytes]:
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with (job.folder.parent / f"{job.folder.name}.txt").open("ab") as output:
        # A session of its own: Ctrl-C reaches it once, through _end, and not a second time from the terminal.
        return subprocess.Popen(
            [sys.executable, "-m", "ditlab", *job.words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "DITLAB_PARENT": str(os.getpid())},
            start_new_session=True,
        )


def _end(running: Sequence[tuple[Job, subprocess.Popen[bytes]]]) -> None:
    for _, process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    for _, process in running:
        process.wait()


def _last(job: Job) -> dict[str, Any]:
    lines = read_log(job.folder / "log.jsonl")
    return next((line for line in reversed(lines) if "loss" in line), {})


def _news(job: Job) -> str:
    line = _last(job)
    if not line:
        return "starting"
    rate = line["machine"].get("images_per_second", 0)
    return f"step {line['step']} of {job.steps}, {rate:,.0f} images/s, loss {line['loss']:.4f}"


def _show(bars: Progress, task: TaskID, job: Job) -> None:
    line = _last(job)
    bars.update(task, completed=line.get("step", 0), news=_news(job).partition(", ")[2] or "starting")


def _failure(job: Job, status: int) -> str:
    output = job.folder.parent / f"{job.folder.name}.txt"
    lines = [line for line in output.read_text(errors="replace").splitlines() if line.strip()]
    said = lines[-1].removeprefix("ditlab: ") if lines else "it said nothing"
    return f"training {job.name} failed with status {status}: {said} (all it said: {output})"
