"""The manifest of an image set: what is in the folder, where it came from, and the hashes that identify it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ditlab.data.duplicates import NearDuplicates
from ditlab.data.latents import LatentRecord
from ditlab.data.sources.base import SkippedItem, describe_skipped
from ditlab.errors import DitlabError

FORMAT, VERSION, LATENT_VERSION = "ditlab-image-set", 1, 2
MANIFEST, SOURCE_NAMES = "manifest.json", "sources.json"

__all__ = [
    "FORMAT",
    "LATENT_VERSION",
    "MANIFEST",
    "SOURCE_NAMES",
    "VERSION",
    "FileRecord",
    "Manifest",
    "content_hash",
    "hash_file",
    "hash_files",
    "read_manifest",
    "write_names",
]


@dataclass(frozen=True)
class FileRecord:
    """One file of the set: its size in bytes and the SHA-256 of its content."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything known about an image set besides its pixels.

    Attributes:
        source: what it was made from, e.g. `photos` or `folder:PATH`.
        size: height and width of the pictures, in pixels.
        color: "rgb" or "grey".
        options: the other settings it was made with.
        shape: (N, C, H, W) of `images.npy`, or (N, c, h, w) of `latents.npy`.
        class_names: names of the classes; empty without labels.
        label_counts: images of each class.
        pools: images that may only be trained on ("train"), only be tested on ("test"), or either ("free").
        exact_duplicates: images dropped because an earlier one has the same pixels.
        near_duplicates: the result of the search for near-duplicates; None if it was switched off.
        skipped_count: files or images of the source that could not be used.
        skipped: examples of them, with reasons: up to a hundred of each kind.
        notes: what a reader of results should know, as sentences.
        origin: the source's own record, e.g. the hashes of the photographs.
        files: the set's files by name.
        hash: identifies the content: pixels (or latents, their autoencoder and scale), labels, class names and pools;
            not paths, names of files or settings.
        latents: the autoencoder and how it was used; None for a set of pixels, whose manifest has no such field.
        version: 1 for a set of pixels, 2 for one of latents.
        skipped_kinds: how many could not be used, by kind (`SkippedItem.kind`); empty in older manifests.
        duplicate_names: (dropped image, earlier image that stays), the first thousand of `exact_duplicates`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    source: str
    size: int
    color: str
    options: dict[str, Any]
    shape: tuple[int, int, int, int]
    class_names: tuple[str, ...]
    label_counts: tuple[int, ...]
    pools: dict[str, int]
    exact_duplicates: int
    near_duplicates: NearDuplicates | None
    skipped_count: int
    skipped: tuple[SkippedItem, ...]
    notes: tuple[str, ...]
    origin: dict[str, Any]
    files: dict[str, FileRecord]
    hash: str
    made_by: str = ""
    format: str = field(default=FORMAT)
    version: int = field(default=VERSION)
    latents: LatentRecord | None = None
    skipped_kinds: dict[str, int] = field(default_factory=dict)
    duplicate_names: tuple[tuple[str, str], ...] = ()

    def skipped_summary(self) -> str:
        """Returns a sentence such as "skipped 5 files: 3 .txt, 2 smaller than 32x32 pixels: a.png, b.png"; or ""."""
        if not self.skipped_count:
            return ""
        items = "files" if self.source.startswith("folder:") else "images"
        described = describe_skipped(self.skipped_kinds, self.skipped)
        return f"skipped {self.skipped_count:,} {items}" + (f": {described}" if described else "")

    def write(self, folder: Path) -> None:
        """Writes `manifest.json` into a folder."""
        absent = {"latents"} if self.latents is None else set()
        (folder / MANIFEST).write_bytes(_ADAPTER.dump_json(self, indent=1, exclude=absent) + b"\n")


_ADAPTER = TypeAdapter(Manifest)


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks a folder's manifest."""
    path = folder / MANIFEST
    if not folder.exists():
        raise DitlabError(f"image set: expected a folder at {folder}, found nothing")
    if not path.is_file():
        raise DitlabError(f"image set: expected {path}, found no such file (make a set with `ditlab data prepare`)")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DitlabError(f"{path}: expected JSON, found a damaged file ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DitlabError(f"{path}: expected the manifest of an image set (format '{FORMAT}'), found something else")
    expected = VERSION if content.get("latents") is None else LATENT_VERSION
    if content.get("version") != expected:
        raise DitlabError(f"{path}: expected version {expected} of the format, found {content.get('version')!r}")
    try:
        manifest = _ADAPTER.validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DitlabError(f"{path}: field '{where}': {first['msg'].lower()}") from None
    expected = content_hash(manifest.files, manifest.class_names, manifest.latents)
    if manifest.hash != expected:
        raise DitlabError(f"{path}: expected the hash {expected[:12]} of its files, found {manifest.hash[:12]}")
    return manifest


def content_hash(
    files: dict[str, FileRecord], class_names: tuple[str, ...], latents: LatentRecord | None = None
) -> str:
    """Returns the hash that identifies an image set, from its files' hashes and its classes: 64 hexadecimal digits.

    The names of the source files do not count. For latents the hash also covers their autoencoder's weights and scale,
    since equal numbers may mean other latents.
    """
    lines = [f"{FORMAT} {VERSION}"]
    if latents is not None:
        codec = latents.codec
        lines = [f"{FORMAT} {LATENT_VERSION}", f"{codec.kind} {codec.sha256} {codec.scale!r} {codec.shift!r}"]
    identifying = sorted(files.keys() - {SOURCE_NAMES})
    lines += [*(f"{name} {files[name].sha256}" for name in identifying), *class_names]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def hash_file(path: Path) -> FileRecord:
    """Returns size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path.stat().st_size, digest)


def hash_files(folder: Path, names: Sequence[str]) -> dict[str, FileRecord]:
    """Returns size and SHA-256 of those of a folder's files that are there."""
    return {name: hash_file(folder / name) for name in names if (folder / name).exists()}


def write_names(folder: Path, names: Sequence[str]) -> None:
    """Writes `sources.json`: the source of every image, one a line."""
    (folder / SOURCE_NAMES).write_text("[" + ",\n".join(json.dumps(name) for name in names) + "]\n")
