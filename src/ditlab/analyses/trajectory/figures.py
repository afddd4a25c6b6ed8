"""Figures along training: the gap against steps, test PSNR against train PSNR, and the losses of the log.

The first shows when a gap opens; the second, whether runs that fit the training images equally well differ on others
(a higher curve generalizes better at the same fit).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ditlab.analyses.trajectory.comparison import MatchedComparison, Trajectory
from ditlab.errors import DitlabError
from ditlab.pages.theme import LIGHT, Slots, Theme, assign, canvas, plain_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_LAST_DB = 5.0
"""How much of the way up, in dB of train PSNR, the matched figure shows at most."""
_LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "loss": ("batches", {"lw": 0.8, "alpha": 0.4}),
    "train_loss": ("train images", {"lw": 1.8}),
    "test_loss": ("test images", {"lw": 1.8, "ls": (0, (3.5, 1.6))}),
}
"""Losses of a log, their names and lines."""


def gap_along_training(
    trajectories: Sequence[Trajectory], *, latents: bool = False, slots: Slots | None = None, theme: Theme = LIGHT
) -> Figure:
    """The average PSNR gap and the test PSNR against training steps; thin lines are seeds, thick ones their mean.

    The best test PSNR of each kind of run is marked. Where PSNRs are those of latents, titles and axes say so.

    Raises:
        DitlabError: no trajectory.
    """
    runs = _by_label(trajectories)
    slots, psnr = slots or assign(runs), "PSNR of latents" if latents else "PSNR"
    with canvas(7.6, 3.6, theme) as figure:
        left, right = figure.subplots(1, 2)
        for label, mine in runs.items():
            color = theme.run(slots[label])
            gap = _draw_mean(left, mine, [t.gap for t in mine], color)
            gap.set_label(label if len(mine) == 1 else f"{label} (mean of {len(mine)} seeds)")
            _draw_mean(right, mine, [t.test for t in mine], color)
            for t in mine:
                _mark_best(right, t, t.steps, color, theme)
        left.set(xlabel="training step", ylabel=f"average gap of {psnr} (dB)" if latents else "average PSNR gap (dB)")
        left.set_title("Gap", pad=8)
        left.set_ylim(bottom=0)
        right.set(xlabel="training step", ylabel=f"test {psnr} (dB)")
        right.set_title(f"Test {psnr} (star: best)", pad=8)
        _focus(right, [t.test for t in trajectories])
        for axes in (left, right):
            _thousands(axes)
        figure.legend(loc="outside lower left", ncols=min(3, len(runs)))
    return figure


def matched_psnr(
    trajectories: Sequence[Trajectory],
    comparison: MatchedComparison | None = None,
    *,
    latents: bool = False,
    slots: Slots | None = None,
    theme: Theme = LIGHT,
) -> Figure:
    """Test PSNR against train PSNR along training, with the line of no gap.

    With a comparison, the highest train PSNR that both sides reached is marked for each seed. Where PSNRs are those of
    latents, titles and axes say so.

    Raises:
        DitlabError: no trajectory.
    """
    runs = _by_label(trajectories)
    slots, psnr = slots or assign(runs), "PSNR of latents" if latents else "PSNR"
    with canvas(6.2, 4.6, theme) as figure:
        axes = figure.subplots()
        # The early part, where train and test rise together, is the same for all runs: the figure starts where the
        # gap of some run first opens.
        start = min(_opening(t) for t in trajectories)
        for label, mine in runs.items():
            color = theme.run(slots[label])
            for i, t in enumerate(mine):
                name = None if i else label if len(mine) == 1 else f"{label} ({len(mine)} seeds)"
                axes.plot(t.train, t.test, color=color, lw=1.6, marker="o", ms=3.2, mew=0, label=name, alpha=0.9)
                _mark_best(axes, t, t.train, color, theme)
        high = max(max(t.train) for t in trajectories)
        tests = [v for t in trajectories for u, v in zip(t.train, t.test, strict=True) if u >= start]
        low_y, high_y = min(tests), max(tests)
        room = max(high_y - low_y, 0.3)
        axes.set_xlim(start - 0.04 * (high - start), high + 0.05 * (high - start))
        axes.set_ylim(low_y - 0.12 * room, high_y + 0.3 * room)
        axes.axline((start, start), slope=1, color=theme.muted, lw=1.1, ls=(0, (1, 2)), label="no gap (test = train)")
        if comparison is not None:
            _mark_matches(axes, comparison, theme)
        axes.set(xlabel=f"train {psnr} (dB), rising along training", ylabel=f"test {psnr} (dB)")
        axes.set_title(f"Test against train {psnr} (star: best test PSNR)", pad=8)
        figure.legend(loc="outside lower left", ncols=2)
    return figure


def loss_curves(
    logs: Mapping[str, Sequence[Mapping[str, Any]]], *, slots: Slots | None = None, theme: Theme = LIGHT
) -> Figure:
    """Losses from logs, by label: each batch interval thin, held-out train and test loss thick.

    Lines have `loss`, some of them `train_loss` and `test_loss`.

    Raises:
        DitlabError: no log has a loss.
    """
    from matplotlib.lines import Line2D

    logs = {label: lines for label, lines in logs.items() if any("loss" in r or "train_loss" in r for r in lines)}
    if not logs:
        raise DitlabError("figure: expected a log with losses, found none")
    slots = slots or assign(logs)
    with canvas(6.8, 3.8, theme) as figure:
        axes = figure.subplots()
        for label, lines in logs.items():
            for key, (_, style) in _LOSSES.items():
                points = [(r["step"], r[key]) for r in lines if r.get(key) is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), color=theme.run(slots[label]), **style)
        axes.set_yscale("log")
        plain_log(axes.yaxis, axes.get_ylim())
        _thousands(axes)
        axes.set(xlabel="training step", ylabel="denoising loss")
        axes.set_title("Loss", pad=8)
        handles = [Line2D([], [], color=theme.run(slots[label]), label=label) for label in logs]
        handles += [Line2D([], [], color=theme.ink, label=name, **style) for name, style in _LOSSES.values()]
        figure.legend(handles=handles, loc="outside lower left", ncols=3)
    return figure


def _by_label(trajectories: Sequence[Trajectory]) -> dict[str, list[Trajectory]]:
    if not trajectories:
        raise DitlabError("figure: expected at least one run with PSNR along its training, found none")
    labels = dict.fromkeys(t.label for t in trajectories)
    return {label: [t for t in trajectories if t.label == label] for label in labels}


def _thousands(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _mark_best(axes: Axes, t: Trajectory, x: Sequence[Any], color: str, theme: Theme) -> None:
    star = {"marker": "*", "s": 80, "edgecolor": theme.background, "lw": 0.6, "zorder": 4}
    axes.scatter([x[t.best]], [t.test[t.best]], color=color, **star)


def _draw_mean(axes: Axes, runs: Sequence[Trajectory], values: Sequence[Sequence[float]], color: str) -> Any:
    """Each seed thin and their mean thick where all were measured at the same steps; returns the labelled line."""
    if len(runs) == 1:
        return axes.plot(runs[0].steps, values[0], color=color, lw=2.2)[0]
    seeds = [axes.plot(t.steps, v, color=color, lw=1.0, alpha=0.45)[0] for t, v in zip(runs, values, strict=True)]
    if len({t.steps for t in runs}) > 1:
        return seeds[0]
    return axes.plot(runs[0].steps, np.mean(values, axis=0), color=color, lw=2.2)[0]


def _focus(axes: Axes, curves: Sequence[Sequence[float]]) -> None:
    """Limits the y axis to where the curves end and peak: the steep first steps would flatten everything else."""
    high = max(max(c) for c in curves)
    low = min(min(c[len(c) // 4 :]) for c in curves)
    room = max(high - low, 0.5)
    axes.set_ylim(low - 0.12 * room, high + 0.12 * room)


def _opening(trajectory: Trajectory) -> float:
    """Train PSNR of the first point of interest: where the gap opens, or else the last few dB before the end."""
    threshold = max(trajectory.gap) / 20
    first = next((i for i, gap in enumerate(trajectory.gap) if gap > threshold), 0)
    return max(trajectory.train[max(first - 1, 0)], max(trajectory.train) - _LAST_DB)


def _mark_matches(axes: Axes, comparison: MatchedComparison, theme: Theme) -> None:
    name: str | None = "matched train PSNR"
    for seed in comparison.seeds:
        if seed.matched_train is not None and seed.test_matched is not None:
            axes.axvline(seed.matched_train, color=theme.muted, lw=0.9, ls=(0, (4, 3)), zorder=1, label=name)
            rings = {"facecolors": "none", "edgecolors": theme.ink, "s": 55, "lw": 1.1, "zorder": 5}
            axes.scatter([seed.matched_train] * 2, seed.test_matched, **rings)
            name = None
