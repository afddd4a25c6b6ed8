"""The bias-free UNet of Kadkhodaie, Guth, Simoncelli and Mallat, "Generalization in diffusion models arises from
geometry-adaptive harmonic representations" (ICLR 2024): noisy image -> noise, without any additive constant.

Encoder block b has convolutions of width 64 * 2^b. A bias-free norm and a ReLU follow each, except the very first,
which has the ReLU only. Average pooling halves the image after each block. The middle block follows. Transposed
convolutions double the image in the decoder, whose blocks also get the encoder's features of the same size. The last
convolution has neither norm nor ReLU. The weights have the names of the published code.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from ditlab.networks.bf_norm import BiasFreeNorm
from ditlab.networks.bf_unet_config import BFUNetConfig
from ditlab.networks.module import BlindNetwork


class BFUNet(BlindNetwork[BFUNetConfig]):
    """The bias-free UNet: noisy image -> noise, in the units of the image.

    Example:
        >>> network = BFUNet(BFUNetConfig(channels=1, width=8, blocks=2)).eval()
        >>> y = torch.ones(1, 1, 8, 8)
        >>> torch.allclose(network(3 * y), 3 * network(y), atol=1e-5)
        True
    """

    title = "bias-free UNet"

    def __init__(self, config: BFUNetConfig) -> None:
        super().__init__(config)
        widths = [config.width * 2**block for block in range(config.blocks + 1)]
        before = [config.channels, *widths[:-2]]
        self.encoder = nn.ModuleList(
            self._stage([before[block], *[widths[block]] * config.encoder_convs], bare_first=block == 0)
            for block in range(config.blocks)
        )
        self.mid_block = self._stage([widths[-2], *[widths[-1]] * config.middle_convs])
        self.upsample = nn.ModuleList(
            nn.ConvTranspose2d(widths[block + 1], widths[block], 2, stride=2, bias=False)
            for block in range(config.blocks)
        )
        self.decoder = nn.ModuleList(
            self._stage(
                [
                    widths[block + 1],  # half from the block below, half from the encoder
                    *[widths[block]] * (config.decoder_convs - 1),
                    widths[block] if block else config.channels,
                ],
                bare_last=block == 0,
            )
            for block in range(config.blocks)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight)

    def _stage(self, widths: list[int], *, bare_first: bool = False, bare_last: bool = False) -> nn.Sequential:
        """Returns convolutions from each width to the next, each with a norm and a ReLU.

        A bare first convolution has no norm, a bare last one neither norm nor ReLU.
        """
        kernel, last = self.config.kernel, len(widths) - 2
        parts: list[nn.Module] = []
        for place, (before, after) in enumerate(pairwise(widths)):
            parts.append(nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False))
            if place == last and bare_last:
                break
            if place or not bare_first:
                parts.append(BiasFreeNorm(after))
            parts.append(nn.ReLU())
        return nn.Sequential(*parts)

    def _noise(self, x: Tensor) -> Tensor:
        self.config.check_sides(x.shape[2], x.shape[3])
        window, skips = self.config.pool_window, []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
            x = avg_pool2d(x, window, stride=2, padding=(window - 1) // 2)
        x = self.mid_block(x)
        for block in reversed(range(self.config.blocks)):
            x = self.decoder[block](torch.cat([self.upsample[block](x), skips[block]], 1))
        return x


__all__ = ["BFUNet"]
