"""Figures of how local attention is: by layer, by distance, and against the number of training images.

They draw `ditlab.analyses.attention.result.LocalityResult`; the pictures of the maps are in
`ditlab.analyses.attention.map_figures`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ditlab.analyses.attention.comparison import LocalityComparison, LocalityGroup, compare_locality
from ditlab.analyses.attention.result import LocalityResult, Quantity
from ditlab.errors import DitlabError
from ditlab.pages.theme import LIGHT, Slots, Theme, assign, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_REFERENCE = (0, (4, 2))
_UNIFORM = (0, (1, 2))


def locality_curves(
    results: Sequence[LocalityResult],
    *,
    level: int | None = None,
    slots: Slots | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """Mean attention distance by layer, and the mass of attention by radius; one column a number of training images.

    Lines are means over seeds (and heads and noise levels), bands their standard deviation. Broken lines of a run's
    colour are what uniform attention over its windows would give; the dotted line is uniform attention over the grid.

    Args:
        results: runs that were measured alike, any number of labels, N and seeds.
        level: index of the noise level to draw; the mean over levels where None.
        slots: colours of the labels.
        theme: light or dark.

    Raises:
        DitlabError: results that cannot stand side by side (see `compare_locality`).
    """
    comparison = compare_locality(results)
    slots = slots or assign(comparison.labels)
    counts = comparison.counts
    with canvas(max(5.4, 3.1 * len(counts) + 0.8), 6.0, theme) as figure:
        axes = figure.subplots(2, len(counts), squeeze=False, sharey="row")
        for column, n in enumerate(counts):
            groups = [g for g in comparison.groups if g.n == n]
            _draw_by_layer(axes[0, column], comparison, groups, level, slots, theme)
            _draw_mass(axes[1, column], comparison, groups, level, slots, theme)
            axes[0, column].set_title("" if n is None else f"N = {n:,}", pad=8)
        axes[0, 0].set_ylabel("mean attention distance\n(tokens)")
        axes[0, 0].set_ylim(bottom=0)
        axes[1, 0].set_ylabel("attention within the window")
        axes[1, 0].set_ylim(0, 1.02)
        windows = not all(_sees_all(g) for g in comparison.groups)
        _legend(figure, comparison, slots, theme, broken="uniform over what the layers may see" if windows else "")
    return figure


def _draw_by_layer(
    axes: Axes,
    comparison: LocalityComparison,
    groups: Sequence[LocalityGroup],
    level: int | None,
    slots: Slots,
    theme: Theme,
) -> None:
    from matplotlib.ticker import MaxNLocator

    x = np.asarray(comparison.first.layers)
    axes.axhline(comparison.first.uniform_distance, color=theme.muted, lw=1.2, ls=_UNIFORM)
    for g in groups:
        color = theme.run(slots[g.label])
        if not _sees_all(g):
            axes.plot(x, g.results[0].pattern_distance, color=color, lw=1.1, ls=_REFERENCE, alpha=0.8)
        _line(axes, x, g.by_layer("distance", level), color, marker="o")
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def _draw_mass(
    axes: Axes,
    comparison: LocalityComparison,
    groups: Sequence[LocalityGroup],
    level: int | None,
    slots: Slots,
    theme: Theme,
) -> None:
    """Mass against the side of the window, 2 r + 1; at 1 the token itself."""
    radii = sorted(comparison.first.mass)
    sides = [2 * r + 1 for r in radii]
    axes.plot(sides, comparison.first.uniform_mass(), color=theme.muted, lw=1.2, ls=_UNIFORM)
    for g in groups:
        color = theme.run(slots[g.label])
        if not _sees_all(g):
            reference = [g.results[0].pattern_mass(r).mean() for r in radii]
            axes.plot(sides, reference, color=color, lw=1.1, ls=_REFERENCE, alpha=0.8)
        values = np.stack([g.by_layer(r, level).mean(axis=1) for r in radii], axis=1)
        _line(axes, np.asarray(sides), values, color, marker="o")
    axes.set_xticks(sides)
    axes.set_xlabel("side of the window (tokens)")


def _sees_all(group: LocalityGroup) -> bool:
    """Whether all layers are global, so that what they may see is the grid."""
    return all(pattern.covers(group.results[0].grid) for pattern in group.results[0].patterns)


def _line(axes: Axes, x: np.ndarray, values: np.ndarray, color: str, marker: str) -> None:
    """The mean over seeds [seeds, x] with a band of one standard deviation."""
    mean = values.mean(axis=0)
    if len(values) > 1:
        spread = values.std(axis=0, ddof=1)
        axes.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.18, lw=0)
    axes.plot(x, mean, color=color, marker=marker, ms=3.5)


def locality_by_n(results: Sequence[LocalityResult], *, slots: Slots | None = None, theme: Theme = LIGHT) -> Figure:
    """Locality against the number of training images: distance, mass within 3 x 3 tokens, and what maps share.

    Values are means over layers, heads and noise levels; small dots are seeds, lines their mean. The dotted line is
    uniform attention over the grid. The broken line under the cosine of different images' maps is its control, with the
    rows of one of the two permuted.

    Raises:
        DitlabError: results that cannot stand side by side, or one without a number of training images.
    """
    comparison = compare_locality(results)
    if None in comparison.counts:
        raise DitlabError("locality by N: expected results with a number of training images, found one without")
    slots = slots or assign(comparison.labels)
    first = comparison.first
    panels: tuple[tuple[Quantity | int, str, float | None], ...] = (
        ("distance", "mean attention distance (tokens)", first.uniform_distance),
        (1, "share of attention within 3x3 tokens", first.uniform_mass()[1]),
        ("position_invariance", "cosine of different queries' rows", 1.0),
        ("consistency", "cosine of different images' maps", None),
    )
    with canvas(7.6, 6.2, theme) as figure:
        for axes, (what, title, uniform) in zip(figure.subplots(2, 2).flat, panels, strict=True):
            if uniform is not None:
                axes.axhline(uniform, color=theme.muted, lw=1.2, ls=_UNIFORM)
            for label in comparison.labels:
                color, groups = theme.run(slots[label]), comparison.by_label(label)
                if what == "consistency":
                    control = [g.mean("consistency_control") for g in groups]
                    axes.plot(_counts(groups), control, color=color, lw=1.1, ls=_REFERENCE)
                _draw_against_n(axes, groups, what, color, theme)
            axes.set_title(title, pad=8, fontsize=10)
            _axis_of_n(axes, comparison)
            axes.set_ylim(0, axes.dataLim.ymax * 1.08)
        _legend(figure, comparison, slots, theme, broken="with the rows of one map permuted")
    return figure


def _draw_against_n(
    axes: Axes, groups: Sequence[LocalityGroup], what: Quantity | int, color: str, theme: Theme
) -> None:
    axes.plot(_counts(groups), [g.mean(what) for g in groups], color=color, marker="o", ms=4.5, zorder=2.5)
    for g, n in zip(groups, _counts(groups), strict=True):
        values = list(g.averages(what).values())
        if len(values) > 1:
            axes.scatter([n] * len(values), values, s=13, color=theme.background, edgecolor=color, lw=0.9, zorder=3)


def _counts(groups: Sequence[LocalityGroup]) -> list[int]:
    return [g.n for g in groups if g.n is not None]


def _axis_of_n(axes: Axes, comparison: LocalityComparison) -> None:
    from matplotlib.ticker import NullLocator

    counts = [n for n in comparison.counts if n is not None]
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(counts, [f"{n:,}" for n in counts])
    axes.set_xlim(counts[0] / 1.4, counts[-1] * 1.4)
    axes.set_xlabel("training images N")


def _legend(figure: Figure, comparison: LocalityComparison, slots: Slots, theme: Theme, *, broken: str = "") -> None:
    """Labels, the dotted line, and what a broken line stands for where there is one."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=theme.run(slots[k]), marker="o", ms=3.5, label=k) for k in comparison.labels]
    handles.append(Line2D([], [], color=theme.muted, lw=1.2, ls=_UNIFORM, label="uniform over the grid"))
    if broken:
        handles.append(Line2D([], [], color=theme.ink, lw=1.1, ls=_REFERENCE, label=broken))
    figure.legend(handles=handles, loc="outside lower left", ncols=2 if figure.get_figwidth() > 6 else 1)
