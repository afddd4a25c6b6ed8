"""What callers pass, checked against annotations: a value of a wrong type is one sentence, not a traceback."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ditlab.errors import InvalidConfig

__all__ = ["check_fields", "check_type", "checks_arguments", "plain"]

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text",
    Path: "a path",
    NoneType: "None",
}


def plain(value: Any) -> Any:
    """Returns a value with arrays, lists and ranges as tuples, and numbers of numpy as those of Python."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    return tuple(plain(item) for item in value) if isinstance(value, list | range | tuple) else value


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raises InvalidConfig where a parameter's value is not of the type that its annotation names."""
    if not _fits(plain(value), hint):
        text = " ".join(repr(value).split())
        raise InvalidConfig(f"`{name}`: expected {_described(hint)}, found {text:.80}")


def check_fields(kind: type[Any], values: Mapping[str, Any]) -> None:
    """Raises InvalidConfig where a value is not of the type of the dataclass's field that has its name."""
    hints = get_type_hints(kind)
    for name, value in values.items():
        check_type(name, value, hints[name])


def checks_arguments(elsewhere: Mapping[str, str]) -> Callable[[FunctionT], FunctionT]:
    """Returns a decorator by which a function checks the types of its arguments first.

    `elsewhere`: name in the annotations that the function's module does not import -> its module.
    """

    class Names(dict[str, Any]):
        def __missing__(self, name: str) -> Any:
            return getattr(import_module(elsewhere[name]), name)

    def decorator(function: FunctionT) -> FunctionT:
        signature, scope = inspect.signature(function), vars(sys.modules[function.__module__])
        checked = {p.name: p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD and p.name != "self"}

        @wraps(function)
        def checking(*args: Any, **keywords: Any) -> Any:
            for name, value in signature.bind(*args, **keywords).arguments.items():
                if name in checked and value is not checked[name].default:
                    check_type(name, value, eval(checked[name].annotation, scope, Names()))
            return function(*args, **keywords)

        return checking  # pyright: ignore[reportReturnType]

    return decorator


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type; items of iterators are not looked at."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or getattr(hint, "_is_protocol", False):
        return True
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in args)
    if origin is Annotated:
        return _fits(value, args[0])
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in args)
    if origin is Sequence or (origin is tuple and args[-1] is ...):
        if isinstance(value, Iterator):
            return origin is Sequence
        several = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
        return several and all(_fits(item, args[0]) for item in value)
    if origin is tuple:
        return isinstance(value, tuple) and len(value) == len(args) and all(map(_fits, value, args))
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    if hint is Path:
        return isinstance(value, str | Path)
    return isinstance(value, NoneType if hint is None else origin or hint)


def _described(hint: Any) -> str:
    """What a type is, in words."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        words = list(dict.fromkeys(_described(part) for part in args))
        return f"{', '.join(words[:-1])} or {words[-1]}"
    if origin is Annotated:
        return _described(args[0])
    if origin is Literal:
        return f"{'one of ' if len(args) > 1 else ''}{', '.join(map(repr, args))}"
    if origin is tuple and args[-1] is not ...:
        return f"{len(args)} values, each {_described(args[0])}"
    if origin in (Sequence, tuple):
        return f"a sequence of values, each {_described(args[0])}"
    if hint in _WORDS:
        return _WORDS[hint]
    name = {Mapping: "mapping", Callable: "function"}.get(origin, getattr(hint, "__name__", str(hint)))
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"
