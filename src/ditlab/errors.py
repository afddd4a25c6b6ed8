"""The errors that a user's input can cause.

A `DitlabError` carries one sentence: where, what was expected, what was found. It names a parameter in backticks
(`data`), as a Python caller writes it; the command line prints it as a flag (--data) and exits with status 2. Of all
else only a disk that is full or may not be written is caught there, so a traceback always means a defect.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["AlreadyExists", "Damaged", "DitlabError", "Incompatible", "InvalidConfig", "NotFound", "unknown_name"]


class DitlabError(ValueError):
    """Input that cannot be used: one sentence that says where, what was expected, what was found."""


class InvalidConfig(DitlabError):
    """A setting has a value that it cannot have, or settings contradict each other."""


class Incompatible(DitlabError):
    """Things that are each whole do not fit each other: models, images, shapes, earlier results."""


class NotFound(DitlabError):
    """Something that was named does not exist."""


class AlreadyExists(DitlabError):
    """A place is taken by something else than what is to be written there."""


class Damaged(DitlabError):
    """A file is not what its checksum or its format says."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> NotFound:
    """Returns the error for a name of a `what` ("preset") that is not known: it gives the nearest, or else all."""
    names = sorted(set(known))
    near = get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(names)}"
    return NotFound(f"unknown {what} '{name}' ({hint})")
