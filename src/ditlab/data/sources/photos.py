"""The built-in photographs: crops of the colour photographs inside the scikit-image and scikit-learn wheels.

Nothing is downloaded. Each photograph is cut into blocks, and every fourth block or so is a test region (pool 1), the
others train regions (pool 0), so that both sides hold pieces of every photograph. A crop is kept only where all its
source pixels are in regions of one pool: no train and test crop share a pixel, at whatever scale they were taken.

`motorcycle_right.png` is left out on purpose: it is the other eye's view of `motorcycle_left.png` and would bring
test regions into the train pool. Attributions are in docs/data.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ditlab.data.pixels import decode, planes
from ditlab.data.sources.base import TEST, TRAIN, CropRule, Item, SkippedItem, Source
from ditlab.errors import DitlabError

__all__ = ["PHOTOGRAPHS", "Crop", "Photos", "default_scales", "find_crops", "region_map"]

PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}
"""Name -> (package, path inside it)."""


@dataclass(frozen=True)
class Crop:
    """The place of a crop in its photograph: `side` x `side` source pixels at (`top`, `left`), of one pool."""

    top: int
    left: int
    side: int
    factor: int
    pool: int


def default_scales(size: int) -> tuple[int, ...]:
    """Returns the reduction factors for a crop size, by which a crop shows 32 to 64 source pixels."""
    fine = max(1, 32 // size)
    return (fine, 2 * fine) if size <= 32 else (fine,)


def region_map(height: int, width: int, block: int, phase: int) -> np.ndarray:
    """Returns the pool of every pixel of a photograph: uint8 [height, width] of `TRAIN` and `TEST`.

    The photograph is divided evenly into blocks of at least `block` pixels. In a row of blocks every fourth is a test
    block, the next row's shifted by two, so that test regions are spread over the picture and touch only at corners.

    `phase` is the first test block of the first row, which differs between photographs.
    """
    rows, columns = max(1, height // block), max(1, width // block)
    row_of = np.arange(height) * rows // height
    column_of = np.arange(width) * columns // width
    # A picture less than four blocks wide would miss some phases in every row.
    period = min(4, max(2, columns))
    is_test = (2 * row_of[:, None] + column_of[None, :]) % period == phase % period
    if rows * columns < 2:
        is_test[:] = False
    return np.where(is_test, TEST, TRAIN).astype(np.uint8)


def find_crops(pools: np.ndarray, size: int, stride: int, factors: tuple[int, ...]) -> list[Crop]:
    """Returns every crop whose source pixels are all of one pool, finest scale first, row by row.

    `pools` is a `region_map`; size and stride are those after reduction, where `factor` source pixels become one.
    """
    height, width = pools.shape
    # Summed-area table: the number of test pixels in any rectangle from four look-ups.
    table = np.zeros((height + 1, width + 1), np.int64)
    table[1:, 1:] = (pools == TEST).cumsum(0).cumsum(1)
    crops = []
    for factor in factors:
        side, step = size * factor, stride * factor
        for top in range(0, height - side + 1, step):
            for left in range(0, width - side + 1, step):
                bottom, right = top + side, left + side
                inside = table[bottom, right] - table[top, right] - table[bottom, left] + table[top, left]
                if inside in (0, side * side):
                    crops.append(Crop(top, left, side, factor, TEST if inside else TRAIN))
    return crops


class Photos(Source):
    """Crops of the built-in photographs; the class of a crop is the photograph it comes from.

    Args:
        stride: step between neighbouring crops, in crop pixels; half the size if None.
        scales: reduction factors; `default_scales` if None.
        flat: crops whose grey values have a standard deviation below this (0-255) are left out: plain sky and
            plain background are near-duplicates of one another.
    """

    def __init__(
        self, rule: CropRule, *, stride: int | None = None, scales: tuple[int, ...] | None = None, flat: float = 8.0
    ) -> None:
        self.rule = rule
        self.stride = max(1, rule.size // 2) if stride is None else stride
        self.scales = default_scales(rule.size) if scales is None else scales
        self.flat = flat
        if self.stride < 1:
            raise DitlabError(f"photos: expected a stride of at least 1, found {self.stride}")
        if not self.scales or min(self.scales) < 1:
            raise DitlabError(f"photos: expected scales of at least 1, found {list(self.scales)}")
        self.class_names = tuple(PHOTOGRAPHS)
        self.paths = {name: _path(*where) for name, where in PHOTOGRAPHS.items()}
        # Blocks of twice the largest crop, so that a test block holds several crops in each direction.
        self.block = 2 * rule.size * max(self.scales)
        self.crops: list[tuple[str, Crop, np.ndarray]] = []
        self.flat_dropped = 0
        for index, name in enumerate(PHOTOGRAPHS):
            self._cut(index, name)
        self.count = len(self.crops)
        if not any(crop.pool == TEST for _, crop, _ in self.crops):
            raise DitlabError(
                f"photos: no test crop of {rule.size}x{rule.size} at scale {max(self.scales)} fits the photographs; "
                "choose a smaller size or smaller scales"
            )

    def _cut(self, index: int, name: str) -> None:
        photograph = decode(self.paths[name], self.rule.color)
        regions = region_map(photograph.height, photograph.width, self.block, index)
        # Box reduction on the grid of the crops: a reduced pixel never mixes source pixels from two crops' borders.
        reduced = {factor: planes(photograph.reduce(factor)) for factor in self.scales}
        for crop in find_crops(regions, self.rule.size, self.stride, self.scales):
            top, left = crop.top // crop.factor, crop.left // crop.factor
            pixels = reduced[crop.factor][:, top : top + self.rule.size, left : left + self.rule.size]
            if pixels.mean(axis=0).std() < self.flat:
                self.flat_dropped += 1
            else:
                self.crops.append((name, crop, pixels))

    def __iter__(self) -> Iterator[Item | SkippedItem]:
        for name, crop, pixels in self.crops:
            where = f"{name} {crop.side}x{crop.side}+{crop.left}+{crop.top}"
            yield Item(pixels, where, self.class_names.index(name), crop.pool)

    def origin(self) -> dict[str, Any]:
        """Returns the photographs with their hashes, and how the crops were taken."""
        files = {
            name: {"file": "/".join(PHOTOGRAPHS[name]), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            for name, path in self.paths.items()
        }
        cut = {"stride": self.stride, "scales": list(self.scales), "block": self.block, "flat": self.flat}
        return {"photographs": files, **cut, "flat_dropped": self.flat_dropped}


def _path(package: str, inside: str) -> Path:
    # find_spec locates the wheel without importing it: neither package is needed to read its pictures.
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise DitlabError(f"photos: the package {package}, which holds some of the photographs, is not installed")
    path = Path(spec.origin).parent / inside
    if not path.is_file():
        raise DitlabError(f"photos: expected {inside} inside the installed package {package}, found no such file")
    return path
