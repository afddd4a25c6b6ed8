"""Samplers: from noise to images, given any denoiser.

The state is y = x0 + sigma * n. A sampler is a descending grid of noise levels and a rule for the step from one level
to the next. Each rule below is the paper's, line by line, in these coordinates. The coefficients of all steps are
computed in float64 beforehand; `ditlab.diffusion.step_table` derives them. With x0 and eps the estimates at y, and z
fresh noise:

    DDPM             y_next = coef1 x0 + coef2 y + std z
    DDIM             y_next = x0 + sqrt(sigma_next^2 - std^2) eps + std z
    DPM-Solver++     y_next = exp(-h) y - (exp(-h) - 1) D, D extrapolated from the estimates of two steps
    Heun             y_next = y + (sigma_next - sigma) (d + d_prime) / 2, d = (y - x0) / sigma

Sources: Ho et al. 2020, Algorithm 2; Nichol and Dhariwal 2021, Eq. 15; Song et al. 2020 (DDIM), Eqs. 12 and 16; Karras
et al. 2022, Algorithms 1-3; Lu et al. 2022 (2211.01095), Algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ditlab.diffusion.denoisers import Denoiser, Prediction
from ditlab.diffusion.sampler_configs import DDIMConfig, DDPMConfig, DPMSolverConfig, HeunConfig, SamplerConfig
from ditlab.diffusion.short_repr import short_repr
from ditlab.diffusion.step_table import (
    DDIMStep,
    DDPMStep,
    DPMSolverStep,
    FlowStep,
    HeunStep,
    Step,
    make_step_table,
)
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
    """One step of a sampler, as its callback gets it. The callback may read or clone the tensors, not change them."""

    index: int
    """0 at the noisiest step."""
    steps: int
    """Number of steps."""
    sigma: float
    """Noise level of `y`."""
    sigma_next: float
    """Noise level of `y_next`; 0 after the last step."""
    y: Tensor
    """State before the step, [B, C, H, W]."""
    x0: Tensor
    """Estimate of the clean image at `y`, clipped where the sampler clips."""
    y_next: Tensor
    """State after the step."""

    __repr__ = short_repr

    @property
    def x_next(self) -> Tensor:
        """Returns the state after the step in a VP process's coordinates, x_t = y / sqrt(1 + sigma^2)."""
        return self.y_next / math.sqrt(1 + self.sigma_next**2)


Callback = Callable[[SamplerStep], None]


@dataclass(frozen=True)
class ImageNoise:
    """Unit normal noise that is a function of an image's seed and the step alone.

    So an image does not depend on the batch that it is drawn in.
    """

    seeds: Sequence[int]
    """The seed of each image in this batch."""
    shape: tuple[int, int, int]
    """(C, H, W)."""

    __repr__ = short_repr

    def initial(self) -> Float[Tensor, "b c h w"]:
        """Returns the noise that sampling starts from."""
        return self._draw("initial")

    def __call__(self, step: int) -> Float[Tensor, "b c h w"]:
        """Returns the fresh noise of a step; step 0 is the noisiest."""
        return self._draw(step)

    def _draw(self, step: int | str) -> Tensor:
        noise = torch.empty(len(self.seeds), *self.shape)
        for row, seed in zip(noise, self.seeds, strict=True):
            row.normal_(generator=torch_generator(int(seed), "sample", step))
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
    table = make_step_table(config, denoiser)
    steps = table.steps
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
        y, x0 = y * table.initial_std, None
        for index, step in enumerate(steps):
            z = noise(index).to(y) if noise is not None and step.noisy else None
            x0, y_next = _ADVANCE[type(step)](step, denoise, y, z, x0)
            if callback is not None:
                callback(SamplerStep(index, len(steps), step.sigma, step.sigma_next, y, x0, y_next))
            y = y_next
    return y.to(initial_noise.dtype)


# ---- One step of each sampler: (step, denoise, y, z, x0 of the step before) -> (x0, y_next). ----

Denoise = Callable[[Tensor, float], Prediction]


