"""Baselines with windows: the best denoisers of the training images that are local, or local and shift-equivariant.

The local score (LS) has the least denoising error of all estimates whose value at a pixel depends on the P x P window
around it alone. The equivariant local score (ELS) has the least error of those that are also the same function at every
pixel. Both are means of the central pixel over windows m of the training images, weighted by their distance:

    D(y)_p = sum w x_m / sum w,    w = exp(-|y_window(p) - x_window(m)|^2 / 2 sigma^2),

- LS: m is the place p in every training image.
- ELS: m runs over all places of all images, with circular windows.
- bbELS (broken borders): m runs over the places where the window crosses the border exactly as at p. Zeros outside
  would cancel in the distance, so windows are cut there.

Source: Kamb and Ganguli 2024 (2412.20292); their score is (a D(y) - x_t) / b^2, with x_t = a y and sigma = b / a.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ditlab.diffusion.baselines import ByLevelDenoiser, SoftmaxMean, check_images
from ditlab.diffusion.noise_levels import LevelRange
from ditlab.diffusion.short_repr import ShortRepr
from ditlab.errors import DitlabError

__all__ = ["Border", "EquivariantLocalScoreDenoiser", "LocalScoreDenoiser", "WindowSchedule"]

Border = Literal["circular", "broken"]


@dataclass(frozen=True, repr=False)
class WindowSchedule(ShortRepr):
    """The side P of the window at each noise level (Kamb and Ganguli's scales k(t))."""

    levels: tuple[float, ...]
    """Noise levels sigma, ascending; a level between two of them has the size of the nearer one by ratio."""
    sizes: tuple[int, ...]
    """Odd sides in pixels, one for each level."""

    def __post_init__(self) -> None:
        if not self.levels or len(self.levels) != len(self.sizes) or min(self.levels) <= 0:
            raise DitlabError(
                f"window schedule: expected one size for each of at least one positive level, found "
                f"{len(self.levels)} levels and {len(self.sizes)} sizes"
            )
        if any(b <= a for a, b in zip(self.levels, self.levels[1:], strict=False)):
            raise DitlabError("window schedule: expected ascending levels without repeats, found others")
        for size in self.sizes:
            if size < 1 or size % 2 == 0:
                raise DitlabError(f"window: expected an odd size (1, 3, 5, ...), found {size}")

    @classmethod
    def of(cls, window: int | WindowSchedule) -> WindowSchedule:
        """Returns a schedule, also from a single size for all levels."""
        return window if isinstance(window, WindowSchedule) else cls((1.0,), (window,))

    def at(self, sigma: float) -> int:
        """Returns the side at a level."""
        nearest = min(range(len(self.levels)), key=lambda i: abs(math.log(sigma / self.levels[i])))
        return self.sizes[nearest]


class _LocalDenoiser(ByLevelDenoiser):
    """Base of LS, ELS and bbELS."""

    def __init__(self, what: str, images: Tensor, window: int | WindowSchedule, chunk: int | None) -> None:
        check_images(what, images, chunk)
        self.images, self.windows, self.chunk = images, WindowSchedule.of(window), chunk
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        self.levels = LevelRange(0.0, math.inf)
        self.device = images.device

    @property
    def identity(self) -> dict[str, Any]:
        return super().identity | {"windows": [list(self.windows.levels), list(self.windows.sizes)]}


class LocalScoreDenoiser(_LocalDenoiser):
    """LS: each pixel is the mean of that pixel over the images, weighted by their distance in the window around it.

    Windows are cut at the border. One of at least 2 max(H, W) - 1 pixels covers the whole image from every pixel, which
    is empirical Bayes. Time and memory grow with N H W for any window: distances are window sums of one map of squares.

    Args:
        images: [N, C, H, W] in [-1, 1]; they stay on their device, and y has to be on it too.
        window: side of the window in pixels, odd; one for all levels, or a schedule.
        chunk: number of images processed at a time; it limits the memory and does not change the result.
    """

    def __init__(self, images: Float[Tensor, "n c h w"], window: int | WindowSchedule, chunk: int = 64) -> None:
        super().__init__("local-score", images, window, chunk)

    def _x0(self, y: Tensor, sigma: float) -> Tensor:
        radius = self.windows.at(sigma) // 2
        rows, columns = (_band(side, radius).to(y) for side in self.shape[1:])
        mean = SoftmaxMean()
        for part in self.images.split(self.chunk or len(self.images)):
            images = part.to(y.dtype)
            squares = (y[:, None] - images).square().sum(2)
            logits = (rows @ squares @ columns) * (-0.5 / sigma**2)
            mean.add(logits.permute(2, 3, 0, 1), images.permute(2, 3, 0, 1))
        return mean.result().permute(2, 3, 0, 1)


class EquivariantLocalScoreDenoiser(_LocalDenoiser):
    """ELS and bbELS: each pixel is a mean of the images' pixels, weighted by the distance of the windows around them.

    With circular windows an image costs 2 N (H W)^2 (C P^2 + 1) operations and N (H W)^2 exponentials; with gradients
    all these weights stay in memory. Products are float64 if y is float64, or if float32 rounding could change a logit
    by 1e-3 (small levels, large windows); else float32. Sums are always float64.

    Args:
        images: [N, C, H, W] in [-1, 1]; they stay on their device, and y has to be on it too.
        window: side of the window in pixels, odd; one for all levels, or a schedule. For ELS at most H and W.
        border: "circular" (ELS) or "broken" (bbELS).
        chunk: number of images processed at a time; by default at most 4 million distances (on a GPU 256 million) are
            in memory. It does not change the result.
    """

    def __init__(
        self,
        images: Float[Tensor, "n c h w"],
        window: int | WindowSchedule,
        border: Border = "circular",
        chunk: int | None = None,
    ) -> None:
        super().__init__("equivariant local-score", images, window, chunk)
        self.border: Border = border
        side = min(self.shape[1:])
        if border == "circular" and max(self.windows.sizes) > side:
            raise DitlabError(
                f"equivariant local-score denoiser: expected circular windows of at most {side} pixels, the side of "
                f"the images, found {max(self.windows.sizes)}"
            )

    @property
    def identity(self) -> dict[str, Any]:
        return super().identity | {"border": self.border}

    def _x0(self, y: Tensor, sigma: float) -> Tensor:
        pairs = (self.shape[1] * self.shape[2]) ** 2
        room = (_GPU_ENTRIES if y.is_cuda else _CPU_ENTRIES) // pairs
        return torch.cat([self._block(part, sigma, room) for part in y.split(min(len(y), max(1, room)))])

    def _block(self, y: Tensor, sigma: float, room: int) -> Tensor:
        """Returns the estimates of a few images; the distances of `room` pairs of images fit into memory."""
        size = self.windows.at(sigma)
        values = self.shape[0] * size**2
        rounding = torch.finfo(torch.float32).eps * values * (1 + sigma) / sigma**2
        dtype = torch.float64 if rounding > _ROUNDING else y.dtype
        groups = [(rows.to(y.device), columns.to(y.device)) for rows, columns in self._groups(size)]
        # The logits up to a constant of all places, (<y, x> - |x|^2 / 2) / sigma^2, as one product.
        windows = self._windows(y.to(dtype), size)
        queries = [torch.cat([q, torch.ones_like(q[..., :1])], -1) / sigma**2 for q in _gather(windows, groups)]
        means = [SoftmaxMean() for _ in groups]
        for part in self.images.split(self.chunk or max(1, room // len(y))):
            images = part.to(dtype)
            keys = _gather(self._windows(images, size), groups)
            centres = _gather(images[..., None, None], groups)
            for mean, query, key, value in zip(means, queries, keys, centres, strict=True):
                offsets = key.square().sum(-1, keepdim=True) * -0.5
                mean.add(query @ torch.cat([key, offsets], -1).mT, value)
        return _scatter([mean.result() for mean in means], groups, y.shape)

    def _windows(self, images: Tensor, size: int) -> Tensor:
        """Returns the window around each pixel, a view [B, C, H, W, P, P]."""
        pad, mode = size // 2, "circular" if self.border == "circular" else "constant"
        padded = torch.nn.functional.pad(images, (pad,) * 4, mode=mode) if pad else images
        return padded.unfold(2, size, 1).unfold(3, size, 1)

    def _groups(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields rows and columns, int64 [G, S], of G sets of S places, which are compared within each set."""
        height, width = self.shape[1:]
        if self.border == "circular":
            along = [[list(range(height))], [list(range(width))]]
        else:
            along = [_same_border(height, size // 2), _same_border(width, size // 2)]
        # Sets of equal size are processed together.
        by_size: dict[tuple[int, int], list[list[tuple[int, int]]]] = defaultdict(list)
        for rows, columns in product(*along):
            by_size[len(rows), len(columns)].append(list(product(rows, columns)))
        for sets in by_size.values():
            places = torch.tensor(sets)
            yield places[..., 0], places[..., 1]


_CPU_ENTRIES, _GPU_ENTRIES = 2**22, 2**28
"""Distances in memory at once: on a CPU they fit its caches, on a GPU they keep it busy."""
_ROUNDING = 1e-3
"""Largest change of a logit by float32 rounding; above it products are float64."""


def _band(side: int, radius: int) -> Tensor:
    """Returns [side, side]: 1 for places at most `radius` apart. Its product with a vector sums over windows."""
    places = torch.arange(side)
    return ((places[:, None] - places).abs() <= radius).double()


def _same_border(side: int, radius: int) -> list[list[int]]:
    """Returns the places along a side, grouped by how far their window crosses each end."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place in range(side):
        groups[max(0, radius - place), max(0, place + radius - side + 1)].append(place)
    return list(groups.values())


def _gather(windows: Tensor, groups: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Returns windows [B, C, H, W, P, P] at the places of each group, [G, B S, C P P]."""
    parts = []
    for rows, columns in groups:
        chosen = windows[:, :, rows, columns].permute(2, 0, 3, 1, 4, 5)
        parts.append(chosen.reshape(len(rows), -1, chosen.shape[3:].numel()))
    return parts


def _scatter(parts: list[Tensor], groups: list[tuple[Tensor, Tensor]], shape: torch.Size) -> Tensor:
    """Returns images [B, C, H, W] from their values [G, B S, C] at the places of each group."""
    batch, channels, height, width = shape
    flat = [
        part.reshape(len(rows), batch, -1, channels).permute(1, 3, 0, 2).flatten(2)
        for part, (rows, _) in zip(parts, groups, strict=True)
    ]
    places = torch.cat([(rows * width + columns).flatten() for rows, columns in groups])
    return torch.cat(flat, -1)[..., places.argsort()].reshape(batch, channels, height, width)
