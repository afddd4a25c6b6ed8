"""Figures of scaling: what was measured against operations, steps, training compute, and sampling compute.

After Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), figures 6 and 8 to 10.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ditlab.analyses.scaling.points import WORDS, ScalingPoint, along_training, by_sampling, measured
from ditlab.errors import DitlabError
from ditlab.pages.theme import LIGHT, Slots, Theme, assign, canvas, plain_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LOG = ("loss", "test_loss", "fid", "sfid")
"""Metrics that are drawn on a logarithmic axis: those that go down by factors."""
_TRAINING: tuple[tuple[str, str, Callable[[ScalingPoint], float]], ...] = (
    # title, axis, value
    ("At the end", "GMACs of a forward pass", lambda point: point.gmacs),
    ("Along training", "training steps", lambda point: point.step),
    ("By training compute", "training compute (GMACs)", lambda point: point.training_gmacs),
)


def scaling_figure(points: Sequence[ScalingPoint], *, slots: Slots | None = None, theme: Theme = LIGHT) -> Figure:
    """A row a metric: its last value of each run against GMACs, and its course against steps and training compute."""
    metrics = measured(points)
    if not metrics:
        raise DitlabError("figure: expected runs with a loss, a PSNR or an evaluation, found none")
    slots = slots or assign(point.label for point in points)
    with canvas(10.2, 2.5 * len(metrics) + 0.5, theme) as figure:
        panels = figure.subplots(len(metrics), 3, squeeze=False, sharex="col")
        for row, metric in zip(panels, metrics, strict=True):
            runs = along_training(points, metric)
            for column, (axes, (_, _, of)) in enumerate(zip(row, _TRAINING, strict=True)):
                for mine in runs.values():
                    drawn = mine if column else mine[-1:]
                    values = [point.metrics[metric] for point in drawn]
                    _draw(axes, [of(point) for point in drawn], values, mine[0].label, slots, theme)
                _finish(axes, metric)
            row[0].set_ylabel(WORDS[metric])
        for column, (title, words, _) in enumerate(_TRAINING):
            panels[0][column].set_title(title, pad=8)
            panels[-1][column].set_xlabel(words)
        _legend(figure, points, slots, theme)
    return figure


def sampling_figure(points: Sequence[ScalingPoint], *, slots: Slots | None = None, theme: Theme = LIGHT) -> Figure:
    """Each metric of samples against the compute of one sample (GMACs times network calls), a line a run."""
    metrics = [metric for metric in measured(points) if by_sampling(points, metric)]
    if not metrics:
        raise DitlabError("figure: expected evaluations with a number of network calls, found none")
    slots = slots or assign(point.label for point in points)
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    with canvas(3.6 * columns + 0.4, 2.9 * rows + 0.5, theme) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, metric in zip(panels, metrics, strict=False):
            for mine in by_sampling(points, metric).values():
                compute = [p.sampling_gmacs for p in mine]
                _draw(axes, compute, [p.metrics[metric] for p in mine], mine[0].label, slots, theme)
            axes.set(xlabel="GMACs of one sample", ylabel=WORDS[metric])
            _finish(axes, metric)
        for axes in panels[len(metrics) :]:
            axes.axis("off")
        _legend(figure, points, slots, theme)
    return figure


def _draw(axes: Axes, x: Sequence[Any], y: Sequence[float], label: str, slots: Slots, theme: Theme) -> None:
    """A run's line; dots where they are few enough to be told apart."""
    few = len(x) <= 25
    axes.plot(
        x, y, color=theme.run(slots[label]), lw=1.5, marker="o" if few else None, ms=7 if len(x) == 1 else 3.2, mew=0
    )


def _finish(axes: Axes, metric: str) -> None:
    axes.set_xscale("log")
    axes.margins(x=0.08, y=0.12)
    plain_log(axes.xaxis, axes.get_xlim())
    if metric in _LOG:
        axes.set_yscale("log")
        plain_log(axes.yaxis, axes.get_ylim())


def _legend(figure: Figure, points: Sequence[ScalingPoint], slots: Slots, theme: Theme) -> None:
    from matplotlib.lines import Line2D

    gmacs = {point.label: point.gmacs for point in points}
    handles = [
        Line2D([], [], color=theme.run(slots[label]), marker="o", ms=5, mew=0, label=f"{label} ({cost:.3g} GMACs)")
        for label, cost in gmacs.items()
    ]
    # As many columns as fit: a letter takes about 0.08 inches, a line and the space around it 0.8.
    widest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, int(figure.get_figwidth() / (0.08 * widest + 0.8)))
    figure.legend(handles=handles, loc="outside lower left", ncols=min(columns, len(handles)))
