"""The parts of improved-diffusion's UNet: residual blocks, attention on a feature map, downsampling and upsampling.

Source: Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021), appendix A, and its released
code; tests compare outputs with it. A part takes feature maps `[B, C, H, W]` and the condition c `[B, D]` (time, plus
the label if there is one); D is four times the network's width.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from ditlab.nn.attention import Grid, SelfAttention


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, added to the input; the condition enters between the two.

    Args:
        before: channels of the input.
        after: channels of the output; if they differ, a 1x1 convolution maps the input before it is added.
        condition: channels D of the condition.
        groups: number of groups of the group norms; divides both numbers of channels.
        dropout: dropout probability before the second convolution.
        scale_shift: whether the condition sets scale and shift of the second norm, (1 + scale) norm(h) + shift, instead
            of being added before that norm.
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
        """Maps feature maps and the condition to feature maps of the same size."""
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
        channels: channels of the feature map.
        heads: number of attention heads; divides the channels.
        grid: (height, width) of the feature map.
        groups: number of groups of the group norm.
    """

    def __init__(self, channels: int, heads: int, grid: Grid, *, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.attention = SelfAttention(channels, heads, grid)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Maps feature maps to feature maps of the same shape."""
        tokens = self.attention(self.norm(x).flatten(2).transpose(1, 2))
        # Contiguous, because torch 2.13's compiler computes wrong gradients of a block if its input is a transposed
        # view, and this output is the next block's input.
        return x + tokens.transpose(1, 2).reshape(x.shape).contiguous()


class Downsample(nn.Module):
    """Halves height and width, by a convolution with stride 2 or by the mean of 2x2 pixels.

    Args:
        channels: channels of the feature map.
        learned: whether to use a convolution.
    """

    def __init__(self, channels: int, *, learned: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if learned else None

    def forward(self, x: Float[Tensor, "b c h w"], c: Float[Tensor, "b d"]) -> Float[Tensor, "b c h2 w2"]:
        """Maps feature maps of an even size to feature maps of half that size; `c` is ignored."""
        return nn.functional.avg_pool2d(x, 2) if self.conv is None else self.conv(x)


class Upsample(nn.Module):
    """Doubles height and width: repeats every pixel four times, then applies a convolution if `learned`."""

    def __init__(self, channels: int, *, learned: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if learned else None

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Maps feature maps to feature maps of twice the size."""
        x = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)


class Stage(nn.Module):
    """A residual block, then attention if any, then upsampling if it ends a level of the decoder.

    Args:
        residual: the residual block.
        attention: applied to the block's output; None for none.
        up: applied last; None for none.
    """

    def __init__(
        self, residual: ResidualBlock, attention: MapAttention | None = None, up: Upsample | None = None
    ) -> None:
        super().__init__()
        self.residual = residual
        self.attention = attention
        self.up = up

    def forward(self, x: Float[Tensor, "b c h w"], c: Float[Tensor, "b d"]) -> Float[Tensor, "b o h2 w2"]:
        """Maps feature maps and the condition to feature maps."""
        x = self.residual(x, c)
        if self.attention is not None:
            x = self.attention(x)
        return x if self.up is None else self.up(x)


__all__ = ["Downsample", "MapAttention", "ResidualBlock", "Stage", "Upsample"]
