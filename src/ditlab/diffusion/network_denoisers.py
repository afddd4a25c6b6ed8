"""Denoisers that are made of a network F: on a discrete VP process, preconditioned as EDM, and blind.

    VP       x0 = y - sigma F(sqrt(abar_t) y, t),  sigma^2 = (1 - abar_t) / abar_t
    EDM      x0 = c_skip y + c_out F(c_in y, c_noise)
    blind    x0 = y - F(y)

Sources: Ho et al. 2020, Eq. 4; Karras et al. 2022, Eq. 7 and Table 1; Mohan et al. 2020 (bias-free denoisers).
"""

from __future__ import annotations

import math
from dataclasses import asdict, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ditlab.diffusion.choices import BetweenSteps, Preconditioning, PredictionTarget, Variance, check_choice
from ditlab.diffusion.denoisers import Denoiser, Prediction, complete
from ditlab.diffusion.noise_levels import DiscreteLevels, LevelRange, Levels
from ditlab.diffusion.schedules import VP_BETA_D, VP_BETA_MIN, VPSchedule, vp_sigma
from ditlab.diffusion.tensors import Shape
from ditlab.errors import DitlabError

__all__ = ["BlindDenoiser", "EDMDenoiser", "NetworkDenoiser", "VPDenoiser"]


