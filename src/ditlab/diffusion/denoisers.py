"""The denoiser contract. Denoisers that are made of a network are in `ditlab.diffusion.network_denoisers`.

A denoiser estimates the clean image x0 in [-1, 1] from y = x0 + sigma * n, n unit normal: D(y, sigma, label). It is the
one thing that samplers and analyses see. In these (variance-exploding) coordinates a VP step t is the level
sqrt((1 - abar_t) / abar_t) seen through y = x_t / sqrt(abar_t), and An et al.'s x0 = x_t - sigma_t * eps (2410.21273,
Eq. 3) is exact.

Source: An et al. 2024, Eq. 3.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ditlab.diffusion.noise_levels import LevelRange, Levels
from ditlab.errors import DitlabError, unknown_name

PredictionTarget = Literal["epsilon", "x0"]
Variance = Literal["learned-range", "fixed-small", "fixed-large"]

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
        return complete(result.to(y.dtype), y, sigma, self.output)


def spread(sigma: float | Tensor, y: Tensor) -> float | Tensor:
    """Sigma as `Denoiser.estimate` takes it: a float, or [B, 1, 1, 1] with the dtype and device of y."""
    if not isinstance(sigma, Tensor):
        return float(sigma)
    return sigma.to(y).reshape(-1, 1, 1, 1).expand(len(y), 1, 1, 1)


def complete(
    estimate: Tensor, y: Tensor, sigma: float | Tensor, target: PredictionTarget, v: Tensor | None = None
) -> Prediction:
    """Both estimates from the one that `target` names, by y = x0 + sigma * eps; shapes as for `Denoiser.estimate`."""
    if target == "epsilon":
        return Prediction(y - sigma * estimate, estimate, v)
    return Prediction(estimate, (y - estimate) / sigma, v)


def _dims(shape: Any) -> str:
    return "x".join(str(int(size)) for size in shape)
