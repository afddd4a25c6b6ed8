"""Settings of classifier-free guidance (`ditlab.diffusion.guidance`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ditlab.diffusion.short_repr import ShortRepr
from ditlab.errors import DitlabError

__all__ = ["GuidanceConfig", "GuidanceSchedule"]

GuidanceSchedule = Literal["constant", "power-cosine"]


@dataclass(frozen=True, repr=False)
class GuidanceConfig(ShortRepr):
    """How strongly samples are pulled towards their class."""

    scale: float = 1.0
    """Scale w: 1 is no guidance; above 1 exaggerates the class; 0 ignores it; between 0 and 1 weakens it."""
    schedule: GuidanceSchedule = "constant"
    """Scale during sampling: constant, or power-cosine, which rises from 1 at pure noise to w at the image."""
    power: float = 4.0
    """Exponent of power-cosine; the larger it is, the later guidance begins."""
    interval: tuple[float, float] | None = None
    """(low, high): guide at noise levels low < sigma <= high alone; none for all levels."""
    channels: int | Literal["all"] | None = None
    """Number of guided channels (the first ones), or all; none for the published choice: 3 of the 4 channels of Stable
    Diffusion's latents, and all channels of other images."""

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:  # NaN fails it too
            raise DitlabError(f"guidance: expected a scale of at least 0 (1 is no guidance), found {self.scale:g}")
        if not 0 < self.power < math.inf:
            raise DitlabError(f"guidance: expected a power above 0, found {self.power:g}")
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1] < math.inf:
            low, high = self.interval
            raise DitlabError(f"guidance: expected an interval 0 <= low < high < infinity, found {low:g} and {high:g}")
        if isinstance(self.channels, int) and self.channels < 1:
            raise DitlabError(f"guidance: expected channels of at least 1, or 'all', found {self.channels}")

    @property
    def on(self) -> bool:
        """Whether it changes the estimate."""
        return self.scale != 1

    def guided_channels(self, channels: int) -> int:
        """Returns how many of an image's channels are guided; more than the image has are refused."""
        if self.channels == "all":
            return channels
        if self.channels is None:
            return 3 if channels == 4 else channels
        if self.channels > channels:
            raise DitlabError(f"guidance: expected channels of at most {channels}, found {self.channels}")
        return self.channels
