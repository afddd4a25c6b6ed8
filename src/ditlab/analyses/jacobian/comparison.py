"""Jacobians of several runs side by side: means over images and seeds by noise level, distances between spectra, words.

A number of a Jacobian means little without its noise level, so levels are never averaged. What eigenvectors can say of
a network that is not locally linear is limited, so r_hom and r_lin stand beside every sentence about them: An et al.'s
first version read from such vectors that a DiT lacks a harmonic basis; the later abstract says that for networks with
nonlinear operations this analysis cannot show the bias. The weaker of the two is what is said here.

Sources: An et al. 2410.21273 and its NeurIPS 2025 abstract; Kadkhodaie et al., ICLR 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ditlab.analyses.attention.comparison import same_levels
from ditlab.analyses.jacobian.measure import noise_level
from ditlab.analyses.jacobian.measures import LEADING, spectral_distance
from ditlab.analyses.jacobian.result import SHARES, JacobianPoint, JacobianResult
from ditlab.errors import DitlabError
from ditlab.provenance import check_groups

FAR_FROM_HOMOGENEOUS = 0.1
"""r_hom from which on the sentences say that the vectors do not describe the computation. A bias-free network has 1e-6;
no source draws a line."""

CAUTION = (
    "Where r_hom is large the eigenvectors do not describe the computation: the output is then not J times the input, "
    "and whether the network has a harmonic basis cannot be read from them."
)
"""The authors' later, weaker wording, in our words."""

_SIDES = {"test": "held-out", "train": "training", "files": "given"}
"""Where images come from, as results keep it -> what a title says."""


@dataclass(frozen=True, eq=False)
class JacobianGroup:
    """Results that differ only in their seed: one kind of run at one N."""

    label: str
    n: int | None
    results: tuple[JacobianResult, ...]
    """One per seed, in ascending order of the seeds."""

    @property
    def name(self) -> str:
        """Label and N."""
        return self.label if self.n is None else f"{self.label}, N = {self.n}"

    def points(self, level: int) -> list[JacobianPoint]:
        """Those of all seeds and images at the noise level in this place, seed after seed."""
        return [point for result in self.results for point in at_level(result, level)]

    def numbers(self, what: str, level: int) -> list[float]:
        """A number (`number`) of every seed, as means over its images; of seeds that have it for all images."""
        found = []
        for result in self.results:
            values = [number(point, what) for point in at_level(result, level)]
            known = [value for value in values if value is not None]
            if len(known) == len(values):
                found.append(float(np.mean(known)))
        return found

    def mean(self, what: str, level: int) -> float | None:
        """Mean over seeds and images; None where it was not measured."""
        found = self.numbers(what, level)
        return float(np.mean(found)) if found else None

    def std(self, what: str, level: int) -> float | None:
        """Standard deviation over seeds (n - 1) of the means over images; None with fewer than two."""
        found = self.numbers(what, level)
        return float(np.std(found, ddof=1)) if len(found) > 1 else None


def at_level(result: JacobianResult, level: int) -> list[JacobianPoint]:
    """The points of all images at the noise level in this place."""
    return list(result.points[level :: len(levels_of(result))])


def levels_of(result: JacobianResult) -> tuple[float, ...]:
    """Its noise levels, ascending."""
    return tuple(sorted({point.sigma for point in result.points}))


DERIVED = (
    *(f"{kind} {share:g}" for kind in ("locality", "Wiener locality") for share in SHARES),
    *("leading frequency", "leading participation", "leading edges"),
    *("best image", "best nearest", "best others"),
)
"""Numbers that are made of other parts of a point than `JacobianPoint.numbers`; see `number`."""
BEST_OF = 8
"""Among so many leading vectors the one is sought that is most like a training image."""


def number(point: JacobianPoint, what: str) -> float | None:
    """A number of a point; None where it was not measured.

    Args:
        point: the Jacobian.
        what: one of `JacobianPoint.numbers`; "locality 0.5" or "Wiener locality 0.5" (pixels), for each share;
            "leading edges" and the like, the mean of that measure over the leading vectors; "best nearest", the largest
            |correlation| of the leading vectors with the nearest other training image; "best others", the mean
            |correlation| of that vector with further training images, its control; "best image", the largest one with
            the clean image itself.
    """
    kind, _, which = what.rpartition(" ")
    if kind in ("locality", "Wiener locality"):
        found = point.sensitivity if kind == "locality" else point.wiener
        return None if found is None else found.locality[SHARES.index(float(which))]
    if kind == "leading":
        measured = point.by_vector.get(which)
        return None if measured is None else float(measured[:LEADING].mean())
    if kind == "best":
        nearest, values = point.by_vector.get("nearest_correlation"), point.by_vector.get(f"{which}_correlation")
        if values is None or (which == "others" and nearest is None):
            return None
        # The control is of the same vector, so that like stands beside like.
        place = nearest if which == "others" and nearest is not None else values
        return float(values[place[:BEST_OF].argmax()])
    value = point.numbers.get(what)
    return None if value is None else float(value)


