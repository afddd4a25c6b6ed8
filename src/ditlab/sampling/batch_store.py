"""Samples on disk while they are drawn, and when all of them are.

A job is cut into batches. Each finished batch is one file, whole or not there, in a hidden folder beside the output
whose name ends in a hash of everything that decides the images: so the same command goes on where it was killed, and
other settings never mix. Batches say which images they hold, so that a command of another batch size goes on too. The
hidden folder becomes the output by one rename, when nothing is missing from it.

    .NAME.unfinished-HASH/
      parts/00000012-4.npz    four images from the twelfth on: images uint8 [b, H, W, C], seconds, the batch size asked
                              for, and what `--strip` shows of them
      images/                 the PNGs of finished batches

No more than a batch of images is in memory at any time: `samples.npz` is written part by part.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

import numpy as np

from ditlab.errors import DitlabError
from ditlab.files import flush, lock_folder, sync_folder

Part = tuple[int, int]
"""A batch: the place of its first image among those of the job, and how many it holds."""


class Parts:
    """The finished batches of one job, in its hidden folder."""

    def __init__(self, out: Path, key: str) -> None:
        self.out = out
        self.folder = out.parent / f".{out.name}.unfinished-{key[:12]}"

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Makes the folder and keeps other jobs out of it; without a finished batch it goes again at the end.

        Raises:
            DitlabError: another process works in it, or it cannot be made.
        """
        made = [folder for folder in (self.folder, *self.out.absolute().parents) if not folder.exists()]
        lock: int | None = None
        try:
            with writing(self):
                (self.folder / "parts").mkdir(parents=True, exist_ok=True)
                lock = lock_folder(self.folder)
                if lock is None and os.name != "nt":
                    raise DitlabError(f"sample {self.out}: another process is drawing these samples")
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
                    folder.rmdir()  # where nothing came of it

    @property
    def complete(self) -> bool:
        """Whether nothing but `publish` is left to be done."""
        return (self.folder / "samples.json").is_file()

    def file(self, part: Part) -> Path:
        """Where a batch lies when it is finished."""
        return self.folder / "parts" / f"{part[0]:08d}-{part[1]}.npz"

    def done(self) -> list[Part]:
        """The finished batches in the order of their places; no two have an image in common."""
        return _batches(self.folder)

    def others(self) -> dict[Path, int]:
        """Hidden folders of the same output and other settings -> how many images they hold, at least one."""
        found = {folder: _images(folder) for folder in self._beside() if folder != self.folder}
        return {folder: count for folder, count in sorted(found.items()) if count}

    def _beside(self) -> Iterator[Path]:
        return self.out.parent.glob(f".{escape(self.out.name)}.unfinished-*")

    def keep(self, place: int, *, images: np.ndarray, **arrays: np.ndarray) -> None:
        """Writes a finished batch, whole or not at all, also when the power fails.

        Args:
            place: of its first image among those of the job.
            images: uint8 [b, H, W, C].
            arrays: what else belongs to it.
        """
        path = self.file((place, len(images)))
        beside = path.with_suffix(".tmp")
        try:
            with beside.open("wb") as file:
                np.savez(file, images=images, **arrays)  # pyright: ignore[reportArgumentType]
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except OSError:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)

    def array(self, part: Part, name: str) -> np.ndarray:
        """One array of a finished batch."""
        with np.load(self.file(part)) as arrays:
            return arrays[name]

    def first(self, count: int) -> np.ndarray:
        """The first images, uint8 [n, H, W, C], at most `count`."""
        found: list[np.ndarray] = []
        for part in self.done():
            found.append(self.array(part, "images"))
            count -= len(found[-1])
            if count <= 0:
                found[-1] = found[-1][: len(found[-1]) + count]
                break
        return np.concatenate(found)

    def write_npz(self, path: Path, count: int, labels: np.ndarray | None) -> None:
        """The file of ADM's evaluator: arr_0 uint8 [N, H, W, C], and arr_1 the labels; as `np.savez` would write it.

        Args:
            path: of the file.
            count: number of images N.
            labels: class of each image, int64 [N].
        """
        shape = (count, *self.array(self.done()[0], "images").shape[1:])
        with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False}
                np.lib.format.write_array_header_1_0(file, {**header, "shape": shape})
                for part in self.done():
                    file.write(self.array(part, "images").tobytes())
            if labels is not None:
                with archive.open("arr_1.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, labels, allow_pickle=False)

    def publish(self) -> None:
        """The hidden folder becomes the output, without the parts.

        What other settings left unfinished stays, for it is work; folders that hold no image go.
        """
        shutil.rmtree(self.folder / "parts", ignore_errors=True)
        flush(self.folder)
        if self.out.is_dir():
            self.out.rmdir()  # an empty one, or this would not have begun
        self.folder.rename(self.out)
        sync_folder(self.out.parent)
        for leftover in self._beside():
            if (lock := lock_folder(leftover)) is not None:
                if not _images(leftover):
                    shutil.rmtree(leftover, ignore_errors=True)
                os.close(lock)


def _batches(folder: Path) -> list[Part]:
    """The finished batches in a hidden folder, by their names."""
    names = [path.stem.split("-") for path in (folder / "parts").glob("[0-9]*-[0-9]*.npz")]
    return sorted((int(place), int(count)) for place, count in names)


def _images(folder: Path) -> int:
    """How many finished images a hidden folder holds; those of one that lacks only its name too."""
    count = sum(count for _, count in _batches(folder))
    if count:
        return count
    try:
        return int(json.loads((folder / "samples.json").read_text())["count"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


@contextmanager
def writing(parts: Parts) -> Iterator[None]:
    """Turns what a disk refuses into a sentence that says what was kept."""
    try:
        yield
    except OSError as error:
        kept = len(parts.done())
        what = f"{kept} finished batches are kept, the same command goes on" if kept else "nothing was kept"
        reason = error.strerror or str(error)
        raise DitlabError(f"sample {parts.out}: could not be written ({reason}); {what}") from None


def write_pngs(folder: Path, images: np.ndarray, seeds: Sequence[int]) -> None:
    """One PNG a seed, flushed to disk; images uint8 [b, H, W, C]."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for seed, image in zip(seeds, images, strict=True):
        with (folder / f"{seed:06d}.png").open("wb") as file:
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "png")
            file.flush()
            os.fsync(file.fileno())
