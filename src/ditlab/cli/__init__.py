"""The command line: `ditlab VERB ...`.

Every verb is a frozen dataclass in a module of its own: its fields are the flags, its docstring the help, and
`run(console)` does the work and returns what `--json` prints. Modules are imported when their verb is used.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import ditlab
from ditlab.errors import DitlabError, unknown_name

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
"""What a disk answers to a place that cannot be written: bad input like any other, wherever it comes up."""

VERBS: dict[str, tuple[str, str]] = {
    "quickstart": ("quickstart:Quickstart", "train two denoisers on real photographs and compare them, in ten minutes"),
    "data prepare": ("data:Prepare", "make an image set of photographs, a folder, a hub data set, an array"),
    "data encode": ("data_encode:Encode", "turn an image set into latents with an autoencoder"),
    "data info": ("data:Info", "show what is in an image set"),
    "train": ("train:Train", "train a denoiser on N images of a set"),
    "sample": ("sample:Sample", "draw images from a trained denoiser"),
    "psnr-gap": ("psnr_gap:PSNRGap", "measure train and test PSNR by noise level, and the gap between them"),
    "attention": ("attention:Attention", "draw attention maps and measure how local they are"),
    "jacobian": ("jacobian:Jacobian", "draw and measure what a denoiser does to an image, direction by direction"),
    "agreement": ("agreement:Agreement", "compare a run with closed-form denoisers, drawing from the same noise"),
    "two-subsets": ("two_subsets:TwoSubsets", "compare two runs trained on disjoint sets, drawing from the same noise"),
    "complexity": ("complexity:ComplexityOf", "show what networks cost: parameters, operations, memory, training"),
    "convert": ("convert:Convert", "bring models from and to diffusers, the original DiT code and the hub"),
    "report": ("report:Report", "write one HTML page about one or several runs"),
    "study list": ("study:List", "show the studies: their questions, scales and costs"),
    "study run": ("study:Run", "train and measure the cells of a study, as many at a time as fit"),
    "study status": ("study:Status", "show how far each cell of a study is"),
    "study report": ("study:Report", "write the page of a study with what is on record of its cells"),
}
"""Verb -> (where its class is, what it does)."""


def _help() -> str:
    width = max(len(verb) for verb in VERBS)
    verbs = "\n".join(f"  {verb:<{width}}  {what}" for verb, (_, what) in VERBS.items())
    return (
        f"ditlab {ditlab.__version__}: train diffusion denoisers and see whether they generalize or memorize.\n\n"
        f"usage: ditlab VERB [options]\n\n{verbs}\n\n"
        "Every verb has --help, and --json for scripts (the result on standard output, all else on standard error).\n"
        "Start with: ditlab quickstart"
    )


def _verb(words: Sequence[str]) -> tuple[str, list[str]]:
    """The verb that the command line starts with, and the rest."""
    for length in (2, 1):
        name = " ".join(words[:length])
        if len(words) >= length and name in VERBS:
            return name, list(words[length:])
    inside = [verb for verb in VERBS if verb.startswith(words[0] + " ")]
    if inside:
        found = words[1] if len(words) > 1 else "nothing"
        raise DitlabError(f"'{words[0]}' needs one of: {', '.join(inside)}; found {found}")
    raise unknown_name("verb", words[0], VERBS)


def _load(verb: str) -> Any:
    module, _, name = VERBS[verb][0].partition(":")
    return getattr(import_module(f"ditlab.cli.{module}"), name)


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Runs one command line and exits: 0 done, 2 bad input, 130 interrupted.

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
    as_json = "--json" in words
    words = [word for word in words if word != "--json"]

    from rich.console import Console

    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    try:
        verb, rest = _verb(words)
        action = _parse(_load(verb), verb, rest)
        result = action.run(console)
    except DitlabError as error:
        print(f"ditlab: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("ditlab: interrupted; the same command goes on where it was", file=sys.stderr)
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
    if as_json and result:  # of several processes only the first has something to say
        print(json.dumps(result, indent=1))
    sys.exit(0)


def _parse(kind: Any, verb: str, words: list[str]) -> Any:
    """A verb's dataclass from the words after it; a class may have its own way (`train` looks up a preset first)."""
    if hasattr(kind, "parse"):
        return kind.parse(words)
    import tyro

    return tyro.cli(kind, prog=f"ditlab {verb}", args=words, description=_description(kind))


def _description(kind: Any) -> str:
    return f"{(kind.__doc__ or '').strip()}\n\nWith --json the result is printed as JSON."
