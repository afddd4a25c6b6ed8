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
from typing import Any

from ditlab.analyses.stored import StoredResult, tuples
from ditlab.errors import DitlabError
from ditlab.metrics.paired import PairedDifference, paired_difference
from ditlab.metrics.psnr import PSNRPoint


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
    def from_points(
        cls,
        label: str,
        seed: int,
        points: Sequence[tuple[int, PSNRPoint] | tuple[int, float, float]],
        *,
        n: int | None = None,
        split_family: str = "",
    ) -> Trajectory:
        """From (step, PSNRPoint) pairs or (step, train, test) triples; of the latter the gap is train - test."""
        rows = []
        for step, *values in points:
            match values:
                case [PSNRPoint() as p]:
                    rows.append((step, p.train, p.test, p.gap))
                case [float() | int() as train, float() | int() as test]:
                    rows.append((step, float(train), float(test), float(train) - float(test)))
                case _:
                    raise DitlabError(f"trajectory of '{label}': expected (step, point) or (step, train, test)")
        columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
        return cls(label, seed, *columns, n=n, split_family=split_family)

    @classmethod
    def from_log(
        cls,
        label: str,
        seed: int,
        records: Sequence[Mapping[str, Any]],
        *,
        n: int | None = None,
        split_family: str = "",
    ) -> Trajectory:
        """From the lines of a run's log that have `train_psnr`, `test_psnr` and `psnr_gap`; others are passed over."""
        points = [
            (int(line["step"]), PSNRPoint(line["train_psnr"], line["test_psnr"], line["psnr_gap"]))
            for line in records
            if "psnr_gap" in line
        ]
        return cls.from_points(label, seed, points, n=n, split_family=split_family)

    @property
    def best(self) -> int:
        """Index of the highest test PSNR (the earliest where several are equal)."""
        return max(range(len(self.steps)), key=lambda i: self.test[i])

    @property
    def train_range(self) -> tuple[float, float]:
        """Train PSNR at the first point and its highest value, in dB: the range that `crossing` can answer for."""
        return self.train[0], max(self.train)

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

        def between(values: Sequence[int] | Sequence[float]) -> float:
            return values[i - 1] + share * (values[i] - values[i - 1])

        return Crossing(between(self.steps), between(self.test), between(self.gap))


@dataclass(frozen=True)
class Crossing:
    """A run where its train PSNR first reaches a given value."""

    step: float
    test: float
    """Test PSNR there, dB."""
    gap: float
    """Average gap there, dB."""


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
class MatchedComparison(StoredResult):
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

    kind, file = "matched-comparison", "matched"

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
        return {"kind": self.kind, "version": self.version, **asdict(self), "sentences": list(self.sentences())}

    @classmethod
    def read(cls, record: Mapping[str, Any], arrays: Mapping[str, Any]) -> MatchedComparison:
        def made(kind: Any, fields: Mapping[str, Any] | None) -> Any:
            return None if fields is None else kind(**{name: tuples(value) for name, value in fields.items()})

        differences = ("gap_at_step", "gap_matched", "best_test")
        return cls(
            seeds=tuple(made(SeedComparison, seed) for seed in record["seeds"]),
            **{name: made(PairedDifference, record[name]) for name in differences},
            **{name: tuples(record[name]) for name in ("first", "second", "n", "unpaired")},
        )


def compare_seed(first: Trajectory, second: Trajectory) -> SeedComparison:
    """Two runs of one seed, along training.

    They are matched at the highest train PSNR that both have reached, which is furthest from the start that all
    runs share and is where a difference has had most time to grow.

    Raises:
        DitlabError: seeds or splits differ, or the runs have no measured step in common.
    """
    if (first.seed, first.split_family) != (second.seed, second.split_family):
        raise DitlabError(
            f"matched comparison: '{first.label}' (seed {first.seed}, split family {first.split_family[:12]}) and "
            f"'{second.label}' (seed {second.seed}, split family {second.split_family[:12]}) have different splits"
        )
    common = set(first.steps) & set(second.steps)
    if not common:
        raise DitlabError(
            f"matched comparison: expected a step measured in both '{first.label}' and '{second.label}' of seed "
            f"{first.seed}, found none"
        )
    step = max(common)
    i, j = first.steps.index(step), second.steps.index(step)
    (low_1, high_1), (low_2, high_2) = first.train_range, second.train_range
    matched, note = min(high_1, high_2), ""
    crossing_1, crossing_2 = first.crossing(matched), second.crossing(matched)
    if crossing_1 is None or crossing_2 is None:
        note = (
            f"the ranges of train PSNR do not overlap ({first.label} {low_1:.2f} to {high_1:.2f} dB, "
            f"{second.label} {low_2:.2f} to {high_2:.2f} dB), so there is no matched comparison."
        )
    both = None if crossing_1 is None or crossing_2 is None else (crossing_1, crossing_2)
    return SeedComparison(
        seed=first.seed,
        step=step,
        gap_at_step=(first.gap[i], second.gap[j]),
        test_at_step=(first.test[i], second.test[j]),
        train_at_step=(first.train[i], second.train[j]),
        matched_train=None if both is None else matched,
        gap_matched=None if both is None else (both[0].gap, both[1].gap),
        test_matched=None if both is None else (both[0].test, both[1].test),
        step_matched=None if both is None else (both[0].step, both[1].step),
        best_test=(first.test[first.best], second.test[second.best]),
        best_step=(first.steps[first.best], second.steps[second.best]),
        note=note,
    )


def compare_kinds(runs: Sequence[Trajectory], *, margin: float | None = None) -> list[MatchedComparison]:
    """Each two kinds of runs at each N, N ascending; kinds that share no seed there are left out.

    Args:
        runs: of any labels, N and seeds.
        margin: in dB, as in `ditlab.metrics.paired.paired_difference`.

    Raises:
        DitlabError: as `compare_trajectories`.
    """
    comparisons = []
    for n in sorted({run.n for run in runs}, key=lambda n: -1 if n is None else n):
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

    Args:
        first: runs of one kind.
        second: runs of the other.
        margin: in dB, as in `ditlab.metrics.paired.paired_difference`.

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
