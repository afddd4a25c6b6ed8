"""Files and folders that exist whole or not at all.

A folder is written beside its place, flushed to disk, then renamed. A process that dies leaves only a hidden folder
named `.NAME.partial-*`, which nothing reads and the next writer of the same NAME removes. A lock on that folder,
released by the system when its process ends, tells a dead writer from a living one.

A result is `NAME.json`, with its arrays beside it in `NAME.npz` (DESIGN 3.6). Each file is written under a temporary
name and renamed. JSON is strict (no NaN, no infinity), so that every reader can read it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from zipfile import BadZipFile

from ditlab.errors import Damaged, DitlabError, Incompatible, NotFound

if TYPE_CHECKING:
    import numpy as np


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a new empty folder that becomes `target` when the block ends without an exception.

    Files written into it are flushed to disk before the rename. On an exception (or Ctrl-C) the folder is removed, and
    so are parents of `target` that were made for it.

    Args:
        target: where the folder is to appear; its parents are made. An empty folder there is no hindrance.
        replace: replace an existing `target`, by two renames: the old one steps aside and is then deleted.

    Raises:
        FileExistsError: `target` exists, or another process made it meanwhile, and `replace` is off.
        OSError: the disk is full or the place is not writable; nothing is left behind.
    """
    made = _make_parents(target)
    temporary: Path | None = None
    lock: int | None = None
    try:
        _remove_dead(target)
        temporary, lock = _make_temporary(target)
        yield temporary
        flush(temporary)
        _appear(temporary, target, replace)
        sync_folder(target.parent)
    except BaseException:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            # A parent that somebody else has begun to use meanwhile stays.
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise
    finally:
        if lock is not None:
            os.close(lock)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Makes a file that is there whole or not at all.

    Args:
        path: the file; one that is there is replaced.
        write: writes it at the place that it is given, and flushes it where that matters.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def flush(folder: Path) -> None:
    """Forces every file below `folder`, and the folders themselves, to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Forces a folder's list of names to disk; where the system cannot open folders (Windows), does nothing."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_parents(target: Path) -> list[Path]:
    missing = [folder for folder in target.absolute().parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _make_temporary(target: Path) -> tuple[Path, int | None]:
    # Another writer's cleaning may take the new folder for a dead one before it is locked: then another is made.
    for _ in range(10):
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        lock = lock_folder(temporary)
        if temporary.exists():
            return temporary, lock
        if lock is not None:
            os.close(lock)
    raise OSError(f"{target.parent}: a temporary folder does not stay")


def _appear(temporary: Path, target: Path, replace: bool) -> None:
    # mkdtemp makes folders for its owner alone; the finished one follows the umask like any other.
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod(0o777 & ~mask)
    if not (replace and target.exists()):
        try:
            temporary.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
            raise
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    target.rename(aside / "replaced")
    temporary.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def lock_folder(folder: Path) -> int | None:
    """A lock on a folder, as a file handle to close; the system releases it when the process ends.

    None where another process has it, where there is no such folder, or where the system has no such locks (Windows).
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such locks: leftovers then stay until somebody removes them.
        return None
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove_dead(target: Path) -> None:
    for leftover in target.parent.glob(f".{target.name}.partial-*"):
        if leftover.is_dir() and (handle := lock_folder(leftover)) is not None:
            shutil.rmtree(leftover, ignore_errors=True)
            os.close(handle)


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
    import numpy as np

    return _write(path, lambda file: np.savez_compressed(file, allow_pickle=False, **dict(arrays)))


def read_json(path: Path, kind: str, version: int) -> dict[str, Any]:
    """Reads a result's JSON and checks that it is of this kind and of a version that this ditlab knows.

    Raises:
        DitlabError: the file is absent, is not JSON, is another kind of result or comes from a newer version.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFound(f"{path}: no result can be read there ({error.strerror or error})") from error
    except ValueError as error:
        raise Damaged(f"{path}: expected a JSON result, found something else ({error})") from error
    found_kind = record.get("kind") if isinstance(record, dict) else None
    if found_kind != kind:
        raise Incompatible(f"{path}: expected a result of kind '{kind}', found {found_kind!r}")
    if not isinstance(record.get("version"), int) or record["version"] > version:
        raise Incompatible(f"{path}: expected version {version} or older, found {record.get('version')!r}")
    return record


def read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Reads the named arrays of an .npz file; nothing pickled is accepted. Raises DitlabError where one is missing."""
    import numpy as np

    try:
        # Opened here, for np.load leaves a file open that turns out to be damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names or arrays.files}  # all if none is named
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        named = f" {', '.join(names)}" if names else ""
        raise Damaged(f"{path}: expected the arrays{named} of a result ({error})") from error
