"""The verbs, and how a command line becomes an exit status: 0 done, 2 bad input, 130 interrupted.

A verb is a frozen dataclass in a module of its own: its fields are the flags, its docstring the help, and `run(output)`
makes one call and returns what `--json` prints. The verbs of analyses are made from their settings
(`ditlab.cli.analysis`). A module is imported when its verb is used, and none imports torch or numpy before it runs.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import ditlab
from ditlab.analyses import analysis, analysis_names, unusable_analyses
from ditlab.cli.console import Output
from ditlab.cli.flags import flags_of, with_flags
from ditlab.cli.parsing import parse
from ditlab.errors import DitlabError, unknown_name
from ditlab.progress import Interrupted

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
"""Errors of a disk that is full or may not be written: bad input like any other, wherever they come up."""

_BEFORE: dict[str, tuple[str, str]] = {
    "quickstart": ("quickstart:Quickstart", "train two denoisers on real photographs and compare them, in ten minutes"),
    "data prepare": ("data:Prepare", "make an image set from photographs, a folder, a hub data set, an array"),
    "data encode": ("data_encode:Encode", "encode an image set as latents of an autoencoder"),
    "data info": ("data:Info", "show what an image set contains"),
    "train": ("train:Train", "train a denoiser on N images of a set"),
    "sample": ("sample:Sample", "draw images from a model"),
}
_AFTER: dict[str, tuple[str, str]] = {
    "complexity": ("complexity:ComplexityOf", "show what networks cost: parameters, operations, memory, training"),
    "convert": ("convert:Convert", "convert models from and to diffusers, the original codes and the hub"),
    "report": ("report:Report", "write one HTML page about one or several models"),
    "study list": ("study:List", "show the studies: their questions, scales and costs"),
    "study run": ("study:Run", "train and measure the trials of a study, as many at a time as fit"),
    "study status": ("study:Status", "show the progress of each trial of a study"),
    "study report": ("report:StudyReport", "write the page of a study from its recorded trials"),
}


def verbs() -> dict[str, tuple[str, str]]:
    """Returns verb -> (where its class is; "" for an analysis, what it does), in the order of the help text."""
    rooms = {name: analysis(name) for name in analysis_names()}
    questions = {name: room.question for name, room in rooms.items() if room.verb}
    analyses = {name: ("", question[:1].lower() + question[1:]) for name, question in questions.items()}
    return _BEFORE | analyses | _AFTER


def verb_class(verb: str) -> Any:
    """Returns the dataclass of a verb."""
    place = (_BEFORE | _AFTER).get(verb)
    if place is None:
        from ditlab.cli.analysis import verb_of

        return verb_of(analysis(verb))
    module, _, name = place[0].partition(":")
    return getattr(import_module(f"ditlab.cli.{module}"), name)


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Runs one command line and exits.

    Args:
        words: the command line without the program's name; the process's own where None.
    """
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        sys.exit(0)
    if words[0] == "--version":
        print(f"ditlab {ditlab.__version__}")
        sys.exit(0)
    output = Output(as_json="--json" in words)
    words = [word for word in words if word != "--json"]
    try:
        verb, rest = _split(words)
        kind = verb_class(verb)
        output.flags = flags_of(kind)
        output.print_json(parse(kind, verb, rest).run(output))
    except DitlabError as error:
        print(f"ditlab: {with_flags(str(error), output.flags)}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stopped:
        if output.main:
            print(f"ditlab: {stopped}; run the same command again to resume", file=sys.stderr)
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        print("ditlab: interrupted; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of a pipe (head, say) has gone; nothing is wrong. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        print(f"ditlab: {error.filename or 'a file'}: could not be written: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def _help() -> str:
    known = verbs()
    width = max(len(verb) for verb in known)
    lines = "\n".join(f"  {verb:<{width}}  {summary}" for verb, (_, summary) in known.items())
    notes = "".join(f"note: {sentence}\n" for sentence in unusable_analyses())
    return (
        f"ditlab {ditlab.__version__}: train diffusion models, measure whether they generalize or memorize, and vary "
        f"the locality of attention.\n\nusage: ditlab VERB [options]\n\n{lines}\n\n"
        "Every verb has --help, and --json for scripts (the result on standard output, all else on standard error).\n"
        f"{notes}Start with: ditlab quickstart"
    )


def _split(words: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the verb that the command line starts with, and the rest."""
    fixed = _BEFORE | _AFTER
    for length in (2, 1):
        name = " ".join(words[:length])
        if len(words) >= length and name in fixed:
            return name, list(words[length:])
    if words[0] in analysis_names() and analysis(words[0]).verb:
        return words[0], list(words[1:])
    inside = [verb for verb in fixed if verb.startswith(words[0] + " ")]
    if inside:
        second = words[1] if len(words) > 1 else "nothing"
        raise DitlabError(f"'{words[0]}' needs one of: {', '.join(inside)}; found {second}")
    raise unknown_name("verb", words[0], verbs())