Column = tuple[str, str, str]
"""Heading, number, format."""
MATRIX: tuple[Column, ...] = (
    ("trace", "trace", ".4g"),
    ("squares", "sum_of_squares", ".4g"),
    ("ratio", "participation_ratio", ".4g"),
    ("asymmetry", "asymmetry", ".2f"),
    ("50 %", "locality 0.5", ".1f"),
    ("95 %", "locality 0.95", ".1f"),
    ("Wiener 50 %", "Wiener locality 0.5", ".1f"),
)
VECTORS: tuple[Column, ...] = (
    ("harmonic", "harmonicity", ".2f"),
    (f"first {LEADING}", "harmonicity_leading", ".2f"),
    ("shuffled", "harmonicity_shuffled", ".2f"),
    ("spread", "leading participation", ".2f"),
    ("edges", "leading edges", ".2f"),
    ("|u.v|", "alignment_weighted", ".2f"),
    ("nearest", "best nearest", ".2f"),
    ("others", "best others", ".2f"),
    ("r_hom", "r_hom", ".2g"),
    ("r_lin", "r_lin", ".2g"),
)
"""Columns of the tables. r_hom and r_lin stand beside what is said of the vectors, always."""
LEGEND = (
    "squares: sum of squared singular values; ratio: participation ratio of the values; 50 %, 95 %: side in pixels of "
    "the square that holds so much of what a pixel depends on; harmonic: rank correlation of a vector's frequency with "
    "its index; shuffled: its control, with the vectors' pixels shuffled; spread: share of the pixels that the "
    f"{LEADING} leading vectors live on; edges: their energy on edges, over that of an even spread; |u.v|: of left and "
    f"right singular vectors, weighted by s²; nearest: largest |correlation| of the {BEST_OF} leading vectors with the "
    "nearest other training image; others: that vector's with further ones; r_hom = |f - J x| / |f|; r_lin = |f(x + d) "
    "- f(x) - J d| / |f(x + d) - f(x)| for a random step d"
)


@dataclass(frozen=True)
class SpectraApart:
    """How far the normalized spectra of two groups lie apart at one noise level."""

    first: str
    second: str
    sigma: float
    distance: float
    """Mean over seeds and images of `spectral_distance`, in [0, 1]."""


