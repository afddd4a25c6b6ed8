"""The bias-free UNet of Kadkhodaie, Guth, Simoncelli and Mallat, "Generalization in diffusion models arises from
geometry-adaptive harmonic representations" (ICLR 2024): noisy image -> noise, without one additive constant.

Block b of the encoder has convolutions of width 64 * 2^b, each with a bias-free norm and ReLU but for the very first,
which has the ReLU alone; average pooling halves the image between blocks. Below the last lies the middle, and the
decoder goes up again by transposed convolutions, each joined with the encoder's features of its size. The last
convolution has neither norm nor ReLU. The names of the weights are those of the published code.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from ditlab.errors import DitlabError
from ditlab.networks.bf_norm import BiasFreeNorm


@dataclass(frozen=True)
class BFUNetConfig:
    """Everything that fixes the shape of a bias-free UNet."""

    kind: Literal["bf-unet"] = "bf-unet"
    """Names this network in config.json."""
    image_size: tuple[int, int] = (32, 32)
    """Height and width of the image, multiples of 2^blocks; it runs at any other such size too."""
    channels: int = 3
    """Channels of the image."""
    width: int = 64
    """Channels of the first block; each further one has twice as many."""
    blocks: int = 3
    """Blocks of the encoder, and of the decoder; the image is halved after each (the paper's B, 1 to 4)."""
    encoder_convs: int = 2
    """Convolutions in each block of the encoder."""
    middle_convs: int = 2
    """Convolutions between encoder and decoder."""
    decoder_convs: int = 2
    """Convolutions in each block of the decoder."""
    kernel: int = 3
    """Side of the convolutions' kernels, odd."""
    pool_window: int = 2
    """Side of the window of average pooling; its stride is 2 and its padding (pool_window - 1) // 2."""

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be built."""
        counts = ("channels", "width", "blocks", "encoder_convs", "middle_convs", "decoder_convs", "pool_window")
        for name in counts:
            if getattr(self, name) < 1:
                raise DitlabError(f"bias-free UNet config: {name} must be at least 1, found {getattr(self, name)}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise DitlabError(f"bias-free UNet config: kernel must be odd, found {self.kernel}")
        if self.sized and min(self.image_size) < 1:
            raise DitlabError(f"bias-free UNet config: expected image sides of at least 1, found {self.image_size}")
        if self.sized:
            self.check_sides(*self.image_size)

    @property
    def sized(self) -> bool:
        """Whether the image size is known."""
        return tuple(self.image_size) != (0, 0)

    def check_sides(self, height: int, width: int) -> None:
        """Raises a DitlabError where images of this size cannot be halved so often."""
        if height % 2**self.blocks or width % 2**self.blocks:
            raise DitlabError(
                f"bias-free UNet: expected image sides that are multiples of {2**self.blocks} for {self.blocks} "
                f"blocks, found {height}x{width}"
            )


class BFUNet(nn.Module):
    """The bias-free UNet: noisy image -> noise, in whatever units the image has.

    Example:
        >>> network = BFUNet(BFUNetConfig(channels=1, width=8, blocks=2)).eval()
        >>> y = torch.ones(1, 1, 8, 8)
        >>> torch.allclose(network(3 * y), 3 * network(y), atol=1e-5)
        True
    """

    num_classes = 0
    """It takes no label."""

    def __init__(self, config: BFUNetConfig) -> None:
        super().__init__()
        self.config = config
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
                    widths[block + 1],  # half of them from below, half from the encoder
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
        """Convolutions from each width to the next, each with a norm and ReLU.

        Args:
            widths: of the input, and after each convolution.
            bare_first: the first is not normalized.
            bare_last: the last has neither norm nor ReLU.
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

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the input."""
        return self.config.channels, *self.config.image_size

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        t: Tensor | None = None,
        label: Tensor | None = None,
        *,
        augment: Tensor | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Runs the network.

        Args:
            x: noisy images [B, C, H, W], zero being the network's own zero.
            t: ignored: the network is blind.
            label: ignored.
            augment: not supported; must be None.

        Raises:
            DitlabError: when `augment` is given, or the image's sides cannot be halved often enough.
        """
        if augment is not None:
            raise DitlabError("bias-free UNet: expected no augmentation labels, found some")
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
