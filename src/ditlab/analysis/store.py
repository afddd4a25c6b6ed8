"""How results lie on disk: `NAME.json`, with the arrays beside it in `NAME.npz` (DESIGN 3.4).

Files are written under a temporary name and renamed, so a result is either whole or absent. JSON is strict: no NaN, no
infinity, so that every reader can read it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

import numpy as np

from ditlab.errors import DitlabError


def _write(path: Path, fill: Callable[[BinaryIO], object]) -> Path:
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as file:
            fill(file)
        beside.replace(path)
    except OSError as error:
        raise DitlabError(f"{path}: could not be written ({error.strerror or error})") from error
    finally:
        with suppress(OSError):  # of the same cause as the one that is told
            beside.unlink(missing_ok=True)
    return path


def write_bytes(path: Path, content: bytes) -> Path:
    """Writes a file whole or not at all; a full disk or a forbidden folder raises DitlabError."""
    return _write(path, lambda file: file.write(content))


def write_text(path: Path, text: str) -> Path:
    """Writes a text file (UTF-8) whole or not at all; a full disk or a forbidden folder raises DitlabError."""
    return write_bytes(path, text.encode())


def write_json(path: Path, record: Mapping[str, Any]) -> Path:
    """Writes a strict JSON file (no NaN or infinity) whole or not at all."""
    return write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """Writes a compressed .npz file whole or not at all."""
    return _write(path, lambda file: np.savez_compressed(file, allow_pickle=False, **dict(arrays)))


def read_json(path: Path, kind: str, version: int) -> dict[str, Any]:
    """Reads a result's JSON and checks that it is of this kind and of a version that this ditlab knows.

    Raises:
        DitlabError: the file is absent, is not JSON, is another kind of result or comes from a newer version.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DitlabError(f"{path}: no result can be read there ({error.strerror or error})") from error
    except ValueError as error:
        raise DitlabError(f"{path}: expected a JSON result, found something else ({error})") from error
    found = record.get("kind") if isinstance(record, dict) else None
    if found != kind:
        raise DitlabError(f"{path}: expected a result of kind '{kind}', found {found!r}")
    if not isinstance(record.get("version"), int) or record["version"] > version:
        raise DitlabError(f"{path}: expected version {version} or older, found {record.get('version')!r}")
    return record


def read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Reads the named arrays of an .npz file; nothing pickled is accepted. Raises DitlabError where one is missing."""
    try:
        # Opened here, for np.load leaves a file open that turns out to be damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise DitlabError(f"{path}: expected the arrays {', '.join(names)} of a result ({error})") from error
