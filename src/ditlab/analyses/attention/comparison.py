"""Locality of several models compared: means over seeds, by label and N, and differences paired by seed.

"Attention grows local with N" (An et al. 2410.21273, Fig. 4) is here the difference of a number between the smallest
and the largest N of one kind of run, paired by seed; it is claimed only if its interval excludes zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ditlab.analyses.attention.result import LocalityResult, Quantity
from ditlab.errors import DitlabError, Incompatible
from ditlab.metrics.paired import PairedDifference, paired_difference
from ditlab.provenance import check_groups


@dataclass(frozen=True, eq=False)
class LocalityGroup:
    """Results that differ only in their seed: one kind of run at one N."""

    label: str
    n: int | None
    results: tuple[LocalityResult, ...]
    """One per seed, in ascending order of the seeds."""

    def averages(self, what: Quantity | int) -> dict[int, float]:
        """Returns the average over levels, layers and heads of a quantity, or of the mass within a radius, by seed."""
        return {r.about.seed: r.average(what) for r in self.results}

    def mean(self, what: Quantity | int) -> float:
        """Returns the mean over seeds."""
        return float(np.mean(list(self.averages(what).values())))

    def std(self, what: Quantity | int) -> float | None:
        """Returns the standard deviation over seeds (n - 1); None with one seed."""
        values = list(self.averages(what).values())
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

    def by_layer(self, what: Quantity | int, level: int | None = None) -> np.ndarray:
        """Returns each seed's means over heads (and levels, if no level's index is given), float64 [seeds, layers]."""
        return np.stack([r.by_layer(what, level) for r in self.results])


@dataclass(frozen=True, eq=False)
class LocalityComparison:
    """Groups in the order in which their labels were first given, N ascending within a label."""

    groups: tuple[LocalityGroup, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The kinds of runs, each once."""
        return tuple(dict.fromkeys(g.label for g in self.groups))

    @property
    def counts(self) -> tuple[int | None, ...]:
        """The numbers of training images, ascending, each once."""
        return tuple(sorted({g.n for g in self.groups}, key=_none_first))

    @property
    def first(self) -> LocalityResult:
        """The first result, for what all have in common: grid, levels, layers, settings."""
        return self.groups[0].results[0]

    def by_label(self, label: str) -> tuple[LocalityGroup, ...]:
        """Returns the groups of a label, N ascending."""
        return tuple(g for g in self.groups if g.label == label)

    def between_labels(self, what: Quantity | int = "distance") -> tuple[tuple[int | None, PairedDifference], ...]:
        """Returns, for each N, second - first for each two labels that share a seed there."""
        pairs = []
        for n in self.counts:
            for first, second in combinations([g for g in self.groups if g.n == n], 2):
                if set(first.averages(what)) & set(second.averages(what)):
                    pair = paired_difference(first.label, second.label, first.averages(what), second.averages(what))
                    pairs.append((n, pair))
        return tuple(pairs)

    def between_counts(self, what: Quantity | int = "distance") -> tuple[tuple[str, PairedDifference], ...]:
        """Returns, for each label, the largest N minus the smallest, over the seeds that both have."""
        pairs = []
        for label in self.labels:
            groups = [g for g in self.by_label(label) if g.n is not None]
            if len(groups) > 1 and set(groups[0].averages(what)) & set(groups[-1].averages(what)):
                few, many = groups[0], groups[-1]
                names = f"{label} at N = {few.n}", f"{label} at N = {many.n}"
                pairs.append((label, paired_difference(*names, few.averages(what), many.averages(what))))
        return tuple(pairs)

    def differences(self) -> tuple[str, ...]:
        """Returns how the mean distance differs, one sentence each; none claims more than its interval allows."""
        lines = [difference.sentence("Mean attention distance", "tokens") for _, difference in self.between_counts()]
        for n, difference in self.between_labels():
            at = "" if n is None else f" at N = {n}"
            lines.append(difference.sentence(f"Mean attention distance{at}", "tokens"))
        return tuple(lines)

    def sentences(self) -> tuple[str, ...]:
        """Returns what was measured, a sentence for each group, then `differences`."""
        lines = []
        for g in self.groups:
            std = g.std("distance")
            spread = (
                f"one seed ({g.results[0].about.seed})" if std is None else f"std {std:.2f}, {len(g.results)} seeds"
            )
            name = g.label if g.n is None else f"{g.label}, N = {g.n}"
            lines.append(
                f"{name}: mean attention distance {g.mean('distance'):.2f} tokens ({spread}), {g.mean(1):.0%} of "
                f"attention within 3x3 tokens."
            )
        return (*lines, *self.differences())

    def to_json(self) -> dict[str, Any]:
        """Returns the numbers of every group and difference (the results have their own files)."""
        shown: tuple[Quantity | int, ...] = (
            "distance",
            "position_invariance",
            "consistency",
            "consistency_control",
            1,
            3,
        )

        def name(what: Quantity | int) -> str:
            return f"mass {what}" if isinstance(what, int) else what

        return {
            "kind": "locality-comparison",
            "version": 1,
            "uniform_distance": self.first.uniform_distance,
            "groups": [
                {
                    "label": g.label,
                    "n": g.n,
                    "runs": [r.about.name for r in g.results],
                    "mean": {name(w): g.mean(w) for w in shown},
                    "std": {name(w): g.std(w) for w in shown},
                    "by_seed": {name(w): {str(s): v for s, v in g.averages(w).items()} for w in shown},
                    "pattern_distance": float(g.results[0].pattern_distance.mean()),
                }
                for g in self.groups
            ],
            "between_counts": [
                {"label": label, "quantity": name(w), **asdict(d), "seen": d.seen}
                for w in shown
                for label, d in self.between_counts(w)
            ],
            "between_labels": [
                {"n": n, "quantity": name(w), **asdict(d), "seen": d.seen}
                for w in shown
                for n, d in self.between_labels(w)
            ],
            "sentences": list(self.sentences()),
        }


