"""Figures of the two-subset test, in the manner of Kadkhodaie et al. (2310.02557), Fig. 2: histograms and pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ditlab.analyses.agreement.figures import image_table
from ditlab.analyses.two_subsets.measure import TwoSubsetsResult
from ditlab.errors import DitlabError
from ditlab.pages.theme import LIGHT, Theme, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def two_subsets_histograms(result: TwoSubsetsResult, *, bins: int = 40, theme: Theme = LIGHT) -> Figure:
    """Cosines of the pairs (blue), to the closest training image (orange), and of the control (grey), as shares.

    Args:
        result: what was measured.
        bins: from the lowest cosine to 1.
        theme: light or dark.
    """
    sides = (
        ("pairs from equal noise", result.pair, theme.run(0)),
        ("to the closest training image", result.nearest_cosine, theme.run(1)),
        ("control: closest images of both training sets", result.control, theme.muted),
    )
    low = min(float(values.min()) for _, values, _ in sides)
    edges = np.linspace(min(low, 0.9) - 0.01, 1.001, bins + 1)
    with canvas(6.4, 3.6, theme) as figure:
        axes = figure.subplots()
        for name, values, color in sides[::-1]:
            share = np.full(len(values), 1 / len(values))
            control = values is result.control
            axes.hist(
                values,
                edges.tolist(),
                weights=share,
                histtype="step" if control else "stepfilled",
                color=color,
                alpha=1.0 if control else 0.6,
                linewidth=1.2,
                label=f"{name} (mean {values.mean():.2f})",
            )
            axes.axvline(float(values.mean()), color=color, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.set_xlabel("cosine of images" + (" about their means" if result.mean_removed else ""))
        axes.set_ylabel("share")
        axes.set_title(f"Two networks, N = {result.about[0].n}, no training image in common")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=1)
    return figure


def two_subsets_pairs(
    result: TwoSubsetsResult,
    nearest: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    columns: int = 8,
    theme: Theme = LIGHT,
) -> Figure:
    """Samples of both runs from equal noise, between the training images that are most like them.

    Args:
        result: with its pictures.
        nearest: the closest training image of each sample of both, uint8 [n, C, H, W]; None to show no real image.
        columns: pairs shown, at most.
        theme: light or dark.

    Raises:
        DitlabError: the result was read without its pictures.
    """
    if result.pictures is None:
        raise DitlabError("two-subsets figure: expected a result with its pictures, found one read from JSON alone")
    count = min(columns, result.pictures.shape[1])
    first, second = result.about

    def words(side: int) -> list[str]:
        return [f"{value:.2f}" for value in result.nearest[side].cosine[:count]]

    rows = [
        (f"drawn by\n{first.name}", result.pictures[0][:count], [f"{value:.2f}" for value in result.pair[:count]]),
        (f"drawn by\n{second.name}", result.pictures[1][:count], [] if nearest else words(1)),
    ]
    if nearest is not None:
        above = (f"its closest of\n{first.name}'s set", nearest[0][:count], words(0))
        rows = [above, *rows, (f"its closest of\n{second.name}'s set", nearest[1][:count], words(1))]
    return image_table(rows, titles=[f"seed {seed}" for seed in result.seeds[:count]], theme=theme)
