"""The recorded results of a study's trials, compared; from plan.json and cells/ alone.

A facet is one image set and one network. Within it, kinds of attention are compared at each N, paired by seed. The full
measurement (psnr-gap.json) gives one comparison. The measurements during training (trajectory.json) give three, all
made in the same coarser way, so that they can be compared with each other (`ditlab.analyses.trajectory.comparison`
explains why three). A grid that is partly empty gives the comparisons that its trials allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, pairwise
from typing import Any, TypeVar

import numpy as np

from ditlab.analyses.attention.comparison import LocalityComparison, compare_locality
from ditlab.analyses.attention.result import LocalityResult
from ditlab.analyses.psnr_gap.comparison import PSNRComparison, compare
from ditlab.analyses.psnr_gap.result import PSNRResult
from ditlab.analyses.trajectory.comparison import MatchedComparison, Trajectory, compare_kinds
from ditlab.errors import Damaged, DitlabError, Incompatible
from ditlab.metrics.paired import PairedDifference, paired_difference
from ditlab.provenance import Provenance
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
    record: Mapping[str, Any] | None
    """cell.json."""
    psnr: PSNRResult | None
    psnr_record: Mapping[str, Any] | None
    trajectory: Trajectory | None
    locality: LocalityResult | None
    locality_record: Mapping[str, Any] | None

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

    what: str
    n: int
    first: str
    second: str
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

    def trajectories(self, n: int) -> list[Trajectory]:
        """Returns PSNR along training of the trials of one N."""
        return [t.trajectory for t in self.trials if t.trajectory is not None and t.trajectory.n == n]

    @cached_property
    def matched(self) -> list[MatchedComparison]:
        """Each two kinds of attention at each N, along training; those without a common seed are left out."""
        runs = [t.trajectory for t in self.trials if t.trajectory is not None]
        return compare_kinds(runs, margin=self.plan.margin)

    @cached_property
    def contrasts(self) -> list[Contrast]:
        """Every two kinds of attention at every N, in each way of `CONTRASTS`."""
        full = {} if self.comparison is None else {(n, d.first, d.second): d for n, d in self.comparison.differences}
        along = {(m.n, m.first, m.second): m for m in self.matched}
        contrasts = []
        for n in self.counts:
            for first, second in combinations(self.labels, 2):
                d, m = full.get((n, first, second)), along.get((n, first, second))
                contrasts.append(Contrast(FULL, n, first, second, d, d is not None))
                ways = (None,) * len(ALONG) if m is None else (m.gap_at_step, m.gap_matched, m.best_test)
                contrasts += [
                    Contrast(way, n, first, second, d, m is not None) for way, d in zip(ALONG, ways, strict=True)
                ]
        return contrasts

    def trend(self, label: str, few: int, many: int) -> PairedDifference | None:
        """Returns the gap at a larger N minus that at a smaller one, over common seeds; None if there are none."""
        if self.comparison is None:
            return None
        groups = [self.comparison.group(label, n) for n in (few, many)]
        if groups[0] is None or groups[1] is None or not set(groups[0].seeds) & set(groups[1].seeds):
            return None
        less, more = groups[0].averages(), groups[1].averages()
        return paired_difference(f"N = {few:,}", f"N = {many:,}", less, more, margin=self.plan.margin)

    def trends(self, label: str) -> list[PairedDifference]:
        """Returns the gap of a kind of attention at each N minus that at the next smaller one, where seeds allow it."""
        trends = [self.trend(label, few, many) for few, many in pairwise(self.counts)]
        return [difference for difference in trends if difference is not None]


def facets(plan: Plan, store: Store) -> list[Facet]:
    """Reads what is on record of a plan's trials; returns one facet for each image set and network.

    Raises:
        DitlabError: a recorded result cannot be read as what it says it is.
    """
    trials = [_checked(place, plan, store) for place in plan.trials]
    parts = []
    for data in plan.axes["data"]:
        for network in plan.axes["network"]:
            mine = tuple(t for t in trials if (t.place["data"], t.place["network"]) == (data, network))
            parts.append(Facet(plan, data, network, mine))
    return parts


def _checked(place: Mapping[str, Any], plan: Plan, store: Store) -> TrialResults:
    try:
        return _read(place, plan, store)
    except DitlabError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        folder = store.trial(place["hash"])
        raise Damaged(f"{folder}: a recorded result is damaged ({type(error).__name__}: {error})") from error


def _read(place: Mapping[str, Any], plan: Plan, store: Store) -> TrialResults:
    name = place["hash"]
    records = {
        analysis: store.record(name, analysis) if store.measured(name, plan, analysis) else None
        for analysis in plan.analyses
    }
    psnr, locality, trained = records.get("psnr-gap"), records.get("attention"), store.record(name, "cell")
    return TrialResults(
        place=place,
        status=store.status(name, plan),
        record=trained,
        psnr=None if psnr is None else _named(psnr_of_levels(psnr), place),
        psnr_record=psnr,
        trajectory=_trajectory(place, trained, store.record(name, "trajectory")),
        locality=None if locality is None else _named(LocalityResult.from_json(locality), place),
        locality_record=locality,
    )


def _named(result: _Result, place: Mapping[str, Any]) -> _Result:
    """Returns the result under the plan's name for its kind; studies that share a trial may name it differently."""
    name = f"{place['attention']} N={place['n']} seed {place['seed']}"
    about: Provenance = replace(result.about, name=name, label=place["attention"])
    return replace(result, about=about)


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


