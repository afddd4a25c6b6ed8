"""One self-attention layer for every transformer here, and a way to look at its maps.

The layer is multi-head attention as in the ViT and DiT (Vaswani et al., 1706.03762; Peebles and Xie, 2212.09748): one
fused projection to queries, keys and values, attention under a pattern (`ditlab.nn.patterns`), one projection back.
How it is computed is a matter of `ditlab.nn.kernels`; which layer gets which pattern, of `ditlab.nn.attention_plan`.
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
from ditlab.nn.attention_adapters import Scores, View, show_attention, view_of
from ditlab.nn.attention_plan import NAMED_WINDOWS, Scheme, parse_plan, placement
from ditlab.nn.kernels import Kernel, Strips, attend, attention_kernel, attention_weights, packed_strips
from ditlab.nn.kernels_flex import prepare_flex
from ditlab.nn.kernels_packed import apart, packed_attention
from ditlab.nn.patterns import Border, Global, Grid, Partition, Pattern, Window, check_fits


class SelfAttention(nn.Module):
    """Multi-head self-attention over the tokens of a grid, under a pattern.

    Args:
        width: channels of a token, a multiple of `heads`.
        heads: number of heads.
        grid: `(rows, columns)` of the tokens.
        pattern: which keys a token sees.
        extra: number of off-grid tokens behind the grid's, which see all and are seen by all.

    Raises:
        DitlabError: where `heads` does not divide `width`, or the pattern is larger than the grid.

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
        """Moving to a device prepares the block mask there, as a compiled forward pass cannot make it."""
        super()._apply(fn, recurse)
        if self.qkv.weight.is_cuda:
            prepare_flex(self.pattern, self.grid, self.extra, self.qkv.weight.device)
        return self

    def split(self, x: Float[Tensor, "b n width"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the tokens, each `[b, heads, n, head_dim]`."""
        batch, tokens, width = x.shape
        return apart(self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads))

    def forward(
        self, x: Float[Tensor, "b n width"], bias: Float[Tensor, "heads n n"] | None = None
    ) -> Float[Tensor, "b n width"]:
        """Attends.

        Args:
            x: tokens, n = rows * columns + extra, the extra ones last.
            bias: added to the scaled scores of each head, queries by keys.
        """
        strips = self._strips(x) if bias is None else None
        if strips is not None:
            return self._by_strips(x, strips)
        out = attend(*self.split(x), self.pattern, self.grid, bias=bias, extra=self.extra)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _strips(self, x: Tensor) -> Strips | None:
        """How strips compute this layer's attention; None where they do not, or its projections must be called."""
        plain = _untouched(self.qkv) and _untouched(self.proj)
        if not plain or x.device.type != "cpu" or x.shape[1] != self.grid[0] * self.grid[1] + self.extra:
            return None
        # Which leaves float64 as it is.
        autocast = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
        return packed_strips(
            self.pattern,
            self.grid,
            device=x.device,
            dtype=torch.get_autocast_dtype("cpu") if autocast else x.dtype,
            # Of the weights: the size of an input may be a symbol while torch compiles.
            head_dim=self.qkv.in_features // self.heads,
            needs_grad=torch.is_grad_enabled() and (x.requires_grad or self.qkv.weight.requires_grad),
        )

    def _by_strips(self, x: Tensor, strips: Strips) -> Tensor:
        """`forward`, in one tensor from projection to projection, with heads as wide as the kernel likes them."""
        batch, tokens, _ = x.shape
        head_dim = self.qkv.in_features // self.heads
        spare = -head_dim % 8
        weight, bias = self.qkv.weight, self.qkv.bias
        back = self.proj.weight
        if spare:
            # Zeros in the weights, which are small beside the tokens: further channels of each head that are zero.
            weight = F.pad(weight.unflatten(0, (-1, head_dim)), (0, 0, 0, spare)).flatten(0, 1)
            bias = bias if bias is None else F.pad(bias.unflatten(0, (-1, head_dim)), (0, spare)).flatten()
            back = F.pad(back.unflatten(1, (-1, head_dim)), (0, spare)).flatten(1)
        qkv = F.linear(x, weight, bias).view(batch, tokens, 3, self.heads, head_dim + spare)
        out, _ = packed_attention(qkv, head_dim, list(self.grid), *strips)
        return F.linear(out.transpose(1, 2).flatten(2), back, self.proj.bias)

    def view(self) -> View:
        """How its maps are made (`ditlab.nn.attention_adapters`)."""

        def read(args: tuple[Any, ...], named: Mapping[str, Any]) -> Scores:
            q, k, _ = self.split(args[0] if args else named["x"])
            return Scores(q, k, named.get("bias", args[1] if len(args) > 1 else None))

        return View(self.heads, self.grid, read, self.pattern, self.extra)


def _untouched(projection: nn.Module) -> bool:
    """Whether it is as made here: neither replaced nor watched, so that its weights are all there is to it."""
    watched = projection._forward_hooks or projection._forward_pre_hooks
    watched = watched or projection._backward_hooks or projection._backward_pre_hooks
    return type(projection) is nn.Linear and "forward" not in projection.__dict__ and not watched


def attention_views(network: nn.Module) -> list[tuple[nn.Module, View]]:
    """The attention layers inside a module that can be looked into, each once, in the order of `network.modules()`.

    These are `SelfAttention` layers and those given to `attention_adapters.show_attention`; empty without any.
    """
    views = [(m, m.view() if isinstance(m, SelfAttention) else view_of(m)) for m in network.modules()]
    return [(module, view) for module, view in views if view is not None]


def attention_modules(network: nn.Module) -> list[nn.Module]:
    """The modules of `attention_views`."""
    return [module for module, _ in attention_views(network)]


@contextmanager
def capture_attention(
    network: nn.Module,
    layers: Sequence[int] | None = None,
    *,
    use: Callable[[int, Tensor], object] | None = None,
) -> Iterator[dict[int, list[Float[Tensor, "b heads n n"]]]]:
    """Within it, every forward pass leaves the attention maps of the layers asked for.

    Training never computes these maps; here they are recomputed as softmax(q k^T / sqrt(head_dim)) from the layer's
    inputs. A map times the layer's values is the layer's output before its last projection. Compiled modules run
    uncompiled meanwhile, for a compiled one would pass over what watches the layers.

    Args:
        network: any module that holds layers of `attention_views`.
        layers: which of them, 0-based in the order of `network.modules()`; negative from the end; None for all.
        use: called with (layer, map) as soon as a layer has run; the map is then not kept, so that the memory of one
            layer's maps is enough.

    Yields:
        A dict that fills as the network runs: layer -> one map for each forward pass (none with `use`), float32 or
        wider, on the network's device, without gradients. Rows are queries and sum to 1.

    Raises:
        DitlabError: for a network without such layers, or a layer that it does not have.

    Example:
        >>> layer = SelfAttention(width=8, heads=2, grid=(4, 4), pattern=Window(3))
        >>> with capture_attention(layer) as maps:
        ...     _ = layer(torch.randn(1, 16, 8))
        >>> maps[0][0].shape
        torch.Size([1, 2, 16, 16])
    """
    found = attention_views(network)
    if not found:
        raise DitlabError("attention maps: expected a network with SelfAttention layers, found none")
    wanted = range(len(found)) if layers is None else layers
    for layer in wanted:
        if not -len(found) <= layer < len(found):
            raise DitlabError(f"attention maps: expected layers below {len(found)}, found {layer}")
    maps: dict[int, list[Tensor]] = {layer % len(found): [] for layer in wanted}

    def hook(layer: int, view: View) -> Callable[..., None]:
        keep = maps[layer].append if use is None else partial(use, layer)

        def remember(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            with torch.no_grad():
                q, k, bias = view.read(args, named)
                keep(attention_weights(q, k, view.pattern, view.grid, bias=bias, extra=view.extra))

        return remember

    handles = [found[layer][0].register_forward_hook(hook(layer, found[layer][1]), with_kwargs=True) for layer in maps]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield maps
    finally:
        for handle in handles:
            handle.remove()


__all__ = [
    "NAMED_WINDOWS",
    "Border",
    "Global",
    "Grid",
    "Kernel",
    "Partition",
    "Pattern",
    "Scheme",
    "SelfAttention",
    "Window",
    "attend",
    "attention_kernel",
    "attention_modules",
    "attention_views",
    "attention_weights",
    "capture_attention",
    "check_fits",
    "parse_plan",
    "placement",
    "show_attention",
]
