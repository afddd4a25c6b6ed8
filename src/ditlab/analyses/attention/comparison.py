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

from ditlab.analyses.attention.result import LocalityResult, Quantity, quantity_name
from ditlab.analyses.groups import GroupedResults, SeedGroup, grouped
from ditlab.errors import Incompatible, InvalidConfig
from ditlab.metrics.paired import PairedDifference, paired_difference

_SHOWN: tuple[Quantity | int, ...] = ("distance", "position_invariance", "consistency", "consistency_control", 1, 3)
"""The quantities of a saved comparison; numbers are radii of the mass."""


class LocalityGroup(SeedGroup):
    """Results that differ only in their seed; quantities are averaged over levels, layers and heads."""

    def by_layer(self, what: Quantity | int, level: int | None = None) -> np.ndarray:
        """Returns each seed's means over heads (and levels, if no level's index is given), float64 [seeds, layers]."""
        return np.stack([r.by_layer(what, level) for r in self.results])


@dataclass(frozen=True, eq=False)
class LocalityComparison(GroupedResults):
    """Groups of models that were measured alike."""

    groups: tuple[LocalityGroup, ...]

    def by_label(self, label: str) -> tuple[LocalityGroup, ...]:
        """Returns the groups of a label, N ascending."""
        return tuple(g for g in self.groups if g.label == label)

    def between_labels(self, what: Quantity | int = "distance") -> tuple[tuple[int | None, PairedDifference], ...]:
        """Returns, for each N, second - first for each two labels that share a seed there."""
        pairs = [(n, pair) for n in self.counts for pair in combinations([g for g in self.groups if g.n == n], 2)]
        return tuple((n, difference) for n, (a, b) in pairs for difference in _paired(what, (a.label, a), (b.label, b)))

    def between_counts(self, what: Quantity | int = "distance") -> tuple[tuple[str, PairedDifference], ...]:
        """Returns, for each label, the largest N minus the smallest, over the seeds that both have."""
        differences = []
        for label in self.labels:
            groups = [g for g in self.by_label(label) if g.n is not None]
            if len(groups) > 1:
                few, many = ((f"{label} at N = {g.n}", g) for g in (groups[0], groups[-1]))
                differences += [(label, difference) for difference in _paired(what, few, many)]
        return tuple(differences)

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
            spread = f"one seed ({g.seeds[0]})" if std is None else f"std {std:.2f}, {len(g.results)} seeds"
            lines.append(
                f"{g.name}: mean attention distance {g.mean('distance'):.2f} tokens ({spread}), {g.mean(1):.0%} of "
                "attention within 3x3 tokens."
            )
        return (*lines, *self.differences())

    def to_json(self) -> dict[str, Any]:
        """Returns the numbers of every group and difference (the results have their own files)."""
        shown: dict[str, Quantity | int] = {quantity_name(what): what for what in _SHOWN}

        def record(name: str, difference: PairedDifference) -> dict[str, Any]:
            return {"quantity": name, **asdict(difference), "seen": difference.seen}

        return {
            "kind": "locality-comparison",
            "version": 1,
            "uniform_distance": self.first.uniform_distance,
            "groups": [
                {
                    "label": g.label,
                    "n": g.n,
                    "runs": [r.about.name for r in g.results],
                    "mean": {name: g.mean(what) for name, what in shown.items()},
                    "std": {name: g.std(what) for name, what in shown.items()},
                    "by_seed": {name: {str(s): v for s, v in g.averages(w).items()} for name, w in shown.items()},
                    "pattern_distance": float(g.results[0].pattern_distance.mean()),
                }
                for g in self.groups
            ],
            "between_counts": [
                {"label": label, **record(name, d)} for name, w in shown.items() for label, d in self.between_counts(w)
            ],
            "between_labels": [
                {"n": n, **record(name, d)} for name, w in shown.items() for n, d in self.between_labels(w)
            ],
            "sentences": list(self.sentences()),
        }


def _paired(
    what: Quantity | int, first: tuple[str, LocalityGroup], second: tuple[str, LocalityGroup]
) -> list[PairedDifference]:
    """Returns second - first, of groups with their names, over the seeds that both have; nothing if there are none."""
    mine, theirs = first[1].averages(what), second[1].averages(what)
    return [paired_difference(first[0], second[0], mine, theirs)] if mine.keys() & theirs.keys() else []


def compare_locality(results: Sequence[LocalityResult]) -> LocalityComparison:
    """Groups results by label and N, over seeds, after checking that they can be compared.

    Raises:
        DitlabError: no result; different levels, layers, grids, images or noise; runs of different splits; two results
            of one label, N and seed.
    """
    if not results:
        raise InvalidConfig("attention: expected at least one result to compare, found none")
    for other in results[1:]:
        _check_comparable(results[0], other)
    return LocalityComparison(grouped(results, LocalityGroup, "attention"))


def same_levels(first: Sequence[float], second: Sequence[float]) -> bool:
    """Returns whether noise levels agree to 1 %, about as near as steps of different processes can be."""
    return len(first) == len(second) and bool(np.allclose(first, second, rtol=1e-2, atol=0))


def _check_comparable(first: LocalityResult, second: LocalityResult) -> None:
    names = f"'{first.about.name}' and '{second.about.name}'"
    if first.outdated != second.outdated:
        raise Incompatible(f"attention: {names} have different definitions of distance; measure both again")
    if not same_levels(first.levels, second.levels):
        mine, theirs = (", ".join(f"{s:.3g}" for s in r.levels) for r in (first, second))
        raise Incompatible(f"attention: {names} were measured at different noise levels ({mine} and {theirs})")
    for what, mine, theirs in (
        *((name, getattr(first, name), getattr(second, name)) for name in ("grid", "layers", "images")),
        ("noise", first.config.noise_seed, second.config.noise_seed),
        ("images", *(r.about.settings.get("images_from", "test") for r in (first, second))),
    ):
        if mine != theirs:
            raise Incompatible(f"attention: {names} were measured with different {what} ({mine} and {theirs})")
