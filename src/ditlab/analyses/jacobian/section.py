"""The Jacobian on a page: which figures are drawn of a comparison, and the section that holds them with the numbers.

r_hom and r_lin stand in the same table as the numbers of the vectors, with the sentence on what they allow to be said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ditlab.analyses.jacobian.comparison import CAUTION, LEGEND, MATRIX, VECTORS, JacobianComparison
from ditlab.analyses.jacobian.curves import TARGETS, by_vector_curves, shrinkage_and_image, spectra
from ditlab.analyses.jacobian.figures import Pixels, denoising_strip, sensitivity_maps, vector_gallery
from ditlab.analyses.jacobian.result import JacobianPoint
from ditlab.pages.page import Section, Table, ThemedFigure
from ditlab.pages.theme import LIGHT, RUN_DASHES, Slots, Theme, assign

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawing = tuple[Callable[[Theme], "Figure"], str, str]
"""Drawing of a theme, alt text, caption."""

NAMES = (
    r"jacobian-(denoised|spectra|vectors|right-vectors|measures|shrinkage|sensitivity)"
    r"(-image\d+)?(-sigma[\d.e+-]+)?(-\d+)?"
)
"""The names of the figures, as a regular expression."""
MEASURES = {
    "frequency": "mean radial frequency / Nyquist's",
    "participation": "share of pixels lived on",
    "edges": "energy on edges / their share",
    "alignment": "|u . v|",
    "image_correlation": "|correlation| with the image",
    "nearest_correlation": "with the nearest training image",
}
"""What is drawn of each vector against its index, in this order."""
_TEXTS = {
    "vectors": "Left singular vectors (directions of the output)",
    "right": "Right singular vectors (directions of the input)",
    "eigh": "Eigenvectors of the symmetric part",
    "eig": "Left eigenvectors, w^T J = λ w^T (their real part, turned so that it is as long as can be)",
    "eig-right": "Right eigenvectors, J v = λ v (their real part, turned so that it is as long as can be)",
}


def jacobian_drawings(
    comparison: JacobianComparison,
    pixels: Pixels,
    *,
    right: bool = False,
    hide_images: bool = False,
    slots: Slots | None = None,
) -> dict[str, Drawing]:
    """File name -> figure of a comparison: of each kind of run the first seed.

    Args:
        comparison: runs that were measured alike.
        pixels: how images as the denoisers see them become pictures.
        right: also the right singular vectors, where there are any.
        hide_images: leave out all that shows a real image: what was denoised, and the vectors, which may draw one.
        slots: colours by label; where there are several N each (label, N) has a colour of its own.
    """
    shown = [(name, group.results[0]) for name, group in zip(names(comparison), comparison.groups, strict=True)]
    if slots is None or not all(name in slots for name, _ in shown):
        slots = _slots(comparison)
    slots = {name: slots[name] for name, _ in shown}
    target, kind = comparison.first.config.target, comparison.first.config.decomposition
    places = [(p.image, level) for level, p in _grid(comparison)]
    words = " and ".join(name for name, _ in shown)
    all_points = [(name, _at(point, comparison)) for name, result in shown for point in result.points]
    found: dict[str, Drawing] = {}
    if not hide_images:
        found["jacobian-denoised"] = (
            lambda theme: denoising_strip(all_points, pixels, theme=theme),
            f"A clean image, the same with noise, and what {words} make of it.",
            "Clean, noisy and denoised, with PSNR in dB.",
        )
    found["jacobian-spectra"] = (
        lambda theme: spectra(all_points, target, kind, slots=slots, theme=theme),
        f"Spectra of the Jacobians of {words} against the index, on linear and logarithmic axes.",
        f"Of the Jacobian of the {TARGETS[target]}, largest first; above linear, below logarithmic.",
    )
    for place, (image, level) in enumerate(places):
        points = [(name, result.points[place]) for name, result in shown]
        sigma = comparison.levels[level]
        ending = ""
        if len(comparison.first.config.images) > 1:
            ending += f"-image{image}"
        if len(comparison.levels) > 1:
            ending += f"-sigma{sigma:.3g}"
        where = f"σ = {sigma:.3g}" + (f", image {image}" if len(comparison.first.config.images) > 1 else "")
        if not hide_images:
            found |= _galleries(points, comparison, where, ending, words, right)
        found[f"jacobian-measures{ending}"] = (
            lambda theme, points=points: by_vector_curves(points, MEASURES, slots=slots, theme=theme),
            f"Measures of each vector of {words} against its index.",
            f"Each vector against its index, {where}: dots are vectors, lines their running median.",
        )
        if any(point.by_vector.get("clean_coefficient") is not None for _, point in points):
            found[f"jacobian-shrinkage{ending}"] = (
                lambda theme, points=points: shrinkage_and_image(points, "clean_coefficient", target, theme=theme),
                f"The values of {words} and the clean image's coefficients in their vectors, against the index.",
                f"How much of each direction is kept and how much the clean image has of it, {where}.",
            )
        if any(point.sensitivity is not None for _, point in points):
            found[f"jacobian-sensitivity{ending}"] = (
                lambda theme, points=points: sensitivity_maps(points, theme=theme),
                f"Maps of what output pixels of {words} depend on, beside the Wiener denoiser's.",
                f"What an output pixel depends on, {where}: sums of |J| over channels, logarithmic colours.",
            )
    return found


def names(comparison: JacobianComparison) -> list[str]:
    """What figures call each group: its label, with N where there are several."""
    several = len({group.n for group in comparison.groups}) > 1
    return [group.name if several else group.label for group in comparison.groups]


def _slots(comparison: JacobianComparison) -> Slots:
    """A colour for each group; where there are more than colours, one for each label and another line for each N."""
    kinds = assign(group.label for group in comparison.groups)
    sizes = list(dict.fromkeys(group.n for group in comparison.groups))
    colours = len(LIGHT.runs)
    if len(comparison.groups) <= colours or len(kinds) > colours or len(sizes) > len(RUN_DASHES):
        return assign(names(comparison))
    found = zip(names(comparison), comparison.groups, strict=True)
    return {name: kinds[group.label] + colours * sizes.index(group.n) for name, group in found}


def _grid(comparison: JacobianComparison) -> list[tuple[int, JacobianPoint]]:
    """Place of the level, and the point, of each point of the first result."""
    return [(i % len(comparison.levels), point) for i, point in enumerate(comparison.first.points)]


def _at(point: JacobianPoint, comparison: JacobianComparison) -> JacobianPoint:
    """The point at the first run's level nearest to its own: the steps of different processes miss each other by up to
    a per cent."""
    return replace(point, sigma=min(comparison.levels, key=lambda sigma: abs(sigma - point.sigma)))


def _galleries(
    points: Sequence[tuple[str, JacobianPoint]],
    comparison: JacobianComparison,
    where: str,
    ending: str,
    words: str,
    right: bool,
) -> dict[str, Drawing]:
    config = comparison.first.config
    kind, of = config.decomposition, f"of the Jacobian of the {TARGETS[config.target]}"
    sides = ((False, "vectors"), (True, "right-vectors")) if right and kind == "svd" else ((False, "vectors"),)
    found: dict[str, Drawing] = {}
    for side, name in sides:
        what = _TEXTS[kind if kind != "svd" else "right" if side else "vectors"]
        found[f"jacobian-{name}{ending}"] = (
            lambda theme, side=side: vector_gallery(points, kind, right=side, theme=theme),
            f"{what} {of} of {words}, drawn as images, at chosen indices.",
            f"{what} {of}, {where}, k = 0 leading; white is zero, red positive; frames have the channel's colour.",
        )
    return found


def jacobian_section(
    comparison: JacobianComparison,
    pictures: Sequence[ThemedFigure] = (),
    *,
    number: int = 1,
    data: Mapping[str, Any] | None = None,
) -> Section:
    """What the denoisers do to an image, direction by direction: the table, the sentences, the figures.

    Args:
        comparison: runs that were measured alike.
        pictures: of `jacobian_drawings`.
        number: where a page has several such sections, which one this is.
        data: files behind it, beside the comparison itself.
    """
    tables = [
        Table(*comparison.table(columns), caption)
        for columns, caption in (
            (MATRIX, comparison.title),
            (VECTORS, f"Its vectors ({comparison.first.config.decomposition})"),
        )
        if columns is VECTORS or "trace" in comparison.measured
    ]
    notes = dict.fromkeys(note for result in comparison.results for note in result.notes)
    name = "jacobian" if number == 1 else f"jacobian-{number}"
    return Section(
        name,
        "Direction by direction: the Jacobian" + ("" if number == 1 else f" ({number})"),
        [CAUTION],
        points=[*comparison.gaps(), *comparison.between()],
        tables=tables,
        notes=[f"{LEGEND}.", *notes],
        pictures=pictures,
        data={f"{name}.json": comparison.to_json(), **(data or {})},
    )


def of_number(drawn: Mapping[str, ThemedFigure], number: int, count: int) -> list[ThemedFigure]:
    """The figures of one of `count` comparisons, in order; where there are several their names end in its number."""
    ending = f"-{number}" if count > 1 else ""
    return [p for name, p in drawn.items() if re.fullmatch(NAMES, name) and name.endswith(ending)]
