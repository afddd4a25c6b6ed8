"""The token picker: pick a token of an image, and see its attention, layer by layer and head by head.

This module makes attention maps small enough for a page; `templates/page.js` draws them. A row (the attention of one
token) is stored as 8-bit numbers relative to its largest weight, with that weight, so that even rows of weights of
1/1024 are precise; the bytes are deflated. What does not fit into the budget of bytes is left out, and the picker lists
it.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ditlab.errors import DitlabError
from ditlab.nn.patterns import Grid, Pattern

__all__ = ["BUDGET", "AttentionPicker", "PickerRun", "frame_size", "pack_map", "pack_run", "query_stride"]

BUDGET = 4_000_000
"""Bytes of all pickers on a page, in base64."""
QUERIES = 256
"""Tokens that can be picked, at most; of larger grids every second, third, ... row and column."""
_NAME = 16
"""Bytes of a map's name in JSON, with quotes and commas."""
_AROUND = 8_000
"""Bytes of a picker's controls and sentences."""


@dataclass(frozen=True, eq=False)
class PickerRun:
    """The maps of one model, packed."""

    label: str
    patterns: Mapping[int, Pattern]
    """Layer (from 1) -> which keys its tokens may see, of the layers on the page."""
    heads: int
    packed: Mapping[tuple[int, int, int], bytes]
    """(level, layer, head) -> a deflated map; levels from 0, layers and heads from 1, head 0 is the mean of all."""
    boxes: Mapping[int, str | None]
    """Layer -> for each token that can be picked the first and last row and column that it may see, as base64; None
    where it may see all."""
    left_out: tuple[str, ...] = ()
    """What the budget does not hold, in sentences."""

    @property
    def size(self) -> int:
        """The bytes on the page."""
        return sum(map(_size, self.packed.values())) + sum(map(_box_size, self.boxes.values()))


@dataclass(frozen=True, eq=False)
class AttentionPicker:
    """One image and the attention of one or several models on it.

    Raises:
        DitlabError: no model, or an image that is not uint8 [H, W, 1 or 3] with sides that the grid divides.
    """

    title: str
    image: np.ndarray
    """The clean image, uint8 [H, W, C], C 1 or 3."""
    noisy: Sequence[np.ndarray]
    """For each noise level the image as the network sees it, of the same shape."""
    levels: Sequence[str]
    """Names of the noise levels ("σ = 0.5")."""
    grid: Grid
    runs: Sequence[PickerRun]
    caption: str = ""
    notes: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        rows, columns = self.grid
        if not self.runs:
            raise DitlabError(f"attention picker '{self.title}': expected at least one model, found none")
        for image in (self.image, *self.noisy):
            fits = image.ndim == 3 and image.shape[2] in (1, 3) and image.dtype == np.uint8
            if not fits or image.shape[0] % rows or image.shape[1] % columns or image.shape != self.image.shape:
                raise DitlabError(
                    f"attention picker '{self.title}': expected images uint8 [H, W, 1 or 3] of one size that a grid of "
                    f"{rows} x {columns} tokens divides, found {image.dtype} {list(image.shape)}"
                )

    @property
    def stride(self) -> int:
        """The step between tokens that can be picked, in rows and columns."""
        return query_stride(self.grid)

    @property
    def left_out(self) -> tuple[str, ...]:
        """What this picker lacks, in sentences."""
        thinned = self.stride > 1
        first = f"Every {_ordinal(self.stride)} token of each row and column can be picked." if thinned else ""
        return (*([first] if first else []), *(sentence for run in self.runs for sentence in run.left_out))

    def payload(self, slots: Mapping[str, int]) -> dict[str, Any]:
        """Returns the data of the page's script, as JSON values; `slots` gives each label its colour."""
        return {
            "grid": list(self.grid),
            "stride": self.stride,
            "size": list(self.image.shape[:2]),
            "image": _base64(_rgb(self.image)),
            "noisy": [_base64(_rgb(image)) for image in self.noisy],
            "levels": list(self.levels),
            "runs": [
                {
                    "label": run.label,
                    "slot": slots.get(run.label),
                    "heads": run.heads,
                    "layers": [
                        {"layer": layer, "pattern": pattern.name, "boxes": run.boxes[layer]}
                        for layer, pattern in run.patterns.items()
                    ],
                    "maps": {".".join(map(str, key)): _base64(chunk) for key, chunk in run.packed.items()},
                }
                for run in self.runs
            ],
        }


def frame_size(shape: tuple[int, int], levels: int) -> int:
    """Returns the bytes on the page of a picker without its maps: its words, and images of (height, width), the clean
    one and one for each noise level."""
    return (levels + 1) * 4 * shape[0] * shape[1] + _AROUND


def query_stride(grid: Grid) -> int:
    """Returns the step between tokens of this grid that can be picked, in rows and columns."""
    return max(1, math.ceil(math.sqrt(grid[0] * grid[1] / QUERIES)))


