"""Figures of attention: maps and patterns (An et al. 2410.21273, Figs. 4 and 5), and curves of locality.

Colours of maps have two scales. "uniform": the weight relative to uniform attention, on one logarithmic scale for all
maps, from a quarter of the uniform weight 1/T to a quarter of all attention; the token picker of a page has the same
scale. "paper": each map linearly from its own least to its own largest weight, cut off at 0.1 so that faint weights can
be seen, as in the paper. Under the second a map of nearly uniform attention is bright throughout.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ditlab.analyses.attention.comparison import LocalityComparison, LocalityGroup, compare_locality
from ditlab.analyses.attention.config import MapScale
from ditlab.analyses.attention.maps import AttentionMaps, check_token
from ditlab.analyses.attention.result import LocalityResult, Quantity
from ditlab.errors import DitlabError
from ditlab.nn.patterns import Grid, Pattern
from ditlab.pages.theme import LIGHT, Slots, Theme, assign, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["attention_map_figure", "layers_shown", "locality_by_n", "locality_curves", "patterns_figure"]

_PAPER_CLIP = 0.1
"""Normalized weight at which the colours of a map end (An et al. Fig. 4)."""
_COLOURS = "viridis"
_MARK = "#ff3b30"
"""Boxes over maps: visible on all colours of the map and in both themes."""
_ALLOWED = (0, (4, 2))
_UNIFORM = (0, (1, 2))
"""Lines of uniform attention: dashed within a layer's pattern, dotted over the whole grid."""


