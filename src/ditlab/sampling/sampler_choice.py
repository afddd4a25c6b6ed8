"""The sampler that a name, a number of steps and a schedule stand for."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, get_args

from ditlab.diffusion.sampler_configs import (
    DDIMConfig,
    DDPMConfig,
    DPMSolverConfig,
    HeunConfig,
    SamplerConfig,
    Spacing,
)
from ditlab.errors import InvalidConfig, unknown_name
from ditlab.sampling.options import SamplerName

if TYPE_CHECKING:
    from ditlab.sampling.model import Sampled

__all__ = ["quick_sampler", "sampler_config", "sampler_name"]


def sampler_config(
    model: Sampled, sampler: str = "run", steps: int | str | None = None, schedule: Spacing | None = None
) -> SamplerConfig:
    """Returns the sampler that a user named, "run" for the model's own, with its own steps and spacing where None.

    euler is Heun's without the correction. On a denoiser with numbered steps the samplers of higher order take those
    steps, unless a schedule is given; DDPM and DDIM take none.
    """
    if sampler not in get_args(SamplerName):
        raise unknown_name("sampler", sampler, get_args(SamplerName))
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
    """Returns the name by which `sampler_config` makes it."""
    return "euler" if isinstance(config, HeunConfig) and not config.second_order else config.kind


def quick_sampler(model: Sampled) -> SamplerConfig:
    """Returns a sampler for pictures beside an analysis: the run's own where it takes few steps, else DDIM in 50."""
    config = sampler_config(model)
    return config if isinstance(config, HeunConfig | DPMSolverConfig) else sampler_config(model, "ddim", "50")
