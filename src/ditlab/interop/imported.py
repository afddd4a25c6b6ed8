"""What reading somebody else's checkpoint gives, whatever its format: a denoiser, and what is known about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from ditlab.diffusion.network_denoisers import NetworkDenoiser, VPDenoiser
from ditlab.diffusion.objectives import VPObjectiveConfig
from ditlab.diffusion.sampler_configs import SamplerConfig
from ditlab.diffusion.schedules import ScheduleName, VPSchedule, make_schedule
from ditlab.errors import DitlabError
from ditlab.networks.dit import DiTConfig


@dataclass(frozen=True, eq=False)
class ImportedModel:
    """A network that ditlab did not train, as a denoiser."""

    name: str
    """What results call it."""
    denoiser: NetworkDenoiser
    """Made of the network, on the CPU and in evaluation mode."""
    sampler: SamplerConfig
    """How samples are drawn by default."""
    source: Mapping[str, Any]
    """Where it comes from: "format" and whatever else is known, as JSON values."""
    digest: str
    """SHA-256 of all that its outputs depend on, 64 hexadecimal digits: tells models of one name apart."""
    decoder: Path | None = None
    """Folder of the diffusers autoencoder that turns its latents into pictures; None for a model of pixels."""
    any_size: bool = False
    """Whether its network runs at any image size: the shape that its denoiser has is a default."""

    def fit(self, shape: tuple[int, int, int]) -> None:
        """Makes a model of any size one for images of this shape (C, H, W); leaves any other alone.

        Raises:
            DitlabError: the network cannot have this size.
        """
        if self.any_size and shape[0] == self.denoiser.shape[0]:
            network: Any = self.denoiser.network
            network.config = replace(network.config, image_size=shape[1:])
            self.denoiser.shape = shape

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of how it was read, one sentence each; kept in `source`, so they go where it goes."""
        return tuple(self.source.get("notes", ()))


def frozen(network: nn.Module) -> Any:
    """The network in evaluation mode, without gradients of its weights."""
    return network.eval().requires_grad_(False)


def known_schedule(betas: np.ndarray) -> tuple[ScheduleName | None, VPSchedule]:
    """The process of these betas, and its name in ditlab if it has one.

    A named one is computed anew in float64, since others write the same numbers in float32: so levels of all models
    trained on it are equal to the last bit.

    Args:
        betas: variance added at each step, [T].
    """
    betas = np.asarray(betas, dtype=np.float64)
    for name in get_args(ScheduleName):
        if name == "linear" and len(betas) <= 20:
            continue  # it has no such short form
        schedule = make_schedule(name, len(betas))
        if np.allclose(schedule.betas, betas, rtol=1e-4, atol=0):
            return name, schedule
    return None, VPSchedule(betas)


def objective_of(denoiser: NetworkDenoiser, where: str) -> VPObjectiveConfig:
    """The objective whose denoiser this is, for a config.

    Raises:
        DitlabError: its process has no name in ditlab.
    """
    if type(denoiser) is not VPDenoiser:  # not one of its kinds, which predict something else
        raise DitlabError(f"{where}: expected a model that predicts the noise or the image of a VP process")
    name, schedule = known_schedule(denoiser.schedule.betas)
    whole = np.array_equal(schedule.timesteps, denoiser.schedule.timesteps)
    if name is None or not whole or denoiser.time_factor not in (1, 1000 / len(schedule)):
        raise DitlabError(
            f"{where}: expected the linear or the cosine schedule, found another, which no config of ditlab can name; "
            "use the model as it is, by diffusers:PATH"
        )
    return VPObjectiveConfig(
        schedule=name,
        steps=len(schedule),
        prediction=denoiser.prediction,
        variance=denoiser.variance,
        between=denoiser.between,
        rescale_time=denoiser.time_factor != 1,
    )


def check_portable(config: DiTConfig, to: str) -> None:
    """Raises DitlabError for a DiT with something that no other DiT has: another block, local windows, no square."""
    if config.block != "adaln-zero":
        raise DitlabError(f"{to} knows adaln-zero blocks only, this DiT has {config.block} blocks")
    local = [str(number) for number, pattern in enumerate(config.patterns, 1) if not pattern.covers(config.grid)]
    if local:
        raise DitlabError(
            f"{to} knows global attention only, this DiT ({config.attention}) has local windows in layers "
            f"{', '.join(local)}"
        )
    if config.image_size[0] != config.image_size[1]:
        rows, columns = config.image_size
        raise DitlabError(f"{to} knows square images only, this DiT is for {rows}x{columns} pixels")
    if not config.num_classes:
        raise DitlabError(f"{to} knows class-conditional networks only, this DiT has no classes")


def state_on_cpu(network: nn.Module) -> dict[str, torch.Tensor]:
    """The network's weights, on the CPU and contiguous."""
    return {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
