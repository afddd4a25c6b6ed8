"""Files that the original codes of DiT and of improved-diffusion left: opened safely, and written.

They are pickles: a bare state dict, as the authors of both published theirs, or what DiT's training script leaves,
{"model", "ema", "opt", "args"} with `args` an `argparse.Namespace`. Both are read with torch's restricted unpickler,
which makes tensors, plain containers and, by an allow-list, that one class; nothing else in a file is ever run. The
same weights in a `.safetensors` file are read too.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ditlab.errors import DitlabError
from ditlab.training.checkpoint import read_tensors

N = TypeVar("N", bound=nn.Module)

SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")
"""How the names of files end that may hold such weights."""

_ARGS = "args"
"""Where a file says what its shapes do not: a key of a pickle, JSON among the metadata of a `.safetensors` file."""


def read_state(path: Path, *, ema: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights in a file of somebody's original code, by their names there, and what its `args` say of them.

    Args:
        path: a `.pt`, `.pth` or `.ckpt` file, or `.safetensors` with the same names.
        ema: the averaged weights where the file has both; else those of the last step.

    Raises:
        DitlabError: no such file, a damaged one, one with code in it, or one without weights.
    """
    if not path.is_file():
        raise DitlabError(f"{path}: expected a checkpoint, found nothing")
    args: dict[str, Any] = {}
    if path.suffix == ".safetensors":
        found: Any = read_tensors(path)
        args = _metadata(path)
    else:
        found = _unpickle(path)
    if isinstance(found, dict) and ("ema" in found or "model" in found):
        said = found.get(_ARGS)
        said = vars(said) if isinstance(said, argparse.Namespace) else said
        args = said if isinstance(said, dict) else {}
        wanted = "ema" if ema and "ema" in found else "model"
        if wanted not in found:
            raise DitlabError(f"{path}: expected the raw weights 'model', found only {', '.join(map(str, found))}")
        found = found[wanted]
    elif not ema:
        raise DitlabError(f"{path}: expected raw weights beside averaged ones, found one set of weights only")
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise DitlabError(f"{path}: expected a state dict of tensors, found {type(found).__name__}")
    other = next((key for key in found if not isinstance(key, str)), None)
    if other is not None:
        raise DitlabError(f"{path}: expected a state dict with names as keys, found the key {other!r:.50}")
    return found, args


def _metadata(path: Path) -> dict[str, Any]:
    """What a whole `.safetensors` file says beside its weights, where we wrote it."""
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(_ARGS, "{}")
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}


def _unpickle(path: Path) -> Any:
    """What a pickle of tensors holds; code in it is never run."""
    with path.open("rb") as file:
        start = file.read(2)
    if start not in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise DitlabError(f"{path}: expected a checkpoint, found a file of another kind")
    try:
        # The restricted unpickler warns of a newer protocol, which it then reads or refuses all the same.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it wants to run '{named[1]}' when it is opened" if named else "it holds more than tensors"
        raise DitlabError(
            f"{path}: {what}, which could be any code, so it is not opened; if you trust who made it, load it on a "
            "machine that has nothing to lose, save its tensors there with safetensors.torch.save_file, and give "
            "ditlab that .safetensors file"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        first = (str(error).strip() or "it ends too early").splitlines()[0]
        raise DitlabError(f"{path}: expected a whole checkpoint, found a damaged one ({first:.70})") from None


def write_state(path: Path, state: Mapping[str, Tensor], args: Mapping[str, Any], pickled: Any) -> None:
    """Writes weights under their original names, whole or not at all.

    Args:
        path: a file that does not exist yet.
        state: the weights, for a `.safetensors` file.
        args: what their shapes do not tell, JSON values; for a `.safetensors` file.
        pickled: what any other file holds: what the original code opens, of kinds that the restricted unpickler makes.

    Raises:
        DitlabError: the file exists already, or cannot be written.
    """
    if path.exists():
        raise DitlabError(f"{path}: expected a new file, found something there")
    beside = path.with_name(f".{path.name}.partial")
    made = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(
                {key: value.clone() for key, value in state.items()},
                beside,
                metadata={_ARGS: json.dumps(args)},  # one key: safetensors writes several in an order of chance
            )
        else:
            torch.save(pickled, beside)
        beside.replace(path)
    except (OSError, RuntimeError, SafetensorError) as error:  # the latter two where the disk is full
        with suppress(OSError):
            beside.unlink(missing_ok=True)
            if made:
                path.parent.rmdir()
        raise DitlabError(f"{path}: could not be written ({error}); nothing was kept") from None


def filled(network: N, state: Mapping[str, Tensor], names: Mapping[str, str | None], where: str) -> N:
    """The network with these weights.

    Args:
        network: ours.
        state: the weights by their original names, in our layout.
        names: our name of each of them that is to be read; None where there is none.
        where: named in errors.

    Raises:
        DitlabError: for a name without a counterpart, a missing one, or another shape.
    """
    wanted = network.state_dict()
    found: dict[str, Tensor] = {}
    for key, name in names.items():
        if name is None or name not in wanted:
            raise DitlabError(f"{where}: '{key}' has no counterpart in this network")
        if wanted[name].shape != state[key].shape:
            raise DitlabError(
                f"{where}: '{key}' has shape {tuple(state[key].shape)}, expected {tuple(wanted[name].shape)}"
            )
        found[name] = state[key]
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise DitlabError(f"{where}: {len(missing)} parameters are missing, the first '{missing[0]}'")
    network.load_state_dict(found)
    return network


def whole(args: Mapping[str, Any], name: str, where: str) -> int | None:
    """A whole number among the settings; None where it is not there."""
    found = args.get(name)
    if found is not None and type(found) is not int:
        raise DitlabError(f"{where}: expected {name} among its settings as a whole number, found {found!r:.50}")
    return found
