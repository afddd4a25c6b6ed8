"""The recorded results of a study's trials, compared; from plan.json and cells/ alone.

A facet is one image set and one network. Within it, kinds of attention are compared at each N, paired by seed: by the
full measurement (psnr-gap.json), and in three ways by the measurements during training (trajectory.json), all made in
the same coarser way (`ditlab.analyses.trajectory.comparison` explains why three). A grid that is partly empty gives the
comparisons that its trials allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, TypeVar

import numpy as np

from ditlab.analyses.attention.comparison import LocalityComparison, compare_locality
from ditlab.analyses.attention.result import LocalityResult
from ditlab.analyses.psnr_gap.comparison import PSNRComparison, compare
from ditlab.analyses.psnr_gap.result import PSNRResult
from ditlab.analyses.trajectory.comparison import MatchedComparison, Trajectory, compare_kinds
from ditlab.errors import Damaged, DitlabError, Incompatible
from ditlab.metrics.paired import PairedDifference, paired_difference
from ditlab.studies.grid import Plan
from ditlab.studies.store import Store, TrialStatus

FULL = "full measurement of the gap"
"""The comparison of finished runs by psnr-gap.json."""
ALONG = ("gap at equal steps", "gap at matched train PSNR", "best test PSNR")
"""The three comparisons along training, all measured in the same way."""
CONTRASTS = (FULL, *ALONG)
"""All ways of comparing two kinds of runs."""

_Result = TypeVar("_Result", PSNRResult, LocalityResult)


@dataclass(frozen=True, eq=False)
class TrialResults:
    """Everything that is on record of one trial."""

    place: Mapping[str, Any]
    """`Trial.place`."""
    status: TrialStatus
    records: Mapping[str, Mapping[str, Any]]
    """Name of a file ("cell", "psnr-gap") -> its JSON, of those on record with the plan's settings."""
    psnr: PSNRResult | None
    trajectory: Trajectory | None
    locality: LocalityResult | None

    def row(self) -> dict[str, Any]:
        """Returns its numbers, for a table: dB, tokens, shares."""
        row: dict[str, Any] = dict(self.place) | {"state": self.status.state}
        for what in ("train", "test", "gap", "gap_untruncated"):
            row[what] = None if self.psnr is None else self.psnr.average(what)
        t, a = self.trajectory, self.locality
        row["best_test"], row["best_step"] = (None, None) if t is None else (t.test[t.best], t.steps[t.best])
        row["attention_distance"] = None if a is None else a.average("distance")
        row["attention_within_3x3"] = None if a is None else a.average(1)
        return row


@dataclass(frozen=True)
class Contrast:
    """Two kinds of attention at one N, compared in one way."""

    n: int
    difference: PairedDifference | None
    """None if no seed allows it."""
    measured: bool
    """Whether both kinds are on record with the same seed, so that None means that they cannot be compared."""


@dataclass(frozen=True, eq=False)
class Facet:
    """One image set and one network of a plan."""

    plan: Plan
    data: str
    network: str
    trials: tuple[TrialResults, ...]

    @property
    def name(self) -> str:
        """Its name in headings."""
        size = self.plan.images[self.data]["size"]
        return f"{self.data} at {size}x{size}, {self.network}"

    @property
    def labels(self) -> list[str]:
        """The kinds of attention, in the plan's order."""
        return list(self.plan.axes["attention"])

    @property
    def counts(self) -> list[int]:
        """The numbers of training images, ascending."""
        return list(self.plan.axes["n"])

    def records(self, file: str) -> dict[str, Mapping[str, Any]]:
        """Returns trial -> its JSON of this name, of those that have it."""
        return {t.place["hash"]: t.records[file] for t in self.trials if file in t.records}

    @cached_property
    def comparison(self) -> PSNRComparison | None:
        """The comparison of PSNR gaps; None if none is on record."""
        results = _pairable([t.psnr for t in self.trials if t.psnr is not None])
        return compare(results, margin=self.plan.margin) if results else None

    @property
    def alone(self) -> list[str]:
        """Names of recorded trials whose gap is in no comparison, because no other kind has their seed."""
        used = {r.about.name for g in self.comparison.groups for r in g.results} if self.comparison else set()
        return [t.psnr.about.name for t in self.trials if t.psnr is not None and t.psnr.about.name not in used]

    @cached_property
    def locality(self) -> LocalityComparison | None:
        """The comparison of the locality of attention; None if none is on record."""
        results = _pairable([t.locality for t in self.trials if t.locality is not None])
        return compare_locality(results) if results else None

    @property
    def trajectories(self) -> list[Trajectory]:
        """PSNR along training of each trial that has it."""
        return [t.trajectory for t in self.trials if t.trajectory is not None]

    @cached_property
    def matched(self) -> list[MatchedComparison]:
        """Each two kinds of attention at each N, along training; those without a common seed are left out."""
        return compare_kinds(self.trajectories, margin=self.plan.margin)

    def contrasts(self, first: str, second: str) -> dict[str, list[Contrast]]:
        """Returns for each way of `CONTRASTS` how two kinds of attention compare, at every N."""
        differences = self.comparison.differences if self.comparison else ()
        full = {n: d for n, d in differences if (d.first, d.second) == (first, second)}
        along = {m.n: m for m in self.matched if (m.first, m.second) == (first, second)}
        ways: dict[str, list[Contrast]] = {way: [] for way in CONTRASTS}
        for n in self.counts:
            m = along.get(n)
            ways[FULL].append(Contrast(n, full.get(n), n in full))
            three = (None, None, None) if m is None else (m.gap_at_step, m.gap_matched, m.best_test)
            for way, difference in zip(ALONG, three, strict=True):
                ways[way].append(Contrast(n, difference, m is not None))
        return ways

    def trend(self, label: str, few: int, many: int, what: str = "gap") -> PairedDifference | None:
        """Returns the "gap" or "distance" at a larger N minus that at a smaller one; None without a common seed."""
        comparison: Any = self.comparison if what == "gap" else self.locality
        averages = {g.n: g.averages(what) for g in comparison.groups if g.label == label} if comparison else {}
        less, more = averages.get(few, {}), averages.get(many, {})
        if not less.keys() & more.keys():
            return None
        margin = self.plan.margin if what == "gap" else None
        return paired_difference(f"N = {few:,}", f"N = {many:,}", less, more, margin=margin)


