"""Encoding an image set: its latents under an autoencoder, as a set of their own that training reads like any other.

The work is cut into parts of 64 pictures. Each part becomes one file in a hidden folder beside the new set, written
atomically, so an interrupted encoding resumes with the missing parts. Several processes share the parts. At the end one
process joins them into the set, which appears whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ditlab
from ditlab.data.autoencoder import Autoencoder
from ditlab.data.encode_config import PART, EncodeConfig, Store
from ditlab.data.imageset import LABELS, POOL, ImageSet
from ditlab.data.latents import LATENTS, LATENTS_STD, MIRRORED, MIRRORED_STD, LatentRecord
from ditlab.data.manifest import LATENT_VERSION, SOURCE_NAMES, content_hash, hash_files
from ditlab.data.preparing import open_existing, require_space
from ditlab.errors import DitlabError
from ditlab.files import atomic_folder, lock_folder, write_file, write_text
from ditlab.progress import SILENT, Reporter
from ditlab.rng import torch_generator

__all__ = ["LatentEncoder", "encode_images"]

_SETTINGS = "settings.json"


class LatentEncoder:
    """Encodes an image set of pixels into the folder `out`, in one process or several; resumes what was interrupted.

    `overwrite` replaces another set at `out`, and drops what is left of another unfinished encoding there.
    """

    def __init__(
        self,
        pictures: ImageSet,
        out: str | Path,
        codec: Autoencoder,
        config: EncodeConfig | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        self.pictures, self.out, self.codec, self.config = pictures, Path(out), codec, config or EncodeConfig()
        self.overwrite = overwrite
        if pictures.latents is not None:
            raise DitlabError(f"data encode {pictures.path}: expected an image set of pixels, found one of latents")
        if codec.record.kind == "identity":
            raise DitlabError("data encode: expected an autoencoder, found the identity")
        self.shape = codec.record.latent_shape(pictures.shape)
        if self.out.resolve() == pictures.path.resolve():
            raise DitlabError(f"data encode: expected another folder for the latents than {self.out} of the pictures")
        store: Store = self.config.store if codec.record.variational else "mean"
        # The statistics and the codec's place are filled in at the end.
        self._record = LatentRecord(
            codec=replace(codec.record, place=""),
            store=store,
            mirrored=self.config.mirrored,
            seed=self.config.seed if store == "sample" else 0,
            precision=self.config.precision,
            pictures=pictures.hash,
            path="",
            picture=pictures.shape,
            mean=(),
            std=(),
            overall_std=0.0,
        )
        self.names = self._record.files
        self.work = self.out.parent / f".{self.out.name}.encoding"
        self.parts = range(-(-len(pictures) // PART))

    def existing(self) -> ImageSet | None:
        """Returns the finished set of this encoding, or None if `out` is free or to be overwritten."""
        images = open_existing(self.out)
        if images is None:
            return None
        if images.latents is not None and self._identity(images.latents.record) == self._identity(self._record):
            return images
        if self.overwrite:
            return None
        shape, kind = "x".join(map(str, images.shape)), "pixels" if images.latents is None else "latents"
        raise DitlabError(
            f"{self.out} already holds another image set ({images.manifest.source}, {shape}, {kind}); choose another "
            "folder or overwrite it"
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the hidden folder of the parts, and what an interrupted encoding left there; for the first process."""
        settings = json.dumps({"part": PART, **self._identity(self._record)}, indent=1)
        record = self.work / _SETTINGS
        if record.is_file() and record.read_text() != settings and not self.overwrite:
            raise DitlabError(
                f"{self.work} holds an unfinished encoding with other settings; use the same settings to resume it, "
                "or overwrite it"
            )
        left = sum(not self._file(part).exists() for part in self.parts)
        each = 2 * len(self.names) * int(np.prod(self.shape))
        # The parts that are still to be made, and the set that they are joined into.
        require_space(self.out, each * (left * PART + len(self.pictures)))
        self.work.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(self.work)
        try:
            if lock is None and os.name != "nt":
                raise DitlabError(f"data encode {self.out}: another process is encoding it")
            if not record.is_file() or record.read_text() != settings:
                for leftover in self.work.iterdir():
                    leftover.unlink()
                write_text(record, settings)
            yield
        finally:
            if lock is not None:
                os.close(lock)

    def encode(self, rank: int = 0, world: int = 1, reporter: Reporter = SILENT) -> None:
        """Encodes the share of process `rank` of `world` in the parts that are not there yet."""
        parts = self.parts[rank::world]
        total, done = sum(len(self._indices(part)) for part in parts), 0
        with reporter.bar("encoding", total) as progress:
            for part in parts:
                indices = self._indices(part)
                if not self._file(part).exists():
                    batches = []
                    for start in range(0, len(indices), self.config.batch):
                        batches.append(self._moments(indices[start : start + self.config.batch]))
                        progress(done + min(start + self.config.batch, len(indices)), total)
                    self._write_part(part, batches)
                done += len(indices)
                progress(done, total)

    def finish(self) -> ImageSet:
        """Joins the parts into the set and removes them; called by one process when all have encoded."""
        with atomic_folder(self.out, replace=self.overwrite) as folder:
            measured = self._join(folder)
            for name in (LABELS, POOL, SOURCE_NAMES):
                if name in self.pictures.manifest.files:
                    shutil.copyfile(self.pictures.path / name, folder / name)
            files = hash_files(folder, (*self.names, LABELS, POOL, SOURCE_NAMES))
            record = replace(
                self._record,
                codec=self.codec.record.moved(Path.cwd(), self.out),
                path=os.path.relpath(self.pictures.path.resolve(), self.out.resolve()),
                **measured,
            )
            before = self.pictures.manifest
            replace(
                before,
                shape=(len(self.pictures), *self.shape),
                files=files,
                hash=content_hash(files, before.class_names, record),
                made_by=f"ditlab {ditlab.__version__}",
                version=LATENT_VERSION,
                latents=record,
            ).write(folder)
        shutil.rmtree(self.work, ignore_errors=True)
        return ImageSet.open(self.out)

    def _identity(self, record: LatentRecord) -> dict[str, Any]:
        """Returns what two encodings must share to be the same: all but places and measured values."""
        codec = replace(record.codec, source="", place="")
        return asdict(replace(record, codec=codec, path="", mean=(), std=(), overall_std=0.0))

    def _indices(self, part: int) -> np.ndarray:
        return np.arange(part * PART, min((part + 1) * PART, len(self.pictures)))

    def _file(self, part: int) -> Path:
        return self.work / f"part-{part:06d}.npz"

    def _moments(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the arrays of one batch by file name, float16."""
        pictures = self.pictures.batch(indices)
        arrays = self._stored(pictures, indices, LATENTS, LATENTS_STD)
        if self.config.mirrored:
            arrays |= self._stored(pictures.flip(-1), indices, MIRRORED, MIRRORED_STD)
        return arrays

    def _stored(self, pictures: Tensor, indices: np.ndarray, name: str, name_std: str) -> dict[str, np.ndarray]:
        with torch.autocast(self.codec.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"):
            mean, std = self.codec.moments(pictures)
        mean, std = mean.float().cpu(), None if std is None else std.float().cpu()
        if tuple(mean.shape[1:]) != self.shape:
            raise DitlabError(
                f"codec '{self.codec.record.source}': expected latents {list(self.shape)}, found {list(mean.shape[1:])}"
            )
        if self._record.store == "sample" and std is not None:
            draws = [torch_generator(self.config.seed, "encode", name, int(index)) for index in indices]
            mean = mean + std * torch.stack([torch.randn(self.shape, generator=draw) for draw in draws])
        return {name: _half(mean)} if std is None else {name: _half(mean), name_std: _half(std)}

    def _write_part(self, part: int, batches: list[dict[str, np.ndarray]]) -> None:
        arrays = {name.removesuffix(".npy"): np.concatenate([batch[name] for batch in batches]) for name in self.names}
        write_file(self._file(part), lambda file: np.savez(file, allow_pickle=False, **arrays), sync=True)

    def _join(self, folder: Path) -> dict[str, Any]:
        """Writes the arrays from the parts, one after another, and measures the scaled latents on the way."""
        count, (channels, height, width) = len(self.pictures), self.shape
        total, squares, variance = np.zeros((3, channels))
        codec = self.codec.record
        arrays = {
            name: np.lib.format.open_memmap(folder / name, "w+", np.float16, (count, *self.shape))
            for name in self.names
        }
        for part in self.parts:
            indices = self._indices(part)
            for name, values in self._read_part(part, len(indices)):
                arrays[name][indices] = values
                wide = values.astype(np.float64)
                if name == LATENTS:
                    scaled = (wide - codec.shift) * codec.scale
                    total += scaled.sum((0, 2, 3))
                    squares += (scaled**2).sum((0, 2, 3))
                elif name == LATENTS_STD:
                    variance += ((wide * codec.scale) ** 2).sum((0, 2, 3))
        for array in arrays.values():
            array.flush()
        each = count * height * width
        mean = total / each
        second = (squares + variance) / each
        return {
            "mean": tuple(mean.tolist()),
            "std": tuple(np.sqrt(np.maximum(second - mean**2, 0)).tolist()),
            "overall_std": float(np.sqrt(max(second.mean() - mean.mean() ** 2, 0))),
        }

    def _read_part(self, part: int, count: int) -> Iterator[tuple[str, np.ndarray]]:
        path = self._file(part)
        try:
            with np.load(path, allow_pickle=False) as loaded:
                for name in self.names:
                    values = loaded[name]
                    if values.shape != (count, *self.shape) or values.dtype != np.float16:
                        raise ValueError(f"{name} is {values.dtype} {list(values.shape)}")
                    yield name, values
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DitlabError(f"{path}: expected a part of an encoding, found a damaged file ({error})") from None


def encode_images(
    images: ImageSet,
    codec: Autoencoder,
    out: str | Path,
    config: EncodeConfig | None = None,
    *,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> ImageSet:
    """Encodes an image set in this process, or opens the finished set of the same encoding (`LatentEncoder`)."""
    encoder = LatentEncoder(images, out, codec, config, overwrite=overwrite)
    existing = encoder.existing()
    if existing is not None:
        return existing
    with encoder.locked():
        encoder.encode(reporter=reporter)
        return encoder.finish()


def _half(values: Tensor) -> np.ndarray:
    largest = values.abs().max().item()
    if not largest <= torch.finfo(torch.float16).max:
        raise DitlabError(f"data encode: expected latents that float16 can hold (up to 65504), found {largest:.3g}")
    return values.to(torch.float16).numpy()
