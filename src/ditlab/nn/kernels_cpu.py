"""Windowed attention on a CPU: the grid of queries is cut in tiles, each attends to the rectangle of keys it reaches.

A tile of `(rows, columns)` queries under a window of radius r reaches `rows + 2r` by `columns + 2r` keys, so the work
grows with the number of tokens and not with its square; a small mask inside the rectangle makes it exact. A tile as
wide as the grid is a strip, whose keys lie together in memory. Two engines compute a tile:

- "flash": torch's own CPU flash attention, forward and backward (Dao, 2307.08691), one call a tile;
- "plain": matrix product, softmax, matrix product, for as many images and heads at a time as the cache holds, one head
  at least. Its backward makes the weights P anew and takes dV = P^T dO, dP = dO V^T, dS = P * (dP - rowsum(P * dP)),
  dQ = dS K / sqrt(d), dK = dS^T Q / sqrt(d).

Global attention is the case of tiles that reach everything, or of one tile, which needs no sums: "plain" then stands in
for torch's bfloat16 kernels, which are slow at short sequences. Which engine and tile serve which processor,
`ditlab.nn.kernel_choice` says. The operators are registered with torch, so that a compiled graph holds each of them
whole.
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

# Bytes of scores in flight per thread. Measured: 1/4 to 2 MiB differ by a few per cent.
_CACHE = 1 << 20
# Bytes of a float32 sum over some images' keys. Larger blocks come fresh from the system, page by page, at every call,
# and leave the cache; "plain" has more calls to spread over its images. Measured at 64 x 64 tokens.
_ROOM = {"flash": 1 << 23, "plain": 3 << 23}

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Way:
    """How a pass over the tiles is computed: by which engine, in tiles of how many rows and columns of queries."""

    engine: Engine
    tile: Grid

    def encoded(self) -> str:
        """As an operator's argument, which may not be an object of ours."""
        return f"{self.engine}:{self.tile[0]}:{self.tile[1]}"

    @staticmethod
    def decoded(text: str) -> Way:
        """The inverse of `encoded`."""
        engine, rows, columns = text.split(":")
        return Way("flash" if engine == "flash" else "plain", (int(rows), int(columns)))


