"""The steps of the samplers: float64 coefficients, computed before the first step, and the rule that uses them.

The state is y = x0 + sigma * n. In a VP process x_t = sqrt(abar_t) y, abar_t = 1 / (1 + sigma_t^2), so an equation for
x_{t-1}, divided by sqrt(abar_{t-1}), is one for y. Sources: those of `ditlab.diffusion.samplers`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ditlab.diffusion.choices import LEVEL_LIMITS
from ditlab.diffusion.denoisers import Denoiser, Prediction
from ditlab.diffusion.noise_levels import DiscreteLevels
from ditlab.diffusion.sampler_configs import DDIMConfig, DDPMConfig, DPMSolverConfig, HeunConfig, SamplerConfig
from ditlab.diffusion.schedules import FLOWS, FlowPoint, VPSchedule, noise_levels
from ditlab.errors import DitlabError

__all__ = ["Step", "make_step_table"]

Denoise = Callable[[Tensor, float], Prediction]


@dataclass(frozen=True, kw_only=True)
class Step(ABC):
    """One step from `sigma` to `sigma_next`, which is 0 in the last step."""

    sigma: float
    sigma_next: float
    std: float = 0.0
    """Standard deviation of the fresh noise z."""

    @property
    def noisy(self) -> bool:
        """Returns whether the step adds fresh noise."""
        return self.std > 0

    @property
    def calls(self) -> tuple[float, ...]:
        """Returns the levels at which the step calls the denoiser."""
        return (self.sigma,)

    @abstractmethod
    def advance(self, denoise: Denoise, y: Tensor, z: Tensor | None, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns x0 and y_next from y, the noise z of a noisy step, and the x0 of the step before."""


