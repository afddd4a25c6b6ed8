"""Hashes what decides the results of a user's own code: its functions, attributes and tensors."""

from __future__ import annotations

import hashlib
import json
from dataclasses import is_dataclass
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["UNKNOWN", "add_tensor", "fingerprint"]

UNKNOWN = "?"
"""The first character of a fingerprint of something that holds an object whose contents cannot be known."""


def fingerprint(value: Any) -> str:
    """Returns a SHA-256 of a function or object and of all that it refers to, except for global variables."""
    text = json.dumps(_describe(value, {}), default=str)
    return UNKNOWN * (f'"{UNKNOWN}"' in text) + hashlib.sha256(text.encode()).hexdigest()


def add_tensor(digest: Any, name: str, value: Tensor) -> None:
    """Adds name, dtype, shape and values of a tensor to a hash."""
    digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _describe(value: Any, seen: dict[int, tuple[int, Any]]) -> Any:
    """Returns JSON values; `seen` is id -> the objects that were described before, with their place."""
    if value is None or isinstance(value, bool | int | float | str):
        return value if isinstance(value, bool | None) else repr(value)
    if isinstance(value, Tensor):
        add_tensor(digest := hashlib.sha256(), "", value)
        return digest.hexdigest()
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return [str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, bytes | complex | torch.dtype | torch.device | np.generic):
        return repr(value)
    if id(value) in seen:
        return [seen[id(value)][0]]
    seen[id(value)] = len(seen), value  # kept, so that no other object gets its id
    if isinstance(value, dict):
        return [[_describe(part, seen) for part in item] for item in value.items()]
    if isinstance(value, list | tuple):
        return [type(value).__name__, *(_describe(part, seen) for part in value)]
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(_describe(part, seen)) for part in value)
    if isinstance(value, MethodType):
        return [_describe(value.__func__, seen), _describe(value.__self__, seen)]
    if isinstance(value, CodeType):
        return [value.co_code.hex(), value.co_names, [_describe(part, seen) for part in value.co_consts]]
    if isinstance(value, property | staticmethod | classmethod):
        return _describe(getattr(value, "__func__", None) or getattr(value, "fget", None), seen)
    if isinstance(value, FunctionType | BuiltinFunctionType | type):
        name = [value.__module__, value.__qualname__]
        if isinstance(value, BuiltinFunctionType) or _is_library(value):
            return name
        return name + (_describe_class(value, seen) if isinstance(value, type) else _describe_function(value, seen))
    if isinstance(value, nn.Module) or is_dataclass(value) or _is_denoiser(value):
        state = {name: part for name, part in vars(value).items() if name != "device"}
        return [_describe(type(value), seen), _describe(state, seen)]
    return UNKNOWN


def _describe_function(value: FunctionType, seen: dict[int, tuple[int, Any]]) -> list[Any]:
    cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
    try:
        closure = [cell.cell_contents for variable, cell in cells if variable != "__class__"]
    except ValueError:  # a variable without a value
        return [UNKNOWN]
    return [_describe(part, seen) for part in (value.__code__, closure, value.__defaults__, value.__kwdefaults__)]


def _describe_class(value: type, seen: dict[int, tuple[int, Any]]) -> list[Any]:
    parts = ((k, v) for k, v in vars(value).items() if k != "_abc_impl")
    own = {k: v for k, v in parts if not k.startswith("__") or isinstance(v, FunctionType)}
    return [_describe(own, seen), [_describe(base, seen) for base in value.__bases__]]


def _is_library(value: Any) -> bool:
    return (value.__module__ or "").partition(".")[0] in ("abc", "builtins", "ditlab", "torch", "typing")


def _is_denoiser(value: Any) -> bool:
    return any(base.__name__ == "Denoiser" and _is_library(base) for base in type(value).__mro__)
