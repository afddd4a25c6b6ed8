"""Two kinds of runs compared along training: at equal steps, at equal train PSNR, and at their best.

A gap at equal steps cannot tell a network that generalizes better from one that merely fits more slowly. So three
numbers stand side by side, for each seed: the gap at the last step that both have, the gap where both have reached the
same train PSNR, and the best test PSNR along training. Differences are paired by seed (`ditlab.metrics.paired`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from typing import Any, NamedTuple

from ditlab.errors import DitlabError
from ditlab.metrics.paired import PairedDifference, paired_difference
from ditlab.models.comparing import ModelSet
from ditlab.models.model import Model

LOG_LINES = 500
"""Lines of a log that a page has, at most."""
Log = Sequence[Mapping[str, Any]]


class Crossing(NamedTuple):
    """A run where its train PSNR first reaches a given value."""

    step: float
    test: float
    """Test PSNR there, dB."""
    gap: float
    """Average gap there, dB."""


@dataclass(frozen=True)
class Trajectory:
    """Train and test PSNR of one run along its training, averaged over noise levels."""

    label: str
    """What runs that differ only in seed share ("global")."""
    seed: int
    steps: tuple[int, ...]
    """Training steps, ascending."""
    train: tuple[float, ...]
    """Train PSNR in dB at each step."""
    test: tuple[float, ...]
    """Test PSNR in dB at each step."""
    gap: tuple[float, ...]
    """Average gap in dB at each step (truncated at each noise level where that was measured)."""
    n: int | None = None
    """Number of training images."""
    split_family: str = ""
    """As in `Provenance`: only equal families are comparable."""

    def __post_init__(self) -> None:
        where = f"trajectory of '{self.label}' (seed {self.seed})"
        if not self.steps or len({len(x) for x in (self.steps, self.train, self.test, self.gap)}) != 1:
            raise DitlabError(f"{where}: expected as many train, test and gap values as steps, at least one")
        if any(b <= a for a, b in pairwise(self.steps)):
            raise DitlabError(f"{where}: steps must be ascending without repeats")
        if not all(math.isfinite(v) for v in (*self.train, *self.test, *self.gap)):
            raise DitlabError(f"{where}: PSNR values must be finite")

    @classmethod
    def from_log(
        cls, label: str, seed: int, lines: Sequence[Mapping[str, Any]], *, n: int | None = None, split_family: str = ""
    ) -> Trajectory:
        """Reads those lines of a run's log that have `train_psnr`, `test_psnr` and `psnr_gap`."""
        names = ("step", "train_psnr", "test_psnr", "psnr_gap")
        columns = (tuple(line[name] for line in lines if "psnr_gap" in line) for name in names)
        return cls(label, seed, *columns, n=n, split_family=split_family)

    @property
    def best(self) -> int:
        """Index of the highest test PSNR (the earliest where several are equal)."""
        return max(range(len(self.steps)), key=lambda i: self.test[i])

    def crossing(self, psnr: float) -> Crossing | None:
        """Where the train PSNR first reaches `psnr` dB, everything interpolated linearly between the two points around.

        The first crossing needs no monotone curve: a train PSNR that falls back later is not counted twice.
        None where the first point is above already, or where no point reaches it.
        """
        i = next((i for i, value in enumerate(self.train) if value >= psnr), None)
        if i is None or (i == 0 and self.train[0] > psnr):
            return None
        if i == 0:
            return Crossing(float(self.steps[0]), self.test[0], self.gap[0])
        share = (psnr - self.train[i - 1]) / (self.train[i] - self.train[i - 1])
        around = (values[i - 1 : i + 1] for values in (self.steps, self.test, self.gap))
        return Crossing(*(before + share * (after - before) for before, after in around))


@dataclass(frozen=True)
class SeedComparison:
    """Both runs of one seed; pairs are (first, second), PSNR and gaps in dB."""

    seed: int
    step: int
    """The last step that both runs measured."""
    gap_at_step: tuple[float, float]
    test_at_step: tuple[float, float]
    train_at_step: tuple[float, float]
    matched_train: float | None
    """Where they are matched: the highest train PSNR that both have reached; None where ranges do not overlap."""
    gap_matched: tuple[float, float] | None
    test_matched: tuple[float, float] | None
    step_matched: tuple[float, float] | None
    best_test: tuple[float, float]
    best_step: tuple[int, int]
    note: str
    """What must be said about this seed; empty where nothing."""


@dataclass(frozen=True)
class MatchedComparison:
    """Two kinds of runs along training, seed by seed, and the differences second - first over seeds."""

    first: str
    second: str
    n: int | None
    seeds: tuple[SeedComparison, ...]
    unpaired: tuple[int, ...]
    """Seeds that only one side has; they are left out."""
    gap_at_step: PairedDifference
    gap_matched: PairedDifference | None
    """None where no seed's train PSNR ranges overlap."""
    best_test: PairedDifference

    def sentences(self) -> tuple[str, ...]:
        """The comparison in words, each sentence claiming no more than its interval allows."""
        steps = sorted({s.step for s in self.seeds})
        at = f"step {steps[0]:,}" if len(steps) == 1 else f"the last common step ({steps[0]:,} to {steps[-1]:,})"
        lines = [self.gap_at_step.sentence(f"Gap at {at}")]
        if self.gap_matched is None:
            lines.append("Gap at matched train PSNR: cannot be compared, the ranges of train PSNR do not overlap.")
        else:
            levels = [s.matched_train for s in self.seeds if s.matched_train is not None]
            low, high = min(levels), max(levels)
            shown = f"{low:.1f}" if high - low < 0.05 else f"{low:.1f} to {high:.1f}"
            lines.append(self.gap_matched.sentence(f"Gap at matched train PSNR ({shown} dB)"))
        lines.append(self.best_test.sentence("Best test PSNR along training"))
        return (*lines, *self.notes())

    def notes(self) -> list[str]:
        """Returns notes on seeds that are left out or cannot be matched, one sentence each."""
        notes = [f"Seed {s.seed}: {s.note}" for s in self.seeds if s.note]
        if self.unpaired:
            notes.append(f"Left out, because only one side has them: seeds {', '.join(map(str, self.unpaired))}.")
        return notes

    def to_json(self) -> dict[str, Any]:
        """Returns everything, and the sentences."""
        return {"kind": "matched-comparison", "version": 1, **asdict(self), "sentences": list(self.sentences())}


