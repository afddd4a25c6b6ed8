"""Noise schedules: the discrete VP process and its respacings, and the noise levels of the EDM samplers.

    VP step t:    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) n,  abar_t = prod (1 - beta_s)
    its level:    sigma_t = sqrt((1 - abar_t) / abar_t), in y = x_0 + sigma n

Everything is float64 on the host.

Sources: Ho et al. 2020 (linear betas, posterior); Nichol and Dhariwal 2021 (cosine, respacing, clipped log variance);
Karras et al. 2022, Table 1 (the four discretizations, the flows), Eq. 5 (rho schedule).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from ditlab.diffusion.choices import FlowName, Respacing, check_levels, check_schedule, respacing_counts
from ditlab.errors import DitlabError

__all__ = [
    "FLOWS",
    "VP_BETA_D",
    "VP_BETA_MIN",
    "Flow",
    "FlowPoint",
    "VPSchedule",
    "cosine_levels",
    "make_schedule",
    "noise_levels",
    "respace",
    "vp_sigma",
    "vp_sigma_inverse",
]

# Song et al. 2021's continuous VP process, in the notation of Karras et al. 2022, Table 1.
VP_BETA_D = 19.9
VP_BETA_MIN = 0.1


@dataclass(eq=False)
class VPSchedule:
    """A discrete variance-preserving process, t = 0 (the least noisy step) .. T - 1. Its tables are float64 [T].

    Attributes:
        alphas_cumprod: abar_t, the clean image's share of the variance at step t.
        alphas_cumprod_prev: abar_{t-1}, with 1 before the first step.
        sigmas: VE level of each step, ascending.
        posterior_variance: of q(x_{t-1} | x_t, x_0), Ho et al. Eq. 7: "fixed-small". It is 0 at t = 0.
        posterior_log_variance_clipped: its logarithm, with the value of t = 1 at t = 0.
        large_variance: beta_t, with the posterior variance of t = 1 at t = 0: "fixed-large".
        posterior_mean_coef1: weight of x_0 in the mean of q(x_{t-1} | x_t, x_0).
        posterior_mean_coef2: weight of x_t in it.
    """

    betas: np.ndarray
    """Variance added at each step, in (0, 1)."""
    timesteps: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """int64: the step of the full process for each step; it is the network's conditioning."""

    def __post_init__(self) -> None:
        self.betas = betas = np.asarray(self.betas, dtype=np.float64)
        if betas.ndim != 1 or len(betas) == 0 or not ((betas > 0) & (betas < 1)).all():
            raise DitlabError("schedule: expected a list of betas in (0, 1), found others")
        self.timesteps = np.asarray(self.timesteps, dtype=np.int64) if len(self.timesteps) else np.arange(len(betas))
        if len(self.timesteps) != len(betas):
            raise DitlabError(f"schedule: expected {len(betas)} timesteps, found {len(self.timesteps)}")
        self.alphas_cumprod = abar = np.cumprod(1 - betas)
        self.alphas_cumprod_prev = before = np.concatenate([[1.0], abar[:-1]])
        self.sigmas = np.sqrt((1 - abar) / abar)
        self.posterior_variance = variance = betas * (1 - before) / (1 - abar)
        # A process of one step has no second entry; its beta is the only positive variance.
        positive = np.concatenate([variance[1:2], variance[1:]]) if len(betas) > 1 else betas
        self.posterior_log_variance_clipped = np.log(positive)
        self.large_variance = np.concatenate([positive[:1], betas[1:]])
        self.posterior_mean_coef1 = betas * np.sqrt(before) / (1 - abar)
        self.posterior_mean_coef2 = (1 - before) * np.sqrt(1 - betas) / (1 - abar)

    @classmethod
    def from_sigmas(cls, sigmas: np.ndarray) -> VPSchedule:
        """Returns the VP process with the levels `sigmas` (ascending, positive)."""
        squares = np.asarray(sigmas, dtype=np.float64) ** 2
        before = np.concatenate([[0.0], squares[:-1]])
        # 1 - abar_t / abar_{t-1} with abar = 1 / (1 + sigma^2), written without the cancellation.
        return cls((squares - before) / (1 + squares))

    def __len__(self) -> int:
        return len(self.betas)

    def __repr__(self) -> str:
        return f"VPSchedule({len(self)} steps, sigma {self.sigmas[0]:.3g} to {self.sigmas[-1]:.3g})"

    def respaced(self, spec: Respacing) -> VPSchedule:
        """Returns the shorter process over the steps of `respace(self, spec)`: beta'_i = 1 - abar_i / abar_{i-1}."""
        steps = respace(self, spec)
        abar = self.alphas_cumprod[steps]
        return VPSchedule(1 - abar / np.concatenate([[1.0], abar[:-1]]), self.timesteps[steps])


