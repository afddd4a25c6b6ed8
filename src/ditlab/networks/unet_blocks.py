"""The parts of improved-diffusion's UNet: residual blocks, attention on a feature map, halving and doubling.

Source: Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021), appendix A, and its released
code, against whose outputs the tests check. A part takes feature maps `[B, C, H, W]` and the condition c `[B, D]`
(time, plus label where there is one); D is four times the network's width.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from ditlab.nn.attention import Grid, SelfAttention


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, added to the input; between the two the condition enters.

    Args:
        before: channels of the input.
        after: channels of the output; where they differ the input goes through a 1x1 convolution before it is added.
        condition: channels D of the condition.
        groups: of the group norms; divides both numbers of channels.
        dropout: probability in front of the second convolution.
        scale_shift: whether the condition sets scale and shift of the second norm, (1 + scale) norm(h) + shift; else it
            is added in front of that norm.
    """

    def __init__(
        self, before: int, after: int, condition: int, *, groups: int, dropout: float, scale_shift: bool
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm = nn.GroupNorm(groups, before)
        self.conv = nn.Conv2d(before, after, 3, padding=1)
        self.condition = nn.Linear(condition, 2 * after if scale_shift else after)
        self.out_norm = nn.GroupNorm(groups, after)
        self.dropout = nn.Dropout(dropout)
        self.out_conv = nn.Conv2d(after, after, 3, padding=1)
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Float[Tensor, "b c h w"], c: Float[Tensor, "b d"]) -> Float[Tensor, "b o h w"]:
        """Feature maps and the condition to feature maps of the same size."""
        silu = nn.functional.silu
        h = self.conv(silu(self.norm(x)))
        condition = self.condition(silu(c))[:, :, None, None]
        if self.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = self.out_norm(h) * (1 + scale) + shift
        else:
            h = self.out_norm(h + condition)
        return self.skip(x) + self.out_conv(self.dropout(silu(h)))


class MapAttention(nn.Module):
    """Self-attention over the pixels of a feature map, added to it.

    Args:
        channels: of the feature map.
        heads: attention heads; they divide the channels.
        grid: (height, width) of the feature map.
        groups: of the group norm.
    """

    def __init__(self, channels: int, heads: int, grid: Grid, *, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.attention = SelfAttention(channels, heads, grid)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Feature maps to the same."""
        tokens = self.attention(self.norm(x).flatten(2).transpose(1, 2))
        # Contiguous, for torch 2.13's compiler gets the gradients of a block wrong where its input is a transposed
        # view, and this output is the next block's input.
        return x + tokens.transpose(1, 2).reshape(x.shape).contiguous()


class Downsample(nn.Module):
    """Half the height and width: by a convolution with stride 2, or by the mean of 2x2 pixels.

    Args:
        channels: of the feature map.
        learned: whether by a convolution.
    """

    def __init__(self, channels: int, *, learned: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if learned else None

    def forward(self, x: Float[Tensor, "b c h w"], c: Float[Tensor, "b d"]) -> Float[Tensor, "b c h2 w2"]:
        """Feature maps of an even size to feature maps of half of it; `c` is not looked at."""
        return nn.functional.avg_pool2d(x, 2) if self.conv is None else self.conv(x)


class Upsample(nn.Module):
    """Twice the height and width: every pixel four times, then a convolution unless `learned` is False."""

    def __init__(self, channels: int, *, learned: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if learned else None

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Feature maps to feature maps of twice the size."""
        x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Stage(nn.Module):
    """A residual block, then attention where there is any, then doubling at the end of a level of the decoder.

    Args:
        residual: the block.
        attention: of its output.
        up: of that.
    """

    def __init__(
        self, residual: ResidualBlock, attention: MapAttention | None = None, up: Upsample | None = None
    ) -> None:
        super().__init__()
        self.residual = residual
        self.attention = attention
        self.up = up

    def forward(self, x: Float[Tensor, "b c h w"], c: Float[Tensor, "b d"]) -> Float[Tensor, "b o h2 w2"]:
        """Feature maps and the condition to feature maps."""
        x = self.residual(x, c)
        if self.attention is not None:
            x = self.attention(x)
        return x if self.up is None else self.up(x)
