"""The one error that a user's input can cause.

A `DitlabError` carries one sentence: where, what was expected, what was found. The command line prints that sentence
and exits with status 2. Of all else only a disk that is full or may not be written is caught there, so a traceback
always means a defect.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class DitlabError(Exception):
    """Input that cannot be used: one sentence that says where, what was expected, what was found."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> DitlabError:
    """The error for a name that is not in a list: names the nearest ones, or all where none is near.

    Args:
        what: the kind of thing that was named, e.g. "preset".
        name: what the user gave.
        known: every name that would have been right.
    """
    names = sorted(known)
    near = get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(names)}"
    return DitlabError(f"unknown {what} '{name}' ({hint})")
