"""Image sets: N uint8 images of one size in one memory-mapped file, with labels, pools and a manifest.

On disk a set is a folder of plain NumPy files that any program can read:

    images.npy     uint8 [N, C, H, W]      or the latents of such images: see `ditlab.data.latents`
    labels.npy     int64 [N]             where the source has classes
    pool.npy       uint8 [N]             where the source fixes train (0) and test (1)
    manifest.json                        see `ditlab.data.manifest`
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

import ditlab
from ditlab.data.augment import flip
from ditlab.data.duplicates import NearDuplicates, find_near_duplicates
from ditlab.data.latents import Latents
from ditlab.data.manifest import Manifest, content_hash, hash_file, read_manifest
from ditlab.data.pixels import Color, channels, to_float
from ditlab.data.sources.base import TEST, TRAIN, Skipped, Source
from ditlab.data.sources.files import read_source
from ditlab.errors import DitlabError
from ditlab.files import atomic_folder

IMAGES, LABELS, POOL = "images.npy", "labels.npy", "pool.npy"

Progress = Callable[[str, int, int], None]
"""Called with (stage, images done, images in all); stages are "images" and "near-duplicates"."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """An opened image set.

    Attributes:
        path: its folder.
        manifest: what is known about it.
        array: uint8 [N, C, H, W], backed by the memory-mapped file: only what is touched is read. For a set of latents
            the stored means, float16 [N, c, h, w].
        labels: int64 [N], or None.
        pool: uint8 [N]: 0 may only be trained on, 1 may only be tested on; None where every image may be either.
        latents: every stored array of a set of latents; None for a set of pixels.
    """

    path: Path
    manifest: Manifest
    array: np.ndarray
    labels: np.ndarray | None
    pool: np.ndarray | None
    latents: Latents | None = None

    @staticmethod
    def open(path: str | Path) -> ImageSet:
        """Opens a set, checking its version and the sizes and shapes of its files (not their hashes: see `verify`).

        Raises:
            DitlabError: there is no set, or its files are not those of its manifest.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        count = manifest.shape[0]

        def large(name: str, dtype: str) -> np.ndarray:
            array = _read(folder, manifest, name, dtype, manifest.shape)
            if array is None:
                raise DitlabError(f"{folder}: expected its manifest to list {name}, found {', '.join(manifest.files)}")
            return array

        latents = None
        if manifest.latents is not None:
            latents = Latents.open(manifest.latents, lambda name: large(name, "float16"))
        array = large(IMAGES, "uint8") if latents is None else latents.mean
        labels = _read(folder, manifest, LABELS, "int64", (count,))
        pool = _read(folder, manifest, POOL, "uint8", (count,))
        return ImageSet(folder, manifest, array, labels, pool, latents)

    def __len__(self) -> int:
        return len(self.array)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process opens the file again instead of receiving a copy of the pixels.
        return ImageSet.open, (self.path,)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image as a denoiser sees it."""
        return self.manifest.shape[1:]

    @property
    def sampled(self) -> bool:
        """Whether moments of latents are stored, so that each use of an image is a new draw (`batch` with noise)."""
        return self.latents is not None and self.latents.std is not None

    @property
    def hash(self) -> str:
        """Identifies the content (`Manifest.hash`)."""
        return self.manifest.hash

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; empty without labels."""
        return self.manifest.class_names

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.manifest.class_names)

    def take(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """What is stored of the images at `indices`: uint8 [B, C, H, W], or float16 means of unscaled latents."""
        return np.take(self.array, indices, axis=0)

    def batch(
        self,
        indices: Sequence[int] | np.ndarray,
        noise: Float[Tensor, "b c h w"] | None = None,
        mirrored: Bool[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """The images at `indices` as a denoiser sees them, float32: pixels in [-1, 1], or scaled latents.

        Args:
            indices: which.
            noise: unit-normal, where `sampled`: the latents are mean + std * noise; their mean where None.
            mirrored: which of them are mirrored left to right; none where None.

        Raises:
            DitlabError: noise or mirrored latents are asked of a set that has none.
        """
        if self.latents is not None:
            return self.latents.batch(indices, noise, mirrored)
        if noise is not None:
            raise DitlabError(f"{self.path}: expected latents to sample, found pixels")
        images = to_float(torch.from_numpy(self.take(indices)))
        return images if mirrored is None else flip(images, mirrored)

    def batch_labels(self, indices: Sequence[int] | np.ndarray) -> Int64[Tensor, " b"] | None:
        """The labels at `indices`, or None for a set without labels."""
        return None if self.labels is None else torch.from_numpy(np.take(self.labels, indices))

    def pictures(self) -> ImageSet | None:
        """The set of pixels that these latents were made of, where it still lies where it lay; itself, if of pixels."""
        if self.latents is None:
            return self
        try:
            found = ImageSet.open(self.path / self.latents.record.path)
        except DitlabError:
            return None
        return found if found.hash == self.latents.record.pictures else None

    def verify(self) -> None:
        """Reads every file again and compares its SHA-256 with the manifest.

        Raises:
            DitlabError: a file's content has changed since the set was made.
        """
        for name, record in self.manifest.files.items():
            if (found := hash_file(self.path / name)) != record:
                raise DitlabError(
                    f"{self.path / name}: expected the SHA-256 {record.sha256[:12]}..., found {found.sha256[:12]}...: "
                    "the file was changed after the set was made"
                )


def prepare(
    spec: str,
    out: str | Path,
    *,
    size: int,
    color: Color = "rgb",
    upscale: bool = False,
    options: Mapping[str, Any] | None = None,
    near_duplicates: float | None = 0.95,
    near_limit: int = 50_000,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ImageSet:
    """Makes an image set from a source; the folder appears whole or not at all.

    Images with the pixels of an earlier one are dropped, whatever their pool or label. Near-duplicates are counted and
    stay. Where `out` already holds a set made from the same unchanged source with the same settings, it is opened.

    Args:
        spec: `photos`, `digits`, `folder:PATH`, `hub:ID`, `array:PATH` or `mosaic:PATH` (`sources.read_source`).
        out: the folder to make.
        size: height and width of the images, in pixels.
        color: "rgb" or "grey".
        upscale: enlarge images below `size` instead of skipping them.
        options: settings of the source, e.g. `{"stride": 8}` for `photos`.
        near_duplicates: correlation above which two images count as near-duplicates; None to not look.
        near_limit: compare at most so many images.
        overwrite: replace a set that was made otherwise.
        progress: told how far the work is.

    Raises:
        DitlabError: the source cannot be used or has fewer than two images, `out` is something else already, or the
            disk is full; nothing is left behind.
    """
    out = Path(out)
    settings = {
        "upscale": upscale,
        "near_duplicates": near_duplicates,
        "near_limit": near_limit,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in (options or {}).items()},
    }
    if near_duplicates is not None and not 0 < near_duplicates < 1:
        raise DitlabError(f"near-duplicates: expected a correlation between 0 and 1, found {near_duplicates}")
    source = read_source(spec, size, color=color, upscale=upscale, options=options)
    if (existing := _existing(out, spec, source, settings, overwrite)) is not None:
        return existing
    if source.count < 2:
        raise DitlabError(
            f"source '{spec}': expected at least 2 images (one to train, one to test), found {source.count}"
        )
    try:
        require_space(out, source.count * channels(color) * size * size)
        with atomic_folder(out, replace=overwrite) as folder:
            kept = _write_images(source, folder / IMAGES, progress)
            _finish(folder, spec, source, kept, settings, near_duplicates, near_limit, progress)
    except FileExistsError:
        # Another process was faster with the same set (two ranks of a job), or with another one.
        return _existing(out, spec, source, settings, overwrite) or ImageSet.open(out)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DitlabError(f"image set {out}: could not be written ({reason}); nothing was kept") from None
    return ImageSet.open(out)


@dataclass
class _Kept:
    """What was gathered while the images were written."""

    names: list[str]
    labels: list[int | None]
    pools: list[int | None]
    skipped: list[Skipped]
    duplicates: int


def _existing(out: Path, spec: str, source: Source, settings: dict[str, Any], overwrite: bool) -> ImageSet | None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        found = ImageSet.open(out)
    except DitlabError as error:
        if overwrite and (out / "manifest.json").is_file() and (out / IMAGES).exists():
            return None
        raise DitlabError(f"{out} exists and is not an image set that can be reused ({error})") from None
    manifest = found.manifest
    if overwrite:
        return None
    asked = (spec, source.fit.size, source.fit.color, settings)
    if (manifest.source, manifest.size, manifest.color, manifest.options) != asked:
        raise DitlabError(
            f"{out} already holds an image set made otherwise ({manifest.source}, {manifest.size}x{manifest.size}, "
            f"{manifest.color}); choose another folder or overwrite it"
        )
    if manifest.origin != source.origin():
        raise DitlabError(f"{out} was made from '{spec}' before that changed; choose another folder or overwrite it")
    return found


def require_space(out: Path, needed: int) -> None:
    """Raises a DitlabError where the disk of `out` has fewer than `needed` bytes free."""
    place = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DitlabError(f"image set {out}: needs {needed / 1e6:,.2f} MB, found {free / 1e6:,.2f} MB free on its disk")


def _write_images(source: Source, path: Path, progress: Progress | None) -> _Kept:
    """Streams the images into a .npy file whose length is filled in at the end."""
    shape = (channels(source.fit.color), source.fit.size, source.fit.size)
    kept = _Kept([], [], [], [], 0)
    seen: set[bytes] = set()
    with path.open("wb") as file:
        start = _write_header(file, (0, *shape))
        for number, item in enumerate(source, 1):
            if isinstance(item, Skipped):
                kept.skipped.append(item)
            else:
                data = item.pixels.tobytes()
                digest = hashlib.blake2b(data, digest_size=16).digest()
                if digest in seen:
                    kept.duplicates += 1
                else:
                    seen.add(digest)
                    file.write(data)
                    kept.names.append(item.name)
                    kept.labels.append(item.label)
                    kept.pools.append(item.pool)
            if progress is not None and (number % 64 == 0 or number == source.count):
                progress("images", number, source.count)
        file.seek(0)
        if _write_header(file, (len(kept.names), *shape)) != start:
            raise OSError("the header of the NumPy file changed its length")
    if len(kept.names) < 2:
        first = f", e.g. {kept.skipped[0].name}: {kept.skipped[0].reason}" if kept.skipped else ""
        raise DitlabError(
            f"source: expected at least 2 usable images, found {len(kept.names)} "
            f"({len(kept.skipped)} skipped{first}; {kept.duplicates} exact duplicates)"
        )
    return kept


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> int:
    # NumPy pads the header so that the first dimension can grow in place.
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.tell()


def _finish(
    folder: Path,
    spec: str,
    source: Source,
    kept: _Kept,
    settings: dict[str, Any],
    threshold: float | None,
    limit: int,
    progress: Progress | None,
) -> None:
    """Writes labels, pools and the manifest beside the images."""
    notes = []
    images = np.load(folder / IMAGES, mmap_mode="r")
    names: tuple[str, ...] = source.class_names
    unlabelled = sum(label is None for label in kept.labels)
    if names and unlabelled:
        notes.append(f"{unlabelled} images have no label, so the set has none")
        names = ()
    counts: tuple[int, ...] = ()
    if names:
        labels = np.array(kept.labels, np.int64)
        np.save(folder / LABELS, labels)
        counts = tuple(np.bincount(labels, minlength=len(names)).tolist())
    pool = None if None in kept.pools else np.array(kept.pools, np.uint8)
    pools = {"train": 0, "test": 0, "free": len(images)}
    if pool is not None:
        np.save(folder / POOL, pool)
        pools = {"train": int((pool == TRAIN).sum()), "test": int((pool == TEST).sum()), "free": 0}
    near: NearDuplicates | None = None
    if threshold is not None:
        told = None if progress is None else lambda done, total: progress("near-duplicates", done, total)
        near = find_near_duplicates(images, pool, threshold=threshold, limit=limit, progress=told)
        if near.searched < len(images):
            notes.append(f"near-duplicates were looked for among the first {near.searched} images only")
    files = {name: hash_file(folder / name) for name in (IMAGES, LABELS, POOL) if (folder / name).exists()}
    Manifest(
        source=spec,
        size=source.fit.size,
        color=source.fit.color,
        options=settings,
        shape=images.shape,
        class_names=names,
        label_counts=counts,
        pools=pools,
        exact_duplicates=kept.duplicates,
        near_duplicates=near,
        skipped_count=len(kept.skipped),
        skipped=tuple(kept.skipped[:1000]),
        notes=tuple(notes),
        origin=source.origin(),
        files=files,
        hash=content_hash(files, names),
        made_by=f"ditlab {ditlab.__version__}",
    ).write(folder)


def _read(folder: Path, manifest: Manifest, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray | None:
    record = manifest.files.get(name)
    if record is None:
        return None
    path = folder / name
    if not path.is_file():
        raise DitlabError(f"image set: expected {path}, found no such file")
    if (found := path.stat().st_size) != record.bytes:
        raise DitlabError(f"{path}: expected {record.bytes} bytes, found {found}: the file is cut or was replaced")
    try:
        array = np.load(path, mmap_mode=None if name in (LABELS, POOL) else "r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DitlabError(f"{path}: expected a NumPy file of {dtype}, found a damaged one ({error})") from None
    if array.dtype != dtype or array.shape != shape:
        raise DitlabError(f"{path}: expected {dtype} {list(shape)}, found {array.dtype} {list(array.shape)}")
    # A plain view of the map: np.memmap's own class costs a copy of its attributes at every indexing.
    return array.view(np.ndarray)
