"""Attention kernels, and the choice between them.

All compute softmax(q k^T / sqrt(head_dim) + bias) v, each query over the keys that its pattern lets it see (Vaswani et
al., 1706.03762, Eq. 1, with the masks of `ditlab.nn.patterns`):

- `math` is the definition in plain operations and the reference for the others: any dtype, any transform of
  `torch.func`, any order of derivatives;
- `sdpa` is torch's own kernel, with a mask if needed;
- `tiles` (`ditlab.nn.kernels_cpu`) computes tiles of queries over the keys they reach, on the CPU;
- `flex` (`ditlab.nn.kernels_flex`) is FlexAttention with a cached block mask, on CUDA;
- `auto` is the fastest of them according to `ditlab.nn.kernel_choice`.

All except `math` are differentiable once, in reverse mode. Tokens are the grid's, in row-major order, then `extra`
off-grid tokens that see all tokens and are seen by all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ditlab.errors import DitlabError, unknown_name
from ditlab.nn.kernel_choice import TILE_DTYPES, Choice, choose_kernel, tiles_choice
from ditlab.nn.kernels_cpu import Tiling, tiled_attention
from ditlab.nn.kernels_flex import masked_flex_attention
from ditlab.nn.patterns import Global, Grid, Partition, Pattern, Window, additive

Kernel = Literal["auto", "math", "sdpa", "tiles", "flex"]

_active: str = "auto"
_masks: dict[tuple[Pattern, Grid, int, torch.device, torch.dtype], Tensor] = {}
_warned: set[str] = set()
_log = logging.getLogger("ditlab")


@contextmanager
def attention_kernel(name: str) -> Iterator[None]:
    """Selects the kernel that computes attention inside the context (process-wide; a compiled network recompiles).

    For forward-mode or second derivatives, or `torch.func.vmap`, use `with attention_kernel("math"):`.

    Args:
        name: "auto" (the default), "math", "sdpa", "tiles" or "flex". Where a kernel does not apply (tiles with a bias
            or off the CPU, flex with gradients on the CPU), `sdpa` takes its place, with one warning.

    Raises:
        DitlabError: for an unknown name.
    """
    global _active
    _check_name(name)
    before = _active
    _active = name
    try:
        yield
    finally:
        _active = before


def attention(
    q: Float[Tensor, "b heads n d"],
    k: Float[Tensor, "b heads n d"],
    v: Float[Tensor, "b heads n d"],
    pattern: Pattern,
    grid: Grid,
    *,
    bias: Float[Tensor, "heads n n"] | None = None,
    extra: int = 0,
    kernel: str | None = None,
) -> Float[Tensor, "b heads n d"]:
    """Returns attention of each query over the keys that the pattern lets it see, scaled by `head_dim ** -0.5`.

    Args:
        q, k, v: queries, keys, values `[b, heads, n, d]`; n = rows * columns + extra, the extra tokens last.
        pattern: which keys each query sees. It may be larger than the grid; queries then see the whole grid.
        grid: `(rows, columns)` of the tokens.
        bias: added to the scaled scores, before the softmax; queries by keys.
        extra: number of off-grid tokens at the end, which see all tokens and are seen by all.
        kernel: one of the names of `attention_kernel`; the active one by default.

    Returns:
        The attended values, in the dtype of `q`.

    Raises:
        DitlabError: the number of tokens does not match the grid, or the kernel is unknown.
    """
    if q.shape[-2] != grid[0] * grid[1] + extra:
        raise DitlabError(
            f"attention: expected {grid[0]}x{grid[1]} + {extra} = {grid[0] * grid[1] + extra} tokens, "
            f"found {q.shape[-2]}"
        )
    name = _active if kernel is None else kernel
    _check_name(name)
    if name == "math":
        return math_attention(q, k, v, pattern, grid, bias=bias, extra=extra)
    k, v = k.to(q.dtype), v.to(q.dtype)
    if isinstance(pattern, Partition) and bias is None and not (extra or any(n % pattern.size for n in grid)):
        return _by_window(q, k, v, pattern.size, grid, name)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    case = (pattern, grid, q.device.type, q.dtype, q.shape[-1], needs_grad, bias is not None)
    resolved, tiling = _resolve(name, *case)
    if resolved == "tiles":
        return tiled_attention(q, k, v, tiling)[0]
    run = masked_flex_attention if resolved == "flex" else sdpa_attention
    return run(q, k, v, pattern, grid, bias=bias, extra=extra)


def packed_tiling(
    pattern: Pattern, grid: Grid, *, device: torch.device, dtype: torch.dtype, head_dim: int, needs_grad: bool
) -> str | None:
    """Returns how `packed_attention` computes attention without a bias; None if another kernel is chosen."""
    if _active not in ("auto", "tiles") or isinstance(pattern, Partition):
        return None
    kernel, tiling = _resolve(_active, pattern, grid, device.type, dtype, head_dim, needs_grad, False)
    return tiling if kernel == "tiles" else None


def attention_weights(
    q: Float[Tensor, "b heads n d"],
    k: Float[Tensor, "b heads n d"],
    pattern: Pattern,
    grid: Grid,
    *,
    bias: Float[Tensor, "... n n"] | None = None,
    extra: int = 0,
) -> Float[Tensor, "b heads n n"]:
    """Returns softmax(q k^T / sqrt(head_dim) + bias): rows sum to 1 and are exactly 0 outside the pattern.

    Half precisions are computed and returned in float32. Arguments as for `attention`.
    """
    with torch.autocast(q.device.type, enabled=False):
        if q.dtype in (torch.bfloat16, torch.float16):
            q = q.float()
        scores = (q * q.shape[-1] ** -0.5) @ k.to(q.dtype).transpose(-1, -2)
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        if not pattern.covers(grid):
            scores = scores.masked_fill(~_mask(pattern, grid, extra, q.device, torch.bool), float("-inf"))
        return scores.softmax(-1)


def math_attention(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, grid: Grid, **options: Any) -> Tensor:
    """Computes the reference in plain operations, half precisions in float32. Arguments as for `attention`."""
    weights = attention_weights(q, k, pattern, grid, **options)
    with torch.autocast(q.device.type, enabled=False):
        return (weights @ v.to(weights.dtype)).to(q.dtype)


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, grid: Grid, *, bias: Tensor | None = None, extra: int = 0
) -> Tensor:
    """Computes torch's `scaled_dot_product_attention`, with a dense mask unless the pattern is global."""
    mask = None if pattern.covers(grid) else _mask(pattern, grid, extra, q.device, q.dtype)
    if bias is not None:
        mask = bias.to(q.dtype) if mask is None else bias.to(q.dtype) + mask
    width = q.shape[-1]
    # CUDA's fused kernels need head dims in multiples of 8, and the CPU's is a quarter slower at 63 than at 64. The
    # zeros change neither scores nor outputs. Up to 32 channels the copy costs more than it saves.
    padding = -width % 8 if q.is_cuda or width > 32 else 0
    if padding:
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=width**-0.5)
    return out[..., :width] if padding else out


