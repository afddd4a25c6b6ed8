"""`ImportedModel`, the record of a checkpoint that was read from another format, and helpers to build one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import nn

from ditlab.diffusion.choices import ScheduleName
from ditlab.diffusion.network_denoisers import NetworkDenoiser, VPDenoiser
from ditlab.diffusion.objective_configs import VPObjectiveConfig
from ditlab.diffusion.sampler_configs import SamplerConfig
from ditlab.diffusion.schedules import VPSchedule, make_schedule
from ditlab.errors import DitlabError
from ditlab.networks.dit_config import DiTConfig


@dataclass(frozen=True, eq=False)
class ImportedModel:
    """A denoiser made of a network that ditlab did not train, and what is known about it."""

    name: str
    """Name of the model in results."""
    denoiser: NetworkDenoiser
    """Denoiser of the network, on the CPU and in evaluation mode."""
    sampler: SamplerConfig
    """The default sampler."""
    source: Mapping[str, Any]
    """Origin: "format" and everything else that is known, as JSON values."""
    digest: str
    """SHA-256 of everything that its outputs depend on, 64 hexadecimal digits; distinguishes models of one name."""
    decoder: Path | None = None
    """Folder of the diffusers autoencoder that decodes its latents; None for a model of pixels."""
    any_size: bool = False
    """Whether the network runs at any image size; the denoiser's shape is then a default."""

    def fit(self, shape: tuple[int, int, int]) -> None:
        """Sets the shape (C, H, W) of a model of any size, which its config may refuse; others stay as they are."""
        if self.any_size and shape[0] == self.denoiser.shape[0]:
            network: Any = self.denoiser.network
            network.config = replace(network.config, image_size=shape[1:])
            self.denoiser.shape = shape

    @property
    def notes(self) -> tuple[str, ...]:
        """Assumptions made when the checkpoint was read, one sentence each; part of `source`."""
        return tuple(self.source.get("notes", ()))


def freeze(network: nn.Module) -> Any:
    """Returns the network in evaluation mode, with gradients of its weights disabled."""
    return network.eval().requires_grad_(False)


def match_schedule(betas: np.ndarray) -> tuple[ScheduleName | None, VPSchedule]:
    """Returns the process with these betas `[T]`, and its name in ditlab if it has one.

    A named process is recomputed in float64, because others store it in float32: noise levels of all models trained on
    it are then equal to the last bit.
    """
    betas = np.asarray(betas, dtype=np.float64)
    for name in get_args(ScheduleName):
        if name == "linear" and len(betas) <= 20:
            continue  # not defined for so few steps
        schedule = make_schedule(name, len(betas))
        if np.allclose(schedule.betas, betas, rtol=1e-4, atol=0):
            return name, schedule
    return None, VPSchedule(betas)


def objective_of(denoiser: NetworkDenoiser, where: str) -> VPObjectiveConfig:
    """Returns the config of the objective that a denoiser was trained with; DitlabError where no config says it."""
    if type(denoiser) is not VPDenoiser:  # subclasses predict something else
        raise DitlabError(f"{where}: expected a model that predicts the noise or the image of a VP process")
    name, schedule = match_schedule(denoiser.schedule.betas)
    complete = np.array_equal(schedule.timesteps, denoiser.schedule.timesteps)
    if name is None or not complete or denoiser.time_factor not in (1, 1000 / len(schedule)):
        raise DitlabError(
            f"{where}: expected the linear or the cosine schedule, found another, which no config can express; "
            "open the model unconverted, as diffusers:PATH"
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
    """Raises DitlabError for a DiT that other formats cannot express: other blocks, local windows, not square."""
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
    """Returns the network's weights, contiguous on the CPU."""
    return {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}


__all__ = ["ImportedModel", "check_portable", "freeze", "match_schedule", "objective_of", "state_on_cpu"]
