"""Samplers: noise to images, given any denoiser.

The state is y = x0 + sigma * n, so a sampler is a descending grid of levels and a rule for going from one to the next.
Every first-order rule has one form: with D the estimate of the clean image at level s, and s' the next level,

    y' = D + r (y - D) + std * z,

DDIM with eta = 0 (and Euler's method) has r = s'/s and std = 0; ancestral sampling has r = s'^2 / s^2 and the reverse
variance of the VP process in these coordinates. DPM-Solver++(2M) is DDIM's step towards an estimate that is
extrapolated from this step's and the last one's, and Heun's method corrects Euler's. The numbers of all steps are
computed in float64 before the first one (`sampler_plans`).

Sources: Ho et al. 2020, Algorithm 2; Nichol and Dhariwal 2021, Eq. 15; Song et al. 2020 (DDIM), Eqs. 12 and 16; Karras
et al. 2022, Algorithms 1 and 2; Lu et al. 2022 (2211.01095), Algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.sampler_configs import DDIMConfig, DDPMConfig, DPMSolverConfig, HeunConfig, SamplerConfig
from ditlab.diffusion.sampler_plans import Step, make_plan
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


@dataclass(frozen=True, eq=False)
class SamplerStep:
    """What a sampler shows its callback after each step. The tensors are its own: read them, or clone them."""

    index: int
    """0 at the noisiest step."""
    steps: int
    """Number of steps."""
    sigma: float
    """Level of `y`."""
    sigma_next: float
    """Level of `y_next`; 0 after the last step."""
    y: Tensor
    """State before the step, [B, C, H, W]."""
    x0: Tensor
    """Estimate of the clean image at `y`, clipped where the sampler clips."""
    y_next: Tensor
    """State after the step."""

    @property
    def x_next(self) -> Tensor:
        """State after the step in a VP process's coordinates, x_t = y / sqrt(1 + sigma^2)."""
        return self.y_next / math.sqrt(1 + self.sigma_next**2)


Callback = Callable[[SamplerStep], None]


@dataclass(frozen=True)
class ImageNoise:
    """Unit normal noise that belongs to an image and not to its place in a batch.

    Each draw is a function of (seed, step) alone, so an image is the same whatever else is drawn beside it.
    """

    seeds: Sequence[int]
    """The seed of each image in this batch."""
    shape: tuple[int, int, int]
    """(C, H, W)."""

    def initial(self) -> Float[Tensor, "b c h w"]:
        """The noise that sampling starts from."""
        return self._draw("initial")

    def __call__(self, step: int) -> Float[Tensor, "b c h w"]:
        """The fresh noise of a step, 0 at the noisiest."""
        return self._draw(step)

    def _draw(self, part: int | str) -> Tensor:
        noise = torch.empty(len(self.seeds), *self.shape)
        for row, seed in zip(noise, self.seeds, strict=True):
            row.normal_(generator=torch_generator(int(seed), "sample", part))
        return noise


def sample(
    denoiser: Denoiser,
    config: SamplerConfig,
    initial_noise: Float[Tensor, "b c h w"],
    *,
    label: Int[Tensor, " b"] | None = None,
    noise: Callable[[int], Tensor] | None = None,
    callback: Callback | None = None,
) -> Float[Tensor, "b c h w"]:
    """Images from noise.

    Args:
        denoiser: any.
        config: which sampler, and its settings.
        initial_noise: unit normal, moved to the denoiser's device.
        label: class of each image.
        noise: step -> unit normal noise like `initial_noise`, asked only for steps that add some; see `ImageNoise`.
        callback: called after each step.

    Returns:
        Images in [-1, 1] (not clipped, unless the sampler does), on the denoiser's device, with the dtype of the noise.

    Raises:
        DitlabError: a shape, label, or level that the denoiser does not know; a sampler that adds noise without any.
    """
    state = initial_noise.to(denoiser.device)
    label = None if label is None else label.to(state.device)
    plan = make_plan(config, denoiser)
    steps = plan.steps
    # Every level and label once here, so that no step has to wait for the device.
    denoiser.check(state, steps[0].sigma, label)
    denoiser.check_levels(steps[-1].sigma)
    if noise is None and any(step.noisy for step in steps):
        raise DitlabError(f"sampler '{config.kind}': expected a source of noise for these settings, found none")
    with torch.no_grad():
        if isinstance(config, HeunConfig):
            # Its corrections divide differences of near numbers by small levels; MPS alone has no float64.
            wide = state.to(torch.float32 if state.device.type == "mps" else torch.float64)
            return _heun(denoiser, steps, wide * plan.start, label, noise, callback).to(state)
        clip = isinstance(config, DDPMConfig | DDIMConfig) and config.clip
        return _first_order(denoiser, steps, state * plan.start, label, noise, callback, clip)


