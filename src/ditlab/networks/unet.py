"""improved-diffusion's UNet: DDPM's convolutional denoiser with scale-shift norms, and attention at few resolutions.

Source: Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021), appendix A, after Ho et al.
(2020). Widths, order of layers and initial values are those of its released code (openai/improved-diffusion); tests
compare outputs with it. An et al., "On Inductive Biases That Enable Generalization of Diffusion Transformers", compare
DiTs with this network.

- The first convolution maps the image to `width` channels.
- Each level of the encoder has `res_blocks` residual blocks; each level but the last then halves height and width.
- The middle is a residual block, attention, and a residual block.
- Each level of the decoder has `res_blocks` + 1 blocks. Each block's input is concatenated with the output of the
  mirrored block of the encoder.
- Time and label are embedded as one vector each; their sum enters every residual block (`ditlab.networks.unet_blocks`).
- The last convolution of every residual block, the last Linear of every attention layer and the network's last
  convolution start at zero, so a new network's output is zero.

The original can also be built for one- and three-dimensional signals; this network is for images.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ditlab.networks.module import ConditionedNetwork
from ditlab.networks.unet_blocks import CONDITION, Downsample, MapAttention, ResidualBlock, Stage, Upsample
from ditlab.networks.unet_config import UNetConfig
from ditlab.nn.embeddings import LabelEmbedding, TimeEmbedding


class UNet(ConditionedNetwork[UNetConfig]):
    """improved-diffusion's UNet.

    `blocks` holds everything between the first convolution and the last norm in the order of computation: the stages
    and downsamplings of the encoder, the two stages of the middle, the stages of the decoder. Each is called as
    block(x, c).

    Example:
        >>> import torch
        >>> network = UNet(UNetConfig(image_size=(8, 8), width=32, res_blocks=1, multipliers=(1, 2)))
        >>> network(torch.zeros(1, 3, 8, 8), torch.zeros(1)).shape
        torch.Size([1, 3, 8, 8])
    """

    title = "UNet"

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        condition = CONDITION * config.width
        self.time = TimeEmbedding(condition, sinusoid_width=config.width, spacing=config.time_frequencies)
        self.label = (
            LabelEmbedding(config.num_classes, condition, null=config.null_class) if config.num_classes else None
        )
        self.stem = nn.Conv2d(config.channels, config.width, 3, padding=1)
        encoder, skips = self._encoder()
        last = len(config.widths) - 1
        middle = [self._stage(config.widths[last], last, heads=heads) for heads in (config.heads, 0)]
        self.blocks = nn.ModuleList([*encoder, *middle, *self._decoder(skips)])
        self.skips = len(encoder)
        """Number of blocks of the encoder; their outputs are skip connections, as is the first convolution's."""
        self.norm = nn.GroupNorm(config.groups, config.widths[0])
        self.out = nn.Conv2d(config.widths[0], self.outputs, 3, padding=1)
        self.reset()

    def _stage(self, before: int, level: int, *, heads: int, up: bool = False) -> Stage:
        """Returns a stage of a level, without attention if `heads` is 0."""
        config, after = self.config, self.config.widths[level]
        residual = ResidualBlock(before, after, config)
        attention = MapAttention(after, heads, config.grid(level), groups=config.groups) if heads else None
        return Stage(residual, attention, Upsample(after, learned=config.conv_resample) if up else None)

    def _encoder(self) -> tuple[list[nn.Module], list[int]]:
        """Returns the encoder's blocks, and the channels of the first convolution's and of each block's output."""
        config, blocks, skips = self.config, [], [self.config.width]
        for level, width in enumerate(config.widths):
            for _ in range(config.res_blocks):
                blocks.append(self._stage(skips[-1], level, heads=config.heads if config.attends(level) else 0))
                skips.append(width)
            if level < len(config.widths) - 1:
                blocks.append(Downsample(width, learned=config.conv_resample))
                skips.append(width)
        return blocks, skips

    def _decoder(self, skips: list[int]) -> list[nn.Module]:
        """Returns the decoder's blocks, which consume the skip connections from the last to the first."""
        config, blocks, before, remaining = self.config, [], skips[-1], list(skips)
        for level, width in reversed(list(enumerate(config.widths))):
            heads = config.decoder_heads if config.attends(level) else 0
            for number in range(config.res_blocks + 1):
                up = number == config.res_blocks and level > 0
                blocks.append(self._stage(before + remaining.pop(), level, heads=heads, up=up))
                before = width
        return blocks

    def reset(self) -> None:
        """Sets torch's default initial values, and zero for the last layer of each branch and of the network."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.GroupNorm | nn.Embedding):
                module.reset_parameters()
        ends = [module.out_conv for module in self.modules() if isinstance(module, ResidualBlock)]
        ends += [module.attention.proj for module in self.modules() if isinstance(module, MapAttention)]
        for parameter in nn.ModuleList([*ends, self.out]).parameters():
            nn.init.zeros_(parameter)

    def _output(self, x: Float[Tensor, "b c h w"], c: Float[Tensor, "b d"]) -> Float[Tensor, "b o h w"]:
        x = self.stem(x)
        skips = [x]
        for number, block in enumerate(self.blocks):
            if number >= self.skips + 2:  # after the middle
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, c)
            if number < self.skips:
                skips.append(x)
        return self.out(nn.functional.silu(self.norm(x)))

    def _condition(self, t: Tensor, label: Tensor | None) -> Float[Tensor, "b d"]:
        """Returns the condition `[B, 4 width]`: the time's vector, plus the label's if the network has classes."""
        return self.time(t) if self.label is None else self.time(t) + self.label(label)


__all__ = ["UNet"]
