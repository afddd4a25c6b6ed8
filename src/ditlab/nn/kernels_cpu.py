"""Windowed attention on a CPU: the grid of queries is cut into tiles; each attends to the rectangle of keys it reaches.

A tile of `(rows, columns)` queries under a window of radius r reaches `rows + 2r` by `columns + 2r` keys, so the work
grows with the number of tokens and not with its square. A small mask inside the rectangle makes it exact. The keys of a
tile as wide as the grid are contiguous in memory. Two engines compute a tile:

- "flash": torch's own CPU flash attention, forward and backward (Dao, 2307.08691), one call for each tile;
- "plain": matrix product, softmax, matrix product, for as many images and heads at a time as fit the cache, at least
  one head. Its backward pass recomputes the weights P; then dV = P^T dO, dP = dO V^T, dS = P * (dP - rowsum(P * dP)),
  dQ = dS K / sqrt(d), dK = dS^T Q / sqrt(d).

Global attention is the case of tiles that reach all keys, or of one tile, which needs no sums: "plain" then replaces
torch's bfloat16 kernels, which are slow for short sequences. A compiled graph contains each operator as one node.

`packed_attention` reads queries, keys and values from one tensor, as a layer's projection computes them. If they were
split, their gradient would be concatenated from three tensors, a copy that compiled code makes number by number
(measured: 2.5 ns each, 3 % of a training step of `dit-xs/1`). Its heads may have padding channels: if the projection's
weights are padded with zeros to a multiple of 8 channels for each head, the kernel needs no copy of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ditlab.nn.patterns import Global, Grid, Window, additive, combine_axes

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


@dataclass(frozen=True)
class Tiling:
    """How attention under a pattern is computed by tiles. A "flash" backward pass needs a "flash" forward pass."""

    pattern: Global | Window
    grid: Grid
    forward: TilePass
    backward: TilePass

    @property
    def keeps_norms(self) -> bool:
        """Whether the backward pass needs the denominators of the softmax."""
        return self.forward.engine == self.backward.engine == "flash"

    def encode(self) -> str:
        """Returns a string: arguments of torch operators cannot be objects."""
        window = f"{self.pattern.size}:{self.pattern.border}" if isinstance(self.pattern, Window) else "0:clip"
        passes = (f"{each.engine}:{each.tile[0]}:{each.tile[1]}" for each in (self.forward, self.backward))
        return ":".join((f"{self.grid[0]}:{self.grid[1]}", window, *passes))

    @staticmethod
    @cache
    def decode(text: str) -> Tiling:
        """Reverses `encode`."""
        rows, columns, size, border, *passes = text.split(":")
        pattern = Window(int(size), "shift" if border == "shift" else "clip") if int(size) else Global()
        forward, backward = (
            TilePass("flash" if engine == "flash" else "plain", (int(down), int(across)))
            for engine, down, across in (passes[:3], passes[3:])
        )
        return Tiling(pattern, (int(rows), int(columns)), forward, backward)


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
    """Cuts the grid into tiles of at most `tile` queries; equal masks share one tensor. All see the `extra` keys."""
    rows = [_reach(pattern, start, tile[0], grid[0]) for start in range(0, grid[0], tile[0])]
    columns = [_reach(pattern, start, tile[1], grid[1]) for start in range(0, grid[1], tile[1])]
    masks: dict[tuple, Tensor | None] = {}
    tiles = []
    # Down the columns, so that the keys that neighbours share stay in the cache for any width of the grid.
    for column_range, key_columns, column_mask in columns:
        for row_range, key_rows, row_mask in rows:
            rule = tuple((mask.shape, mask.numpy().tobytes()) for mask in (row_mask, column_mask))
            if rule not in masks:
                visible = F.pad(combine_axes(row_mask, column_mask), (0, extra), value=True)
                masks[rule] = None if visible.all() else additive(visible, dtype)
            tiles.append(Tile(row_range, column_range, key_rows, key_columns, masks[rule]))
    return tuple(tiles)


def _reach(pattern: Global | Window, start: int, step: int, length: int) -> tuple[slice, slice, Tensor]:
    """Returns, along one axis, a range of queries, the range of keys it reaches, and the mask `[queries, keys]`."""
    queries = range(start, min(start + step, length))
    keys = range(pattern.span(start, length)[0], pattern.span(queries[-1], length)[1])
    mask = pattern.axis_mask(length, queries, keys)
    return slice(queries.start, queries.stop), slice(keys.start, keys.stop), mask


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
    def of(q: Tensor, tiling: Tiling, tile_pass: TilePass) -> _Job:
        grid = tiling.grid
        extra = q.shape[2] - grid[0] * grid[1]
        tiles = make_tiles(tiling.pattern, grid, tile_pass.tile, extra, q.dtype)
        largest = max(t.shape[0] * t.shape[1] * (t.key_shape[0] * t.key_shape[1] + extra) for t in tiles)
        return _Job(grid, (*tiles, None) if extra else tiles, tile_pass.engine, largest)

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


def _empty_tokens(q: Tensor) -> Tensor:
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


def _compute(q: Tensor, k: Tensor, v: Tensor, encoded: str, scale: float) -> tuple[Tensor, Tensor]:
    """Computes `tiled_attention` with scores times `scale`."""
    tiling = Tiling.decode(encoded)
    job, keep = _Job.of(q, tiling, tiling.forward), tiling.keeps_norms
    out, norms = _empty_results(q, encoded)
    for part in job.parts(q):
        q_, k_, v_ = (_Tokens(job.arrange(x[part]), job.grid) for x in (q, k, v))
        out_ = _Tokens(out[part], job.grid)
        norms_ = _Tokens(norms[part][..., None], job.grid) if keep else None
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
    return out, norms


def _empty_results(q: Tensor, encoded: str) -> tuple[Tensor, Tensor]:
    """Returns empty tensors with the shapes and memory layout of the results of `tiled_attention`."""
    shape = q.shape[:3] if Tiling.decode(encoded).keeps_norms else (0,)
    return _empty_tokens(q), q.new_empty(shape, dtype=torch.float32)


def _write_gradients(
    into: Sequence[Tensor], grad: Tensor, qkv: Sequence[Tensor], out: Tensor, norms: Tensor, encoded: str, scale: float
) -> None:
    """Overwrites `into` with the gradients of `_compute` with respect to q, k, v."""
    q, k, v = qkv
    dq, dk, dv = into
    tiling = Tiling.decode(encoded)
    job = _Job.of(q, tiling, tiling.backward)
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


# The schemas are explicit, because a type-checking wrapper of a function hides its annotations from torch.
@torch.library.custom_op(
    "ditlab::tiled_attention", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v, str tiling) -> (Tensor, Tensor)"
)
def tiled_attention(q: Tensor, k: Tensor, v: Tensor, tiling: str) -> tuple[Tensor, Tensor]:
    """Computes attention under a window, by tiles; differentiable once.

    Args:
        q, k, v: `[b, heads, n, d]`, all float32 or all bfloat16, on the CPU; n = rows * columns, then off-grid tokens.
        tiling: an encoded `Tiling`.

    Returns:
        The output with the shape of `q`, and the log of the softmax's denominators `[b, heads, n]` (empty unless the
        backward pass needs it).
    """
    return _compute(q, k, v, tiling, q.shape[-1] ** -0.5)


@torch.library.custom_op(
    "ditlab::tiled_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor norms, str tiling)"
    " -> (Tensor, Tensor, Tensor)",
)
def tiled_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, norms: Tensor, tiling: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of `tiled_attention` from that of its output; not differentiable again."""
    gradients = _empty_tokens(q), _empty_tokens(q), _empty_tokens(q)
    _write_gradients(gradients, grad, (q, k, v), out, norms, tiling, q.shape[-1] ** -0.5)
    return gradients