class Evaluations(NamedTuple):
    """What a sample costs."""

    nfe: int
    """Calls of the denoiser: the number of function evaluations that papers report."""
    passes: int
    """How often an image goes through the network: a guided call takes it through twice, in one doubled batch."""


def evaluations(config: SamplerConfig, denoiser: Denoiser) -> Evaluations:
    """How many evaluations an image takes.

    Args:
        config: which sampler, and its settings.
        denoiser: any; where it is guided, only the levels that are guided count twice.

    Raises:
        DitlabError: steps or levels that the denoiser cannot take.
    """
    calls = make_plan(config, denoiser).calls
    return Evaluations(len(calls), sum(denoiser.passes(level) for level in calls))


def invert(
    denoiser: Denoiser,
    config: DDIMConfig,
    images: Float[Tensor, "b c h w"],
    *,
    label: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, "b c h w"]:
    """The noise that deterministic DDIM would make these images from, by running its equation backwards.

    The images are taken for the state at the lowest level, and the last step goes to infinite noise, where the state in
    unit variance is the noise estimate itself.

    Args:
        denoiser: any.
        config: with eta = 0.
        images: in [-1, 1].
        label: class of each image.

    Returns:
        About unit normal noise.

    Raises:
        DitlabError: eta is not 0, or the denoiser does not know the shape or the labels.
    """
    if config.eta:
        raise DitlabError(f"DDIM inversion: expected eta 0, found {config.eta}")
    if config.clip:
        denoiser.require_bounded("DDIM inversion with clip")
    sigmas = [float(sigma) for sigma in denoiser.levels.grid(config.steps)]
    images = images.to(denoiser.device)
    label = None if label is None else label.to(images.device)
    denoiser.check(images, sigmas[0], label)
    with torch.no_grad():
        y = images * math.sqrt(1 + sigmas[0] ** 2)
        for index, sigma in enumerate(sigmas):
            x0 = denoiser.estimate(y, sigma, label).x0
            if config.clip:
                x0 = x0.clamp(-1, 1)
            eps = (y - x0) / sigma
            if index + 1 < len(sigmas):
                y = x0 + sigmas[index + 1] * eps
        return eps  # pyright: ignore[reportPossiblyUnboundVariable]  # a grid has at least one level


def _first_order(
    denoiser: Denoiser,
    steps: list[Step],
    y: Tensor,
    label: Tensor | None,
    noise: Callable[[int], Tensor] | None,
    callback: Callback | None,
    clip: bool,
) -> Tensor:
    """One call a step: DDPM, DDIM and DPM-Solver++."""
    before = y
    for index, step in enumerate(steps):
        x0, _, v = denoiser.estimate(y, step.sigma, label)
        if clip:
            x0 = x0.clamp(-1, 1)
        aim = torch.lerp(before, x0, 1 + step.extrapolation) if step.extrapolation else x0
        following = torch.lerp(aim, y, step.ratio)
        if step.noisy and noise is not None:
            fresh = noise(index).to(following)
            if step.learned is None:
                following.add_(fresh, alpha=step.std)
            elif v is None:
                raise DitlabError("sampler 'ddpm': expected a learned variance v from the denoiser, found none")
            else:
                offset, slope = step.learned
                following.addcmul_((v * slope).add_(offset).exp_(), fresh)
        if callback is not None:
            callback(SamplerStep(index, len(steps), step.sigma, step.sigma_next, y, x0, following))
        y, before = following, x0
    return y


def _heun(
    denoiser: Denoiser,
    steps: list[Step],
    y: Tensor,
    label: Tensor | None,
    noise: Callable[[int], Tensor] | None,
    callback: Callback | None,
) -> Tensor:
    """Two calls a step, or one where it is not corrected (Euler)."""
    for index, step in enumerate(steps):
        start = y
        if step.noisy and noise is not None:
            start = y + noise(index).to(y) * step.std
        x0 = denoiser.estimate(start, step.churned, label).x0
        following = torch.lerp(x0, start, step.ratio)
        if step.surplus:
            following = following + step.surplus * x0
        if step.ahead:
            # The slopes at both places, each a difference of state and estimate, put together (Algorithm 1, line 8).
            ahead = denoiser.estimate(following, step.ahead, label).x0
            a, b, c, d = step.correction
            following = a * start + b * x0 + c * following + d * ahead
        if callback is not None:
            callback(SamplerStep(index, len(steps), step.sigma, step.sigma_next, y, x0, following))
        y = following
    return y
