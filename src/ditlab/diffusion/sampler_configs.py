"""The settings of the samplers (`ditlab.diffusion.samplers`): one frozen dataclass for each.

Every config takes `steps` as a number or as text. DDPM and DDIM store text, because theirs may be a respacing such as
"ddim50"; Heun and DPM-Solver++ store the number. config.json holds these forms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ditlab.diffusion.choices import Discretization, FlowName, check_levels, respacing_counts
from ditlab.diffusion.short_repr import ShortRepr
from ditlab.errors import DitlabError

__all__ = ["DDIMConfig", "DDPMConfig", "DPMSolverConfig", "HeunConfig", "SamplerConfig", "Spacing"]

Spacing = Literal[Discretization, "grid"]
"""The spacing of a sampler's levels: a formula of `schedules.noise_levels`, or "grid". On the grid, a denoiser with
numbered steps is called at its own steps alone, evenly respaced; a denoiser without gets EDM's levels."""


@dataclass(frozen=True, repr=False)
class DDPMConfig(ShortRepr):
    """Ancestral sampling."""

    kind: Literal["ddpm"] = "ddpm"
    """Names this sampler in config.json."""
    steps: int | str = "250"
    """Respacing, stored as text: a count such as 250; with numbered steps also ddim50 or 10,15,20."""
    variance: Literal["auto", "fixed-small", "fixed-large"] = "auto"
    """Reverse variance; auto: the denoiser's own, which is the learned one if there is one."""
    clip: bool = False
    """Clip each estimate of the clean image to [-1, 1]; never for latents."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _respacing("DDPM", self.steps))


@dataclass(frozen=True, repr=False)
class DDIMConfig(ShortRepr):
    """Deterministic sampling (eta = 0), or anything between it and ancestral sampling (eta = 1)."""

    kind: Literal["ddim"] = "ddim"
    """Names this sampler in config.json."""
    steps: int | str = "50"
    """Respacing, stored as text: a count such as 50; with numbered steps also ddim50 or 10,15,20."""
    eta: float = 0.0
    """Share of the posterior's standard deviation that is added as fresh noise."""
    clip: bool = False
    """Clip each estimate of the clean image to [-1, 1]; never for latents."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _respacing("DDIM", self.steps))
        if not 0 <= self.eta <= 1:
            raise DitlabError(f"DDIM: expected eta in [0, 1], found {self.eta}")


@dataclass(frozen=True, repr=False)
class HeunConfig(ShortRepr):
    """EDM's sampler: Heun's second-order steps in sigma, with optional churn. The state is float64."""

    kind: Literal["heun"] = "heun"
    """Names this sampler in config.json."""
    steps: int | str = 18
    """Number of levels N, stored as a number; the network is called 2N - 1 times."""
    levels: Spacing = "edm"
    """Spacing of the levels; grid: the denoiser's own steps, evenly."""
    sigma_min: float | None = None
    """Lowest level above 0; none for the spacing's own (edm: 0.002). Never below the denoiser's lowest."""
    sigma_max: float | None = None
    """Highest level; none for the spacing's own (edm: 80). Never above the denoiser's highest."""
    rho: float = 7.0
    """Exponent of the spacing edm."""
    second_order: bool = True
    """Whether each step is corrected (Heun); if not, it is Euler's method with N calls."""
    alpha: float = 1.0
    """Part of the step to where it is corrected, in (0, 1]: Heun's method at 1, the midpoint method at 0.5."""
    flow: FlowName = "linear"
    """Schedule and scaling of the differential equation that is solved: sigma = t (linear), or those of the VP or the
    VE process. All have the same solution; only the error of a step differs."""
    churn: float = 0.0
    """S_churn: amount of fresh noise over all steps; 0 is deterministic."""
    churn_min: float = 0.0
    """Lowest level that is churned."""
    churn_max: float | None = None
    """Highest level that is churned; none for no limit."""
    churn_noise: float = 1.0
    """Standard deviation of the fresh noise."""

    def __post_init__(self) -> None:
        _check_levels("Heun", self)
        if self.churn < 0:
            raise DitlabError(f"Heun: expected churn >= 0, found {self.churn}")
        if not 0 < self.alpha <= 1:
            raise DitlabError(f"Heun: expected alpha in (0, 1], found {self.alpha}")
        if self.levels == "grid" and self.alpha != 1:
            raise DitlabError(
                f"Heun: on levels 'grid' steps are corrected from the next level; expected alpha 1, found {self.alpha}"
            )


@dataclass(frozen=True, repr=False)
class DPMSolverConfig(ShortRepr):
    """DPM-Solver++(2M): second order with one call a step, from the estimates of this step and the one before.

    The first step and the last one, which goes to level 0, are of first order.
    """

    kind: Literal["dpm++2m"] = "dpm++2m"
    """Names this sampler in config.json."""
    steps: int | str = 20
    """Number of levels N, stored as a number; the network is called N times."""
    levels: Spacing = "grid"
    """Spacing of the levels; grid: the denoiser's own steps, evenly."""
    sigma_min: float | None = None
    """Lowest level above 0; none for the spacing's own (edm: 0.002). Never below the denoiser's lowest."""
    sigma_max: float | None = None
    """Highest level; none for the spacing's own (edm: 80). Never above the denoiser's highest."""
    rho: float = 7.0
    """Exponent of the spacing edm."""

    def __post_init__(self) -> None:
        _check_levels("DPM-Solver++", self)


SamplerConfig = DDPMConfig | DDIMConfig | HeunConfig | DPMSolverConfig


def _respacing(where: str, steps: object) -> str:
    """Returns steps as text, checked."""
    if isinstance(steps, bool) or not isinstance(steps, int | str):
        raise DitlabError(f"{where}: expected steps as a count or a respacing such as ddim50, found {steps!r}")
    respacing_counts(str(steps))  # refuses what is no respacing
    return str(steps)


def _check_levels(where: str, config: HeunConfig | DPMSolverConfig) -> None:
    """Stores the count of steps as a number, and checks that there are such levels."""
    value = config.steps
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).removeprefix("-").isdecimal():
        raise DitlabError(f"{where}: expected steps as a count, found {value!r}")
    steps = int(value)
    object.__setattr__(config, "steps", steps)
    if config.levels != "grid":
        check_levels(config.levels, steps, config.sigma_min, config.sigma_max)
        if config.levels == "iddpm":  # between two limits there may be no level at all
            from ditlab.diffusion.schedules import noise_levels

            noise_levels(config.levels, steps, config.sigma_min, config.sigma_max)
    elif steps < 1:
        raise DitlabError(f"{where}: expected steps of at least 1, found {steps}")
    elif config.sigma_min is not None or config.sigma_max is not None:
        raise DitlabError(f"{where}: levels 'grid' are the denoiser's own; expected no sigma_min or sigma_max")
