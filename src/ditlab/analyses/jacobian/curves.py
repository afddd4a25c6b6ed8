"""Figures of a denoiser's Jacobian as curves: spectra, measures by vector, shrinkage beside the image.

The label of every axis names the target, because the order of the directions differs between the denoised image and the
estimated noise. `ditlab.analyses.jacobian.figures` draws the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ditlab.analyses.jacobian.config import DecompositionKind, Target
from ditlab.analyses.jacobian.figures import Point
from ditlab.analyses.jacobian.result import JacobianPoint
from ditlab.errors import DitlabError
from ditlab.pages.theme import LIGHT, Dashes, Slots, Theme, assign, canvas, plain_log, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TARGETS: Mapping[Target, str] = {
    "x0": "denoised image (x0)",
    "eps": "estimated noise (eps)",
    "I-eps": "I minus estimated noise",
}
_LEADING: Mapping[Target, str] = {
    "x0": "k = 0 is kept most: signal",
    "eps": "k = 0 is removed most: noise",
    "I-eps": "k = 0 is kept most or inverted",
}
_VALUES: Mapping[DecompositionKind, str] = {
    "svd": "singular values",
    "eigh": "eigenvalues of the symmetric part",
    "eig": "moduli of the eigenvalues",
    "eig-right": "moduli of the eigenvalues",
}
_DECADES = 4
"""The largest number of decades of a logarithmic axis of values: smaller values are rounding noise."""


def spectra(
    points: Sequence[Point],
    target: Target,
    decomposition: DecompositionKind,
    *,
    slots: Slots | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """Draws spectra of several models on one axis: linear (An et al. Figs. 1-3), and logarithmic in both directions.

    One column for each noise level, one line for each image. The logarithmic axis leaves out values that are not
    positive. Raises DitlabError for no Jacobian.
    """
    slots, levels = _prepared("spectra", points, slots)
    with canvas(max(5.4, 3.3 * len(levels) + 0.8), 6.2, theme) as figure:
        axes = figure.subplots(2, len(levels), squeeze=False, sharey="row")
        for (above, below), sigma in zip(axes.T, levels, strict=True):
            for label, point in points:
                if point.sigma == sigma:
                    values = _real(point)
                    k = np.arange(len(values))
                    style: Any = {"color": theme.run(slots[label]), "ls": theme.dashes(slots[label]), "lw": 1.4}
                    above.plot(k, values, **style)
                    positive = values > 0
                    below.plot(k[positive] + 1, values[positive], **style)
            above.set_title(f"σ = {sigma:.3g}", pad=8)
            above.axhline(0, color=theme.muted, lw=0.8)
            above.set_xlabel(f"index k ({_LEADING[target]})", fontsize=9)
            below.set_xlabel("k + 1", fontsize=9)
            below.set(xscale="log", yscale="log")
            ends = (1.0, max(float(below.dataLim.x1), 2.0))
            plain_log(below.xaxis, ends)
            if not np.isfinite(below.dataLim.y0):
                below.set_xlim(ends)
                below.text(0.5, 0.5, "no value above 0", transform=below.transAxes, ha="center", color=theme.muted)
        low, high = min(a.dataLim.y0 for a in axes[1]), max(a.dataLim.y1 for a in axes[1])
        low, high = (max(low, high / 10**_DECADES), high) if np.isfinite(low) else (0.1, 1.0)
        axes[1, 0].set_ylim(low / 1.5, high * 1.5)
        plain_log(axes[1, 0].yaxis, (float(low / 1.5), float(high * 1.5)))
        of = f"{_VALUES[decomposition]} of the Jacobian:\n{TARGETS[target]}"
        for row in axes:
            row[0].set_ylabel(of, fontsize=9)
        _legend(figure, slots, theme)
    return figure


def _prepared(what: str, points: Sequence[Point], slots: Slots | None) -> tuple[Slots, list[float]]:
    """Returns the colours of the labels and the noise levels, ascending."""
    if not points:
        raise DitlabError(f"{what}: expected at least one Jacobian, found none")
    return slots or assign(label for label, _ in points), sorted({point.sigma for _, point in points})


def _real(point: JacobianPoint) -> np.ndarray:
    """Returns the values as they are drawn: moduli of complex ones."""
    return np.abs(point.values) if np.iscomplexobj(point.values) else point.values


def _legend(figure: Figure, slots: Slots, theme: Theme) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=theme.run(slot), ls=theme.dashes(slot), label=label) for label, slot in slots.items()
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=2 if figure.get_figwidth() > 6 else 1)


def _cells(figure: Figure, count: int) -> list[Axes]:
    """Returns so many panels, in lines of three."""
    grid = figure.subplots(-(-count // 3), min(3, count), squeeze=False)
    for axes in list(grid.flat)[count:]:
        axes.axis("off")
    return list(grid.flat)[:count]


def by_vector_curves(
    points: Sequence[Point], measures: Mapping[str, str], *, slots: Slots | None = None, theme: Theme = LIGHT
) -> Figure:
    """Draws measures of each vector against its index: dots are vectors, lines a running median of a tenth of all.

    The Jacobians are of one noise level. `measures` maps names in `JacobianPoint.by_vector` to titles; those that no
    Jacobian has are left out. Raises DitlabError for no Jacobian, or none of the measures.
    """
    slots, _ = _prepared("measures by vector", points, slots)
    drawn = {name: words for name, words in measures.items() if any(name in point.by_vector for _, point in points)}
    if not drawn:
        raise DitlabError(f"measures by vector: expected one of {', '.join(measures)}, found none of them")
    width, height = max(5.4, 3.1 * min(3, len(drawn)) + 0.3), 2.9 * -(-len(drawn) // 3) + 0.6
    with canvas(width, height, theme) as figure:
        for axes, (name, words) in zip(_cells(figure, len(drawn)), drawn.items(), strict=True):
            for label, point in points:
                if name in point.by_vector:
                    _draw_measure(axes, point.by_vector[name], theme.run(slots[label]), theme.dashes(slots[label]))
            axes.set_title(words, fontsize=9.5, pad=6)
            axes.set_xlabel("index k", fontsize=9)
        _legend(figure, slots, theme)
    return figure


def _draw_measure(axes: Axes, values: np.ndarray, color: str, dashes: Dashes) -> None:
    values = np.where(np.isfinite(values), values, np.nan)
    k = np.arange(len(values))
    few = max(1, len(values) // 400)
    axes.plot(
        k[::few], values[::few], ls="none", marker=".", ms=2.2 if len(values) > 60 else 4, color=color, alpha=0.35
    )
    if len(values) >= 20:
        axes.plot(k, _running_median(values), color=color, ls=dashes, lw=1.6)


def _running_median(values: np.ndarray) -> np.ndarray:
    """Returns the median of a tenth of all values about each one, of fewer at the ends."""
    half = len(values) // 20
    return np.array([np.nanmedian(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def shrinkage_and_image(points: Sequence[Point], projection: str, target: Target, *, theme: Theme = LIGHT) -> Figure:
    """Draws how much of each direction the clean image has, |<u, x>|, and how much is kept, λ (Kadkhodaie et al.).

    One panel for each model, at one noise level. If a denoiser keeps exactly the directions of the image, both fall
    together. The dashed line is the noise level: smaller coefficients are hidden by noise. `projection` is the name of
    |<u, x>| in `JacobianPoint.by_vector`. Raises DitlabError for no Jacobian that has it.
    """
    have = [(label, point) for label, point in points if projection in point.by_vector]
    if not have:
        raise DitlabError(f"shrinkage and image: expected Jacobians with '{projection}' by vector, found none")
    columns = min(3, len(have))
    with canvas(max(5.0, 3.3 * columns + 0.6), 3.2 * -(-len(have) // columns) + 0.4, theme) as figure:
        for place, (axes, (label, point)) in enumerate(zip(_cells(figure, len(have)), have, strict=True)):
            twin = _draw_shrinkage(axes, point, np.abs(point.by_vector[projection]), theme)
            axes.set_title(wrapped(label, 34), fontsize=10, pad=8)
            if place % columns == 0:
                axes.set_ylabel(f"value (line),\n{TARGETS[target]}", color=theme.run(0), fontsize=9)
            if place % columns == columns - 1 or place == len(have) - 1:
                twin.set_ylabel("|<u, x>| (dots),\nnoise level (dashed)", color=theme.run(1), fontsize=9)
    return figure


def _draw_shrinkage(axes: Axes, point: JacobianPoint, inner: np.ndarray, theme: Theme) -> Axes:
    """Draws values on the left axis and inner products on the right one, which is returned."""
    values, inner = _real(point), np.maximum(inner, 1e-12)
    k = np.arange(len(values)) + 1
    twin = axes.twinx()
    # Draw lines over dots, although the axis of the dots was made later.
    axes.set_zorder(twin.get_zorder() + 1)
    axes.patch.set_visible(False)
    twin.plot(k, inner, ls="none", marker=".", ms=2.6 if len(k) > 60 else 5, color=theme.run(1), alpha=0.6)
    twin.axhline(point.sigma, color=theme.run(1), lw=1.1, ls=(0, (4, 2)))
    axes.plot(k, values, color=theme.run(0))
    axes.set(xscale="log", xlabel="k + 1")
    plain_log(axes.xaxis, (1.0, max(float(len(k)), 2.0)))
    low, high = min(float(np.quantile(inner, 0.02)), point.sigma) / 2, max(float(inner.max()), point.sigma) * 2
    twin.set(yscale="log", ylim=(low, high))
    plain_log(twin.yaxis, (low, high))
    twin.grid(visible=False)
    axes.tick_params(axis="y", labelcolor=theme.run(0))
    twin.tick_params(axis="y", labelcolor=theme.run(1))
    twin.spines["right"].set(visible=True, color=theme.run(1))
    return twin
