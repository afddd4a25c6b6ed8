"""The names of a verb's flags, and errors in their words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_type_hints

_BOX = re.compile(r"[│╭╮╰╯─]+|-{4,}")
_HEAD = re.compile(r"╭| -{4,} *$")
"""The line before the text: the top of a box, or where standard output is not UTF-8 the rule below a title."""


def sentence_of(box: str, verb: str, words: Sequence[str], flags: frozenset[str]) -> str:
    """Returns the first paragraph of a parser's box as one sentence, with the nearest flags of an unknown one."""
    unknown = [w.split("=")[0] for w in words if re.match(r"--?[A-Za-z]", w) and _plain(w.split("=")[0]) not in flags]
    known = sorted(flags)
    if unknown and "nrecognized" in box:
        near = get_close_matches(_plain(unknown[0]), known, n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(f'--{name}' for name in near)}" if near else f"see ditlab {verb} --help"
        return f"{verb}: unknown flag '{unknown[0]}' ({hint})"
    lines = box.splitlines()
    head = next((place for place, line in enumerate(lines) if _HEAD.match(line)), -1)
    text: list[str] = []
    for line in (_BOX.sub(" ", line).strip() for line in lines[head + 1 :]):
        if line and not re.match(r"(For full helptext|Argument helptext)", line):
            text.append(line)
        elif text:
            break
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
        options: tuple[Any, ...] = getattr(inner, "__args__", (inner,))
        for option in options:
            option = getattr(option, "__origin__", option) if hasattr(option, "__metadata__") else option
            if is_dataclass(option):
                # A network's settings are declared by their base, and those of its subclasses are flags too.
                subclasses: list[type[Any]] = getattr(option, "__subclasses__", list)()
                for part in (option, *subclasses):
                    yield from _flags(part, f"{prefix}{name}." if name else prefix)
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


def _plain(flag: str) -> str:
    return flag.lstrip("-").replace("_", "-")
