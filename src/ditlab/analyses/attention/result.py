"""The result of an attention measurement: `attention.json`, which can be read alone, and each image's values in .npz.

Layers and heads count from 1, as in the paper. Every value is a mean over images and queries; there is one for each
(noise level, layer, head). Means over heads, levels and layers are unweighted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np

from ditlab.analyses.attention.config import AttentionConfig
from ditlab.analyses.attention.locality import (
    mass_within,
    masses_within,
    pattern_distance,
    pattern_weights,
    uniform_distance,
)
from ditlab.analyses.stored import StoredResult, config_from_json, tuples
from ditlab.errors import Damaged, DitlabError, unknown_name
from ditlab.nn.patterns import Global, Grid, Partition, Pattern, Window
from ditlab.provenance import Provenance

__all__ = ["BY_IMAGE", "QUANTITIES", "RADII", "LocalityResult", "Quantity", "quantity_name"]

Quantity = Literal[
    "distance", "entropy", "normalized_entropy", "position_invariance", "consistency", "consistency_control"
]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
RADII = (0, 1, 2, 3, 4, 5, 6)
"""Chebyshev radii at which mass is measured: the token itself, and the windows 3, 5, ..., 13."""

BY_IMAGE = ("distance", "entropy", "position_invariance")
"""The values that are stored of each image."""
OLDER = "distances are of an older definition, the larger of rows and columns"
_FACTS = ("levels", "timesteps", "layers", "depth", "heads", "grid", "patch")


@lru_cache(maxsize=256)  # layers share patterns, and every result that is written or drawn asks again
def _mass_of_pattern(pattern: Pattern, grid: Grid, radius: int) -> float:
    return float(mass_within(pattern_weights(pattern, grid), grid, radius))


@dataclass(frozen=True, eq=False)
class LocalityResult(StoredResult):
    """Locality of a denoiser's attention by noise level, layer and head. Arrays are float64 [levels, layers, heads]."""

    about: Provenance
    config: AttentionConfig
    levels: tuple[float, ...]
    """Noise levels sigma, ascending."""
    timesteps: tuple[int, ...] | None
    """The denoiser's own steps with these levels, or None where it has no numbered ones."""
    layers: tuple[int, ...]
    """Which layers, from 1."""
    depth: int
    """How many attention layers the network has."""
    heads: int
    grid: Grid
    """(rows, columns) of tokens."""
    patch: float
    """Pixels along a token's side."""
    patterns: tuple[Pattern, ...]
    """One a measured layer."""
    images: int
    """Number of images measured."""
    distance: np.ndarray
    """Mean attention distance, in tokens."""
    entropy: np.ndarray
    """Of a row, in nats."""
    normalized_entropy: np.ndarray
    """Of a row, over the log of the number of keys that its query may see; in [0, 1]."""
    position_invariance: np.ndarray
    """Mean cosine between rows of different queries, in [0, 1]: 1 where all queries see the same keys."""
    consistency: np.ndarray
    """Mean cosine between the maps of different images, in [0, 1]."""
    consistency_control: np.ndarray
    """The same with the rows of one map in each pair permuted."""
    mass: Mapping[int, np.ndarray]
    """Chebyshev radius -> share of attention within it, in [0, 1]."""
    extra: int = 0
    """Off-grid tokens of the network; they are left out, and rows renormalized over the grid."""
    by_image: Mapping[str, np.ndarray] | None = None
    """Distance, entropy and position invariance of each image, float32 [images, levels, layers, heads]; None if
    there is only the JSON."""

    older_uniform: tuple[float, tuple[float, ...]] | None = None
    """Mean distances of uniform attention over the grid and within each layer's pattern, of a result whose distances
    were measured under an older definition, the larger of rows and columns; else None."""

    kind = "attention-locality"
    file = "attention"

    @property
    def outdated(self) -> bool:
        return self.older_uniform is not None

    @property
    def uniform_distance(self) -> float:
        """The mean distance of uniform attention over the grid, in tokens, as the result defines distance."""
        return uniform_distance(self.grid) if self.older_uniform is None else self.older_uniform[0]

    @property
    def pattern_distance(self) -> np.ndarray:
        """The mean distance of uniform attention within each layer's pattern, in tokens, float64 [layers]."""
        if self.older_uniform is not None:
            return np.array(self.older_uniform[1])
        return np.array([pattern_distance(pattern, self.grid) for pattern in self.patterns])

    def uniform_mass(self) -> np.ndarray:
        """Returns the mass of uniform attention over the grid, at the measured radii ascending, float64 [radii]."""
        return masses_within(pattern_weights(Global(), self.grid), self.grid, sorted(self.mass)).numpy()

    def pattern_mass(self, radius: int) -> np.ndarray:
        """Returns the mass within a radius of uniform attention within each layer's pattern, float64 [layers]."""
        return np.array([_mass_of_pattern(pattern, self.grid, radius) for pattern in self.patterns])

    def values(self, what: str | int) -> np.ndarray:
        """Returns a quantity by name, or the mass within a radius, float64 [levels, layers, heads].

        Raises:
            DitlabError: an unknown quantity, or a radius that was not measured.
        """
        if isinstance(what, int):
            if what not in self.mass:
                raise DitlabError(f"attention mass: expected a radius of {sorted(self.mass)}, found {what}")
            return self.mass[what]
        if what not in QUANTITIES:
            raise unknown_name("attention quantity", what, QUANTITIES)
        return getattr(self, what)

    def by_layer(self, what: Quantity | int, level: int | None = None) -> np.ndarray:
        """Returns means over heads, and over levels unless the index of a level is given, float64 [layers]."""
        values = self.values(what)
        return values.mean(axis=(0, 2)) if level is None else values[level].mean(axis=-1)

    def average(self, what: Quantity | int, level: int | None = None) -> float:
        """Returns the mean over heads and layers, and over levels unless the index of a level is given."""
        return float(self.by_layer(what, level).mean())

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know about how this was measured, one sentence each."""
        notes = []
        if self.outdated:
            notes.append(f"{OLDER[0].upper()}{OLDER[1:]}. They are not comparable with distances of today.")
        if self.images < self.config.images:
            notes.append(f"Only {self.images} images exist where {self.config.images} were asked for.")
        if self.extra:
            notes.append(
                f"The network has {self.extra} tokens off the grid: they are left out, and the rest of each row is "
                "rescaled to the sum 1."
            )
        return tuple(notes)

    def sentences(self) -> tuple[str, ...]:
        """Returns what was measured, one sentence each."""
        by_layer, average = self.by_layer("distance"), self.average
        near, far = int(by_layer.argmin()), int(by_layer.argmax())
        over = f"{len(self.layers)} layers, {self.heads} heads, {len(self.levels)} levels and {self.images} images"
        uniform, allowed = self.uniform_distance, self.pattern_distance.mean()
        lines = [
            f"mean attention distance {average('distance'):.2f} tokens, over {over}.",
            f"uniform attention would have {uniform:.2f} over the grid, {allowed:.2f} over what they may see.",
        ]
        if near != far:
            lines.append(
                f"layer {self.layers[near]} ({self.patterns[near].name}) looks nearest, {by_layer[near]:.2f} tokens, "
                f"layer {self.layers[far]} ({self.patterns[far].name}) farthest, {by_layer[far]:.2f}."
            )
        same, permuted = average("consistency"), average("consistency_control")
        lines += [
            f"{average(1):.0%} of attention stays within 3x3 tokens, {average(3):.0%} within 7x7.",
            f"maps of different images have a mean cosine of {same:.2f} (rows permuted: {permuted:.2f}).",
            f"rows of different queries have a mean cosine of {average('position_invariance'):.2f}.",
        ]
        return tuple(f"{self.about.title}: {line}" for line in lines)

    def numbers(self) -> dict[str, Any]:
        radii = sorted(self.mass)
        quantities: dict[str, Quantity | int] = {quantity_name(what): what for what in (*QUANTITIES, *radii)}
        facts = {name: getattr(self, name) for name in _FACTS}
        return {
            **{name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()},
            "patterns": [pattern_to_json(pattern) for pattern in self.patterns],
            "images": self.images,
            "extra": self.extra,
            "notes": list(self.notes),
            "uniform_distance": self.uniform_distance,
            "pattern_distance": self.pattern_distance.tolist(),
            "pattern_mass": {str(radius): self.pattern_mass(radius).tolist() for radius in radii},
            "averages": {name: self.average(what) for name, what in quantities.items()},
            "by_layer": {name: self.by_layer(what).tolist() for name, what in quantities.items()},
            "values": {name: self.values(what).tolist() for name, what in quantities.items()},
        }

    def arrays(self) -> Mapping[str, np.ndarray]:
        return self.by_image or {}

    @classmethod
    def read(cls, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> LocalityResult:
        values = {name: np.asarray(v, dtype=np.float64) for name, v in record["values"].items()}
        shape = (len(record["levels"]), len(record["layers"]), record["heads"])
        for name, array in values.items():
            if array.shape != shape:
                raise Damaged(f"attention result: expected {name} of shape {shape}, found {array.shape}")
        facts: dict[str, Any] = {name: tuples(record[name]) for name in (*_FACTS, "images", "extra")}
        facts |= {name: values[name] for name in QUANTITIES}
        stored, today = record["uniform_distance"], uniform_distance(facts["grid"])
        older = None if abs(stored - today) < 1e-6 * today else (stored, tuples(record["pattern_distance"]))
        return cls(
            about=Provenance(**record["about"]),
            config=config_from_json(AttentionConfig, record["config"]),
            **facts,
            patterns=tuple(pattern_from_json(p) for p in record["patterns"]),
            mass={int(n.removeprefix("mass ")): v for n, v in values.items() if n.startswith("mass ")},
            by_image={name: arrays[name] for name in BY_IMAGE} if arrays else None,
            older_uniform=older,
        )


def quantity_name(what: Quantity | int) -> str:
    """Returns what files call a quantity, or the mass within a radius."""
    return f"mass {what}" if isinstance(what, int) else what


def pattern_to_json(pattern: Pattern) -> dict[str, Any]:
    """Returns a pattern as JSON values: its kind, and its size and border where it has them."""
    return {"kind": type(pattern).__name__.lower(), **asdict(pattern)}


def pattern_from_json(record: Mapping[str, Any]) -> Pattern:
    """Returns the pattern of what `pattern_to_json` gave. Raises DitlabError for an unknown kind."""
    kinds = {"global": Global, "window": Window, "partition": Partition}
    if record["kind"] not in kinds:
        raise unknown_name("attention pattern", str(record["kind"]), kinds)
    return kinds[record["kind"]](**{name: value for name, value in record.items() if name != "kind"})
