"""What sampling needs of a model; `ditlab.models.model.Model` has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ditlab.data.autoencoder_record import AutoencoderRecord
    from ditlab.diffusion.guidance_config import GuidanceConfig
    from ditlab.diffusion.sampler_configs import SamplerConfig

__all__ = ["Sampled"]


class Sampled(Protocol):
    """A model that images are drawn from."""

    name: str
    path: Path
    sampler: SamplerConfig
    guidance: GuidanceConfig

    @property
    def settings(self) -> Mapping[str, Any]:
        """Every known setting by its dotted name."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes of the image set."""
        ...

    @property
    def autoencoder_record(self) -> AutoencoderRecord:
        """What the autoencoder is; the identity's for pixels."""
        ...

    def decode(self, images: Tensor) -> np.ndarray:
        """Returns pictures, uint8 [B, C, H, W], of images as the denoiser sees them."""
        ...

    @property
    def denoiser_and_provenance(self) -> Callable[..., Any]:
        """Returns the denoiser, and what a result keeps about its weights."""
        ...