def unpack_qkv(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns views of `[b, n, 3, heads, d]` as queries, keys and values `[b, heads, n, d]`."""
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


@torch.library.custom_op(
    "ditlab::packed_attention", mutates_args=(), schema="(Tensor qkv, int head_dim, str tiling) -> (Tensor, Tensor)"
)
def packed_attention(qkv: Tensor, head_dim: int, tiling: str) -> tuple[Tensor, Tensor]:
    """Computes `tiled_attention` of packed tensors, with scores scaled by `head_dim ** -0.5`; differentiable once.

    Args:
        qkv: `[b, n, 3, heads, d]`; channels after the first `head_dim` are zero.
        head_dim: channels of a head without padding.
        tiling: an encoded `Tiling`.

    Returns:
        As `tiled_attention`: the output `[b, heads, n, d]`, zero in the padding channels, and the norms.
    """
    return _compute(*unpack_qkv(qkv), tiling, head_dim**-0.5)


@torch.library.custom_op(
    "ditlab::packed_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor qkv, Tensor out, Tensor norms, int head_dim, str tiling) -> Tensor",
)
def packed_attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, norms: Tensor, head_dim: int, tiling: str
) -> Tensor:
    """Returns the gradient of `packed_attention`, packed in the same way; not differentiable again."""
    gradient = torch.empty(qkv.shape, dtype=qkv.dtype)
    _write_gradients(unpack_qkv(gradient), grad, unpack_qkv(qkv), out, norms, tiling, head_dim**-0.5)
    return gradient


tiled_attention.register_fake(lambda q, k, v, tiling: _empty_results(q, tiling))
tiled_attention_backward.register_fake(lambda grad, q, *others: (_empty_tokens(q), _empty_tokens(q), _empty_tokens(q)))
packed_attention.register_fake(lambda qkv, head_dim, tiling: _empty_results(unpack_qkv(qkv)[0], tiling))
packed_attention_backward.register_fake(lambda grad, qkv, *others: qkv.new_empty(qkv.shape))


def _register_gradient(operator: Any, backward: Any) -> None:
    """Registers the gradients of an operator of some tensors, then settings, whose second result has none."""

    def setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.settings = [value for value in inputs if not isinstance(value, Tensor)]
        ctx.save_for_backward(*inputs[: -len(ctx.settings)], *output)
        ctx.mark_non_differentiable(output[1])

    def gradients(ctx: Any, grad: Tensor, _: Any) -> tuple:
        result = backward(grad, *ctx.saved_tensors, *ctx.settings)
        return (*(result if isinstance(result, tuple) else (result,)), *[None] * len(ctx.settings))

    operator.register_autograd(gradients, setup_context=setup)


_register_gradient(tiled_attention, tiled_attention_backward)
_register_gradient(packed_attention, packed_attention_backward)


__all__ = ["Engine", "TilePass", "Tiling", "make_tiles", "packed_attention", "tiled_attention", "unpack_qkv"]
