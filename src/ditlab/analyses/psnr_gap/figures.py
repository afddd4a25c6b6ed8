"""Figures of PSNR-gap results, in the style of An et al. (2410.21273): Fig. 2 (curves) and Fig. 6 (bars).

Give all figures of a report the same `slots` (colour of each label, `theme.assign`), so that a run keeps its colour.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ditlab.analyses.psnr_gap.comparison import PSNRComparison, PSNRGroup
from ditlab.analyses.psnr_gap.result import PSNRResult, Quantity
from ditlab.errors import DitlabError
from ditlab.pages.theme import LIGHT, REFERENCE_DASHES, Slots, Theme, assign, canvas, legend_below, plain_log, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HELD_OUT = (0, (3.5, 1.6))
"""Dashes of curves of held-out images."""
_INPUT: dict[str, Any] = {"lw": 1.1, "ls": (0, (1, 2))}
"""The line of the noisy input."""


def psnr_curves(
    comparison: PSNRComparison,
    references: Sequence[PSNRResult] = (),
    *,
    slots: Slots | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """Train and test PSNR by noise level, the gap under them, and their averages in the legend (An et al. Fig. 2).

    One column a number of training images. Means over seeds; the band around a gap is their standard deviation. The
    axis has diffusion steps where all results have the same, else noise levels. A closed-form denoiser of `references`
    with an `about.n` stands only in the column of that N, without one in all of them.

    Raises:
        DitlabError: a reference was measured at other levels.
    """
    slots, first = slots or assign(comparison.labels), comparison.first
    for reference in references:
        if not np.allclose(reference.levels, first.levels, rtol=1e-6, atol=0):
            raise DitlabError(f"figure: the reference '{reference.about.name}' was measured at other noise levels")
    timesteps = {r.timesteps for g in comparison.groups for r in g.results}
    by_step = len(timesteps) == 1 and first.timesteps is not None
    x = np.asarray(first.timesteps if by_step else first.levels, dtype=np.float64)
    columns = [
        (n, [g for g in comparison.groups if g.n == n], [r for r in references if r.about.n in (None, n)])
        for n in comparison.counts
    ]
    heights = [3.3, 1.5, 0.19 * (4 + max(len(groups) + len(mine) for _, groups, mine in columns))]
    with canvas(max(7.2, 4.9 * len(columns)), sum(heights) + 1.3, theme) as figure:
        grid = figure.subplots(3, len(columns), squeeze=False, height_ratios=heights, sharey="row")
        for (top, below, key), (n, groups, mine) in zip(grid.T, columns, strict=True):
            clipped = _draw_curves(top, x, groups, mine, slots, theme)
            _draw_gaps(below, x, groups, slots, theme)
            _finish_axes(top, below, x, first.levels if by_step else None)
            top.set_title("Train and test PSNR" + ("" if n is None else f", N = {n:,} training images"), pad=10)
            keys = _curve_keys(groups, mine, slots, theme, clipped)
            legend_below(key, keys, title="Average over levels: train / test, gap in dB")
        grid[0, 0].set_ylabel("PSNR of latents (dB)" if first.latents else "PSNR (dB)")
        grid[1, 0].set_ylabel("gap (dB)")
    return figure


def overview_curves(comparison: PSNRComparison, *, slots: Slots | None = None, theme: Theme = LIGHT) -> Figure:
    """Draws train and test PSNR by noise level alone, small enough for a phone; one panel for each of at most two N."""
    from matplotlib.lines import Line2D

    slots = slots or assign(comparison.labels)
    sigmas = np.asarray(comparison.first.levels)
    counts = comparison.counts[:2]
    with canvas(4.4, 2.2 * len(counts) + 0.9, theme) as figure:
        panels = figure.subplots(len(counts), 1, squeeze=False, sharex=True)[:, 0]
        for axes, n in zip(panels, counts, strict=True):
            _draw_curves(axes, sigmas, [g for g in comparison.groups if g.n == n], [], slots, theme)
            axes.set_xscale("log")
            plain_log(axes.xaxis, (sigmas[0], max(sigmas[-1], 1.01 * sigmas[0])))
            axes.set_ylabel("PSNR (dB)" if len(counts) == 1 else f"PSNR (dB), N = {n:,}")
            for line in axes.get_lines() if len(sigmas) == 1 else ():
                line.set_marker("o")
        panels[-1].set_xlabel("noise level σ")
        handles = [Line2D([], [], color=theme.run(slots[label]), label=label) for label in comparison.labels]
        handles += [
            Line2D([], [], color=theme.ink, lw=1.2, label="training images"),
            Line2D([], [], color=theme.ink, lw=1.2, ls=_HELD_OUT, label="held-out images"),
            Line2D([], [], color=theme.muted, label="noisy input", **_INPUT),
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=2, fontsize=8)
    return figure


def gap_differences(comparison: PSNRComparison, *, theme: Theme = LIGHT) -> Figure:
    """Draws the difference of the average gap between each two kinds at each N, as a forest plot.

    A filled mark is a difference whose 95 % interval over paired seeds leaves zero out; small dots are the seeds.
    Differences of a single seed have no interval.

    Raises:
        DitlabError: there is no difference.
    """
    if not comparison.differences:
        raise DitlabError("figure: expected at least two kinds of models at one N, found none")
    rows = list(comparison.differences)[::-1]
    with canvas(4.4, 1.1 + 0.42 * len(rows), theme) as figure:
        axes = figure.subplots()
        axes.axvline(0, color=theme.muted, lw=1.1, zorder=1)
        color = theme.run(0)
        for y, (_, d) in enumerate(rows):
            if d.low is not None and d.high is not None:
                axes.plot([d.low, d.high], [y, y], color=color, lw=1.8, solid_capstyle="butt", zorder=2)
            axes.scatter(d.differences, [y + 0.22] * len(d.differences), s=9, color=theme.muted, lw=0, zorder=2.5)
            inside = color if d.seen else theme.background
            axes.scatter([d.mean], [y], s=44, color=inside, edgecolor=color, lw=1.6, zorder=3)
        names = [wrapped(f"{d.second} minus {d.first}" + ("" if n is None else f", N = {n:,}"), 24) for n, d in rows]
        axes.set_yticks(range(len(rows)), names, fontsize=8)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(
            "difference of the average PSNR gap (dB)\nfilled: the 95 % interval leaves zero out", fontsize=9
        )
    return figure


def gap_bars(comparison: PSNRComparison, *, slots: Slots | None = None, theme: Theme = LIGHT) -> Figure:
    """Average PSNR gap by number of training images, one bar a label (An et al. Fig. 6).

    The value stands on each bar. With several seeds each is a dot, and the error bar is their standard deviation.
    """
    from matplotlib.patches import Patch

    slots = slots or assign(comparison.labels)
    counts, labels = comparison.counts, comparison.labels
    width = 0.8 / len(labels)
    with canvas(max(4.6, 1.3 + 0.95 * len(counts) * len(labels)), 3.6, theme) as figure:
        axes = figure.subplots()
        for g in comparison.groups:
            x = counts.index(g.n) + (labels.index(g.label) - (len(labels) - 1) / 2) * width
            _draw_bar(axes, x, width, g, theme.run(slots[g.label]), theme)
        axes.set_xticks(range(len(counts)), ["all runs" if n is None else f"N = {n:,}" for n in counts])
        axes.set_xlim(-0.6, len(counts) - 0.4)
        axes.tick_params(axis="x", length=0)
        axes.grid(visible=False, axis="x")
        axes.set_ylabel("average PSNR gap (dB)")
        axes.set_ylim(0, max(axes.dataLim.ymax * 1.14, 0.05))
        axes.set_title("PSNR gap between train and test images", pad=10)
        handles = [Patch(color=theme.run(slots[label]), label=label) for label in labels]
        figure.legend(handles=handles, loc="outside lower left", ncols=min(4, len(labels)), handlelength=1.2)
    return figure


def _draw_curves(
    axes: Axes, x: np.ndarray, groups: list[PSNRGroup], references: list[PSNRResult], slots: Slots, theme: Theme
) -> bool:
    """Draws the curves of one N; returns whether a reference leaves the axis, at whose edge it is then drawn."""
    noisy = groups[0].results[0].input_psnr
    axes.plot(x, noisy, color=theme.muted, zorder=1.5, **_INPUT)
    for group in groups:
        color, train, test = theme.run(slots[group.label]), group.curve("train"), group.curve("test")
        axes.fill_between(x, test, train, where=(train > test).tolist(), color=color, alpha=0.10, lw=0)
        axes.plot(x, train, color=color, zorder=2.5)
        axes.plot(x, test, color=color, ls=_HELD_OUT, zorder=2.5)
    # The axis follows the models and the input: empirical Bayes returns a stored image exactly at low noise.
    curves = [g.curve(side) for g in groups for side in ("train", "test")] + [noisy]
    low, high = min(c.min() for c in curves), max(c.max() for c in curves)
    shown = [c[c > low - 25] for r in references for c in (r.curve("train"), r.curve("test"))]
    low = min([low, *(c.min() for c in shown if len(c))])
    low = max(low, min(g.curve("test").min() for g in groups) - 8)
    bottom, top = low - 1.5, high + 0.08 * (high - low)
    clipped = False
    for i, reference in enumerate(references):
        style = {"color": theme.references[i % len(theme.references)], "lw": 1.2, "zorder": 1.8}
        for curve, dashes in ((reference.curve("train"), "solid"), (reference.curve("test"), REFERENCE_DASHES[i % 3])):
            inside = np.clip(curve, bottom, top)
            clipped = clipped or bool((inside != curve).any())
            axes.plot(x, inside, ls=dashes, **style)
    axes.set_ylim(bottom, top)
    return clipped


def _draw_gaps(axes: Axes, x: np.ndarray, groups: list[PSNRGroup], slots: Slots, theme: Theme) -> None:
    for group in groups:
        color, gap = theme.run(slots[group.label]), group.curve("gap")
        if len(group.results) > 1:
            spread = np.std([r.gap() for r in group.results], axis=0, ddof=1)
            axes.fill_between(x, np.maximum(gap - spread, 0), gap + spread, color=color, alpha=0.18, lw=0)
        axes.plot(x, gap, color=color)
    axes.set_ylim(bottom=0)


def _finish_axes(top: Axes, below: Axes, x: np.ndarray, levels: Sequence[float] | None) -> None:
    """Finishes the axes of a column; `levels` are those of the steps `x`, None where x has the levels themselves."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for axes in (top, below):
        if levels is None:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if len(x) > 1:
            axes.set_xlim(x[0], x[-1])
        else:  # a line through one point shows nothing; a ring stands for a dashed one
            for line in axes.get_lines():
                line.set_marker("o")
                line.set_markerfacecolor("none" if line.is_dashed() else line.get_color())
    top.tick_params(labelbottom=False)
    below.set_xlabel("noise level σ" if levels is None else "diffusion step t")
    below.yaxis.set_major_locator(MaxNLocator(4))
    if levels is not None:
        upper = top.secondary_xaxis("top")
        marks = np.unique(np.linspace(0, len(x) - 1, 6).round().astype(int))
        upper.set_xticks(x[marks], [f"{s:.0f}" if s >= 9.5 else f"{s:.2g}" for s in np.asarray(levels)[marks]])
        upper.set_xlabel("noise level σ", fontsize=9, labelpad=3)
        upper.tick_params(labelsize=8, length=3)
        upper.spines["top"].set_visible(False)