def _trajectory(
    place: Mapping[str, Any], trained: Mapping[str, Any] | None, record: Mapping[str, Any] | None
) -> Trajectory | None:
    if trained is None or record is None or not any("psnr_gap" in point for point in record["points"]):
        return None
    family = trained["split"]["family"]
    return Trajectory.from_log(place["attention"], place["seed"], record["points"], n=place["n"], split_family=family)


def _pairable(results: Sequence[_Result]) -> list[_Result]:
    """Returns the results of the kinds that share a seed with every kind before them, at the same N and overall."""
    chosen: list[_Result] = []
    for label in dict.fromkeys(r.about.group for r in results):
        mine = [r for r in results if r.about.group == label]
        for other in dict.fromkeys(r.about.group for r in chosen):
            seeds = {r.about.seed for r in chosen if r.about.group == other}
            at: dict[int | None, set[int]] = {}
            for r in chosen:
                if r.about.group == other:
                    at.setdefault(r.about.n, set()).add(r.about.seed)
            if not seeds & {r.about.seed for r in mine}:
                mine = []
            apart = {n for n, there in at.items() if not there & {r.about.seed for r in mine if r.about.n == n}}
            mine = [r for r in mine if r.about.n not in apart]
            if not seeds & {r.about.seed for r in mine}:
                mine = []
        chosen += mine
    return chosen


def verdict(contrasts: Sequence[Contrast]) -> str:
    """Returns where a difference was seen, by N: "at N = 10, 30 lower; at N = 100 no difference seen".

    Args:
        contrasts: of two kinds, in one way, one for each N.
    """
    kinds: dict[str, list[str]] = {}
    for contrast in contrasts:
        d = contrast.difference
        if d is None:
            kind = "cannot be compared" if contrast.measured else "not yet measured"
        elif d.low is None:
            kind = "one seed, so nothing can be said"
        elif not d.seen:
            kind = f"similar (within {d.margin:g} dB)" if d.similar else "no difference seen"
        else:
            kind = "higher" if d.mean > 0 else "lower"
            kind += f" (by less than {d.margin:g} dB)" if d.similar else ""
        kinds.setdefault(kind, []).append(f"{contrast.n:,}")
    order = ("lower", "higher", "similar", "no difference", "one seed", "cannot", "not yet")
    places = sorted(kinds, key=lambda kind: next(i for i, start in enumerate(order) if kind.startswith(start)))
    return "; ".join(f"at N = {', '.join(kinds[kind])} {kind}" for kind in places)
