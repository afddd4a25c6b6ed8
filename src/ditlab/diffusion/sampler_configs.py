"""The settings of the samplers (`ditlab.diffusion.samplers`), one frozen dataclass each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ditlab.diffusion.schedules import Discretization, FlowName, noise_levels
from ditlab.errors import DitlabError

Spacing = Literal[Discretization, "grid"]
"""How a sampler's levels are spaced: by a formula (`schedules.noise_levels`), or "grid": a denoiser with numbered steps
is asked for its own ones, evenly respaced, and never for anything between them; another one for EDM's levels."""


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
    levels: Spacing = "edm"
    """How the levels are spaced; grid: the denoiser's own steps, evenly."""
    sigma_min: float | None = None
    """Lowest level above 0; none for the spacing's own (edm: 0.002). Never below what the denoiser knows."""
    sigma_max: float | None = None
    """Highest level; none for the spacing's own (edm: 80). Never above what the denoiser knows."""
    rho: float = 7.0
    """Exponent of the spacing edm."""
    second_order: bool = True
    """Whether each step is corrected (Heun); without, it is Euler's method and N calls."""
    alpha: float = 1.0
    """How far into the step it is corrected from, in (0, 1]: Heun's method at 1, the midpoint method at 0.5."""
    flow: FlowName = "linear"
    """Schedule and scaling of the differential equation that is solved: sigma = t (linear), or those of the VP or the
    VE process. All have the same solution; what differs is the error of a step."""
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
        _check_levels("Heun", self)
        if self.churn < 0:
            raise DitlabError(f"Heun: expected churn >= 0, found {self.churn}")
        if not 0 < self.alpha <= 1:
            raise DitlabError(f"Heun: expected alpha in (0, 1], found {self.alpha}")
        if self.levels == "grid" and self.alpha != 1:
            raise DitlabError(
                f"Heun: levels 'grid' are never left, so each step is corrected from the next one; expected alpha 1, "
                f"found {self.alpha}"
            )


@dataclass(frozen=True)
class DPMSolverConfig:
    """DPM-Solver++(2M): second order with one call a step, from the estimates of this step and the one before.

    The first step and the last one, which goes to level 0, are of first order.
    """

    kind: Literal["dpm++2m"] = "dpm++2m"
    """Names this sampler in config.json."""
    steps: int = 20
    """Number of levels N; the network is called N times."""
    levels: Spacing = "grid"
    """How the levels are spaced; grid: the denoiser's own steps, evenly."""
    sigma_min: float | None = None
    """Lowest level above 0; none for the spacing's own (edm: 0.002). Never below what the denoiser knows."""
    sigma_max: float | None = None
    """Highest level; none for the spacing's own (edm: 80). Never above what the denoiser knows."""
    rho: float = 7.0
    """Exponent of the spacing edm."""

    def __post_init__(self) -> None:
        """Refuse what has no meaning."""
        _check_levels("DPM-Solver++", self)


SamplerConfig = DDPMConfig | DDIMConfig | HeunConfig | DPMSolverConfig


def _check_levels(where: str, config: HeunConfig | DPMSolverConfig) -> None:
    if config.levels != "grid":
        noise_levels(config.levels, config.steps, config.sigma_min, config.sigma_max, config.rho)
    elif config.steps < 1:
        raise DitlabError(f"{where}: expected steps of at least 1, found {config.steps}")
    elif config.sigma_min is not None or config.sigma_max is not None:
        raise DitlabError(f"{where}: levels 'grid' are the denoiser's own; expected no sigma_min or sigma_max")
