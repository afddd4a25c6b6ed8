"""Windowed attention on CUDA: torch's FlexAttention, which skips blocks of scores that the pattern masks entirely.

Source: Dong et al., "Flex Attention" (2412.05496). Small tables with one entry for each token say which keys a query
sees, so all patterns on one grid share one compiled kernel. `prepare_flex` makes the block mask of a pattern once, when
a layer moves to its device: it must exist before a graph is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from torch import Tensor

from ditlab.nn.patterns import Grid, Pattern

# torch.nn.attention.flex_attention imports the compiler, which takes over a second: hence inside functions only.
_block_masks: dict[tuple[Pattern, Grid, int, str], Any] = {}


def prepare_flex(pattern: Pattern, grid: Grid, extra: int, device: torch.device) -> Any | None:
    """Returns the block mask of a pattern, made at the first call; None if every token sees every token."""
    if pattern.covers(grid):
        return None
    key = (pattern, grid, extra, str(device))
    if key not in _block_masks:
        from torch.nn.attention.flex_attention import create_block_mask

        tokens = grid[0] * grid[1] + extra
        rule = _rule(pattern, grid, extra, device)
        _block_masks[key] = create_block_mask(rule, None, None, tokens, tokens, device=str(device))
    return _block_masks[key]


def masked_flex_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, grid: Grid, *, bias: Tensor | None = None, extra: int = 0
) -> Tensor:
    """Computes compiled FlexAttention with the pattern's block mask. Arguments as for `ditlab.nn.kernels.attention`."""
    from torch.nn.attention.flex_attention import flex_attention

    mask = prepare_flex(pattern, grid, extra, q.device)
    width = q.shape[-1]
    # The kernel needs aligned head dims of at least 16.
    padded = max(16, width + -width % 8)
    if padded != width:
        q, k, v = (F.pad(x, (0, padded - width)) for x in (q, k, v))
    modify = None if bias is None else _add_bias(bias)
    kernel = flex_attention if torch.compiler.is_compiling() else _compiled()
    out = kernel(q, k, v, score_mod=modify, block_mask=mask, scale=width**-0.5)
    return out[..., :width]  # pyright: ignore[reportIndexIssue, reportReturnType, reportCallIssue, reportArgumentType]


@cache
def _compiled() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _add_bias(bias: Tensor) -> Callable:
    @no_type_check
    def modify(score: Tensor, image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[head, query, key]

    return modify


def _rule(pattern: Pattern, grid: Grid, extra: int, device: torch.device) -> Callable:
    """Returns the pattern as FlexAttention's predicate of (image, head, query, key)."""
    row_of, column_of = (
        F.pad(axis.flatten(), (0, extra), value=-1).to(device)
        for axis in torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    )
    rows, columns = (pattern.spans(length, range(length)) for length in grid)
    # An off-grid query sees the whole grid, so its range is the whole axis.
    (first_row, end_row), (first_column, end_column) = (
        [F.pad(spans[:, side], (0, extra), value=side * length).to(device) for side in range(2)]
        for spans, length in ((rows.repeat_interleave(grid[1], 0), grid[0]), (columns.repeat(grid[0], 1), grid[1]))
    )

    # FlexAttention counts arguments to tell masks from score functions; a type-checking wrapper would hide them.
    @no_type_check
    def sees(image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row, column = row_of[key], column_of[key]
        in_rows = (row >= first_row[query]) & (row < end_row[query])
        in_columns = (column >= first_column[query]) & (column < end_column[query])
        return (in_rows & in_columns) | (row < 0)

    return sees


__all__ = ["masked_flex_attention", "prepare_flex"]
