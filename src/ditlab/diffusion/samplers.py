"""Samplers: noise to images, given any denoiser.

The state is y = x0 + sigma * n, so a sampler is a descending grid of levels and a rule for going from one to the next.
Every first-order rule has one form: with D the estimate of the clean image at level s, and s' the next level,

    y' = D + r (y - D) + std * z,

DDIM with eta = 0 (and Euler's method) has r = s'/s and std = 0; ancestral sampling has r = s'^2 / s^2 and the reverse
variance of the VP process in these coordinates. The numbers of all steps are computed in float64 before the first one.

Sources: Ho et al. 2020, Algorithm 2; Nichol and Dhariwal 2021, Eq. 15; Song et al. 2020 (DDIM), Eqs. 12 and 16; Karras
et al. 2022, Algorithms 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.schedules import LEVEL_LIMITS, Discretization, VPSchedule, noise_levels
from ditlab.errors import DitlabError
from ditlab.randomness import torch_generator


@dataclass(frozen=True)
class DDPMConfig:
    """Ancestral sampling."""

    kind: Literal["ddpm"] = "ddpm"
    """Names this sampler in config.json."""
    steps: str = "250"
    """Respacing: a count such as 250; with numbered steps also ddim50 or 10,15,20."""
    variance: Literal["auto", "fixed-small", "fixed-large"] = "auto"
    """Reverse variance; auto: the learned one where there is one, else the one that belongs to the denoiser."""
    clip: bool = False
    """Clip each estimate of the clean image to [-1, 1]; never for latents."""


@dataclass(frozen=True)
class DDIMConfig:
    """Deterministic sampling (eta = 0), or anything between it and ancestral sampling (eta = 1)."""

    kind: Literal["ddim"] = "ddim"
    """Names this sampler in config.json."""
    steps: str = "50"
    """Respacing: a count such as 50; with numbered steps also ddim50 or 10,15,20."""
    eta: float = 0.0
    """Share of the posterior's standard deviation that is added as fresh noise."""
    clip: bool = False
    """Clip each estimate of the clean image to [-1, 1]; never for latents."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        if not 0 <= self.eta <= 1:
            raise DitlabError(f"DDIM: expected eta in [0, 1], found {self.eta}")


@dataclass(frozen=True)
class HeunConfig:
    """EDM's sampler: Heun's second-order steps in sigma, with optional churn. The state is float64."""

    kind: Literal["heun"] = "heun"
    """Names this sampler in config.json."""
    steps: int = 18
    """Number of levels N; the network is called 2N - 1 times."""
    levels: Discretization = "edm"
    """How the levels are spaced."""
    sigma_min: float | None = None
    """Lowest level above 0; none for the spacing's own (edm: 0.002). Never below what the denoiser knows."""
    sigma_max: float | None = None
    """Highest level; none for the spacing's own (edm: 80). Never above what the denoiser knows."""
    rho: float = 7.0
    """Exponent of the spacing edm."""
    second_order: bool = True
    """Whether each step is corrected (Heun); without, it is Euler's method and N calls."""
    churn: float = 0.0
    """S_churn: how much fresh noise, over all steps; 0 is deterministic."""
    churn_min: float = 0.0
    """Lowest level that is churned."""
    churn_max: float | None = None
    """Highest level that is churned; none for no limit."""
    churn_noise: float = 1.0
    """Standard deviation of the fresh noise."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        noise_levels(self.levels, self.steps, self.sigma_min, self.sigma_max, self.rho)
        if self.churn < 0:
            raise DitlabError(f"Heun: expected churn >= 0, found {self.churn}")


SamplerConfig = DDPMConfig | DDIMConfig | HeunConfig


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
    if isinstance(config, HeunConfig):
        steps = _heun_plan(denoiser, config)
        highest = steps[0].sigma
    else:
        steps = _ddpm_plan(denoiser, config) if isinstance(config, DDPMConfig) else _ddim_plan(denoiser, config)
        # A VP process ends in unit variance, whatever its last level.
        highest = math.sqrt(1 + steps[0].sigma ** 2)
    # Every level and label once here, so that no step has to wait for the device.
    denoiser.check(state, steps[0].sigma, label)
    denoiser.check_levels(steps[-1].sigma)
    if noise is None and any(step.noisy for step in steps):
        raise DitlabError(f"sampler '{config.kind}': expected a source of noise for these settings, found none")
    with torch.no_grad():
        if isinstance(config, HeunConfig):
            # Second-order corrections are differences of near numbers; MPS alone has no float64.
            wide = torch.float32 if state.device.type == "mps" else torch.float64
            wide_state = state.to(wide) * highest
            return _heun(denoiser, steps, wide_state, label, noise, callback, config.second_order).to(state.dtype)
        return _first_order(denoiser, steps, state * highest, label, noise, callback, config.clip)


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


@dataclass(frozen=True)
class _Step:
    """The numbers of one step, from `sigma` to `sigma_next`."""

    sigma: float
    sigma_next: float
    ratio: float = 0.0
    """r of the module's formula; for Heun, sigma_next / churned."""
    std: float = 0.0
    """Standard deviation of the fresh noise; for Heun, of what churn adds before the step."""
    learned: tuple[float, float] | None = None
    """(a, b) where the standard deviation is exp(a + b v)."""
    churned: float = 0.0
    """Heun: the level after churn."""

    @property
    def noisy(self) -> bool:
        return self.std > 0 or self.learned is not None


