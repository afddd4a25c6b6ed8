"""Networks by their cost: parameters against operations, and published FID against operations.

After the scatter plots of Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), figures 2 and 8.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ditlab.errors import DitlabError
from ditlab.metrics.complexity import Complexity
from ditlab.pages.theme import LIGHT, Theme, assign, canvas, plain_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_AREA = 600.0
"""Area of the largest bubble, in square points."""
_DOT = 70.0
"""Area of a bubble that stands for nothing but itself."""


def complexity_figure(
    networks: Sequence[tuple[str, Complexity]], *, published: Mapping[str, float] | None = None, theme: Theme = LIGHT
) -> Figure:
    """Parameters against GMACs; a bubble's area is the memory of its backward pass where that was measured.

    Networks whose names are alike up to the last "/" have one colour. Where a FID was published of one (by name), a
    second panel draws it against GMACs.
    """
    if not networks:
        raise DitlabError("figure: expected at least one network, found none")
    published = published or {}
    named = [name for name, _ in networks if name in published]
    slots = assign(_family(name) for name, _ in networks)
    stored = [cost.activation_bytes for _, cost in networks]
    largest = max(filter(None, stored), default=0)
    areas = [_DOT if size is None or not largest else max(_AREA * size / largest, 14.0) for size in stored]
    with canvas(5.6 * (2 if named else 1), 4.4, theme) as figure:
        panels = figure.subplots(1, 2 if named else 1, squeeze=False)[0]
        points: list[Point] = [
            (name, cost.gmacs, cost.parameters / 1e6, area, theme.run(slots[_family(name)]))
            for (name, cost), area in zip(networks, areas, strict=True)
        ]
        _scatter(panels[0], points, theme)
        drawn = {panels[0]: points}
        panels[0].set(ylabel="parameters (millions)")
        panels[0].set_title("Parameters" if not largest else "Parameters (area: memory for backward)", pad=10)
        if named:
            drawn[panels[1]] = [(p[0], p[1], published[p[0]], _DOT, p[4]) for p in points if p[0] in named]
            _scatter(panels[1], drawn[panels[1]], theme)
            panels[1].set(ylabel="FID-50K, 400,000 steps, no guidance")
            panels[1].set_title("FID (Peebles & Xie, Table 4)", pad=10)
        _name(figure, drawn)
    return figure


def _family(name: str) -> str:
    """What a network's name says before its patch."""
    return name.rpartition("/")[0] or name


Point = tuple[str, float, float, float, str]
"""Name, GMACs, height, area in square points, colour."""


def _scatter(axes: Axes, points: Sequence[Point], theme: Theme) -> None:
    """Bubbles on logarithmic axes."""
    for _, x, y, area, color in points:
        axes.scatter([x], [y], s=area, color=color, alpha=0.75, edgecolor=theme.background, lw=0.8, zorder=3)
    for name, values in (("x", [p[1] for p in points]), ("y", [p[2] for p in points])):
        low, high = min(values), max(values)
        room = max((high / low) ** 0.14, 1.25)  # for the names, a part of the span
        limits = (low / room, high * room)
        getattr(axes, f"set_{name}scale")("log")
        getattr(axes, f"set_{name}lim")(*limits)
        plain_log(axes.xaxis if name == "x" else axes.yaxis, limits)
    axes.set(xlabel="GMACs of a forward pass, one image")


def _name(figure: Figure, panels: Mapping[Axes, Sequence[Point]]) -> None:
    """Writes each bubble's name beside it, on the first side where it covers nothing else."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # the positions of the bubbles are known only then
    for axes, points in panels.items():
        taken = []
        for _, x, y, area, _ in points:
            radius = area**0.5 / 2 * figure.dpi / 72
            at_x, at_y = axes.transData.transform((x, y))
            taken.append(Bbox.from_bounds(at_x - radius, at_y - radius, 2 * radius, 2 * radius))
        for (name, x, y, area, color), own in zip(points, list(taken), strict=True):
            words = textwrap.fill(name, 18)
            text = axes.annotate(words, (x, y), (0, 0), textcoords="offset points", color=color, fontsize=8)
            for across, up in ((0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)):
                distance = area**0.5 / 2 + 2
                text.set(
                    position=(across * distance, up * distance),
                    ha=("right", "center", "left")[across + 1],
                    va=("top", "center", "bottom")[up + 1],
                )
                box = text.get_window_extent()
                if not any(box.overlaps(other) for other in taken if other is not own):
                    break
            taken.append(text.get_window_extent())