def facets(plan: Plan, store: Store) -> list[Facet]:
    """Reads what is on record of a plan's trials; returns one facet for each image set and network.

    Raises:
        DitlabError: a recorded result cannot be read as what it says it is.
    """
    trials = [_read(place, plan, store) for place in plan.trials]
    return [
        Facet(plan, *of, tuple(t for t in trials if (t.place["data"], t.place["network"]) == of))
        for of in product(plan.axes["data"], plan.axes["network"])
    ]


def _read(place: Mapping[str, Any], plan: Plan, store: Store) -> TrialResults:
    name = place["hash"]
    records = store.records(name, plan)
    psnr, locality = records.get("psnr-gap"), records.get("attention")
    try:
        psnr = None if psnr is None else _named(psnr_of_levels(psnr), place)
        locality = None if locality is None else _named(LocalityResult.from_json(locality), place)
        return TrialResults(place, store.status(name, plan), records, psnr, _trajectory(place, records), locality)
    except DitlabError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        where = f"{store.trial(name)}: a recorded result is damaged"
        raise Damaged(f"{where} ({type(error).__name__}: {error})") from error


def _named(result: _Result, place: Mapping[str, Any]) -> _Result:
    """Returns the result under the plan's name for its kind; studies that share a trial may name it differently."""
    name = f"{place['attention']} N={place['n']} seed {place['seed']}"
    return replace(result, about=replace(result.about, name=name, label=place["attention"]))


def psnr_of_levels(record: Mapping[str, Any]) -> PSNRResult:
    """Returns a PSNR gap from its JSON alone, without the errors of single images.

    Each level has one error, the mean that its curve was made of. So the averages and gaps of `mse_mean` are those of
    the full result, as if it had been measured on one image.

    Raises:
        DitlabError: the result reports another reduction, for which the mean error is not enough.
    """
    if record["config"]["reduction"] != "mse_mean":
        raise Incompatible(f"study: expected PSNR gaps reduced by mse_mean, found {record['config']['reduction']}")
    curves, peak = record["curves"]["mse_mean"], record["peak"]
    errors = {
        f"{side}_mse": (peak**2 * 10 ** (-np.asarray(curves[side], dtype=np.float64) / 10))[:, None, None]
        for side in ("train", "test")
    }
    count = {"train": 1, "test": 1}
    changed = {"images": count, "draws": count, "config": {**record["config"], "images": 1}}
    return PSNRResult.from_json({**record, **changed}, errors)


def _trajectory(place: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> Trajectory | None:
    points = records["trajectory"]["points"] if "trajectory" in records else []
    if "cell" not in records or not any("psnr_gap" in point for point in points):
        return None
    family = records["cell"]["split"]["family"]
    return Trajectory.from_log(place["attention"], place["seed"], points, n=place["n"], split_family=family)


def _pairable(results: Sequence[_Result]) -> list[_Result]:
    """Returns the results of the kinds that share a seed with every kind before them, at the same N and overall."""
    chosen: list[_Result] = []
    for label in dict.fromkeys(r.about.group for r in results):
        mine = [r for r in results if r.about.group == label]
        for other in dict.fromkeys(r.about.group for r in chosen):
            theirs = {(r.about.n, r.about.seed) for r in chosen if r.about.group == other}
            shared = {r.about.n for r in mine if (r.about.n, r.about.seed) in theirs}
            apart = {n for n, _ in theirs} - shared
            mine = [r for r in mine if r.about.n not in apart]
            if not {r.about.seed for r in mine} & {seed for _, seed in theirs}:
                mine = []
        chosen += mine
    return chosen
