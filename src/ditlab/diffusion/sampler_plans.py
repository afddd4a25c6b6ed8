"""From a sampler's settings and a denoiser to the numbers of every step, in float64, before the first one is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.noise_levels import DiscreteLevels
from ditlab.diffusion.sampler_configs import DDIMConfig, DDPMConfig, DPMSolverConfig, HeunConfig, SamplerConfig, Spacing
from ditlab.diffusion.schedules import FLOWS, LEVEL_LIMITS, Flow, VPSchedule, noise_levels


@dataclass(frozen=True)
class Step:
    """The numbers of one step, from `sigma` to `sigma_next`."""

    sigma: float
    sigma_next: float
    ratio: float = 0.0
    """r of the module's formula; for Heun, what Euler's method keeps of the state on its way to `ahead`."""
    std: float = 0.0
    """Standard deviation of the fresh noise; for Heun, of what churn adds before the step."""
    learned: tuple[float, float] | None = None
    """(a, b) where the standard deviation is exp(a + b v)."""
    churned: float = 0.0
    """Heun: the level after churn."""
    surplus: float = 0.0
    """Heun: what a flow with a scaling of its own adds to the weight 1 - r of the estimate."""
    ahead: float = 0.0
    """Heun: the level from which the step is corrected; 0 where it is not."""
    correction: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Heun: weights of state and estimate at `churned`, and of state and estimate at `ahead`."""
    extrapolation: float = 0.0
    """DPM-Solver++: e in D + e (D - D_before), the estimate that the step goes towards."""

    @property
    def noisy(self) -> bool:
        """Whether the step adds fresh noise."""
        return self.std > 0 or self.learned is not None


@dataclass(frozen=True)
class Plan:
    """All steps of a sampler."""

    steps: list[Step]
    start: float
    """Standard deviation of the state before the first step."""
    calls: list[float]
    """The levels at which the denoiser is called, in order."""


def make_plan(config: SamplerConfig, denoiser: Denoiser) -> Plan:
    """The steps of a sampler on a denoiser's levels.

    Raises:
        DitlabError: steps or levels that the denoiser cannot take.
    """
    if isinstance(config, HeunConfig):
        steps = _heun_steps(denoiser, config)
        calls = [level for step in steps for level in (step.churned, step.ahead) if level > 0]
        return Plan(steps, _start(denoiser, steps, config.levels), calls)
    if isinstance(config, DPMSolverConfig):
        steps = _dpm_solver_steps(denoiser, config)
        start = _start(denoiser, steps, config.levels)
    else:
        if config.clip:
            denoiser.require_bounded(f"sampler '{config.kind}' with clip")
        steps = _ddpm_steps(denoiser, config) if isinstance(config, DDPMConfig) else _ddim_steps(denoiser, config)
        # A VP process ends in unit variance, whatever its last level.
        start = math.sqrt(1 + steps[0].sigma ** 2)
    return Plan(steps, start, [step.sigma for step in steps])


def _start(denoiser: Denoiser, steps: list[Step], levels: Spacing) -> float:
    """On a process's own steps it starts as DDPM and DDIM do, else with noise of the highest level alone."""
    own = levels == "grid" and isinstance(denoiser.levels, DiscreteLevels)
    return math.sqrt(1 + steps[0].sigma ** 2) if own else steps[0].sigma


def _descending(sigmas: np.ndarray) -> list[tuple[float, float]]:
    """(level, next level) of every step, the last going to 0, from ascending levels."""
    down = [float(sigma) for sigma in sigmas[::-1]]
    return list(zip(down, [*down[1:], 0.0], strict=True))


def _ddpm_steps(denoiser: Denoiser, config: DDPMConfig) -> list[Step]:
    process = VPSchedule.from_sigmas(denoiser.levels.grid(config.steps))
    variance = denoiser.variance if config.variance == "auto" else config.variance
    # Variances of x_{t-1}, divided by abar_{t-1} for those of y.
    log_small = process.posterior_log_variance_clipped - np.log(process.alphas_cumprod_prev)
    log_large = np.log(process.betas) - np.log(process.alphas_cumprod_prev)
    steps = []
    for (sigma, after), small, large in zip(_descending(process.sigmas), log_small[::-1], log_large[::-1], strict=True):
        step = Step(sigma, after, (after / sigma) ** 2)
        if after > 0 and variance == "learned-range":
            step = Step(sigma, after, step.ratio, learned=(float(large + small) / 4, float(large - small) / 4))
        elif after > 0:
            step = Step(sigma, after, step.ratio, math.exp(0.5 * (large if variance == "fixed-large" else small)))
        steps.append(step)
    return steps


