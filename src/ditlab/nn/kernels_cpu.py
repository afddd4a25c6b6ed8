"""Windowed attention on a CPU: the grid of queries is cut into tiles; each attends to the rectangle of keys it reaches.

A tile of `(rows, columns)` queries under a window of radius r reaches `rows + 2r` by `columns + 2r` keys, so the work
grows with the number of tokens and not with its square. A small mask inside the rectangle makes it exact. The keys of a
tile as wide as the grid are contiguous in memory. Two engines compute a tile:

- "flash": torch's own CPU flash attention, forward and backward (Dao, 2307.08691), one call for each tile;
- "plain": matrix product, softmax, matrix product, for as many images and heads at a time as fit the cache, at least
  one head. Its backward pass recomputes the weights P; then dV = P^T dO, dP = dO V^T, dS = P * (dP - rowsum(P * dP)),
  dQ = dS K / sqrt(d), dK = dS^T Q / sqrt(d).

Global attention is the case of tiles that reach all keys, or of one tile, which needs no sums: "plain" then replaces
torch's bfloat16 kernels, which are slow for short sequences. `ditlab.nn.kernel_choice` chooses engine and tile by
processor. The operators are registered with torch, so a compiled graph contains each as one node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ditlab.nn.patterns import Global, Grid, Window

Engine = Literal["flash", "plain"]

# Bytes of scores per thread that are computed at a time. Measured: 1/4 to 2 MiB differ by a few per cent.
_CACHE = 1 << 20
# Bytes of a float32 sum over the keys of some images. The system maps larger blocks page by page at every call, and
# they exceed the cache; "plain" makes more calls for each image. Measured at 64 x 64 tokens.
_SUM_BYTES = {"flash": 1 << 23, "plain": 3 << 23}

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class TilePass:
    """How a forward or backward pass is computed: the engine, and rows and columns of queries in a tile."""

    engine: Engine
    tile: Grid

    def encode(self) -> str:
        """Returns a string: arguments of torch operators cannot be objects."""
        return f"{self.engine}:{self.tile[0]}:{self.tile[1]}"

    @staticmethod
    def decode(text: str) -> TilePass:
        """Reverses `encode`."""
        engine, rows, columns = text.split(":")
        return TilePass("flash" if engine == "flash" else "plain", (int(rows), int(columns)))


class Tile(NamedTuple):
    """A rectangle of queries, the rectangle of keys that it reaches, and the mask between them."""

    rows: slice
    columns: slice
    key_rows: slice
    key_columns: slice
    # Additive, [queries, keys + extra]; None if every query sees every key.
    mask: Tensor | None

    @property
    def shape(self) -> Grid:
        """Rows and columns of queries."""
        return self.rows.stop - self.rows.start, self.columns.stop - self.columns.start

    @property
    def key_shape(self) -> Grid:
        """Rows and columns of keys."""
        return self.key_rows.stop - self.key_rows.start, self.key_columns.stop - self.key_columns.start


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # as for the masks of ditlab.nn.kernels: training may use the cached tiles too
def make_tiles(pattern: Global | Window, grid: Grid, tile: Grid, extra: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Cuts the grid into tiles of at most `tile` queries; equal masks share one tensor.

    Args:
        pattern: which keys each query sees.
        grid: rows and columns of the tokens.
        tile: rows and columns of queries in a tile.
        extra: number of off-grid keys, which every query sees.
        dtype: dtype of the additive masks.
    """
    rows = [_reach(pattern, start, tile[0], grid[0]) for start in range(0, grid[0], tile[0])]
    columns = [_reach(pattern, start, tile[1], grid[1]) for start in range(0, grid[1], tile[1])]
    masks: dict[tuple, Tensor | None] = {}
    tiles = []
    # Down the columns, so that the keys that neighbours share stay in the cache for any width of the grid.
    for column_range, key_columns, column_mask in columns:
        for row_range, key_rows, row_mask in rows:
            rule = (*_content(row_mask), *_content(column_mask))
            if rule not in masks:
                masks[rule] = _additive(row_mask, column_mask, extra, dtype)
            tiles.append(Tile(row_range, column_range, key_rows, key_columns, masks[rule]))
    return tuple(tiles)


def _content(mask: Tensor) -> tuple[torch.Size, bytes]:
    return mask.shape, mask.numpy().tobytes()


