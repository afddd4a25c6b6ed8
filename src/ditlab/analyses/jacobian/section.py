"""The Jacobian on a page: the tables of a comparison with a definition of each column, the figures, and the section.

r_hom and r_lin are in the same tables as the numbers of the vectors, with a sentence on what they allow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ditlab.analyses.jacobian.comparison import BEST_OF, CAUTION, JacobianComparison
from ditlab.analyses.jacobian.curves import TARGETS, by_vector_curves, shrinkage_and_image, spectra
from ditlab.analyses.jacobian.figures import Point, denoising_strip, sensitivity_maps, vector_gallery
from ditlab.analyses.jacobian.measures import LEADING
from ditlab.analyses.jacobian.result import JacobianPoint
from ditlab.pages.drawing import Drawing
from ditlab.pages.page import Section, Table, ThemedFigure
from ditlab.pages.theme import LIGHT, RUN_DASHES, Slots, assign

__all__ = ["MEASURES", "definitions", "jacobian_drawings", "jacobian_section", "jacobian_tables"]


class Column(NamedTuple):
    """One number of each row."""

    heading: str
    value: str
    """Its name, see `comparison.measure_value`."""
    form: str
    """How it is formatted."""
    meaning: str
    """Its definition; {leading} and {best} are numbers of vectors."""


_R_LIN = "|f(x + d) - f(x) - J d| / |f(x + d) - f(x)|, the share of the change by a short step d that is not linear"
R_HOM_R_LIN = (
    Column("r_hom", "r_hom", ".2g", "|f - J x| / |f|, the share of the output f that is not J times the input x"),
    Column("r_lin", "r_lin", ".2g", _R_LIN),
)
_HALF = "side in pixels of the smallest centred square that holds half of what an output pixel depends on"
_MATRIX = (
    Column("trace", "trace", ".4g", "sum of the eigenvalues"),
    Column("squares", "sum_of_squares", ".4g", "sum of the squared singular values"),
    Column("ratio", "participation_ratio", ".4g", "(Σs)² / Σs² of the values s, how many of them count"),
    Column("asym.", "asymmetry", ".2f", "asymmetry |J - Jᵀ| / |J|, 0 for a symmetric matrix"),
    Column("50 %", "locality 0.5", ".1f", _HALF),
    Column("95 %", "locality 0.95", ".1f", "side in pixels of the square that holds 95 % of it"),
    Column("Wiener 50 %", "Wiener locality 0.5", ".1f", "the 50 % of the Wiener denoiser of the same training images"),
)
_FIRST = "the same correlation among the {leading} leading vectors"
_FREQUENCIES = (
    Column("harmonic", "harmonicity", ".2f", "rank correlation of the frequency of a vector with its index"),
    Column(f"first {LEADING}", "harmonicity_leading", ".2f", _FIRST),
    Column("shuffled", "harmonicity_shuffled", ".2f", "the same correlation with shuffled pixels, a control"),
    Column("|u.v|", "alignment_weighted", ".2f", "of paired left and right singular vectors, weighted by s²"),
)
_SPREAD = "mean share of pixels that the {leading} leading vectors cover"
_NEAREST = "largest |correlation| of one of the {best} leading vectors with the nearest other training image"
_IMAGES = (
    Column("spread", "leading participation", ".2f", _SPREAD),
    Column("edges", "leading edges", ".2f", "their energy on edges of the image, over that of an even spread"),
    Column("nearest", "best nearest", ".2f", _NEAREST),
    Column("others", "best others", ".2f", "mean |correlation| of that vector with further training images, a control"),
)
MEASURES = {
    "frequency": "mean radial frequency / Nyquist's",
    "participation": "share of the pixels covered",
    "edges": "energy on edges / their share",
    "alignment": "|u . v|",
    "image_correlation": "|correlation| with the image",
    "nearest_correlation": "with the nearest training image",
}
"""What is drawn of each vector against its index, in this order."""
_VECTORS = {
    "svd": "left singular vectors",
    "eigh": "eigenvectors of the symmetric part",
    "eig": "left eigenvectors",
    "eig-right": "right eigenvectors",
}
_TEXTS = {
    "vectors": "Left singular vectors (directions of the output)",
    "right": "Right singular vectors (directions of the input)",
    "eigh": "Eigenvectors of the symmetric part",
    "eig": "Left eigenvectors, w^T J = λ w^T (their real part, rotated to have the largest possible length)",
    "eig-right": "Right eigenvectors, J v = λ v (their real part, rotated to have the largest possible length)",
}


def jacobian_tables(comparison: JacobianComparison) -> list[Table]:
    """Returns the tables of the matrix (if it is known) and of its vectors; r_hom and r_lin are beside every vector."""
    topics: list[tuple[str, tuple[Column, ...]]] = []
    if "trace" in comparison.measured:
        topics.append((comparison.title, _MATRIX))
    head = "Its" if topics else f"{comparison.title}:"
    vectors = f"{head} {_VECTORS[comparison.first.config.decomposition]}"
    topics.append((f"{vectors}, their frequencies", (*_FREQUENCIES, *R_HOM_R_LIN)))
    topics.append((f"{vectors}, compared with images", (*_IMAGES, *R_HOM_R_LIN)))
    return [_table(comparison, caption, _shown(comparison, columns)) for caption, columns in topics]


def definitions(comparison: JacobianComparison) -> list[str]:
    """Returns the definition of each column of the tables, in their order."""
    matrix = _MATRIX if "trace" in comparison.measured else ()
    numbers = {"leading": min(LEADING, comparison.vectors), "best": min(BEST_OF, comparison.vectors)}
    return [
        f"{column.heading}: {column.meaning.format(**numbers)}"
        for column in _shown(comparison, (*matrix, *_FREQUENCIES, *_IMAGES, *R_HOM_R_LIN))
    ]


def _shown(comparison: JacobianComparison, columns: Sequence[Column]) -> list[Column]:
    """Returns the columns that some model has a number in; r_hom and r_lin always."""
    measured = set(comparison.measured)
    if comparison.vectors <= LEADING:
        measured.discard("harmonicity_leading")  # the same as `harmonicity`
    return [column for column in columns if column.value in measured or column in R_HOM_R_LIN]


def _table(comparison: JacobianComparison, caption: str, columns: Sequence[Column]) -> Table:
    rows = []
    for group in comparison.groups:
        for level, sigma in enumerate(comparison.levels):
            cells = [_text(group.mean(column.value, level), column.form) for column in columns]
            rows.append([group.label, group.n, f"{sigma:.3g}", *cells])
    return Table(["model", "N", "σ", *(column.heading for column in columns)], rows, caption)


def _text(value: float | None, form: str) -> str | None:
    """Returns a number as text; small ones of r_hom and r_lin with one digit, so that tables fit 80 columns."""
    if value is None:
        return None
    return format(value, ".0e" if form == ".2g" and 0 < abs(value) < 1e-3 else form)


def jacobian_drawings(
    comparison: JacobianComparison,
    decode: Callable[[Tensor], np.ndarray] | None = None,
    *,
    right: bool = False,
    hide_images: bool = False,
    slots: Slots | None = None,
) -> dict[str, Drawing]:
    """Returns file name -> figure of a comparison, which shows the first seed of each kind of model.

    Denoised images are drawn with `decode` (`Model.decode`), right singular vectors with `right`. `hide_images` leaves
    out all that shows a real image: the denoised images, and the vectors, which may draw one. With several N each
    (label, N) has a colour of its own.
    """
    shown = [(name, group.results[0]) for name, group in zip(_names(comparison), comparison.groups, strict=True)]
    if slots is None or not all(name in slots for name, _ in shown):
        slots = _slots(comparison)
    slots = {name: slots[name] for name, _ in shown}
    target, kind = comparison.first.config.target, comparison.first.config.decomposition
    words = " and ".join(name for name, _ in shown)
    all_points = [(name, _at_first_levels(point, comparison)) for name, result in shown for point in result.points]
    drawings: dict[str, Drawing] = {}
    if not hide_images and decode is not None:

        def pictures(images: np.ndarray) -> np.ndarray:
            return decode(torch.from_numpy(np.ascontiguousarray(images)))

        drawings["jacobian-denoised"] = Drawing(
            lambda theme: denoising_strip(all_points, pictures, theme=theme),
            f"A clean image, the same image with noise, and the estimates of {words}.",
            "Clean, noisy and denoised images, with PSNR in dB.",
            exact=True,
        )
    drawings["jacobian-spectra"] = Drawing(
        lambda theme: spectra(all_points, target, kind, slots=slots, theme=theme),
        f"Spectra of the Jacobians of {words} against the index, on linear and logarithmic axes.",
        f"Spectra of the Jacobian of the {TARGETS[target]}, largest values first; top: linear, bottom: logarithmic.",
    )
    sides = () if hide_images else ("vectors", "right") if right and kind == "svd" else ("vectors",)
    several_images, several_levels = len(comparison.first.config.images) > 1, len(comparison.levels) > 1
    for place, point in enumerate(comparison.first.points):
        sigma = comparison.levels[place % len(comparison.levels)]
        ending = (f"-image{point.image}" if several_images else "") + (f"-sigma{sigma:.3g}" if several_levels else "")
        where = f"σ = {sigma:.3g}" + (f", image {point.image}" if several_images else "")
        points = [(name, result.points[place]) for name, result in shown]
        of_point = _point_drawings(points, comparison, where, words, slots, sides)
        drawings |= {f"jacobian-{name}{ending}": drawing for name, drawing in of_point.items()}
    return drawings


def _point_drawings(
    points: Sequence[Point],
    comparison: JacobianComparison,
    where: str,
    words: str,
    slots: Slots,
    sides: Sequence[str],
) -> dict[str, Drawing]:
    """Returns the figures of one image and level, `where`: those sides of the vectors, and what shows no image."""
    target, kind = comparison.first.config.target, comparison.first.config.decomposition
    drawings = {}
    for side in sides:
        what = f"{_TEXTS[side if kind == 'svd' else kind]} of the Jacobian of the {TARGETS[target]}"
        drawings["vectors" if side == "vectors" else "right-vectors"] = Drawing(
            lambda theme, right=side == "right": vector_gallery(points, kind, right=right, theme=theme),
            f"{what} of {words}, drawn as images, at chosen indices.",
            f"{what}, {where}. k = 0 is the leading vector; white is zero, red positive; frames have the colour of the "
            "channel. r_hom and r_lin, defined above, are small if the vectors describe the computation.",
        )
    drawings["measures"] = Drawing(
        lambda theme: by_vector_curves(points, MEASURES, slots=slots, theme=theme),
        f"Measures of each vector of {words} against its index.",
        f"Measures of each vector against its index, {where}: dots are vectors, lines their running median.",
    )
    if any("clean_coefficient" in point.by_vector for _, point in points):
        drawings["shrinkage"] = Drawing(
            lambda theme: shrinkage_and_image(points, "clean_coefficient", target, theme=theme),
            f"The values of {words} and the clean image's coefficients in their vectors, against the index.",
            f"How much of each direction is kept, and how much of it the clean image has, {where}.",
        )
    if any(point.sensitivity is not None for _, point in points):
        drawings["sensitivity"] = Drawing(
            lambda theme: sensitivity_maps(points, theme=theme),
            f"Maps of the input pixels that output pixels of {words} depend on, and those of the Wiener denoiser.",
            f"Which input pixels an output pixel depends on, {where}: sums of |J| over channels, logarithmic colours.",
        )
    return drawings


def _names(comparison: JacobianComparison) -> list[str]:
    """Returns what figures call each group: its label, with N if there are several."""
    several = len({group.n for group in comparison.groups}) > 1
    return [group.name if several else group.label for group in comparison.groups]


def _slots(comparison: JacobianComparison) -> Slots:
    """Returns a colour for each group; if there are too few, a colour for each label and a line style for each N."""
    kinds = assign(group.label for group in comparison.groups)
    sizes = list(dict.fromkeys(group.n for group in comparison.groups))
    colours = len(LIGHT.runs)
    if len(comparison.groups) <= colours or len(kinds) > colours or len(sizes) > len(RUN_DASHES):
        return assign(_names(comparison))
    named = zip(_names(comparison), comparison.groups, strict=True)
    return {name: kinds[group.label] + colours * sizes.index(group.n) for name, group in named}


def _at_first_levels(point: JacobianPoint, comparison: JacobianComparison) -> JacobianPoint:
    """Returns the point at the first model's nearest level: steps of different processes differ by a little."""
    return replace(point, sigma=min(comparison.levels, key=lambda sigma: abs(sigma - point.sigma)))


def jacobian_section(
    comparison: JacobianComparison,
    pictures: Sequence[ThemedFigure] = (),
    *,
    number: int = 1,
    data: Mapping[str, Any] | None = None,
) -> Section:
    """Returns the section: what r_hom and r_lin are and allow, the tables with their definitions, the figures.

    `number` is its place among such sections of a page, `data` what to attach in addition to the comparison itself.
    """
    name = "jacobian" if number == 1 else f"jacobian-{number}"
    notes = dict.fromkeys(note for result in comparison.results for note in result.notes)
    gaps = ". ".join(f"{column.heading} is {column.meaning}" for column in R_HOM_R_LIN)
    sentences = [*comparison.gaps(), *comparison.between()]
    return Section(
        name,
        "Direction by direction: the Jacobian" + ("" if number == 1 else f" ({number})"),
        [f"{gaps}. {CAUTION}"],
        verdict=sentences[0] if sentences else "",
        points=sentences[1:],
        tables=jacobian_tables(comparison),
        notes=[f"Columns. {'; '.join(definitions(comparison))}.", *notes],
        pictures=pictures,
        data={f"{name}.json": comparison.to_json(), **(data or {})},
    )
