"""What a source of images is: the small contract between those who read images and the one who writes the set.

A source yields `Item`s already fitted to the set's size and colour, and `Skipped` records for what it could not use;
it never stops at one bad image. What makes the whole source unusable (a missing path, no image at all, unknown columns)
is a `DitlabError` from its constructor, before anything is written.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ditlab.data.pixels import Color, centre_crop, planes, to_color
from ditlab.errors import DitlabError

if TYPE_CHECKING:
    from PIL import Image

TRAIN, TEST = 0, 1
"""Pools: an image of pool 0 may only be trained on, one of pool 1 only be tested on."""


@dataclass(frozen=True)
class Item:
    """One image of a source.

    Attributes:
        pixels: uint8 [C, size, size].
        name: where it comes from, for messages.
        label: its class, an index into the source's `class_names`, or None.
        pool: `TRAIN`, `TEST`, or None where the split is free to choose.
    """

    pixels: np.ndarray
    name: str
    label: int | None = None
    pool: int | None = None


@dataclass(frozen=True)
class Skipped:
    """One image that could not be used.

    Attributes:
        name: the file or index.
        reason: why, in a few words.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Fit:
    """How images are brought to the set's format.

    Attributes:
        size: height and width of every image of the set, in pixels.
        color: "rgb" or "grey".
        upscale: enlarge images whose short side is below `size`; otherwise they are skipped.
    """

    size: int
    color: Color = "rgb"
    upscale: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.size <= 4096:
            raise DitlabError(f"size: expected 2 to 4096 pixels, found {self.size}")
        if self.color not in ("rgb", "grey"):
            raise DitlabError(f"color: expected 'rgb' or 'grey', found {self.color!r}")

    def __call__(self, image: Image.Image) -> np.ndarray:
        """The image as uint8 [C, size, size].

        Raises:
            DitlabError: it is smaller than `size` and `upscale` is off.
        """
        if min(image.size) < self.size and not self.upscale:
            raise DitlabError(f"{image.width}x{image.height} is smaller than {self.size}x{self.size}")
        return planes(centre_crop(to_color(image, self.color), self.size))


class Source(ABC):
    """Images, their labels and their pools, read one by one in an order that never changes."""

    fit: Fit
    class_names: tuple[str, ...] = ()
    """Names of the classes; empty where the source has no labels."""
    count: int
    """How many images will be tried; the number that can be used may be lower."""

    @abstractmethod
    def __iter__(self) -> Iterator[Item | Skipped]:
        """Every image once, or what was wrong with it."""

    def origin(self) -> dict[str, Any]:
        """What the manifest should remember about where the images come from, JSON-able."""
        return {}
