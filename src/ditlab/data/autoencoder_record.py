"""What identifies an autoencoder (`ditlab.data.autoencoder`) in config.json and manifests."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import ClassVar, Literal

from ditlab.errors import DitlabError

__all__ = ["AutoencoderRecord"]


@dataclass(frozen=True)
class AutoencoderRecord:
    """Identifies an autoencoder: enough to find it again and to know that it is the same."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["identity", "kl", "tiny"]
    """No autoencoder, an AutoencoderKL, or a tiny autoencoder."""
    source: str
    """The REF that the user gave; empty for the identity."""
    place: str
    """Its path, relative to the folder that holds this record; empty for a hub id and the identity."""
    sha256: str
    """Hash of the weights: of names, shapes and float32 values, whatever file they came in."""
    image_channels: int
    """Channels of the pictures."""
    latent_channels: int
    """Channels of the latents."""
    factor: int
    """Height of a picture over height of its latents."""
    scale: float
    """Scaled latents are (z - shift) * scale."""
    shift: float
    """See `scale`."""

    @property
    def variational(self) -> bool:
        """Whether it gives a standard deviation besides the mean."""
        return self.kind == "kl"

    def difference(self, other: AutoencoderRecord) -> tuple[str, str, str] | None:
        """Returns the first field other than a path that differs: its name, our value, the other's; None if equal."""
        for name in (field.name for field in fields(self) if field.name not in ("source", "place")):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                cut = slice(12) if name == "sha256" else slice(None)
                return name, str(ours)[cut], str(theirs)[cut]
        return None

    def moved(self, before: Path, now: Path) -> AutoencoderRecord:
        """Returns the record for the folder `now`, of one that was made for the folder `before`."""
        if not self.place:
            return self
        return replace(self, place=os.path.relpath((before / self.place).resolve(), now.resolve()))

    def latent_shape(self, picture: tuple[int, int, int]) -> tuple[int, int, int]:
        """Returns (c, h, w) of the latents of pictures (C, H, W), whose sides must be multiples of the factor."""
        channels, height, width = picture
        if channels != self.image_channels:
            raise DitlabError(
                f"codec '{self.source}': expected pictures of {self.image_channels} channels, found {channels}"
            )
        if height % self.factor or width % self.factor:
            raise DitlabError(
                f"codec '{self.source}': expected pictures whose sides are multiples of {self.factor}, "
                f"found {height}x{width}"
            )
        return self.latent_channels, height // self.factor, width // self.factor