def _descending(sigmas: np.ndarray) -> list[tuple[float, float]]:
    """(level, next level) of every step, the last going to 0, from ascending levels."""
    down = [float(sigma) for sigma in sigmas[::-1]]
    return list(zip(down, [*down[1:], 0.0], strict=True))


def _ddpm_plan(denoiser: Denoiser, config: DDPMConfig) -> list[_Step]:
    process = VPSchedule.from_sigmas(denoiser.levels.grid(config.steps))
    variance = denoiser.variance if config.variance == "auto" else config.variance
    # Variances of x_{t-1}, divided by abar_{t-1} for those of y.
    log_small = process.posterior_log_variance_clipped - np.log(process.alphas_cumprod_prev)
    log_large = np.log(process.betas) - np.log(process.alphas_cumprod_prev)
    steps = []
    for (sigma, after), small, large in zip(_descending(process.sigmas), log_small[::-1], log_large[::-1], strict=True):
        step = _Step(sigma, after, (after / sigma) ** 2)
        if after > 0 and variance == "learned-range":
            step = _Step(sigma, after, step.ratio, learned=(float(large + small) / 4, float(large - small) / 4))
        elif after > 0:
            step = _Step(sigma, after, step.ratio, math.exp(0.5 * (large if variance == "fixed-large" else small)))
        steps.append(step)
    return steps


def _ddim_plan(denoiser: Denoiser, config: DDIMConfig) -> list[_Step]:
    steps = []
    for sigma, after in _descending(denoiser.levels.grid(config.steps)):
        std = config.eta * after * math.sqrt(1 - (after / sigma) ** 2)
        steps.append(_Step(sigma, after, math.sqrt(after**2 - std**2) / sigma, std))
    return steps


def _heun_plan(denoiser: Denoiser, config: HeunConfig) -> list[_Step]:
    low, high = LEVEL_LIMITS[config.levels]
    low = max(low if config.sigma_min is None else config.sigma_min, denoiser.levels.min)
    high = min(high if config.sigma_max is None else config.sigma_max, denoiser.levels.max)
    steps = []
    for sigma, after in _descending(noise_levels(config.levels, config.steps, low, high, config.rho)[::-1]):
        inside = config.churn_min <= sigma <= (math.inf if config.churn_max is None else config.churn_max)
        gamma = min(config.churn / config.steps, math.sqrt(2) - 1) if inside else 0.0
        churned = sigma * (1 + gamma)
        std = math.sqrt(churned**2 - sigma**2) * config.churn_noise
        steps.append(_Step(sigma, after, after / churned, std, churned=churned))
    return steps


def _first_order(
    denoiser: Denoiser,
    steps: list[_Step],
    y: Tensor,
    label: Tensor | None,
    noise: Callable[[int], Tensor] | None,
    callback: Callback | None,
    clip: bool,
) -> Tensor:
    for index, step in enumerate(steps):
        x0, _, v = denoiser.estimate(y, step.sigma, label)
        if clip:
            x0 = x0.clamp(-1, 1)
        following = torch.lerp(x0, y, step.ratio)
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
        y = following
    return y


def _heun(
    denoiser: Denoiser,
    steps: list[_Step],
    y: Tensor,
    label: Tensor | None,
    noise: Callable[[int], Tensor] | None,
    callback: Callback | None,
    second_order: bool,
) -> Tensor:
    for index, step in enumerate(steps):
        start = y
        if step.noisy and noise is not None:
            start = y + noise(index).to(y) * step.std
        x0 = denoiser.estimate(start, step.churned, label).x0
        following = torch.lerp(x0, start, step.ratio)
        if second_order and step.sigma_next > 0:
            ahead = denoiser.estimate(following, step.sigma_next, label).x0
            # The mean of the slopes at both ends (Algorithm 1, line 8), each (state - estimate) / level.
            slope = (start - x0) / step.churned + (following - ahead) / step.sigma_next
            following = start + (step.sigma_next - step.churned) / 2 * slope
        if callback is not None:
            callback(SamplerStep(index, len(steps), step.sigma, step.sigma_next, y, x0, following))
        y = following
    return y
