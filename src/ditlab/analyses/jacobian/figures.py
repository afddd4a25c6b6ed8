"""Figures of a denoiser's Jacobian as pictures: its vectors, denoised images, what a pixel depends on.

Galleries follow An et al. (2410.21273), Figs. 1-3: a vector is reshaped to the image and drawn channel by channel with
red, green and blue frames; white is zero. `ditlab.analyses.jacobian.curves` draws the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ditlab.analyses.jacobian.config import DecompositionKind
from ditlab.analyses.jacobian.result import SHARES, JacobianPoint, Sensitivity
from ditlab.errors import DitlabError
from ditlab.pages.theme import LIGHT, Theme, canvas, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[str, JacobianPoint]
"""The name of a model, and one of its Jacobians."""

_DIVERGING = ("#0a2f6b", "#2f77b8", "#a9cde6", "#ffffff", "#f4b59b", "#cf4a3e", "#6f0a20")
"""Lowest to highest value; zero is white, on a dark page too."""
_CHANNELS = ("#e5322d", "#17a34a", "#2f6bff")
"""Frames of the red, green and blue channel, always in this order, for readers with a colour-vision deficiency."""
_SENSITIVE = "magma"
_SPAN = 1e-3
"""Sensitivities below this share of the largest one of a map have the same colour."""
PER_LINE = 4
"""The largest number of models in a row; the others follow below."""
_SQUARES = ("solid", "dashed", "dotted")
_SQUARE = "#38d3ff"
"""The colour of squares over maps of sensitivity, visible on all of their colours and in both themes."""


def vector_gallery(
    points: Sequence[Point], decomposition: DecompositionKind, *, right: bool = False, theme: Theme = LIGHT
) -> Figure:
    """Draws the saved vectors (An et al. Figs. 1-3): one row for each vector, one column for each model.

    A single model takes several columns. r_hom and r_lin are above the vectors of each model; vectors that one of them
    lacks are left blank. `right` draws the right singular vectors, directions of the input, instead of the left ones.

    The colours of a vector go from minus to plus its largest entry over all channels, so that its channels can be
    compared. The panels of a colour image have red, green and blue frames, in this order. Raises DitlabError for no
    saved vector, or images of several sizes.
    """
    shape = _one_shape("vector gallery", points)
    shown = sorted({int(k) for _, point in points for k in point.shown})
    if not shown:
        raise DitlabError("vector gallery: expected a Jacobian with saved vectors, found none")
    panel = 0.74 if shape[0] > 1 else 0.95
    wide, high = panel * shape[0] + 0.22, panel * shape[1] / shape[2] + 0.26
    lines, per_line = -(-len(points) // PER_LINE), min(len(points), PER_LINE)
    # A single model has the page to itself, so its vectors continue in further columns.
    across = 1 if len(points) > 1 else min(len(shown), max(1, int(6.6 / wide)))
    rows = -(-len(shown) // across)
    across = -(-len(shown) // rows)
    names = [wrapped(label, max(10, int(wide * 11))) for label, _ in points]
    gaps = [wrapped(_gaps(point), max(11, int(wide * 14))) for _, point in points]
    rise = 10 * (1 + max(text.count("\n") for text in gaps))
    head = 0.3 + 0.2 * (1 + max(name.count("\n") for name in names)) + rise / 72
    with canvas(wide * across * per_line + 0.2, (high * rows + head + 0.1) * lines, theme) as figure:
        grid = figure.subplots(rows * lines, across * per_line, squeeze=False)
        for cell in grid.flat:
            cell.axis("off")
        for place, (_, point) in enumerate(points):
            line, run = divmod(place, PER_LINE)
            block = grid[line * rows : (line + 1) * rows, run * across : (run + 1) * across]
            for cell, k in zip(block.T.flat, shown, strict=False):
                _draw_vector(cell, point, k, decomposition, right, theme)
            for text, up, style in (
                (gaps[place], 17, {"fontsize": 7.5, "color": theme.muted}),
                (names[place], 17 + rise, {"fontsize": 9, "fontweight": "bold", "color": theme.ink}),
            ):
                block[0, 0].annotate(
                    text, (0.0, 1.0), (0, up), "axes fraction", "offset points", ha="left", va="bottom", **style
                )
    return figure


def _gaps(point: JacobianPoint) -> str:
    """Returns r_hom and r_lin, which show how far the vectors can be trusted."""
    values = ((name, point.numbers.get(name)) for name in ("r_hom", "r_lin"))
    return ", ".join(f"{name} {'–' if value is None else f'{value:.2g}'}" for name, value in values)


def _one_shape(what: str, points: Sequence[Point]) -> tuple[int, int, int]:
    if not points:
        raise DitlabError(f"{what}: expected at least one Jacobian, found none")
    shape = points[0][1].clean.shape
    for label, point in points:
        if point.clean.shape != shape:
            raise DitlabError(
                f"{what}: expected images of one size, found {list(shape)} and {list(point.clean.shape)} ('{label}')"
            )
    return shape


def _draw_vector(
    axes: Axes, point: JacobianPoint, k: int, decomposition: DecompositionKind, right: bool, theme: Theme
) -> None:
    """Draws the panels of a vector, with its index and value above; nothing if it was not saved."""
    places = np.flatnonzero(point.shown == k)
    if not len(places):
        return
    vector = (point.right if right else point.left)[places[0]]
    axes.imshow(_panels(vector, theme), interpolation="nearest")
    words = f"k = {k}, {'s' if decomposition == 'svd' else 'λ'} = {value_text(point.values[k])}"
    axes.set_title(words, fontsize=7.5, fontweight="normal", loc="left", pad=2.5, color=theme.ink)


def _panels(vector: np.ndarray, theme: Theme) -> np.ndarray:
    """Returns the channels of a vector [C, H, W] side by side, float64 [h, w, 4], enlarged so that pixels are sharp."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    colours = LinearSegmentedColormap.from_list("zero is white", _DIVERGING)
    largest = max(float(np.abs(vector).max()), 1e-30)
    scale = max(1, round(96 / vector.shape[2]))
    edge, gap = 4, 7
    frames = _CHANNELS if len(vector) == 3 else (theme.muted,) * len(vector)
    panels = []
    for channel, frame in zip(vector, frames, strict=True):
        inside = colours(0.5 + channel / (2 * largest)).repeat(scale, 0).repeat(scale, 1)
        panel = np.empty((inside.shape[0] + 2 * edge, inside.shape[1] + 2 * edge, 4))
        panel[:] = to_rgba(frame)
        panel[edge:-edge, edge:-edge] = inside
        panels += [panel, np.zeros((len(panel), gap, 4))]
    return np.concatenate(panels[:-1], axis=1)