def compare_locality(results: Sequence[LocalityResult]) -> LocalityComparison:
    """Groups results by label and N, over seeds, after checking that they can be compared.

    Raises:
        DitlabError: no result; different levels, layers, grids, images or noise; runs of different splits; two results
            of one label, N and seed.
    """
    if not results:
        raise DitlabError("attention: expected at least one result to compare, found none")
    for other in results[1:]:
        _check_comparable(results[0], other)
    check_groups([r.about for r in results], "attention")
    groups: dict[tuple[str, int | None], dict[int, LocalityResult]] = {}
    for r in results:
        groups.setdefault((r.about.group, r.about.n), {})[r.about.seed] = r
    labels = list(dict.fromkeys(label for label, _ in groups))
    ordered = sorted(groups, key=lambda key: (labels.index(key[0]), _none_first(key[1])))
    return LocalityComparison(
        tuple(
            LocalityGroup(label, n, tuple(groups[label, n][seed] for seed in sorted(groups[label, n])))
            for label, n in ordered
        )
    )


def same_levels(first: Sequence[float], second: Sequence[float]) -> bool:
    """Returns whether noise levels agree to 1 %, about as near as steps of different processes can be."""
    return len(first) == len(second) and bool(np.allclose(first, second, rtol=1e-2, atol=0))


def _none_first(n: int | None) -> int:
    return -1 if n is None else n


def _check_comparable(first: LocalityResult, second: LocalityResult) -> None:
    names = f"'{first.about.name}' and '{second.about.name}'"
    if not same_levels(first.levels, second.levels):
        mine, theirs = (", ".join(f"{s:.3g}" for s in r.levels) for r in (first, second))
        raise Incompatible(f"attention: {names} were measured at different noise levels ({mine} and {theirs})")
    for what in ("grid", "layers", "images"):
        mine, theirs = getattr(first, what), getattr(second, what)
        if mine != theirs:
            raise Incompatible(f"attention: {names} were measured with different {what} ({mine} and {theirs})")
    for what, mine, theirs in (
        ("noise", first.config.noise_seed, second.config.noise_seed),
        ("images", *(r.about.settings.get("images_from", "test") for r in (first, second))),
    ):
        if mine != theirs:
            raise Incompatible(f"attention: {names} were measured with different {what} ({mine} and {theirs})")
