"""The logs of several runs: PSNR and losses along training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ditlab.analyses.trajectory.comparison import MatchedComparison, Trajectory, compare_kinds
from ditlab.errors import DitlabError
from ditlab.models.comparing import ModelSet
from ditlab.models.model import Model

__all__ = ["Course", "thinned", "trajectory_of"]

LOG_LINES = 500
"""Lines of a log that a page has, at most."""
Log = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Course:
    """What the logs of several runs say."""

    trajectories: tuple[Trajectory, ...]
    """PSNR along training of each run that measured it."""
    matched: tuple[MatchedComparison, ...]
    """Each two kinds at each N that share a seed."""
    logs: Mapping[tuple[int | None, str], Log]
    """(N, kind) -> the log of its first run."""
    latents: bool = False
    """Whether the PSNRs are those of latents."""
    notes: tuple[str, ...] = ()
    """Why kinds are not compared, where they cannot be, and which test images were used, where others are elsewhere."""

    @classmethod
    def of(cls, models: ModelSet) -> Course:
        """Reads the logs of those models that have one."""
        logged = [(model, kind, log) for model, kind in zip(models, models.kinds, strict=True) if (log := model.log)]
        logs: dict[tuple[int | None, str], Log] = {}
        for model, kind, log in sorted(logged, key=lambda part: part[0].split_record.train):
            logs.setdefault((model.split_record.train, kind), log)
        trajectories = [t for model, kind, _ in logged if (t := trajectory_of(model, kind)) is not None]
        try:
            matched, notes = tuple(compare_kinds(trajectories)), ()
        except DitlabError as error:
            matched, notes = (), (f"Not compared: {error}.",)
        if any(model.held_out is not None for model, _, _ in logged):
            notes = (*notes, "Test PSNR is that of the runs' own test images, not of `held_out`.")
        latents = any("codec" in model.settings for model in models)
        return cls(tuple(trajectories), matched, logs, latents, notes)

    @property
    def counts(self) -> tuple[int | None, ...]:
        """The numbers of training images, ascending."""
        return tuple(dict.fromkeys(n for n, _ in self.logs))

    @property
    def labels(self) -> tuple[str, ...]:
        """The kinds of runs that have a log."""
        return tuple(dict.fromkeys(label for _, label in self.logs))


def trajectory_of(model: Model, kind: str) -> Trajectory | None:
    """Returns PSNR along the training of a run; None where its log has none."""
    log, split = model.log, model.split_record
    if not any("psnr_gap" in line for line in log):
        return None
    return Trajectory.from_log(kind, split.seed, log, n=split.train, split_family=split.family)


def thinned(log: Log) -> list[Mapping[str, Any]]:
    """Returns the log, or every second, third, ... line of it and all with measurements."""
    every = -(-len(log) // LOG_LINES)
    return [line for i, line in enumerate(log) if every <= 1 or i % every == 0 or "psnr_gap" in line]
