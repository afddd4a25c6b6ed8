"""Figures of a study: differences over paired seeds by the number of training images, one plot a way of comparing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ditlab.metrics.paired import PairedDifference
from ditlab.pages.theme import LIGHT, Theme, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["differences_figure"]


def differences_figure(
    ways: Mapping[str, Mapping[int, PairedDifference | None]], ylabel: str, *, theme: Theme = LIGHT
) -> Figure:
    """Draws differences against N, one plot for each way of comparing, with intervals over paired seeds.

    `ways` is title -> N -> difference. A filled mark is one whose interval excludes zero; small dots are the seeds.
    """
    from matplotlib.lines import Line2D

    color = theme.run(0)
    with canvas(max(4.2, 3.1 * len(ways)), 3.7, theme) as figure:
        for axes, (title, way) in zip(figure.subplots(1, len(ways), squeeze=False)[0], ways.items(), strict=True):
            _draw(axes, way, theme)
            axes.set_title(title, pad=8, fontsize=10)
        figure.axes[0].set_ylabel(ylabel)
        mark = {"color": color, "marker": "o", "ms": 6.5, "mec": color, "mew": 1.6, "lw": 1.8}
        handles = [
            Line2D([], [], **mark, mfc=color, label="mean and 95 % interval that excludes zero"),
            Line2D([], [], **mark, mfc=theme.background, label="the interval includes zero, or one seed"),
            Line2D([], [], color=theme.muted, marker="o", ms=3.5, lw=0, label="a seed"),
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=3 if len(ways) > 1 else 1)
    return figure


def _draw(axes: Axes, way: Mapping[int, PairedDifference | None], theme: Theme) -> None:
    axes.axhline(0, color=theme.muted, lw=1.1, zorder=1)
    color = theme.run(0)
    for x, d in enumerate(way.values()):
        if d is None:
            offset = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center"}
            axes.annotate("none", (x, 0), fontsize=8, color=theme.muted, **offset)
            continue
        if d.low is not None and d.high is not None:
            axes.plot([x, x], [d.low, d.high], color=color, lw=1.8, solid_capstyle="butt", zorder=2)
        shifts = [0.14 + 0.06 * i for i in range(len(d.differences))]
        axes.scatter([x + s for s in shifts], d.differences, s=11, color=theme.muted, lw=0, zorder=2.5)
        inside = color if d.seen else theme.background
        axes.scatter([x], [d.mean], s=46, color=inside, edgecolor=color, lw=1.6, zorder=3)
    axes.set_xticks(range(len(way)), [f"{n:,}" for n in way])
    axes.set_xlim(-0.5, len(way) - 0.4)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("training images N")
