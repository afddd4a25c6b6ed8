"""What it takes to look into an attention layer that is not ditlab's.

A map is softmax(q k^T / sqrt(head_dim) + bias). So of any layer it is enough to know how its inputs become queries and
keys, and where its tokens lie: a `View`. `SelfAttention` has its own; `show_attention` gives one to another layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ditlab.errors import DitlabError
from ditlab.nn.patterns import Global, Grid, Pattern, check_fits

_Module = TypeVar("_Module", bound=nn.Module)
_VIEW = "_ditlab_view"


class Scores(NamedTuple):
    """What a map is made of."""

    q: Float[Tensor, "b heads n d"]
    k: Float[Tensor, "b heads n d"]
    bias: Tensor | None = None
    """Added to the scaled scores; broadcasts to [b, heads, n, n]."""


Read = Callable[[tuple[Any, ...], Mapping[str, Any]], Scores]
"""From the positional and named arguments of a layer's forward pass to its scores."""


@dataclass(frozen=True)
class View:
    """How an attention layer is looked into."""

    heads: int
    grid: Grid
    """(rows, columns) of its tokens, row by row."""
    read: Read
    pattern: Pattern = field(default_factory=Global)
    """Which keys a token may see."""
    extra: int = 0
    """Further tokens behind the grid's, without a place on it."""


def show_attention(
    layer: _Module,
    grid: Grid,
    *,
    heads: int | None = None,
    read: Read | None = None,
    pattern: Pattern = Global(),  # noqa: B008
    extra: int = 0,
) -> _Module:
    """Lets the analyses of attention look into a layer; returns the layer, unchanged in what it computes.

    Args:
        layer: a `torch.nn.MultiheadAttention` used as self-attention, or any module with `heads` and `read`.
        grid: (rows, columns) of its tokens, which come row by row.
        heads: number of heads; that of a `MultiheadAttention` where not given.
        read: how its arguments become queries and keys; not needed for a `MultiheadAttention`.
        pattern: which keys a token may see; enforced on the maps, so name only what the layer itself enforces.
        extra: further tokens behind the grid's, such as a class token that was appended.

    Raises:
        DitlabError: heads or read missing for a layer of another kind, or a pattern larger than the grid.

    Example:
        >>> layer = show_attention(nn.MultiheadAttention(16, 2, batch_first=True), grid=(8, 8))
    """
    if isinstance(layer, nn.MultiheadAttention):
        known = layer
        heads, read = heads or layer.num_heads, read or (lambda args, named: _multihead(known, args, named))
    if heads is None or read is None:
        raise DitlabError(
            f"show attention: expected heads and read for a {type(layer).__name__}, which ditlab does not know, found "
            "none"
        )
    check_fits(pattern, grid)
    setattr(layer, _VIEW, View(heads, grid, read, pattern, extra))
    return layer


def view_of(layer: nn.Module) -> View | None:
    """The view that `show_attention` gave a layer; None without one."""
    return getattr(layer, _VIEW, None)


def _multihead(layer: nn.MultiheadAttention, args: tuple[Any, ...], named: Mapping[str, Any]) -> Scores:
    """Queries and keys of torch's layer, from its own weights."""
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
    given = {**dict(zip(names, args, strict=False)), **named}
    query, key = given["query"], given["key"]
    if query.shape != key.shape or query.ndim != 3 or layer.bias_k is not None or layer.add_zero_attn:
        raise DitlabError(
            f"attention maps: expected a MultiheadAttention over a batch of tokens that see each other, found queries "
            f"{list(query.shape)} and keys {list(key.shape)}"
        )
    if given.get("key_padding_mask") is not None:
        raise DitlabError("attention maps: expected a MultiheadAttention without key_padding_mask, found one")
    if layer.in_proj_weight is not None:
        weights = layer.in_proj_weight.chunk(3)[:2]
    else:
        weights = layer.q_proj_weight, layer.k_proj_weight
    biases = (None, None) if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)[:2]
    q, k = (F.linear(x, w, b) for x, w, b in zip((query, key), weights, biases, strict=True))
    if not layer.batch_first:
        q, k = q.transpose(0, 1), k.transpose(0, 1)
    q, k = (x.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for x in (q, k))
    return Scores(q, k, _additive(given.get("attn_mask"), layer.num_heads, q))


def _additive(mask: Tensor | None, heads: int, like: Tensor) -> Tensor | None:
    """torch's attention mask as a bias: True of a boolean one is what may not be seen."""
    if mask is None:
        return None
    if not mask.is_floating_point():
        mask = like.new_zeros(mask.shape).masked_fill(mask, float("-inf"))
    return mask.unflatten(0, (-1, heads)) if mask.ndim == 3 else mask
