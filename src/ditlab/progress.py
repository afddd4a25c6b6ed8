"""How long work tells how far it is: one `Reporter`, silent in a library, bars on a terminal or in a notebook.

Functions take `reporter: Reporter = SILENT` and tell it two kinds of things: notes, which a user should read once, and
the progress of a bar.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = [
    "SILENT",
    "Bar",
    "Interrupted",
    "Reporter",
    "RichReporter",
    "SignalStop",
    "StopFlag",
    "Worker",
    "default_reporter",
    "orphaned",
]

_PLAIN_EVERY = 30.0
"""Seconds between two lines of progress where there is no terminal."""


class Bar:
    """One bar of progress; this one shows nothing."""

    def __call__(self, done: int, total: int | None = None, **fields: Any) -> None:
        """Shows how much is done, of how much (None leaves it as it was), and values beside the bar, by name."""


class Reporter:
    """Takes notes and progress; this one drops them."""

    def note(self, sentence: str) -> None:
        """Shows a sentence that the user should read."""

    @contextmanager
    def bar(self, title: str, total: int | None = None) -> Iterator[Bar]:
        """Yields a bar of progress; `total` is how much there is to do, where that is known at the start."""
        yield Bar()


SILENT = Reporter()


class StopFlag:
    """Asks a long job to save and end; `set` is read between two steps."""

    set: bool = False


class SignalStop(StopFlag):
    """Set by a signal, and when the ditlab process that started this one is gone."""

    signalled: bool = False

    @property
    def set(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether to save and end."""
        return self.signalled or orphaned()


class Interrupted(Exception):
    """A long job was stopped, and saved what it had done; the same call resumes it."""

    status: int = 130
    """Exit status of a command that ends with it."""


class RichReporter(Reporter):
    """Shows notes as lines, and progress as bars on a terminal or in a notebook, as a line now and then elsewhere."""

    _watches = False

    def __init__(self, console: Console) -> None:
        self.console = console

    def note(self, sentence: str) -> None:
        """Prints the sentence as a note."""
        self.console.print(f"note: {sentence}", markup=False)

    @contextmanager
    def bar(self, title: str, total: int | None = None) -> Iterator[Bar]:
        """Yields a bar, drawn from its first call on, so that work which is refused at once draws none."""
        shown = _RichBar(self.console, title, total, self._watches)
        try:
            yield shown
        finally:
            shown.close()


class Worker(RichReporter):
    """The reporter of a process that another ditlab process started: it ends as by Ctrl-C when its parent is gone."""

    _watches = True


class _RichBar(Bar):
    def __init__(self, console: Console, title: str, total: int | None, watches: bool) -> None:
        self._console, self._title, self._total, self._watches = console, title, total, watches
        self._progress: Progress | None = None
        self._printed = self._begun = time.monotonic()
        self._task: Any = None

    def __call__(self, done: int, total: int | None = None, **fields: Any) -> None:
        if self._watches and orphaned():
            raise KeyboardInterrupt
        self._total = self._total if total is None else total
        beside = "  ".join(f"{name.replace('_', ' ')} {_text(value)}" for name, value in fields.items())
        if self._console.is_terminal or self._console.is_jupyter:
            self._draw(done, beside)
        elif time.monotonic() - self._printed > _PLAIN_EVERY:
            self._printed = time.monotonic()
            of = "" if self._total is None else f" of {self._total:,}"
            self._console.print(f"{self._title}: {done:,}{of}" + (f", {beside}" if beside else ""), markup=False)

    def _draw(self, done: int, beside: str) -> None:
        from rich import progress

        if self._progress is None:
            columns = (
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[beside]}", markup=False),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
            )
            self._progress = progress.Progress(*columns, console=self._console, transient=True)
            self._progress.start()
            self._task = self._progress.add_task(self._title, total=self._total, beside="")
        self._progress.update(self._task, completed=done, total=self._total, beside=beside)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def default_reporter() -> Reporter:
    """Returns the reporter of a Python caller who names none: bars in a notebook, silence elsewhere."""
    ipython = sys.modules.get("IPython")
    if ipython is None or type(ipython.get_ipython()).__name__ != "ZMQInteractiveShell":
        return SILENT
    from rich.console import Console

    return RichReporter(Console(highlight=False, soft_wrap=True))


def orphaned() -> bool:
    """Returns whether the ditlab process that started this one (DITLAB_PARENT) has ended."""
    parent = os.environ.get("DITLAB_PARENT")
    return parent is not None and os.getppid() != int(parent)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
