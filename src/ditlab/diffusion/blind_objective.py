"""The objective of blind denoisers: a network without the noise level as input learns to estimate the noise.

    L = sum |n_theta(x + sigma n) - sigma n|^2,  sigma = max_level u^2,  u uniform in [0, 1]

Source: Kadkhodaie et al. 2024, their published training code.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ditlab.diffusion.network_denoisers import BlindDenoiser
from ditlab.diffusion.noise_levels import LevelRange
from ditlab.diffusion.objective_configs import BlindObjectiveConfig
from ditlab.diffusion.objectives import Draws, Objective
from ditlab.errors import DitlabError

__all__ = ["BlindObjective"]


class BlindObjective(Objective):
    """Summed squared error of the noise; `draw` gives "sigma", in the network's units, and "noise", unit normal."""

    label_dropout = 0.0

    def __init__(self, config: BlindObjectiveConfig) -> None:
        self.config = config
        self.unit = (config.high - config.low) / 2

    def draw(self, generator: torch.Generator, count: int, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """See `Objective.draw`."""
        # The square root of a level is uniform, so low levels are drawn more often than high ones.
        sigma = self.config.max_level * torch.rand(count, generator=generator).square()
        return {"sigma": sigma, "noise": torch.randn(count, *shape, generator=generator)}

    def losses(
        self, network: nn.Module, images: Float[Tensor, "b c h w"], label: Int[Tensor, " b"] | None, draws: Draws
    ) -> dict[str, Tensor]:
        """Returns "loss": the squared error of the noise, in the network's units, summed over the image."""
        noise = draws["sigma"].reshape(-1, 1, 1, 1) * draws["noise"]
        output = network(self.config.low + self.unit * (images + 1) + noise, None, None).float()
        if output.shape != images.shape:
            raise DitlabError(
                f"objective: expected {images.shape[1]} channels from the network, found {output.shape[1]}"
            )
        return {"loss": (output - noise).square().flatten(1).sum(1)}

    def denoiser(self, network: nn.Module, shape: tuple[int, int, int] | None = None) -> BlindDenoiser:
        """See `Objective.denoiser`; its levels are in units of [-1, 1]."""
        config = self.config
        levels = LevelRange(0.0, config.max_level / self.unit)
        return BlindDenoiser(network, levels, low=config.low, high=config.high, shape=shape)

    def network_outputs(self, channels: int) -> int:
        """Returns C: a blind network learns no variance."""
        return channels
