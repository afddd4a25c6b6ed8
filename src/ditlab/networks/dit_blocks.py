"""The blocks of a DiT: four ways in which time and label enter one transformer block.

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), section 3.2 and figure 3. All four map
tokens `[B, T, D]` and the condition's tokens c `[B, K, D]` (time, then the label if there is one) to tokens:

- `in-context`: a plain transformer block; x already contains the condition's tokens, after the image's;
- `cross-attention`: after the self-attention, the image's tokens attend to the condition's;
- `adaln`: shift and scale of the two norms are regressed from the sum of the condition's tokens;
- `adaln-zero`: as adaln, plus a regressed gate on each of the two branches. All start at zero, so a new block is the
  identity.

Additional parameters of a block without biases: 0, 4 D^2, 4 D^2, 6 D^2 (the paper's table 4 and figure 5). Only
adaLN-Zero was released. The paper does not say, and this file infers: norms with gain and bias in the first two (as in
the ViT), a separate norm and residual connection of the cross-attention (as in its figure), and Xavier-uniform weights
of adaLN's regression.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from ditlab.networks.dit_config import BlockKind, DiTConfig
from ditlab.nn.attention import Pattern, SelfAttention
from ditlab.nn.layers import MLP, CrossAttention, modulate


def _norm(width: int, *, affine: bool) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)


class Block(nn.Module):
    """Base of the four kinds: self-attention and an MLP on normalized tokens, each with a residual connection."""

    parts = 0
    """Vectors regressed from the condition, which then replace gain and bias of the norms."""

    def __init__(self, config: DiTConfig, pattern: Pattern) -> None:
        super().__init__()
        width, affine = config.width, config.affine and not self.parts
        self.attention_norm = _norm(width, affine=affine)
        self.attention = SelfAttention(width, config.heads, config.grid, pattern, extra=config.appended_tokens)
        self.mlp_norm = _norm(width, affine=affine)
        self.mlp_norm.eps = config.mlp_norm_eps
        self.mlp = MLP(width, int(width * config.mlp_ratio))
        if self.parts:
            self.modulation = nn.Linear(width, self.parts * width)

    def reset(self) -> None:
        """Sets initial values that differ from DiT's Xavier-uniform Linears; none by default."""


class InContextBlock(Block):
    """A plain transformer block whose tokens contain the condition's (DiT figure 3, right)."""

    def forward(self, x: Float[Tensor, "b n d"], c: Float[Tensor, "b k d"]) -> Float[Tensor, "b n d"]:
        """Maps tokens, the condition's K last, to tokens; `c` is ignored."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class CrossAttentionBlock(Block):
    """Self-attention, attention to the condition's tokens, MLP (DiT figure 3, third from the left).

    With the time token only (no classes) every attention weight of the cross-attention is 1. It then adds one vector,
    linear in that token, to all tokens of the image; its queries and keys have no effect.
    """

    def __init__(self, config: DiTConfig, pattern: Pattern) -> None:
        super().__init__(config, pattern)
        self.cross_norm = _norm(config.width, affine=config.affine)
        self.cross = CrossAttention(config.width, config.heads)

    def forward(self, x: Float[Tensor, "b n d"], c: Float[Tensor, "b k d"]) -> Float[Tensor, "b n d"]:
        """Maps tokens `[B, T, D]` and the condition's tokens `[B, K, D]` to tokens."""
        x = x + self.attention(self.attention_norm(x))
        x = x + self.cross(self.cross_norm(x), c)
        return x + self.mlp(self.mlp_norm(x))


class AdaLNBlock(Block):
    """Norms whose shift and scale are regressed from the condition (adaptive layer norm)."""

    parts = 4
    """A shift and a scale for each of the two norms."""

    def regress(self, c: Float[Tensor, "b k d"]) -> tuple[Tensor, ...]:
        """Returns the vectors `[B, D]` regressed from the sum of the condition's tokens."""
        return self.modulation(nn.functional.silu(c.sum(1))).chunk(self.parts, dim=1)

    def forward(self, x: Float[Tensor, "b n d"], c: Float[Tensor, "b k d"]) -> Float[Tensor, "b n d"]:
        """Maps tokens `[B, T, D]` and the condition's tokens `[B, K, D]` to tokens."""
        attention_shift, attention_scale, mlp_shift, mlp_scale = self.regress(c)
        x = x + self.attention(modulate(self.attention_norm(x), attention_shift, attention_scale))
        return x + self.mlp(modulate(self.mlp_norm(x), mlp_shift, mlp_scale))


class AdaLNZeroBlock(AdaLNBlock):
    """adaLN with a gate on each branch, initially zero (DiT figure 3, second from the left).

    The regressed chunks have the released code's order: shift, scale, gate of the attention, then of the MLP.
    """

    parts = 6

    def reset(self) -> None:
        """Sets the regression to zero, so that the block starts as the identity."""
        nn.init.zeros_(self.modulation.weight)

    def forward(self, x: Float[Tensor, "b n d"], c: Float[Tensor, "b k d"]) -> Float[Tensor, "b n d"]:
        """Maps tokens `[B, T, D]` and the condition's tokens `[B, K, D]` to tokens."""
        attention_shift, attention_scale, attention_gate, mlp_shift, mlp_scale, mlp_gate = self.regress(c)
        attended = self.attention(modulate(self.attention_norm(x), attention_shift, attention_scale))
        x = x + attention_gate[:, None] * attended
        return x + mlp_gate[:, None] * self.mlp(modulate(self.mlp_norm(x), mlp_shift, mlp_scale))


BLOCKS: dict[BlockKind, type[Block]] = {
    "adaln-zero": AdaLNZeroBlock,
    "adaln": AdaLNBlock,
    "cross-attention": CrossAttentionBlock,
    "in-context": InContextBlock,
}
"""Kind -> class of the block."""


class FinalLayer(nn.Module):
    """A norm, modulated if the blocks' norms are, and a Linear from each token to the `outputs` values of its patch."""

    def __init__(self, config: DiTConfig, outputs: int) -> None:
        super().__init__()
        width, modulated = config.width, bool(BLOCKS[config.block].parts)
        self.norm = _norm(width, affine=config.affine and not modulated)
        self.modulation = nn.Linear(width, 2 * width) if modulated else None
        self.out = nn.Linear(width, outputs)

    def reset(self) -> None:
        """Sets modulation and Linear to zero, as DiT's released code."""
        for layer in (self.modulation, self.out):
            if layer is not None:
                nn.init.zeros_(layer.weight)

    def forward(self, x: Float[Tensor, "b t d"], c: Float[Tensor, "b k d"]) -> Float[Tensor, "b t o"]:
        """Maps tokens `[B, T, D]` and the condition's tokens `[B, K, D]` to patches `[B, T, outputs]`."""
        x = self.norm(x)
        if self.modulation is not None:
            shift, scale = self.modulation(nn.functional.silu(c.sum(1))).chunk(2, dim=1)
            x = modulate(x, shift, scale)
        return self.out(x)


__all__ = ["BLOCKS", "Block", "FinalLayer"]