def _ddpm_step(
    step: DDPMStep, denoise: Denoise, y: Tensor, z: Tensor | None, _: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Ho et al. 2020, Eqs. 6 and 7; the learned variance is Nichol and Dhariwal's Eq. 15."""
    x0, _, v = denoise(y, step.sigma)
    mean = torch.lerp(x0, y, step.coef2)  # coef1 x0 + coef2 y, coef1 = 1 - coef2
    if z is None:
        return x0, mean
    if step.log_std is None:
        return x0, torch.add(mean, z, alpha=step.std)
    if v is None:
        raise DitlabError("sampler 'ddpm': expected a learned variance v from the denoiser, found none")
    a, b = step.log_std
    std = torch.exp(a + b * v)
    return x0, torch.addcmul(mean, std, z)  # mean + std z


def _ddim_step(
    step: DDIMStep, denoise: Denoise, y: Tensor, z: Tensor | None, _: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Song et al. 2020, Eq. 12: the estimate, the direction that points to y, and fresh noise."""
    x0 = denoise(y, step.sigma).x0
    y_next = torch.lerp(x0, y, step.eps_coef / step.sigma)  # x0 + eps_coef eps, eps = (y - x0) / sigma
    return x0, y_next if z is None else torch.add(y_next, z, alpha=step.std)


def _dpm_solver_step(
    step: DPMSolverStep, denoise: Denoise, y: Tensor, _: Tensor | None, x0_previous: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Lu et al. 2022, Algorithm 2. Both of its lines are lerps, for their weights sum to 1."""
    x0 = denoise(y, step.sigma).x0
    d = x0
    if x0_previous is not None and step.half_inverse_r:
        d = torch.lerp(x0_previous, x0, 1 + step.half_inverse_r)  # (1 + 1/2r) x0 - 1/2r x0_previous
    return x0, torch.lerp(d, y, step.exp_minus_h)  # exp(-h) y - (exp(-h) - 1) D


def _heun_step(
    step: HeunStep, denoise: Denoise, y: Tensor, z: Tensor | None, _: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Karras et al. 2022, Algorithm 2, lines 6-11."""
    sigma_hat, sigma_next = step.sigma_hat, step.sigma_next
    y_hat = y if z is None else y + step.std * z
    x0 = denoise(y_hat, sigma_hat).x0
    d = (y_hat - x0) / sigma_hat
    y_next = y_hat + (sigma_next - sigma_hat) * d
    if step.sigma_prime:
        d_prime = (y_next - denoise(y_next, sigma_next).x0) / sigma_next
        y_next = y_hat + (sigma_next - sigma_hat) * (0.5 * d + 0.5 * d_prime)
    return x0, y_next


def _flow_step(
    step: FlowStep, denoise: Denoise, y: Tensor, z: Tensor | None, _: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Karras et al. 2022, Algorithm 1, lines 4-8, for x = s y, with Algorithm 3's alpha and Algorithm 2's churn."""
    h, alpha, hat, prime = step.h, step.alpha, step.hat, step.prime
    y_hat = y if z is None else y + step.std * z
    x_hat = hat.s * y_hat
    x0 = denoise(y_hat, step.sigma_hat).x0
    d = hat.a * x_hat - hat.b * x0
    x_next = x_hat + alpha * h * d
    if prime is not None:
        d_prime = prime.a * x_next - prime.b * denoise(x_next / prime.s, step.sigma_prime).x0
        x_next = x_hat + h * ((1 - 1 / (2 * alpha)) * d + 1 / (2 * alpha) * d_prime)
    return x0, x_next / step.s_next


_ADVANCE: dict[type[Step], Callable[..., tuple[Tensor, Tensor]]] = {
    DDPMStep: _ddpm_step,
    DDIMStep: _ddim_step,
    DPMSolverStep: _dpm_solver_step,
    HeunStep: _heun_step,
    FlowStep: _flow_step,
}


class Evaluations(NamedTuple):
    """The cost of one sample."""

    nfe: int
    """Calls of the denoiser: the number of function evaluations that papers report."""
    passes: int
    """Passes of an image through the network: a guided call has two, in one doubled batch."""


def evaluations(config: SamplerConfig, denoiser: Denoiser) -> Evaluations:
    """Counts the evaluations that an image takes.

    Args:
        config: the sampler and its settings.
        denoiser: any denoiser; if it is guided, only the guided levels count twice.

    Raises:
        DitlabError: steps or levels that the denoiser cannot take.
    """
    calls = make_step_table(config, denoiser).calls
    return Evaluations(len(calls), sum(denoiser.passes(level) for level in calls))


def invert(
    denoiser: Denoiser,
    config: DDIMConfig,
    images: Float[Tensor, "b c h w"],
    *,
    label: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, "b c h w"]:
    """Returns the noise from which deterministic DDIM would make these images, by Eq. 12 run backwards.

    The images are taken as the state at the lowest level. The last step goes to infinite noise, where the state in unit
    variance is the noise estimate itself.

    Args:
        denoiser: any denoiser.
        config: settings with eta = 0.
        images: images in [-1, 1].
        label: the class of each image.

    Returns:
        Noise that is about unit normal.

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
