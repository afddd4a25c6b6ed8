"""Adapters that give the analyses access to the attention maps of layers that are not ditlab's.

A map is softmax(q k^T / sqrt(head_dim) + bias). An `AttentionAdapter` says how a layer's inputs become queries and
keys, and on which grid its tokens are. `SelfAttention` has one; `register_attention` gives one to any other layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ditlab.errors import DitlabError
from ditlab.nn.patterns import Global, Grid, Pattern, additive, check_fits

_Module = TypeVar("_Module", bound=nn.Module)
_ADAPTER = "_ditlab_attention_adapter"


class QKBias(NamedTuple):
    """Queries, keys and bias of an attention map."""

    q: Float[Tensor, "b heads n d"]
    k: Float[Tensor, "b heads n d"]
    bias: Tensor | None = None
    """Added to the scaled scores; broadcasts to [b, heads, n, n]."""


Read = Callable[[tuple[Any, ...], Mapping[str, Any]], QKBias]
"""Maps the positional and named arguments of a layer's forward pass to queries, keys and bias."""


@dataclass(frozen=True)
class AttentionAdapter:
    """How the attention maps of a layer are computed."""

    heads: int
    grid: Grid
    """(rows, columns) of its tokens, in row-major order."""
    read: Read
    pattern: Pattern = field(default_factory=Global)
    """Which keys each token sees."""
    extra: int = 0
    """Number of off-grid tokens after the grid's."""


def register_attention(
    layer: _Module,
    grid: Grid,
    *,
    heads: int | None = None,
    read: Read | None = None,
    pattern: Pattern = Global(),  # noqa: B008
    extra: int = 0,
) -> _Module:
    """Gives the analyses access to a layer's attention maps; returns the layer, whose output does not change.

    Args:
        layer: a `torch.nn.MultiheadAttention` used as self-attention, or any module if `heads` and `read` are given.
        grid: (rows, columns) of its tokens, in row-major order.
        heads: number of heads; read from a `MultiheadAttention` by default.
        read: maps the layer's arguments to queries and keys; not needed for a `MultiheadAttention`.
        pattern: which keys each token sees. It masks the maps, so it must be the pattern that the layer itself has.
        extra: number of off-grid tokens after the grid's, such as an appended class token.

    Raises:
        DitlabError: `heads` or `read` is missing for another kind of layer, or the pattern is larger than the grid.

    Example:
        >>> layer = register_attention(nn.MultiheadAttention(16, 2, batch_first=True), grid=(8, 8))
    """
    if isinstance(layer, nn.MultiheadAttention):
        multihead = layer
        heads, read = heads or layer.num_heads, read or (lambda args, named: _multihead(multihead, args, named))
    if heads is None or read is None:
        raise DitlabError(
            f"register_attention: expected heads and read for a {type(layer).__name__}, which ditlab does not know, "
            "found none"
        )
    check_fits(pattern, grid)
    setattr(layer, _ADAPTER, AttentionAdapter(heads, grid, read, pattern, extra))
    return layer


def adapter_of(layer: nn.Module) -> AttentionAdapter | None:
    """Returns the adapter that `register_attention` gave a layer; None without one."""
    return getattr(layer, _ADAPTER, None)


def _multihead(layer: nn.MultiheadAttention, args: tuple[Any, ...], named: Mapping[str, Any]) -> QKBias:
    """Returns queries and keys of torch's layer, computed from its weights."""
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
    arguments = {**dict(zip(names, args, strict=False)), **named}
    query, key = arguments["query"], arguments["key"]
    if query.shape != key.shape or query.ndim != 3 or layer.bias_k is not None or layer.add_zero_attn:
        raise DitlabError(
            f"attention maps: expected a MultiheadAttention over a batch of tokens that see each other, found queries "
            f"{list(query.shape)} and keys {list(key.shape)}"
        )
    if arguments.get("key_padding_mask") is not None:
        raise DitlabError("attention maps: expected a MultiheadAttention without key_padding_mask, found one")
    separate = layer.q_proj_weight, layer.k_proj_weight
    weights = separate if layer.in_proj_weight is None else layer.in_proj_weight.chunk(3)[:2]
    biases = (None, None) if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)[:2]
    q, k = (F.linear(x, w, b) for x, w, b in zip((query, key), weights, biases, strict=True))
    if not layer.batch_first:
        q, k = q.transpose(0, 1), k.transpose(0, 1)
    q, k = (x.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for x in (q, k))
    mask = arguments.get("attn_mask")
    if mask is not None and not mask.is_floating_point():  # True hides a key
        mask = additive(~mask, q.dtype)
    return QKBias(q, k, mask.unflatten(0, (-1, layer.num_heads)) if mask is not None and mask.ndim == 3 else mask)


__all__ = ["AttentionAdapter", "QKBias", "Read", "adapter_of", "register_attention"]