class NetworkDenoiser(Denoiser):
    """Base of denoisers that are made of `network(x, t, label)` with `in_shape` and `num_classes`."""

    def __init__(self, network: nn.Module, shape: Shape | None = None) -> None:
        self.network = network
        channels, height, width = network.in_shape if shape is None else shape  # pyright: ignore[reportGeneralTypeIssues]
        self.shape = (int(channels), int(height), int(width))
        self.num_classes = int(getattr(network, "num_classes", 0))
        self.null_class = bool(getattr(getattr(network, "config", None), "null_class", True))

    @property
    def identity(self) -> dict[str, Any]:
        # With the network's settings, for other heads may have equal weights.
        config = getattr(self.network, "config", None)
        if not is_dataclass(config) or isinstance(config, type):
            return super().identity
        return super().identity | {"network": asdict(config)}

    @property
    def module(self) -> nn.Module:
        return self.network

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        first = next(self.network.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    def _run(self, x: Tensor, time: float | Tensor | None, label: Tensor | None, outputs: int) -> Tensor:
        """Returns the network's raw output, cast to the dtype of x."""
        dtype = next(self.network.parameters(), x).dtype
        # Half precision does not have all integers up to 1000.
        time_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        if isinstance(time, Tensor):
            time = time.reshape(-1).to(time_dtype)
        elif time is not None:
            time = torch.full((len(x),), time, dtype=time_dtype, device=x.device)
        raw = self.network(x.to(dtype), time, label)
        if raw.shape[1] != outputs:
            raise DitlabError(f"denoiser: expected {outputs} channels from the network, found {raw.shape[1]}")
        return raw.to(x.dtype)


class VPDenoiser(NetworkDenoiser):
    """A network that was trained on a discrete VP process: its input is x_t = sqrt(abar_t) y and the step t.

    Args:
        network: raw output `[B, C, H, W]`, or `[B, 2C, H, W]` (the prediction, then v) with "learned-range".
        schedule: the process that it was trained on; the network's conditioning is its `timesteps`.
        prediction: the meaning of the first C channels.
        variance: the reverse variance: learned, or one of the two fixed ones.
        shape: (C, H, W) if the network has no `in_shape`.
        between: for a level between two steps, a fractional t (linear in log sigma) or the nearest step's t.
        rescale_time: give the network t * 1000 / T, as improved-diffusion's rescale_timesteps does.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: VPSchedule,
        prediction: PredictionTarget = "epsilon",
        variance: Variance = "learned-range",
        *,
        shape: Shape | None = None,
        between: BetweenSteps = "interpolate",
        rescale_time: bool = False,
    ) -> None:
        super().__init__(network, shape)
        check_choice("prediction", prediction, PredictionTarget)
        check_choice("variance", variance, Variance)
        check_choice("way between steps", between, BetweenSteps)
        self.schedule = schedule
        self.prediction: PredictionTarget = prediction
        self.variance: Variance = variance
        self.between: BetweenSteps = between
        self.levels = DiscreteLevels(schedule.sigmas, schedule.timesteps)
        self.time_factor = 1000 / len(schedule) if rescale_time else 1.0

    @property
    def identity(self) -> dict[str, Any]:
        own = {"prediction": self.prediction, "between": self.between, "time_factor": self.time_factor}
        return super().identity | own

    def scale(self, sigma: float | Tensor) -> float | Tensor:
        """Returns sqrt(abar_t)."""
        return (1 + sigma * sigma) ** -0.5

    def time(self, sigma: float | Tensor) -> float | Tensor:
        """Returns the step t, an exact integer on the grid."""
        return self.levels.step(sigma, self.between) * self.time_factor  # pyright: ignore[reportAttributeAccessIssue]

    def estimate(self, y: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Prediction:
        channels = self.shape[0]
        outputs = 2 * channels if self.variance == "learned-range" else channels
        raw = self._run(y * self.scale(sigma), self.time(sigma), label, outputs)
        v = raw[:, channels:] if self.variance == "learned-range" else None
        return complete(raw[:, :channels], y, sigma, self.prediction, v)


class EDMDenoiser(NetworkDenoiser):
    """D(y) = c_skip y + c_out F(c_in y, c_noise) with a network F (Karras et al. 2022, Eq. 7 and Table 1).

    Args:
        network: raw output `[B, C, H, W]`.
        precond: "edm"; "vp" and "ve" are Song et al.'s processes in the same form.
        sigma_data: standard deviation of the images, for "edm".
        shape: (C, H, W) if the network has no `in_shape`.
    """

    def __init__(
        self,
        network: nn.Module,
        precond: Preconditioning = "edm",
        sigma_data: float = 0.5,
        *,
        shape: Shape | None = None,
    ) -> None:
        super().__init__(network, shape)
        check_choice("preconditioning", precond, Preconditioning)
        self.precond, self.sigma_data = precond, sigma_data
        self.levels = {
            "edm": LevelRange(0.0, math.inf),
            "vp": LevelRange(float(vp_sigma(1e-5)), float(vp_sigma(1.0))),
            "ve": LevelRange(0.02, 100.0),
        }[precond]

    @property
    def identity(self) -> dict[str, Any]:
        return super().identity | {"precond": self.precond, "sigma_data": self.sigma_data}

    def scale(self, sigma: float | Tensor) -> float | Tensor:
        """Returns c_in."""
        if self.precond == "ve":
            return 1.0
        return (sigma * sigma + (self.sigma_data**2 if self.precond == "edm" else 1.0)) ** -0.5

    def time(self, sigma: float | Tensor) -> float | Tensor:
        """Returns c_noise."""
        tensor = isinstance(sigma, Tensor)
        if self.precond == "edm":
            return (sigma.log() if tensor else math.log(sigma)) / 4
        if self.precond == "ve":
            return (sigma / 2).log() if tensor else math.log(sigma / 2)
        # 999 times the VP process's time t, the root of sigma^2 + 1 = exp(beta_d t^2 / 2 + beta_min t). Float64,
        # because ln(1 + sigma^2) cancels at small levels.
        log = sigma.double().square().log1p() if tensor else math.log1p(sigma * sigma)
        root = (VP_BETA_MIN**2 + 2 * VP_BETA_D * log) ** 0.5
        return 999 * (root - VP_BETA_MIN) / VP_BETA_D

    def skip_and_out(self, sigma: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
        """Returns (c_skip, c_out)."""
        if self.precond == "edm":
            total = sigma * sigma + self.sigma_data**2
            return self.sigma_data**2 / total, sigma * self.sigma_data * total**-0.5
        return 1.0, (-sigma if self.precond == "vp" else sigma)

    def estimate(self, y: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Prediction:
        raw = self._run(y * self.scale(sigma), self.time(sigma), label, self.shape[0])
        skip, out = self.skip_and_out(sigma)
        return complete(skip * y + out * raw, y, sigma, "x0")


class BlindDenoiser(NetworkDenoiser):
    """A network that gets the image alone, in its own units, like the published bias-free CNNs.

    Args:
        network: called as `network(x, None, None)`.
        levels: the levels that it was trained for, in units of [-1, 1].
        low: the network's value for -1.
        high: the network's value for 1.
        output: "noise" if it returns the noise (in its units), "clean" if it returns the image.
        shape: (C, H, W) if the network has no `in_shape` or is used at another size.
    """

    blind = True

    def __init__(
        self,
        network: nn.Module,
        levels: Levels,
        *,
        low: float = 0.0,
        high: float = 1.0,
        output: Literal["noise", "clean"] = "noise",
        shape: Shape | None = None,
    ) -> None:
        super().__init__(network, shape)
        check_choice("output of a blind network", output, Literal["noise", "clean"])
        if not low < high:
            raise DitlabError(f"blind denoiser: expected low < high, found {low} and {high}")
        self.levels, self.output = levels, output
        self.unit = (high - low) / 2
        self.origin = -1 - low / self.unit

    @property
    def identity(self) -> dict[str, Any]:
        return super().identity | {"output": self.output, "unit": self.unit}

    def time(self, sigma: float | Tensor) -> None:
        """The network has no conditioning on the level."""

    def estimate(self, y: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Prediction:
        raw = self._run((y - self.origin) * self.unit, None, None, self.shape[0]) / self.unit
        return complete(y - raw if self.output == "noise" else raw + self.origin, y, sigma, "x0")
