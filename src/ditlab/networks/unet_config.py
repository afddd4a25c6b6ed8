"""Settings of improved-diffusion's UNet (`ditlab.networks.unet`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm
from typing import ClassVar, Literal, get_args

from ditlab.errors import DitlabError, unknown_name
from ditlab.networks.base import NetworkConfig
from ditlab.nn import Spacing


@dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """Settings that determine the shape of a UNet."""

    takes_labels: ClassVar[bool] = True
    can_learn_variance: ClassVar[bool] = True

    kind: Literal["unet"] = "unet"
    image_size: tuple[int, int] = (32, 32)
    """Height and width of the image or latent, multiples of 2^(levels - 1), since each level but the last halves them.
    0 0 means not known yet: such a config can be changed, not built."""
    width: int = 128
    """Channels at full size, even and a multiple of the groups."""
    res_blocks: int = 2
    """Residual blocks of each level of the encoder; levels of the decoder have one more."""
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    """Channels of each level, as multiples of the width. The original uses 1 2 2 2 at 32 pixels, 1 2 3 4 at 64 and
    1 1 2 2 4 4 at 256."""
    attention_at: tuple[int, ...] = (16, 8)
    """Heights of the feature maps that have attention after each residual block; heights that do not occur have no
    effect. The middle always has attention."""
    heads: int = 4
    """Heads of every attention layer."""
    heads_up: int | None = None
    """Heads of the decoder's attention layers; the same as `heads` by default."""
    dropout: float = 0.0
    """Dropout probability in every residual block."""
    conv_resample: bool = True
    """Whether convolutions halve and double the size, instead of the mean of 2x2 pixels and repeated pixels."""
    scale_shift: bool = True
    """Whether the condition sets scale and shift of each residual block's second norm; else it is added before it."""
    groups: int = 32
    """Groups of every group norm. 32 in the original; with fewer, narrow networks keep more of each channel's level."""
    num_classes: int = 0
    """Number of classes; 0 for an unconditional network, which has no label table."""
    null_class: bool = False
    """Whether the label table has a row for "no class", which label dropout and guidance need; none in the original."""
    learn_sigma: bool = False
    """Whether the network has a second set of output channels, v, for the variance of the reverse step."""
    time_frequencies: Spacing = "original"
    """Frequencies of the time embedding: with h = width / 2, 10000^(-k/h), k < h (original), or 10000^(-k/(h-1)), as in
    DDPM and diffusers."""

    def __post_init__(self) -> None:
        """Refuses sizes that cannot be built."""
        where = "UNet config"
        if self.time_frequencies not in get_args(Spacing):
            raise unknown_name(f"{where} time_frequencies", self.time_frequencies, get_args(Spacing))
        self.check_counts(where, "channels", "width", "res_blocks", "heads", "heads_up", "groups")
        if not self.multipliers or min(self.multipliers) < 1:
            raise DitlabError(f"{where}: expected multipliers of at least 1, one a level, found {self.multipliers}")
        if min(self.attention_at, default=1) < 1:
            raise DitlabError(f"{where}: attention_at must be heights of at least 1, found {self.attention_at}")
        if not 0 <= self.dropout < 1:
            raise DitlabError(f"{where}: expected dropout in [0, 1), found {self.dropout}")
        if self.width % self.groups or self.width % 2:
            raise DitlabError(
                f"{where}: width must be even and a multiple of the {self.groups} groups, found {self.width}"
            )
        if not self.sized:
            return
        step, size = 2 ** (len(self.multipliers) - 1), tuple(self.image_size)
        if any(side < 1 or side % step for side in size):
            levels = len(self.multipliers)
            raise DitlabError(f"{where}: with {levels} levels image_size must be multiples of {step}, found {size}")
        for place, level, heads in self._attentions():
            if self.widths[level] % heads:
                raise DitlabError(
                    f"{where}: expected heads that divide the {self.widths[level]} channels of the attention in the "
                    f"{place}, found {heads}"
                )

    def _attentions(self) -> Iterator[tuple[str, int, int]]:
        """Yields each place with attention: part of the network, level, heads."""
        last = len(self.multipliers) - 1
        yield "middle", last, self.heads
        for level in range(last + 1):
            if self.attends(level):
                yield "encoder", level, self.heads
                yield "decoder", level, self.decoder_heads

    @property
    def width_step(self) -> int:
        """Number that `width` must be a multiple of, so that groups and heads divide every level's channels."""
        return lcm(2, self.groups, self.heads, self.decoder_heads)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, full size first."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def decoder_heads(self) -> int:
        """Attention heads of the decoder."""
        return self.heads if self.heads_up is None else self.heads_up

    def grid(self, level: int) -> tuple[int, int]:
        """Returns (height, width) of the feature maps of a level; level 0 has full size."""
        return self.image_size[0] >> level, self.image_size[1] >> level

    def attends(self, level: int) -> bool:
        """Whether there is attention after each residual block of a level."""
        # As in the original: by the ratio of the image's height to the feature map's, rounded down.
        return 2**level in {self.image_size[0] // height for height in self.attention_at}


__all__ = ["UNetConfig"]
