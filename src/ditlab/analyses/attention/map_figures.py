"""Figures of attention maps and patterns, in the style of An et al. (2410.21273), Figs. 4 and 5.

A map is brought linearly to [0, 1] by its own least and largest weight, and its colours end at 0.1, as in the paper:
larger weights look alike, so that faint ones can be seen. `locality_figures` draws the numbers.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ditlab.analyses.attention.maps import AttentionMaps, check_token
from ditlab.errors import DitlabError
from ditlab.nn.patterns import Grid, Pattern
from ditlab.pages.theme import LIGHT, Theme, canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLIP = 0.1
"""Normalized weight at which the colours of a map end (An et al. Fig. 4)."""
_COLOURS = "viridis"
_MARK = "#ff3b30"
"""Boxes over maps: seen on all of the map's colours and in both themes."""


def attention_map_figure(
    runs: Sequence[tuple[str, AttentionMaps]],
    *,
    layers: Sequence[int] | None = None,
    token: tuple[int, int] | None = None,
    heads: Sequence[int] = (),
    image: int = 0,
    picture: np.ndarray | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """Attention maps layer by layer, and under each what one token attends to (An et al. Fig. 4).

    Two lines a run (and head): the maps, queries downwards and keys to the right, with an inset that enlarges the three
    middle rows of the grid; and the token's row of each map as a picture of the grid, scaled to its own maximum, with a
    box around the token's 3 x 3 neighbourhood.

    Args:
        runs: (label, maps) pairs at one noise level, over the same grid.
        layers: which, from 1; all that every run has where None.
        token: (row, column) from 0; the grid's middle where None.
        heads: which heads, from 1, a pair of lines each; the mean over heads where none is named.
        image: which of the maps' images.
        picture: that image, uint8 [C, H, W], drawn beside the token's lines where given.
        theme: light or dark.

    Raises:
        DitlabError: no run, several noise levels or grids, a layer, head, image or token that is not there.
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
            _caption(above[0], label, head, theme)
            _draw_picture(below[0], picture, grid, token)
            for column, layer in enumerate(layers, 1):
                weights = maps.of(layer, image, head)
                shown = _draw_map(above[column], weights, grid, theme)
                if line == 0:
                    above[column].set_title(f"layer {layer}", loc="center", fontsize=10, pad=14)
                above[column].annotate(
                    maps.patterns[layer].name, (0.5, 1.0), (0, 3), "axes fraction", "offset points",
                    ha="center", va="bottom", fontsize=7.5, color=theme.muted,
                )  # fmt: skip
                _draw_token(below[column], maps.token(token, layer, image, head).numpy(), token, theme)
        assert shown is not None  # _common has refused an empty figure
        bar = figure.colorbar(shown, ax=list(axes[:, -1]), shrink=min(0.8, 1.6 / len(lines)), aspect=30, extend="max")
        bar.set_label("map, least to largest weight = 0 to 1", fontsize=8, color=theme.ink)
        bar.ax.tick_params(labelsize=7.5)
        below = f"below each map, what the token in row {token[0]}, column {token[1]} attends to"
        title = f"Attention at noise level σ = {runs[0][1].sigma:.3g}; {below}"
        # Broken by hand, for a figure of one or two layers is narrower than the sentence.
        title = "\n".join(textwrap.wrap(title, int(13 * figure.get_figwidth())))
        figure.suptitle(title, fontsize=9.5, fontweight="bold", color=theme.ink, x=0.01, ha="left")
    return figure


def layers_shown(layers: Sequence[int], at_most: int = 6) -> list[int]:
    """So many of the layers that a figure holds them, the last among them: 2, 4, ..., 12 of 12, as in the paper."""
    every = max(1, -(-len(layers) // at_most))
    return list(layers[::-1][::every])[::-1]


def _common(runs: Sequence[tuple[str, AttentionMaps]], layers: Sequence[int] | None) -> tuple[Grid, list[int]]:
    """The grid and the layers of all runs."""
    if not runs:
        raise DitlabError("attention figure: expected at least one run's maps, found none")
    first = runs[0][1]
    for label, maps in runs[1:]:
        if maps.grid != first.grid or abs(maps.sigma / first.sigma - 1) > 1e-2:
            raise DitlabError(
                f"attention figure: expected maps over one grid and noise level, found {first.grid} at "
                f"{first.sigma:.4g} and {maps.grid} at {maps.sigma:.4g} ('{label}')"
            )
    chosen = list(layers) if layers else sorted(set.intersection(*({*maps.maps} for _, maps in runs)))
    if not chosen:
        raise DitlabError("attention figure: expected a layer that all runs have, found none")
    return first.grid, chosen


def _bare(axes: Axes, theme: Theme) -> None:
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set(visible=True, color=theme.muted, linewidth=0.6)


def _caption(axes: Axes, label: str, head: int | None, theme: Theme) -> None:
    axes.axis("off")
    axes.text(
        0.0, 0.5, "\n".join(textwrap.wrap(label, 13)), transform=axes.transAxes, va="bottom", ha="left",
        fontsize=9.5, fontweight="bold", color=theme.ink,
    )  # fmt: skip
    axes.text(
        0.0, 0.44, "mean of heads" if head is None else f"head {head}", transform=axes.transAxes, va="top", ha="left",
        fontsize=8, color=theme.muted,
    )  # fmt: skip


def _draw_picture(axes: Axes, picture: np.ndarray | None, grid: Grid, token: tuple[int, int]) -> None:
    """The image itself on the token grid, with the token's neighbourhood boxed."""
    axes.axis("off")
    if picture is None:
        return
    pixels = picture.transpose(1, 2, 0)
    pixels = pixels.repeat(3, axis=2) if pixels.shape[2] == 1 else pixels
    axes.imshow(pixels, interpolation="nearest", extent=(-0.5, grid[1] - 0.5, grid[0] - 0.5, -0.5))
    _box(axes, token, grid)


def _draw_map(axes: Axes, weights: Tensor, grid: Grid, theme: Theme) -> Any:
    """One normalized map with its inset; returns the image that the colour bar stands for."""
    values = weights.double().numpy()
    low, high = values.min(), values.max()
    values = (values - low) / max(high - low, 1e-30)
    settings = {"cmap": _COLOURS, "vmin": 0.0, "vmax": CLIP}
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


def _draw_token(axes: Axes, row: np.ndarray, token: tuple[int, int], theme: Theme) -> None:
    """A token's row as a picture of the grid, from 0 to its largest weight, which stands below."""
    axes.imshow(row, cmap=_COLOURS, vmin=0.0, vmax=row.max(), interpolation="nearest")
    _bare(axes, theme)
    _box(axes, token, row.shape)
    axes.set_xlabel(f"largest {row.max():.2g}", fontsize=7.5, color=theme.muted, labelpad=2)


def _box(axes: Axes, token: tuple[int, int], grid: tuple[int, ...]) -> None:
    """The token's 3 x 3 neighbourhood, as far as it lies on the grid."""
    from matplotlib.patches import Rectangle

    top, left = max(token[0] - 1, 0), max(token[1] - 1, 0)
    bottom, right = min(token[0] + 1, grid[0] - 1), min(token[1] + 1, grid[1] - 1)
    size = right - left + 1, bottom - top + 1
    axes.add_patch(Rectangle((left - 0.5, top - 0.5), *size, fill=False, ec=_MARK, lw=1.2))


def patterns_figure(plan: Sequence[Pattern], grid: Grid, *, theme: Theme = LIGHT) -> Figure:
    """Which keys a token sees under each pattern of a plan (An et al. Fig. 5): a corner, an edge and a middle token.

    Each different pattern is a line, named with its layers; the whole mask, queries downwards, stands last.

    Args:
        plan: the pattern of each layer, first layer first.
        grid: (rows, columns) of tokens; the paper's example is (4, 4) with a window of 3.
        theme: light or dark.

    Raises:
        DitlabError: an empty plan.
    """
    if not plan:
        raise DitlabError("patterns figure: expected at least one layer, found none")
    layers: dict[Pattern, list[int]] = {}
    for number, pattern in enumerate(plan, 1):
        layers.setdefault(pattern, []).append(number)
    tokens = {
        "corner": (0, 0),
        "edge": (0, grid[1] // 2),
        "middle": (grid[0] // 2, grid[1] // 2),
    }
    with canvas(1.1 + 1.55 * 4, 0.45 + 1.72 * len(layers), theme) as figure:
        lines = figure.subplots(len(layers), 5, squeeze=False, width_ratios=[0.65, 1, 1, 1, 1])
        for axes, name in zip(lines[0, 1:], [*(f"{name} token" for name in tokens), "whole mask"], strict=True):
            axes.set_title(name, loc="center", fontsize=9.5, pad=6)
        for line, (pattern, numbers) in zip(lines, layers.items(), strict=True):
            mask = pattern.mask(grid).numpy()
            line[0].axis("off")
            line[0].text(
                0, 0.55, "\n".join(textwrap.wrap(pattern.name, 11)), transform=line[0].transAxes, va="bottom",
                fontsize=9.5, fontweight="bold", color=theme.ink,
            )  # fmt: skip
            line[0].text(
                0, 0.5, _numbers(numbers), transform=line[0].transAxes, va="top", fontsize=8, color=theme.muted
            )
            for axes, token in zip(line[1:4], tokens.values(), strict=True):
                _draw_seen(axes, mask[check_token(token, grid)].reshape(grid), token, theme)
            line[4].imshow(mask, cmap=_two_colours(theme), vmin=0, vmax=1, interpolation="nearest")
            _bare(line[4], theme)
            line[4].set_xlabel(f"{mask.mean():.0%} of all pairs", fontsize=7.5, color=theme.muted, labelpad=2)
    return figure


def _draw_seen(axes: Axes, seen: np.ndarray, token: tuple[int, int], theme: Theme) -> None:
    """The grid with the keys that a token sees, and the token itself."""
    rows, columns = seen.shape
    axes.imshow(seen, cmap=_two_colours(theme), vmin=0, vmax=1, interpolation="nearest")
    _bare(axes, theme)
    for position in np.arange(columns - 1) + 0.5:
        axes.axvline(position, color=theme.background, lw=0.7)
    for position in np.arange(rows - 1) + 0.5:
        axes.axhline(position, color=theme.background, lw=0.7)
    axes.scatter([token[1]], [token[0]], s=1400 / max(rows, columns) ** 1.4, marker="s", color=theme.run(1), lw=0)
    axes.set_xlabel(f"sees {int(seen.sum())} of {seen.size}", fontsize=7.5, color=theme.muted, labelpad=2)


def _two_colours(theme: Theme) -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap([theme.grid, theme.run(0)])


def _numbers(numbers: Sequence[int]) -> str:
    """ "layer 3", "layers 1-3", "layers 1, 3, 5": runs of three and more are shortened."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    text = ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 2 else ", ".join(map(str, p)) for p in parts)
    return f"layer{'s' if len(numbers) > 1 else ''} {text}"
