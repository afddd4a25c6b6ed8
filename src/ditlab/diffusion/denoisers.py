"""The denoiser contract, and the denoisers that are made of a network.

A denoiser estimates the clean image x0 in [-1, 1] from y = x0 + sigma * n, n unit normal: D(y, sigma, label). It is the
one thing that samplers and analyses see. In these (variance-exploding) coordinates a VP step t is the level
sqrt((1 - abar_t) / abar_t) seen through y = x_t / sqrt(abar_t), and An et al.'s x0 = x_t - sigma_t * eps (2410.21273,
Eq. 3) is exact.

Sources: An et al. 2024, Eq. 3; Karras et al. 2022, Table 1 (preconditioning); Mohan et al. 2020 (bias-free denoisers).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ditlab.diffusion.levels import BetweenSteps, DiscreteLevels, LevelRange, Levels
from ditlab.diffusion.schedules import VP_BETA_D, VP_BETA_MIN, VPSchedule, vp_sigma
from ditlab.errors import DitlabError, unknown_name

PredictionTarget = Literal["epsilon", "x0"]
Variance = Literal["learned-range", "fixed-small", "fixed-large"]
Preconditioning = Literal["edm", "vp", "ve"]

# Given levels may miss a grid's ends by float32 rounding.
_SLACK = 1e-6


class Prediction(NamedTuple):
    """What a denoiser says about y: y = x0 + sigma * eps always holds."""

    x0: Tensor
    """Estimate of the clean image, [B, C, H, W]."""
    eps: Tensor
    """Estimate of the unit noise, [B, C, H, W]."""
    v: Tensor | None
    """Where the reverse variance lies between posterior (-1) and beta (1), [B, C, H, W]; None where not learned."""


class Denoiser(ABC):
    """D(y, sigma, label) -> x0_hat.

    Call it, or `predict`, with y `[B, C, H, W]` (float32 or float64), sigma a number, a 0-dim or a `[B]` tensor, and
    label None or int64 `[B]`; what comes back has the dtype of y. Gradients flow; the network's mode is left alone.
    A new one implements `estimate`, and is given the attributes below.
    """

    shape: tuple[int, int, int]
    """(C, H, W) of the images."""
    levels: Levels
    """The noise levels that it knows."""
    num_classes: int = 0
    """Number of labels; 0 where it takes none. The label `num_classes` means "no label"."""
    null_class: bool = True
    """Whether one that takes labels also knows "no label"; guidance needs it."""
    peak: float = 2.0
    """Intensity range M of the images, for PSNR: 2 for [-1, 1]."""
    bounded: bool = True
    """Whether images lie in [-1, 1], so that an estimate may be clipped to it; False for latents."""
    blind: bool = False
    """Whether it ignores sigma."""
    origin: float = 0.0
    """The value in [-1, 1] that the network sees as zero; a bias-free network is homogeneous about it."""
    variance: Variance = "fixed-small"
    """The reverse variance that ancestral sampling uses where the configuration leaves it to the denoiser."""
    device: torch.device = torch.device("cpu")
    """Where y has to be."""

    @property
    def module(self) -> nn.Module | None:
        """The `nn.Module` that computes it, for analyses that look inside; None where there is none to be found."""
        return None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its estimates beside the weights of `module`, as JSON values: its process and its attributes.

        Two denoisers of equal weights whose identities differ are not to be taken for one; a subclass adds what it has.
        """
        return {
            "class": type(self).__name__,
            "shape": list(self.shape),
            "levels": self.levels.identity,
            "num_classes": self.num_classes,
            "null_class": self.null_class,
            "bounded": self.bounded,
            "blind": self.blind,
            "origin": self.origin,
            "variance": self.variance,
        }

    @abstractmethod
    def estimate(self, y: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Prediction:
        """`predict` without its checks, for loops that have called `check` once.

        Args:
            y: [B, C, H, W], float32 or float64.
            sigma: a float, or a tensor [B, 1, 1, 1] with y's dtype and device: arithmetic is the same for both.
            label: int64 [B], or None.
        """

    def __call__(
        self,
        y: Float[Tensor, "b c h w"],
        sigma: float | Float[Tensor, ""] | Float[Tensor, " _"],
        label: Int[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """The estimate of the clean images; see `predict`."""
        return self.predict(y, sigma, label).x0

    def predict(
        self,
        y: Float[Tensor, "b c h w"],
        sigma: float | Float[Tensor, ""] | Float[Tensor, " _"],
        label: Int[Tensor, " b"] | None = None,
    ) -> Prediction:
        """The estimates of clean image and noise, and the learned variance where there is one.

        Args:
            y: noisy images, x0 + sigma * n.
            sigma: noise level, one for all or one for each image.
            label: class of each image; `num_classes` for none; None for none at all.

        Raises:
            DitlabError: a shape, a level or a label that this denoiser does not know. On a GPU the check of a tensor
                waits for the device; loops call `check` once and then `estimate`.
        """
        self.check(y, sigma, label)
        return self.estimate(y, spread(sigma, y), label)

    def check(self, y: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> None:
        """Raise a DitlabError where `predict` could not use these arguments."""
        if y.ndim != 4 or tuple(y.shape[1:]) != tuple(self.shape):
            raise DitlabError(f"denoiser: expected images {_dims(self.shape)}, found {_dims(y.shape[1:])}")
        if isinstance(sigma, Tensor) and sigma.numel() not in (1, len(y)):
            raise DitlabError(f"denoiser: expected 1 or {len(y)} noise levels, found {sigma.numel()}")
        self.check_levels(sigma)
        self.check_labels(label, len(y))

    def check_levels(self, sigma: float | Tensor | np.ndarray) -> None:
        """Raise a DitlabError where a level lies outside `levels`, or is not positive."""
        if isinstance(sigma, int | float):
            low = high = float(sigma)
        else:
            low, high = float(sigma.min()), float(sigma.max())
        # Written so that NaN fails it.
        if not (low > 0 and low >= self.levels.min * (1 - _SLACK) and high <= self.levels.max * (1 + _SLACK)):
            found = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            raise DitlabError(
                f"denoiser: expected a noise level sigma from {self.levels.min:g} to {self.levels.max:g}, found {found}"
            )

    def check_labels(self, label: Tensor | None, count: int) -> None:
        """Raise a DitlabError where a label is not one of 0 .. `num_classes`."""
        if label is None:
            return
        if self.num_classes == 0:
            raise DitlabError("denoiser: expected no label, for it is unconditional, found labels")
        if tuple(label.shape) != (count,):
            raise DitlabError(f"denoiser: expected {count} labels, found shape {_dims(label.shape)}")
        low, high = int(label.min()), int(label.max())
        last = self.num_classes if self.null_class else self.num_classes - 1
        if low < 0 or high > last:
            known = f"{last} (none)" if self.null_class else f"{last}"
            raise DitlabError(f"denoiser: expected labels from 0 to {known}, found {low if low < 0 else high}")

    def passes(self, sigma: float) -> int:
        """How often each image goes through the network in one estimate at this level; guidance makes it two."""
        return 1

    def require_bounded(self, what: str) -> None:
        """Raise a DitlabError where estimates cannot be clipped, for the sake of the setting `what`."""
        if not self.bounded:
            raise DitlabError(f"{what}: latents have no bounds to clip estimates to; expected no clipping")

    def scale(self, sigma: float | Tensor) -> float | Tensor:
        """x_t / y, where x_t is what the network sees of y at this level (its units and origin apart)."""
        return 1.0

    def time(self, sigma: float | Tensor) -> float | Tensor | None:
        """What the network is told about the level; None where it is told nothing."""
        return sigma

    @staticmethod
    def wrap(
        function: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        shape: tuple[int, int, int],
        *,
        levels: Levels | None = None,
        output: PredictionTarget = "x0",
        num_classes: int = 0,
        blind: bool = False,
        origin: float = 0.0,
        device: torch.device | str = "cpu",
    ) -> Denoiser:
        """A denoiser from any function `(y [B, C, H, W], sigma [B], label) -> x0 or unit noise [B, C, H, W]`.

        Args:
            function: the user's own, working in [-1, 1]. Analyses of attention look inside it where it is an
                `nn.Module`, or a method of one.
            shape: (C, H, W).
            levels: levels that it knows; every positive one where not given.
            output: "x0" if it returns the clean image, "epsilon" if the unit noise.
            num_classes: number of labels.
            blind: whether it ignores sigma.
            origin: see the class.
            device: where it computes.

        Example:
            >>> flat = Denoiser.wrap(lambda y, sigma, label: 0.5 * y, shape=(3, 8, 8))
            >>> flat(torch.ones(2, 3, 8, 8), 0.3).shape
            torch.Size([2, 3, 8, 8])
        """
        return _WrappedDenoiser(function, shape, levels, output, num_classes, blind, origin, torch.device(device))


class NetworkDenoiser(Denoiser):
    """What denoisers made of a network share: `network(x, t, label)` with `in_shape` and `num_classes`."""

    def __init__(self, network: nn.Module, shape: tuple[int, int, int] | None = None) -> None:
        self.network = network
        given: Any = network.in_shape if shape is None else shape
        self.shape = (int(given[0]), int(given[1]), int(given[2]))
        self.num_classes = int(getattr(network, "num_classes", 0))
        self.null_class = bool(getattr(getattr(network, "config", None), "null_class", True))

    @property
    def identity(self) -> dict[str, Any]:
        """See `Denoiser.identity`; the network's own settings too, as one with other heads may have equal weights."""
        config = getattr(self.network, "config", None)
        found = super().identity
        if is_dataclass(config) and not isinstance(config, type):
            found["network"] = asdict(config)
        return found

    @property
    def module(self) -> nn.Module:
        """The network."""
        return self.network

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where the network's parameters are."""
        first = next(self.network.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    def _run(self, x: Tensor, time: float | Tensor | None, label: Tensor | None, outputs: int) -> Tensor:
        """The network's raw output, in the dtype of x, whatever the network computes in."""
        first = next(self.network.parameters(), None)
        dtype = x.dtype if first is None else first.dtype
        # A time of up to 1000 keeps its integers in float32 at least.
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
    """A network trained on a discrete VP process: it sees x_t = sqrt(abar_t) y and the step t.

    Args:
        network: raw output `[B, C, H, W]`, or `[B, 2C, H, W]` (the prediction, then v) with "learned-range".
        schedule: the process that it was trained on; its `timesteps` are what the network is told.
        prediction: what its first C channels are.
        variance: what is known of the reverse variance.
        shape: (C, H, W) where the network has no `in_shape`.
        between: for levels between two steps, a fractional t (linear in log sigma) or the nearest step's.
        rescale_time: tell the network t * 1000 / T, as improved-diffusion's rescale_timesteps does.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: VPSchedule,
        prediction: PredictionTarget = "epsilon",
        variance: Variance = "learned-range",
        *,
        shape: tuple[int, int, int] | None = None,
        between: BetweenSteps = "interpolate",
        rescale_time: bool = False,
    ) -> None:
        super().__init__(network, shape)
        for what, name, known in (
            ("prediction", prediction, PredictionTarget),
            ("variance", variance, Variance),
            ("way between steps", between, BetweenSteps),
        ):
            if name not in get_args(known):
                raise unknown_name(what, name, get_args(known))
        self.schedule = schedule
        self.prediction: PredictionTarget = prediction
        self.variance: Variance = variance
        self.between: BetweenSteps = between
        self.levels = DiscreteLevels(schedule.sigmas, schedule.timesteps)
        self.time_factor = 1000 / len(schedule) if rescale_time else 1.0

    @property
    def identity(self) -> dict[str, Any]:
        """See `Denoiser.identity`."""
        own = {"prediction": self.prediction, "between": self.between, "time_factor": self.time_factor}
        return super().identity | own

    def scale(self, sigma: float | Tensor) -> float | Tensor:
        """sqrt(abar_t)."""
        return (1 + sigma * sigma) ** -0.5

    def time(self, sigma: float | Tensor) -> float | Tensor:
        """The step t, an exact integer on the grid."""
        return self.levels.step(sigma, self.between) * self.time_factor  # pyright: ignore[reportAttributeAccessIssue]

    def estimate(self, y: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Prediction:
        """See `Denoiser.estimate`."""
        channels = self.shape[0]
        outputs = 2 * channels if self.variance == "learned-range" else channels
        raw = self._run(y * self.scale(sigma), self.time(sigma), label, outputs)
        v = raw[:, channels:] if self.variance == "learned-range" else None
        return _complete(raw[:, :channels], y, sigma, self.prediction, v)


class EDMDenoiser(NetworkDenoiser):
    """D(y) = c_skip y + c_out F(c_in y, c_noise) around a network F (Karras et al. 2022, Eq. 7 and Table 1).

    Args:
        network: raw output `[B, C, H, W]`.
        precond: "edm"; "vp" and "ve" are Song et al.'s processes in the same form.
        sigma_data: standard deviation of the images, for "edm".
        shape: (C, H, W) where the network has no `in_shape`.
    """

    def __init__(
        self,
        network: nn.Module,
        precond: Preconditioning = "edm",
        sigma_data: float = 0.5,
        *,
        shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__(network, shape)
        if precond not in get_args(Preconditioning):
            raise unknown_name("preconditioning", precond, get_args(Preconditioning))
        self.precond, self.sigma_data = precond, sigma_data
        self.levels = {
            "edm": LevelRange(0.0, math.inf),
            "vp": LevelRange(float(vp_sigma(1e-5)), float(vp_sigma(1.0))),
            "ve": LevelRange(0.02, 100.0),
        }[precond]

    @property
    def identity(self) -> dict[str, Any]:
        """See `Denoiser.identity`."""
        return super().identity | {"precond": self.precond, "sigma_data": self.sigma_data}

    def scale(self, sigma: float | Tensor) -> float | Tensor:
        """c_in."""
        if self.precond == "ve":
            return 1.0
        return (sigma * sigma + (self.sigma_data**2 if self.precond == "edm" else 1.0)) ** -0.5

    def time(self, sigma: float | Tensor) -> float | Tensor:
        """c_noise."""
        if self.precond == "edm":
            return _log(sigma) / 4
        if self.precond == "ve":
            return _log(sigma / 2)
        # 999 times the time of the VP process; float64 because ln(1 + sigma^2) cancels at small levels.
        wide = sigma.double() if isinstance(sigma, Tensor) else float(sigma)
        root = (VP_BETA_MIN**2 + 2 * VP_BETA_D * _log1p(wide * wide)) ** 0.5
        return 999 * (root - VP_BETA_MIN) / VP_BETA_D

    def skip_and_out(self, sigma: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
        """(c_skip, c_out)."""
        if self.precond == "edm":
            total = sigma * sigma + self.sigma_data**2
            return self.sigma_data**2 / total, sigma * self.sigma_data * total**-0.5
        return 1.0, (-sigma if self.precond == "vp" else sigma)

    def estimate(self, y: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Prediction:
        """See `Denoiser.estimate`."""
        raw = self._run(y * self.scale(sigma), self.time(sigma), label, self.shape[0])
        skip, out = self.skip_and_out(sigma)
        return _complete(skip * y + out * raw, y, sigma, "x0")


class BlindDenoiser(NetworkDenoiser):
    """A network that sees only the image, in units of its own, like the published bias-free CNNs.

    Args:
        network: called as `network(x, None, None)`.
        levels: the levels that it was trained for, in units of [-1, 1].
        low: what it sees for our -1.
        high: what it sees for our 1.
        output: "noise" if it returns the noise (in its units), "clean" if the image.
        shape: (C, H, W) where the network has no `in_shape`, or is to be used at another size.
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
        shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__(network, shape)
        if output not in ("noise", "clean"):
            raise unknown_name("output of a blind network", output, ("noise", "clean"))
        if not low < high:
            raise DitlabError(f"blind denoiser: expected low < high, found {low} and {high}")
        self.levels, self.output = levels, output
        self.unit = (high - low) / 2
        self.origin = -1 - low / self.unit

    @property
    def identity(self) -> dict[str, Any]:
        """See `Denoiser.identity`."""
        return super().identity | {"output": self.output, "unit": self.unit}

    def time(self, sigma: float | Tensor) -> None:
        """None: the network is told nothing."""
        return

    def estimate(self, y: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Prediction:
        """See `Denoiser.estimate`."""
        raw = self._run((y - self.origin) * self.unit, None, None, self.shape[0]) / self.unit
        return _complete(y - raw if self.output == "noise" else raw + self.origin, y, sigma, "x0")


class _WrappedDenoiser(Denoiser):
    """A user's function as a denoiser; made by `Denoiser.wrap`."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        shape: tuple[int, int, int],
        levels: Levels | None,
        output: PredictionTarget,
        num_classes: int,
        blind: bool,
        origin: float,
        device: torch.device,
    ) -> None:
        if output not in get_args(PredictionTarget):
            raise unknown_name("output of a wrapped function", output, get_args(PredictionTarget))
        self.function = function
        self.output: PredictionTarget = output
        self.shape, self.num_classes, self.blind, self.origin, self.device = shape, num_classes, blind, origin, device
        self.levels = LevelRange(0.0, math.inf) if levels is None else levels

    @property
    def identity(self) -> dict[str, Any]:
        """See `Denoiser.identity`."""
        return super().identity | {"output": self.output}

    @property
    def module(self) -> nn.Module | None:
        """The function itself, or the object that it is a method of, where that is an `nn.Module`."""
        holder = getattr(self.function, "__self__", self.function)
        return holder if isinstance(holder, nn.Module) else None

    def estimate(self, y: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Prediction:
        """See `Denoiser.estimate`."""
        each = sigma.reshape(-1) if isinstance(sigma, Tensor) else y.new_full((len(y),), sigma)
        result = self.function(y, each, label)
        if result.shape != y.shape:
            raise DitlabError(f"wrapped denoiser: expected a result {_dims(y.shape)}, found {_dims(result.shape)}")
        return _complete(result.to(y.dtype), y, sigma, self.output)


def spread(sigma: float | Tensor, y: Tensor) -> float | Tensor:
    """Sigma as `Denoiser.estimate` takes it: a float, or [B, 1, 1, 1] with the dtype and device of y."""
    if not isinstance(sigma, Tensor):
        return float(sigma)
    return sigma.to(y).reshape(-1, 1, 1, 1).expand(len(y), 1, 1, 1)


def _complete(
    estimate: Tensor, y: Tensor, sigma: float | Tensor, target: PredictionTarget, v: Tensor | None = None
) -> Prediction:
    if target == "epsilon":
        return Prediction(y - sigma * estimate, estimate, v)
    return Prediction(estimate, (y - estimate) / sigma, v)


def _log(value: float | Tensor) -> float | Tensor:
    return value.log() if isinstance(value, Tensor) else math.log(value)


def _log1p(value: float | Tensor) -> float | Tensor:
    return value.log1p() if isinstance(value, Tensor) else math.log1p(value)


def _dims(shape: Any) -> str:
    return "x".join(str(int(size)) for size in shape)
