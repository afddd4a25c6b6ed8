"""The denoiser contract: D(y, sigma, label) estimates the clean image x0 in [-1, 1].

    y = x0 + sigma * n,  n unit normal;    eps = (y - D(y, sigma)) / sigma

Samplers and analyses see denoisers and nothing else. In these (variance-exploding) coordinates a VP step t is the level
sqrt((1 - abar_t) / abar_t), seen through y = x_t / sqrt(abar_t), and An et al.'s x0 = x_t - sigma_t * eps is exact
(2410.21273, Eq. 3).
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ditlab.arguments import checks_arguments
from ditlab.diffusion.choices import PredictionTarget, Variance
from ditlab.diffusion.fingerprint import UNKNOWN, add_tensor, fingerprint
from ditlab.diffusion.noise_levels import LevelRange, Levels
from ditlab.diffusion.short_repr import short_repr
from ditlab.diffusion.tensors import Images, Labels, Shape, Sigma
from ditlab.errors import DitlabError, InvalidConfig

__all__ = ["Denoiser", "Prediction", "complete", "hash_of_weights"]


class Prediction(NamedTuple):
    """The estimates at y; y = x0 + sigma * eps always holds."""

    x0: Tensor
    """Estimate of the clean image, [B, C, H, W]."""
    eps: Tensor
    """Estimate of the unit noise, [B, C, H, W]."""
    v: Tensor | None
    """Learned reverse variance, from the posterior's (-1) to beta (1), [B, C, H, W]; None if it is not learned."""

    __repr__ = short_repr


