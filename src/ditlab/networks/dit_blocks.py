"""The blocks of a DiT: four ways in which time and label enter one transformer block.

Source: Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), section 3.2 and figure 3. All four take the
tokens `[B, T, D]` and the condition's tokens c `[B, K, D]` (time, then label where there is one), and give tokens:

- `in-context`: a plain transformer block. The condition's tokens are among x already, behind the image's;
- `cross-attention`: after the self-attention, the image's tokens attend to the condition's;
- `adaln`: shift and scale of the two norms are regressed from the sum of the condition's tokens;
- `adaln-zero`: so is a gate on each of the two branches, and all start at zero, so that a fresh block is the identity.

Extra parameters a block, biases apart: 0, 4 D^2, 4 D^2, 6 D^2 (spec: the paper's table 4 and figure 5). Only adaLN-Zero
was released. Of the others the paper leaves open, and this file infers: norms with gain and bias in the first two (the
ViT's standard), a norm and a residual connection of the cross-attention's own (as its figure draws them), and
Xavier-uniform weights of adaLN's regression.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from ditlab.nn.attention import Grid, Pattern, SelfAttention
from ditlab.nn.layers import MLP, CrossAttention, modulate

BlockKind = Literal["adaln-zero", "adaln", "cross-attention", "in-context"]


def _norm(width: int, *, affine: bool) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=affine)


class Block(nn.Module):
    """What the four kinds share: self-attention and an MLP on normalized tokens, each added to what it was given.

    Args:
        width: channels of a token.
        heads: attention heads.
        hidden: hidden channels of the MLP.
        grid: (rows, columns) of the image's tokens.
        pattern: which of them a token sees.
        extra: condition tokens behind the image's.
        affine: whether norms that the condition does not set have a gain and a bias.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, grid: Grid, pattern: Pattern, *, extra: int = 0, affine: bool = True
    ) -> None:
        super().__init__()
        self.attention_norm = _norm(width, affine=affine)
        self.attention = SelfAttention(width, heads, grid, pattern, extra=extra)
        self.mlp_norm = _norm(width, affine=affine)
        self.mlp = MLP(width, hidden)

    def reset(self) -> None:
        """What is set beyond DiT's Xavier-uniform Linears: nothing, unless a kind says otherwise."""


class InContextBlock(Block):
    """A plain transformer block: the condition is among its tokens (DiT figure 3, right)."""

    def forward(self, x: Float[Tensor, "b n d"], c: Float[Tensor, "b k d"]) -> Float[Tensor, "b n d"]:
        """Tokens, the condition's K last, to the same; `c` itself is not looked at."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class CrossAttentionBlock(Block):
    """Self-attention, attention to the condition's tokens, MLP (DiT figure 3, third from the left).

    With the time token alone (no classes) every weight of the cross-attention is 1: it then adds one vector, linear in
    that token, to all tokens of the image, and its queries and keys have no effect.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, grid: Grid, pattern: Pattern, *, extra: int = 0, affine: bool = True
    ) -> None:
        super().__init__(width, heads, hidden, grid, pattern, extra=extra, affine=affine)
        self.cross_norm = _norm(width, affine=affine)
        self.cross = CrossAttention(width, heads)

    def forward(self, x: Float[Tensor, "b n d"], c: Float[Tensor, "b k d"]) -> Float[Tensor, "b n d"]:
        """Tokens and the condition's tokens to tokens."""
        x = x + self.attention(self.attention_norm(x))
        x = x + self.cross(self.cross_norm(x), c)
        return x + self.mlp(self.mlp_norm(x))


