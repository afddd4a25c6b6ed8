"""Preparing an image set: from a source of images to a folder that appears whole or not at all."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

import ditlab
from ditlab.data.duplicates import find_near_duplicates
from ditlab.data.imageset import IMAGES, LABELS, POOL, ImageSet, is_image_set
from ditlab.data.manifest import SOURCE_NAMES, Manifest, content_hash, hash_files, write_names
from ditlab.data.pixels import Color, channels
from ditlab.data.sources.base import TEST, TRAIN, CropRule, SkippedItem, Source, count_kinds, describe_skipped
from ditlab.data.sources.files import is_source, read_source, source_name
from ditlab.data.sources.joined import HeldOut, Joined, Prepared
from ditlab.errors import DitlabError
from ditlab.files import atomic_folder
from ditlab.progress import SILENT, Reporter

__all__ = [
    "default_folder",
    "open_existing",
    "open_if_image_set",
    "open_source",
    "prepare",
    "require_space",
    "shared_images_error",
    "slug",
    "write_image_set",
]

_EXAMPLES, _DUPLICATES = 100, 1000
"""Skipped files of each kind, and pairs of duplicates, that the manifest names at most."""


def prepare(
    source: str | Path | ImageSet,
    out: str | Path | None = None,
    *,
    size: int | None = None,
    color: Color = "rgb",
    upscale: bool = False,
    held_out: str | Path | ImageSet | None = None,
    options: Mapping[str, Any] | None = None,
    near_duplicates: float | None = 0.95,
    near_limit: int = 50_000,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> ImageSet:
    """Makes an image set from a source; the folder appears whole or not at all.

    Images with the pixels of an earlier one are dropped, whatever their pool or label. Near-duplicates are counted and
    stay. If `out` already holds a set made from the same unchanged source with the same settings, it is opened. An
    image set as `source`, without `held_out` and `out`, is opened too.

    Args:
        source: `photos`, `digits`, `folder:PATH`, `hub:ID`, `array:PATH`, `mosaic:PATH`, the path of a folder of
            images, or an image set or its folder.
        out: the folder to make; `default_folder` if None.
        size: height and width of the images, in pixels; 32 if None, or that of the image set.
        color: "rgb" or "grey"; that of the image set if `source` is one.
        upscale: enlarge images below `size` instead of skipping them.
        held_out: a second source, of the images to test on; those of `source` are then only trained on.
        options: settings of the source, e.g. `{"stride": 8}` for `photos`; also of a `held_out` of the same kind.
        near_duplicates: correlation above which two images count as near-duplicates; None to skip the search.
        near_limit: compare at most so many images.
        overwrite: replace a set that was made otherwise.
        reporter: receives progress, and a note of the files that were skipped.

    Raises:
        DitlabError: a source cannot be used or has too few images, both have an image in common, `out` is something
            else already, or the disk is full; nothing is left behind.
    """
    if near_duplicates is not None and not 0 < near_duplicates < 1:
        raise DitlabError(f"near_duplicates: expected a correlation between 0 and 1, found {near_duplicates}")
    images = open_if_image_set(source)
    if isinstance(source, str) and source in ("photos", "digits") and Path(source).is_dir():
        reporter.note(f"'{source}' is the built-in set; write 'folder:{source}' for the folder of that name")
    if images is not None:
        if size not in (None, images.manifest.size):
            raise DitlabError(f"{images.path}: expected images of {size} pixels, found {images.manifest.size}")
        if held_out is None and out is None:
            return images
        size, color = images.manifest.size, images.manifest.color  # pyright: ignore[reportAssignmentType]
    rule = CropRule(32 if size is None else size, color, upscale)
    first, name = open_source(source, rule, options)
    settings = {
        "upscale": upscale,
        "near_duplicates": near_duplicates,
        "near_limit": near_limit,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in (options or {}).items()},
    }
    if held_out is not None:
        kind = source_name(str(held_out)).partition(":")[0]
        second, second_name = open_source(held_out, rule, options if kind == name.partition(":")[0] else None)
        settings["held_out"] = second_name
        first = Joined(first, name, second, second_name)
    if out is None:
        out = default_folder(source, rule.size, color, held_out)
    return write_image_set(first, name, Path(out), settings, overwrite=overwrite, reporter=reporter)


def default_folder(
    source: str | Path | ImageSet, size: int, color: Color = "rgb", held_out: str | Path | ImageSet | None = None
) -> Path:
    """Returns where `prepare` keeps a set if no folder is named: `image-sets/NAME-SIZE` in the current folder."""
    words = [slug(source), *([] if held_out is None else ["held-out", slug(held_out)]), str(size)]
    return Path("image-sets") / "-".join([*words, *(["grey"] if color == "grey" else [])])


def slug(source: str | Path | ImageSet) -> str:
    """Returns a source's name in lower-case letters, digits and hyphens, for the names of folders."""
    name = str(source.path if isinstance(source, ImageSet) else source)
    return re.sub(r"[\W_]+", "-", name.removeprefix("mosaic:").removeprefix("folder:")).strip("-").lower()


