"""Which sampler, by its name, and how a model's own sampler and guidance are changed."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from ditlab.diffusion.guidance_config import GuidanceConfig, GuidanceSchedule
from ditlab.diffusion.sampler_configs import (
    DDIMConfig,
    DDPMConfig,
    DPMSolverConfig,
    HeunConfig,
    SamplerConfig,
    Spacing,
)
from ditlab.errors import InvalidConfig
from ditlab.sampling.model import Sampled

__all__ = ["GuidanceFlags", "SamplerName", "quick_sampler", "sampler_config", "sampler_name"]

SamplerName = Literal["run", "ddpm", "ddim", "euler", "heun", "dpm++2m"]


@dataclass(frozen=True)
class GuidanceFlags:
    """How strongly samples are pulled towards their class; the run's own setting where one is not given."""

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
        """Returns a config with the settings that are not None put in their places."""
        changes = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(config, **changes)


def sampler_config(
    model: Sampled, sampler: SamplerName = "run", steps: int | str | None = None, schedule: Spacing | None = None
) -> SamplerConfig:
    """The sampler that a user asked for.

    Args:
        model: whose own sampler is the default.
        sampler: its name; euler is Heun's without the correction. On a denoiser with numbered steps the ones of
            higher order take those steps, where no other spacing is asked for.
        steps: its steps, or None for its default.
        schedule: spacing of its noise levels, or None for its default; not for DDPM and DDIM.

    Raises:
        InvalidConfig: steps or a schedule that it does not take.
    """
    known: dict[str, SamplerConfig] = {
        "ddpm": DDPMConfig(),
        "ddim": DDIMConfig(),
        "euler": HeunConfig(levels="grid", second_order=False),
        "heun": HeunConfig(levels="grid"),
        "dpm++2m": DPMSolverConfig(),
    }
    config = model.sampler if sampler == "run" else known[sampler]
    if isinstance(config, DDPMConfig | DDIMConfig):
        if schedule is not None:
            raise InvalidConfig(
                f"`schedule`: the {config.kind} sampler takes the denoiser's levels; expected none, found {schedule}"
            )
        return config if steps is None else replace(config, steps=str(steps))
    if schedule is not None:
        config = replace(config, levels=schedule, sigma_min=None, sigma_max=None)
    if steps is None:
        return config
    if not str(steps).isdigit():
        raise InvalidConfig(f"`sampler_steps`: the {sampler_name(config)} sampler takes a count, found '{steps}'")
    return replace(config, steps=int(steps))


def sampler_name(config: SamplerConfig) -> str:
    """What `sampler_config` knows it by."""
    return "euler" if isinstance(config, HeunConfig) and not config.second_order else config.kind


def quick_sampler(model: Sampled) -> SamplerConfig:
    """A sampler for pictures beside an analysis: the run's own where it takes few steps, else DDIM in 50."""
    config = sampler_config(model)
    return config if isinstance(config, HeunConfig | DPMSolverConfig) else sampler_config(model, "ddim", "50")