def make_schedule(name: str, steps: int) -> VPSchedule:
    """Returns a full VP process of T = `steps` steps.

    It is "linear" (Ho et al., betas scaled by 1000 / steps; at 20 steps or fewer the last one would pass 1) or "cosine"
    (Nichol and Dhariwal, Eq. 17, betas at most 0.999). Other names and fewer steps raise a DitlabError.
    """
    check_schedule(name, steps)
    if name == "linear":
        return VPSchedule(np.linspace(1e-4 * 1000 / steps, 0.02 * 1000 / steps, steps))
    u = np.arange(steps + 1) / steps
    abar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return VPSchedule(np.minimum(1 - abar[1:] / abar[:-1], 0.999))


def respace(schedule: VPSchedule | int, spec: Respacing) -> list[int]:
    """Returns the steps of a process, or of a number of steps T, that a shorter process takes, ascending.

    "250": 250 steps, evenly from the first to the last. "10,15,20" or a list: T is divided into three equal sections of
    10, 15 and 20 steps. "ddim50": every k-th step from 0, k the smallest stride that gives exactly 50. What cannot be
    read, or has more steps than there are, raises a DitlabError.
    """
    steps = schedule if isinstance(schedule, int) else len(schedule)
    if isinstance(spec, str) and spec.startswith("ddim"):
        (count,) = respacing_counts(spec)
        for stride in range(1, steps + 1):
            if len(range(0, steps, stride)) == count:
                return list(range(0, steps, stride))
        raise DitlabError(f"respacing '{spec}': no integer stride takes exactly {count} of {steps} steps")
    counts = respacing_counts(spec)
    respaced, start = [], 0
    for section, count in enumerate(counts):
        size = steps // len(counts) + (section < steps % len(counts))
        if count > size:
            raise DitlabError(f"respacing '{spec}': expected at most {size} steps in section {section}, found {count}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # The stride is added repeatedly, not multiplied: the published step lists depend on its rounding.
        position = 0.0
        for _ in range(count):
            respaced.append(start + round(position))
            position += stride
        start += size
    return respaced


def vp_sigma(t: np.ndarray | float, beta_d: float = VP_BETA_D, beta_min: float = VP_BETA_MIN) -> np.ndarray:
    """Returns the continuous VP process's level at time t in [0, 1]: sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1)."""
    t = np.asarray(t, dtype=np.float64)
    return np.asarray(np.sqrt(np.expm1(0.5 * beta_d * t**2 + beta_min * t)))


def vp_sigma_inverse(sigma: np.ndarray | float) -> np.ndarray:
    """Returns the time in [0, 1] at which the continuous VP process has the level `sigma`."""
    log = np.log1p(np.asarray(sigma, dtype=np.float64) ** 2)
    return np.asarray((np.sqrt(VP_BETA_MIN**2 + 2 * VP_BETA_D * log) - VP_BETA_MIN) / VP_BETA_D)


class FlowPoint(NamedTuple):
    """The coefficients of dx/dt = a x - b D(x / s; sigma) at a level, x = s y (Karras et al. 2022, Eq. 4)."""

    s: float
    a: float
    """sigma'/sigma + s'/s."""
    b: float
    """s sigma'/sigma."""


@dataclass(frozen=True)
class Flow:
    """Schedule sigma(t) and scaling s(t) of a probability flow, x(t) = s(t) y (Karras et al. 2022, Eq. 4, Table 1)."""

    time: Callable[[float], float]
    """sigma -> t; 0 at 0."""
    level: Callable[[float], float]
    """t -> sigma."""
    growth: Callable[[float], float]
    """sigma -> sigma'/sigma, the relative growth of the level with t."""
    scale: Callable[[float], float] = lambda sigma: 1.0
    """sigma -> s."""
    shrinkage: Callable[[float], float] = lambda sigma: 0.0
    """sigma -> s'/s."""

    def __repr__(self) -> str:
        return f"Flow({next((name for name, flow in FLOWS.items() if flow is self), 'custom')})"

    def at(self, sigma: float) -> FlowPoint:
        """Returns the coefficients of the differential equation at a level."""
        growth, s = self.growth(sigma), self.scale(sigma)
        return FlowPoint(s, growth + self.shrinkage(sigma), s * growth)


def _vp_growth(sigma: float) -> float:
    # From sigma^2 + 1 = exp(beta_d t^2 / 2 + beta_min t).
    return 0.5 * (VP_BETA_MIN + VP_BETA_D * float(vp_sigma_inverse(sigma))) * (1 + sigma**-2)


FLOWS: dict[FlowName, Flow] = {
    "linear": Flow(time=lambda sigma: sigma, level=lambda t: t, growth=lambda sigma: 1 / sigma),
    "vp": Flow(
        time=lambda sigma: float(vp_sigma_inverse(sigma)),
        level=lambda t: float(vp_sigma(t)),
        growth=_vp_growth,
        scale=lambda sigma: (1 + sigma**2) ** -0.5,
        shrinkage=lambda sigma: -_vp_growth(sigma) * sigma**2 / (1 + sigma**2),
    ),
    "ve": Flow(time=lambda sigma: sigma**2, level=lambda t: t**0.5, growth=lambda sigma: 0.5 * sigma**-2),
}


def noise_levels(
    name: str, steps: int, sigma_min: float | None = None, sigma_max: float | None = None, rho: float = 7.0
) -> np.ndarray:
    """Returns a descending float64 grid of `steps` levels, without the final 0 (Karras et al. 2022, Table 1).

    It goes from `sigma_max` to `sigma_min`, None for the discretization's own, and is even in sigma^(1/rho) for "edm",
    in the time of the VP process with these ends for "vp", in log sigma for "ve", or picked from the levels of the
    cosine process with 1000 steps for "iddpm". What is no such grid raises a DitlabError.
    """
    low, high = check_levels(name, steps, sigma_min, sigma_max)
    # 0 at the highest level, 1 at the lowest; a single level is the highest.
    fraction = np.arange(steps) / max(steps - 1, 1)
    if name == "edm":
        return (high ** (1 / rho) + fraction * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    if name == "vp":
        # beta_d and beta_min such that sigma(1) = high and sigma(last_time) = low.
        last_time, log_low, log_high = 1e-3, np.log1p(low**2), np.log1p(high**2)
        beta_d = 2 * (log_high - log_low / last_time) / (1 - last_time)
        return vp_sigma(1 + fraction * (last_time - 1), beta_d, log_high - beta_d / 2)
    if name == "ve":
        return high * (low / high) ** fraction
    cosine = cosine_levels()
    inside = cosine[(cosine >= low) & (cosine <= high)]
    if len(inside) < 1:
        raise DitlabError(f"noise levels 'iddpm': no level of the cosine process is between {low} and {high}")
    return inside[np.round((len(inside) - 1) * fraction).astype(int)]


def cosine_levels(steps: int = 1000) -> np.ndarray:
    """Returns the levels u_0 > ... > u_M = 0 of the cosine process in VE form (Karras et al. 2022, Table 1, iDDPM).

    abar is float32, as in the code of the published results; this changes the lowest levels by up to a factor 1 + 5e-4.
    Everything after it is float64.
    """
    abar = (0.5 * np.pi * torch.arange(steps + 1) / steps / 1.008).sin().square()
    ratios = (abar[:-1] / abar[1:]).double().clamp(min=0.001).tolist()
    levels = np.zeros(steps + 1)
    for j in range(steps, 0, -1):
        levels[j - 1] = np.sqrt((levels[j] ** 2 + 1) / ratios[j - 1] - 1)
    return levels
