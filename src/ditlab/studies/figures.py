"""Figures of a study: how two kinds of runs differ at each number of training images, compared in several ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ditlab.errors import DitlabError
from ditlab.metrics.paired import PairedDifference
from ditlab.pages.theme import LIGHT, Theme, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def differences_figure(
    ways: Sequence[tuple[str, Mapping[int, PairedDifference | None]]], *, unit: str = "dB", theme: Theme = LIGHT
) -> Figure:
    """Draws differences second - first against N, one plot for each way of comparing, with intervals over paired seeds.

    A filled mark is a difference whose interval excludes zero; small dots are the seeds. N without a difference, and
    intervals of a single seed, are left out.

    Args:
        ways: (title, N -> difference) pairs.
        unit: of the differences.
        theme: light or dark.

    Raises:
        DitlabError: there is no difference at all.
    """
    if not any(d is not None for _, way in ways for d in way.values()):
        raise DitlabError("figure: expected at least one difference, found none")
    with canvas(max(4.2, 3.1 * len(ways)), 3.7, theme) as figure:
        for axes, (title, way) in zip(figure.subplots(1, len(ways), squeeze=False)[0], ways, strict=True):
            _draw(axes, way, theme)
            axes.set_title(title, pad=8, fontsize=10)
        first = next(d for _, way in ways for d in way.values() if d is not None)
        figure.axes[0].set_ylabel(f"{first.second} minus {first.first} ({unit})")
        _legend(figure, theme)
    return figure


def _draw(axes: Axes, way: Mapping[int, PairedDifference | None], theme: Theme) -> None:
    axes.axhline(0, color=theme.muted, lw=1.1, zorder=1)
    color = theme.run(0)
    for x, d in enumerate(way.values()):
        if d is None:
            axes.annotate(
                "none", (x, 0), (0, 5), textcoords="offset points", ha="center", fontsize=8, color=theme.muted
            )
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


def _legend(figure: Figure, theme: Theme) -> None:
    from matplotlib.lines import Line2D

    color = theme.run(0)

    def mark(inside: str, label: str) -> Line2D:
        return Line2D([], [], color=color, marker="o", ms=6.5, mfc=inside, mec=color, mew=1.6, lw=1.8, label=label)

    handles = [
        mark(color, "mean and 95 % interval that excludes zero"),
        mark(theme.background, "the interval includes zero, or one seed"),
        Line2D([], [], color=theme.muted, marker="o", ms=3.5, lw=0, label="a seed"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=3)
