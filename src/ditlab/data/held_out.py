"""Held-out images that are added later: a second source, prepared exactly as an image set was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ditlab.data.autoencoder import reopen_autoencoder
from ditlab.data.encode import encode_images
from ditlab.data.encode_config import EncodeConfig
from ditlab.data.imageset import ImageSet
from ditlab.data.latents import LatentRecord
from ditlab.data.preparing import open_if_image_set, open_source, shared_images_error, slug, write_image_set
from ditlab.data.sources.base import TEST, CropRule
from ditlab.data.sources.joined import HeldOut
from ditlab.errors import DitlabError
from ditlab.progress import SILENT, Reporter

__all__ = ["prepare_held_out", "shared_images"]


def prepare_held_out(
    images: ImageSet,
    source: str | Path | ImageSet,
    out: str | Path | None = None,
    *,
    train: Sequence[int] | np.ndarray | None = None,
    codec: str | Path | None = None,
    device: str = "cpu",
    reporter: Reporter = SILENT,
) -> ImageSet:
    """Prepares a second source exactly as an image set was prepared, to take test images from it.

    The new set has the size, colour and crop of `images`, the same classes (an image of another class leaves the set
    without labels) and, for latents, the same autoencoder and the same kind of latents. All its images are in the test
    pool (`ditlab.data.splits.held_out_order`). The new set is cached: it is opened again until the source changes.

    Args:
        images: the image set, of pixels or latents.
        source: as for `prepare`: a source, a folder of images, or an image set. A set of latents must have the same
            autoencoder, and is used as it is.
        out: the folder to make; a folder in `image-sets/` of the current folder if None.
        train: indices of the images of `images` that were trained on; all but its test pool if None.
        codec: where the autoencoder of latents is now, if it was moved.
        device: where latents are encoded.
        reporter: receives progress and notes.

    Raises:
        DitlabError: the source cannot be used, none of its images is large enough, or an image is in both; the message
            names the files.
    """
    held_out = open_if_image_set(source)
    if held_out is not None and held_out.latents is not None:
        _check_same_latents(images, held_out)
    else:
        held_out = _prepare(images, source, out, codec, device, reporter)
    pairs = shared_images(images, held_out, train)
    if pairs is None:
        reporter.note(f"{images.path}: its pictures have been moved, so equal ones in {held_out.path} are not found")
    elif pairs:
        names = [(_name(held_out, test), _name(images, first)) for first, test in pairs]
        raise shared_images_error(held_out.manifest.source, images.manifest.source, names)
    return held_out


def _prepare(
    images: ImageSet,
    source: str | Path | ImageSet,
    out: str | Path | None,
    codec: str | Path | None,
    device: str,
    reporter: Reporter,
) -> ImageSet:
    """Writes the new set, or opens the one that was made before."""
    manifest = images.manifest
    rule = CropRule(manifest.size, manifest.color, manifest.options.get("upscale", False))  # pyright: ignore[reportArgumentType]
    opened, name = open_source(source, rule)
    held_out = HeldOut(opened, name, images.class_names)
    settings = {"upscale": rule.upscale, "near_duplicates": None, "near_limit": 0, "held_out_for": images.hash}
    if out is None:
        # A source that has changed gets another folder: results that name the earlier set stay true.
        identity = json.dumps([name, held_out.origin(), images.hash], sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
        out = Path("image-sets") / f"{slug(source)}-{rule.size}-held-out-{digest}"
    out = Path(out)
    if images.latents is None:
        return write_image_set(held_out, name, out, settings, minimum=1, reporter=reporter)
    pictures = out.with_name(f"{out.name}-pictures")
    pixels = write_image_set(held_out, name, pictures, settings, minimum=1, reporter=reporter)
    record = images.latents.record
    autoencoder = reopen_autoencoder(record.codec, images.path, codec).to(device)
    config = EncodeConfig(store=record.store, mirrored=record.mirrored, seed=record.seed, precision=record.precision)
    return encode_images(pixels, autoencoder, out, config, reporter=reporter)


def shared_images(
    images: ImageSet, held_out: ImageSet, train: Sequence[int] | np.ndarray | None = None
) -> list[tuple[int, int]] | None:
    """Returns the pairs (index in `images`, index in `held_out`) of images with the same pixels.

    Of `images` those at `train` are compared, all but its test pool if None. None for latents whose pictures are gone.
    """
    first, second = images.original, held_out.original
    if first is None or second is None:
        return None
    if train is None:
        train = np.arange(len(images)) if images.pool is None else np.flatnonzero(images.pool != TEST)
    rows = {_digest(first.array[index]): int(index) for index in train}
    pairs = ((rows.get(_digest(array)), index) for index, array in enumerate(second.array))
    return [(row, index) for row, index in pairs if row is not None]


def _digest(array: np.ndarray) -> bytes:
    return hashlib.blake2b(array.tobytes(), digest_size=16).digest()


def _name(images: ImageSet, index: int) -> str:
    return images.source_of(index) or f"image {index}"


def _check_same_latents(images: ImageSet, held_out: ImageSet) -> None:
    """Refuses latents of another autoencoder, of another size, or with other classes."""
    if images.latents is None or held_out.latents is None:
        raise DitlabError(f"held_out {held_out.path}: expected pixels as in {images.path}, found latents")
    difference = images.latents.record.codec.difference(held_out.latents.record.codec)
    if difference is not None:
        field, expected, actual = difference
        raise DitlabError(f"held_out {held_out.path}: expected an autoencoder with {field} {expected}, found {actual}")
    ours, theirs = _described(images.latents.record, images), _described(held_out.latents.record, held_out)
    if ours != theirs:
        raise DitlabError(f"held_out {held_out.path}: expected {ours} as in {images.path}, found {theirs}")


def _described(record: LatentRecord, images: ImageSet) -> str:
    size = "x".join(map(str, record.picture))
    return f"latents of pictures {size} in {images.num_classes} classes ({', '.join(images.class_names[:5])})"