@dataclass(frozen=True, kw_only=True)
class DDPMStep(Step):
    """Ho et al., Eqs. 6 and 7: y_next ~ N(coef1 x0 + coef2 y, std^2).

    Eq. 7 divided by sqrt(abar_{t-1}) has coef2 = sigma_next^2 / sigma^2 and coef1 = 1 - coef2.
    """

    coef2: float
    log_std: tuple[float, float] | None = None
    """(a, b) of a learned standard deviation exp(a + b v), which replaces `std` (Nichol and Dhariwal, Eq. 15)."""

    @property
    def noisy(self) -> bool:
        return self.std > 0 or self.log_std is not None

    def advance(self, denoise: Denoise, y: Tensor, z: Tensor | None, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        x0, _, v = denoise(y, self.sigma)
        mean = torch.lerp(x0, y, self.coef2)  # coef1 x0 + coef2 y
        if z is None:
            return x0, mean
        if self.log_std is None:
            return x0, torch.add(mean, z, alpha=self.std)
        if v is None:
            raise DitlabError("sampler 'ddpm': expected a learned variance v from the denoiser, found none")
        a, b = self.log_std
        return x0, torch.addcmul(mean, torch.exp(a + b * v), z)  # mean + std z


@dataclass(frozen=True, kw_only=True)
class DDIMStep(Step):
    """Song et al., Eq. 12: y_next = x0 + sqrt(sigma_next^2 - std^2) eps + std z.

    Eq. 16 divided by sqrt(abar_{t-1}) has std = eta sigma_next sqrt(1 - sigma_next^2 / sigma^2).
    """

    eps_coef: float
    """sqrt(sigma_next^2 - std^2), the weight of the direction that points to y."""

    def advance(self, denoise: Denoise, y: Tensor, z: Tensor | None, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        x0 = denoise(y, self.sigma).x0
        y_next = torch.lerp(x0, y, self.eps_coef / self.sigma)  # x0 + eps_coef eps, eps = (y - x0) / sigma
        return x0, y_next if z is None else torch.add(y_next, z, alpha=self.std)


@dataclass(frozen=True, kw_only=True)
class DPMSolverStep(Step):
    """Lu et al., Algorithm 2: y_next = exp(-h) y - (exp(-h) - 1) D, D = (1 + 1/2r) x0 - 1/2r x0_previous.

    With alpha = 1 and lambda = -ln sigma, h = ln(sigma / sigma_next) and r = h_previous / h. At level 0 lambda is
    infinite; that step and the first one are of first order: D = x0, written 1/2r = 0.
    """

    exp_minus_h: float
    """sigma_next / sigma."""
    half_inverse_r: float
    """1 / (2 r)."""

    def advance(self, denoise: Denoise, y: Tensor, z: Tensor | None, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        # Both lines of the algorithm are lerps, for their weights sum to 1.
        d = x0 = denoise(y, self.sigma).x0
        if previous is not None and self.half_inverse_r:
            d = torch.lerp(previous, x0, 1 + self.half_inverse_r)
        return x0, torch.lerp(d, y, self.exp_minus_h)


@dataclass(frozen=True, kw_only=True)
class HeunStep(Step):
    """Karras et al., Algorithm 2: churn from `sigma` to `sigma_hat`, then Heun's step with sigma = t (lines 6-11).

    Lines 5 and 6 have sigma_hat = sigma + gamma sigma and std = S_noise sqrt(sigma_hat^2 - sigma^2).
    """

    sigma_hat: float
    sigma_prime: float
    """Level of the correction (line 10); 0 without one: in Euler's method, and in a step to level 0."""

    @property
    def calls(self) -> tuple[float, ...]:
        return (self.sigma_hat, self.sigma_prime) if self.sigma_prime else (self.sigma_hat,)

    def advance(self, denoise: Denoise, y: Tensor, z: Tensor | None, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        sigma_hat, sigma_next = self.sigma_hat, self.sigma_next
        y_hat = y if z is None else y + self.std * z
        x0 = denoise(y_hat, sigma_hat).x0
        d = (y_hat - x0) / sigma_hat
        y_next = y_hat + (sigma_next - sigma_hat) * d
        if self.sigma_prime:
            d_prime = (y_next - denoise(y_next, sigma_next).x0) / sigma_next
            y_next = y_hat + (sigma_next - sigma_hat) * (0.5 * d + 0.5 * d_prime)
        return x0, y_next


@dataclass(frozen=True, kw_only=True)
class FlowStep(HeunStep):
    """Karras et al., Algorithm 1 (lines 4-8) with Algorithm 3's alpha and Algorithm 2's churn, for x = s y.

    It takes any schedule sigma(t) and scaling s(t). `FlowPoint` has the coefficients of line 4.
    """

    h: float
    """t_next - t_hat."""
    alpha: float
    """`sigma_prime` is the level at t_hat + alpha h; 1 in a step that is not corrected."""
    hat: FlowPoint
    """s, a and b at `sigma_hat`."""
    prime: FlowPoint | None
    """s, a and b at `sigma_prime`."""
    s_next: float
    """s at `sigma_next`."""

    def advance(self, denoise: Denoise, y: Tensor, z: Tensor | None, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        h, alpha, hat, prime = self.h, self.alpha, self.hat, self.prime
        y_hat = y if z is None else y + self.std * z
        x_hat = hat.s * y_hat
        x0 = denoise(y_hat, self.sigma_hat).x0
        d = hat.a * x_hat - hat.b * x0
        x_next = x_hat + alpha * h * d
        if prime is not None:
            d_prime = prime.a * x_next - prime.b * denoise(x_next / prime.s, self.sigma_prime).x0
            x_next = x_hat + h * ((1 - 1 / (2 * alpha)) * d + 1 / (2 * alpha) * d_prime)
        return x0, x_next / self.s_next


def make_step_table(config: SamplerConfig, denoiser: Denoiser) -> tuple[Sequence[Step], float]:
    """Returns the steps of a sampler on a denoiser's levels, and the standard deviation of the state before the first.

    Raises:
        DitlabError: steps or levels that the denoiser cannot take.
    """
    if isinstance(config, HeunConfig):
        steps = _heun_steps(denoiser, config)
    elif isinstance(config, DPMSolverConfig):
        steps = _dpm_solver_steps(denoiser, config)
    else:
        if config.clip:
            denoiser.require_pixel_space(f"sampler '{config.kind}' with clip")
        steps = _ddpm_steps(denoiser, config) if isinstance(config, DDPMConfig) else _ddim_steps(denoiser, config)
    first = steps[0].sigma
    spaced = isinstance(config, HeunConfig | DPMSolverConfig)
    if spaced and not (config.levels == "grid" and isinstance(denoiser.levels, DiscreteLevels)):
        return steps, first  # that of the noise alone
    return steps, math.sqrt(1 + first**2)  # a VP process ends in unit variance, whatever its last level


def _descending(sigmas: np.ndarray) -> list[tuple[float, float]]:
    """Returns (sigma, sigma_next) of every step, the last going to 0, from ascending levels."""
    levels = [float(sigma) for sigma in sigmas[::-1]]
    return list(zip(levels, [*levels[1:], 0.0], strict=True))


def _ddpm_steps(denoiser: Denoiser, config: DDPMConfig) -> list[DDPMStep]:
    process = VPSchedule.from_sigmas(denoiser.levels.grid(config.steps))
    variance = denoiser.variance if config.variance == "auto" else config.variance
    # ln of Ho et al.'s beta~_t and beta_t, less ln abar_{t-1}: variances of y instead of x_{t-1}.
    log_small = process.posterior_log_variance_clipped - np.log(process.alphas_cumprod_prev)
    log_large = np.log(process.betas) - np.log(process.alphas_cumprod_prev)
    pairs = _descending(process.sigmas)
    steps = []
    for (sigma, sigma_next), small, large in zip(pairs, log_small[::-1], log_large[::-1], strict=True):
        std, log_std = 0.0, None
        if sigma_next > 0 and variance == "learned-range":
            # Nichol and Dhariwal, Eq. 15, of v in [-1, 1]: ln std^2 = small + (large - small) (v + 1) / 2.
            log_std = float(large + small) / 4, float(large - small) / 4
        elif sigma_next > 0:
            std = math.exp(0.5 * (large if variance == "fixed-large" else small))
        coef2 = (sigma_next / sigma) ** 2
        steps.append(DDPMStep(sigma=sigma, sigma_next=sigma_next, coef2=coef2, std=std, log_std=log_std))
    return steps


def _ddim_steps(denoiser: Denoiser, config: DDIMConfig) -> list[DDIMStep]:
    steps = []
    for sigma, sigma_next in _descending(denoiser.levels.grid(config.steps)):
        std = config.eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
        eps_coef = math.sqrt(sigma_next**2 - std**2)
        steps.append(DDIMStep(sigma=sigma, sigma_next=sigma_next, eps_coef=eps_coef, std=std))
    return steps


def _spaced(denoiser: Denoiser, config: HeunConfig | DPMSolverConfig) -> np.ndarray:
    """Returns the levels of a config, ascending."""
    if config.levels == "grid":
        return denoiser.levels.grid(str(config.steps))
    low, high = LEVEL_LIMITS[config.levels]
    low = max(low if config.sigma_min is None else config.sigma_min, denoiser.levels.min)
    high = min(high if config.sigma_max is None else config.sigma_max, denoiser.levels.max)
    return noise_levels(config.levels, int(config.steps), low, high, config.rho)[::-1]


def _dpm_solver_steps(denoiser: Denoiser, config: DPMSolverConfig) -> list[DPMSolverStep]:
    steps: list[DPMSolverStep] = []
    for sigma, sigma_next in _descending(_spaced(denoiser, config)):
        half_inverse_r = 0.0
        if steps and sigma_next > 0:
            h_previous, h = math.log(steps[-1].sigma / sigma), math.log(sigma / sigma_next)
            half_inverse_r = h / h_previous / 2
        ratio = sigma_next / sigma
        step = DPMSolverStep(sigma=sigma, sigma_next=sigma_next, exp_minus_h=ratio, half_inverse_r=half_inverse_r)
        steps.append(step)
    return steps


def _heun_steps(denoiser: Denoiser, config: HeunConfig) -> list[HeunStep]:
    steps = []
    for sigma, sigma_next in _descending(_spaced(denoiser, config)):
        churned = config.churn_min <= sigma <= (math.inf if config.churn_max is None else config.churn_max)
        gamma = min(config.churn / int(config.steps), math.sqrt(2) - 1) if churned else 0.0
        sigma_hat = sigma * (1 + gamma)
        if gamma and isinstance(denoiser.levels, DiscreteLevels) and config.levels == "grid":
            sigma_hat = max(sigma, denoiser.levels.nearest(sigma_hat))
        std = config.churn_noise * math.sqrt(sigma_hat**2 - sigma**2)
        sigma_prime = sigma_next if config.second_order else 0.0
        step = HeunStep(sigma=sigma, sigma_next=sigma_next, sigma_hat=sigma_hat, std=std, sigma_prime=sigma_prime)
        steps.append(step if config.flow == "linear" and config.alpha == 1 else _flow_step(step, config))
    return steps


def _flow_step(step: HeunStep, config: HeunConfig) -> FlowStep:
    """Returns the same step along the flow and with the alpha of a config."""
    flow = FLOWS[config.flow]
    t_hat, t_next = flow.time(step.sigma_hat), flow.time(step.sigma_next)
    h, alpha, sigma_prime = t_next - t_hat, 1.0, step.sigma_prime
    if sigma_prime and config.alpha != 1:
        alpha, sigma_prime = config.alpha, flow.level(t_hat + config.alpha * h)
    hat, prime = flow.at(step.sigma_hat), flow.at(sigma_prime) if sigma_prime else None
    settings = vars(step) | {"sigma_prime": sigma_prime}
    return FlowStep(**settings, h=h, alpha=alpha, hat=hat, prime=prime, s_next=flow.scale(step.sigma_next))
