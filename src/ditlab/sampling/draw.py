"""Images from seeds: each depends on its own seed and class alone, whatever the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.guidance import guided
from ditlab.diffusion.guidance_config import GuidanceConfig
from ditlab.diffusion.samplers import Callback, ImageNoise, SamplerConfig, sample
from ditlab.errors import DitlabError
from ditlab.progress import Bar

if TYPE_CHECKING:
    from ditlab.sampling.model import Sampled

__all__ = ["draw", "draw_batch", "with_guidance"]


def with_guidance(model: Sampled, denoiser: Denoiser, config: GuidanceConfig | None = None) -> Denoiser:
    """Returns the model's denoiser with guidance, the model's own where None.

    Raises:
        DitlabError: it cannot be guided, or was never trained without labels.
    """
    config = model.guidance if config is None else config
    if config.on and denoiser.num_classes and model.settings.get("objective.label_dropout") == 0:
        raise DitlabError(
            f"guidance: {model.name} was trained with objective.label_dropout 0, so it has no estimate without a class"
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
    """Returns one image for each seed, all at once, as the denoiser sees images, on the CPU; see `draw`."""
    noise = ImageNoise(seeds, denoiser.shape)
    return sample(denoiser, config, noise.initial(), label=label, noise=noise, callback=callback).cpu()


def draw(
    denoiser: Denoiser,
    config: SamplerConfig,
    seeds: Sequence[int],
    *,
    batch: int = 64,
    label: Tensor | None = None,
    bar: Bar | None = None,
) -> Float[Tensor, "b c h w"]:
    """Returns one image for each seed, as the denoiser sees images, on the CPU, so many drawn at once.

    Each depends on its own seed and class (`label`, int64 [len(seeds)]) alone.
    """
    parts = []
    for start in range(0, len(seeds), batch):
        chosen = seeds[start : start + batch]
        part = None if label is None else label[start : start + len(chosen)]
        parts.append(draw_batch(denoiser, config, chosen, label=part))
        if bar is not None:
            bar(start + len(chosen), len(seeds))
    return torch.cat(parts)