def _curve_keys(
    groups: list[PSNRGroup], references: list[PSNRResult], slots: Slots, theme: Theme, clipped: bool
) -> list[Any]:
    from matplotlib.lines import Line2D

    def numbers(average: Callable[[Quantity], float], bound: str = "") -> str:
        return f"{bound}{average('train'):.2f} / {average('test'):.2f}, gap {bound}{average('gap'):.2f}"

    keys = []
    for group in groups:
        std = group.std()
        spread = "" if std is None else f" ± {std:.2f} over {len(group.seeds)} seeds"
        text = f"{group.label}: {numbers(group.mean)}{spread}"
        keys.append(Line2D([], [], color=theme.run(slots[group.label]), label=text))
    for i, reference in enumerate(references):
        text = f"{reference.about.name}: {numbers(reference.average, '≥ ' if reference.bounded else '')}"
        color = theme.references[i % len(theme.references)]
        keys.append(Line2D([], [], color=color, lw=1.2, ls=REFERENCE_DASHES[i % 3], label=text))
    keys.append(Line2D([], [], color=theme.muted, label="noisy input", **_INPUT))
    keys.append(Line2D([], [], color=theme.ink, lw=1.2, label="solid: train images; dashed: test images"))
    if clipped:
        keys.append(Line2D([], [], lw=0, label="A reference beyond the axis is drawn at its edge."))
    return keys


def _draw_bar(axes: Axes, x: float, width: float, group: PSNRGroup, color: str, theme: Theme) -> None:
    value, std = group.mean(), group.std()
    axes.bar(x, value, width * 0.9, color=color)
    top = value
    if std is not None:
        axes.errorbar(x, value, std, color=theme.ink, lw=1.1, capsize=3)
        dots = list(group.averages().values())
        shifts = np.linspace(-0.22, 0.22, len(dots)) * width
        axes.scatter(x + shifts, dots, s=14, color=theme.background, edgecolor=theme.ink, lw=0.8, zorder=3)
        top = max(value + std, *dots)
    axes.annotate(f"{value:.2f}", (x, top), (0, 4), textcoords="offset points", ha="center", va="bottom", fontsize=9)
