"""What a study has found so far: the recorded results of its cells, compared, from plan.json and cells/ alone.

A panel is one image set and one network: within it kinds of attention are compared at each N, paired by seed. The full
measurement (psnr-gap.json) gives one comparison. The points along training (trajectory.json) give three, all by one
coarser instrument, so that they can be held against each other (`ditlab.analyses.trajectory.comparison` says why
three). A grid that is partly empty gives the comparisons that its cells allow.
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
from ditlab.errors import DitlabError
from ditlab.metrics.paired import PairedDifference, paired_difference
from ditlab.provenance import Provenance
from ditlab.studies.grid import Plan
from ditlab.studies.store import Standing, Store

FULL = "full measurement of the gap"
"""The comparison of the finished runs by psnr-gap.json."""
ALONG = ("gap at equal steps", "gap at matched train PSNR", "best test PSNR")
"""The three comparisons along training, measured alike."""
CONTRASTS = (FULL, *ALONG)
"""All ways in which two kinds of runs are compared."""

_Result = TypeVar("_Result", PSNRResult, LocalityResult)


@dataclass(frozen=True, eq=False)
class CellResults:
    """All that is on record of one cell."""

    place: Mapping[str, Any]
    """`Cell.place`."""
    standing: Standing
    cell: Mapping[str, Any] | None
    """cell.json."""
    psnr: PSNRResult | None
    psnr_record: Mapping[str, Any] | None
    trajectory: Trajectory | None
    locality: LocalityResult | None
    locality_record: Mapping[str, Any] | None

    def row(self) -> dict[str, Any]:
        """Its numbers, for a table: dB, tokens, shares."""
        found = dict(self.place) | {"state": self.standing.state}
        for what in ("train", "test", "gap", "gap_untruncated"):
            found[what] = None if self.psnr is None else self.psnr.average(what)
        t, a = self.trajectory, self.locality
        found["best_test"], found["best_step"] = (None, None) if t is None else (t.test[t.best], t.steps[t.best])
        found["attention_distance"] = None if a is None else a.average("distance")
        found["attention_within_3x3"] = None if a is None else a.average(1)
        return found


@dataclass(frozen=True)
class Contrast:
    """Two kinds of attention at one N, compared in one way; None where no seed allows it."""

    what: str
    n: int
    first: str
    second: str
    difference: PairedDifference | None
    measured: bool
    """Whether both kinds are on record with one seed, so that None means that they cannot be compared."""


@dataclass(frozen=True, eq=False)
class Panel:
    """One image set and one network of a plan."""

    plan: Plan
    data: str
    network: str
    cells: tuple[CellResults, ...]

    @property
    def name(self) -> str:
        """What headings call it."""
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
        """The PSNR gaps compared; None where none is on record."""
        found = _pairable([c.psnr for c in self.cells if c.psnr is not None])
        return compare(found, margin=self.plan.margin) if found else None

    @property
    def alone(self) -> list[str]:
        """Names of recorded cells of which the gap stands in no comparison, for want of others with their seed."""
        used = {r.about.name for g in self.comparison.groups for r in g.results} if self.comparison else set()
        return [c.psnr.about.name for c in self.cells if c.psnr is not None and c.psnr.about.name not in used]

    @cached_property
    def locality(self) -> LocalityComparison | None:
        """The locality of attention compared; None where none is on record."""
        found = _pairable([c.locality for c in self.cells if c.locality is not None])
        return compare_locality(found) if found else None

    def trajectories(self, n: int) -> list[Trajectory]:
        """PSNR along training of the cells of one N."""
        return [c.trajectory for c in self.cells if c.trajectory is not None and c.trajectory.n == n]

    @cached_property
    def matched(self) -> list[MatchedComparison]:
        """Each two kinds of attention at each N, along training; those that share no seed are left out."""
        runs = [c.trajectory for c in self.cells if c.trajectory is not None]
        return compare_kinds(runs, margin=self.plan.margin)

    @cached_property
    def contrasts(self) -> list[Contrast]:
        """Every two kinds of attention at every N, in each way of `CONTRASTS`."""
        full = {} if self.comparison is None else {(n, d.first, d.second): d for n, d in self.comparison.differences}
        along = {(m.n, m.first, m.second): m for m in self.matched}
        found = []
        for n in self.counts:
            for first, second in combinations(self.labels, 2):
                d, m = full.get((n, first, second)), along.get((n, first, second))
                found.append(Contrast(FULL, n, first, second, d, d is not None))
                ways = (None,) * len(ALONG) if m is None else (m.gap_at_step, m.gap_matched, m.best_test)
                found += [Contrast(w, n, first, second, d, m is not None) for w, d in zip(ALONG, ways, strict=True)]
        return found

    def trend(self, label: str, few: int, many: int) -> PairedDifference | None:
        """The gap at a larger N minus that at a smaller one, over the seeds that both have; None without any."""
        if self.comparison is None:
            return None
        groups = [self.comparison.group(label, n) for n in (few, many)]
        if groups[0] is None or groups[1] is None or not set(groups[0].seeds) & set(groups[1].seeds):
            return None
        less, more = groups[0].averages(), groups[1].averages()
        return paired_difference(f"N = {few:,}", f"N = {many:,}", less, more, margin=self.plan.margin)

    def trends(self, label: str) -> list[PairedDifference]:
        """The gap of a kind of attention at each N against the next smaller one, where seeds allow it."""
        found = [self.trend(label, few, many) for few, many in pairwise(self.counts)]
        return [difference for difference in found if difference is not None]


def panels(plan: Plan, store: Store) -> list[Panel]:
    """Reads what is on record of a plan's cells, one panel an image set and network.

    Raises:
        DitlabError: a recorded result cannot be read as what it says it is.
    """
    read = [_checked(place, plan, store) for place in plan.cells]
    found = []
    for data in plan.axes["data"]:
        for network in plan.axes["network"]:
            mine = tuple(c for c in read if (c.place["data"], c.place["network"]) == (data, network))
            found.append(Panel(plan, data, network, mine))
    return found


def _checked(place: Mapping[str, Any], plan: Plan, store: Store) -> CellResults:
    try:
        return _read(place, plan, store)
    except DitlabError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        folder = store.cell(place["hash"])
        raise DitlabError(f"{folder}: a recorded result is damaged ({type(error).__name__}: {error})") from error


def _read(place: Mapping[str, Any], plan: Plan, store: Store) -> CellResults:
    name = place["hash"]
    found = {
        analysis: store.record(name, analysis) if store.measured(name, plan, analysis) else None
        for analysis in plan.analyses
    }
    psnr, locality, cell = found.get("psnr-gap"), found.get("attention"), store.record(name, "cell")
    return CellResults(
        place=place,
        standing=store.standing(name, plan),
        cell=cell,
        psnr=None if psnr is None else _named(psnr_of_levels(psnr), place),
        psnr_record=psnr,
        trajectory=_trajectory(place, cell, store.record(name, "trajectory")),
        locality=None if locality is None else _named(LocalityResult.from_json(locality), place),
        locality_record=locality,
    )


def _named(result: _Result, place: Mapping[str, Any]) -> _Result:
    """The result under the plan's name for its kind; a cell that studies share may have another in each."""
    name = f"{place['attention']} N={place['n']} seed {place['seed']}"
    about: Provenance = replace(result.about, name=name, label=place["attention"])
    return replace(result, about=about)


