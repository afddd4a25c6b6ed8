"""What all verbs share: output, signals, the command line as it was typed."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditlab.cli.flags import with_flags
from ditlab.progress import SILENT, Reporter, RichReporter, SignalStop

if TYPE_CHECKING:
    from ditlab.pages.page import Table


class Output:
    """Where a verb prints: standard output, or standard error where standard output is for JSON."""

    def __init__(self, as_json: bool = False) -> None:
        from rich.console import Console

        self.as_json = as_json
        self.main = os.environ.get("RANK", "0") == "0"
        """Whether this process prints; of those that torchrun starts only the first does."""
        self.console = Console(stderr=as_json, highlight=False, soft_wrap=True)
        self.console.on_broken_pipe = _broken_pipe
        self.flags: frozenset[str] = frozenset()
        """Flags of the verb: a note that names one of its parameters is printed with the flag."""
        self.reporter: Reporter = _Notes(self) if self.main else SILENT

    def line(self, text: str) -> None:
        """Prints a line as it is."""
        self.console.print(text, markup=False)

    def note(self, sentence: str) -> None:
        """Prints a note."""
        self.reporter.note(sentence)

    def table(self, table: Any) -> None:
        """Prints a table of a page or of rich."""
        self.console.print(rich_table(table) if hasattr(table, "columns") and hasattr(table, "texts") else table)

    def wrote(self, files: Sequence[Path]) -> None:
        """Says which files were written."""
        if files:
            self.line(f"wrote {', '.join(str(file) for file in files)}")

    def print_json(self, result: Any) -> None:
        """Prints the result where JSON was asked for; of several processes only the first has one."""
        if self.as_json and result:
            print(json.dumps(result, indent=1))


class _Notes(RichReporter):
    """The reporter of a command line."""

    def __init__(self, output: Output) -> None:
        super().__init__(output.console)
        self._output = output

    def note(self, sentence: str) -> None:
        """Prints the sentence with flags in place of parameters."""
        super().note(with_flags(sentence, self._output.flags))


def _broken_pipe() -> None:
    """Leaves it to `main` what happens when the reader of a pipe has gone; rich would end with status 1."""
    raise BrokenPipeError


def command_line(verb: str) -> str:
    """Returns the command as the user typed it, for config.json and reports."""
    return shlex.join(["ditlab", *verb.split(), *sys.argv[1 + len(verb.split()) :]])


@contextmanager
def stop_on_signal() -> Iterator[SignalStop]:
    """Yields a flag that Ctrl-C, SIGTERM or the end of the parent sets; a second signal ends the program."""
    flag = SignalStop()

    def handle(number: int, frame: Any) -> None:
        if flag.signalled:
            raise KeyboardInterrupt
        flag.signalled = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def rich_table(table: Table) -> Any:
    """Returns a page's table for a terminal; no number is cut off in a narrow one."""
    from rich import box
    from rich.table import Table as RichTable

    shown = RichTable(title=table.caption or None, title_justify="left", box=box.SIMPLE_HEAD)
    texts = table.texts
    for place, (heading, numeric) in enumerate(zip(table.columns, table.numeric, strict=True)):
        widest = max([len(word) for word in heading.split()] + [len(row[place]) for row in texts if numeric])
        shown.add_column(heading, justify="right" if numeric else "left", min_width=widest if numeric else None)
    for row in texts:
        shown.add_row(*(cell.replace("`", "") for cell in row))
    return shown
