"""Attention patterns: which keys each query token sees.

A pattern defines its rule once, as a boolean matrix `mask(grid)`, with which every kernel (`ditlab.nn.kernels`) must
agree. Tokens are the cells of a grid of `(rows, columns)`, in row-major order.

Sources: An et al., "On Inductive Biases That Enable Generalization of Diffusion Transformers" (2410.21273, Fig. 5b) for
the clipped window; Hassani et al., "Neighborhood Attention Transformer" (2204.07143) for the shifted one; Liu et al.,
"Swin Transformer" (2103.14030) and Hatamizadeh et al., "DiffiT" (2312.02139) for the partition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from ditlab.errors import DitlabError, unknown_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Grid = tuple[int, int]
Border = Literal["clip", "shift"]


class _Rule:
    """Base of the patterns: a query sees a range of rows and a range of columns, functions of its own position."""

    def span(self, position: int, length: int) -> tuple[int, int]:
        """Returns the range `[start, end)` of cells that a position sees along an axis of `length` cells."""
        raise NotImplementedError

    def spans(self, length: int, positions: range) -> Tensor:
        """Returns the `span` of each position, `[positions, 2]`."""
        import torch

        return torch.tensor([self.span(position, length) for position in positions])

    def axis_mask(self, length: int, queries: range, keys: range) -> Tensor:
        """Returns which of the keys each query sees along one axis, `[queries, keys]`."""
        import torch

        start, end = self.spans(length, queries)[:, :, None].unbind(1)
        positions = torch.arange(keys.start, keys.stop)
        return (positions >= start) & (positions < end)

    def covers(self, grid: Grid) -> bool:
        """Whether every token sees every token on this grid: the outermost tokens see all."""
        return all(self.span(0, length) == (0, length) == self.span(length - 1, length) for length in grid)

    def mask(self, grid: Grid) -> Tensor:
        """Returns a matrix `[rows * columns, rows * columns]` whose entry `[i, j]` says whether query i sees key j.

        A pattern larger than the grid is allowed here and sees the whole grid.
        """
        return combine_axes(*(self.axis_mask(length, range(length), range(length)) for length in grid))


@dataclass(frozen=True)
class Global(_Rule):
    """Every token sees every token."""

    name: ClassVar[str] = "global"
    """Name in tables and figures."""

    def span(self, position: int, length: int) -> tuple[int, int]:
        """Returns the whole axis."""
        return 0, length


@dataclass(frozen=True)
class Window(_Rule):
    """A token sees the tokens of a `size` x `size` square around it (An et al. Fig. 5b).

    Raises:
        DitlabError: for a size that is even or below 1 (a square with a centre has an odd side), or an unknown border.
    """

    size: int
    # Where the square exceeds the grid, "clip" drops the outside (An et al.: fewer keys at borders) and "shift" moves
    # the square inwards until it fits (NATTEN: always size * size keys).
    border: Border = "clip"

    def __post_init__(self) -> None:
        if self.size < 1 or self.size % 2 == 0:
            raise DitlabError(f"attention window: expected an odd size (3, 5, 7, ...), found {self.size}")
        if self.border not in get_args(Border):
            raise unknown_name("window border", self.border, get_args(Border))

    @property
    def name(self) -> str:
        """Name in tables and figures."""
        return f"window {self.size}" + (" shifted" if self.border == "shift" else "")

    def span(self, position: int, length: int) -> tuple[int, int]:
        """Returns the square's side around the position, clipped or shifted at the ends of the axis."""
        radius = self.size // 2
        if self.border == "clip":
            return max(0, position - radius), min(length, position + radius + 1)
        size = min(self.size, length)
        start = min(max(position - radius, 0), length - size)
        return start, start + size


@dataclass(frozen=True)
class Partition(_Rule):
    """Non-overlapping `size` x `size` windows from the top left corner; a token sees its own window (Swin, DiffiT).

    Windows at the far borders are smaller if `size` does not divide the grid.

    Raises:
        DitlabError: for a size below 1.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise DitlabError(f"attention partition: expected a size of at least 1, found {self.size}")

    @property
    def name(self) -> str:
        """Name in tables and figures."""
        return f"partition {self.size}"

    def span(self, position: int, length: int) -> tuple[int, int]:
        """Returns the position's window."""
        start = position // self.size * self.size
        return start, min(start + self.size, length)


Pattern = Global | Window | Partition


def check_fits(pattern: Pattern, grid: Grid) -> None:
    """Refuses a pattern whose side is larger than the longer side of the grid: in a network's plan it is a mistake."""
    if not isinstance(pattern, Global) and pattern.size > max(grid):
        raise DitlabError(
            f"attention {pattern.name}: expected a size of at most {max(grid)} on a grid of "
            f"{grid[0]}x{grid[1]} tokens, found {pattern.size}"
        )


def combine_axes(rows: Tensor, columns: Tensor) -> Tensor:
    """Returns the mask `[queries, keys]` of a rectangle from those of its rows and of its columns: both must hold."""
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a boolean mask as numbers to add to the scores: 0 where it is true, else minus infinity."""
    import torch

    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, float("-inf"))


__all__ = ["Border", "Global", "Grid", "Partition", "Pattern", "Window", "additive", "check_fits", "combine_axes"]
