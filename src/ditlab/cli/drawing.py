"""Drawing samples: which sampler, which noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.samplers import DDIMConfig, DDPMConfig, HeunConfig, ImageNoise, SamplerConfig, sample
from ditlab.errors import DitlabError
from ditlab.trained import Trained


def sampler_config(run: Trained, sampler: str = "run", steps: str | None = None) -> SamplerConfig:
    """The sampler that a user asked for.

    Args:
        run: whose own sampler is the default.
        sampler: run, ddpm, ddim or heun.
        steps: its steps, or None for its default.
    """
    config = (
        run.sampler if sampler == "run" else {"ddpm": DDPMConfig, "ddim": DDIMConfig, "heun": HeunConfig}[sampler]()
    )
    if steps is None:
        return config
    if isinstance(config, HeunConfig):
        if not steps.isdigit():
            raise DitlabError(f"sample --steps: the Heun sampler takes a count, found '{steps}'")
        return replace(config, steps=int(steps))
    return replace(config, steps=steps)


def quick_sampler(run: Trained) -> SamplerConfig:
    """A sampler for pictures beside an analysis: the run's own where it is Heun's, else DDIM in 50 steps."""
    config = sampler_config(run)
    return config if isinstance(config, HeunConfig) else sampler_config(run, "ddim", "50")


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
        noise = ImageNoise(chosen, denoiser.shape)
        part = None if label is None else label[start : start + len(chosen)]
        parts.append(sample(denoiser, config, noise.initial(), label=part, noise=noise).cpu())
        progress(start + len(chosen), len(seeds))
    return torch.cat(parts)
