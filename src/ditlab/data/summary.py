"""What an image set holds, in numbers and as a contact sheet."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ditlab.data.autoencoder import reopen_autoencoder
from ditlab.data.contact_sheet import fitting_scale, image_grid
from ditlab.data.duplicates import NearDuplicates
from ditlab.data.imageset import ImageSet
from ditlab.data.latents import LatentRecord
from ditlab.data.pixels import to_uint8
from ditlab.errors import DitlabError, InvalidConfig
from ditlab.rng import numpy_generator

__all__ = ["describe", "save_contact_sheet"]


def describe(imageset: ImageSet) -> dict[str, Any]:
    """Returns what there is to say about an image set, as JSON values."""
    manifest = imageset.manifest
    near = manifest.near_duplicates
    # Images before files that are no images, which their endings describe.
    skipped = sorted(manifest.skipped, key=lambda item: item.kind.startswith("."))
    return {
        "path": str(imageset.path),
        "source": manifest.source,
        "images": len(imageset),
        "shape": list(imageset.shape),
        "megabytes": round(sum(record.bytes for record in manifest.files.values()) / 1e6, 2),
        "classes": dict(zip(manifest.class_names, manifest.label_counts, strict=True)),
        "pools": manifest.pools,
        "exact_duplicates_dropped": manifest.exact_duplicates,
        "exact_duplicate_files": [list(pair) for pair in manifest.duplicate_names[:5]],
        "near_duplicates": None if near is None else _near_duplicates(near, imageset),
        "skipped": manifest.skipped_count,
        "skipped_kinds": manifest.skipped_kinds,
        "skipped_summary": manifest.skipped_summary(),
        "skipped_examples": {item.name: item.reason for item in skipped[:10]},
        "notes": list(manifest.notes),
        "hash": imageset.hash,
        **({} if manifest.latents is None else {"latents": _latents(manifest.latents)}),
    }


def _near_duplicates(near: NearDuplicates, imageset: ImageSet) -> dict[str, Any]:
    return {
        "threshold": near.threshold,
        "searched": near.searched,
        "pairs": near.pairs,
        "images": near.images,
        "pairs_across_train_and_test": near.across_pools,
        "most_similar": [list(pair) for pair in near.examples[:5]],
        "most_similar_files": [[imageset.source_of(index) for index in pair[:2]] for pair in near.examples[:5]],
    }


def _latents(record: LatentRecord) -> dict[str, Any]:
    """What there is to say about latents."""
    return {
        "codec": asdict(record.codec),
        "store": record.store,
        "mirrored": record.mirrored,
        "precision": record.precision,
        "picture": list(record.picture),
        "pictures": record.pictures,
        "channel_mean": [round(value, 4) for value in record.mean],
        "channel_std": [round(value, 4) for value in record.std],
        "overall_std": round(record.overall_std, 4),
    }


def save_contact_sheet(
    images: ImageSet,
    path: Path,
    *,
    count: int | None = None,
    seed: int = 0,
    codec: str | None = None,
    device: str = "cpu",
) -> float | None:
    """Draws some images of a set as one PNG; latents are decoded by their autoencoder, which may be at `codec` now.

    Returns the PSNR of the decoded pictures in dB for latents whose pictures are at hand, else None.
    """
    count = (100 if images.latents is None else 16) if count is None else count
    if count < 1:
        raise InvalidConfig(f"contact sheet: `count`: expected at least 1 image, found {count}")
    shown = numpy_generator(seed, "contact sheet").permutation(len(images))[:count]
    if images.labels is not None:
        shown = shown[np.argsort(images.labels[shown], kind="stable")]
    if images.latents is None:
        pictures, round_trip = images.take(shown), None
    else:
        pictures, round_trip = _decoded(images, shown, codec, device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image_grid(pictures, scale=fitting_scale(max(pictures.shape[2:]))).save(path, format="PNG")
    except OSError as error:
        raise DitlabError(f"contact sheet: could not write {path} ({error.strerror or error})") from None
    return round_trip


def _decoded(images: ImageSet, shown: np.ndarray, place: str | None, device: str) -> tuple[np.ndarray, float | None]:
    """Decoded latents, uint8, and their PSNR against the pictures that were encoded, where those are at hand."""
    assert images.latents is not None
    autoencoder = reopen_autoencoder(images.latents.record.codec, images.path, place).to(device)
    decoded = to_uint8(autoencoder.decode(images.batch(shown))).numpy()
    if images.original is None:
        return decoded, None
    errors = (decoded.astype(np.float64) - images.original.take(shown)) ** 2
    return decoded, float(10 * np.log10(255**2 / max(errors.mean(), 1e-9)))
