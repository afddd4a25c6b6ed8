"""Figures of the agreement with closed-form denoisers: the images side by side, and the correlations.

The first follows Kamb and Ganguli (2412.20292): the samples of the network and of each baseline from the same noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from ditlab.analyses.agreement.result import AgreementResult
from ditlab.data.pixels import to_uint8
from ditlab.diffusion.samplers import ImageNoise
from ditlab.models.memorization import mask_images, near_copies, nearest_training
from ditlab.models.model import Model
from ditlab.pages.drawing import Drawing
from ditlab.pages.image_rows import ImageRow, image_rows
from ditlab.pages.theme import LIGHT, Theme, canvas, plain_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["agreement_curves", "agreement_images", "drawings", "images_to_show"]

MAX_SHOWN = 8
"""Images in a row of a figure, at most."""
MEMORIZING_BASELINES = ("empirical-bayes", "wiener-locality")
"""Baselines whose samples are training images, or nearly so."""


def drawings(model: Model, result: AgreementResult, hide_training_images: bool) -> dict[str, Drawing]:
    """Returns the figures of a model's result by file name; the images are left out if only the JSON is there."""
    name = result.about.name
    figures = {
        "agreement": Drawing(
            lambda theme: agreement_curves(result, theme=theme),
            f"Correlations of {name} with closed-form denoisers: of final images, and by noise level.",
            "Final images: one dot for each image, bars are medians. Single estimates of the clean image are compared "
            "on the model's own trajectories.",
        )
    }
    if result.images is None:
        return figures
    images = images_to_show(model, result, hide_training_images=hide_training_images)
    shown = Drawing(
        lambda theme: agreement_images(result, images, theme=theme),
        f"Rows of images: noise, the samples of {name}, and the samples of closed-form denoisers.",
        f"Samples of {name} and of closed-form denoisers of its training images, from the same noise. Below each "
        "image: its correlation with the model's.",
        exact=True,
    )
    return {"agreement-images": shown, **figures}


def images_to_show(
    model: Model, result: AgreementResult, *, hide_training_images: bool = False
) -> dict[str, np.ndarray]:
    """Returns the first images, uint8 [n, C, H, W]: "noise", "network", and those of baselines by name.

    With `hide_training_images`, baselines whose samples are training images are left out, and images that are nearly a
    training image are masked.
    """
    assert result.images is not None
    left_out = MEMORIZING_BASELINES if hide_training_images else ()
    arrays = {name: images[:MAX_SHOWN] for name, images in result.arrays().items() if name not in left_out}
    pictures = {name: model.decode(torch.from_numpy(images)) for name, images in arrays.items()}
    if hide_training_images:
        every = np.concatenate(list(pictures.values()))
        hidden = near_copies(*nearest_training(model, every), known=model.knows_training_images)
        pictures = dict(zip(pictures, np.split(mask_images(every, hidden), len(pictures)), strict=True))
    noise = ImageNoise(range(min(MAX_SHOWN, result.config.images)), result.shape).initial() / 3
    if result.shape[0] in (1, 3) and result.shape[1:] == pictures["network"].shape[2:]:
        return {"noise": to_uint8(noise).numpy(), **pictures}
    # Noise of latents is shown as the mean of its channels, as large as the pictures.
    grey = to_uint8(noise.mean(1, keepdim=True) * noise.shape[1] ** 0.5)
    large = torch.nn.functional.interpolate(grey.float(), pictures["network"].shape[2:]).byte().numpy()
    return {"noise": np.broadcast_to(large, pictures["network"].shape), **pictures}


def agreement_images(result: AgreementResult, images: Mapping[str, np.ndarray], *, theme: Theme = LIGHT) -> Figure:
    """Draws what `images_to_show` gave, with the correlations below."""
    rows = [ImageRow(name, images[name]) for name in ("noise", "network")]
    count = len(images["network"])
    for baseline in result.baselines:
        if baseline.name in images:
            name = f"{baseline.title}\nmedian {baseline.median('correlation'):.2f}"
            captions = [f"{value:.2f}" for value in baseline.correlation[:count]]
            rows.append(ImageRow(name, images[baseline.name], captions))
    return image_rows(rows, titles=[f"seed {seed}" for seed in range(count)], theme=theme)


def agreement_curves(result: AgreementResult, *, theme: Theme = LIGHT) -> Figure:
    """Draws correlations of final images by baseline, of single estimates by noise level, and calibrated windows."""
    windows = [(b.name, b.windows) for b in result.baselines if b.windows is not None and b.calibration is not None]
    widths = [1.15, 1.3, 1.0] if windows else [1.15, 1.3]
    colors = {baseline.name: theme.run(slot) for slot, baseline in enumerate(result.baselines)}
    with canvas(4.2 * len(widths), 4.1, theme) as figure:
        panels = figure.subplots(1, len(widths), width_ratios=widths)
        _final_images(panels[0], result, colors, theme)
        levels = np.array(result.levels)
        for baseline in result.baselines:
            median = np.median(baseline.one_step, axis=1)
            panels[1].plot(levels, median, color=colors[baseline.name], label=baseline.title)
        panels[1].set_ylabel("correlation with the network's estimate")
        panels[1].set_title("Single estimates, on the network's trajectories")
        for axes in panels[1:]:
            axes.set_xscale("log")
            axes.set_xlabel("noise level σ")
            plain_log(axes.xaxis, (float(levels.min()), float(levels.max())))
        # Below, where it never covers data.
        figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=len(result.baselines))
        if windows:
            # Curves that coincide are shifted a little, so that all are seen.
            for place, (name, schedule) in enumerate(windows):
                sizes = np.array(schedule.sizes) + 0.22 * (place - (len(windows) - 1) / 2)
                panels[2].plot(schedule.levels, sizes, ".-", color=colors[name], markersize=5)
            panels[2].set_ylabel("side of the window, pixels")
            panels[2].set_title("Calibrated windows")
            panels[2].set_yticks([size for size in result.config.candidates if size <= min(result.shape[1:])])
    return figure


def _final_images(axes: Axes, result: AgreementResult, colors: Mapping[str, str], theme: Theme) -> None:
    for place, baseline in enumerate(result.baselines):
        values, color = baseline.correlation, colors[baseline.name]
        spread = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else np.zeros(1)
        axes.plot(values, place + spread, "o", color=color, markersize=4, alpha=0.75, mew=0)
        ends, median = [place - 0.3, place + 0.3], baseline.median("correlation")
        axes.plot([median, median], ends, color=color, linewidth=2.2)
        if result.config.images > 1:
            control = baseline.median("control")
            axes.plot([control, control], ends, color=theme.muted, linewidth=1.2, linestyle=(0, (2, 2)))
    axes.set_yticks(range(len(result.baselines)), [baseline.title for baseline in result.baselines])
    axes.set_ylim(len(result.baselines) - 0.5, -0.5)
    axes.set_xlim(right=1.03)
    dashed = "\n(dashed: other noise)" if result.config.images > 1 else ""
    axes.set_xlabel(f"correlation with the network's image{dashed}")
    axes.set_title("Final images")
