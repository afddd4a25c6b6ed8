"""Which kernel `auto` takes: by device, processor, dtype, size and whether gradients are needed.

The choice is a function of these alone and never of a timing made on the spot, so that a resumed run computes the same
bits. Where the best kernel differs by processor, what decides is what the processor can do. The measurements behind
each line are in docs/attention.md, made by `benchmarks/local_attention.py`:

- AVX-512 with bfloat16 dot products and no tile unit (AMD Zen 4 and 5): measured by that script.
- Intel AMX (Sapphire Rapids and later): measured with other code for the same methods; to be measured again.
- Other processors: not measured. They get torch's own kernel on fewer keys, which loses to itself on all keys only
  where the pieces become small.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch

from ditlab.nn.kernels_cpu import Way
from ditlab.nn.patterns import Grid, Partition, Pattern, Window

Processor = Literal["amx", "avx512-bf16", "other"]


class Choice(NamedTuple):
    """A kernel by name, and for "strips" how its two passes are computed."""

    kernel: Literal["sdpa", "strips", "flex"]
    forward: Way | None = None
    backward: Way | None = None


@lru_cache(maxsize=1)
def processor() -> Processor:
    """The class of this machine's CPU, as far as it decides between kernels."""
    can = torch.cpu.get_capabilities()
    if can.get("amx_bf16"):
        return "amx"
    return "avx512-bf16" if can.get("avx512_bf16") else "other"


def reached(pattern: Window, grid: Grid, tile: Grid) -> float:
    """The share of all keys that a query's tile reaches, on average: what strips cost beside full attention."""
    share = 1.0
    for length, step in zip(grid, tile, strict=True):
        ranges = [(start, min(start + step, length)) for start in range(0, length, step)]
        keys = sum(
            (end - start) * (pattern.span(end - 1, length)[1] - pattern.span(start, length)[0]) for start, end in ranges
        )
        share *= keys / length**2
    return share


@lru_cache(maxsize=1024)
def choose_kernel(
    pattern: Pattern,
    grid: Grid,
    *,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    needs_grad: bool,
    on: Processor | None = None,
) -> Choice:
    """The kernel for attention without a bias.

    Args:
        pattern: which keys a query sees.
        grid: rows and columns of the tokens.
        device: "cpu", "cuda" or another device type.
        dtype: of queries, keys and values.
        head_dim: channels of a head.
        needs_grad: whether a backward pass will follow.
        on: the processor to choose for; None for this one.
    """
    tokens = grid[0] * grid[1]
    local = isinstance(pattern, Window) and not pattern.covers(grid)
    if device == "cuda":
        # FlexAttention skips blocks of 128 x 128 scores: below a few blocks there is nothing to skip.
        return Choice("flex" if local and tokens >= 512 and dtype != torch.float64 else "sdpa")
    if device != "cpu" or dtype not in (torch.float32, torch.bfloat16) or isinstance(pattern, Partition):
        return Choice("sdpa")
    on = processor() if on is None else on
    if dtype == torch.bfloat16 and on != "other":
        if local and isinstance(pattern, Window):
            return _bfloat16_window(pattern, grid, needs_grad, on)
        return _bfloat16_global(grid, head_dim, needs_grad, on)
    if not (local and isinstance(pattern, Window)):
        return Choice("sdpa")
    return _same_kernel_on_fewer_keys(pattern, grid, dtype, on)


def strips_way(grid: Grid, dtype: torch.dtype) -> Choice:
    """How "strips" is computed where it was asked for by name and `auto` would not take it."""
    way = Way("plain" if dtype == torch.bfloat16 else "flash", (4, min(grid[1], 16)))
    return Choice("strips", way, way)


def _same_kernel_on_fewer_keys(pattern: Window, grid: Grid, dtype: torch.dtype, on: Processor) -> Choice:
    """torch's flash kernel by tiles: float32 everywhere, bfloat16 where plain products would be emulated."""
    tokens = grid[0] * grid[1]
    way = Way("flash", _flash_tile(grid, on))
    if tokens < 100:
        limit = (
            0.0  # pieces of an 8 x 8 grid are too small for any gain: masked SDPA costs 1.0 to 1.1 of full attention
        )
    elif tokens < 256:
        limit = 0.35
    else:
        limit = 0.65
    if dtype == torch.bfloat16:
        limit = 0.5 if tokens >= 512 else 0.0
    return Choice("strips", way, way) if reached(pattern, grid, way.tile) <= limit else Choice("sdpa")


def _flash_tile(grid: Grid, on: Processor) -> Grid:
    rows, columns = grid
    if rows * columns < 256:
        return 2, columns
    if on == "amx":
        # Strips won up to 32 columns; a wider strip's work grows with the width, a tile's does not.
        return 4, columns if columns <= 32 else 16
    return 4, columns if columns <= 16 else 8


def _bfloat16_window(pattern: Window, grid: Grid, needs_grad: bool, on: Processor) -> Choice:
    tokens = grid[0] * grid[1]
    narrow = Way("plain", grid if tokens <= 64 else (4, grid[1] if grid[1] <= 16 else 8))
    if on == "avx512-bf16":
        return Choice("strips", narrow, narrow)
    flash = Way("flash", _flash_tile(grid, on))
    if not needs_grad:
        worth = tokens >= 256 and reached(pattern, grid, flash.tile) <= 0.65
        return Choice("strips", flash, flash) if worth else Choice("sdpa")
    if tokens <= 256:
        # torch's bfloat16 backward takes 3 to 10 times as long as plain products here.
        return Choice("strips", narrow, narrow)
    square = Way("plain", (8, 8))
    # On 32 x 32 tokens: up to window 9. Beyond it nothing measured beats the dense mask.
    return Choice("strips", flash, square) if reached(pattern, grid, square.tile) <= 0.22 else Choice("sdpa")


def _bfloat16_global(grid: Grid, head_dim: int, needs_grad: bool, on: Processor) -> Choice:
    tokens = grid[0] * grid[1]
    # Up to a million scores of one head at once: 2 MiB, which the next product still finds in the cache.
    way = Way("plain", grid if tokens <= 1024 else (max(1, (1 << 20) // (tokens * grid[1])), grid[1]))
    if on == "amx":
        worth = needs_grad and tokens <= 256
    else:
        worth = needs_grad or head_dim >= 32
    return Choice("strips", way, way) if worth else Choice("sdpa")