def pack_run(
    label: str,
    patterns: Mapping[int, Pattern],
    grid: Grid,
    levels: int,
    maps: Callable[[int, int], np.ndarray],
    budget: int = BUDGET,
) -> PickerRun:
    """Packs as many of a model's attention maps as a budget holds.

    The middle level comes first: the means over heads of all layers, then their heads; then the same of the other
    levels. If not all layers of one of these fit, every second, third, ... from the last is packed.

    Args:
        label: the kind of model.
        patterns: layer (from 1) -> its pattern.
        grid: (rows, columns) of the tokens.
        levels: number of noise levels.
        maps: (level from 0, layer) -> float [heads, T, T] of one image, rows queries that sum to 1; called for one
            layer at a time, so that not all maps need to be in memory.
        budget: bytes on the page; at least one map is packed.
    """
    layers = list(patterns)
    if not layers or levels < 1:
        raise DitlabError(f"attention picker, '{label}': expected at least one layer and one noise level, found none")
    order = sorted(range(levels), key=lambda level: (abs(level - levels // 2), level))
    packed: dict[tuple[int, int, int], bytes] = {}
    missing: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    boxes = {layer: _boxes(pattern, grid) for layer, pattern in patterns.items()}
    heads, used = 0, sum(map(_box_size, boxes.values()))
    for level in order:
        means: dict[int, dict[int, bytes]] = {}
        single: dict[int, dict[int, bytes]] = {}
        for layer in layers:
            weights = np.asarray(maps(level, layer))
            heads = len(weights)
            means[layer] = {0: pack_map(weights.mean(0), grid)}
            single[layer] = {head + 1: pack_map(weights[head], grid) for head in range(heads)} if heads > 1 else {}
        for units, what in ((means, "the mean over heads"), (single, "the single heads")):
            sizes = {layer: sum(_size(chunk) for chunk in units[layer].values()) for layer in layers}
            chosen = _thin(sizes, budget - used)
            if not chosen and not packed:
                chosen = layers[-1:]  # a picker without any map would be none
            used += sum(sizes[layer] for layer in chosen)
            packed |= {(level, layer, head): chunk for layer in chosen for head, chunk in units[layer].items()}
            if len(chosen) < len(layers):
                missing.setdefault((what, tuple(sorted(chosen))), []).append(level + 1)
    shown = sorted({layer for _, layer, _ in packed})
    left_out = tuple(
        f"{label}: {what} at noise level {_listed(at)} of {levels}"
        + (f" (except of layers {_listed(chosen)})." if chosen else ".")
        for (what, chosen), at in missing.items()
    )
    boxes = {layer: boxes[layer] for layer in shown}
    return PickerRun(label, {layer: patterns[layer] for layer in shown}, heads, packed, boxes, left_out)


def pack_map(weights: np.ndarray, grid: Grid) -> bytes:
    """Returns one map [T, T] as deflated bytes; raises DitlabError if it is not of the grid's tokens.

    They are the rows of the tokens that can be picked, uint8 relative to the row's largest weight, then these largest
    weights, float32 little-endian.
    """
    tokens = grid[0] * grid[1]
    if weights.shape != (tokens, tokens):
        raise DitlabError(
            f"attention picker: expected a map of {tokens} x {tokens} tokens (grid {grid[0]} x {grid[1]}), found "
            f"{list(weights.shape)}"
        )
    rows = weights[_queries(grid)].astype(np.float32)
    largest = rows.max(1)
    scaled = np.rint(rows / np.maximum(largest, np.finfo(np.float32).tiny)[:, None] * 255).astype(np.uint8)
    return zlib.compress(scaled.tobytes() + largest.astype("<f4").tobytes(), 9)


def _queries(grid: Grid) -> np.ndarray:
    """Returns the numbers of the tokens that can be picked, row by row."""
    tokens, stride = np.arange(grid[0] * grid[1]).reshape(grid), query_stride(grid)
    return tokens[::stride, ::stride].ravel()


def _thin(sizes: Mapping[int, int], budget: int) -> list[int]:
    """Returns the layers that fit: all, or every second, third, ... from the last; or none."""
    layers = list(sizes)
    for step in range(1, len(layers) + 1):
        chosen = layers[::-1][::step]
        if sum(sizes[layer] for layer in chosen) <= budget:
            return chosen
    return []


def _boxes(pattern: Pattern, grid: Grid) -> str | None:
    """Returns the first and last row and column that each pickable token sees, base64 of bytes; None if it sees all."""
    if pattern.covers(grid):
        return None
    seen = pattern.mask(grid).numpy()[_queries(grid)].reshape(-1, *grid)
    ends = []
    for length, axis in zip(grid, (2, 1), strict=True):
        along = np.asarray(seen.any(axis=axis))
        ends += [along.argmax(1), length - 1 - np.flip(along, 1).argmax(1)]
    return _base64(np.stack(ends, 1).astype(np.uint8).tobytes())


def _rgb(image: np.ndarray) -> bytes:
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3))).tobytes()


def _size(chunk: bytes) -> int:
    """Returns the bytes of a chunk in base64, with its name."""
    return -(-len(chunk) // 3) * 4 + _NAME


def _box_size(box: str | None) -> int:
    return len(box or "") + 3 * _NAME


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _listed(numbers: Sequence[int]) -> str:
    *others, last = map(str, sorted(numbers))
    return f"{', '.join(others)} and {last}" if others else last


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")