class Tile(NamedTuple):
    """A rectangle of queries, the rectangle of keys it reaches, and which of them see which."""

    rows: slice
    columns: slice
    key_rows: slice
    key_columns: slice
    # Additive, [queries, keys + extra]; None where every query sees every key.
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
@torch.inference_mode(False)  # as for the masks of ditlab.nn.kernels: what is cached has to serve training too
def tiles_of(pattern: Global | Window, grid: Grid, tile: Grid, extra: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Cuts the grid in tiles of at most `tile` queries; equal masks are one tensor.

    Args:
        pattern: which keys a query sees.
        grid: rows and columns of the tokens.
        tile: rows and columns of queries in a tile.
        extra: number of further keys, off the grid, that every query sees.
        dtype: of the additive masks.
    """
    rows = [_reach(pattern, start, tile[0], grid[0]) for start in range(0, grid[0], tile[0])]
    columns = [_reach(pattern, start, tile[1], grid[1]) for start in range(0, grid[1], tile[1])]
    masks: dict[tuple, Tensor | None] = {}
    tiles = []
    # Down the columns: the keys that neighbours share then stay in the cache however wide the grid is.
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
    """Along one axis: a range of queries, the range of keys it reaches, and `[queries, keys]` who sees whom."""
    end = min(start + step, length)
    if isinstance(pattern, Global):
        return slice(start, end), slice(0, length), torch.ones(end - start, length, dtype=torch.bool)
    spans = torch.tensor([pattern.span(position, length) for position in range(start, end)])
    first, last = int(spans[0, 0]), int(spans[-1, 1])
    keys = torch.arange(first, last)
    return slice(start, end), slice(first, last), (keys >= spans[:, :1]) & (keys < spans[:, 1:])


def _additive(rows: Tensor, columns: Tensor, extra: int, dtype: torch.dtype) -> Tensor | None:
    """The mask of a tile from the rules of its two axes; keys off the grid come last and are seen."""
    seen = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)
    if bool(seen.all()):
        return None
    seen = F.pad(seen, (0, extra), value=True)
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, float("-inf"))


class _Tokens:
    """Some images' queries, keys, values or gradients `[images, heads, n, d]`, read and written by tile.

    The tile None stands for the tokens off the grid, which see all and are seen by all.
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
    """What both passes need to know: the tiles (None among them for the off-grid queries) and the sizes."""

    grid: Grid
    tiles: Sequence[Tile | None]
    engine: Engine
    # Scores of the largest tile, per image and head.
    largest: int

    @staticmethod
    def of(q: Tensor, grid: list[int], window: int, shift: bool, way: str) -> _Job:
        rows, columns = grid
        extra = q.shape[2] - rows * columns
        pattern = Window(window, "shift" if shift else "clip") if window else Global()
        how = Way.decoded(way)
        tiles = tiles_of(pattern, (rows, columns), how.tile, extra, q.dtype)
        largest = max(t.shape[0] * t.shape[1] * (t.key_shape[0] * t.key_shape[1] + extra) for t in tiles)
        return _Job((rows, columns), (*tiles, None) if extra else tiles, how.engine, largest)

    def parts(self, q: Tensor, sums: bool = False) -> Iterator[tuple[slice, slice]]:
        """Ranges of images, and of heads, that are worked on together: their scores of one tile and sums over keys fit
        their room."""
        images, heads = q.shape[:2]
        pairs = _CACHE * torch.get_num_threads() // (self.largest * q.element_size())
        if sums:
            pairs = min(pairs, _ROOM[self.engine] // (4 * q.shape[2] * q.shape[3]))
        step, few = max(1, pairs // heads), min(heads, max(1, pairs))
        for start in range(0, images, step):
            for head in range(0, heads, few):
                yield slice(start, min(start + step, images)), slice(head, min(head + few, heads))

    def laid(self, x: Tensor) -> Tensor:
        """Tokens as the tiles are to read them.

        Their head dim is padded with zeros to a multiple of 8, as matrix products are up to 1.5 times slower at 63; the
        zeros change no product. What every tile reads whole lies together.
        """
        spare = -x.shape[-1] % 8
        if spare:
            return F.pad(x, (0, spare))
        return x.contiguous() if self.tiles[0] is not None and self.tiles[0].key_shape == self.grid else x


def like_tokens(q: Tensor) -> Tensor:
    """Room for `[b, heads, n, d]` that is `[b, n, heads, d]` in memory, so that merging the heads copies nothing."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


def _weights(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(q k^T * scale + mask) of `[images * heads, n, d]`."""
    return _product(q, k.transpose(1, 2), scale, mask).softmax(-1)


def _product(a: Tensor, b: Tensor, scale: float, plus: Tensor | None = None) -> Tensor:
    """a b * scale, of batches of matrices, plus something."""
    # With beta = 0 the first argument is not read.
    base, beta = (a.new_empty(1, 1, 1), 0) if plus is None else (plus, 1)
    return torch.baddbmm(base, a, b, beta=beta, alpha=scale)


@torch.library.custom_op(
    "ditlab::tiled_attention",
    mutates_args=(),
    # Written out, because a type checker that wraps the function hides its annotations from torch.
    schema="(Tensor q, Tensor k, Tensor v, int[] grid, int window, bool shift, str forward, str backward)"
    " -> (Tensor, Tensor)",
)
def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: list[int], window: int, shift: bool, forward: str, backward: str
) -> tuple[Tensor, Tensor]:
    """Attention under a window, by tiles; differentiable once.

    Args:
        q, k, v: `[b, heads, n, d]`, all float32 or all bfloat16, on the CPU; n = rows * columns, then off-grid tokens.
        grid: `[rows, columns]`.
        window: odd size, or 0 for global attention.
        shift: whether windows are moved inside at the border, else clipped.
        forward, backward: a `Way.encoded()` each. "flash" backward needs "flash" forward.

    Returns:
        The output like `q`, and the log of the softmax's denominators `[b, heads, n]` (empty unless backward needs it).
    """
    return attend_tiles(q, k, v, grid, window, shift, forward, backward, q.shape[-1] ** -0.5)


def attend_tiles(
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
    """`tiled_attention` of scores times `scale`, as plain code."""
    job = _Job.of(q, grid, window, shift, forward)
    out = like_tokens(q)
    keep = Way.decoded(backward).engine == "flash" and job.engine == "flash"
    norms = q.new_empty((*q.shape[:3], 1) if keep else (0, 0, 0, 0), dtype=torch.float32)
    for part in job.parts(q):
        q_, k_, v_ = (_Tokens(job.laid(x[part]), job.grid) for x in (q, k, v))
        out_ = _Tokens(out[part], job.grid)
        norms_ = _Tokens(norms[part], job.grid) if keep else None
        for tile in job.tiles:
            mask = tile.mask if tile else None
            queries, keys, values = q_.queries(tile), k_.keys(tile), v_.keys(tile)
            if job.engine == "flash":
                found, norm = _flash(queries, keys, values, 0.0, False, attn_mask=mask, scale=scale)
                out_.put_queries(tile, found)
                if norms_:
                    norms_.put_queries(tile, norm[..., None])
            else:
                weights = _weights(queries.flatten(0, 1), keys.flatten(0, 1), mask, scale)
                out_.put_queries(tile, torch.bmm(weights, values.flatten(0, 1)).unflatten(0, queries.shape[:2]))
    return out, norms.squeeze(-1) if keep else norms.new_empty(0)


def like_results(q: Tensor, forward: str, backward: str) -> tuple[Tensor, Tensor]:
    """Room for what `attend_tiles` returns, as it lies in memory."""
    keep = forward.startswith("flash") and backward.startswith("flash")
    return like_tokens(q), q.new_empty(q.shape[:3] if keep else (0,), dtype=torch.float32)


@tiled_attention.register_fake
def _(q, k, v, grid, window, shift, forward, backward):  # pyright: ignore[reportUnusedFunction]
    return like_results(q, forward, backward)


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
    """The gradients of `tiled_attention` with respect to q, k, v; not differentiable again.

    Args:
        grad: of the output.
        out, norms: what the forward pass returned; read by "flash" only.
        q, k, v, grid, window, shift, backward: as there.
    """
    found = like_tokens(q), like_tokens(q), like_tokens(q)
    write_gradients(found, grad, q, k, v, out, norms, grid, window, shift, backward, q.shape[-1] ** -0.5)
    return found


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
    """`tiled_attention_backward` as plain code, its results written to `into`, whatever was there."""
    job = _Job.of(q, grid, window, shift, backward)
    dq, dk, dv = into
    # A key is reached from several tiles: their shares are summed in float32, in place where that is the result.
    alone, in_place = len(job.tiles) == 1, q.dtype == torch.float32
    for part in job.parts(q, sums=True):
        grad_, q_, k_, v_ = (_Tokens(job.laid(x[part]), job.grid) for x in (grad, q, k, v))
        dq_ = _Tokens(dq[part], job.grid)
        sums = [] if alone else [x[part].zero_() if in_place else torch.zeros(q_.all.shape) for x in (dk, dv)]
        sums_ = [_Tokens(x, job.grid) for x in sums]
        out_, norms_ = (
            (_Tokens(job.laid(out[part]), job.grid), _Tokens(norms[part][..., None], job.grid))
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
    """One tile's gradients of its queries, keys and values, by matrix products."""
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
    return like_tokens(q), like_tokens(q), like_tokens(q)


def _setup(ctx, inputs, output) -> None:
    q, k, v, ctx.grid, ctx.window, ctx.shift, _, ctx.backward = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad, _):
    q, k, v, out, norms = ctx.saved_tensors
    found = tiled_attention_backward(grad, q, k, v, out, norms, ctx.grid, ctx.window, ctx.shift, ctx.backward)
    return (*found, None, None, None, None, None)


tiled_attention.register_autograd(_gradients, setup_context=_setup)
