"""Opens files of the original codes of DiT and improved-diffusion safely, and writes such files.

They are pickles: a bare state dict, as both were published, or the output of DiT's training script, {"model", "ema",
"opt", "args"} with `args` an `argparse.Namespace`. Both are read with torch's restricted unpickler, which creates
tensors, plain containers and, by an allow-list, that one class; no code in a file is ever executed. A `.safetensors`
file with the same weights is read too.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ditlab.data.manifest import hash_file
from ditlab.diffusion.network_denoisers import NetworkDenoiser
from ditlab.diffusion.sampler_configs import SamplerConfig
from ditlab.errors import DitlabError
from ditlab.interop.imported import ImportedModel
from ditlab.training.checkpoint import read_tensors

N = TypeVar("N", bound=nn.Module)

SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")
"""Suffixes of files with such weights."""

_ARGS = "args"
"""Name of the settings in a file: a key of a pickle, JSON in the metadata of a `.safetensors` file."""


def read_state(path: Path, *, ema: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the weights of a file by their original names, averaged ones if it has both and `ema`; and its settings.

    Raises:
        DitlabError: the file is missing, damaged, contains code, or has no weights.
    """
    if not path.is_file():
        raise DitlabError(f"{path}: expected a checkpoint, found nothing")
    plain = path.suffix == ".safetensors"
    content: Any = read_tensors(path) if plain else _unpickle(path)
    args = _metadata(path) if plain else {}
    if isinstance(content, dict) and ("ema" in content or "model" in content):
        settings = content.get(_ARGS)
        settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings
        args = settings if isinstance(settings, dict) else {}
        chosen = "ema" if ema and "ema" in content else "model"
        if chosen not in content:
            raise DitlabError(f"{path}: expected the raw weights 'model', found only {', '.join(map(str, content))}")
        content = content[chosen]
    elif not ema:
        raise DitlabError(f"{path}: expected raw weights beside averaged ones, found one set of weights only")
    if not isinstance(content, dict) or not content or not all(isinstance(x, Tensor) for x in content.values()):
        raise DitlabError(f"{path}: expected a state dict of tensors, found {type(content).__name__}")
    other = next((key for key in content if not isinstance(key, str)), None)
    if other is not None:
        raise DitlabError(f"{path}: expected a state dict with names as keys, found the key {other!r:.50}")
    return content, args


def _metadata(path: Path) -> dict[str, Any]:
    """Returns the settings in a `.safetensors` file that ditlab wrote; empty in others."""
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(_ARGS, "{}")
    try:
        settings = json.loads(text)
    except ValueError:
        settings = None
    return settings if isinstance(settings, dict) else {}


def _unpickle(path: Path) -> Any:
    """Loads a pickle of tensors; code in it is never executed."""
    with path.open("rb") as file:
        start = file.read(2)
    if start not in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise DitlabError(f"{path}: expected a checkpoint, found a file of another kind")
    try:
        # The restricted unpickler warns of a newer protocol, but reads or refuses it correctly.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it wants to run '{named[1]}' when it is opened" if named else "it holds more than tensors"
        raise DitlabError(
            f"{path}: {what}, which could be any code, so it is not opened; if you trust its author, load it on an "
            "isolated machine, save its tensors with safetensors.torch.save_file, and open that .safetensors file"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        first = (str(error).strip() or "it ends too early").splitlines()[0]
        raise DitlabError(f"{path}: expected a whole checkpoint, found a damaged one ({first:.70})") from None


def write_state(path: Path, state: Mapping[str, Tensor], args: Mapping[str, Any], pickled: Any) -> None:
    """Writes weights to a new file, which is complete or does not appear.

    Args:
        path: a file that does not exist.
        state: the weights by their original names, in a `.safetensors` file.
        args: settings that the shapes do not determine, JSON values; in a `.safetensors` file.
        pickled: the content of any other file, which the original code and the restricted unpickler open.
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


def tensor_of(state: Mapping[str, Tensor], key: str, dimensions: int, where: str) -> Tensor:
    """Returns a weight by its original name, with so many dimensions, none of them empty."""
    value = state.get(key)
    if value is None or value.ndim != dimensions or not value.numel():
        found = "none" if value is None else f"the shape {tuple(value.shape)}"
        raise DitlabError(f"{where}: expected '{key}' with {dimensions} dimensions among the weights, found {found}")
    return value


def original_name(name: str, modules: Mapping[str, str]) -> str:
    """Returns the original name of one of our weights, by that of its module."""
    stem, _, leaf = name.rpartition(".")
    return f"{modules.get(stem, stem)}.{leaf}"


def load_weights(network: N, state: Mapping[str, Tensor], where: str, modules: Mapping[str, str] | None = None) -> N:
    """Loads weights in our layout by their original names into a network, and returns it.

    Args:
        network: a network of ditlab.
        state: all its weights.
        where: named in errors.
        modules: name of a module of ours -> its original name; the same names if None.

    Raises:
        DitlabError: for a name without a counterpart, a missing weight, or another shape.
    """
    expected = network.state_dict()
    ours = {name if modules is None else original_name(name, modules): name for name in expected}
    for key, value in state.items():
        if key not in ours:
            raise DitlabError(f"{where}: '{key}' has no counterpart in this network")
        shape = tuple(expected[ours[key]].shape)
        if value.shape != shape:
            raise DitlabError(f"{where}: expected '{key}' with the shape {shape}, found {tuple(value.shape)}")
    missing = sorted(name for key, name in ours.items() if key not in state)
    if missing:
        raise DitlabError(f"{where}: {len(missing)} parameters are missing, the first '{missing[0]}'")
    network.load_state_dict({ours[key]: value for key, value in state.items()})
    return network


def model_of_file(
    path: Path,
    kind: str,
    denoiser: NetworkDenoiser,
    sampler: SamplerConfig,
    *,
    notes: Sequence[str] = (),
    known: Mapping[str, Any] | None = None,
    any_size: bool = False,
) -> ImportedModel:
    """Returns the record of a denoiser whose weights are in a file of this kind; `known` is what else it says."""
    digest = hash_file(path).sha256
    source = {"format": kind, "file": path.name, "sha256": digest, **(known or {})}
    if notes:
        source["notes"] = list(notes)
    return ImportedModel(path.stem, denoiser, sampler, source, digest, any_size=any_size)


def setting(args: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """Returns a setting of a file, of this type; None if it is missing."""
    value = args.get(name)
    if value is not None and type(value) is not kind:
        expected = "a whole number" if kind is int else kind.__name__
        raise DitlabError(f"{where}: expected {name} among its settings as {expected}, found {value!r:.50}")
    return value


__all__ = [
    "SUFFIXES",
    "load_weights",
    "model_of_file",
    "original_name",
    "read_state",
    "setting",
    "tensor_of",
    "write_state",
]
