"""Results and settings in files: NAME.json, and the arrays of a result beside it in NAME.npz."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ditlab.errors import Damaged, DitlabError
from ditlab.files import read_arrays, read_json, write_arrays, write_json

if TYPE_CHECKING:
    import numpy as np

__all__ = ["StoredResult", "config_from_json", "stored_config", "tuples"]

STORED = {"sigmas": "levels", "timesteps": "steps", "baselines": "references"}
"""Setting -> its name in files, which stays when a setting is renamed."""

ConfigT = TypeVar("ConfigT")


class StoredResult:
    """The numbers of one model; a subclass is a frozen dataclass that says what its values and arrays are."""

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    file: ClassVar[str]
    """NAME, if none is given."""
    needs_arrays: ClassVar[bool] = False
    """Whether NAME.json cannot be read alone."""
    about: Any
    """What was measured, a `Provenance`; a tuple of several, the first of which keeps the result."""
    config: Any
    """The settings, a dataclass."""

    @property
    def outdated(self) -> bool:
        """Whether a measure has had another definition since: such a result is shown, and never taken for a new one."""
        return False

    def numbers(self) -> dict[str, Any]:
        """Returns what was measured, as JSON values."""
        raise NotImplementedError

    def arrays(self) -> Mapping[str, np.ndarray]:
        """Returns the arrays by name; none if only the JSON was there."""
        return {}

    @classmethod
    def read(cls, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Any:
        """Returns the result of this JSON and these arrays; any error of a missing or unknown field may be raised."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Returns everything but the arrays, as JSON values."""
        head = {"kind": self.kind, "version": self.version, "about": asdict(self.about)}
        return {**head, "config": stored_config(self.config), **self.numbers()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> Any:
        """Returns the result of what `to_json` and `arrays` gave.

        Raises:
            Damaged: a field is missing or unknown.
        """
        with _damaged_where(f"{cls.file} result"):
            return cls.read(record, arrays or {})

    def save(self, folder: Path | str, name: str = "") -> Path:
        """Writes NAME.npz, if there are arrays, and then NAME.json; returns the JSON's path."""
        path = Path(folder) / f"{name or self.file}.json"
        if arrays := self.arrays():
            write_arrays(path.with_suffix(".npz"), arrays)
        return write_json(path, self.to_json())

    @classmethod
    def load(cls, path: Path | str) -> Any:
        """Reads what `save` wrote, from the JSON's path.

        Raises:
            DitlabError: a file is absent or damaged, or is another kind of result.
        """
        path = Path(path)
        record, beside = read_json(path, cls.kind, cls.version), path.with_suffix(".npz")
        arrays = read_arrays(beside, ()) if cls.needs_arrays or beside.exists() else {}
        with _damaged_where(str(path)):
            return cls.read(record, arrays)


@contextmanager
def _damaged_where(where: str) -> Iterator[None]:
    try:
        yield
    except DitlabError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise Damaged(f"{where}: a field is missing or unknown ({error})") from error


def stored_config(config: Any) -> dict[str, Any]:
    """Returns the settings as JSON values, under their names in files."""
    return {STORED.get(name, name): _lists(value) for name, value in asdict(config).items()}


def config_from_json(kind: type[ConfigT], record: Mapping[str, Any]) -> ConfigT:
    """Returns settings from what `stored_config` gave; raises TypeError for an unknown one."""
    fields: Mapping[str, Any] = kind.__dataclass_fields__  # pyright: ignore[reportAttributeAccessIssue]
    named = {stored: name for name, stored in STORED.items() if name in fields}
    return kind(**{named.get(name, name): tuples(value) for name, value in record.items()})


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple | list) else value


def tuples(value: Any) -> Any:
    """Returns a JSON value with tuples in place of lists."""
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value
