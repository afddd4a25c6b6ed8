"""The self-attention layer of every transformer in ditlab, and access to attention maps.

The layer is multi-head attention as in the ViT and DiT (Vaswani et al., 1706.03762; Peebles and Xie, 2212.09748): one
fused projection to queries, keys and values, attention under a pattern (`ditlab.nn.patterns`), one projection back.
`ditlab.nn.kernels` computes it; `ditlab.nn.attention_plan` gives each layer its pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ditlab.errors import DitlabError
from ditlab.nn.attention_adapters import AttentionAdapter, QKBias, adapter_of, register_attention
from ditlab.nn.attention_plan import parse_plan
from ditlab.nn.kernels import attention, attention_kernel, attention_weights, packed_tiling
from ditlab.nn.kernels_cpu import packed_attention, unpack_qkv
from ditlab.nn.kernels_flex import prepare_flex
from ditlab.nn.patterns import Global, Grid, Partition, Pattern, Window, check_fits


class SelfAttention(nn.Module):
    """Multi-head self-attention over the tokens of a grid, under a pattern.

    Args:
        width: channels of a token, a multiple of `heads`.
        heads: number of heads.
        grid: `(rows, columns)` of the tokens.
        pattern: which keys each token sees.
        extra: number of off-grid tokens after the grid's, which see all tokens and are seen by all.

    Raises:
        DitlabError: `heads` does not divide `width`, or the pattern is larger than the grid.

    Example:
        >>> layer = SelfAttention(width=32, heads=4, grid=(8, 8), pattern=Window(3))
        >>> layer(torch.randn(2, 64, 32)).shape
        torch.Size([2, 64, 32])
    """

    def __init__(self, width: int, heads: int, grid: Grid, pattern: Pattern = Global(), *, extra: int = 0) -> None:  # noqa: B008
        super().__init__()
        if heads < 1 or width % heads:
            raise DitlabError(f"self-attention: expected a width that {heads} heads divide, found {width}")
        check_fits(pattern, grid)
        self.heads = heads
        self.grid = grid
        self.pattern = pattern
        self.extra = extra
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SelfAttention:
        """Moves the layer and prepares the block mask on its device, since a compiled forward pass cannot make it."""
        super()._apply(fn, recurse)
        if self.qkv.weight.is_cuda:
            prepare_flex(self.pattern, self.grid, self.extra, self.qkv.weight.device)
        return self

    def split(self, x: Float[Tensor, "b n width"]) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values of the tokens, each `[b, heads, n, head_dim]`."""
        batch, tokens, width = x.shape
        return unpack_qkv(self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads))

    def forward(
        self, x: Float[Tensor, "b n width"], bias: Float[Tensor, "heads n n"] | None = None
    ) -> Float[Tensor, "b n width"]:
        """Computes self-attention.

        Args:
            x: tokens, n = rows * columns + extra, the extra ones last.
            bias: added to the scaled scores of each head, queries by keys.

        Returns:
            Tokens of the same shape.
        """
        tiling = self._tiling(x) if bias is None else None
        if tiling is not None:
            return self._by_tiles(x, tiling)
        out = attention(*self.split(x), self.pattern, self.grid, bias=bias, extra=self.extra)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _tiling(self, x: Tensor) -> str | None:
        """Returns how the tiles kernel computes this layer; None for another kernel, or if a projection has hooks."""
        plain = _is_plain_linear(self.qkv) and _is_plain_linear(self.proj)
        if not plain or x.device.type != "cpu" or x.shape[1] != self.grid[0] * self.grid[1] + self.extra:
            return None
        # Autocast leaves float64 unchanged.
        autocast = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
        return packed_tiling(
            self.pattern,
            self.grid,
            device=x.device,
            dtype=torch.get_autocast_dtype("cpu") if autocast else x.dtype,
            # Read from the weights: the size of an input may be symbolic while torch compiles.
            head_dim=self.qkv.in_features // self.heads,
            needs_grad=torch.is_grad_enabled() and (x.requires_grad or self.qkv.weight.requires_grad),
        )

    def _by_tiles(self, x: Tensor, tiling: str) -> Tensor:
        """Computes `forward` with queries, keys and values in one tensor and heads padded to multiples of 8."""
        batch, tokens, _ = x.shape
        head_dim = self.qkv.in_features // self.heads
        padding = -head_dim % 8
        weight, bias = self.qkv.weight, self.qkv.bias
        back = self.proj.weight
        if padding:
            # Padding the weights with zeros is cheaper than padding the tokens, which are larger.
            weight = F.pad(weight.unflatten(0, (-1, head_dim)), (0, 0, 0, padding)).flatten(0, 1)
            bias = bias if bias is None else F.pad(bias.unflatten(0, (-1, head_dim)), (0, padding)).flatten()
            back = F.pad(back.unflatten(1, (-1, head_dim)), (0, padding)).flatten(1)
        qkv = F.linear(x, weight, bias).view(batch, tokens, 3, self.heads, head_dim + padding)
        out, _ = packed_attention(qkv, head_dim, tiling)
        return F.linear(out.transpose(1, 2).flatten(2), back, self.proj.bias)

    def adapter(self) -> AttentionAdapter:
        """Returns how its maps are computed (`ditlab.nn.attention_adapters`)."""

        def read(args: tuple[Any, ...], named: Mapping[str, Any]) -> QKBias:
            q, k, _ = self.split(args[0] if args else named["x"])
            return QKBias(q, k, named.get("bias", args[1] if len(args) > 1 else None))

        return AttentionAdapter(self.heads, self.grid, read, self.pattern, self.extra)


