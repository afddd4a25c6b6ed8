"""Attention patterns: which keys each query token sees.

A pattern defines its rule once, as a boolean matrix `mask(grid)`, with which every kernel (`ditlab.nn.kernels`) must
agree. Tokens are the cells of a grid of `(rows, columns)`, in row-major order.

Sources: An et al., "On Inductive Biases That Enable Generalization of Diffusion Transformers" (2410.21273, Fig. 5b) for
the clipped window; Hassani et al., "Neighborhood Attention Transformer" (2204.07143) for the shifted one; Liu et al.,
"Swin Transformer" (2103.14030) and Hatamizadeh et al., "DiffiT" (2312.02139) for the partition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from ditlab.errors import DitlabError, unknown_name

if TYPE_CHECKING:
    from torch import Tensor

Grid = tuple[int, int]
Border = Literal["clip", "shift"]


@dataclass(frozen=True)
class Global:
    """Every token sees every token."""

    @property
    def name(self) -> str:
        """Name in tables and figures."""
        return "global"

    def covers(self, grid: Grid) -> bool:
        """Whether every token sees every token on this grid: always true."""
        return True

    def mask(self, grid: Grid) -> Tensor:
        """Returns an all-true matrix `[rows * columns, rows * columns]`."""
        import torch

        tokens = grid[0] * grid[1]
        return torch.ones(tokens, tokens, dtype=torch.bool)


@dataclass(frozen=True)
class Window:
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
        """Returns the range `[start, end)` of cells that a position sees along an axis of `length` cells."""
        radius = self.size // 2
        if self.border == "clip":
            return max(0, position - radius), min(length, position + radius + 1)
        size = min(self.size, length)
        start = min(max(position - radius, 0), length - size)
        return start, start + size

    def covers(self, grid: Grid) -> bool:
        """Whether every token sees every token on this grid: the outermost tokens see all."""
        return all(self.span(0, length) == (0, length) == self.span(length - 1, length) for length in grid)

    def mask(self, grid: Grid) -> Tensor:
        """Returns a matrix whose entry `[i, j]` says whether query i sees key j; the axes are independent.

        Args:
            grid: `(rows, columns)`. A window larger than the grid is allowed here and sees the whole grid.
        """
        rows, columns = (_axis_mask(self, length) for length in grid)
        return _of_axes(rows, columns)


@dataclass(frozen=True)
class Partition:
    """Non-overlapping `size` x `size` windows from the top left corner; a token sees its own window (Swin, DiffiT).

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

    def covers(self, grid: Grid) -> bool:
        """Whether there is only one window on this grid."""
        return self.size >= max(grid)

    def mask(self, grid: Grid) -> Tensor:
        """Returns a matrix whose entry `[i, j]` says whether query i sees key j.

        Args:
            grid: `(rows, columns)`. Windows at the far borders are smaller if `size` does not divide them.
        """
        import torch

        rows, columns = (torch.arange(length) // self.size for length in grid)
        return _of_axes(rows[:, None] == rows[None], columns[:, None] == columns[None])


Pattern = Global | Window | Partition


def check_fits(pattern: Pattern, grid: Grid) -> None:
    """Refuses a pattern that is larger than its grid.

    Kernels accept such patterns; in a network's plan they are a mistake.

    Raises:
        DitlabError: the side of the window or partition is larger than the longer side of the grid.
    """
    if not isinstance(pattern, Global) and pattern.size > max(grid):
        raise DitlabError(
            f"attention {pattern.name}: expected a size of at most {max(grid)} on a grid of "
            f"{grid[0]}x{grid[1]} tokens, found {pattern.size}"
        )


def _axis_mask(window: Window, length: int) -> Tensor:
    """Returns which positions see which along one axis."""
    import torch

    spans = [window.span(position, length) for position in range(length)]
    start, end = torch.tensor(spans).unbind(1)
    other = torch.arange(length)
    return (other >= start[:, None]) & (other < end[:, None])


def _of_axes(rows: Tensor, columns: Tensor) -> Tensor:
    """Returns the mask over the grid's tokens for which both the row rule and the column rule hold."""
    tokens = rows.shape[0] * columns.shape[0]
    return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(tokens, tokens)


__all__ = ["Border", "Global", "Grid", "Partition", "Pattern", "Window", "check_fits"]
