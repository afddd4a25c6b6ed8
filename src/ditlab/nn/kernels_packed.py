"""Windowed attention on a CPU (`ditlab.nn.kernels_cpu`) with queries, keys and values in one tensor.

A layer's projection computes them in one tensor. If they were split, their gradient would be concatenated from three
tensors, a copy that compiled code makes number by number (measured: 2.5 ns each, 3 % of a training step of `dit-xs/1`).
Heads may have padding channels: if the projection's weights are padded with zeros to a multiple of 8 channels for each
head, the kernel needs no copy of the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ditlab.nn.kernels_cpu import compute_tiles, empty_results, write_gradients


def unpack_qkv(packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns views of `[b, n, 3, heads, d]` as queries, keys and values `[b, heads, n, d]`."""
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


@torch.library.custom_op(
    "ditlab::packed_attention",
    mutates_args=(),
    schema="(Tensor qkv, int head_dim, int[] grid, int window, bool shift, str forward, str backward)"
    " -> (Tensor, Tensor)",
)
def packed_attention(
    qkv: Tensor, head_dim: int, grid: list[int], window: int, shift: bool, forward: str, backward: str
) -> tuple[Tensor, Tensor]:
    """Computes `tiled_attention` of packed tensors, with scores scaled by `head_dim ** -0.5`; differentiable once.

    Args:
        qkv: `[b, n, 3, heads, d]`; channels after the first `head_dim` are zero.
        head_dim: channels of a head without padding.
        grid, window, shift, forward, backward: as for `tiled_attention`.

    Returns:
        As `tiled_attention`: the output `[b, heads, n, d]`, zero in the padding channels, and the norms.
    """
    return compute_tiles(*unpack_qkv(qkv), grid, window, shift, forward, backward, head_dim**-0.5)


@packed_attention.register_fake
def _(qkv, head_dim, grid, window, shift, forward, backward):  # pyright: ignore[reportUnusedFunction]
    return empty_results(unpack_qkv(qkv)[0], forward, backward)


@torch.library.custom_op(
    "ditlab::packed_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor qkv, Tensor out, Tensor norms, int head_dim, int[] grid, int window, bool shift,"
    " str backward) -> Tensor",
)
def packed_attention_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    norms: Tensor,
    head_dim: int,
    grid: list[int],
    window: int,
    shift: bool,
    backward: str,
) -> Tensor:
    """Returns the gradient of `packed_attention`, packed in the same way; not differentiable again."""
    gradient = torch.empty(qkv.shape, dtype=qkv.dtype)
    scale = head_dim**-0.5
    write_gradients(unpack_qkv(gradient), grad, *unpack_qkv(qkv), out, norms, grid, window, shift, backward, scale)
    return gradient


@packed_attention_backward.register_fake
def _(grad, qkv, out, norms, head_dim, grid, window, shift, backward):  # pyright: ignore[reportUnusedFunction]
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _setup(ctx, inputs, output) -> None:
    qkv, ctx.head_dim, ctx.grid, ctx.window, ctx.shift, _, ctx.backward = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])


def _gradient(ctx, grad, _):
    qkv, out, norms = ctx.saved_tensors
    gradient = packed_attention_backward(
        grad, qkv, out, norms, ctx.head_dim, ctx.grid, ctx.window, ctx.shift, ctx.backward
    )
    return gradient, None, None, None, None, None, None


packed_attention.register_autograd(_gradient, setup_context=_setup)


__all__ = ["packed_attention", "packed_attention_backward", "unpack_qkv"]