def _reach(pattern: Global | Window, start: int, step: int, length: int) -> tuple[slice, slice, Tensor]:
    """Returns, along one axis, a range of queries, the range of keys it reaches, and the mask `[queries, keys]`."""
    end = min(start + step, length)
    if isinstance(pattern, Global):
        return slice(start, end), slice(0, length), torch.ones(end - start, length, dtype=torch.bool)
    spans = torch.tensor([pattern.span(position, length) for position in range(start, end)])
    first, last = int(spans[0, 0]), int(spans[-1, 1])
    keys = torch.arange(first, last)
    return slice(start, end), slice(first, last), (keys >= spans[:, :1]) & (keys < spans[:, 1:])


def _additive(rows: Tensor, columns: Tensor, extra: int, dtype: torch.dtype) -> Tensor | None:
    """Returns the mask of a tile from those of its axes; off-grid keys are last and visible."""
    visible = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)
    if bool(visible.all()):
        return None
    visible = F.pad(visible, (0, extra), value=True)
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, float("-inf"))


class _Tokens:
    """Queries, keys, values or gradients of some images, `[images, heads, n, d]`, read and written by tile.

    The tile None is the off-grid tokens, which see all tokens and are seen by all.
    """

    def __init__(self, x: Tensor, grid: Grid) -> None:
        tokens = grid[0] * grid[1]
        self.all = x
        self.on_grid = x[:, :, :tokens].unflatten(2, grid)
        self.off_grid = x[:, :, tokens:]
        self.width = x.shape[-1]

    def queries(self, tile: Tile | None) -> Tensor:
        if tile is None:
            return self.off_grid
        return self.on_grid[:, :, tile.rows, tile.columns].flatten(2, 3)

    def keys(self, tile: Tile | None) -> Tensor:
        if tile is None:
            return self.all
        near = self.on_grid[:, :, tile.key_rows, tile.key_columns].flatten(2, 3)
        return torch.cat((near, self.off_grid), 2) if self.off_grid.shape[2] else near

    def put_queries(self, tile: Tile | None, values: Tensor) -> None:
        values = values[..., : self.width]
        if tile is None:
            self.off_grid.copy_(values)
        else:
            self.on_grid[:, :, tile.rows, tile.columns] = values.unflatten(2, tile.shape)

    def add_keys(self, tile: Tile | None, values: Tensor) -> None:
        values = values[..., : self.width]
        if tile is None:
            self.all.add_(values)
            return
        near = tile.key_shape[0] * tile.key_shape[1]
        self.on_grid[:, :, tile.key_rows, tile.key_columns] += values[:, :, :near].unflatten(2, tile.key_shape)
        if self.off_grid.shape[2]:
            self.off_grid.add_(values[:, :, near:])


