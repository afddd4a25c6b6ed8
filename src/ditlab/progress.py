"""Progress and notes: what long work says while it runs, to whoever listens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["SILENT", "Bar", "Reporter", "StopFlag"]


class Bar:
    """Counts how much of a piece of work is done; this one shows nothing."""

    def __call__(self, done: int, total: int | None = None, **fields: float | str) -> None:
        """Takes what is done, of how much, and values to show beside the bar."""


class Reporter:
    """Receives notes and progress; this one ignores both."""

    def note(self, sentence: str) -> None:
        """Takes one sentence for the user."""

    @contextmanager
    def bar(self, title: str, total: int | None = None) -> Iterator[Bar]:
        """Yields a bar for work with this title and so many units."""
        yield Bar()


SILENT = Reporter()


class StopFlag:
    """Set by a signal handler; read between two pieces of work."""

    def __init__(self) -> None:
        self.set = False
