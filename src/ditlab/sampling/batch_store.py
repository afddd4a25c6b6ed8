"""Batches of samples that are finished, in memory or on disk.

On disk each finished batch is one file, whole or not there, in a hidden folder beside the output. The folder's name
ends in a hash of everything that decides the images: the same job resumes there after a kill, and other settings never
mix with it. Each file says which images it holds, so a job may also resume with another batch size. The hidden folder
becomes the output by one rename when nothing is missing from it.

    .NAME.unfinished-HASH/
      parts/00000012-4.npz    four images from the twelfth on: images uint8 [b, H, W, C], seconds, the batch size, and
                              the trajectory of images that the strip shows
      images/                 the PNGs of finished batches

At most one batch of images is in memory at any time: `samples.npz` is written batch by batch.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ditlab.errors import AlreadyExists, DitlabError
from ditlab.files import flush, lock_folder, sync_folder

__all__ = ["Batch", "BatchStore", "Batches", "MemoryBatches", "first_images", "write_npz"]


class Batch(NamedTuple):
    """Images of a job that are drawn at once."""

    start: int
    """Place of the first one among the images of the job."""
    size: int
    """Number of images."""


class MemoryBatches:
    """The finished batches of a job, in memory."""

    def __init__(self) -> None:
        self.arrays: dict[Batch, dict[str, np.ndarray]] = {}

    def done(self) -> list[Batch]:
        """Returns the finished batches in the order of their places; no two share an image."""
        return sorted(self.arrays)

    def array(self, batch: Batch, name: str) -> np.ndarray:
        """Returns an array of a finished batch."""
        return self.arrays[batch][name]


class BatchStore:
    """The finished batches of a job on disk, in a hidden folder that will become `out`.

    `key`: hash of everything that decides the images.
    """

    def __init__(self, out: Path, key: str) -> None:
        self.out = out
        self.folder = out.parent / f".{out.name}.unfinished-{key[:12]}"

    @contextmanager
    def locked(self, *, restart: bool = False) -> Iterator[None]:
        """Makes the folder and locks other jobs out of it; removes it at the end if it has no finished batch."""
        made = [folder for folder in (self.folder, *self.out.absolute().parents) if not folder.exists()]
        lock: int | None = None
        try:
            with self.writing():
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = lock_folder(self.folder)
                if lock is None and os.name != "nt":
                    raise AlreadyExists(f"samples {self.out}: another process is drawing them")
                if restart:
                    (self.folder / "samples.json").unlink(missing_ok=True)
                    for folder in (self.folder / "parts", self.folder / "images"):
                        if folder.exists():
                            shutil.rmtree(folder)
                (self.folder / "parts").mkdir(exist_ok=True)
                for leftover in (self.folder / "parts").glob("*.tmp"):
                    leftover.unlink()
            yield
        finally:
            if (lock is not None or self.folder in made) and not (self.done() or self.complete):
                shutil.rmtree(self.folder, ignore_errors=True)
            if lock is not None:
                os.close(lock)
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()  # succeeds where it is empty: nothing was written

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turns an error of the disk into a DitlabError that says how many batches are kept."""
        try:
            yield
        except OSError as error:
            count = len(self.done())
            outcome = f"{count} finished batches are kept; the same call resumes" if count else "nothing was kept"
            reason = error.strerror or str(error)
            raise DitlabError(f"samples {self.out}: could not be written ({reason}); {outcome}") from None

    @property
    def complete(self) -> bool:
        """Whether all files are written, and only `publish` is left to do."""
        return (self.folder / "samples.json").is_file()

    def path(self, batch: Batch) -> Path:
        """Returns the file of a batch."""
        return self.folder / "parts" / f"{batch.start:08d}-{batch.size}.npz"

    def done(self) -> list[Batch]:
        """Returns the finished batches in the order of their places; no two share an image."""
        return _batches(self.folder)

    def array(self, batch: Batch, name: str) -> np.ndarray:
        """Returns an array of a finished batch."""
        with np.load(self.path(batch)) as arrays:
            return arrays[name]

    def other_settings(self) -> dict[Path, int]:
        """Returns hidden folder -> number of images, for jobs with the same output and other settings."""
        counts = {folder: _count_images(folder) for folder in self._unfinished_folders() if folder != self.folder}
        return {folder: count for folder, count in sorted(counts.items()) if count}

    def _unfinished_folders(self) -> Iterator[Path]:
        return self.out.parent.glob(f".{escape(self.out.name)}.unfinished-*")

    def add(self, start: int, *, images: np.ndarray, **arrays: np.ndarray) -> None:
        """Writes a finished batch, whole or not at all, even if the power fails.

        `start`: place of its first image among those of the job; `images`: uint8 [b, H, W, C].
        """
        path = self.path(Batch(start, len(images)))
        temporary = path.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                np.savez(file, images=images, **arrays)  # pyright: ignore[reportArgumentType]
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)

    def publish(self) -> None:
        """Renames the hidden folder to the output, without the batches.

        Unfinished batches of other settings stay; hidden folders without an image are removed.
        """
        shutil.rmtree(self.folder / "parts", ignore_errors=True)
        flush(self.folder)
        if self.out.is_dir():
            self.out.rmdir()  # empty, which was checked before the first batch
        self.folder.rename(self.out)
        sync_folder(self.out.parent)
        for leftover in self._unfinished_folders():
            if (lock := lock_folder(leftover)) is not None:
                if not _count_images(leftover):
                    shutil.rmtree(leftover, ignore_errors=True)
                os.close(lock)


Batches = MemoryBatches | BatchStore


def first_images(batches: Batches, count: int) -> np.ndarray:
    """Returns the first images, uint8 [n, H, W, C], at most `count`."""
    arrays: list[np.ndarray] = []
    for batch in batches.done():
        arrays.append(batches.array(batch, "images")[:count])
        count -= len(arrays[-1])
        if count <= 0:
            break
    return np.concatenate(arrays)


def write_npz(path: Path, batches: Batches, count: int, classes: np.ndarray | None) -> None:
    """Writes the file that ADM's evaluator reads, byte by byte as `np.savez` would.

    It holds arr_0, the N images uint8 [N, H, W, C], and arr_1, their classes int64 [N].
    """
    shape = (count, *batches.array(batches.done()[0], "images").shape[1:])
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False}
            np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})
            for batch in batches.done():
                file.write(batches.array(batch, "images").tobytes())
        if classes is not None:
            with archive.open("arr_1.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, classes, allow_pickle=False)


def _batches(folder: Path) -> list[Batch]:
    """Returns the finished batches in a hidden folder, by their names."""
    names = [path.stem.split("-") for path in (folder / "parts").glob("[0-9]*-[0-9]*.npz")]
    return sorted(Batch(int(start), int(size)) for start, size in names)


def _count_images(folder: Path) -> int:
    """Returns the number of finished images in a hidden folder, also in one that is complete but for its name."""
    count = sum(batch.size for batch in _batches(folder))
    if count:
        return count
    try:
        return int(json.loads((folder / "samples.json").read_text())["count"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
