"""Settings of the bias-free UNet (`ditlab.networks.bf_unet`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ditlab.errors import DitlabError
from ditlab.networks.base import NetworkConfig


@dataclass(frozen=True)
class BFUNetConfig(NetworkConfig):
    """Settings that determine the shape of a bias-free UNet."""

    takes_noise_level: ClassVar[bool] = False

    kind: Literal["bf-unet"] = "bf-unet"
    image_size: tuple[int, int] = (32, 32)
    """Height and width of the image, multiples of 2^blocks; the network also runs at any other such size."""
    channels: int = 3
    """Channels of the image."""
    width: int = 64
    """Channels of the first block; they double with each further block."""
    blocks: int = 3
    """Number of blocks in the encoder and in the decoder; each halves the image (B in the paper, 1 to 4)."""
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
        """Refuses sizes that cannot be built."""
        where = "bias-free UNet config"
        convs = ("encoder_convs", "middle_convs", "decoder_convs")
        self.check_counts(where, "channels", "width", "blocks", *convs, "pool_window")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise DitlabError(f"{where}: kernel must be odd, found {self.kernel}")
        if self.sized:
            if min(self.image_size) < 1:
                raise DitlabError(f"{where}: expected image sides of at least 1, found {self.image_size}")
            self.check_sides(*self.image_size)

    def check_sides(self, height: int, width: int) -> None:
        """Raises a DitlabError if images of this size cannot be halved `blocks` times."""
        if height % 2**self.blocks or width % 2**self.blocks:
            raise DitlabError(
                f"bias-free UNet: expected image sides that are multiples of {2**self.blocks} for {self.blocks} "
                f"blocks, found {height}x{width}"
            )


__all__ = ["BFUNetConfig"]
