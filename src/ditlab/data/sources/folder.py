"""A folder of image files as a source."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ditlab.data.sources.base import TEST, TRAIN, CropRule, Item, SkippedItem, Source, count_kinds, describe_skipped
from ditlab.errors import DitlabError

__all__ = ["IMAGE_SUFFIXES", "Folder", "listing_hash"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".tif", ".tiff", ".bmp", ".gif")
"""Endings of the files that are read; of a file with several frames the first one."""

_OTHER_FORMATS = (
    *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".raw", ".rw2"),
    *(".avif", ".dds", ".exr", ".hdr", ".heic", ".heif", ".ico", ".j2k", ".jp2", ".jpe", ".jxl"),
    *(".eps", ".mp4", ".pbm", ".pdf", ".pgm", ".pnm", ".ppm", ".psd", ".svg", ".tga", ".xcf"),
)
"""Endings of files that may hold pictures and are not read."""


class Folder(Source):
    """Every image file below a folder, in the order of their names; hidden files and folders are ignored.

    The class of an image is the subfolder that holds it (the first below the root). If the root itself holds images,
    there are no classes. A root with exactly the folders `train` and `test` fixes the pools, and the classes are the
    folders below those.
    """

    def __init__(self, rule: CropRule, where: str) -> None:
        self.rule = rule
        self.root = Path(where).expanduser()
        if not self.root.is_dir():
            found = "a file" if self.root.exists() else "nothing"
            raise DitlabError(f"folder source: expected a folder at {self.root}, found {found}")
        self.sizes, self.left_out = _list_files(self.root)
        self.files = list(self.sizes)
        if not self.files:
            others = describe_skipped(count_kinds(self.left_out), self.left_out) or "no files"
            raise DitlabError(
                f"folder source: expected images ({', '.join(IMAGE_SUFFIXES)}) below {self.root}, found {others}"
            )
        self.count = len(self.files)
        self.pooled = {file.parts[0] for file in self.files} == {"train", "test"}
        below = [file.parts[1:] if self.pooled else file.parts for file in self.files]
        if all(len(parts) > 1 for parts in below):
            self.class_names = tuple(sorted({parts[0] for parts in below}))
        self.classes = [parts[0] for parts in below]

    def __iter__(self) -> Iterator[Item | SkippedItem]:
        index_of = {name: index for index, name in enumerate(self.class_names)}
        for file, class_name in zip(self.files, self.classes, strict=True):
            pool = None if not self.pooled else TRAIN if file.parts[0] == "train" else TEST
            yield self.read(self.root / file, _name(file), index_of.get(class_name), pool)

    def origin(self) -> dict[str, Any]:
        """Returns a hash of the files' names and sizes."""
        return {"files": len(self.files), "listing": listing_hash(self.sizes.items())}


def listing_hash(sizes: Iterable[tuple[Path, int]]) -> str:
    """Returns the SHA-256 of names and sizes in bytes of files."""
    lines = "\n".join(f"{file.as_posix()} {size}" for file, size in sizes)
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()


def _list_files(root: Path) -> tuple[dict[Path, int], tuple[SkippedItem, ...]]:
    """Returns the image files below a folder by name, with their sizes in bytes, and the other files."""
    sizes: dict[Path, int] = {}
    left_out: list[SkippedItem] = []

    def refuse(error: OSError) -> None:
        place = Path(error.filename or root)
        reason = f"cannot be read ({error.strerror or error})"
        if place == root:
            raise DitlabError(f"folder source: {root} {reason}")
        left_out.append(SkippedItem(_name(place.relative_to(root)), f"folder {reason}", "unreadable folders"))

    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in (Path(folder, name) for name in sorted(names) if not name.startswith(".")):
            relative, suffix = file.relative_to(root), file.suffix.lower()
            if suffix not in IMAGE_SUFFIXES:
                left_out.append(_other_file(_name(relative), suffix))
                continue
            try:
                sizes[relative] = file.stat().st_size
            except OSError as error:
                reason = f"unreadable image: {error.strerror or error}"
                left_out.append(SkippedItem(_name(relative), reason, "unreadable"))
    return dict(sorted(sizes.items())), tuple(left_out)


def _other_file(name: str, suffix: str) -> SkippedItem:
    if suffix in _OTHER_FORMATS:
        return SkippedItem(name, "not a readable format", f"{suffix} (not a readable format)")
    return SkippedItem(name, "not an image file", suffix or "files without an ending")


def _name(file: Path) -> str:
    # A name that is not UTF-8 cannot stand in JSON.
    return os.fsencode(file.as_posix()).decode(errors="replace")
