"""From the words of a command line to a verb's dataclass: errors in one sentence."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any

from ditlab.cli.flags import flags_of, renamed
from ditlab.errors import DitlabError

_RULE = re.compile(r"[-─]+")
_VALUES = {
    "INT": "a whole number",
    "FLOAT": "a number",
    "FLOAT FLOAT": "two numbers",
    "[INT [INT ...]]": "whole numbers",
    "[FLOAT [FLOAT ...]]": "numbers",
}
"""Tyro's names of values, in plain words."""


def parse(kind: Any, verb: str, words: list[str]) -> Any:
    """Returns a verb's dataclass from the words after it.

    Raises:
        DitlabError: a flag or a value that the verb does not take, in one sentence with the nearest flag.
    """
    words = [renamed(verb, word) for word in words]
    if hasattr(kind, "parse"):  # a verb with a way of its own: `train` looks up its preset first
        return kind.parse(words)
    return parse_words(kind, verb, words, description=kind.__doc__ or "")


def parse_words(kind: Any, verb: str, words: list[str], *, description: str, **options: Any) -> Any:
    """Runs tyro, and turns its boxes into a sentence; arguments as for `tyro.cli`."""
    import tyro

    description = f"{description.strip()}\n\nWith --json the result is printed as JSON."
    if any(word in ("-h", "--help") for word in words):
        return tyro.cli(kind, prog=f"ditlab {verb}", args=words, description=description, **options)
    printed, width = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"  # no line of a box is broken
    try:
        with redirect_stderr(printed):
            return tyro.cli(kind, prog=f"ditlab {verb}", args=words, description=description, **options)
    except SystemExit as ended:
        if ended.code != 2:
            raise
        raise DitlabError(_sentence(printed.getvalue(), options.get("default", kind), verb, words)) from None
    finally:
        if width is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = width


def _sentence(box: str, kind: Any, verb: str, words: Sequence[str]) -> str:
    """Returns a parser's box as one sentence: where, what was expected, what was found."""
    flags = flags_of(kind)
    named = [word.split("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)]
    if unknown := [name for name in named if _plain(name) not in flags]:
        near = get_close_matches(_plain(unknown[0]), sorted(flags), n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(f'--{name}' for name in near)}" if near else f"see ditlab {verb} --help"
        return f"{verb}: unknown flag '{unknown[0]}' ({hint})"
    text = _first_paragraph(box)
    if text.startswith("Missing from"):
        needed = [field.name for field in fields(kind) if field.default is field.default_factory is MISSING]
        missing = needed[-box.count("(required)") :]
        return f"{verb}: expected {' and '.join(name.upper() for name in missing)}, found nothing"
    if match := re.match(r"Missing value for argument '(.+?)'", text):
        return f"{verb} {match[1].split(', ')[-1]}: expected a value, found nothing"
    if match := re.match(r"Unrecognized options: ([^,]*)", text):
        return f"{verb}: expected no further value, found '{match[1]}'"
    if match := re.match(r"invalid choice '(.*)' for argument '(.+?)'. Expected one of \((.*)\)\.", text):
        choices = [name for name in re.findall(r"'([^']*)'", match[3]) if name != "None"]
        return f"{verb} {match[2].split(', ')[-1]}: expected one of {', '.join(choices)}; found '{match[1]}'"
    match = re.fullmatch(r"Error parsing (\S+): (.*)", text)
    if match is None:
        return f"{verb}: {text}"
    if match[1].startswith("-"):
        return f"{verb} {match[1].split('/')[-1]}: {_value_error(match[2])}"
    return match[2] if re.match(r"[\w .-]+: ", match[2]) else f"{verb}: {match[2]}"


def _first_paragraph(box: str) -> str:
    """Returns the first paragraph of a box, drawn with lines or, where the terminal has none, with dashes."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()][1:]  # without the title
    while lines and (not lines[0] or _RULE.fullmatch(lines[0])):
        lines.pop(0)
    end = next((place for place, line in enumerate(lines) if not line or _RULE.fullmatch(line)), len(lines))
    return " ".join(lines[:end])


def _value_error(message: str) -> str:
    """Returns Python's and tyro's words for a value of the wrong type in plain ones."""
    for pattern, expected in (
        (r"invalid literal for int\(\) with base 10: '(?P<found>.*)'", "INT"),
        (r"could not convert string to float: '(?P<found>.*)'", "FLOAT"),
        (r"Could not find valid parse for arguments: \[(?P<found>.*)\]", "a value as --help shows it"),
        (r"no type matching (?P<kinds>.+) could be instantiated from \[(?P<found>.*)\]\.?", ""),
    ):
        if match := re.fullmatch(pattern, message):
            kinds = (expected or match["kinds"]).split("|")
            names = [name.strip("{}") for name in kinds if name != "{None}"]
            value = match["found"].replace("'", "").replace(",", "")
            return f"expected {' or '.join(_VALUES.get(name, name) for name in names)}, found '{value}'"
    return message


def _plain(flag: str) -> str:
    return flag.lstrip("-").replace("_", "-")