def open_if_image_set(source: str | Path | ImageSet) -> ImageSet | None:
    """Returns the image set that `source` is, or whose folder it names; None for anything else."""
    if isinstance(source, ImageSet):
        return source
    return ImageSet.open(source) if is_image_set(Path(source)) else None


def open_source(
    source: str | Path | ImageSet, rule: CropRule, options: Mapping[str, Any] | None = None
) -> tuple[Source, str]:
    """Returns a source and its full name: an image set read again, or what `read_source` opens."""
    images = open_if_image_set(source)
    if images is not None:
        return Prepared(rule, images), str(images.path)
    name = source_name(str(source))
    if isinstance(source, Path) and not is_source(name):
        raise DitlabError(f"source: expected a folder of images or an image set at {source}, found neither")
    return read_source(name, rule.size, color=rule.color, upscale=rule.upscale, options=options), name


def write_image_set(
    source: Source,
    name: str,
    out: Path,
    settings: dict[str, Any],
    *,
    minimum: int = 2,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> ImageSet:
    """Writes the images of a source as a set, or opens the set that was made of them before.

    The manifest keeps the name and the settings, of which "near_duplicates" and "near_limit" are applied here. The set
    needs at least `minimum` usable images.
    """
    existing = _existing(out, name, source, settings, overwrite)
    if existing is not None:
        return existing
    if source.count < minimum:
        raise DitlabError(f"source '{name}': expected at least {minimum} images, found {source.count}")
    try:
        require_space(out, source.count * channels(source.rule.color) * source.rule.size**2)
        with atomic_folder(out, replace=overwrite) as folder:
            gathered = _write_images(source, folder / IMAGES, reporter)
            _check_enough(source, name, gathered, minimum)
            _finish(folder, name, source, gathered, settings, reporter)
    except FileExistsError:
        # Another process was faster with the same set (two ranks of a job), or with another one.
        return _existing(out, name, source, settings, overwrite) or ImageSet.open(out)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DitlabError(f"image set {out}: could not be written ({reason}); nothing was kept") from None
    images = ImageSet.open(out)
    if images.manifest.skipped_count:
        reporter.note(images.manifest.skipped_summary())
    return images


@dataclass
class _Gathered:
    """Facts about the images of a source, gathered while they are written."""

    names: list[str] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    pools: list[int | None] = field(default_factory=list)
    skipped: list[SkippedItem] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    """(dropped image, earlier image)."""
    shared: list[tuple[str, str]] = field(default_factory=list)
    """The duplicates whose dropped image is held out and whose earlier image is for training."""


def open_existing(out: Path) -> ImageSet | None:
    """Opens the image set in a folder; None where there is nothing, or an empty folder."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        return ImageSet.open(out)
    except DitlabError as error:
        raise DitlabError(f"{out} exists and is not an image set that can be reused ({error})") from None


def _existing(out: Path, name: str, source: Source, settings: dict[str, Any], overwrite: bool) -> ImageSet | None:
    try:
        images = open_existing(out)
    except DitlabError:
        if overwrite and (out / "manifest.json").is_file() and (out / IMAGES).exists():
            return None
        raise
    if images is None or overwrite:
        return None
    manifest = images.manifest
    expected = (name, source.rule.size, source.rule.color, settings)
    if (manifest.source, manifest.size, manifest.color, manifest.options) != expected:
        raise DitlabError(
            f"{out} already holds an image set made otherwise ({manifest.source}, {manifest.size}x{manifest.size}, "
            f"{manifest.color}); choose another folder or overwrite it"
        )
    if manifest.origin != source.origin():
        raise DitlabError(f"{out} was made from '{name}' before that changed; choose another folder or overwrite it")
    return images


def require_space(out: Path, needed: int) -> None:
    """Raises a DitlabError if the disk of `out` has fewer than `needed` bytes free."""
    place = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DitlabError(f"image set {out}: needs {needed / 1e6:,.2f} MB, found {free / 1e6:,.2f} MB free on its disk")


def _write_images(source: Source, path: Path, reporter: Reporter) -> _Gathered:
    """Streams the images into a .npy file whose length is filled in at the end."""
    shape = (channels(source.rule.color), source.rule.size, source.rule.size)
    gathered = _Gathered(skipped=list(source.left_out))
    rows: dict[bytes, int] = {}
    with path.open("wb") as file, reporter.bar("images", source.count) as progress:
        start = _write_header(file, (0, *shape))
        for number, item in enumerate(source, 1):
            if isinstance(item, SkippedItem):
                gathered.skipped.append(item)
            else:
                data = item.pixels.tobytes()
                digest = hashlib.blake2b(data, digest_size=16).digest()
                row = rows.setdefault(digest, len(gathered.names))
                if row < len(gathered.names):
                    pair = (item.name, gathered.names[row])
                    gathered.duplicates.append(pair)
                    if (item.pool, gathered.pools[row]) == (TEST, TRAIN):
                        gathered.shared.append(pair)
                else:
                    file.write(data)
                    gathered.names.append(item.name)
                    gathered.labels.append(item.label)
                    gathered.pools.append(item.pool)
            if number % 64 == 0 or number == source.count:
                progress(number, source.count)
        file.seek(0)
        if _write_header(file, (len(gathered.names), *shape)) != start:
            raise OSError("the header of the NumPy file changed its length")
    return gathered


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> int:
    # NumPy pads the header so that the first dimension can grow in place.
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.tell()


def _check_enough(source: Source, name: str, gathered: _Gathered, minimum: int) -> None:
    """Refuses too few images; of two joined sources also an empty one, and images in both."""
    skipped = describe_skipped(count_kinds(gathered.skipped), gathered.skipped)
    skipped = f"skipped {skipped}" if skipped else "none was skipped"
    held_out = source.held_out if isinstance(source, Joined) else source if isinstance(source, HeldOut) else None
    if held_out is not None:
        if gathered.shared:
            raise shared_images_error(held_out.name, name, gathered.shared)
        if TEST not in gathered.pools:
            raise DitlabError(
                f"held_out '{held_out.name}': expected an image that can be used at {source.rule.size}x"
                f"{source.rule.size} pixels, found none ({skipped})"
            )
        if isinstance(source, Joined) and TRAIN not in gathered.pools:
            raise DitlabError(f"source '{name}': expected an image that can be trained on, found none ({skipped})")
    if len(gathered.names) < minimum:
        raise DitlabError(
            f"source '{name}': expected at least {minimum} usable images, found "
            f"{len(gathered.names)} ({skipped}; {len(gathered.duplicates)} exact duplicates)"
        )


def shared_images_error(held_out: str, train: str, pairs: Iterable[tuple[str, str]]) -> DitlabError:
    """Returns the error for held-out images that are training images too, as (held-out, training) names."""
    pairs = list(pairs)
    listed = ", ".join(f"{test} is {first}" for test, first in pairs[:3]) + (", ..." if len(pairs) > 3 else "")
    return DitlabError(
        f"held_out '{held_out}': expected images that '{train}' does not have, found {len(pairs):,} in both "
        f"({listed}); remove them from one of the two"
    )


def _finish(
    folder: Path, name: str, source: Source, gathered: _Gathered, settings: dict[str, Any], reporter: Reporter
) -> None:
    """Writes labels, pools, names and the manifest beside the images."""
    notes = []
    images = np.load(folder / IMAGES, mmap_mode="r")
    class_names: tuple[str, ...] = source.class_names
    unlabelled = sum(label is None for label in gathered.labels)
    if class_names and unlabelled:
        notes.append(f"{unlabelled} images have no label, so the set has none")
        class_names = ()
    counts: tuple[int, ...] = ()
    if class_names:
        labels = np.array(gathered.labels, np.int64)
        np.save(folder / LABELS, labels)
        counts = tuple(np.bincount(labels, minlength=len(class_names)).tolist())
    pool = None if None in gathered.pools else np.array(gathered.pools, np.uint8)
    pools = {"train": 0, "test": 0, "free": len(images)}
    if pool is not None:
        np.save(folder / POOL, pool)
        pools = {"train": int((pool == TRAIN).sum()), "test": int((pool == TEST).sum()), "free": 0}
    write_names(folder, gathered.names)
    near = None
    threshold, limit = settings["near_duplicates"], settings["near_limit"]
    if threshold is not None:
        with reporter.bar("near-duplicates", min(limit, len(images))) as progress:
            near = find_near_duplicates(images, pool, threshold=threshold, limit=limit, progress=progress)
        if near.searched < len(images):
            notes.append(f"near-duplicates were looked for among the first {near.searched} images only")
    files = hash_files(folder, (IMAGES, LABELS, POOL, SOURCE_NAMES))
    Manifest(
        source=name,
        size=source.rule.size,
        color=source.rule.color,
        options=settings,
        shape=images.shape,
        class_names=class_names,
        label_counts=counts,
        pools=pools,
        exact_duplicates=len(gathered.duplicates),
        near_duplicates=near,
        skipped_count=len(gathered.skipped),
        skipped=_examples(gathered.skipped),
        notes=tuple(notes),
        origin=source.origin(),
        files=files,
        hash=content_hash(files, class_names),
        made_by=f"ditlab {ditlab.__version__}",
        skipped_kinds=count_kinds(gathered.skipped),
        duplicate_names=tuple(gathered.duplicates[:_DUPLICATES]),
    ).write(folder)


def _examples(skipped: Iterable[SkippedItem]) -> tuple[SkippedItem, ...]:
    """Returns the first items of each kind."""
    counts, examples = Counter[str](), []
    for item in skipped:
        counts[item.kind] += 1
        if counts[item.kind] <= _EXAMPLES:
            examples.append(item)
    return tuple(examples)