class AdaLNBlock(Block):
    """Norms whose shift and scale are regressed from the condition (adaptive layer norm)."""

    parts = 4
    """Vectors regressed: a shift and a scale for each of the two norms."""

    def __init__(
        self, width: int, heads: int, hidden: int, grid: Grid, pattern: Pattern, *, extra: int = 0, affine: bool = True
    ) -> None:
        # The condition takes the place of gain and bias, so `affine` has nothing to say here.
        super().__init__(width, heads, hidden, grid, pattern, extra=extra, affine=False)
        self.modulation = nn.Linear(width, self.parts * width)

    def regress(self, c: Float[Tensor, "b k d"]) -> tuple[Tensor, ...]:
        """The vectors `[B, D]` regressed from the sum of the condition's tokens."""
        return self.modulation(nn.functional.silu(c.sum(1))).chunk(self.parts, dim=1)

    def forward(self, x: Float[Tensor, "b n d"], c: Float[Tensor, "b k d"]) -> Float[Tensor, "b n d"]:
        """Tokens and the condition's tokens to tokens."""
        attention_shift, attention_scale, mlp_shift, mlp_scale = self.regress(c)
        x = x + self.attention(modulate(self.attention_norm(x), attention_shift, attention_scale))
        return x + self.mlp(modulate(self.mlp_norm(x), mlp_shift, mlp_scale))


class AdaLNZeroBlock(AdaLNBlock):
    """adaLN with a gate on each branch, zero at first (DiT figure 3, second from the left).

    Chunks of the regressed vector, in the released code's order: shift, scale, gate of the attention, then of the MLP.
    """

    parts = 6

    def reset(self) -> None:
        """The regression starts at zero, so that the block starts as the identity."""
        nn.init.zeros_(self.modulation.weight)

    def forward(self, x: Float[Tensor, "b n d"], c: Float[Tensor, "b k d"]) -> Float[Tensor, "b n d"]:
        """Tokens and the condition's tokens to tokens."""
        attention_shift, attention_scale, attention_gate, mlp_shift, mlp_scale, mlp_gate = self.regress(c)
        x = x + attention_gate[:, None] * self.attention(
            modulate(self.attention_norm(x), attention_shift, attention_scale)
        )
        return x + mlp_gate[:, None] * self.mlp(modulate(self.mlp_norm(x), mlp_shift, mlp_scale))


BLOCKS: dict[BlockKind, type[Block]] = {
    "adaln-zero": AdaLNZeroBlock,
    "adaln": AdaLNBlock,
    "cross-attention": CrossAttentionBlock,
    "in-context": InContextBlock,
}
"""The block of each kind."""


def is_modulated(kind: BlockKind) -> bool:
    """Whether the condition sets the norms of blocks of this kind, and so of the last layer behind them."""
    return issubclass(BLOCKS[kind], AdaLNBlock)


class FinalLayer(nn.Module):
    """A norm, modulated where the blocks' are, and one Linear from a token to its patch of output pixels.

    Args:
        width: channels of a token.
        outputs: numbers of a patch.
        modulated: whether shift and scale of the norm are regressed from the condition.
        affine: whether a norm that is not modulated has a gain and a bias.
    """

    def __init__(self, width: int, outputs: int, *, modulated: bool = True, affine: bool = True) -> None:
        super().__init__()
        self.norm = _norm(width, affine=affine and not modulated)
        self.modulation = nn.Linear(width, 2 * width) if modulated else None
        self.out = nn.Linear(width, outputs)

    def reset(self) -> None:
        """Modulation and Linear start at zero (DiT's released code)."""
        for layer in (self.modulation, self.out):
            if layer is not None:
                nn.init.zeros_(layer.weight)

    def forward(self, x: Float[Tensor, "b t d"], c: Float[Tensor, "b k d"]) -> Float[Tensor, "b t o"]:
        """Tokens `[B, T, D]` and the condition's tokens `[B, K, D]` to patches `[B, T, outputs]`."""
        x = self.norm(x)
        if self.modulation is not None:
            shift, scale = self.modulation(nn.functional.silu(c.sum(1))).chunk(2, dim=1)
            x = modulate(x, shift, scale)
        return self.out(x)