class _Job(NamedTuple):
    """What both passes need: the tiles (one is None if there are off-grid queries) and the sizes."""

    grid: Grid
    tiles: Sequence[Tile | None]
    engine: Engine
    # Number of scores of the largest tile, per image and head.
    largest: int

    @staticmethod
    def of(q: Tensor, grid: list[int], window: int, shift: bool, encoded: str) -> _Job:
        rows, columns = grid
        extra = q.shape[2] - rows * columns
        pattern = Window(window, "shift" if shift else "clip") if window else Global()
        tile_pass = TilePass.decode(encoded)
        tiles = make_tiles(pattern, (rows, columns), tile_pass.tile, extra, q.dtype)
        largest = max(t.shape[0] * t.shape[1] * (t.key_shape[0] * t.key_shape[1] + extra) for t in tiles)
        return _Job((rows, columns), (*tiles, None) if extra else tiles, tile_pass.engine, largest)

    def parts(self, q: Tensor, sums: bool = False) -> Iterator[tuple[slice, slice]]:
        """Yields ranges of images and of heads that are computed together: their scores of one tile fit `_CACHE`, and
        their sums over keys `_SUM_BYTES`."""
        images, heads = q.shape[:2]
        pairs = _CACHE * torch.get_num_threads() // (self.largest * q.element_size())
        if sums:
            pairs = min(pairs, _SUM_BYTES[self.engine] // (4 * q.shape[2] * q.shape[3]))
        step, few = max(1, pairs // heads), min(heads, max(1, pairs))
        for start in range(0, images, step):
            for head in range(0, heads, few):
                yield slice(start, min(start + step, images)), slice(head, min(head + few, heads))

    def arrange(self, x: Tensor) -> Tensor:
        """Returns tokens in the layout that the tiles read.

        The head dim is padded with zeros to a multiple of 8, because matrix products are up to 1.5 times slower at 63;
        the zeros change no product. Tokens that every tile reads as a whole are made contiguous.
        """
        padding = -x.shape[-1] % 8
        if padding:
            return F.pad(x, (0, padding))
        return x.contiguous() if self.tiles[0] is not None and self.tiles[0].key_shape == self.grid else x


def empty_tokens(q: Tensor) -> Tensor:
    """Returns an empty `[b, heads, n, d]` stored as `[b, n, heads, d]`, so that merging the heads copies nothing."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Returns softmax(q k^T * scale + mask) of `[images * heads, n, d]`."""
    return _product(q, k.transpose(1, 2), scale, mask).softmax(-1)


def _product(a: Tensor, b: Tensor, scale: float, plus: Tensor | None = None) -> Tensor:
    """Returns a b * scale + plus, for batches of matrices."""
    # With beta = 0 the first argument is not read.
    base, beta = (a.new_empty(1, 1, 1), 0) if plus is None else (plus, 1)
    return torch.baddbmm(base, a, b, beta=beta, alpha=scale)


@torch.library.custom_op(
    "ditlab::tiled_attention",
    mutates_args=(),
    # Explicit, because a type-checking wrapper of the function hides its annotations from torch.
    schema="(Tensor q, Tensor k, Tensor v, int[] grid, int window, bool shift, str forward, str backward)"
    " -> (Tensor, Tensor)",
)
def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: list[int], window: int, shift: bool, forward: str, backward: str
) -> tuple[Tensor, Tensor]:
    """Computes attention under a window, by tiles; differentiable once.

    Args:
        q, k, v: `[b, heads, n, d]`, all float32 or all bfloat16, on the CPU; n = rows * columns, then off-grid tokens.
        grid: `[rows, columns]`.
        window: odd size, or 0 for global attention.
        shift: whether windows are shifted inside at the border, instead of clipped.
        forward, backward: encoded `TilePass`es. "flash" backward needs "flash" forward.

    Returns:
        The output with the shape of `q`, and the log of the softmax's denominators `[b, heads, n]` (empty unless the
        backward pass needs it).
    """
    return compute_tiles(q, k, v, grid, window, shift, forward, backward, q.shape[-1] ** -0.5)


def compute_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: list[int],
    window: int,
    shift: bool,
    forward: str,
    backward: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Computes `tiled_attention` with scores times `scale`, as a plain function."""
    job = _Job.of(q, grid, window, shift, forward)
    out = empty_tokens(q)
    keep = TilePass.decode(backward).engine == "flash" and job.engine == "flash"
    norms = q.new_empty((*q.shape[:3], 1) if keep else (0, 0, 0, 0), dtype=torch.float32)
    for part in job.parts(q):
        q_, k_, v_ = (_Tokens(job.arrange(x[part]), job.grid) for x in (q, k, v))
        out_ = _Tokens(out[part], job.grid)
        norms_ = _Tokens(norms[part], job.grid) if keep else None
        for tile in job.tiles:
            mask = tile.mask if tile else None
            queries, keys, values = q_.queries(tile), k_.keys(tile), v_.keys(tile)
            if job.engine == "flash":
                result, norm = _flash(queries, keys, values, 0.0, False, attn_mask=mask, scale=scale)
                out_.put_queries(tile, result)
                if norms_:
                    norms_.put_queries(tile, norm[..., None])
            else:
                weights = _weights(queries.flatten(0, 1), keys.flatten(0, 1), mask, scale)
                out_.put_queries(tile, torch.bmm(weights, values.flatten(0, 1)).unflatten(0, queries.shape[:2]))
    return out, norms.squeeze(-1) if keep else norms.new_empty(0)


def empty_results(q: Tensor, forward: str, backward: str) -> tuple[Tensor, Tensor]:
    """Returns empty tensors with the shapes and memory layout of the results of `compute_tiles`."""
    keep = forward.startswith("flash") and backward.startswith("flash")
    return empty_tokens(q), q.new_empty(q.shape[:3] if keep else (0,), dtype=torch.float32)


@tiled_attention.register_fake
def _(q, k, v, grid, window, shift, forward, backward):  # pyright: ignore[reportUnusedFunction]
    return empty_results(q, forward, backward)


@torch.library.custom_op(
    "ditlab::tiled_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor norms, int[] grid, int window, bool shift,"
    " str backward) -> (Tensor, Tensor, Tensor)",
)
def tiled_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    norms: Tensor,
    grid: list[int],
    window: int,
    shift: bool,
    backward: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of `tiled_attention` with respect to q, k, v; not differentiable again.

    Args:
        grad: gradient of the output.
        out, norms: results of the forward pass; read by "flash" only.
        q, k, v, grid, window, shift, backward: as for `tiled_attention`.
    """
    gradients = empty_tokens(q), empty_tokens(q), empty_tokens(q)
    write_gradients(gradients, grad, q, k, v, out, norms, grid, window, shift, backward, q.shape[-1] ** -0.5)
    return gradients


def write_gradients(
    into: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    norms: Tensor,
    grid: list[int],
    window: int,
    shift: bool,
    backward: str,
    scale: float,
) -> None:
    """Computes `tiled_attention_backward` as a plain function; overwrites `into` with the results."""
    job = _Job.of(q, grid, window, shift, backward)
    dq, dk, dv = into
    # Several tiles reach the same key; their gradients are summed in float32, in place if the result is float32.
    alone, in_place = len(job.tiles) == 1, q.dtype == torch.float32
    for part in job.parts(q, sums=True):
        grad_, q_, k_, v_ = (_Tokens(job.arrange(x[part]), job.grid) for x in (grad, q, k, v))
        dq_ = _Tokens(dq[part], job.grid)
        sums = [] if alone else [x[part].zero_() if in_place else torch.zeros(q_.all.shape) for x in (dk, dv)]
        sums_ = [_Tokens(x, job.grid) for x in sums]
        out_, norms_ = (
            (_Tokens(job.arrange(out[part]), job.grid), _Tokens(norms[part][..., None], job.grid))
            if job.engine == "flash"
            else (None, None)
        )
        for tile in job.tiles:
            mask = tile.mask if tile else None
            g, queries, keys, values = grad_.queries(tile), q_.queries(tile), k_.keys(tile), v_.keys(tile)
            if out_ and norms_:
                norm = norms_.queries(tile)[..., 0]
                shares = _flash_backward(
                    g, queries, keys, values, out_.queries(tile), norm, 0.0, False, attn_mask=mask, scale=scale
                )
            else:
                shares = _plain_shares(g, queries, keys, values, mask, scale)
            dq_.put_queries(tile, shares[0])
            if alone:
                sums = shares[1:]
                continue
            for x, share in zip(sums_, shares[1:], strict=True):
                x.add_keys(tile, share)
        if alone or not in_place:
            dk[part], dv[part] = (x[..., : q.shape[-1]] for x in sums)


def _plain_shares(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns one tile's gradients of its queries, keys and values, by matrix products."""
    split = q.shape[:2]
    g, q, k, v = (x.flatten(0, 1) for x in (g, q, k, v))
    weights = _weights(q, k, mask, scale)
    dv = torch.bmm(weights.transpose(1, 2), g)
    # dS = P * (dP - rowsum(P * dP))
    scores = torch.ops.aten._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), weights, -1, weights.dtype)
    dq = _product(scores, k, scale)
    dk = _product(scores.transpose(1, 2), q, scale)
    return dq.unflatten(0, split), dk.unflatten(0, split), dv.unflatten(0, split)


@tiled_attention_backward.register_fake
def _(grad, q, k, v, out, norms, grid, window, shift, backward):  # pyright: ignore[reportUnusedFunction]
    return empty_tokens(q), empty_tokens(q), empty_tokens(q)


def _setup(ctx, inputs, output) -> None:
    q, k, v, ctx.grid, ctx.window, ctx.shift, _, ctx.backward = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad, _):
    q, k, v, out, norms = ctx.saved_tensors
    gradients = tiled_attention_backward(grad, q, k, v, out, norms, ctx.grid, ctx.window, ctx.shift, ctx.backward)
    return (*gradients, None, None, None, None, None)


tiled_attention.register_autograd(_gradients, setup_context=_setup)


__all__ = ["Engine", "Tile", "TilePass", "compute_tiles", "make_tiles", "tiled_attention", "write_gradients"]
