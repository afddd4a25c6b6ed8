"""Choice of the kernel for `auto`: by device, processor, dtype, size and whether gradients are needed.

The choice depends on these only, never on a timing at run time, so a resumed run computes the same bits. Where the best
kernel differs by processor, the processor's capabilities decide. The measurements behind each line are in
docs/attention.md (`benchmarks/local_attention.py`):

- AVX-512 with bfloat16 dot products and no tile unit (AMD Zen 4 and 5): measured by that script.
- Intel AMX (Sapphire Rapids and later): measured with other code for the same methods; to be measured again.
- Other processors: not measured. They use torch's own kernel on fewer keys, which is slower than on all keys only if
  the tiles are small.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Literal, NamedTuple

import torch

from ditlab.nn.kernels_cpu import TilePass
from ditlab.nn.patterns import Grid, Partition, Pattern, Window

Processor = Literal["amx", "avx512-bf16", "other"]
TILE_DTYPES = (torch.float32, torch.bfloat16)


class Choice(NamedTuple):
    """Name of a kernel, and for "tiles" how its two passes are computed."""

    kernel: Literal["sdpa", "tiles", "flex"]
    forward: TilePass | None = None
    backward: TilePass | None = None


_SDPA = Choice("sdpa")


def _tiles(forward: TilePass, backward: TilePass | None = None, *, worth: bool = True) -> Choice:
    """Returns the choice of tiles where they are worth it; by default both passes are computed alike."""
    return Choice("tiles", forward, backward or forward) if worth else _SDPA


@cache
def processor() -> Processor:
    """Returns the class of this machine's CPU, as far as kernels depend on it."""
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("amx_bf16"):
        return "amx"
    return "avx512-bf16" if capabilities.get("avx512_bf16") else "other"


def reached_share(pattern: Window, grid: Grid, tile: Grid) -> float:
    """Returns the mean share of all keys that a tile of queries reaches: the cost relative to full attention."""
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
    """Returns the kernel for attention without a bias.

    Args:
        pattern: which keys each query sees.
        grid: rows and columns of the tokens.
        device: "cpu", "cuda" or another device type.
        dtype: dtype of queries, keys and values.
        head_dim: channels of a head.
        needs_grad: whether a backward pass follows.
        on: the processor; that of this machine by default.
    """
    window = pattern if isinstance(pattern, Window) and not pattern.covers(grid) else None
    if device == "cuda":
        # FlexAttention skips blocks of 128 x 128 scores; with few blocks there is nothing to skip.
        return Choice("flex") if window and grid[0] * grid[1] >= 512 and dtype != torch.float64 else _SDPA
    if device != "cpu" or dtype not in TILE_DTYPES or isinstance(pattern, Partition):
        return _SDPA
    on = processor() if on is None else on
    if dtype == torch.bfloat16 and on != "other":
        if window:
            return _bfloat16_window(window, grid, needs_grad, on)
        return _bfloat16_global(grid, head_dim, needs_grad, on)
    return _same_kernel_on_fewer_keys(window, grid, dtype, on) if window else _SDPA


def tiles_choice(grid: Grid, dtype: torch.dtype) -> Choice:
    """Returns how "tiles" is computed if it was requested by name."""
    return _tiles(TilePass("plain" if dtype == torch.bfloat16 else "flash", (4, min(grid[1], 16))))


def _same_kernel_on_fewer_keys(pattern: Window, grid: Grid, dtype: torch.dtype, on: Processor) -> Choice:
    """Chooses torch's flash kernel by tiles: for float32, and for bfloat16 where plain products would be emulated."""
    tokens = grid[0] * grid[1]
    tile_pass = TilePass("flash", _flash_tile(grid, on))
    if dtype == torch.bfloat16:
        limit = 0.5 if tokens >= 512 else 0.0
    elif tokens < 100:
        limit = 0.0  # tiles of an 8 x 8 grid are too small: masked SDPA costs 1.0 to 1.1 of full attention
    else:
        limit = 0.35 if tokens < 256 else 0.65
    return _tiles(tile_pass, worth=reached_share(pattern, grid, tile_pass.tile) <= limit)


def _flash_tile(grid: Grid, on: Processor) -> Grid:
    rows, columns = grid
    if rows * columns < 256:
        return 2, columns
    if on == "amx":
        # Tiles as wide as the grid are fastest up to 32 columns; the work of a wider one grows with the width.
        return 4, columns if columns <= 32 else 16
    return 4, columns if columns <= 16 else 8


def _bfloat16_window(pattern: Window, grid: Grid, needs_grad: bool, on: Processor) -> Choice:
    tokens = grid[0] * grid[1]
    narrow = TilePass("plain", grid if tokens <= 64 else (4, grid[1] if grid[1] <= 16 else 8))
    if on == "avx512-bf16":
        return _tiles(narrow)
    flash = TilePass("flash", _flash_tile(grid, on))
    if not needs_grad:
        return _tiles(flash, worth=tokens >= 256 and reached_share(pattern, grid, flash.tile) <= 0.65)
    if tokens <= 256:
        # Here torch's bfloat16 backward pass takes 3 to 10 times as long as plain products.
        return _tiles(narrow)
    square = TilePass("plain", (8, 8))
    # On 32 x 32 tokens: up to window 9. For larger windows nothing measured is faster than the dense mask.
    return _tiles(flash, square, worth=reached_share(pattern, grid, square.tile) <= 0.22)


def _bfloat16_global(grid: Grid, head_dim: int, needs_grad: bool, on: Processor) -> Choice:
    tokens = grid[0] * grid[1]
    # Up to a million scores of one head at once: 2 MiB, which stay in the cache for the next product.
    tile = grid if tokens <= 1024 else (max(1, (1 << 20) // (tokens * grid[1])), grid[1])
    worth = needs_grad and tokens <= 256 if on == "amx" else needs_grad or head_dim >= 32
    return _tiles(TilePass("plain", tile), worth=worth)


__all__ = ["TILE_DTYPES", "Choice", "Processor", "choose_kernel", "processor", "reached_share", "tiles_choice"]
