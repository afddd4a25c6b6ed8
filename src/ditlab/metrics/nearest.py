"""Nearest training images: how far each image lies from the two training images that are nearest to it.

The distance is the L2 distance of pixels over sqrt(C H W), in grey levels of [0, 255]: the root mean square difference
of two images. An image is counted as a copy where its nearest training image is less than a third as far as the second
nearest, d1 / d2 < 1/3 (Yoon et al., "Diffusion Probabilistic Models Generalize when They Fail to Memorize", 2023; Gu
et al., "On Memorization in Diffusion Models", 2310.02664). The same distances of held-out images are the control: an
image that nobody copied has a nearest training image too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int64, UInt8

from ditlab.errors import DitlabError
from ditlab.provenance import Provenance

COPY_RATIO = 1 / 3
"""d1 / d2 below which an image counts as a copy."""


@dataclass(frozen=True, eq=False)
class Nearest:
    """For each of n images its nearest reference image."""

    index: Int64[np.ndarray, " n"]
    """Place of the nearest reference image, the first of equally near ones."""
    first: Float[np.ndarray, " n"]
    """d1: distance to it, in grey levels (0 to 255), float64."""
    second: Float[np.ndarray, " n"]
    """d2: distance to the next one, at least d1; infinite where there is one reference image only."""
    mirrored: np.ndarray
    """Whether the nearest one was nearest left to right reversed, bool [n]."""

    @property
    def ratio(self) -> Float[np.ndarray, " n"]:
        """d1 / d2, in [0, 1]; 1 where both are zero (two equal reference images), 0 where d2 is infinite."""
        return np.where(self.second > 0, self.first / np.where(self.second > 0, self.second, 1.0), 1.0)

    @property
    def copied(self) -> np.ndarray:
        """Whether each image counts as a copy, d1 / d2 < 1/3, bool [n]; with a single reference image all do."""
        return self.ratio < COPY_RATIO

    @property
    def copies(self) -> int | None:
        """How many images count as copies; None with a single reference image, where that says nothing."""
        return int(self.copied.sum()) if np.isfinite(self.second).all() else None

    def take(self, count: int, start: int = 0) -> Nearest:
        """That of so many images, from the place `start`."""
        which = slice(start, start + count)
        return Nearest(self.index[which], self.first[which], self.second[which], self.mirrored[which])


@dataclass(frozen=True, eq=False)
class NearestResult:
    """The nearest training images of a run's samples, and of held-out images as a control."""

    about: Provenance
    samples: Nearest
    held_out: Nearest | None = None
    mirror: bool = False
    """Whether mirrored training images counted too."""

    kind = "nearest"
    version = 1

    @property
    def latents(self) -> bool:
        """Whether the images are latents, compared as the pictures that their autoencoder makes of them."""
        return self.about.settings.get("space") == "latents"

    def sentence(self) -> str:
        """What was found, in one sentence."""
        count, copies = len(self.samples.first), self.samples.copies
        words = (
            f"{self.about.title}: median distance of {count} samples to their nearest training image "
            f"{np.median(self.samples.first):.1f} grey levels"
        )
        if self.held_out is not None:
            words += f" ({np.median(self.held_out.first):.1f} for {len(self.held_out.first)} held-out images)"
        return f"{words}." if copies is None else f"{words}; {copies} of {count} are copies (d1/d2 < 1/3)."

    def to_json(self) -> dict[str, Any]:
        """Everything; infinite distances as null."""
        return {
            "kind": self.kind,
            "version": self.version,
            "about": asdict(self.about) | {"settings": dict(self.about.settings)},
            "mirror": self.mirror,
            "samples": _record(self.samples),
            "held_out": None if self.held_out is None else _record(self.held_out),
            "sentence": self.sentence(),
        }


def nearest(
    images: UInt8[np.ndarray, "n c h w"],
    references: UInt8[np.ndarray, "r _ _ _"],
    *,
    mirror: bool = False,
    chunk: int = 1024,
) -> Nearest:
    """The nearest and second nearest reference image of each image, exact.

    Args:
        images: uint8 [n, C, H, W].
        references: uint8 [r, C, H, W]; may be memory-mapped, is read `chunk` at a time.
        mirror: a reference image also counts left to right reversed (where training flips images); the nearer of the
            two is its distance.
        chunk: reference images at once. Does not change the result.

    Raises:
        DitlabError: no image on a side, or images of different shapes.
    """
    starts = range(0, len(references), chunk)
    parts = (np.asarray(references[start : start + chunk]) for start in starts)
    return nearest_in(images, ((part, part[..., ::-1] if mirror else None) for part in parts))


def nearest_in(images: UInt8[np.ndarray, "n c h w"], parts: Iterable[tuple[np.ndarray, np.ndarray | None]]) -> Nearest:
    """The same of reference images that come part by part, so that they need not all be in memory.

    Args:
        images: uint8 [n, C, H, W].
        parts: pairs of reference images uint8 [r, C, H, W] and of their mirrored twins, where those count too, or
            None. Their places are counted through all parts.

    Raises:
        DitlabError: no image on a side, or images of different shapes.
    """
    count = len(images)
    if not count:
        raise DitlabError("nearest images: expected at least one image, found none")
    index = np.full(count, -1)
    mirrored = np.zeros(count, dtype=bool)
    # Squared distances of 8-bit pixels are integers below 2^53, so float64 arithmetic on them is exact.
    flat = images.reshape(count, -1).astype(np.float64)
    best, second = np.full(count, np.inf), np.full(count, np.inf)
    rows = np.arange(count)
    start = 0
    for part, twins in parts:
        if images.shape[1:] != part.shape[1:]:
            raise DitlabError(
                f"nearest images: expected images of one shape, found {list(images.shape[1:])} and "
                f"{list(part.shape[1:])}"
            )
        plain = _squares(flat, part)
        reversed_ = None if twins is None else _squares(flat, twins)
        squares = plain if reversed_ is None else np.minimum(plain, reversed_)
        order = np.argpartition(squares, min(1, squares.shape[1] - 1), axis=1)[:, :2]
        # argpartition may name any of several equally near ones; argmin names the first.
        here = squares.argmin(1)
        first = squares[rows, here]
        others = squares[rows[:, None], order].max(1) if squares.shape[1] > 1 else np.full(count, np.inf)
        nearer = first < best
        second = np.where(nearer, np.minimum(best, others), np.minimum(second, first))
        index = np.where(nearer, start + here, index)
        if reversed_ is not None:
            mirrored = np.where(nearer, reversed_[rows, here] < plain[rows, here], mirrored)
        best = np.where(nearer, first, best)
        start += len(part)
    if not start:
        raise DitlabError(f"nearest images: expected at least one image on each side, found {count} and 0")
    pixels = float(flat.shape[1])
    return Nearest(index, np.sqrt(best / pixels), np.sqrt(second / pixels), mirrored)


def _squares(flat: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Squared distances, float64 [n, r], of images [n, D] to references uint8 [r, C, H, W]."""
    part = references.reshape(len(references), -1).astype(np.float64)
    return (flat**2).sum(1)[:, None] + (part**2).sum(1)[None, :] - 2 * flat @ part.T


def _record(nearest: Nearest) -> Mapping[str, Any]:
    return {
        "index": nearest.index.tolist(),
        "first": nearest.first.tolist(),
        "second": [d if np.isfinite(d) else None for d in nearest.second.tolist()],
        "mirrored": nearest.mirrored.tolist(),
        "copies": nearest.copies,
    }
