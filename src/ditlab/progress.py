"""Progress and notes: what long work tells whoever started it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["SILENT", "Bar", "Reporter"]


class Bar:
    """The progress of counted work. This one shows nothing."""

    def __call__(self, done: int, total: int | None = None, **fields: object) -> None:
        """Shows that `done` of `total` are done, with further values by name."""


class Reporter:
    """Receives notes and progress. This one is silent; a console or a notebook overrides both methods."""

    def note(self, sentence: str) -> None:
        """Shows a sentence."""

    @contextmanager
    def bar(self, title: str, total: int | None = None) -> Iterator[Bar]:
        """Yields a bar for counted work, shown within the block."""
        yield Bar()


SILENT = Reporter()
"""Shows nothing."""