def value_text(value: complex | float) -> str:
    """Returns a singular value or eigenvalue with three significant digits: "0.834", "0.71 - 0.02i"."""
    if abs(value.imag) <= 5e-4 * abs(value):
        return f"{value.real:.3g}"
    return f"{value.real:.2g} {'-' if value.imag < 0 else '+'} {abs(value.imag):.2g}i"


Pixels = Callable[[np.ndarray], np.ndarray]
"""From images as denoisers see them, float32 [N, C, H, W], to pictures, uint8 [N, 1 or 3, H, W]."""


def denoising_strip(points: Sequence[Point], pixels: Pixels, *, theme: Theme = LIGHT) -> Figure:
    """Draws the clean image, the noisy image and the estimate of each model, with PSNR.

    Models with the same noisy image share a line; others get a line of their own. Raises DitlabError for no Jacobian,
    or images of several sizes.
    """
    shape = _one_shape("denoising strip", points)
    lines: list[list[Point]] = []
    for label, point in points:
        for line in lines:
            if np.array_equal(line[0][1].noisy, point.noisy) and len(line) < PER_LINE:
                line.append((label, point))
                break
        else:
            lines.append([(label, point)])
    columns = 2 + max(len(line) for line in lines)
    side = 1.35
    titles = {label: wrapped(label, 18) for label, _ in points}
    high = side * shape[1] / shape[2] + 0.15 * (2 + max(title.count("\n") for title in titles.values()))
    with canvas(side * columns + 0.1, (high + 0.08) * len(lines), theme) as figure:
        axes = figure.subplots(len(lines), columns, squeeze=False)
        for line, row in zip(lines, axes, strict=True):
            point = line[0][1]
            noisy = f"noisy, σ = {point.sigma:.3g}\n{psnr(point.noisy, point.clean):.1f} dB"
            shown = [("clean\n", point.clean), (noisy, point.noisy)]
            shown += [(f"{titles[label]}\n{psnr(at.denoised, at.clean):.1f} dB", at.denoised) for label, at in line]
            for cell in row:
                cell.axis("off")
            for cell, (words, image) in zip(row, shown, strict=False):
                picture = pixels(image[None])[0].transpose(1, 2, 0)
                cell.imshow(picture.repeat(3, axis=2) if picture.shape[2] == 1 else picture, interpolation="nearest")
                cell.set_title(words, fontsize=8, fontweight="normal", loc="left", pad=3, color=theme.ink)
    return figure


def psnr(image: np.ndarray, clean: np.ndarray) -> float:
    """Returns the PSNR of an image in dB, for an intensity range of 2."""
    error = np.square(image.astype(np.float64) - clean).mean()
    return float(10 * np.log10(4 / max(error, 1e-10)))