def compare_seed(first: Trajectory, second: Trajectory) -> SeedComparison:
    """Two runs of one seed, along training.

    They are matched at the highest train PSNR that both have reached, which is furthest from the start that all
    runs share and is where a difference has had most time to grow.

    Raises:
        DitlabError: seeds or splits differ, or the runs have no measured step in common.
    """
    if (first.seed, first.split_family) != (second.seed, second.split_family):
        sides = (f"'{r.label}' (seed {r.seed}, split family {r.split_family[:12]})" for r in (first, second))
        raise DitlabError(f"matched comparison: {' and '.join(sides)} have different splits")
    common = set(first.steps) & set(second.steps)
    if not common:
        raise DitlabError(
            f"matched comparison: expected a step measured in both '{first.label}' and '{second.label}' of seed "
            f"{first.seed}, found none"
        )
    step = max(common)
    i, j = first.steps.index(step), second.steps.index(step)
    matched, note = min(max(first.train), max(second.train)), ""
    one, other = first.crossing(matched), second.crossing(matched)
    both = None if one is None or other is None else (one, other)
    if both is None:
        ranges = (f"{r.label} {r.train[0]:.2f} to {max(r.train):.2f} dB" for r in (first, second))
        note = f"the ranges of train PSNR do not overlap ({', '.join(ranges)}), so there is no matched comparison."
    return SeedComparison(
        seed=first.seed,
        step=step,
        gap_at_step=(first.gap[i], second.gap[j]),
        test_at_step=(first.test[i], second.test[j]),
        train_at_step=(first.train[i], second.train[j]),
        matched_train=both and matched,
        gap_matched=both and (both[0].gap, both[1].gap),
        test_matched=both and (both[0].test, both[1].test),
        step_matched=both and (both[0].step, both[1].step),
        best_test=(first.test[first.best], second.test[second.best]),
        best_step=(first.steps[first.best], second.steps[second.best]),
        note=note,
    )


def compare_kinds(runs: Sequence[Trajectory], *, margin: float | None = None) -> list[MatchedComparison]:
    """Compares each two kinds of runs at each N, N ascending; kinds that share no seed there are left out."""
    comparisons = []
    for n in sorted({run.n for run in runs}, key=lambda n: n or 0):
        kinds: dict[str, list[Trajectory]] = {}
        for run in runs:
            if run.n == n:
                kinds.setdefault(run.label, []).append(run)
        for first, second in combinations(kinds.values(), 2):
            if {run.seed for run in first} & {run.seed for run in second}:
                comparisons.append(compare_trajectories(first, second, margin=margin))
    return comparisons


def compare_trajectories(
    first: Sequence[Trajectory], second: Sequence[Trajectory], *, margin: float | None = None
) -> MatchedComparison:
    """Two kinds of runs, one or several seeds each, paired by seed; seeds of one side only are left out and named.

    The margin is that of `ditlab.metrics.paired.paired_difference`, in dB.

    Raises:
        DitlabError: a side is empty or mixes labels, a seed occurs twice, N differs, no seed in common, or as
            `compare_seed`.
    """
    sides: list[dict[int, Trajectory]] = []
    for runs in (first, second):
        if not runs or len({r.label for r in runs}) != 1:
            raise DitlabError("matched comparison: expected on each side runs of one label, at least one")
        sides.append({r.seed: r for r in runs})
        if len(sides[-1]) != len(runs):
            raise DitlabError(f"matched comparison: a seed occurs twice among the runs of '{runs[0].label}'")
    counts = {r.n for r in (*first, *second)}
    if len(counts) != 1:
        raise DitlabError(
            f"matched comparison: expected one number of training images, found {sorted(map(str, counts))}"
        )
    a, b = first[0].label, second[0].label
    common = sorted(set(sides[0]) & set(sides[1]))
    if not common:
        raise DitlabError(
            f"matched comparison: '{a}' (seeds {sorted(sides[0])}) and '{b}' (seeds {sorted(sides[1])}) have different "
            "splits: compare runs trained with the same seed"
        )
    seeds = tuple(compare_seed(sides[0][s], sides[1][s]) for s in common)

    def difference(pairs: Mapping[int, tuple[float, float]]) -> PairedDifference:
        mine, theirs = ({seed: pair[side] for seed, pair in pairs.items()} for side in (0, 1))
        return paired_difference(a, b, mine, theirs, margin=margin)

    matched = {s.seed: s.gap_matched for s in seeds if s.gap_matched is not None}
    return MatchedComparison(
        first=a,
        second=b,
        n=counts.pop(),
        seeds=seeds,
        unpaired=tuple(sorted(set(sides[0]) ^ set(sides[1]))),
        gap_at_step=difference({s.seed: s.gap_at_step for s in seeds}),
        gap_matched=difference(matched) if matched else None,
        best_test=difference({s.seed: s.best_test for s in seeds}),
    )


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
