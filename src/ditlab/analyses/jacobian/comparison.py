"""Compares the Jacobians of several models: means over images and seeds, distances of spectra, sentences.

A number of a Jacobian means little without its noise level, so levels are never averaged. Eigenvectors say little about
a network that is not locally linear, so r_hom and r_lin are reported with them. The first version of An et al.
concluded from such vectors that a DiT has no harmonic basis; the later abstract says that this analysis cannot show the
bias of networks with nonlinear operations. Our sentences follow the later, weaker claim.

Sources: An et al. 2410.21273 and its NeurIPS 2025 abstract; Kadkhodaie et al., ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ditlab.analyses.groups import GroupedResults, SeedGroup, grouped
from ditlab.analyses.jacobian.measure import noise_level
from ditlab.analyses.jacobian.measures import LEADING, spectral_distance
from ditlab.analyses.jacobian.result import SHARES, JacobianPoint, JacobianResult
from ditlab.errors import Incompatible, InvalidConfig

FAR_FROM_HOMOGENEOUS = 0.1
"""From this r_hom on the sentences say that the vectors do not describe the computation. A bias-free network has 1e-6;
no source gives a threshold."""

CAUTION = (
    "If r_hom is large, the output is not J times the input. The vectors then do not describe the computation, and "
    "they cannot show whether the network has a harmonic basis."
)
"""The authors' later, weaker claim, in our words."""

_SIDES = {"test": "held-out image", "train": "training image", "files": "picture"}
"""Where images come from in results -> what a title calls them."""


class JacobianGroup(SeedGroup):
    """Results that differ only in their seed; levels are never averaged."""

    def points(self, level: int) -> list[JacobianPoint]:
        """Returns the points of all seeds and images at the noise level in this place, seed after seed."""
        return [point for result in self.results for point in at_level(result, level)]

    def numbers(self, what: str, level: int) -> list[float]:
        """Returns the mean of a number (`measure_value`) over the images of each seed that has it for all images."""
        means = []
        for result in self.results:
            values = [measure_value(point, what) for point in at_level(result, level)]
            known = [value for value in values if value is not None]
            if len(known) == len(values):
                means.append(float(np.mean(known)))
        return means

    def mean(self, what: str, level: int) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the mean over seeds and images; None if it was not measured."""
        means = self.numbers(what, level)
        return float(np.mean(means)) if means else None

    def std(self, what: str, level: int) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the standard deviation over seeds (n - 1) of the means over images; None with one seed."""
        means = self.numbers(what, level)
        return float(np.std(means, ddof=1)) if len(means) > 1 else None


def at_level(result: JacobianResult, level: int) -> list[JacobianPoint]:
    """Returns the points of all images at the noise level in this place."""
    return list(result.points[level :: len(levels_of(result))])


def levels_of(result: JacobianResult) -> tuple[float, ...]:
    """Returns the noise levels, ascending."""
    return tuple(sorted({point.sigma for point in result.points}))


DERIVED = (
    *(f"{kind} {share:g}" for kind in ("locality", "Wiener locality") for share in SHARES),
    *("leading frequency", "leading participation", "leading edges"),
    *("best image", "best nearest", "best others"),
)
"""Numbers that follow from other parts of a point than `JacobianPoint.numbers`; see `measure_value`."""
BEST_OF = 8
"""The number of leading vectors among which the most similar one to a training image is searched."""


def measure_value(point: JacobianPoint, what: str) -> float | None:
    """Returns a number of a point; None if it was not measured.

    `what` is one of `JacobianPoint.numbers`; "locality 0.5" or "Wiener locality 0.5" (pixels), for each share; "leading
    edges" and the like, the mean of that measure over the leading vectors; "best nearest", the largest |correlation| of
    the leading vectors with the nearest other training image; "best others", the mean |correlation| of that vector with
    further training images, its control; "best image", the largest one with the clean image itself.
    """
    kind, _, which = what.rpartition(" ")
    if kind in ("locality", "Wiener locality"):
        sensitivity = point.sensitivity if kind == "locality" else point.wiener
        return None if sensitivity is None else sensitivity.locality[SHARES.index(float(which))]
    if kind == "leading":
        measured = point.by_vector.get(which)
        return None if measured is None else float(measured[:LEADING].mean())
    if kind == "best":
        nearest, values = point.by_vector.get("nearest_correlation"), point.by_vector.get(f"{which}_correlation")
        if values is None or (which == "others" and nearest is None):
            return None
        # The control is measured on the same vector.
        place = nearest if which == "others" and nearest is not None else values
        return float(values[place[:BEST_OF].argmax()])
    value = point.numbers.get(what)
    return None if value is None else float(value)


@dataclass(frozen=True)
class SpectraApart:
    """The distance of the normalized spectra of two groups at one noise level."""

    first: str
    second: str
    sigma: float
    distance: float
    """Mean over seeds and images of `spectral_distance`, in [0, 1]."""


