"""The contract between sources of images and the writer of an image set.

A source yields `Item`s in the set's size and colour, and a `SkippedItem` for each image that it could not use; it never
stops at one bad image. If the whole source is unusable (a missing path, no image, unknown columns), its constructor
raises a `DitlabError` before anything is written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ditlab.data.pixels import Color, UnusableImage, centre_crop, channels, decode, planes, to_color
from ditlab.errors import DitlabError

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["TEST", "TRAIN", "CropRule", "Item", "SkippedItem", "Source", "count_kinds", "describe_skipped"]

TRAIN, TEST = 0, 1
"""Pools: an image of pool 0 may only be trained on, one of pool 1 only be tested on."""
_NAMED = 3


@dataclass(frozen=True)
class Item:
    """One image of a source.

    Attributes:
        pixels: uint8 [C, size, size].
        name: its file, relative to the source's folder, or its row or crop.
        label: its class, an index into the source's `class_names`, or None.
        pool: `TRAIN`, `TEST`, or None where a split may choose.
    """

    pixels: np.ndarray
    name: str
    label: int | None = None
    pool: int | None = None


@dataclass(frozen=True)
class SkippedItem:
    """One file or image that could not be used, and why in a few words."""

    name: str
    reason: str
    kind: str = ""
    """The group that it is counted in: a file's ending such as ".txt", or a short reason."""


def count_kinds(skipped: Iterable[SkippedItem]) -> dict[str, int]:
    """Counts skipped items by kind: first the endings of files, then the reasons; the most frequent first."""
    counts = Counter(item.kind or item.reason for item in skipped)
    return dict(sorted(counts.items(), key=lambda pair: (not pair[0].startswith("."), -pair[1], pair[0])))


def describe_skipped(kinds: Mapping[str, int], examples: Iterable[SkippedItem]) -> str:
    """Returns a list such as "7 .heic (not a readable format), 3 .txt, 2 smaller than 32x32 pixels: a.png, b.png".

    `kinds` counts the items of each kind (`count_kinds`); of a kind that is no ending at most `_NAMED` are named.
    """
    names: dict[str, list[str]] = {}
    for item in examples:
        names.setdefault(item.kind or item.reason, []).append(item.name)
    endings = [f"{count:,} {kind}" for kind, count in kinds.items() if kind.startswith(".")]
    reasons = []
    for kind, count in kinds.items():
        if not kind.startswith("."):
            listed = [*names.get(kind, [])[:_NAMED], *(["..."] if count > _NAMED else [])]
            reasons.append(f"{count:,} {kind}" + (f": {', '.join(listed)}" if listed else ""))
    return ", ".join([*endings, "; ".join(reasons)] if reasons else endings)


@dataclass(frozen=True)
class CropRule:
    """How images are brought to the set's format.

    Attributes:
        size: height and width of every image of the set, 2 to 4096 pixels.
        color: "rgb" or "grey".
        upscale: enlarge images whose short side is below `size`; otherwise they are skipped.
    """

    size: int
    color: Color = "rgb"
    upscale: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.size <= 4096:
            raise DitlabError(f"size: expected 2 to 4096 pixels, found {self.size}")
        channels(self.color)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Returns the image as uint8 [C, size, size]; raises UnusableImage where it is too small."""
        if min(image.size) < self.size and not self.upscale:
            small = f"smaller than {self.size}x{self.size}"
            raise UnusableImage(f"{image.width}x{image.height} is {small}", f"{small} pixels")
        return planes(centre_crop(to_color(image, self.color), self.size))


class Source(ABC):
    """Images, their labels and their pools, read one by one in an order that never changes."""

    rule: CropRule
    class_names: tuple[str, ...] = ()
    """Names of the classes; empty if the source has no labels."""
    count: int
    """How many images will be tried; the number that can be used may be lower."""
    left_out: tuple[SkippedItem, ...] = ()
    """Files of the source that will not be tried."""

    @abstractmethod
    def __iter__(self) -> Iterator[Item | SkippedItem]:
        """Yields every image once, or why it could not be used."""

    def read(self, file: Path | bytes, name: str, label: int | None, pool: int | None) -> Item | SkippedItem:
        """Returns the image in a file, or in its bytes, or why it cannot be used."""
        try:
            return Item(self.rule(decode(file, self.rule.color)), name, label, pool)
        except UnusableImage as error:
            return SkippedItem(name, str(error), error.kind)

    def origin(self) -> dict[str, Any]:
        """Returns what the manifest keeps about where the images come from, JSON-able."""
        return {}
