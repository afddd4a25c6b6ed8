"""The parts of improved-diffusion's UNet: residual blocks, attention on a feature map, downsampling and upsampling.

Source: Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021), appendix A, and its released
code; tests compare outputs with it. A part takes feature maps `[B, C, H, W]` and the condition c `[B, D]` (time, plus
the label if there is one); D is four times the network's width.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from ditlab.networks.unet_config import UNetConfig
from ditlab.nn.attention import Grid, SelfAttention

CONDITION = 4
"""Channels of the condition, as a multiple of the network's width."""


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, added to the input; the condition enters between the two.

    With `scale_shift` the condition sets scale and shift of the second norm, (1 + scale) norm(h) + shift, instead of
    being added before that norm. Where the number of channels changes, a 1x1 convolution maps the input first.
    """

    def __init__(self, before: int, after: int, config: UNetConfig) -> None:
        super().__init__()
        self.scale_shift = config.scale_shift
        self.norm = nn.GroupNorm(config.groups, before)
        self.conv = nn.Conv2d(before, after, 3, padding=1)
        self.condition = nn.Linear(CONDITION * config.width, 2 * after if config.scale_shift else after)
        self.out_norm = nn.GroupNorm(config.groups, after)
        self.dropout = nn.Dropout(config.dropout)
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
    """Self-attention over the pixels of a feature map, whose (height, width) is `grid`, added to it."""

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
    """Halves height and width, by a convolution with stride 2 if `learned`, else by the mean of 2x2 pixels."""

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
    """A residual block, then attention if any, then upsampling if it ends a level of the decoder."""

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


__all__ = ["CONDITION", "Downsample", "MapAttention", "ResidualBlock", "Stage", "Upsample"]