@dataclass(frozen=True, eq=False)
class JacobianComparison:
    """Groups in the order in which their labels were first given, N ascending within a label."""

    groups: tuple[JacobianGroup, ...]

    @property
    def first(self) -> JacobianResult:
        """One result, for what all have in common: settings, image size."""
        return self.groups[0].results[0]

    @property
    def levels(self) -> tuple[float, ...]:
        """The noise levels, ascending."""
        return levels_of(self.first)

    @property
    def results(self) -> list[JacobianResult]:
        """All results, group after group."""
        return [result for group in self.groups for result in group.results]

    @property
    def dimension(self) -> int:
        """D, the number of values of an image."""
        return self.first.points[0].clean.size

    def spectra_apart(self) -> tuple[SpectraApart, ...]:
        """For each level and each two groups that share a seed, the distance of their normalized spectra."""
        found = []
        for level, sigma in enumerate(self.levels):
            for one, two in combinations(self.groups, 2):
                others = {result.about.seed: result for result in two.results}
                apart = [
                    spectral_distance(a.values, b.values)
                    for result in one.results
                    if result.about.seed in others
                    for a, b in zip(at_level(result, level), at_level(others[result.about.seed], level), strict=True)
                ]
                if apart:
                    found.append(SpectraApart(one.name, two.name, sigma, float(np.mean(apart))))
        return tuple(found)

    def table(self, columns: Sequence[Column]) -> tuple[list[str], list[list[str]]]:
        """Headings, and a row of texts for each kind of run, N and level; numbers that no run has are left out, but for
        r_hom and r_lin."""
        columns = [column for column in columns if column[1] in (*self.measured, "r_hom", "r_lin")]
        rows = []
        for group in self.groups:
            for level, sigma in enumerate(self.levels):
                found = [(group.mean(what, level), form) for _, what, form in columns]
                cells = ["–" if value is None else format(value, form) for value, form in found]
                rows.append([group.label, "–" if group.n is None else str(group.n), f"{sigma:.3g}", *cells])
        return ["run", "N", "σ", *(heading for heading, _, _ in columns)], rows

    @property
    def title(self) -> str:
        """What the numbers are of."""
        config, about = self.first.config, self.first.about.settings
        side = _SIDES[about.get("images_from", "test")]
        count = len(config.images)
        images = f"{side} image {config.images[0]}" if count == 1 else f"{count} {side} images"
        pixels = " with shuffled pixels" if about.get("shuffled") else ""
        return f"Jacobian of {config.target}, {self.dimension} dimensions, {images}{pixels}"

    def sentences(self) -> tuple[str, ...]:
        """What was measured, in plain words: some sentences a group and level, then the distances, then the caution."""
        lines = []
        for group in self.groups:
            for level in range(len(self.levels)):
                lines += _sentences(self, group, level)
        return (*lines, *self.between(), CAUTION)

    def between(self) -> tuple[str, ...]:
        """How far the spectra of each two groups lie apart, in words."""
        return tuple(
            f"{apart.first} and {apart.second}, σ = {apart.sigma:.3g}: their normalized spectra lie "
            f"{apart.distance:.2f} apart (0: alike up to a factor, 1: nothing in common)."
            for apart in self.spectra_apart()
        )

    def gaps(self) -> tuple[str, ...]:
        """What r_hom and r_lin of each group and level let its vectors say."""
        return tuple(
            f"{group.name}, σ = {sigma:.3g}: {gap_sentence(group.mean('r_hom', level), group.mean('r_lin', level))}"
            for group in self.groups
            for level, sigma in enumerate(self.levels)
        )

    def to_json(self) -> dict[str, Any]:
        """The numbers of every group and level (the results have their own files)."""
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
        """The names of all numbers (`number`) that some point has a value of."""
        points = [point for result in self.results for point in result.points]
        names = (*dict.fromkeys(name for point in points for name in point.numbers), *DERIVED)
        return tuple(name for name in names if any(number(point, name) is not None for point in points))


def _sentences(comparison: JacobianComparison, group: JacobianGroup, level: int) -> list[str]:
    """Of one group at one noise level."""
    config = comparison.first.config
    name = f"{group.name}, σ = {comparison.levels[level]:.3g}"

    def value(what: str) -> float | None:
        return group.mean(what, level)

    lines, points = [], group.points(level)
    few = max(len(point.values) for point in points)
    trace, squares, ratio = (value(what) for what in ("trace", "sum_of_squares", "participation_ratio"))
    if trace is not None and squares is not None and ratio is not None:
        sizes = f"trace {trace:.4g}, sum of squares {squares:.4g}, participation ratio {ratio:.4g}"
        what = "effective dimensionalities of the denoised image" if config.target == "x0" else "size of the Jacobian"
        lines.append(f"{name}: {what}: {sizes}, of {comparison.dimension} dimensions.")
    harmonic, shuffled, leading = (
        value(what) for what in ("harmonicity", "harmonicity_shuffled", "harmonicity_leading")
    )
    if harmonic is not None and shuffled is not None:
        alone = "" if leading is None or few <= LEADING else f", {leading:.2f} among the {LEADING} leading ones"
        lines.append(
            f"{name}: the frequency of a vector and its index have a rank correlation of {harmonic:.2f} (pixels "
            f"shuffled: {shuffled:.2f}){alone}."
        )
    spread, edges = value("leading participation"), value("leading edges")
    if spread is not None and edges is not None:
        lines.append(
            f"{name}: the leading vectors live on {spread:.0%} of the pixels, and {edges:.2f} times as much of their "
            "energy on edges of the image as if it were spread evenly."
        )
    asymmetry, aligned = value("asymmetry"), value("alignment_weighted")
    if asymmetry is not None:
        pairs = "" if aligned is None else f"; left and right singular vectors: |u.v| {aligned:.2f}, weighted by s²"
        lines.append(f"{name}: asymmetry |J - Jᵀ| / |J| {asymmetry:.2f}{pairs}.")
    half, most, wiener = value("locality 0.5"), value("locality 0.95"), value("Wiener locality 0.5")
    if half is not None and most is not None:
        beside = "" if wiener is None else f" (Wiener denoiser of its training images: {wiener:.1f} pixels)"
        lines.append(
            f"{name}: half of what a pixel depends on lies in a square of {half:.1f} pixels{beside}, 95 % in one of "
            f"{most:.1f}."
        )
    nearest, others, image = (value(f"best {which}") for which in ("nearest", "others", "image"))
    if nearest is not None and image is not None and config.target == "x0":
        control = "" if others is None else f"; with further ones: {others:.2f}"
        lines.append(
            f"{name}: of the {BEST_OF} leading vectors the best has a correlation of {nearest:.2f} with the nearest "
            f"other training image{control}; with the image itself {image:.2f}."
        )
    lines.append(f"{name}: {gap_sentence(value('r_hom'), value('r_lin'))}")
    return lines


