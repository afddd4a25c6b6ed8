"""Samplers: from noise to images, given any denoiser.

The state is y = x0 + sigma * n. A sampler is a descending grid of noise levels and a rule for the step from one level
to the next. `ditlab.diffusion.step_table` has the rules, which are the papers' in these coordinates.

Sources: Ho et al. 2020, Algorithm 2; Nichol and Dhariwal 2021, Eq. 15; Song et al. 2020 (DDIM), Eqs. 12 and 16; Karras
et al. 2022, Algorithms 1-3; Lu et al. 2022 (2211.01095), Algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ditlab.diffusion.denoisers import Denoiser, Prediction
from ditlab.diffusion.sampler_configs import DDIMConfig, DDPMConfig, DPMSolverConfig, HeunConfig, SamplerConfig
from ditlab.diffusion.short_repr import ShortRepr
from ditlab.diffusion.step_table import make_step_table
from ditlab.diffusion.tensors import Images, Labels, Shape
from ditlab.errors import DitlabError
from ditlab.rng import torch_generator

__all__ = [
    "Callback",
    "DDIMConfig",
    "DDPMConfig",
    "DPMSolverConfig",
    "Evaluations",
    "HeunConfig",
    "ImageNoise",
    "SamplerConfig",
    "SamplerStep",
    "evaluations",
    "invert",
    "sample",
]


@dataclass(frozen=True, eq=False, repr=False)
class SamplerStep(ShortRepr):
    """One step of a sampler, as its callback gets it. The callback may read or clone the tensors, not change them."""

    index: int
    """0 at the noisiest of `steps` steps."""
    steps: int
    sigma: float
    sigma_next: float
    """0 after the last step."""
    y: Tensor
    """State at `sigma`, [B, C, H, W]."""
    x0: Tensor
    """Estimate of the clean image at `y`, clipped where the sampler clips."""
    y_next: Tensor
    """State at `sigma_next`."""

    @property
    def x_next(self) -> Tensor:
        """Returns the state after the step in a VP process's coordinates, x_t = y / sqrt(1 + sigma^2)."""
        return self.y_next / math.sqrt(1 + self.sigma_next**2)


Callback = Callable[[SamplerStep], None]


@dataclass(frozen=True, repr=False)
class ImageNoise(ShortRepr):
    """Unit normal noise of an image's seed and the step alone, so that an image does not depend on its batch."""

    seeds: Sequence[int]
    """The seed of each image in this batch."""
    shape: Shape
    """(C, H, W)."""

    def initial(self) -> Images:
        """Returns the noise that sampling starts from."""
        return self("initial")

    def __call__(self, step: int | Literal["initial"]) -> Images:
        """Returns the fresh noise of a step; step 0 is the noisiest."""
        noise = torch.empty(len(self.seeds), *self.shape)
        for row, seed in zip(noise, self.seeds, strict=True):
            row.normal_(generator=torch_generator(int(seed), "sample", step))
        return noise


def sample(
    denoiser: Denoiser,
    config: SamplerConfig,
    initial_noise: Images,
    *,
    label: Labels = None,
    noise: Callable[[int], Tensor] | None = None,
    callback: Callback | None = None,
) -> Images:
    """Returns images made from noise, without gradients.

    Args:
        denoiser: any denoiser.
        config: the sampler and its settings.
        initial_noise: unit normal noise; it is moved to the denoiser's device.
        label: the class of each image.
        noise: step -> unit normal noise of the shape of `initial_noise`, called only for steps that add noise; see
            `ImageNoise`.
        callback: called after each step.

    Returns:
        Images in [-1, 1] (clipped only if the sampler clips), on the denoiser's device, with the dtype of the noise.

    Raises:
        DitlabError: a shape, label or level that the denoiser does not know, or no `noise` for a sampler that needs it.
    """
    y = initial_noise.to(denoiser.device)
    label = None if label is None else label.to(y.device)
    steps, initial_std = make_step_table(config, denoiser)
    # All levels and labels are checked once here, so that no step has to wait for the device.
    denoiser.check(y, steps[0].sigma, label)
    denoiser.check_levels(steps[-1].sigma)
    if noise is None and any(step.noisy for step in steps):
        raise DitlabError(f"sampler '{config.kind}': expected a source of noise for these settings, found none")
    clip = isinstance(config, DDPMConfig | DDIMConfig) and config.clip

    def denoise(y: Tensor, sigma: float) -> Prediction:
        prediction = denoiser.estimate(y, sigma, label)
        if not clip:
            return prediction
        x0 = prediction.x0.clamp(-1, 1)
        return Prediction(x0, (y - x0) / sigma, prediction.v)

    if isinstance(config, HeunConfig) and y.device.type != "mps":
        # Heun's slopes divide differences of near numbers by small levels. MPS has no float64.
        y = y.double()
    with torch.no_grad():
        y, x0 = y * initial_std, None
        for index, step in enumerate(steps):
            z = noise(index).to(y) if noise is not None and step.noisy else None
            x0, y_next = step.advance(denoise, y, z, x0)
            if callback is not None:
                callback(SamplerStep(index, len(steps), step.sigma, step.sigma_next, y, x0, y_next))
            y = y_next
    return y.to(initial_noise.dtype)


class Evaluations(NamedTuple):
    """The cost of one sample."""

    nfe: int
    """Calls of the denoiser: the number of function evaluations that papers report."""
    passes: int
    """Passes of an image through the network: a guided call has two, in one doubled batch."""


def evaluations(config: SamplerConfig, denoiser: Denoiser) -> Evaluations:
    """Counts the evaluations that an image takes.

    If the denoiser is guided, only the guided levels count twice.

    Raises:
        DitlabError: steps or levels that the denoiser cannot take.
    """
    calls = [level for step in make_step_table(config, denoiser)[0] for level in step.calls]
    return Evaluations(len(calls), sum(denoiser.passes(level) for level in calls))


def invert(denoiser: Denoiser, config: DDIMConfig, images: Images, *, label: Labels = None) -> Images:
    """Returns noise, about unit normal, from which deterministic DDIM would make these images: Eq. 12 run backwards.

    The images, in [-1, 1], are taken as the state at the lowest level. The last step goes to infinite noise, where the
    state in unit variance is the noise estimate itself.

    Raises:
        DitlabError: eta is not 0, or the denoiser does not know the shape or the labels.
    """
    if config.eta:
        raise DitlabError(f"DDIM inversion: expected eta 0, found {config.eta}")
    if config.clip:
        denoiser.require_pixel_space("DDIM inversion with clip")
    sigmas = [float(sigma) for sigma in denoiser.levels.grid(config.steps)]
    images = images.to(denoiser.device)
    label = None if label is None else label.to(images.device)
    denoiser.check(images, sigmas[0], label)
    with torch.no_grad():
        y = images * math.sqrt(1 + sigmas[0] ** 2)
        for sigma, sigma_next in zip(sigmas, [*sigmas[1:], math.inf], strict=True):
            x0 = denoiser.estimate(y, sigma, label).x0
            if config.clip:
                x0 = x0.clamp(-1, 1)
            eps = (y - x0) / sigma
            if sigma_next < math.inf:
                y = x0 + sigma_next * eps
        return eps  # pyright: ignore[reportPossiblyUnboundVariable]  # a grid has at least one level
