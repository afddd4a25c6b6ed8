"""The swap gap by noise level."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ditlab.analyses.swap_gap.result import SwapResult
from ditlab.metrics.bands import noise_bands
from ditlab.pages.theme import LIGHT, Theme, canvas, plain_log

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def swap_curves(result: SwapResult, *, theme: Theme = LIGHT) -> Figure:
    """Draws the difference on each side's images and their mean against sigma; dotted lines part the bands."""
    with canvas(5.6, 3.6, theme) as figure:
        axes = figure.subplots()
        axes.axhline(0, color=theme.muted, lw=1.1, zorder=1)
        for band in noise_bands(result.config.bands):
            if result.levels[0] < band.low < result.levels[-1]:
                axes.axvline(band.low, color=theme.muted, lw=0.8, ls=":", zorder=1)
        for side, about in enumerate(result.about):
            axes.plot(
                result.levels, result.curve(side), color=theme.run(side), lw=1.1, label=f"on images of {about.name}"
            )
        axes.plot(result.levels, result.gap, color=theme.run(2), lw=2.4, label="mean")
        axes.set(xscale="log", xlabel="noise level σ", ylabel="own minus other model (dB)")
        plain_log(axes.xaxis, axes.get_xlim())
        axes.legend(frameon=False)
    return figure
