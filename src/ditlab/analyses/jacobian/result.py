"""The saved result of a denoiser's Jacobian: settings, the numbers of each (image, noise level), and some vectors.

The Jacobian of a target at one noisy image y = x0 + sigma n is a D x D matrix, D = C H W, rows output values, columns
input values. The three targets are affine functions of one another (D(y) the denoised image, x_t = scale * y what a VP
network sees, eps the estimated unit noise):

    x0      dD/dy                    = sigma^-2 Cov[x0 | y] of the optimal denoiser: symmetric, shrinkages in [0, 1]
    eps     d eps / d x_t            = (I - dD/dy) / (sigma * scale): An et al.'s, their Eq. 5
    I-eps   I - d eps / d x_t        the other reading of their figures (which of the two they drew is not known)

So the leading directions of x0 (the signal) are the trailing directions of eps.

Sources: An et al. 2410.21273 (Eq. 5, Figs. 1-3); Kadkhodaie et al., ICLR 2024 (shrinkage, effective dimensionalities);
Niedoba et al. 2411.19339 (sensitivity, locality sizes).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ditlab.analyses.jacobian.config import JacobianConfig
from ditlab.analyses.stored import StoredResult, config_from_json, tuples
from ditlab.provenance import Provenance

__all__ = ["SHARES", "JacobianPoint", "JacobianResult", "Sensitivity"]

SHARES = (0.5, 0.75, 0.95)
"""Shares of a pixel's sensitivity whose squares are measured (Niedoba et al.)."""


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """How much each output pixel depends on each input pixel: sums of |J| over both pixels' channels."""

    pixels: tuple[tuple[int, int], ...]
    """Output pixels (row, column) that `maps` are of."""
    maps: np.ndarray
    """float32 [pixels, H, W]; each sums to 1."""
    centred: np.ndarray
    """float32 [2H - 1, 2W - 1]: mean over all output pixels of their maps, shifted so that the output pixel is in the
    middle."""
    sizes: np.ndarray
    """float32 [shares, H, W]: side of the smallest square centred at each output pixel, cut at the border, that holds
    that share (`SHARES`) of its map."""

    @property
    def locality(self) -> tuple[float, ...]:
        """The mean side over the output pixels, in pixels, one for each share."""
        return tuple(float(size.mean()) for size in self.sizes)


@dataclass(frozen=True, eq=False)
class JacobianPoint:
    """One Jacobian: of one image at one noise level."""

    image: int
    """Place on its side."""
    sigma: float
    timestep: int | None
    """The step of the denoiser's own process with this level; None where it has no numbered ones."""
    clean: np.ndarray
    """float32 [C, H, W], x0."""
    noisy: np.ndarray
    """float32 [C, H, W], y = x0 + sigma n."""
    denoised: np.ndarray
    """float32 [C, H, W], D(y)."""
    values: np.ndarray
    """float64 [K], complex128 for `eig` and `eig-right`: singular values or eigenvalues, largest first (for these two
    by modulus, and of a complex pair the one with the positive imaginary part comes first)."""
    residuals: np.ndarray
    """float64 [K], of vectors of length 1, from products computed again (see `Decomposition.residuals`)."""
    shown: np.ndarray
    """int64 [G]: which vectors are saved."""
    left: np.ndarray
    """float32 [G, C, H, W]: left singular vectors (directions of the output) or eigenvectors, as in
    `Decomposition.left`."""
    right: np.ndarray
    """float32 [G, C, H, W]: right singular vectors (directions of the input); otherwise the same as `left`."""
    by_vector: Mapping[str, np.ndarray]
    """Measure -> float64 [K], one value a vector (`ditlab.analyses.jacobian.measures`)."""
    channels: np.ndarray
    """float64 [K, C]: share of each vector's energy in each channel; rows sum to 1."""
    numbers: Mapping[str, float | None]
    """Measures of the whole Jacobian (`measure.NUMBERS`); None where one needs more than was computed."""
    sensitivity: Sensitivity | None = None
    """Of the whole matrix with the target x0; otherwise None."""
    wiener: Sensitivity | None = None
    """The same of the Wiener denoiser of the training images, at this level."""


