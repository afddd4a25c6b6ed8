"""Figures of the agreement with closed-form references: the images side by side, and the correlations.

The first is in the manner of Kamb and Ganguli (2412.20292): from equal noise, what the network draws beside what each
machine draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ditlab.analyses.agreement.result import AgreementResult
from ditlab.errors import DitlabError
from ditlab.pages.theme import LIGHT, Theme, canvas, plain_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BELOW = 0.24
"""Room for words beneath an image, as a share of its height."""


def image_table(
    rows: Sequence[tuple[str, np.ndarray, Sequence[str]]],
    *,
    titles: Sequence[str] = (),
    inches: float = 0.9,
    theme: Theme = LIGHT,
) -> Figure:
    """Rows of images, each with a few words beneath it.

    Args:
        rows: (what the row is, images uint8 [n, C, H, W] of one shape and number, words beneath each, or none).
        titles: a word above each column.
        inches: width of one image.
        theme: light or dark.

    Raises:
        DitlabError: no rows, or rows of different numbers of images.
    """
    if not rows or len({images.shape for _, images, _ in rows}) != 1:
        raise DitlabError(
            f"image table: expected rows of equal images, found {[list(images.shape) for _, images, _ in rows]}"
        )
    count, _, height, width = rows[0][1].shape
    tall = height / width
    tops, at = [], 0.0
    for _, _, words in rows:
        tops.append(at)
        at += tall + (_BELOW if words else 0.06)
    left = 0.085 * max(len(line) for name, _, _ in rows for line in name.split("\n")) + 0.15
    above = 0.22 if titles else 0.05
    step = 1.06
    with canvas(max(count * step * inches + left, 3.0), at * inches + above, theme) as figure:
        axes = figure.subplots()
        for top, (_, images, words) in zip(tops, rows, strict=True):
            for column, image in enumerate(images):
                start = column * step
                pixels = np.broadcast_to(image.transpose(1, 2, 0), (height, width, 3))
                axes.imshow(pixels, extent=(start, start + 1, top + tall, top), interpolation="nearest")
                if words:
                    axes.text(
                        start + 0.5, top + tall + 0.03, words[column], ha="center", va="top", fontsize=7,
                        color=theme.muted,
                    )  # fmt: skip
        axes.set_xlim(0, count * step - 0.06)
        axes.set_ylim(at, 0)
        axes.set_aspect("equal")
        axes.set_yticks([top + tall / 2 for top in tops], [name for name, _, _ in rows])
        axes.set_xticks([i * step + 0.5 for i in range(count)] if titles else [], titles or [])
        axes.tick_params(length=0, pad=3, labeltop=True, labelbottom=False, labelcolor=theme.ink, labelsize=8)
        axes.spines[:].set_visible(False)
        axes.grid(False)
    return figure


def agreement_images(
    result: AgreementResult, pictures: Mapping[str, np.ndarray], *, columns: int = 8, theme: Theme = LIGHT
) -> Figure:
    """Noise, what the network draws from it, and what each reference draws, with the correlations beneath.

    Args:
        result: what was measured.
        pictures: uint8 [n, C, H, W] by name: "noise", "network", and the references that are to be shown.
        columns: images shown, at most.
        theme: light or dark.
    """
    rows: list[tuple[str, np.ndarray, Sequence[str]]] = [
        (name, pictures[name][:columns], []) for name in ("noise", "network")
    ]
    for one in result.references:
        if one.name not in pictures:
            continue
        words = [f"{value:.2f}" for value in one.correlation[:columns]]
        rows.append((f"{one.word}\nmedian {np.median(one.correlation):.2f}", pictures[one.name][:columns], words))
    seeds = [f"seed {seed}" for seed in range(len(rows[0][1]))]
    return image_table(rows, titles=seeds, theme=theme)


def agreement_curves(result: AgreementResult, *, theme: Theme = LIGHT) -> Figure:
    """Correlation of the final images by reference; of single estimates by noise level; windows by level, if any."""
    windowed = [one for one in result.references if one.windows is not None and one.calibration is not None]
    widths = [1.15, 1.3, 1.0] if windowed else [1.15, 1.3]
    colors = {one.name: theme.run(slot) for slot, one in enumerate(result.references)}
    with canvas(4.2 * len(widths), 4.1, theme) as figure:
        panels = figure.subplots(1, len(widths), width_ratios=widths)
        _final(panels[0], result, colors, theme)
        levels = np.array(result.levels)
        for one in result.references:
            panels[1].plot(levels, np.median(one.one_step, axis=1), color=colors[one.name], label=one.word)
        panels[1].set_ylabel("correlation with the network's estimate")
        panels[1].set_title("One estimate, on the network's path")
        for axes in panels[1:]:
            axes.set_xscale("log")
            axes.set_xlabel("noise level σ")
            plain_log(axes.xaxis, (float(levels.min()), float(levels.max())))
        # Below, where it never lies over data.
        figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=len(result.references))
        if windowed:
            # Curves that coincide must all be seen: each is moved by a little.
            for place, one in enumerate(windowed):
                schedule = one.windows
                assert schedule is not None
                sizes = np.array(schedule.sizes) + 0.22 * (place - (len(windowed) - 1) / 2)
                panels[2].plot(schedule.levels, sizes, ".-", color=colors[one.name], label=one.word, markersize=5)
            panels[2].set_ylabel("side of the window, pixels")
            panels[2].set_title("Calibrated windows")
            panels[2].set_yticks([size for size in result.config.candidates if size <= min(result.shape[1:])])
    return figure


def _final(axes: Axes, result: AgreementResult, colors: Mapping[str, str], theme: Theme) -> None:
    for place, one in enumerate(result.references):
        spread = np.linspace(-0.16, 0.16, len(one.correlation)) if len(one.correlation) > 1 else np.zeros(1)
        axes.plot(one.correlation, place + spread, "o", color=colors[one.name], markersize=4, alpha=0.75, mew=0)
        median = float(np.median(one.correlation))
        axes.plot([median, median], [place - 0.3, place + 0.3], color=colors[one.name], linewidth=2.2)
        if result.config.images > 1:
            other = float(np.median(one.control))
            axes.plot(
                [other, other], [place - 0.3, place + 0.3], color=theme.muted, linewidth=1.2, linestyle=(0, (2, 2))
            )
    axes.set_yticks(range(len(result.references)), [one.word for one in result.references])
    axes.set_ylim(len(result.references) - 0.5, -0.5)
    axes.set_xlim(right=1.03)
    axes.set_xlabel(
        "correlation with the network's image" + ("\n(broken: other noise)" if result.config.images > 1 else "")
    )
    axes.set_title("Final images")
