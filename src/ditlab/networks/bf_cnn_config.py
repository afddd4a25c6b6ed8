"""Settings of a BF-CNN (`ditlab.networks.bf_cnn`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ditlab.errors import DitlabError
from ditlab.networks.base import NetworkConfig


@dataclass(frozen=True)
class BFCNNConfig(NetworkConfig):
    """Settings that determine the shape of a BF-CNN."""

    takes_noise_level: ClassVar[bool] = False

    kind: Literal["bf-cnn"] = "bf-cnn"
    image_size: tuple[int, int] = (32, 32)
    """Height and width of the image; the network also runs at any other size."""
    channels: int = 3
    """Channels of the image."""
    width: int = 64
    """Channels of the hidden layers."""
    depth: int = 20
    """Number of convolutions (20 in the published weights, 21 in Kadkhodaie et al.'s paper)."""

    def __post_init__(self) -> None:
        """Refuses sizes that cannot be built."""
        sides = self.image_size if self.sized else ()
        if min(*sides, self.channels, self.width) < 1 or self.depth < 2:
            raise DitlabError(
                "BF-CNN config: expected sizes, channels and width of at least 1 and depth of at least 2, found "
                f"{tuple(self.image_size)}, {self.channels}, {self.width}, {self.depth}"
            )


__all__ = ["BFCNNConfig"]
