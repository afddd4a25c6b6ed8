"""The points of runs whose networks differ in size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ditlab.analyses.scaling.figures import WORDS
from ditlab.analyses.scaling.points import ScalingPoint, along_training, measured, read_evaluations, scaling_points
from ditlab.metrics.complexity import complexity
from ditlab.models.comparing import ModelSet
from ditlab.models.run import Run
from ditlab.networks.registry import build_network
from ditlab.pages.page import Table

__all__ = ["Sizes", "best_sentence", "sizes_table"]


@dataclass(frozen=True, eq=False)
class Sizes:
    """The points of runs, where networks of several sizes were trained on as many images."""

    by_n: Mapping[int, Sequence[ScalingPoint]]
    """Number of training images -> points of at least two numbers of parameters."""
    several: bool
    """Whether the models have several N, so that names and captions say which."""

    @classmethod
    def of(cls, models: ModelSet) -> Sizes:
        """Reads logs and evaluations of ditlab's own runs; what training another's checkpoint cost is not known.

        Attention plans alone make no other size.

        Raises:
            DitlabError: an evaluation that cannot be read.
        """
        by_n: dict[int, list[ScalingPoint]] = {}
        costs: dict[Any, tuple[int, float]] = {}
        for model, kind, name in zip(models, models.kinds, models.names, strict=True):
            if not isinstance(model, Run):
                continue
            network = model.config.network
            if network not in costs:
                costs[network] = _cost(model)
            about = ScalingPoint(name, kind, *costs[network], model.config.training.batch_size, 0)
            points = scaling_points(about, model.log, read_evaluations(model.path / "evaluation"))
            by_n.setdefault(model.split_record.train, []).extend(points)
        sized = {n: points for n, points in sorted(by_n.items()) if len({point.parameters for point in points}) > 1}
        return cls(sized, len(by_n) > 1)

    @property
    def points(self) -> list[ScalingPoint]:
        """The points of all N."""
        return [point for points in self.by_n.values() for point in points]

    def sentences(self) -> list[str]:
        """Returns which network reached most."""
        return list(filter(None, [best_sentence(self.points)]))

    def to_json(self) -> dict[str, Any]:
        """Returns all points."""
        return {"points": [point.to_json() for point in self.points]}


def _cost(run: Run) -> tuple[int, float]:
    """Parameters and GMACs of a run's network."""
    with torch.device("meta"):
        network = build_network(run.config.network)
    counted = complexity(network, run.images.shape, labelled=run.conditional, memory=False)
    return counted.parameters, counted.gmacs


def sizes_table(points: Sequence[ScalingPoint]) -> Table:
    """Returns a row for each run, with its cost and its last values."""
    metrics = measured(points)
    last = {metric: {run: mine[-1] for run, mine in along_training(points, metric).items()} for metric in metrics}
    rows = []
    for run in dict.fromkeys(point.run for point in points):
        end = max((point for point in points if point.run == run), key=lambda point: point.step)
        values = [last[metric][run].metrics[metric] if run in last[metric] else None for metric in metrics]
        rows.append((run, end.label, end.parameters / 1e6, end.gmacs, end.step, f"{end.training_gmacs:.2e}", *values))
    words = (WORDS[metric] for metric in metrics)
    columns = ("run", "kind", "parameters, M", "GMACs", "steps", "training, GMACs", *words)
    return Table(columns, rows, digits=3)


def best_sentence(points: Sequence[ScalingPoint]) -> str:
    """Returns which run has the lowest FID, or else the highest test PSNR, at its last step; "" where none has any."""
    for metric, best in (("fid", min), ("test_psnr", max)):
        last = [mine[-1] for mine in along_training(points, metric).values()]
        if last:
            chosen = best(last, key=lambda point: point.metrics[metric])
            side = "lowest" if best is min else "highest"
            return (
                f"{chosen.run} ({chosen.gmacs:.3g} GMACs) has the {side} {WORDS[metric]} of {len(last)} runs at the "
                f"end: {chosen.metrics[metric]:.2f}."
            )
    return ""