def attention_map_figure(
    runs: Sequence[tuple[str, AttentionMaps]],
    *,
    layers: Sequence[int] | None = None,
    token: tuple[int, int] | None = None,
    heads: Sequence[int] = (),
    image: int = 0,
    picture: np.ndarray | None = None,
    scale: MapScale = "uniform",
    theme: Theme = LIGHT,
) -> Figure:
    """Draws attention maps layer by layer, and under each the attention of one token (An et al. Fig. 4).

    Two rows for each model (and head): the maps, queries downwards and keys to the right, with an inset that enlarges
    the three middle rows of the grid; and the token's row of each map as a picture of the grid, with a box around the
    token's 3 x 3 neighbourhood.

    The maps of `runs`, (label, maps) pairs, are of one noise level and grid. Layers and heads count from 1; without
    `layers` all that every model has are drawn, without `heads` the mean over heads, without `token` the middle one of
    the grid. `picture` is the maps' image, uint8 [C, H, W], drawn beside the token's rows. Raises DitlabError for
    several noise levels or grids, and for what does not exist.
    """
    grid, layers = _common(runs, layers)
    token = (grid[0] // 2, grid[1] // 2) if token is None else token
    check_token(token, grid)
    lines = [(label, maps, head) for label, maps in runs for head in (heads or (None,))]
    wide, tall, side = 0.95, 1.0, 1.62
    with canvas(wide + side * len(layers) + 1.0, (2 * side + tall * 0.25) * len(lines) + 0.75, theme) as figure:
        axes = figure.subplots(
            2 * len(lines), 1 + len(layers), squeeze=False, width_ratios=[wide / side, *[1.0] * len(layers)]
        )
        shown = None
        for line, (label, maps, head) in enumerate(lines):
            above, below = axes[2 * line], axes[2 * line + 1]
            _caption(above[0], label, 13, "mean of heads" if head is None else f"head {head}", (0.5, 0.44), theme)
            _draw_picture(below[0], picture, grid, token)
            for column, layer in enumerate(layers, 1):
                weights = maps.of(layer, image, head)
                shown = _draw_map(above[column], weights, grid, scale, theme)
                if line == 0:
                    above[column].set_title(f"layer {layer}", loc="center", fontsize=10, pad=14)
                above[column].annotate(
                    maps.patterns[layer].name, (0.5, 1.0), (0, 3), "axes fraction", "offset points",
                    ha="center", va="bottom", fontsize=7.5, color=theme.muted,
                )  # fmt: skip
                _draw_token(below[column], maps.token(token, layer, image, head).numpy(), token, scale, theme)
        assert shown is not None  # _common has refused an empty figure
        _draw_bar(figure, shown, list(axes[:, -1]), min(0.8, 1.6 / len(lines)), scale, theme)
        below = f"below each map, the attention of the token in row {token[0]}, column {token[1]}"
        title = f"Attention at noise level σ = {runs[0][1].sigma:.3g}; {below}"
        # Broken by hand, for a figure of one or two layers is narrower than the sentence.
        title = "\n".join(textwrap.wrap(title, int(13 * figure.get_figwidth())))
        figure.suptitle(title, fontsize=9.5, fontweight="bold", color=theme.ink, x=0.01, ha="left")
    return figure


def layers_shown(layers: Sequence[int], at_most: int = 6) -> list[int]:
    """Returns at most so many layers, evenly spaced, with the last: 2, 4, ..., 12 of 12, as in the paper."""
    every = max(1, -(-len(layers) // at_most))
    return list(layers[::-1][::every])[::-1]


def _common(runs: Sequence[tuple[str, AttentionMaps]], layers: Sequence[int] | None) -> tuple[Grid, list[int]]:
    """Returns the grid and the layers of all models."""
    if not runs:
        raise DitlabError("attention figure: expected the maps of at least one model, found none")
    first = runs[0][1]
    for label, maps in runs[1:]:
        if maps.grid != first.grid or abs(maps.sigma / first.sigma - 1) > 1e-2:
            raise DitlabError(
                f"attention figure: expected maps over one grid and noise level, found {first.grid} at "
                f"{first.sigma:.4g} and {maps.grid} at {maps.sigma:.4g} ('{label}')"
            )
    chosen = list(layers) if layers else sorted(set.intersection(*({*maps.maps} for _, maps in runs)))
    if not chosen:
        raise DitlabError("attention figure: expected a layer that all models have, found none")
    return first.grid, chosen


def _bare(axes: Axes, theme: Theme) -> None:
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set(visible=True, color=theme.muted, linewidth=0.6)


def _caption(axes: Axes, label: str, width: int, text: str, heights: tuple[float, float], theme: Theme) -> None:
    """Writes a label, in lines of at most `width` characters, and a text under it, beside a row of panels."""
    axes.axis("off")
    label = "\n".join(textwrap.wrap(label, width))
    place = axes.transAxes
    axes.text(0, heights[0], label, transform=place, va="bottom", fontsize=9.5, fontweight="bold", color=theme.ink)
    axes.text(0, heights[1], text, transform=place, va="top", fontsize=8, color=theme.muted)


def _note(axes: Axes, text: str, theme: Theme) -> None:
    """Writes a small line under a panel."""
    axes.set_xlabel(text, fontsize=7.5, color=theme.muted, labelpad=2)


def _draw_picture(axes: Axes, picture: np.ndarray | None, grid: Grid, token: tuple[int, int]) -> None:
    """Draws the image on the token grid, with a box around the token's neighbourhood."""
    axes.axis("off")
    if picture is None:
        return
    pixels = picture.transpose(1, 2, 0)
    pixels = pixels.repeat(3, axis=2) if pixels.shape[2] == 1 else pixels
    axes.imshow(pixels, interpolation="nearest", extent=(-0.5, grid[1] - 0.5, grid[0] - 0.5, -0.5))
    _box(axes, token, grid)


def _colours(weights: np.ndarray, scale: MapScale) -> tuple[np.ndarray, dict[str, Any]]:
    """Returns the values to draw of weights [..., T], and the colour settings of `imshow`."""
    if scale == "uniform":
        from matplotlib.colors import LogNorm

        low, high = 0.25, max(weights.shape[-1], 2) / 4
        return np.maximum(weights * weights.shape[-1], low), {"cmap": _COLOURS, "norm": LogNorm(low, high, clip=True)}
    low, high = weights.min(), weights.max()
    return (weights - low) / max(high - low, 1e-30), {"cmap": _COLOURS, "vmin": 0.0, "vmax": _PAPER_CLIP}


def _draw_map(axes: Axes, weights: Tensor, grid: Grid, scale: MapScale, theme: Theme) -> Any:
    """Draws a map with its inset; returns the image that the colour bar belongs to."""
    values, settings = _colours(weights.double().numpy(), scale)
    shown = axes.imshow(values, **settings)
    _bare(axes, theme)
    tokens, half = len(values), min(3 * grid[1], len(values)) / 2
    start = int(tokens / 2 - half)
    part = slice(start, start + int(2 * half))
    inset = axes.inset_axes((0.54, 0.54, 0.46, 0.46))
    extent = (part.start - 0.5, part.stop - 0.5, part.stop - 0.5, part.start - 0.5)
    inset.imshow(values[part, part], extent=extent, **settings)
    _bare(inset, theme)
    for spine in inset.spines.values():
        spine.set(color=_MARK, linewidth=0.8)
    axes.indicate_inset((extent[0], extent[3], extent[1] - extent[0], extent[2] - extent[3]), ec=_MARK, alpha=1, lw=0.8)
    return shown


def _draw_token(axes: Axes, row: np.ndarray, token: tuple[int, int], scale: MapScale, theme: Theme) -> None:
    """Draws a token's row as a picture of the grid, with its largest weight below; in "paper" from 0 to that weight."""
    values, settings = row, {"cmap": _COLOURS, "vmin": 0.0, "vmax": row.max()}
    if scale == "uniform":
        flat, settings = _colours(row.reshape(-1), scale)
        values = flat.reshape(row.shape)
    axes.imshow(values, interpolation="nearest", **settings)
    _bare(axes, theme)
    _box(axes, token, row.shape)
    _note(axes, f"largest {row.max():.2g}", theme)


def _draw_bar(figure: Figure, shown: Any, axes: list[Axes], shrink: float, scale: MapScale, theme: Theme) -> None:
    """Draws the colour bar of the maps."""
    bar = figure.colorbar(shown, ax=axes, shrink=shrink, aspect=30, extend="max" if scale == "paper" else "both")
    words = "map, least to largest weight = 0 to 1"
    if scale == "uniform":
        from matplotlib.ticker import NullLocator

        words = "weight relative to uniform attention"
        ticks = [4.0**power for power in range(-1, 8) if 4.0**power <= shown.norm.vmax * 1.001]
        bar.set_ticks(ticks, labels=["1/4" if tick < 1 else f"{tick:g}" for tick in ticks])
        bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_label(words, fontsize=8, color=theme.ink)
    bar.ax.tick_params(labelsize=7.5)


def _box(axes: Axes, token: tuple[int, int], grid: tuple[int, ...]) -> None:
    """Draws a box around the token's 3 x 3 neighbourhood on the grid."""
    from matplotlib.patches import Rectangle

    top, left = max(token[0] - 1, 0), max(token[1] - 1, 0)
    bottom, right = min(token[0] + 1, grid[0] - 1), min(token[1] + 1, grid[1] - 1)
    size = right - left + 1, bottom - top + 1
    axes.add_patch(Rectangle((left - 0.5, top - 0.5), *size, fill=False, ec=_MARK, lw=1.2))


def patterns_figure(
    plan: Sequence[Pattern], grid: Grid, *, numbers: Sequence[int] | None = None, theme: Theme = LIGHT
) -> Figure:
    """Draws which keys a token sees under each pattern of a plan (An et al. Fig. 5): a corner, an edge, a middle token.

    Each different pattern is a row, named with its layers; the last column is the whole mask, queries downwards.

    Layers are numbered from 1, or by `numbers`. The paper's example is a grid of (4, 4) tokens with a window of 3.
    Raises DitlabError for an empty plan.
    """
    from matplotlib.colors import ListedColormap

    if not plan:
        raise DitlabError("patterns figure: expected at least one layer, found none")
    layers: dict[Pattern, list[int]] = {}
    for number, pattern in zip(numbers or range(1, len(plan) + 1), plan, strict=True):
        layers.setdefault(pattern, []).append(number)
    middle = (grid[0] // 2, grid[1] // 2)
    tokens = {"corner token": (0, 0), "edge token": (0, middle[1]), "middle token": middle}
    colours = ListedColormap([theme.grid, theme.run(0)])
    with canvas(1.1 + 1.55 * 4, 0.45 + 1.72 * len(layers), theme) as figure:
        lines = figure.subplots(len(layers), 5, squeeze=False, width_ratios=[0.65, 1, 1, 1, 1])
        for axes, name in zip(lines[0, 1:], [*tokens, "whole mask"], strict=True):
            axes.set_title(name, loc="center", fontsize=9.5, pad=6)
        for line, (pattern, mine) in zip(lines, layers.items(), strict=True):
            mask = pattern.mask(grid).numpy()
            _caption(line[0], pattern.name, 11, _layer_names(mine), (0.55, 0.5), theme)
            seen = [mask[check_token(token, grid)].reshape(grid) for token in tokens.values()]
            for axes, picture in zip(line[1:], [*seen, mask], strict=True):
                axes.imshow(picture, cmap=colours, vmin=0, vmax=1, interpolation="nearest")
                _bare(axes, theme)
            for axes, token, keys in zip(line[1:4], tokens.values(), seen, strict=True):
                _mark_token(axes, token, grid, theme)
                _note(axes, f"sees {int(keys.sum())} of {keys.size}", theme)
            _note(line[4], f"{mask.mean():.0%} of all pairs", theme)
    return figure


def _mark_token(axes: Axes, token: tuple[int, int], grid: Grid, theme: Theme) -> None:
    """Draws lines between the tokens of the grid, and one of them in another colour."""
    for draw, count in ((axes.axvline, grid[1]), (axes.axhline, grid[0])):
        for place in range(1, count):
            draw(place - 0.5, color=theme.background, lw=0.7)
    axes.scatter([token[1]], [token[0]], s=1400 / max(grid) ** 1.4, marker="s", color=theme.run(1), lw=0)


def _layer_names(numbers: Sequence[int]) -> str:
    """Returns "layer 3", "layers 1-3", "layers 1, 3, 5": three or more in sequence are shortened."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    text = ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 2 else ", ".join(map(str, p)) for p in parts)
    return f"layer{'s' if len(numbers) > 1 else ''} {text}"


def locality_curves(results: Sequence[LocalityResult], *, slots: Slots | None = None, theme: Theme = LIGHT) -> Figure:
    """Draws the mean attention distance by layer, and the mass by window side; a column for each N.

    Lines are means over seeds (and heads and noise levels), bands their standard deviation. Dashed lines of a model's
    colour are uniform attention within its windows; the dotted line is uniform attention over the grid. Raises
    DitlabError for results that cannot be compared (see `compare_locality`).
    """
    from matplotlib.ticker import MaxNLocator

    comparison = compare_locality(results)
    slots, counts, first = slots or assign(comparison.labels), comparison.counts, comparison.first
    radii = sorted(first.mass)
    sides = [2 * radius + 1 for radius in radii]  # at 1 the token itself
    with canvas(max(5.4, 3.1 * len(counts) + 0.8), 6.0, theme) as figure:
        axes = figure.subplots(2, len(counts), squeeze=False, sharey="row")
        for (above, below), n in zip(axes.T, counts, strict=True):
            above.axhline(first.uniform_distance, color=theme.muted, lw=1.2, ls=_UNIFORM)
            below.plot(sides, first.uniform_mass(), color=theme.muted, lw=1.2, ls=_UNIFORM)
            for g in (g for g in comparison.groups if g.n == n):
                color = theme.run(slots[g.label])
                if not _sees_all(g):
                    allowed = [g.results[0].pattern_mass(radius).mean() for radius in radii]
                    above.plot(first.layers, g.results[0].pattern_distance, color=color, lw=1.1, ls=_ALLOWED, alpha=0.8)
                    below.plot(sides, allowed, color=color, lw=1.1, ls=_ALLOWED, alpha=0.8)
                _line(above, first.layers, g.by_layer("distance"), color)
                _line(below, sides, np.stack([g.by_layer(radius).mean(axis=1) for radius in radii], axis=1), color)
            above.set_title("" if n is None else f"N = {n:,}", pad=8)
            above.set_xlabel("layer")
            above.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
            below.set_xticks(sides)
            below.set_xlabel("side of the window (tokens)")
        axes[0, 0].set_ylabel("mean attention distance\n(tokens)")
        axes[0, 0].set_ylim(bottom=0)
        axes[1, 0].set_ylabel("attention within the window")
        axes[1, 0].set_ylim(0, 1.02)
        windows = not all(_sees_all(g) for g in comparison.groups)
        _legend(figure, comparison, slots, theme, dashed="uniform within the window" if windows else "")
    return figure


def _sees_all(group: LocalityGroup) -> bool:
    """Returns whether all layers are global."""
    return all(pattern.covers(group.results[0].grid) for pattern in group.results[0].patterns)


def _line(axes: Axes, x: Sequence[int], values: np.ndarray, color: str) -> None:
    """Draws the mean over seeds of values [seeds, x], with a band of one standard deviation."""
    mean = values.mean(axis=0)
    if len(values) > 1:
        spread = values.std(axis=0, ddof=1)
        axes.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.18, lw=0)
    axes.plot(x, mean, color=color, marker="o", ms=3.5)


def locality_by_n(results: Sequence[LocalityResult], *, slots: Slots | None = None, theme: Theme = LIGHT) -> Figure:
    """Draws locality against the number of training images: distance, mass within 3 x 3 tokens, similarity of maps.

    Values are means over layers, heads and noise levels; small dots are seeds, lines their mean. The dotted line is
    uniform attention over the grid. The dashed line under the cosine of different images' maps is its control, with the
    rows of one of the two permuted. Raises DitlabError for results that cannot be compared or have no N.
    """
    from matplotlib.ticker import NullLocator

    comparison = compare_locality(results)
    counts = [n for n in comparison.counts if n is not None]
    if len(counts) < len(comparison.counts):
        raise DitlabError("locality by N: expected results with a number of training images, found one without")
    slots, first = slots or assign(comparison.labels), comparison.first
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
                _draw_against_n(axes, comparison.by_label(label), what, theme.run(slots[label]), theme)
            axes.set_title(title, pad=8, fontsize=10)
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks(counts, [f"{n:,}" for n in counts])
            axes.set_xlim(counts[0] / 1.4, counts[-1] * 1.4)
            axes.set_xlabel("training images N")
            axes.set_ylim(0, axes.dataLim.ymax * 1.08)
        _legend(figure, comparison, slots, theme, dashed="with the rows of one map permuted")
    return figure


def _draw_against_n(
    axes: Axes, groups: Sequence[LocalityGroup], what: Quantity | int, color: str, theme: Theme
) -> None:
    counts: Any = [g.n for g in groups]
    if what == "consistency":
        axes.plot(counts, [g.mean("consistency_control") for g in groups], color=color, lw=1.1, ls=_ALLOWED)
    axes.plot(counts, [g.mean(what) for g in groups], color=color, marker="o", ms=4.5, zorder=2.5)
    for g, n in zip(groups, counts, strict=True):
        values = list(g.averages(what).values())
        if len(values) > 1:
            axes.scatter([n] * len(values), values, s=13, color=theme.background, edgecolor=color, lw=0.9, zorder=3)


def _legend(figure: Figure, comparison: LocalityComparison, slots: Slots, theme: Theme, *, dashed: str = "") -> None:
    """Draws the labels, the dotted line, and what a dashed line means if there is one."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=theme.run(slots[k]), marker="o", ms=3.5, label=k) for k in comparison.labels]
    handles.append(Line2D([], [], color=theme.muted, lw=1.2, ls=_UNIFORM, label="uniform over the grid"))
    if dashed:
        handles.append(Line2D([], [], color=theme.ink, lw=1.1, ls=_ALLOWED, label=dashed))
    figure.legend(handles=handles, loc="outside lower left", ncols=2 if figure.get_figwidth() > 6 else 1)
