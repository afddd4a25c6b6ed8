"""The flags of a verb: their names, those of earlier versions, and flags in place of parameters in errors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

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
EVERYWHERE = {"--labels": "--names", "--levels": "--sigmas", "--step": "--checkpoint"}
"""The same for all other verbs."""


def flags_of(kind: Any) -> frozenset[str]:
    """Returns the names of a verb's flags, without dashes at the start, as a command line writes them.

    Args:
        kind: the verb's dataclass, or its defaults, where a group of flags is of the kind that stands there.
    """
    return frozenset(_flags(kind, ""))


def _flags(kind: Any, prefix: str) -> Iterator[str]:
    try:
        hints = get_type_hints(kind if isinstance(kind, type) else type(kind), include_extras=True)
    except (NameError, TypeError):
        hints = {}
    for field in fields(kind):
        hint = hints.get(field.name, field.type)
        about = getattr(hint, "__metadata__", ())
        if any(str(meta) in ("Positional", "Suppress") for meta in about):
            continue
        named = [meta.name for meta in about if getattr(meta, "name", None) is not None]
        name = named[0] if named else field.name
        inner = getattr(hint, "__origin__", hint) if about else hint
        options = [getattr(option, "__origin__", option) for option in getattr(inner, "__args__", (inner,))]
        default = None if isinstance(kind, type) else getattr(kind, field.name)
        groups = [default] if is_dataclass(default) else [option for option in options if is_dataclass(option)]
        for group in groups:
            yield from _flags(group, f"{prefix}{name}." if name else prefix)
        flag = f"{prefix}{name}".replace("_", "-")
        if not groups:
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


def renamed(verb: str, word: str) -> str:
    """Returns a word of a command line, with a flag of an earlier version in its present name."""
    name, equals, value = word.partition("=")
    return (EVERYWHERE | ALIASES.get(verb, {})).get(name, name) + equals + value
