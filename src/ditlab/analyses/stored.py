"""Settings in result files, whose names stay when a setting is renamed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeVar

__all__ = ["config_from_json", "stored_config"]

STORED = {"sigmas": "levels", "timesteps": "steps", "baselines": "references"}
"""Setting -> its name in files."""

ConfigT = TypeVar("ConfigT")


def stored_config(config: Any) -> dict[str, Any]:
    """Returns the settings as JSON values, under their names in files."""
    return {STORED.get(name, name): _list(value) for name, value in asdict(config).items()}


def config_from_json(kind: type[ConfigT], record: Mapping[str, Any]) -> ConfigT:
    """Returns settings from what `stored_config` gave.

    Raises:
        TypeError: a setting is unknown.
    """
    fields: Mapping[str, Any] = kind.__dataclass_fields__  # pyright: ignore[reportAttributeAccessIssue]
    named = {stored: name for name, stored in STORED.items() if name in fields}
    return kind(**{named.get(name, name): _tuple(value) for name, value in record.items()})


def _list(value: Any) -> Any:
    return [_list(item) for item in value] if isinstance(value, tuple | list) else value


def _tuple(value: Any) -> Any:
    return tuple(_tuple(item) for item in value) if isinstance(value, list) else value
