"""Latents of an image set: their record in the manifest, and their arrays.

A set of latents holds the unscaled moments from its autoencoder, in float16, beside labels, pools and names of the
pictures:

    latents.npy            float16 [N, c, h, w]   means (or one sample of each)
    latents_std.npy        float16 [N, c, h, w]   standard deviations, if moments are stored
    mirrored.npy           float16 [N, c, h, w]   the same of the pictures mirrored left to right, if chosen:
    mirrored_std.npy       float16 [N, c, h, w]   latents of a mirrored picture are not the mirrored latents
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import ConfigDict
from torch import Tensor

from ditlab.data.autoencoder_record import AutoencoderRecord
from ditlab.data.encode_config import Store
from ditlab.errors import DitlabError

LATENTS, LATENTS_STD, MIRRORED, MIRRORED_STD = "latents.npy", "latents_std.npy", "mirrored.npy", "mirrored_std.npy"

__all__ = ["LATENTS", "LATENTS_STD", "MIRRORED", "MIRRORED_STD", "LatentRecord", "Latents"]


@dataclass(frozen=True)
class LatentRecord:
    """The fields that the manifest of a set of latents has besides those of its pictures."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    codec: AutoencoderRecord
    """The autoencoder; its `place` is relative to the set's folder."""
    store: Store
    """Mean and standard deviation, one sample, or the mean alone (if the autoencoder is not variational)."""
    mirrored: bool
    """Whether latents of the mirrored pictures are stored too."""
    seed: int
    """Seed of the samples, if those are stored."""
    precision: Literal["float32", "bf16"]
    """Number format that the autoencoder computed in."""
    pictures: str
    """Hash of the image set that was encoded."""
    path: str
    """Path of that set, relative to this one's folder."""
    picture: tuple[int, int, int]
    """(C, H, W) of the pictures."""
    mean: tuple[float, ...]
    """Mean of each channel of the scaled latents."""
    std: tuple[float, ...]
    """Standard deviation of each channel of the scaled latents, the posterior's own variance included."""
    overall_std: float
    """Root mean square of the scaled latents about the mean of them all: EDM's sigma_data."""

    @property
    def files(self) -> list[str]:
        """Names of the files of arrays."""
        names = [LATENTS, LATENTS_STD, MIRRORED, MIRRORED_STD] if self.mirrored else [LATENTS, LATENTS_STD]
        return names if self.store == "moments" else names[::2]


@dataclass(frozen=True, eq=False)
class Latents:
    """The opened arrays, float16 [N, c, h, w] and memory-mapped."""

    record: LatentRecord
    mean: np.ndarray
    std: np.ndarray | None
    mirrored: np.ndarray | None
    mirrored_std: np.ndarray | None

    @staticmethod
    def open(record: LatentRecord, read: Callable[[str], np.ndarray]) -> Latents:
        """Opens the arrays that a record promises; `read` gives the array of a file's name, checked."""
        arrays = {name: read(name) for name in record.files}
        return Latents(record, arrays[LATENTS], *map(arrays.get, (LATENTS_STD, MIRRORED, MIRRORED_STD)))

    def batch(
        self,
        indices: Sequence[int] | np.ndarray,
        noise: Float[Tensor, "b c h w"] | None,
        mirrored: Bool[Tensor, " b"] | None,
    ) -> Float[Tensor, "b c h w"]:
        """Returns scaled latents, float32, of `ImageSet.batch`."""
        if noise is not None and self.std is None:
            raise DitlabError(f"latents: expected stored moments to sample from, found '{self.record.store}'")
        if mirrored is not None and self.mirrored is None:
            raise DitlabError(
                "latents: expected latents of the mirrored pictures too, found none; encode the set with `mirrored`, "
                "or train without flips (`training.flip`)"
            )
        z = _take(self.mean, self.mirrored, indices, mirrored)
        if noise is not None and self.std is not None:
            z = z + _take(self.std, self.mirrored_std, indices, mirrored) * noise
        return (z - self.record.codec.shift) * self.record.codec.scale


def _take(
    array: np.ndarray, other: np.ndarray | None, indices: Sequence[int] | np.ndarray, flip_mask: Tensor | None
) -> Tensor:
    """Returns float32 rows of one array or, where the flip mask is True, of the other."""
    values = torch.from_numpy(np.take(array, indices, axis=0)).float()
    if flip_mask is None or other is None:
        return values
    others = torch.from_numpy(np.take(other, indices, axis=0)).float()
    return torch.where(flip_mask[:, None, None, None], others, values)