def psnr_of_levels(record: Mapping[str, Any]) -> PSNRResult:
    """A PSNR gap from its JSON alone, without the errors of single images.

    Each level keeps one error, the mean that its curve was made of: the averages and gaps of `mse_mean` are those of
    the full result, and it counts as measured on one image.

    Raises:
        DitlabError: the result reports another reduction, for which the mean error is not enough.
    """
    if record["config"]["reduction"] != "mse_mean":
        raise DitlabError(f"study: expected PSNR gaps reduced by mse_mean, found {record['config']['reduction']}")
    curves, peak = record["curves"]["mse_mean"], record["peak"]
    errors = {
        f"{side}_mse": (peak**2 * 10 ** (-np.asarray(curves[side], dtype=np.float64) / 10))[:, None, None]
        for side in ("train", "test")
    }
    one = {"train": 1, "test": 1}
    changed = {"images": one, "draws": one, "config": {**record["config"], "images": 1}}
    return PSNRResult.from_json({**record, **changed}, errors)


def _trajectory(
    place: Mapping[str, Any], cell: Mapping[str, Any] | None, record: Mapping[str, Any] | None
) -> Trajectory | None:
    if cell is None or record is None or not any("psnr_gap" in point for point in record["points"]):
        return None
    family = cell["split"]["family"]
    return Trajectory.from_log(place["attention"], place["seed"], record["points"], n=place["n"], split_family=family)


def _pairable(results: Sequence[_Result]) -> list[_Result]:
    """Those results of a partly filled grid that can be compared.

    A kind of attention stays only where it shares a seed with every kind before it: at the same N, and at all.
    """
    kept: list[_Result] = []
    for label in dict.fromkeys(r.about.group for r in results):
        mine = [r for r in results if r.about.group == label]
        for other in dict.fromkeys(r.about.group for r in kept):
            seeds = {r.about.seed for r in kept if r.about.group == other}
            at: dict[int | None, set[int]] = {}
            for r in kept:
                if r.about.group == other:
                    at.setdefault(r.about.n, set()).add(r.about.seed)
            if not seeds & {r.about.seed for r in mine}:
                mine = []
            apart = {n for n, there in at.items() if not there & {r.about.seed for r in mine if r.about.n == n}}
            mine = [r for r in mine if r.about.n not in apart]
            if not seeds & {r.about.seed for r in mine}:
                mine = []
        kept += mine
    return kept


def verdict(contrasts: Sequence[Contrast]) -> str:
    """Where a difference was seen, by N: "at N = 10, 30 lower; at N = 100 no difference seen".

    Args:
        contrasts: of two kinds, in one way, one an N.
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
