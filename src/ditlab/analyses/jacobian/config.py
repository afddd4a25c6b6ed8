"""Settings of the Jacobian."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ditlab.analyses.sigmas import check_levels
from ditlab.errors import InvalidConfig, unknown_name

__all__ = ["DecompositionKind", "JacobianConfig", "JacobianOptions", "Mode", "Side", "Target"]

Target = Literal["x0", "eps", "I-eps"]
DecompositionKind = Literal["svd", "eigh", "eig", "eig-right"]
Mode = Literal["auto", "forward", "reverse"]
Side = Literal["test", "train"]


@dataclass(frozen=True)
class JacobianConfig:
    """Which Jacobians are computed, and how."""

    images: tuple[int, ...] = (0,)
    """Which images of their side, counted from 0."""
    sigmas: tuple[float, ...] | None = None
    """Noise levels (sigma), ascending. Without them the level of step 100 of the DDPM process (0.34) is used; the
    papers do not name the levels of their figures."""
    timesteps: tuple[int, ...] | None = None
    """Noise levels as timesteps of the model's own process, ascending, instead of `sigmas`."""
    target: Target = "x0"
    """Whose Jacobian: of the denoised image by the noisy image (x0), of the estimated noise by x_t (eps), or the
    identity minus that of eps (I-eps)."""
    decomposition: DecompositionKind = "svd"
    """Singular vectors (svd), eigenvectors of the symmetric part (eigh), left eigenvectors of the matrix itself, w^T J
    = l w^T (eig; the cheapest together with `top`), or right ones, J v = l v (eig-right)."""
    top: int = 0
    """Compute only this many leading values and vectors, from products with the matrix, which is never stored. 0
    computes the whole matrix and all of its vectors."""
    show: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64, 112, 224)
    """Which vectors are saved and drawn, counted from 0, the leading one. Indices beyond the last vector are
    ignored."""
    pixels: tuple[tuple[int, int], ...] = ()
    """Output pixels (row, column) whose sensitivity is saved and drawn; the middle one if none is given."""
    mode: Mode = "auto"
    """How the whole matrix is made: by columns (forward), by rows (reverse), or the faster of the two (auto), timed on
    a few rows and columns."""
    chunk: int = 16
    """Rows or columns computed at once, which limits the memory. Does not change the result beyond float rounding."""
    step_size: float = 0.1
    """Length of the random step d of r_lin = |D(y + d) - D(y) - J d| / |D(y + d) - D(y)|, as a share of the noise."""
    noise_seed: int = 0
    """Seed of the noise. Equal seeds give every denoiser the same noise."""

    def __post_init__(self) -> None:
        for name, choices in (("target", Target), ("decomposition", DecompositionKind), ("mode", Mode)):
            if getattr(self, name) not in get_args(choices):
                raise unknown_name(f"jacobian `{name}`", str(getattr(self, name)), get_args(choices))
        check_levels(self.sigmas, self.timesteps, "jacobian")
        for name, places in (("images", self.images), ("show", self.show)):
            if not places or len(set(places)) < len(places) or min(places) < 0:
                raise InvalidConfig(
                    f"jacobian: `{name}` must be different places, counted from 0, found {list(places)}"
                )
        if any(len(pixel) != 2 or min(pixel) < 0 for pixel in self.pixels):
            raise InvalidConfig(
                f"jacobian: `pixels` must be rows and columns, counted from 0, found {list(self.pixels)}"
            )
        for name, least in (("top", 0), ("chunk", 1)):
            if getattr(self, name) < least:
                raise InvalidConfig(f"jacobian: `{name}` must be at least {least}, found {getattr(self, name)}")
        if not 0 < self.step_size < math.inf:
            raise InvalidConfig(f"jacobian: `step_size` must be above 0, found {self.step_size:g}")


@dataclass(frozen=True)
class JacobianOptions:
    """Which images the denoisers see, and what else is drawn."""

    images_from: Side = "test"
    """The side that `images` counts: held-out images or training images."""
    pictures: tuple[Path, ...] = ()
    """Picture files to use instead of images of the models, cut to the models' size; all of them. Models with classes
    get no class with them."""
    shuffled: bool = False
    """Permute the pixels of each image, the same way for all models: the control for vectors that follow the shapes of
    an image."""
    right: bool = False
    """Also draw the right singular vectors, directions of the input (svd only)."""

    def __post_init__(self) -> None:
        if self.images_from not in get_args(Side):
            raise unknown_name("jacobian `images_from`", self.images_from, get_args(Side))