def sensitivity_maps(points: Sequence[Point], *, theme: Theme = LIGHT) -> Figure:
    """Draws what output pixels depend on: the centred mean map and maps of single pixels, the Wiener denoiser's below.

    Colours are logarithmic over three decades below the largest value of a map. Squares hold 50, 75 and 95 % of a map;
    in the mean map their sides are the means over all output pixels. Jacobians without sensitivities are left out; the
    Wiener denoisers of equal training images are drawn once. Raises DitlabError for no sensitivity, or several sizes.
    """
    _one_shape("sensitivity maps", points)
    rows = [(label, point.sensitivity) for label, point in points if point.sensitivity is not None]
    if not rows:
        raise DitlabError("sensitivity maps: expected a whole Jacobian of the target x0, found none")
    rows += _wiener_rows(points)
    columns = 1 + max(len(maps.pixels) for _, maps in rows)
    side = 1.75
    title: Any = {"fontsize": 8.5, "fontweight": "normal", "loc": "left", "pad": 4}
    with canvas(side * columns + 2.3, side * len(rows) + 0.75, theme) as figure:
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for cell in axes.flat:
            cell.axis("off")
        shown: Any = None
        for number, (line, (label, maps)) in enumerate(zip(axes, rows, strict=True)):
            shown = _draw_mean(line[0], maps)
            for cell, (row, column), values in zip(line[1:], maps.pixels, maps.maps, strict=False):
                _draw_sensitivity(cell, values, (row, column), maps.sizes[:, row, column].tolist())
                if number == 0:
                    cell.set_title(f"pixel {row}, {column}", **title)
            words = "  ".join(f"{share:.0%}: {size:.1f}" for share, size in zip(SHARES, maps.locality, strict=True))
            name = wrapped(label, 15)
            below: Any = {"ha": "left", "va": "top", "fontsize": 7.5, "color": theme.ink}
            beside: Any = {"ha": "right", "va": "center", "fontsize": 9, "fontweight": "bold", "color": theme.ink}
            line[0].annotate(words, (0.0, 0.0), (0, -3), "axes fraction", "offset points", **below)
            line[0].annotate(name, (0.0, 0.5), (-8, 0), "axes fraction", "offset points", **beside)
        axes[0, 0].set_title("mean, centred", **title)
        bar = figure.colorbar(shown, ax=list(axes[:, -1]), shrink=min(0.9, 1.6 / len(rows)), aspect=25, extend="min")
        bar.set_label("share of the largest", fontsize=8, color=theme.ink)
        bar.ax.tick_params(labelsize=7.5)
        words = (
            "Sensitivity of an output pixel to the input; squares: 50 % solid, 75 % dashed, 95 % dotted; "
            "sides in pixels"
        )
        words = wrapped(words, int((side * columns + 2.3) * 15))
        figure.suptitle(words, fontsize=8.5, x=0.01, ha="left", color=theme.ink)
    return figure


def _wiener_rows(points: Sequence[Point]) -> list[tuple[str, Sensitivity]]:
    """Returns the sensitivities of the Wiener denoisers, named by their training images if there are several."""
    rows: list[tuple[str, Sensitivity]] = []
    for label, point in points:
        if point.wiener is not None and not any(np.array_equal(point.wiener.centred, w.centred) for _, w in rows):
            rows.append((label, point.wiener))
    return [("Wiener" if len(rows) == 1 else f"Wiener, images of {label}", maps) for label, maps in rows]


def _draw_mean(axes: Axes, maps: Sensitivity) -> Any:
    """Draws the middle of the mean map, as large as an image, so that its pixels have the size of the other maps'."""
    height, width = maps.sizes.shape[1:]
    top, left = (height - 1) // 2, (width - 1) // 2
    middle = maps.centred[top : top + height, left : left + width]
    return _draw_sensitivity(axes, middle, (height - 1 - top, width - 1 - left), maps.locality)


def _draw_sensitivity(axes: Axes, values: np.ndarray, centre: tuple[int, int], sizes: Sequence[float]) -> Any:
    """Draws a map with its squares about the output pixel, cut at the border; returns the image for a colour bar."""
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    largest = max(float(values.max()), 1e-30)
    shown = axes.imshow(
        np.maximum(values / largest, _SPAN / 10), cmap=_SENSITIVE, norm=LogNorm(_SPAN, 1.0), interpolation="nearest"
    )
    rows, columns = values.shape
    for size, dashes in zip(sizes, _SQUARES, strict=True):
        top, left = (max(at - size / 2, -0.5) for at in centre)
        bottom, right = (min(at + size / 2, end - 0.5) for at, end in zip(centre, (rows, columns), strict=True))
        axes.add_patch(
            Rectangle((left, top), right - left, bottom - top, fill=False, ec=_SQUARE, lw=1.3, ls=dashes, clip_on=False)
        )
    return shown
