"""What the costs of networks are counted for."""

from __future__ import annotations

from dataclasses import dataclass

from ditlab.errors import InvalidConfig

__all__ = ["CHANGES", "ComplexityConfig"]

CHANGES = ("depth", "width", "heads", "attention", "block")
"""Settings that change the network of a preset."""


@dataclass(frozen=True)
class ComplexityConfig:
    """Images, changes of the networks, and what is counted."""

    size: tuple[int, ...] = ()
    """Side of the image or latent, or its height and width; the presets' own if not given."""
    channels: int = 3
    """Channels of the image; 4 for the latents of Peebles & Xie."""
    classes: int = 0
    """Number of classes of networks that take them, 1000 for ImageNet; the presets' own if not given."""
    depth: int | None = None
    """Number of blocks, instead of the presets' own."""
    width: int | None = None
    """Channels of a token, or of a UNet at full size, instead of the presets' own."""
    heads: int | None = None
    """Attention heads, instead of the presets' own."""
    attention: str | None = None
    """Attention plan, e.g. local or "3,5,7,g*9", instead of the presets' own."""
    block: str | None = None
    """How time and label enter the blocks (adaln-zero, adaln, in-context, cross-attention), instead of the presets'
    own."""
    batch: int | None = None
    """Batch size of the training compute, instead of the presets' own."""
    steps: int | None = None
    """Steps of the training compute, instead of the presets' own."""
    match: str | None = None
    """A preset: the width of each network is set so that its GMACs come nearest to this one's on the same images."""
    linear: bool = False
    """With `match`: compare GMACs without attention matrices, as An et al. do."""
    memory: bool = True
    """Measure the memory too, which takes most of the time."""

    def __post_init__(self) -> None:
        if len(self.size) > 2 or min(self.size, default=1) < 1:
            raise InvalidConfig(f"complexity: `size`: expected one side or height and width, found {list(self.size)}")
        for name in ("batch", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidConfig(f"complexity: `{name}`: expected at least 1, found {value}")
        if self.match is not None and self.width is not None:
            raise InvalidConfig("complexity: `match` finds the width, so `width` cannot be given with it")
        if self.linear and self.match is None:
            raise InvalidConfig("complexity: `linear` says what `match` compares; expected `match` with it, found none")
