"""Image sets: N uint8 images of one size in one memory-mapped file, with labels, pools and a manifest.

On disk a set is a folder of plain NumPy files that any program can read:

    images.npy     uint8 [N, C, H, W]      or the latents of such images: see `ditlab.data.latents`
    labels.npy     int64 [N]             where the source has classes
    pool.npy       uint8 [N]             where the source fixes train (0) and test (1)
    sources.json                         the file, row or crop of every image: a list of N strings
    manifest.json                        see `ditlab.data.manifest`

The hash that identifies a set covers images, labels, pools and class names, not the names of the source files.
"""

from __future__ import annotations

import html
import io
import json
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from ditlab.data.contact_sheet import fitting_scale, image_grid
from ditlab.data.latents import LATENTS, Latents
from ditlab.data.manifest import MANIFEST, SOURCE_NAMES, Manifest, hash_file, read_manifest
from ditlab.data.pixels import flip, to_float
from ditlab.errors import DitlabError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["IMAGES", "LABELS", "POOL", "ImageSet", "is_image_set"]

IMAGES, LABELS, POOL = "images.npy", "labels.npy", "pool.npy"


def is_image_set(path: Path) -> bool:
    """Returns whether a folder holds the files of an image set; `ImageSet.open` checks them."""
    return (path / MANIFEST).is_file() and ((path / IMAGES).exists() or (path / LATENTS).exists())


@dataclass(frozen=True, eq=False)
class ImageSet:
    """An opened image set.

    Attributes:
        path: its folder.
        manifest: what is known about it.
        array: uint8 [N, C, H, W], backed by the memory-mapped file: only what is touched is read. For a set of latents
            the stored means, float16 [N, c, h, w].
        labels: int64 [N], or None.
        pool: uint8 [N]: 0 may only be trained on, 1 may only be tested on; None if every image may be either.
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

        def large(name: str, dtype: str = "float16") -> np.ndarray:
            array = _read(folder, manifest, name, dtype, manifest.shape)
            if array is None:
                raise DitlabError(f"{folder}: expected its manifest to list {name}, found {', '.join(manifest.files)}")
            return array

        latents = None if manifest.latents is None else Latents.open(manifest.latents, large)
        array = large(IMAGES, "uint8") if latents is None else latents.mean
        labels = _read(folder, manifest, LABELS, "int64", manifest.shape[:1])
        pool = _read(folder, manifest, POOL, "uint8", manifest.shape[:1])
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
    def stochastic(self) -> bool:
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
        """Returns the stored images at `indices`: uint8 [B, C, H, W], or float16 means of unscaled latents."""
        return np.take(self.array, indices, axis=0)

    def batch(
        self,
        indices: Sequence[int] | np.ndarray,
        noise: Float[Tensor, "b c h w"] | None = None,
        mirrored: Bool[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Returns the images at `indices` as a denoiser sees them, float32: pixels in [-1, 1], or scaled latents.

        Args:
            indices: rows of the set.
            noise: unit-normal, if the set is `stochastic`: the latents are mean + std * noise; their mean if None.
            mirrored: which of them are mirrored left to right; none if None.

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
        """Returns the labels at `indices`, or None for a set without labels."""
        return None if self.labels is None else torch.from_numpy(np.take(self.labels, indices))

    @property
    def original(self) -> ImageSet | None:
        """The set of pixels that these latents were made of, or None if it has been moved; a set of pixels itself."""
        if self.latents is None:
            return self
        try:
            images = ImageSet.open(self.path / self.latents.record.path)
        except DitlabError:
            return None
        return images if images.hash == self.latents.record.pictures else None

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """The source of every image (`source_of`); empty for a set that was made before these were kept."""
        if SOURCE_NAMES not in self.manifest.files:
            return ()
        path = self.path / SOURCE_NAMES
        try:
            names = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DitlabError(f"{path}: expected the names of the source files ({error})") from None
        if not isinstance(names, list) or len(names) != len(self):
            raise DitlabError(f"{path}: expected a list of {len(self)} names, found another file")
        return tuple(names)

    def source_of(self, index: int) -> str:
        """Returns an image's file, relative to the source's folder, or its row or crop; "" where it was not kept."""
        return self.sources[index] if self.sources else ""

    def contact_sheet(self, count: int = 48) -> Image.Image | None:
        """Returns a PIL picture of at most `count` images, evenly spaced in the set.

        Latents are shown by the pictures that they were made of; None if these have been moved.
        """
        original = self.original
        if original is None:
            return None
        images = original.take(np.linspace(0, len(self) - 1, min(count, len(self))).astype(int))
        return image_grid(images, scale=fitting_scale(max(images.shape[2:])))

    def __repr__(self) -> str:
        shape, pools = "x".join(map(str, self.shape)), self.manifest.pools
        parts = [f"{len(self):,} {'images' if self.latents is None else 'latents'} of {shape}"]
        if not pools["free"]:
            parts.append(f"{pools['train']:,} for training, {pools['test']:,} for test")
        if self.num_classes:
            parts.append(f"{self.num_classes} classes")
        return f"ImageSet('{self.path}': {', '.join(parts)}; {self.hash[:12]})"

    def _repr_png_(self) -> bytes | None:
        sheet = self.contact_sheet()
        if sheet is None:
            return None
        file = io.BytesIO()
        sheet.save(file, format="PNG")
        return file.getvalue()

    def _repr_html_(self) -> str:
        picture, text = self._repr_png_(), html.escape(repr(self))
        if picture is None:
            return f"<p>{text}</p>"
        return f'<p>{text}</p><img alt="{text}" src="data:image/png;base64,{b64encode(picture).decode()}">'

    def verify(self) -> None:
        """Reads every file again; raises DitlabError where its SHA-256 is not that of the manifest."""
        for name, record in self.manifest.files.items():
            actual = hash_file(self.path / name)
            if actual != record:
                raise DitlabError(
                    f"{self.path / name}: expected the SHA-256 {record.sha256[:12]}..., found "
                    f"{actual.sha256[:12]}...: the file was changed after the set was made"
                )


def _read(folder: Path, manifest: Manifest, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray | None:
    record = manifest.files.get(name)
    if record is None:
        return None
    path = folder / name
    if not path.is_file():
        raise DitlabError(f"image set: expected {path}, found no such file")
    size = path.stat().st_size
    if size != record.bytes:
        raise DitlabError(f"{path}: expected {record.bytes} bytes, found {size}: the file is cut or was replaced")
    try:
        array = np.load(path, mmap_mode=None if name in (LABELS, POOL) else "r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DitlabError(f"{path}: expected a NumPy file of {dtype}, found a damaged one ({error})") from None
    if array.dtype != dtype or array.shape != shape:
        raise DitlabError(f"{path}: expected {dtype} {list(shape)}, found {array.dtype} {list(array.shape)}")
    # A plain view of the map: np.memmap's own class costs a copy of its attributes at every indexing.
    return array.view(np.ndarray)
