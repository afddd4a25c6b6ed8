"""The logs of several runs: PSNR and losses along training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ditlab.analyses.trajectory.comparison import MatchedComparison, Trajectory, compare_kinds
from ditlab.errors import DitlabError
from ditlab.models.comparing import ModelSet

__all__ = ["Course", "trajectory_of"]

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
        trajectories: list[Trajectory] = []
        logs: dict[tuple[int | None, str], Log] = {}
        for model, kind in zip(models, models.kinds, strict=True):
            if not model.log:
                continue
            logs.setdefault((model.split_record.train, kind), model.log)
            trajectory = trajectory_of(model, kind)
            if trajectory is not None:
                trajectories.append(trajectory)
        latents = any("codec" in model.settings for model in models)
        try:
            matched, notes = tuple(compare_kinds(trajectories)), ()
        except DitlabError as error:
            matched, notes = (), (f"Not compared: {error}.",)
        if any(model.held_out is not None and model.log for model in models):
            notes = (*notes, "Test PSNR is that of the runs' own test images, not of `held_out`.")
        ordered = dict(sorted(logs.items(), key=lambda item: item[0][0] or -1))
        return cls(tuple(trajectories), matched, ordered, latents, notes)

    @property
    def counts(self) -> tuple[int | None, ...]:
        """The numbers of training images, ascending."""
        return tuple(dict.fromkeys(n for n, _ in self.logs))

    @property
    def labels(self) -> tuple[str, ...]:
        """The kinds of runs that have a log."""
        return tuple(dict.fromkeys(label for _, label in self.logs))

    def logs_of(self, n: int | None) -> dict[str, Log]:
        """Returns kind -> log, at this N."""
        return {label: log for (count, label), log in self.logs.items() if count == n}

    @staticmethod
    def thinned(log: Log) -> list[Mapping[str, Any]]:
        """Returns the log, or every second, third, ... line of it and all with measurements."""
        every = -(-len(log) // LOG_LINES)
        return [line for i, line in enumerate(log) if every <= 1 or i % every == 0 or "psnr_gap" in line]


def trajectory_of(model: Any, kind: str) -> Trajectory | None:
    """Returns PSNR along the training of a run; None where its log has none.

    Args:
        model: a `Model`.
        kind: what runs that differ only in seed share.
    """
    lines = [line for line in model.log if "psnr_gap" in line]
    if not lines:
        return None
    split = model.split_record
    return Trajectory.from_log(kind, split.seed, lines, n=split.train, split_family=split.family)
