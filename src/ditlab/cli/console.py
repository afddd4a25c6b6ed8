"""What all verbs share: output, parsing with one-sentence errors, signals."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from ditlab.cli.flags import flags_of, sentence_of
from ditlab.errors import DitlabError
from ditlab.progress import SILENT, Reporter, RichReporter, StopFlag

ALIASES: dict[str, dict[str, str]] = {
    "sample": {
        "--labels": "--classes",
        "--steps": "--sampler-steps",
        "--levels": "--schedule",
        "--step": "--checkpoint",
    },
    "psnr-gap": {"--references": "--baselines", "--no-references": "--no-baselines"},
    "attention": {"--steps": "--timesteps"},
    "jacobian": {"--steps": "--timesteps"},
    "agreement": {"--references": "--baselines"},
}
"""Verb -> flags of earlier versions and what they are called now; they are accepted and not shown."""
_EVERYWHERE = {"--labels": "--names", "--levels": "--sigmas", "--step": "--checkpoint"}


class Output:
    """Where a verb prints: standard output, or standard error where standard output is for JSON."""

    def __init__(self, as_json: bool = False) -> None:
        from rich.console import Console

        self.as_json = as_json
        self.main = os.environ.get("RANK", "0") == "0"
        """Whether this process prints; of those that torchrun starts only the first does."""
        self.console = Console(stderr=as_json, highlight=False, soft_wrap=True)
        self.reporter: Reporter = RichReporter(self.console) if self.main else SILENT

    def line(self, text: str) -> None:
        """Prints a line as it is."""
        self.console.print(text, markup=False)

    def note(self, sentence: str) -> None:
        """Prints a note."""
        self.reporter.note(sentence)

    def table(self, table: Any) -> None:
        """Prints a table of a page or of rich."""
        from ditlab.cli.tables import rich_table

        self.console.print(rich_table(table) if hasattr(table, "columns") and hasattr(table, "texts") else table)

    def wrote(self, files: Sequence[Path]) -> None:
        """Says which files were written."""
        if files:
            self.line(f"wrote {', '.join(str(file) for file in files)}")

    def print_json(self, result: Any) -> None:
        """Prints the result where JSON was asked for; of several processes only the first has one."""
        if self.as_json and result:
            print(json.dumps(result, indent=1))


def parse(kind: Any, verb: str, words: list[str]) -> Any:
    """Returns a verb's dataclass from the words after it.

    Raises:
        DitlabError: a flag or a value that the verb does not take, in one sentence with the nearest flag.
    """
    words = [_renamed(verb, word) for word in words]
    if hasattr(kind, "parse"):  # a verb with a way of its own: `train` looks up its preset first
        return kind.parse(words)
    return parse_words(kind, verb, words, description=kind.__doc__ or "")


def parse_words(kind: Any, verb: str, words: list[str], *, description: str, **options: Any) -> Any:
    """Runs tyro, and turns its boxes into a sentence; arguments as for `tyro.cli`."""
    import tyro

    description = f"{description.strip()}\n\nWith --json the result is printed as JSON."
    if any(word in ("-h", "--help") for word in words):
        return tyro.cli(kind, prog=f"ditlab {verb}", args=words, description=description, **options)
    said, width = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"  # no line of a box is broken
    try:
        with redirect_stderr(said):
            return tyro.cli(kind, prog=f"ditlab {verb}", args=words, description=description, **options)
    except SystemExit as ended:
        if ended.code != 2:
            raise
        raise DitlabError(sentence_of(said.getvalue(), verb, words, flags_of(kind))) from None
    finally:
        if width is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = width


def command_line(verb: str) -> str:
    """Returns the command as the user typed it, for config.json and reports."""
    return shlex.join(["ditlab", *verb.split(), *sys.argv[1 + len(verb.split()) :]])


@contextmanager
def stop_on_signal() -> Iterator[StopFlag]:
    """Yields a flag that Ctrl-C or SIGTERM sets instead of ending the program; a second one ends it."""
    flag = StopFlag()

    def handle(number: int, frame: Any) -> None:
        if flag.set:
            raise KeyboardInterrupt
        flag.set = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _renamed(verb: str, word: str) -> str:
    name, equals, value = word.partition("=")
    renamed = {**_EVERYWHERE, **ALIASES.get(verb, {})}
    return renamed.get(name, name) + equals + value
