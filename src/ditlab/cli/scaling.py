"""How runs of networks of several sizes scale: gathered for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ditlab.analyses.scaling.points import ScalingPoint, by_sampling, measured, read_evaluations, scaling_points
from ditlab.metrics.complexity import complexity
from ditlab.models.model import Model
from ditlab.models.run import Run
from ditlab.networks.registry import build_network

Scaling = Mapping[int, Sequence[ScalingPoint]]
"""Number of training images -> the points of its runs."""

NAMES = r"scaling(-n\w+)?|sampling-compute(-n\w+)?"
"""The names of its figures, as a regular expression."""


def gather(runs: Sequence[Model], labels: Sequence[str], names: Sequence[str]) -> Scaling:
    """The points of the runs by N, where networks of several sizes (numbers of parameters) were trained on as many.

    Attention plans alone make no other size. Runs of ditlab alone: what another's checkpoint cost is not known.

    Raises:
        DitlabError: an evaluation that cannot be read.
    """
    found: dict[int, list[ScalingPoint]] = {}
    costs: dict[Any, tuple[int, float]] = {}
    for run, label, name in zip(runs, labels, names, strict=True):
        if not isinstance(run, Run):
            continue
        network = run.config.network
        if network not in costs:
            costs[network] = _cost(run)
        about = ScalingPoint(name, label, *costs[network], run.config.training.batch_size, 0)
        points = scaling_points(about, run.log, read_evaluations(run.path / "evaluation"))
        found.setdefault(run.split_record.train, []).extend(points)
    return {n: points for n, points in sorted(found.items()) if len({point.parameters for point in points}) > 1}


def _cost(run: Run) -> tuple[int, float]:
    """Parameters and GMACs of a run's network."""
    with torch.device("meta"):
        network = build_network(run.config.network)
    counted = complexity(network, run.images.shape, labelled=run.conditional, memory=False)
    return counted.parameters, counted.gmacs


def drawings(scaling: Scaling, slots: Mapping[str, int], *, several: bool) -> dict[str, tuple[Any, str, str]]:
    """File name -> (drawing of a theme, alt text, caption).

    Args:
        scaling: what `gather` found.
        slots: colours of the labels.
        several: whether the report has several N, so that names and captions say which.
    """
    from ditlab.analyses.scaling.figures import sampling_figure, scaling_figure

    found: dict[str, tuple[Any, str, str]] = {}
    for n, points in scaling.items():
        ending, which = (f"-n{n}", f"N = {n}. ") if several else ("", "")
        found[f"scaling{ending}"] = (
            lambda theme, points=points: scaling_figure(points, slots=slots, theme=theme),
            f"{which}What was measured against GMACs, training steps and training compute.",
            f"{which}GMACs of a forward pass for one image; training compute is GMACs x batch size x steps x 3.",
        )
        if any(by_sampling(points, metric) for metric in measured(points)):
            found[f"sampling-compute{ending}"] = (
                lambda theme, points=points: sampling_figure(points, slots=slots, theme=theme),
                f"{which}What was measured of samples against the compute of one sample.",
                f"{which}Compute of a sample: GMACs times network calls; a dot a number of sampling steps.",
            )
    return found
