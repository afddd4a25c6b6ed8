"""How a run's quality goes with what it cost: operations of the network, training steps, training and sampling compute.

The quantities of Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), figures 2, 6, 8, 9 and 10. What
is measured comes from a run's log (losses and PSNR along training) and from its evaluations (FID and the like). An
evaluation is a file evaluation/NAME.json in the run's folder, of the form

    {"step": 400000, "sampler_steps": 250, "nfe": 250, "metrics": {"fid": 12.3, "is": 98.7}}

No verb writes one yet: those that are there are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ditlab.errors import DitlabError
from ditlab.metrics.complexity import complexity, training_compute
from ditlab.models.comparing import ModelSet
from ditlab.models.run import Run
from ditlab.networks.registry import build_network
from ditlab.pages.page import Table

WORDS: Mapping[str, str] = {
    "loss": "loss of batches",
    "test_loss": "loss on test images",
    "test_psnr": "test PSNR (dB)",
    "fid": "FID",
    "sfid": "sFID",
    "is": "Inception score",
    "precision": "precision",
    "recall": "recall",
}
"""What is drawn, in this order, as axes name it: losses of the log, mean PSNR on test images, evaluators' numbers."""
_PARTS = 20
"""The batches' loss is averaged over as many parts of the training: each line of a log is noisy."""


@dataclass(frozen=True)
class ScalingPoint:
    """What was measured of one run at one training step, with one sampler where it took samples."""

    run: str
    label: str
    """What runs that differ only in seed and N share."""
    parameters: int
    gmacs: float
    """Of a forward pass, one image (`analysis.complexity`)."""
    batch_size: int
    step: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Some of `WORDS`, by name."""
    nfe: int | None = None
    """Network calls that a sample took, for metrics of samples."""

    @property
    def training_gmacs(self) -> float:
        """Training compute until this step."""
        return training_compute(self.gmacs, self.batch_size, self.step)

    @property
    def sampling_gmacs(self) -> float | None:
        """Compute of one sample: GMACs times network calls; None without samples."""
        return None if self.nfe is None else self.gmacs * self.nfe

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        derived = {"training_gmacs": self.training_gmacs, "sampling_gmacs": self.sampling_gmacs}
        return {**asdict(self), "metrics": dict(self.metrics), **derived}


def scaling_points(
    about: ScalingPoint, log: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]] = ()
) -> list[ScalingPoint]:
    """The points of one run: its parts of the log with their mean loss, lines with measurements, and evaluations.

    Args:
        about: the run, with any step.
        log: lines of log.jsonl.
        evaluations: of `read_evaluations`.
    """
    points = []
    losses = [(int(line["step"]), float(line["loss"])) for line in log if line.get("loss") is not None]
    for part in np.array_split(np.array(losses, float).reshape(-1, 2), min(_PARTS, len(losses)) or 1):
        if len(part) and np.isfinite(part[:, 1]).all():
            points.append(replace(about, step=int(part[-1, 0]), metrics={"loss": float(part[:, 1].mean())}))
    for line in log:
        metrics = {name: float(line[name]) for name in ("test_loss", "test_psnr") if line.get(name) is not None}
        if metrics:
            points.append(replace(about, step=int(line["step"]), metrics=metrics))
    for record in evaluations:
        metrics = {name: float(record["metrics"][name]) for name in WORDS if record["metrics"].get(name) is not None}
        points.append(replace(about, step=int(record["step"]), metrics=metrics, nfe=record.get("nfe")))
    return [point for point in points if point.step > 0 and point.metrics]


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Returns the records in a run's evaluation folder, by file name; empty where there is none.

    Raises:
        DitlabError: a file that is not of the form that this module's head describes.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise DitlabError(f"{path}: expected an evaluation as JSON, found something else") from None
        whole = isinstance(record, dict) and isinstance(record.get("step"), int)
        metrics = record.get("metrics") if whole else None
        if not isinstance(metrics, dict) or not all(_is_number(value) for value in metrics.values()):
            raise DitlabError(f"{path}: expected an evaluation with a step and metrics (numbers by name), found none")
        if not isinstance(record.get("nfe"), int | None):
            raise DitlabError(f"{path}: expected nfe to be a whole number, found {record['nfe']!r}")
        records.append(record)
    return records


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def measured(points: Sequence[ScalingPoint]) -> tuple[str, ...]:
    """Those of `WORDS` that some point has."""
    return tuple(name for name in WORDS if any(name in point.metrics for point in points))


def along_training(points: Sequence[ScalingPoint], metric: str) -> dict[str, list[ScalingPoint]]:
    """Run -> its points with this metric by step, of several evaluations at a step the one with most network calls."""
    runs: dict[str, dict[int, ScalingPoint]] = {}
    for point in points:
        if metric in point.metrics:
            steps = runs.setdefault(point.run, {})
            if point.step not in steps or (point.nfe or 0) > (steps[point.step].nfe or 0):
                steps[point.step] = point
    return {run: [steps[step] for step in sorted(steps)] for run, steps in runs.items()}


def by_sampling(points: Sequence[ScalingPoint], metric: str) -> dict[str, list[ScalingPoint]]:
    """Run -> its points with this metric at the last step where samples were taken, by network calls."""
    runs: dict[str, list[ScalingPoint]] = {}
    for run in dict.fromkeys(point.run for point in points):
        mine = [p for p in points if p.run == run and p.nfe is not None and metric in p.metrics]
        last = [p for p in mine if p.step == max(q.step for q in mine)]
        if last:
            runs[run] = sorted(last, key=lambda p: p.nfe or 0)
    return runs


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