def _is_plain_linear(projection: nn.Module) -> bool:
    """Whether this is a Linear without hooks or a replaced `forward`, so that its weights alone may be used."""
    hooks = projection._forward_hooks or projection._forward_pre_hooks
    hooks = hooks or projection._backward_hooks or projection._backward_pre_hooks
    return type(projection) is nn.Linear and "forward" not in projection.__dict__ and not hooks


def adapted_layers(network: nn.Module) -> list[tuple[nn.Module, AttentionAdapter]]:
    """Returns the attention layers inside a module with their adapters, in the order of `network.modules()`.

    These are `SelfAttention` layers and those given to `register_attention`; the list is empty without any.
    """
    layers = [(m, m.adapter() if isinstance(m, SelfAttention) else adapter_of(m)) for m in network.modules()]
    return [(module, adapter) for module, adapter in layers if adapter is not None]


@contextmanager
def capture_attention(
    network: nn.Module, layers: Sequence[int] | None = None, *, use: Callable[[int, Tensor], object] | None = None
) -> Iterator[dict[int, list[Float[Tensor, "b heads n n"]]]]:
    """Collects the attention maps of chosen layers from every forward pass inside the context.

    Training never computes these maps; they are recomputed as softmax(q k^T / sqrt(head_dim)) from the layer's inputs.
    A map times the layer's values is the layer's output before its last projection. Compilation is disabled inside the
    context, because compiled modules skip forward hooks.

    Args:
        network: any module that contains layers of `adapted_layers`.
        layers: indices in the order of `network.modules()`, from 0, negative from the end; None for all.
        use: called with (layer, map) as soon as a layer has run. The map is then not kept, so memory for one layer's
            maps is enough.

    Yields:
        A dict that fills as the network runs: layer -> one map `[b, heads, n, n]` for each forward pass (none with
        `use`), float32 or wider, on the network's device, without gradients. Rows are queries and sum to 1.

    Raises:
        DitlabError: the network has no such layers, or not the layer of an index.

    Example:
        >>> layer = SelfAttention(width=8, heads=2, grid=(4, 4), pattern=Window(3))
        >>> with capture_attention(layer) as maps:
        ...     _ = layer(torch.randn(1, 16, 8))
        >>> maps[0][0].shape
        torch.Size([1, 2, 16, 16])
    """
    known = adapted_layers(network)
    if not known:
        raise DitlabError("attention maps: expected a network with SelfAttention layers, found none")
    chosen = range(len(known)) if layers is None else layers
    for layer in chosen:
        if not -len(known) <= layer < len(known):
            raise DitlabError(f"attention maps: expected layers below {len(known)}, found {layer}")
    maps: dict[int, list[Tensor]] = {layer % len(known): [] for layer in chosen}

    def hook(layer: int, adapter: AttentionAdapter) -> Callable[..., None]:
        receive = maps[layer].append if use is None else partial(use, layer)

        def compute(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            with torch.no_grad():
                q, k, bias = adapter.read(args, named)
                receive(attention_weights(q, k, adapter.pattern, adapter.grid, bias=bias, extra=adapter.extra))

        return compute

    handles = [known[layer][0].register_forward_hook(hook(layer, known[layer][1]), with_kwargs=True) for layer in maps]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield maps
    finally:
        for handle in handles:
            handle.remove()


__all__ = [
    "Global",
    "Grid",
    "Partition",
    "Pattern",
    "SelfAttention",
    "Window",
    "adapted_layers",
    "attention",
    "attention_kernel",
    "capture_attention",
    "parse_plan",
    "register_attention",
]
