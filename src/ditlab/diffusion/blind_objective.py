"""The objective of blind denoisers: a network that is told no noise level learns to find the noise in an image.

Source: Kadkhodaie et al. 2024, from their published training code: sigma = u^2 with u uniform, summed squared error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ditlab.diffusion.network_denoisers import BlindDenoiser
from ditlab.diffusion.noise_levels import LevelRange
from ditlab.diffusion.objectives import Draws, Objective
from ditlab.errors import DitlabError


@dataclass(frozen=True)
class BlindObjectiveConfig:
    """Training of a network that sees the noisy image alone, in units of its own, and puts out the noise.

    The loss is the squared error summed over an image, as in Kadkhodaie et al.'s code. The network sees our -1 as `low`
    and our 1 as `high`; a bias-free one is homogeneous about its zero.
    """

    kind: Literal["blind"] = "blind"
    """Names this objective in config.json."""
    low: float = 0.0
    """What the network sees for our -1."""
    high: float = 1.0
    """What the network sees for our 1."""
    max_level: float = 1.0
    """Highest noise level, in the network's units: 1 in Kadkhodaie et al., 100 / 255 in Mohan et al.'s BF-CNN."""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained."""
        if not -math.inf < self.low < self.high < math.inf:
            raise DitlabError(f"objective: expected finite low < high, found {self.low} and {self.high}")
        if not 0 < self.max_level < math.inf:
            raise DitlabError(f"objective: expected a finite max_level > 0, found {self.max_level}")

    def build(self) -> BlindObjective:
        """The objective."""
        return BlindObjective(self)


class BlindObjective(Objective):
    """Summed squared error of the noise; `draw` gives "sigma", in the network's units, and "noise", unit normal."""

    label_dropout = 0.0

    def __init__(self, config: BlindObjectiveConfig) -> None:
        self.config = config
        self.unit = (config.high - config.low) / 2

    def draw(self, generator: torch.Generator, count: int, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """See `Objective.draw`."""
        # The root of a level is uniform: low levels are drawn more often than high ones.
        sigma = self.config.max_level * torch.rand(count, generator=generator).square()
        return {"sigma": sigma, "noise": torch.randn(count, *shape, generator=generator)}

    def losses(
        self, network: nn.Module, images: Float[Tensor, "b c h w"], label: Int[Tensor, " b"] | None, draws: Draws
    ) -> dict[str, Tensor]:
        """ "loss": the squared error of the noise, in the network's units, summed over the image."""
        noise = draws["sigma"].reshape(-1, 1, 1, 1) * draws["noise"]
        found = network(self.config.low + self.unit * (images + 1) + noise, None, None).float()
        if found.shape != images.shape:
            raise DitlabError(
                f"objective: expected {images.shape[1]} channels from the network, found {found.shape[1]}"
            )
        return {"loss": (found - noise).square().flatten(1).sum(1)}

    def denoiser(self, network: nn.Module, shape: tuple[int, int, int] | None = None) -> BlindDenoiser:
        """See `Objective.denoiser`; its levels are in units of [-1, 1]."""
        config = self.config
        levels = LevelRange(0.0, config.max_level / self.unit)
        return BlindDenoiser(network, levels, low=config.low, high=config.high, shape=shape)

    def network_outputs(self, channels: int) -> int:
        """C: a blind network learns no variance."""
        return channels
