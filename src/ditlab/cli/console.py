"""What all verbs share: output, parsing with one-sentence errors, flags in place of parameters, signals."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

from ditlab.errors import DitlabError
from ditlab.progress import SILENT, Reporter, RichReporter, StopFlag

_BOX = re.compile(r"[│╭╮╰╯─]+")
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
        raise DitlabError(_sentence(said.getvalue(), verb, words, flags_of(kind))) from None
    finally:
        if width is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = width


def _sentence(box: str, verb: str, words: Sequence[str], flags: frozenset[str]) -> str:
    """Returns the first paragraph of a parser's box as one sentence, with the nearest flags of an unknown one."""
    unknown = [w.split("=")[0] for w in words if re.match(r"--?[A-Za-z]", w) and _plain(w.split("=")[0]) not in flags]
    known = sorted(flags)
    if unknown and "nrecognized" in box:
        near = get_close_matches(_plain(unknown[0]), known, n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(f'--{name}' for name in near)}" if near else f"see ditlab {verb} --help"
        return f"{verb}: unknown flag '{unknown[0]}' ({hint})"
    lines = [_BOX.sub(" ", line).strip() for line in box.splitlines()]
    text, started = [], False
    for raw, line in zip(box.splitlines(), lines, strict=True):
        if raw.startswith("╭"):
            started = True
            continue
        if started and (not line or re.match(r"(For full helptext|Argument helptext)", line)):
            if text:
                break
            continue
        text.append(line)
    flag, message = re.fullmatch(r"(?:Error parsing (\S+): )?(.*)", " ".join(text).strip()).groups()  # type: ignore
    if message.startswith("Missing from"):
        missing = re.sub(r"^Missing from [^:]*:", "", message).split(" (")[0].strip()
        return f"{verb}: expected {missing}, found nothing"
    message = re.sub(
        r"no type matching (.+) could be instantiated from \['?(.*?)'?\]\.?", r"expected \1, found '\2'", message
    )
    if flag is not None and flag.startswith("-"):
        return f"{verb} {flag.split('/')[-1]}: {message}"
    return message if re.match(r"[\w .-]+: ", message) else f"{verb}: {message}"


def flags_of(kind: Any) -> frozenset[str]:
    """Returns the names of a verb's flags, without dashes at the start, as a command line writes them."""
    return frozenset(_flags(kind, ""))


def _flags(kind: Any, prefix: str) -> Iterator[str]:
    try:
        hints = get_type_hints(kind, include_extras=True)
    except (NameError, TypeError):
        hints = {}
    for field in fields(kind):
        hint = hints.get(field.name, field.type)
        named = [meta.name for meta in getattr(hint, "__metadata__", ()) if getattr(meta, "name", None) is not None]
        name = named[0] if named else field.name
        inner = getattr(hint, "__origin__", hint) if hasattr(hint, "__metadata__") else hint
        for option in getattr(inner, "__args__", (inner,)):
            option = getattr(option, "__origin__", option) if hasattr(option, "__metadata__") else option
            if is_dataclass(option):
                yield from _flags(option, f"{prefix}{name}." if name else prefix)
        flag = f"{prefix}{name}".replace("_", "-")
        yield flag
        if inner is bool:
            group, dot, last = flag.rpartition(".")
            yield f"{group}{dot}no-{last}"


def with_flags(message: str, flags: frozenset[str]) -> str:
    """Returns an error with each parameter in backticks written as a flag, where the verb has it."""

    def flag(match: re.Match[str]) -> str:
        name = match[1].replace("_", "-")
        return f"--{name}" if name in flags else match[1]

    return re.sub(r"`([A-Za-z_][\w.]*)`", flag, message)


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


def _plain(flag: str) -> str:
    return flag.lstrip("-").replace("_", "-")
