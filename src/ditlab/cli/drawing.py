"""Drawing samples: which sampler, how guided, which noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.guidance import GuidanceConfig, GuidanceSchedule, guided
from ditlab.diffusion.sampler_configs import Spacing
from ditlab.diffusion.samplers import (
    Callback,
    DDIMConfig,
    DDPMConfig,
    DPMSolverConfig,
    HeunConfig,
    ImageNoise,
    SamplerConfig,
    sample,
)
from ditlab.errors import DitlabError
from ditlab.models.model import Model

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

    def over(self, config: GuidanceConfig) -> GuidanceConfig:
        """A config with what was given put in its place."""
        given = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(config, **given)


def sampler_config(
    run: Model, sampler: SamplerName = "run", steps: str | None = None, levels: Spacing | None = None
) -> SamplerConfig:
    """The sampler that a user asked for.

    Args:
        run: whose own sampler is the default.
        sampler: its name; euler is Heun's without the correction. On a denoiser with numbered steps the ones of
            higher order take those steps, where no other spacing is asked for.
        steps: its steps, or None for its default.
        levels: spacing of its levels, or None for its default; not for DDPM and DDIM.

    Raises:
        DitlabError: steps or levels that it does not take.
    """
    known: dict[str, SamplerConfig] = {
        "ddpm": DDPMConfig(),
        "ddim": DDIMConfig(),
        "euler": HeunConfig(levels="grid", second_order=False),
        "heun": HeunConfig(levels="grid"),
        "dpm++2m": DPMSolverConfig(),
    }
    config = run.sampler if sampler == "run" else known[sampler]
    if isinstance(config, DDPMConfig | DDIMConfig):
        if levels is not None:
            raise DitlabError(
                f"sample --levels: {config.kind} takes the denoiser's own levels; expected none, found {levels}"
            )
        return config if steps is None else replace(config, steps=steps)
    if levels is not None:
        config = replace(config, levels=levels, sigma_min=None, sigma_max=None)
    if steps is None:
        return config
    if not steps.isdigit():
        raise DitlabError(f"sample --steps: the {sampler_name(config)} sampler takes a count, found '{steps}'")
    return replace(config, steps=int(steps))


def sampler_name(config: SamplerConfig) -> str:
    """What `sampler_config` knows it by."""
    return "euler" if isinstance(config, HeunConfig) and not config.second_order else config.kind


def quick_sampler(run: Model) -> SamplerConfig:
    """A sampler for pictures beside an analysis: the run's own where it takes few steps, else DDIM in 50."""
    config = sampler_config(run)
    return config if isinstance(config, HeunConfig | DPMSolverConfig) else sampler_config(run, "ddim", "50")


def guided_as(run: Model, denoiser: Denoiser, config: GuidanceConfig | None = None) -> Denoiser:
    """The run's denoiser with guidance.

    Args:
        run: where it comes from.
        denoiser: its denoiser.
        config: the guidance; the run's own where None.

    Raises:
        DitlabError: it cannot be guided, or was never trained without labels.
    """
    config = run.guidance if config is None else config
    if config.on and denoiser.num_classes and run.settings.get("objective.label_dropout") == 0:
        raise DitlabError(
            f"guidance: {run.name} was trained with objective.label_dropout 0, so it knows no estimate without a class"
        )
    return guided(denoiser, config)


def draw_batch(
    denoiser: Denoiser,
    config: SamplerConfig,
    seeds: Sequence[int],
    *,
    label: Tensor | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, "b c h w"]:
    """One image for each seed, all at once, as the denoiser sees images, on the CPU; see `draw`."""
    noise = ImageNoise(seeds, denoiser.shape)
    return sample(denoiser, config, noise.initial(), label=label, noise=noise, callback=callback).cpu()


def draw(
    denoiser: Denoiser,
    config: SamplerConfig,
    seeds: Sequence[int],
    *,
    batch: int = 64,
    label: Tensor | None = None,
    progress: Any = lambda done, total: None,
) -> Float[Tensor, "b c h w"]:
    """One image for each seed, as the denoiser sees images, on the CPU; each depends on its own seed (and label) alone.

    Args:
        denoiser: any.
        config: which sampler, and its settings.
        seeds: of the images.
        batch: images drawn at once.
        label: class of each image, int64 [len(seeds)].
        progress: told how many are done, of how many.
    """
    parts = []
    for start in range(0, len(seeds), batch):
        chosen = seeds[start : start + batch]
        part = None if label is None else label[start : start + len(chosen)]
        parts.append(draw_batch(denoiser, config, chosen, label=part))
        progress(start + len(chosen), len(seeds))
    return torch.cat(parts)