@dataclass(frozen=True, eq=False)
class JacobianComparison(GroupedResults):
    """Groups of models that were measured with the same settings."""

    groups: tuple[JacobianGroup, ...]

    @property
    def results(self) -> list[JacobianResult]:
        """All results, group after group."""
        return [result for group in self.groups for result in group.results]

    @property
    def levels(self) -> tuple[float, ...]:
        """The noise levels, ascending."""
        return levels_of(self.first)

    @property
    def dimension(self) -> int:
        """D, the number of values of an image."""
        return self.first.points[0].clean.size

    @property
    def vectors(self) -> int:
        """The number of vectors that were computed: D, or the leading ones."""
        return max(len(point.values) for result in self.results for point in result.points)

    def spectra_apart(self) -> tuple[SpectraApart, ...]:
        """Returns the distance of the normalized spectra of each two groups that share a seed, at each level."""
        distances = []
        for level, sigma in enumerate(self.levels):
            for first, second in combinations(self.groups, 2):
                others = {result.about.seed: at_level(result, level) for result in second.results}
                by_image = [
                    spectral_distance(a.values, b.values)
                    for result in first.results
                    if result.about.seed in others
                    for a, b in zip(at_level(result, level), others[result.about.seed], strict=True)
                ]
                if by_image:
                    distances.append(SpectraApart(first.name, second.name, sigma, float(np.mean(by_image))))
        return tuple(distances)

    @property
    def title(self) -> str:
        """The target, the dimension and the images of the numbers."""
        config, about = self.first.config, self.first.about.settings
        side = _SIDES[about.get("images_from", "test")]
        count = len(config.images)
        images = f"{side} {config.images[0]}" if count == 1 else f"{count} {side}s"
        pixels = " with shuffled pixels" if about.get("shuffled") else ""
        return f"Jacobian of {config.target}, {self.dimension} dimensions, {images}{pixels}"

    def sentences(self) -> tuple[str, ...]:
        """Returns sentences on each group and level, then the distances of spectra, then the caution."""
        levels = range(len(self.levels))
        lines = [line for group in self.groups for level in levels for line in _sentences(self, group, level)]
        return (*lines, *self.between(), CAUTION)

    def between(self) -> tuple[str, ...]:
        """Returns a sentence on the distance of the spectra of each two groups at each level."""
        return tuple(
            f"{apart.first} and {apart.second}, σ = {apart.sigma:.3g}: the distance of their normalized spectra is "
            f"{apart.distance:.2f} (0: equal up to a factor, 1: nothing in common)."
            for apart in self.spectra_apart()
        )

    def gaps(self) -> tuple[str, ...]:
        """Returns a sentence on what r_hom and r_lin of each group and level allow."""
        return tuple(
            f"{group.name}, σ = {sigma:.3g}: {gap_sentence(group.mean('r_hom', level), group.mean('r_lin', level))}"
            for group in self.groups
            for level, sigma in enumerate(self.levels)
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the numbers of every group and level (the results have their own files)."""
        config = self.first.config
        return {
            "kind": "jacobian-comparison",
            "version": 1,
            "target": config.target,
            "decomposition": config.decomposition,
            "top": config.top,
            "images": list(config.images),
            "images_from": self.first.about.settings.get("images_from", "test"),
            "shuffled": bool(self.first.about.settings.get("shuffled", False)),
            "dimension": self.dimension,
            "levels": list(self.levels),
            "groups": [
                {
                    "label": group.label,
                    "n": group.n,
                    "runs": [result.about.name for result in group.results],
                    "by_level": [
                        {
                            "sigma": sigma,
                            "mean": {what: group.mean(what, level) for what in self.measured},
                            "std": {what: group.std(what, level) for what in self.measured},
                            "largest_residual": max(float(p.residuals.max()) for p in group.points(level)),
                        }
                        for level, sigma in enumerate(self.levels)
                    ],
                }
                for group in self.groups
            ],
            "spectra_apart": [asdict(apart) for apart in self.spectra_apart()],
            "sentences": list(self.sentences()),
        }

    @property
    def measured(self) -> tuple[str, ...]:
        """The names of all numbers (`measure_value`) that some point has a value of."""
        points = [point for result in self.results for point in result.points]
        names = (*dict.fromkeys(name for point in points for name in point.numbers), *DERIVED)
        return tuple(name for name in names if any(measure_value(point, name) is not None for point in points))


def _sentences(comparison: JacobianComparison, group: JacobianGroup, level: int) -> list[str]:
    """Returns the sentences on one group at one noise level, each of numbers that were measured."""
    target, vectors = comparison.first.config.target, comparison.vectors

    def values(*names: str) -> list[Any]:
        return [group.mean(name, level) for name in names]

    lines = []
    sizes = values("trace", "sum_of_squares", "participation_ratio")
    if None not in sizes:
        trace, squares, ratio = sizes
        what = "effective dimensionality of the denoised image" if target == "x0" else "size of the Jacobian"
        lines.append(
            f"{what}: trace {trace:.4g}, sum of squares {squares:.4g}, participation ratio {ratio:.4g}, of "
            f"{comparison.dimension} dimensions."
        )
    harmonic, shuffled, leading = values("harmonicity", "harmonicity_shuffled", "harmonicity_leading")
    if None not in (harmonic, shuffled):
        many = leading is not None and vectors > LEADING
        first = f", {leading:.2f} among the first {LEADING}" if many else ""
        lines.append(
            f"the rank correlation of the vectors' frequency with their index is {harmonic:.2f}{first} (control with "
            f"shuffled pixels: {shuffled:.2f})."
        )
    spread, edges = values("leading participation", "leading edges")
    if None not in (spread, edges):
        lines.append(
            f"the {min(LEADING, vectors)} leading vectors cover {spread:.0%} of the pixels on average, with "
            f"{edges:.2f} times as much energy on edges of the image as an even spread has."
        )
    asymmetry, aligned = values("asymmetry", "alignment_weighted")
    if asymmetry is not None:
        pairs = "" if aligned is None else f"; left and right singular vectors: |u.v| {aligned:.2f}, weighted by s²"
        lines.append(f"asymmetry |J - Jᵀ| / |J| {asymmetry:.2f}{pairs}.")
    half, most, wiener = values("locality 0.5", "locality 0.95", "Wiener locality 0.5")
    if None not in (half, most):
        beside = "" if wiener is None else f" (Wiener denoiser of its training images: {wiener:.1f})"
        lines.append(
            f"a square with a side of {half:.1f} pixels holds half of what an output pixel depends on{beside}, a "
            f"square of {most:.1f} pixels 95 %."
        )
    nearest, others, image = values("best nearest", "best others", "best image")
    if None not in (nearest, image) and target == "x0":
        control = "" if others is None else f" (mean of that vector with further training images: {others:.2f})"
        lines.append(
            f"the largest |correlation| of the {min(BEST_OF, vectors)} leading vectors is {nearest:.2f} with the "
            f"nearest other training image{control} and {image:.2f} with the image itself."
        )
    lines.append(gap_sentence(*values("r_hom", "r_lin")))
    return [f"{group.name}, σ = {comparison.levels[level]:.3g}: {line}" for line in lines]


def gap_sentence(r_hom: float | None, r_lin: float | None) -> str:
    """Returns what r_hom and r_lin allow to conclude from the vectors."""
    if r_hom is None:
        return "r_hom is undefined because the output is zero."
    numbers = f"r_hom {r_hom:.2g}" + ("" if r_lin is None else f", r_lin {r_lin:.2g}")
    if r_hom < FAR_FROM_HOMOGENEOUS:
        return f"{numbers}: the output is nearly J times the input, so the vectors describe the computation here."
    return f"{numbers}: the output is not J times the input, so the vectors do not describe the computation here."


def compare_jacobians(results: Sequence[JacobianResult]) -> JacobianComparison:
    """Groups results by label and N, over seeds, after checking that they can be compared.

    Raises:
        DitlabError: no result; different settings, images, levels or noise; models of different splits; two results of
            one label, N and seed.
    """
    if not results:
        raise InvalidConfig("jacobian: expected at least one result to compare, found none")
    for other in results[1:]:
        if (difference := differs(results[0], other)) is not None:
            names = f"'{results[0].about.name}' and '{other.about.name}'"
            raise Incompatible(f"jacobian: {names} were measured with different {difference}")
    return JacobianComparison(grouped(results, JacobianGroup, "jacobian"))


def same_noise(first: Sequence[float], second: Sequence[float]) -> bool:
    """Returns whether noise levels are the same, so that an image gets the same noise at each."""
    return _drawn(first) == _drawn(second)


def comparison_key(result: JacobianResult) -> dict[str, Any]:
    """Returns what results must share to be compared, by the words of an error; the values are hashable."""
    settings = ("target", "decomposition", "top", "images", "noise_seed", "step_size")
    about = result.about.settings
    images = [about.get("images_from", "test"), *(sha256[:8] for sha256 in about.get("pictures", ()))]
    return {
        **{name: getattr(result.config, name) for name in settings},
        "image sizes": result.points[0].clean.shape,
        "noise levels": _drawn(levels_of(result)),
        "sides or pictures": " ".join([*images, *(["shuffled"] if about.get("shuffled") else [])]),
    }


def differs(first: JacobianResult, second: JacobianResult) -> str | None:
    """Returns the first difference that forbids a comparison of two results, with both values; None without any."""
    keys = [comparison_key(result) for result in (first, second)]
    for name in keys[0]:
        if keys[0][name] != keys[1][name]:
            texts = (", ".join(key[name]) if name == "noise levels" else str(key[name]) for key in keys)
            return f"{name} ({' and '.join(texts)})"
    return None


def _drawn(levels: Sequence[float]) -> tuple[str, ...]:
    """Returns the levels whose noise is drawn."""
    return tuple(f"{noise_level(sigma):.6g}" for sigma in levels)
