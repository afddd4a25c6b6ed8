"""Results in a model's folder: found again by weights, images and settings, and saved without losing earlier ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditlab.errors import DitlabError
from ditlab.progress import SILENT, Reporter

if TYPE_CHECKING:
    from ditlab.analyses.base import Analysis
    from ditlab.provenance import Provenance

__all__ = ["find_current", "find_results", "same_config", "save_result"]

_NOT_COMPARED = ("batch_size", "chunk", "bands")
"""Settings that do not change what is measured beyond rounding."""
_SUFFIXES = (".json", ".npz", ".csv")


def same_config(first: Any, second: Any) -> bool:
    """Returns whether two settings measure the same."""
    mine, theirs = asdict(first), asdict(second)
    return all(mine[name] == theirs[name] for name in mine if name not in _NOT_COMPARED)


def find_results(analysis: Analysis[Any, Any], model: Any, reporter: Reporter = SILENT) -> list[Any]:
    """Returns the results in a model's folder that can be read: NAME.json, then the others, the newest first."""
    folder, kind, results = model.path / "analysis", analysis.result_class(), []
    others = sorted(folder.glob(f"{analysis.name}.????????.json"), key=lambda p: (-p.stat().st_mtime_ns, p.name))
    for path in (folder / f"{analysis.name}.json", *others):
        if not path.is_file():
            continue
        try:
            results.append(kind.load(path))
        except DitlabError as error:
            reporter.note(f"not used: {error}")
    return results


def find_current(
    analysis: Analysis[Any, Any], model: Any, about: Provenance, reporter: Reporter = SILENT
) -> Any | None:
    """Returns the last saved result of a model with these weights and images, whatever its settings; None without any.

    A function of a user's own has none, for nothing tells whether a result is still about it.
    """
    for result in find_results(analysis, model, reporter) if about.weights else ():
        first = result.about[0] if isinstance(result.about, tuple) else result.about
        if first.same_model(about):
            return result
    return None


def save_result(result: Any, folder: Path, name: str, *, aside: bool = False) -> Path:
    """Writes a result as NAME.json; one of other weights, images or settings that is there is kept as NAME.HASH.json.

    With `aside`, such a NAME.json stays where it is, and NAME.HASH.json is written instead.
    """
    path, key = folder / f"{name}.json", _key(result.to_json())
    if path.is_file() and (stored := _stored_key(path)) != key:
        if aside:
            return result.save(folder, f"{name}.{key}")
        for file in folder.glob(f"{name}.*"):
            if file.suffix in _SUFFIXES and file.stem == name:
                file.replace(file.with_name(f"{name}.{stored}{file.suffix}"))
    saved = result.save(folder, name)
    for suffix in _SUFFIXES:  # a result that was kept, and is the last one again, is there once
        (folder / f"{name}.{key}{suffix}").unlink(missing_ok=True)
    return saved


def _stored_key(path: Path) -> str:
    try:
        return _key(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return "damaged0"


def _key(record: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits of what a result was measured on and how."""
    about = record.get("about")
    parts = [
        {k: v for k, v in part.items() if k not in ("name", "label")} if isinstance(part, dict) else part
        for part in (about if isinstance(about, list) else [about])
    ]
    config = record.get("config", record.get("settings")) or {}
    compared = {name: value for name, value in config.items() if name not in _NOT_COMPARED}
    text = json.dumps([parts, compared], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