def _resolve(
    name: str,
    pattern: Pattern,
    grid: Grid,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    needs_grad: bool,
    biased: bool,
) -> tuple[str, str]:
    """Returns the kernel that will run, and for tiles an encoded `Tiling`; warns of a fallback."""
    choice = Choice("sdpa")
    if name == "auto":
        choice = choose_kernel(pattern, grid, device=device, dtype=dtype, head_dim=head_dim, needs_grad=needs_grad)
        if choice.kernel == "tiles" and biased:
            choice = Choice("sdpa")
            if isinstance(pattern, Window):
                _warn_once(f"{pattern.name} with a bias runs as masked sdpa, since tiles take no bias")
    elif name == "tiles":
        if device == "cpu" and dtype in TILE_DTYPES and not biased and not isinstance(pattern, Partition):
            choice = tiles_choice(grid, dtype)
        else:
            _warn_once("tiles need float32 or bfloat16 on the CPU, no bias, no ragged partition; sdpa takes over")
    elif name == "flex":
        if device == "cuda" or not needs_grad:
            choice = Choice("flex")
        else:
            _warn_once("flex has no backward pass on this device; sdpa takes over")
    if not (choice.forward and choice.backward) or isinstance(pattern, Partition):
        return choice.kernel, ""
    # A window that covers the grid is global: the tiles then need no masks.
    effective = Global() if pattern.covers(grid) else pattern
    return choice.kernel, Tiling(effective, grid, choice.forward, choice.backward).encode()


# While torch compiles, the choice is executed and its result, therefore only strings, becomes a constant of the graph.
# This is torch.compiler.assume_constant_result without importing the whole compiler, which takes a second.
_resolve._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _warn_once(message: str) -> None:
    """Logs a warning about a fallback, once in each process."""
    if message not in _warned:
        _warned.add(message)
        _log.warning("attention: %s", message)


def _by_window(q: Tensor, k: Tensor, v: Tensor, size: int, grid: Grid, kernel: str) -> Tensor:
    """Computes a partition that fits the grid: global attention with each of its windows as an image."""
    batch, heads, tokens, width = q.shape
    down, across = grid[0] // size, grid[1] // size

    def cut(x: Tensor) -> Tensor:
        cells = x.reshape(batch, heads, down, size, across, size, width).permute(0, 2, 4, 1, 3, 5, 6)
        return cells.reshape(batch * down * across, heads, size * size, width)

    out = attention(cut(q), cut(k), cut(v), Global(), (size, size), kernel=kernel)
    cells = out.reshape(batch, down, across, heads, size, size, width).permute(0, 3, 1, 4, 2, 5, 6)
    return cells.reshape(batch, heads, tokens, width)


def _mask(
    pattern: Pattern, grid: Grid, extra: int, device: torch.device, dtype: torch.dtype
) -> Bool[Tensor, "n n"] | Float[Tensor, "n n"]:
    """Returns the pattern's mask, off-grid tokens included, as bool or additive; cached."""
    if torch.compiler.is_compiling():  # the graph must not hold tensors of a cache that outlives it
        return _make_mask(pattern, grid, extra, device, dtype)
    key = (pattern, grid, extra, device, dtype)
    if key not in _masks:
        _masks[key] = _make_mask(*key)
    return _masks[key]


# Made outside inference mode, even when first needed within it, because training may use the cached mask too.
@torch.inference_mode(False)
def _make_mask(pattern: Pattern, grid: Grid, extra: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    visible = F.pad(pattern.mask(grid), (0, extra, 0, extra), value=True)
    return (visible if dtype == torch.bool else additive(visible, dtype)).to(device)


def _check_name(name: str) -> None:
    if name not in get_args(Kernel):
        raise unknown_name("attention kernel", name, get_args(Kernel))


__all__ = ["Kernel", "attention", "attention_kernel", "attention_weights", "packed_tiling"]
