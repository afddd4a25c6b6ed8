"""Results grouped by kind of model and N, over seeds, and differences: what comparisons of several rooms share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, TypeVar

import numpy as np

from ditlab.metrics.paired import PairedDifference
from ditlab.pages.page import Table
from ditlab.provenance import check_groups

__all__ = ["GroupedResults", "SeedGroup", "differences_table", "grouped"]


@dataclass(frozen=True, eq=False)
class SeedGroup:
    """Results that differ only in their seed: one kind of model at one N."""

    results: tuple[Any, ...]
    """One for each seed, in ascending order of the seeds."""

    quantity: ClassVar[Any] = None
    """What `averages`, `mean` and `std` are of, if nothing else is named."""

    @property
    def label(self) -> str:
        """The kind of model."""
        return self.results[0].about.group

    @property
    def n(self) -> int | None:
        """The number of training images."""
        return self.results[0].about.n

    @property
    def name(self) -> str:
        """The kind and N, as sentences have it."""
        return self.results[0].about.title

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, ascending."""
        return tuple(r.about.seed for r in self.results)

    def averages(self, what: Any = None) -> dict[int, float]:
        """Returns the average of a quantity (`average` of the results), by seed."""
        what = self.quantity if what is None else what
        return {r.about.seed: r.average(what) for r in self.results}

    def mean(self, what: Any = None) -> float:
        """Returns the mean over seeds of the average."""
        return float(np.mean(list(self.averages(what).values())))

    def std(self, what: Any = None) -> float | None:
        """Returns the standard deviation over seeds (n - 1) of the average; None with one seed."""
        values = list(self.averages(what).values())
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


GroupT = TypeVar("GroupT", bound=SeedGroup)


class GroupedResults:
    """Groups in the order in which their labels were first given, N ascending within a label."""

    groups: tuple[Any, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The kinds of models, each once."""
        return tuple(dict.fromkeys(g.label for g in self.groups))

    @property
    def counts(self) -> tuple[int | None, ...]:
        """The numbers of training images, ascending, each once."""
        return tuple(sorted({g.n for g in self.groups}, key=lambda n: n or 0))

    @property
    def first(self) -> Any:
        """The first result, for what all have in common."""
        return self.groups[0].results[0]


def grouped(results: Sequence[Any], kind: type[GroupT], what: str) -> tuple[GroupT, ...]:
    """Returns results as groups, in the order of `GroupedResults`.

    Raises:
        Incompatible: two results of one label, N and seed, or results of different splits; `what` asks.
    """
    check_groups([r.about for r in results], what)
    labels = list(dict.fromkeys(r.about.group for r in results))
    ordered = sorted(results, key=lambda r: (labels.index(r.about.group), r.about.n or 0, r.about.seed))
    return tuple(kind(tuple(same)) for _, same in groupby(ordered, key=lambda r: (r.about.group, r.about.n)))


def differences_table(
    rows: Sequence[tuple[str, int | None, PairedDifference]], caption: str = "", unit: str = "dB"
) -> Table:
    """Returns a row for each (quantity, N, difference): its interval over paired seeds, and what that allows to say."""
    cells = []
    for what, n, d in rows:
        digits = 2 if max(abs(d.mean), abs(d.low or 0), abs(d.high or 0)) >= 0.1 else 4
        interval = None if d.low is None else f"{d.low:+.{digits}f} to {d.high:+.{digits}f}"
        between = f"{d.second} minus {d.first}"
        cells.append((what, n, between, f"{d.mean:+.{digits}f}", interval, len(d.seeds), d.verdict(unit)))
    columns = ("quantity", "N", "between", f"difference, {unit}", "95 % interval", "seeds", "result")
    return Table(columns, cells, caption)