@dataclass(frozen=True, eq=False)
class JacobianResult(StoredResult):
    """The Jacobians of one denoiser."""

    about: Provenance
    config: JacobianConfig
    points: tuple[JacobianPoint, ...]
    """Image after image, each at all levels ascending."""

    kind = file = "jacobian"
    version = 2
    needs_arrays = True

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that a reader must know about how this was measured."""
        note = (
            f"Only the {self.config.top} leading values and vectors were computed, from products with the matrix. "
            "Numbers that need the whole matrix are not given."
        )
        return (note,) if self.config.top else ()

    def numbers(self) -> dict[str, Any]:
        return {"notes": list(self.notes), "points": [_point_to_json(point) for point in self.points]}

    def arrays(self) -> dict[str, np.ndarray]:
        return {f"{i}/{name}": a for i, point in enumerate(self.points) for name, a in _point_arrays(point).items()}

    @classmethod
    def read(cls, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> JacobianResult:
        config = dict(record["config"])
        if record["version"] < 2 and config.get("decomposition") == "eig":
            # In version 1 this was the name of the right eigenvectors.
            config["decomposition"] = "eig-right"
        by_point = [{} for _ in record["points"]]
        for key, array in arrays.items():
            place, _, name = key.partition("/")
            by_point[int(place)][name] = array
        points = map(_point_from_json, record["points"], by_point)
        return cls(Provenance(**record["about"]), config_from_json(JacobianConfig, config), tuple(points))


_ARRAYS = ("clean", "noisy", "denoised", "values", "residuals", "shown", "left", "right", "channels")
_MAPS = ("maps", "centred", "sizes")
_SIDES = ("sensitivity", "wiener")
_LEADING = 16


def _point_arrays(point: JacobianPoint) -> dict[str, np.ndarray]:
    arrays = {name: getattr(point, name) for name in _ARRAYS}
    arrays |= {f"by_vector/{name}": values for name, values in point.by_vector.items()}
    for side in _SIDES:
        sensitivity: Sensitivity | None = getattr(point, side)
        if sensitivity is not None:
            arrays |= {f"{side}/{name}": getattr(sensitivity, name) for name in _MAPS}
    return arrays


def _point_to_json(point: JacobianPoint) -> dict[str, Any]:
    leading = point.values[:_LEADING].tolist()
    if point.values.dtype.kind == "c":
        leading = [[value.real, value.imag] for value in leading]
    record = {
        "image": point.image,
        "sigma": point.sigma,
        "timestep": point.timestep,
        "count": len(point.values),
        "leading_values": leading,
        "largest_residual": float(point.residuals.max()),
        "numbers": dict(point.numbers),
        "by_vector": {name: values[:_LEADING].tolist() for name, values in point.by_vector.items()},
    }
    for name, side in (("sensitivity", point.sensitivity), ("wiener", point.wiener)):
        if side is not None:
            sizes = {f"{share:g}": size for share, size in zip(SHARES, side.locality, strict=True)}
            side = {"pixels": [list(pixel) for pixel in side.pixels], "locality": sizes}
        record[name] = side
    return record


def _point_from_json(record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> JacobianPoint:
    sides = {}
    for side in _SIDES:
        if record[side] is not None:
            maps = {name: arrays[f"{side}/{name}"] for name in _MAPS}
            sides[side] = Sensitivity(pixels=tuples(record[side]["pixels"]), **maps)
    return JacobianPoint(
        **{name: record[name] for name in ("image", "sigma", "timestep")},
        **{name: arrays[name] for name in _ARRAYS},
        by_vector={name: arrays[f"by_vector/{name}"] for name in record["by_vector"]},
        numbers=dict(record["numbers"]),
        **sides,
    )