def _ddim_steps(denoiser: Denoiser, config: DDIMConfig) -> list[Step]:
    steps = []
    for sigma, after in _descending(denoiser.levels.grid(config.steps)):
        std = config.eta * after * math.sqrt(1 - (after / sigma) ** 2)
        steps.append(Step(sigma, after, math.sqrt(after**2 - std**2) / sigma, std))
    return steps


def _spaced(denoiser: Denoiser, config: HeunConfig | DPMSolverConfig) -> np.ndarray:
    """The levels of a config, ascending."""
    if config.levels == "grid":
        return denoiser.levels.grid(str(config.steps))
    low, high = LEVEL_LIMITS[config.levels]
    low = max(low if config.sigma_min is None else config.sigma_min, denoiser.levels.min)
    high = min(high if config.sigma_max is None else config.sigma_max, denoiser.levels.max)
    return noise_levels(config.levels, config.steps, low, high, config.rho)[::-1]


def _heun_steps(denoiser: Denoiser, config: HeunConfig) -> list[Step]:
    steps = []
    for sigma, after in _descending(_spaced(denoiser, config)):
        inside = config.churn_min <= sigma <= (math.inf if config.churn_max is None else config.churn_max)
        gamma = min(config.churn / config.steps, math.sqrt(2) - 1) if inside else 0.0
        churned = sigma * (1 + gamma)
        if gamma and config.levels == "grid" and isinstance(denoiser.levels, DiscreteLevels):
            churned = max(sigma, denoiser.levels.nearest(churned))
        std = math.sqrt(churned**2 - sigma**2) * config.churn_noise
        steps.append(_flow_step(FLOWS[config.flow], config, sigma, after, churned, std))
    return steps


def _flow_step(flow: Flow, config: HeunConfig, sigma: float, after: float, churned: float, std: float) -> Step:
    """One step of Karras et al. 2022, Algorithm 1 (of its appendix: any flow, any alpha), for y = x / s."""
    corrected = config.second_order and after > 0
    start, end = flow.time(churned), flow.time(after)
    share = config.alpha if corrected else 1.0
    ahead = after if share == 1 else flow.level(start + share * (end - start))
    growth, shrinkage = flow.growth(churned), flow.shrinkage(churned)

    def weights(scale: float, length: float) -> tuple[float, float]:
        """Weights of state and estimate after a step of this length along the slope at its start."""
        here = flow.scale(churned) / scale
        return here * (1 + length * (growth + shrinkage)), -here * length * growth

    keep, towards = weights(flow.scale(ahead), share * (end - start))
    surplus = keep + towards - 1
    if config.flow == "linear":
        keep, surplus = ahead / churned, 0.0  # to the bit as DDIM has it
    step = Step(sigma, after, keep, std, churned=churned, surplus=surplus)
    if not corrected:
        return step
    second = 0.5 / config.alpha
    factor = flow.scale(ahead) / flow.scale(after) * second * (end - start)
    before = weights(flow.scale(after), (1 - second) * (end - start))
    behind = factor * (flow.growth(ahead) + flow.shrinkage(ahead)), -factor * flow.growth(ahead)
    return replace(step, ahead=ahead, correction=(*before, *behind))


def _dpm_solver_steps(denoiser: Denoiser, config: DPMSolverConfig) -> list[Step]:
    # Lu et al. 2022 (DPM-Solver++), Algorithm 2, with alpha = 1 and lambda = -ln sigma: D = (1 + e) x0 - e x0_before,
    # e = 1 / (2 r), r = h_before / h. At level 0 lambda is infinite, and the step is of first order: y = x0.
    steps: list[Step] = []
    for sigma, after in _descending(_spaced(denoiser, config)):
        extrapolation = 0.0
        if steps and after > 0:
            extrapolation = math.log(sigma / after) / math.log(steps[-1].sigma / sigma) / 2
        steps.append(Step(sigma, after, after / sigma, extrapolation=extrapolation))
    return steps
