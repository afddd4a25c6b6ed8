"""The settings of sampling. This module imports no torch, so that help texts are instant."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Literal

from ditlab.diffusion.guidance_config import GuidanceConfig, GuidanceSchedule
from ditlab.diffusion.sampler_configs import Spacing

__all__ = ["GuidanceFlags", "SampleConfig", "SamplerName"]

SamplerName = Literal["run", "ddpm", "ddim", "euler", "heun", "dpm++2m"]


@dataclass(frozen=True)
class GuidanceFlags:
    """How strongly samples are pulled towards their class; the model's own setting where a field is None."""

    scale: float | None = None
    """The scale w: 1 is no guidance, above 1 exaggerates the class, 0 leaves it out, between 0 and 1 weakens it."""
    schedule: GuidanceSchedule | None = None
    """How the scale changes along sampling: constant, or power-cosine from 1 at pure noise to w at the image."""
    power: float | None = None
    """Exponent of power-cosine; the larger it is, the later guidance sets in."""
    interval: tuple[float, float] | None = None
    """LOW HIGH: guide only at noise levels LOW < sigma <= HIGH."""
    channels: int | Literal["all"] | None = None
    """How many channels are guided, the first ones, or all; by default as published: 3 of the 4 channels of Stable
    Diffusion's latents, and all of any other image's."""

    def apply_to(self, config: GuidanceConfig) -> GuidanceConfig:
        """Returns a config with the fields that are not None put in their places."""
        changes = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(config, **changes)


@dataclass(frozen=True)
class SampleConfig:
    """Which images are drawn, and how."""

    seeds: str | None = None
    """Seeds of the images: numbers and ranges such as 0-9,20,30-39; 0-63 if not given (0-7 for a sweep)."""
    sampler: SamplerName = "run"
    """The sampler; run: the model's own."""
    sampler_steps: str | None = None
    """Steps of the sampler: a count, for DDPM and DDIM also ddim50 or 10,15,20; the sampler's default if not given."""
    schedule: Spacing | None = None
    """How euler, heun and dpm++2m space their noise levels; grid, the denoiser's own steps, if not given."""
    classes: tuple[int, ...] | None = None
    """Classes to draw: seed S gets classes[S % number of classes]; all classes in turn if not given."""
    guidance: GuidanceFlags = field(default_factory=GuidanceFlags)
    """Classifier-free guidance of a class-conditional model."""
    guidance_sweep: tuple[float, ...] = ()
    """Guidance scales to compare: one picture with a row for each scale and a column for each seed."""
    strip: int = 0
    """Also draw the path from noise to image of this many of the first images."""
    images: bool = True
    """Also write each image as a PNG of its own, named by its seed."""
    batch: int = 64
    """Images drawn at once; an interrupted job may resume with another size."""
    checkpoint: int | None = None
    """The step of the checkpoint of a run; the newest if not given."""
    raw: bool = False
    """Use the raw weights instead of the averaged ones."""
