"""How the processes of a study or a quickstart show themselves: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ditlab.cli.console import Output

if TYPE_CHECKING:
    from rich.table import Table

    from ditlab.studies.runner import RunningJob, Snapshot

_PLAIN_EVERY = 30.0
"""Seconds between two lines of progress without a terminal."""
_MAX_ROWS = 30
"""A longer table shows only the jobs that run or failed, and counts the others."""


@contextmanager
def jobs_display(output: Output) -> Iterator[Callable[[Snapshot], None]]:
    """Yields a function that shows snapshots of the runner."""
    if not output.console.is_terminal:
        yield _PlainLines(output)
        return
    from rich.live import Live

    live = Live(console=output.console, auto_refresh=False, transient=True)

    def draw(snapshot: Snapshot) -> None:
        """Draws the table while jobs run, so that bars can be drawn before and after it."""
        live.start()
        live.update(jobs_table(snapshot), refresh=True)
        if len(snapshot.outcomes) == len(snapshot.states):
            live.stop()

    try:
        yield draw
    finally:
        live.stop()


class _PlainLines:
    """Prints each change of state, and from time to time how far the running jobs are."""

    def __init__(self, output: Output) -> None:
        self._output, self._states, self._printed_at = output, dict[str, str](), time.monotonic()

    def __call__(self, snapshot: Snapshot) -> None:
        """Prints what is new."""
        for name, state in snapshot.states.items():
            if state != self._states.get(name, "waiting"):
                self._output.line(f"[{len(snapshot.outcomes)}/{len(snapshot.states)}] {name}: {state}")
        self._states = dict(snapshot.states)
        if time.monotonic() - self._printed_at < _PLAIN_EVERY:
            return
        self._printed_at = time.monotonic()
        for running in snapshot.running.values():
            step, left, detail = _columns(running)
            if step:
                parts = [f"step {step}", *([f"{left} left"] if left else []), *([detail] if detail else [])]
                self._output.line(f"{running.name}: {', '.join(parts)}")


def jobs_table(snapshot: Snapshot) -> Table:
    """Returns the live table: what runs with its step and the time left, what waits, what failed and why."""
    from rich.table import Table

    counts = f"{snapshot.done} done, {len(snapshot.running)} running, {snapshot.waiting} waiting"
    failed = f", {snapshot.failed} failed" if snapshot.failed else ""
    table = Table(title=f"{snapshot.title}: {counts}{failed}", title_justify="left")
    for name in ("run", "state", "step", "left", ""):
        table.add_column(name, justify="right" if name in ("step", "left") else "left")
    for name, state in snapshot.states.items():
        outcome = snapshot.outcomes.get(name)
        if name in snapshot.running:
            table.add_row(name, state, *_columns(snapshot.running[name]), style="bold")
        elif outcome is not None and outcome.state == "failed":
            table.add_row(name, "failed", "", "", outcome.reason, style="red")
        elif len(snapshot.states) <= _MAX_ROWS:
            table.add_row(name, state, "", "", "", style="dim")
    return table


def _columns(running: RunningJob) -> tuple[str, str, str]:
    """How far a job's process is, the time left, and details; no step where that is not known."""
    from ditlab.studies.runner import clock

    progress = running.progress()
    if progress is None:
        return "", "", f"{clock(running.stage_seconds)} so far"
    left = "" if progress.seconds_left is None else clock(progress.seconds_left)
    return f"{progress.done:,} of {progress.total:,}", left, progress.detail
