"""Figures of the two-subset test: histograms and pairs, as in Kadkhodaie et al. (2310.02557), Fig. 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ditlab.analyses.two_subsets.result import TwoSubsetsResult
from ditlab.errors import DitlabError
from ditlab.models.memorization import mask_images, training_pictures
from ditlab.models.model import Model
from ditlab.pages.drawing import Drawing
from ditlab.pages.image_rows import ImageRow, image_rows
from ditlab.pages.theme import LIGHT, Theme, canvas

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["closest_pictures", "drawings", "mask_near_copies", "two_subsets_histograms", "two_subsets_pairs"]

MAX_COLUMNS = 8
"""Pairs in a figure, at most."""


def drawings(models: Sequence[Model], result: TwoSubsetsResult, hide_training_images: bool) -> dict[str, Drawing]:
    """Returns the figures of a result by file name; the pairs are left out if only the JSON is there.

    If not both models are at hand, no training images are shown. With `hide_training_images`, samples that are nearly
    one are masked, too.
    """
    names = f"{result.about[0].name} and {result.about[1].name}"
    figures = {
        "two-subsets": Drawing(
            lambda theme: two_subsets_histograms(result, theme=theme),
            f"Histograms of cosines: pairs of samples of {names}, samples and training images, and the control.",
            "Dashed lines are means.",
        )
    }
    if result.pictures is None:
        return figures
    shown, nearest = result, None
    if hide_training_images:
        shown = mask_near_copies(result)
    elif len(models) == 2:
        nearest = closest_pictures(models, result)
    figures["two-subsets-pairs"] = Drawing(
        lambda theme: two_subsets_pairs(shown, nearest, theme=theme),
        f"Rows of images: samples of {names} from the same noise.",
        "Below each first sample: its cosine with the second. Below the others: the cosine of a sample with its "
        "closest training image.",
        exact=True,
    )
    return figures


def closest_pictures(models: Sequence[Model], result: TwoSubsetsResult) -> tuple[np.ndarray, np.ndarray]:
    """Returns the closest training images of the samples of both runs that are shown, uint8 [k, C, H, W] each."""
    assert result.pictures is not None
    count = result.pictures.shape[1]
    first, second = (
        training_pictures(model, nearest.index[:count], nearest.mirrored[:count])
        for model, nearest in zip(models, result.nearest, strict=True)
    )
    return first, second


def mask_near_copies(result: TwoSubsetsResult) -> TwoSubsetsResult:
    """Returns the result with grey pictures in place of samples that are nearly a training image."""
    assert result.pictures is not None
    return replace(result, pictures=mask_images(result.pictures, result.near_copies[:, : result.pictures.shape[1]]))


def two_subsets_histograms(result: TwoSubsetsResult, *, theme: Theme = LIGHT) -> Figure:
    """Draws the cosines of the pairs (blue), with the closest training image (orange) and of the control (grey)."""
    sides = (
        ("pairs from the same noise", result.pair, theme.run(0)),
        ("with the closest training image", result.nearest_cosine, theme.run(1)),
        ("control: closest images of the two training sets", result.control, theme.muted),
    )
    low = min(float(values.min()) for _, values, _ in sides)
    edges = np.linspace(min(low, 0.9) - 0.01, 1.001, 41).tolist()
    with canvas(6.4, 3.6, theme) as figure:
        axes = figure.subplots()
        for name, values, color in sides[::-1]:
            share, label = np.full(len(values), 1 / len(values)), f"{name} (mean {values.mean():.2f})"
            kind, alpha = ("step", 1.0) if values is result.control else ("stepfilled", 0.6)
            axes.hist(values, edges, weights=share, histtype=kind, color=color, alpha=alpha, linewidth=1.2, label=label)
            axes.axvline(float(values.mean()), color=color, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.set_xlabel(f"cosine of images{' about their means' if result.mean_removed else ''}")
        axes.set_ylabel("share")
        axes.set_title(f"Two networks, N = {result.about[0].n}, no training image in common")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=1)
    return figure


def two_subsets_pairs(
    result: TwoSubsetsResult, nearest: tuple[np.ndarray, np.ndarray] | None = None, *, theme: Theme = LIGHT
) -> Figure:
    """Draws the first samples of both runs from the same noise, between their closest training images if given.

    Raises:
        DitlabError: the result was loaded without its pictures.
    """
    if result.pictures is None:
        raise DitlabError("two-subsets figure: expected a result with its pictures, found one loaded from JSON alone")
    count = min(MAX_COLUMNS, result.pictures.shape[1])
    first, second = (about.group for about in result.about)

    def row(name: str, images: np.ndarray, values: np.ndarray | None) -> ImageRow:
        return ImageRow(name, images[:count], () if values is None else [f"{value:.2f}" for value in values[:count]])

    closest = [side.cosine for side in result.nearest]
    rows = [
        row(f"samples of\n{first}", result.pictures[0], result.pair),
        row(f"samples of\n{second}", result.pictures[1], None if nearest else closest[1]),
    ]
    if nearest is not None:
        rows.insert(0, row(f"closest images\nof {first}", nearest[0], closest[0]))
        rows.append(row(f"closest images\nof {second}", nearest[1], closest[1]))
    return image_rows(rows, titles=[f"seed {seed}" for seed in result.seeds[:count]], theme=theme)