class Denoiser(ABC):
    """D(y, sigma, label) -> x0_hat.

    Call it, or `predict`, with y `[B, C, H, W]` (float32 or float64), sigma a number, a 0-dim or a `[B]` tensor, and
    label None or int64 `[B]`. The results have the dtype of y, and gradients flow through them. A subclass implements
    `estimate` and sets the attributes below.
    """

    shape: Shape
    """(C, H, W) of the images."""
    levels: Levels
    """The noise levels that it takes."""
    num_classes: int = 0
    """Number of labels; 0 if it takes none. The label `num_classes` means "no label"."""
    null_class: bool = True
    """Whether a denoiser that takes labels also takes "no label", which guidance needs."""
    peak: float = 2.0
    """Intensity range M of the images, for PSNR: 2 for [-1, 1]."""
    pixel_space: bool = True
    """Whether images are pixels in [-1, 1], so that an estimate may be clipped to it; False for latents."""
    blind: bool = False
    """Whether it ignores sigma."""
    origin: float = 0.0
    """The value in [-1, 1] that the network sees as zero; a bias-free network is homogeneous about it."""
    variance: Variance = "fixed-small"
    """The reverse variance that ancestral sampling uses if its config leaves it to the denoiser."""
    device: torch.device = torch.device("cpu")
    """The device that y has to be on."""

    @property
    def module(self) -> nn.Module | None:
        """Returns the `nn.Module` that computes the estimates, for analyses of its layers; None if there is none."""
        return None

    def __repr__(self) -> str:
        """Returns the class, the module's class, the shape, the range of levels and the number of classes."""
        parts = [] if self.module is None else [type(self.module).__name__]
        parts += [_dims(self.shape), f"sigma {self.levels.min:.3g} to {self.levels.max:.3g}"]
        parts += [f"{self.num_classes} classes"] if self.num_classes else []
        return f"{type(self).__name__.lstrip('_')}({', '.join(parts)})"

    @property
    def identity(self) -> dict[str, Any]:
        """Returns everything but the weights of `module` that decides the estimates, as JSON values.

        Two denoisers of equal weights are the same only if their identities are equal. Saved hashes contain it, so its
        keys do not follow a rename. A subclass adds its own settings.
        """
        return {
            "class": type(self).__name__,
            "shape": list(self.shape),
            "levels": self.levels.identity,
            "num_classes": self.num_classes,
            "null_class": self.null_class,
            "bounded": self.pixel_space,
            "blind": self.blind,
            "origin": self.origin,
            "variance": self.variance,
            **({} if type(self).__module__.startswith("ditlab.") else {"code": fingerprint(self)}),
        }

    @abstractmethod
    def estimate(self, y: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Prediction:
        """Returns what `predict` does, without its checks, for loops that have called `check` once.

        Here sigma is a float, or a tensor [B, 1, 1, 1] with y's dtype and device: arithmetic is the same for both.
        """

    def __call__(self, y: Images, sigma: Sigma, label: Labels = None) -> Images:
        """Returns the estimate of the clean images; see `predict`."""
        return self.predict(y, sigma, label).x0

    def predict(self, y: Images, sigma: Sigma, label: Labels = None) -> Prediction:
        """Returns the estimates of clean image and noise, and the learned variance if there is one.

        Args:
            y: noisy images, x0 + sigma * n.
            sigma: noise level, a single one or one for each image.
            label: the class of each image, `num_classes` for "no label"; None for a batch without labels.

        Raises:
            DitlabError: a shape, a level or a label that this denoiser does not take. On a GPU the check of a tensor
                waits for the device, so loops call `check` once and then `estimate`.
        """
        self.check(y, sigma, label)
        if not isinstance(sigma, Tensor):
            return self.estimate(y, float(sigma), label)
        return self.estimate(y, sigma.to(y).reshape(-1, 1, 1, 1).expand(len(y), 1, 1, 1), label)

    def check(self, y: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> None:
        """Raises a DitlabError if `predict` cannot use these arguments."""
        if y.ndim != 4 or tuple(y.shape[1:]) != tuple(self.shape):
            raise DitlabError(f"denoiser: expected images {_dims(self.shape)}, found {_dims(y.shape[1:])}")
        if isinstance(sigma, Tensor) and sigma.numel() not in (1, len(y)):
            raise DitlabError(f"denoiser: expected 1 or {len(y)} noise levels, found {sigma.numel()}")
        self.check_levels(sigma)
        self.check_labels(label, len(y))

    def check_levels(self, sigma: float | Tensor | np.ndarray) -> None:
        """Raises a DitlabError if a level is outside `levels` or not positive."""
        levels = sigma if isinstance(sigma, Tensor) else np.asarray(sigma)
        low, high = float(levels.min()), float(levels.max())
        # Float32 rounding may move a level beyond a grid's ends. NaN fails every comparison.
        if not (low > 0 and low >= self.levels.min * (1 - 1e-6) and high <= self.levels.max * (1 + 1e-6)):
            span = f"{low:g}" if low == high else f"{low:g} to {high:g}"
            raise DitlabError(
                f"denoiser: expected a noise level sigma from {self.levels.min:g} to {self.levels.max:g}, found {span}"
            )

    def check_labels(self, label: Tensor | None, count: int) -> None:
        """Raises a DitlabError if a label is not in 0 .. `num_classes`."""
        if label is None:
            return
        if self.num_classes == 0:
            raise DitlabError("denoiser: expected no label (it is unconditional), found labels")
        if tuple(label.shape) != (count,):
            raise DitlabError(f"denoiser: expected {count} labels, found shape {_dims(label.shape)}")
        low, high = int(label.min()), int(label.max())
        last = self.num_classes if self.null_class else self.num_classes - 1
        if low < 0 or high > last:
            known = f"{last} (none)" if self.null_class else f"{last}"
            raise DitlabError(f"denoiser: expected labels from 0 to {known}, found {low if low < 0 else high}")

    def passes(self, sigma: float) -> int:
        """Returns how often an image goes through the network in one estimate at this level; with guidance 2."""
        return 1

    def require_pixel_space(self, what: str) -> None:
        """Raises a DitlabError in the name of the setting `what` if estimates cannot be clipped to [-1, 1]."""
        if not self.pixel_space:
            raise DitlabError(f"{what}: latents have no bounds to clip estimates to; expected no clipping")

    def scale(self, sigma: float | Tensor) -> float | Tensor:
        """Returns x_t / y, where x_t is the network's input for y at this level, units and origin apart."""
        return 1.0

    def time(self, sigma: float | Tensor) -> float | Tensor | None:
        """Returns the network's conditioning on the level; None for a blind network."""
        return sigma

    @staticmethod
    @checks_arguments({})
    def wrap(
        function: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        shape: Shape,
        *,
        levels: Levels | None = None,
        output: PredictionTarget = "x0",
        num_classes: int = 0,
        blind: bool = False,
        origin: float = 0.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Denoiser:
        """Returns a denoiser made of any function `(y [B, C, H, W], sigma [B], label) -> x0 or noise [B, C, H, W]`.

        The function may be an `nn.Module` or a method of one. Then the module is put into `eval()` mode here, once, and
        analyses of attention can read its layers. Its parameters keep `requires_grad`, and gradients flow: `sample` and
        the measures run it without gradients, Jacobians with them.

        Args:
            function: works on images in [-1, 1].
            shape: (C, H, W).
            levels: levels that it takes; every positive one if None.
            output: "x0" if it returns the clean image, "epsilon" if the unit noise.
            num_classes: number of labels.
            blind: whether it ignores sigma.
            origin: see the class.
            device: the device that it computes on.
            dtype: y and sigma are cast to it, and the result back; if None the module's, or none for a plain function.
                Name it for a function that calls a float32 network, because some samplers compute in float64.

        Raises:
            InvalidConfig: an argument of another type, or a value that no denoiser has.

        Example:
            >>> flat = Denoiser.wrap(lambda y, sigma, label: 0.5 * y, shape=(3, 8, 8))
            >>> flat(torch.ones(2, 3, 8, 8), 0.3).shape
            torch.Size([2, 3, 8, 8])
        """
        if min(shape) < 1 or num_classes < 0 or not math.isfinite(origin):
            raise InvalidConfig(
                "wrapped denoiser: expected `shape` of at least 1x1x1, `num_classes` from 0 on and a finite `origin`, "
                f"found {_dims(shape)}, {num_classes} and {origin}"
            )
        try:
            place = torch.device(device)
        except RuntimeError:
            raise InvalidConfig(f"`device`: expected a device such as 'cpu' or 'cuda:0', found {device!r}") from None
        denoiser = _WrappedDenoiser(function, output)
        denoiser.shape, denoiser.num_classes, denoiser.blind, denoiser.origin = shape, num_classes, blind, origin
        denoiser.device, denoiser.levels = place, LevelRange(0.0, math.inf) if levels is None else levels
        denoiser.dtype = dtype
        if denoiser.module is not None:
            denoiser.module.eval()
        return denoiser


class _WrappedDenoiser(Denoiser):
    """A user's function as a denoiser; made by `Denoiser.wrap`."""

    dtype: torch.dtype | None

    def __init__(self, function: Callable[..., Tensor], output: PredictionTarget) -> None:
        self.function = function
        self.output: PredictionTarget = output

    @property
    def identity(self) -> dict[str, Any]:
        own = {"output": self.output, "dtype": str(self.dtype), "code": fingerprint(self.function)}
        return super().identity | own

    @property
    def module(self) -> nn.Module | None:
        # The function, or the object that it is a method of.
        holder = getattr(self.function, "__self__", self.function)
        return holder if isinstance(holder, nn.Module) else None

    def estimate(self, y: Tensor, sigma: float | Tensor, label: Tensor | None = None) -> Prediction:
        dtype = self.dtype
        if dtype is None and self.module is not None:
            # Read at every call, because a module may be cast after it was wrapped.
            dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), None)
        x = y.to(dtype or y.dtype)
        each = sigma.reshape(-1).to(x) if isinstance(sigma, Tensor) else x.new_full((len(y),), sigma)
        result = self.function(x, each, label)
        if result.shape != y.shape:
            raise DitlabError(f"wrapped denoiser: expected a result {_dims(y.shape)}, found {_dims(result.shape)}")
        return complete(result.to(y.dtype), y, sigma, self.output)


def hash_of_weights(denoiser: Denoiser, *others: Any) -> str:
    """Returns the SHA-256 of all that decides a denoiser's estimates, and of `others` (JSON values).

    It is "" where that cannot be known: a function of a user's own has no weights, so its results are never cached.
    """
    text = json.dumps([denoiser.identity, *others] if others else denoiser.identity, sort_keys=True, default=str)
    if denoiser.module is None or f'"code": "{UNKNOWN}' in text:
        return ""
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(denoiser.module.state_dict().items()):
        add_tensor(digest, name, value)
    return digest.hexdigest()


def complete(
    estimate: Tensor, y: Tensor, sigma: float | Tensor, target: PredictionTarget, v: Tensor | None = None
) -> Prediction:
    """Returns both estimates from the one that `target` names, by y = x0 + sigma * eps (see `Denoiser.estimate`)."""
    if target == "epsilon":
        return Prediction(y - sigma * estimate, estimate, v)
    return Prediction(estimate, (y - estimate) / sigma, v)


def _dims(shape: Any) -> str:
    return "x".join(str(int(size)) for size in shape)