def gap_sentence(r_hom: float | None, r_lin: float | None) -> str:
    """What r_hom and r_lin let the vectors say."""
    if r_hom is None:
        return "r_hom is not known, for the output is zero."
    numbers = f"r_hom {r_hom:.2g}" + ("" if r_lin is None else f", r_lin {r_lin:.2g}")
    if r_hom < FAR_FROM_HOMOGENEOUS:
        return f"{numbers}: the output is nearly J times the input, so the vectors describe the computation here."
    return f"{numbers}: the output is not J times the input, so the vectors do not describe the computation here."


def compare_jacobians(results: Sequence[JacobianResult]) -> JacobianComparison:
    """Groups results by label and N, over seeds, after checking that they may stand side by side.

    Raises:
        DitlabError: no result; other settings, images, levels or noise; runs of different splits; two results of one
            label, N and seed.
    """
    if not results:
        raise DitlabError("jacobian: expected at least one result to compare, found none")
    for other in results[1:]:
        if (difference := differs(results[0], other)) is not None:
            names = f"'{results[0].about.name}' and '{other.about.name}'"
            raise DitlabError(f"jacobian: {names} were measured with different {difference}")
    check_groups([result.about for result in results], "jacobian")
    groups: dict[tuple[str, int | None], dict[int, JacobianResult]] = {}
    for result in results:
        groups.setdefault((result.about.group, result.about.n), {})[result.about.seed] = result
    labels = list(dict.fromkeys(label for label, _ in groups))
    ordered = sorted(groups, key=lambda key: (labels.index(key[0]), -1 if key[1] is None else key[1]))
    return JacobianComparison(
        tuple(
            JacobianGroup(label, n, tuple(groups[label, n][seed] for seed in sorted(groups[label, n])))
            for label, n in ordered
        )
    )


def same_noise(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether noise levels are the same and an image is given the same noise at each (`jacobian.noise_level`)."""
    drawn = [[f"{noise_level(sigma):.6g}" for sigma in levels] for levels in (first, second)]
    return same_levels(first, second) and drawn[0] == drawn[1]


def differs(one: JacobianResult, two: JacobianResult) -> str | None:
    """What keeps two results from standing side by side, in words with both values; None where nothing does."""
    for name in ("target", "decomposition", "top", "images", "noise_seed", "step_size"):
        values = [getattr(result.config, name) for result in (one, two)]
        if values[0] != values[1]:
            return f"{name} ({values[0]} and {values[1]})"
    shapes = [result.points[0].clean.shape for result in (one, two)]
    if shapes[0] != shapes[1]:
        return f"image sizes ({shapes[0]} and {shapes[1]})"
    levels = [levels_of(result) for result in (one, two)]
    if not same_noise(*levels):
        words = (", ".join(f"{sigma:.6g}" for sigma in found) for found in levels)
        return f"noise levels ({' and '.join(words)})"
    images = [_images(result) for result in (one, two)]
    return None if images[0] == images[1] else f"images ({' and '.join(images)})"


def _images(result: JacobianResult) -> str:
    """Which images a result is of: the side, or the beginnings of the pictures' hashes."""
    about = result.about.settings
    words = [about.get("images_from", "test"), *(sha256[:8] for sha256 in about.get("pictures", ()))]
    return " ".join([*words, *(["shuffled"] if about.get("shuffled") else [])])
