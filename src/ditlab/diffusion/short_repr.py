"""Short reprs: a config shows the settings that differ from its defaults, a tensor or an array its dtype and shape."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from typing import Any

__all__ = ["ShortRepr", "short_repr"]


def short_repr(self: Any) -> str:
    """Returns the class and the fields of a dataclass or a named tuple, without those that have their default."""
    if is_dataclass(self):
        shown, defaults = (
            {f.name: getattr(self, f.name) for f in fields(self)},
            {f.name: f.default for f in fields(self)},
        )
    else:
        shown, defaults = self._asdict(), {}
    parts = [
        f"{name}={_short(value)}"
        for name, value in shown.items()
        if _is_array(value) or value != defaults.get(name, MISSING)
    ]
    return f"{type(self).__name__}({', '.join(parts)})"


class ShortRepr:
    """Base of dataclasses with a short repr; they are made with `repr=False`."""

    __repr__ = short_repr


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape")  # a tensor or an array; neither library is imported here


def _short(value: Any) -> str:
    if _is_array(value):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if hasattr(value, "named_parameters"):  # a network
        return type(value).__name__
    if isinstance(value, list | tuple) and len(value) > 6:
        return f"[{value[0]!r}, ..., {value[-1]!r}] of {len(value)}"
    return repr(value)
