"""Several PSNR-gap results side by side: means and spreads over seeds, and differences paired by seed.

Results are comparable where they were measured on the same test images with the same noise at the same levels, and
where trained on the same number of images, on the same ones. Anything else is refused here, before a figure shows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, Literal, get_args

import numpy as np

from ditlab.analyses.groups import GroupedResults, SeedGroup, grouped
from ditlab.analyses.psnr_gap.result import PSNRResult, Quantity, Side
from ditlab.errors import Incompatible, InvalidConfig
from ditlab.metrics.bands import Band, places_by_band
from ditlab.metrics.paired import PairedDifference, mean_interval, paired_difference


@dataclass(frozen=True, eq=False)
class PSNRGroup(SeedGroup):
    """One kind of model at one N over several seeds; averages are over levels, in dB."""

    results: tuple[PSNRResult, ...]

    quantity = "gap"

    def curve(self, what: Side | Literal["gap"]) -> np.ndarray:
        """Mean over seeds of a curve in dB, float64 [L]."""
        return np.mean([r.gap() if what == "gap" else r.curve(what) for r in self.results], axis=0)

    def interval(self, what: Quantity = "gap") -> tuple[float, float] | None:
        """Returns the 95 % interval of `mean`, in dB: over seeds, or over images where there is one seed.

        None for one seed and one image.
        """
        return mean_interval(list(self.averages(what).values())) or self.results[0].interval(what)


@dataclass(frozen=True)
class Triple:
    """Differences of train PSNR, test PSNR and gap between two kinds at one N; a gap alone does not say which moved."""

    n: int | None
    train: PairedDifference
    test: PairedDifference
    gap: PairedDifference
    gap_untruncated: PairedDifference

    @classmethod
    def between(cls, first: PSNRGroup, second: PSNRGroup, margin: float | None) -> Triple:
        """Returns second - first over the seeds that both have."""
        return cls(
            first.n,
            *(
                paired_difference(first.label, second.label, first.averages(what), second.averages(what), margin=margin)
                for what in get_args(Quantity)
            ),
        )

    @property
    def all(self) -> dict[Quantity, PairedDifference]:
        """The differences by quantity."""
        return {what: getattr(self, what) for what in get_args(Quantity)}

    @property
    def reading(self) -> str:
        """Which side a difference of the gap comes from, in a few words; "" where none is seen."""
        if not self.gap.seen:
            return ""
        lower = self.gap.mean < 0
        # A smaller gap is better only where test PSNR is higher.
        test = self.test.seen and (self.test.mean > 0) == lower
        train = self.train.seen and (self.train.mean < 0) == lower
        moved = [f"test PSNR is {'higher' if lower else 'lower'}"] * test
        moved += [f"train PSNR is {'lower' if lower else 'higher'}"] * train
        better, worse = ("higher", "lower") if lower else ("lower", "higher")
        other = f"test PSNR is {worse}, too" if self.test.seen else f"test PSNR is not seen to be {better}"
        return (" and ".join(moved) or "neither side is seen to move alone") + ("" if test else f"; {other}")


@dataclass(frozen=True, eq=False)
class PSNRComparison(GroupedResults):
    """PSNR and gap of each kind of model at each N, and the differences of the gap between kinds."""

    groups: tuple[PSNRGroup, ...]
    baselines: tuple[PSNRResult, ...] = ()
    """Closed-form denoisers of the training images, measured alike."""
    margin: float | None = None
    """In dB, as in `ditlab.metrics.paired.paired_difference`."""

    @cached_property
    def triples(self) -> tuple[Triple, ...]:
        """For each N, the differences between each two labels."""
        return tuple(
            Triple.between(first, second, self.margin)
            for n in dict.fromkeys(g.n for g in self.groups)
            for first, second in combinations([g for g in self.groups if g.n == n], 2)
        )

    @property
    def differences(self) -> tuple[tuple[int | None, PairedDifference], ...]:
        """For each N, the difference of the average gap between each two labels: (N, second - first)."""
        return tuple((triple.n, triple.gap) for triple in self.triples)

    @cached_property
    def by_band(self) -> dict[Band, PSNRComparison]:
        """The same comparison at the levels of each band, of the first result's bands, that has any."""
        return {
            band: PSNRComparison(
                tuple(PSNRGroup(tuple(r.at(places) for r in g.results)) for g in self.groups),
                tuple(r.at(places) for r in self.baselines),
                self.margin,
            )
            for band, places in places_by_band(self.first.config.bands, self.first.levels).items()
        }

    @property
    def average_gap(self) -> float | list[float]:
        """Mean over seeds of the average gap in dB: a number for one kind of model, else one for each group."""
        gaps = [group.mean("gap") for group in self.groups]
        return gaps[0] if len(gaps) == 1 else gaps

    def group(self, label: str, n: int | None) -> PSNRGroup | None:
        """The group of this label and N, or None."""
        return next((g for g in self.groups if g.label == label and g.n == n), None)

    def sentences(self) -> tuple[str, ...]:
        """What was measured, one sentence a group and one a difference; none claims more than its interval allows."""
        lines = []
        for g in self.groups:
            std, seeds = g.std(), g.seeds
            spread = f"one seed ({seeds[0]})" if std is None else f"std {std:.2f} over {len(seeds)} seeds"
            sides = f"train {g.mean('train'):.2f} dB, test {g.mean('test'):.2f} dB, gap {g.mean():.2f} dB"
            lines.append(f"{g.name}: {sides}, {spread}.")
        for n, difference in self.differences:
            lines.append(difference.sentence("Average PSNR gap" if n is None else f"Average PSNR gap at N = {n}"))
        return (*lines, *self.readings())

    def readings(self) -> list[str]:
        """Returns a sentence for each difference of the gap that is seen: which side it comes from."""
        return [
            f"{'The' if t.n is None else f'At N = {t.n:,} the'} gap of {t.gap.second} is "
            f"{'smaller' if t.gap.mean < 0 else 'larger'} than that of {t.gap.first}: {t.reading}."
            for t in self.triples
            if t.reading
        ]

    def unlike_weights(self) -> list[str]:
        """Returns a sentence for each way in which the weights of the models are not of one kind."""
        results, sentences = [r for g in self.groups for r in g.results], []
        steps: dict[int, list[str]] = {}
        for r in results:
            if r.about.step is not None:
                steps.setdefault(r.about.step, []).append(r.about.name)
        if len(steps) > 1:
            parts = "; ".join(f"step {step:,}: {', '.join(names)}" for step, names in sorted(steps.items()))
            sentences.append(f"The models were measured at different training steps ({parts}).")
        raw = [r.about.name for r in results if r.about.ema is False]
        if raw and any(r.about.ema for r in results):
            sentences.append(f"Raw weights were measured of {', '.join(raw)}, averaged weights of the others.")
        return sentences

    def verdict(self) -> str:
        """Returns the answer in one sentence, which claims no more than its intervals allow."""
        several = [(n, d) for n, d in self.differences if d.low is not None]
        if len(several) == 1:
            n, difference = several[0]
            return difference.sentence("Average PSNR gap" if n is None else f"Average PSNR gap at N = {n:,}")
        if several:
            return _count_sentence([d for _, d in several])
        if len(self.groups) == 1:
            return _gap_sentence(self.groups[0])
        same_n = len(self.counts) == 1 and self.counts[0] is not None
        where = f" at N = {self.counts[0]:,}" if same_n else ""
        gaps = [f"{g.mean():.2f} dB for {g.label if same_n else _name(g)}" for g in self.groups]
        if len(gaps) > 4:
            low, high = (choose(self.groups, key=lambda g: g.mean()) for choose in (min, max))
            listed = f"from {low.mean():.2f} dB ({_name(low)}) to {high.mean():.2f} dB ({_name(high)})"
        else:
            listed = f"{', '.join(gaps[:-1])} and {gaps[-1]}"
        return f"The average PSNR gap{where} is {listed}; one seed of each cannot tell whether kinds differ."

    def to_json(self) -> dict[str, Any]:
        """Returns the numbers of every group and difference (the results have their own files)."""
        return {
            "kind": "psnr-comparison",
            "version": 1,
            "reduction": self.first.config.reduction,
            **self._numbers(),
            "bands": [{**band.facts(self.first.levels), **inside._numbers()} for band, inside in self.by_band.items()],
            "sentences": list(self.sentences()),
        }

    def _numbers(self) -> dict[str, Any]:
        sides = get_args(Quantity)
        return {
            "groups": [
                {
                    "label": g.label,
                    "n": g.n,
                    "seeds": list(g.seeds),
                    "runs": [r.about.name for r in g.results],
                    "mean": {w: g.mean(w) for w in sides},
                    "std": {w: g.std(w) for w in sides},
                    "interval": {w: g.interval(w) for w in sides},
                    "by_seed": {w: {str(s): v for s, v in g.averages(w).items()} for w in sides},
                }
                for g in self.groups
            ],
            "differences": [{"n": n, **_record(d)} for n, d in self.differences],
            "triples": [{"n": t.n, **{w: _record(d) for w, d in t.all.items()}} for t in self.triples],
        }


def _record(difference: PairedDifference) -> dict[str, Any]:
    return {**asdict(difference), "seen": difference.seen, "similar": difference.similar}


def _name(group: PSNRGroup) -> str:
    return group.label if group.n is None else f"{group.label} at N = {group.n:,}"


def _gap_sentence(group: PSNRGroup) -> str:
    """What one kind's gap and its interval allow to be said."""
    interval = group.interval("gap_untruncated")
    size = f"average gap {group.mean():.2f} dB; train minus test PSNR {group.mean('gap_untruncated'):+.2f} dB"
    if interval is None:
        return f"{group.label}: one image and one seed cannot tell how much the gap varies ({size})."
    low, high = interval
    over = f"{len(group.seeds)} seeds" if len(group.seeds) > 1 else "images, one seed"
    size = f"{size}, 95 % interval {low:+.2f} to {high:+.2f} over {over}"
    which = "training images" if group.n is None else f"{group.n:,} training images"
    if low > 0:
        return f"{group.label} denoises its {which} better than held-out ones ({size})."
    return f"{group.label}: no difference is seen between its {which} and held-out ones ({size})."


def _count_sentence(differences: Sequence[PairedDifference]) -> str:
    """How many of several differences are seen, by pair of kinds."""
    pairs: dict[tuple[str, str], list[PairedDifference]] = {}
    for d in differences:
        pairs.setdefault((d.first, d.second), []).append(d)
    parts = []
    for (first, second), members in pairs.items():
        seen = [d for d in members if d.seen]
        lower, higher = sum(d.mean < 0 for d in seen), sum(d.mean > 0 for d in seen)
        sides = [f"{word} at {count}" for count, word in ((lower, "lower"), (higher, "higher")) if count]
        parts.append(
            f"of {second} against {first}: {' and '.join(sides) or 'no difference seen at any'} of {len(members)} N"
        )
    return f"Average PSNR gap {'; '.join(parts)} (95 % intervals over paired seeds)."


def compare(results: Sequence[PSNRResult], *, margin: float | None = None) -> PSNRComparison:
    """Groups results by label and N, over seeds, after checking that they may stand side by side.

    Args:
        results: one for each run; those of baselines stand apart.
        margin: in dB, as in `ditlab.metrics.paired.paired_difference`.

    Raises:
        InvalidConfig: no result.
        Incompatible: different levels, noise, images a side or reduction; one seed with two different test
            sets, or two training sets at one N; two results of one label, N and seed; labels without a common seed.
    """
    baselines = tuple(r for r in results if r.baseline)
    results = [r for r in results if not r.baseline]
    if not results:
        raise InvalidConfig("comparison: expected at least one psnr-gap result, found none")
    for other in results[1:]:
        _check_comparable(results[0], other)
    comparison = PSNRComparison(grouped(results, PSNRGroup, "comparison"), baselines, margin)
    _ = comparison.triples  # labels without a common seed are refused here
    return comparison


def _check_comparable(first: PSNRResult, second: PSNRResult) -> None:
    """Raises DitlabError unless both results were measured alike (levels, noise, images a side, reduction, range)."""
    names = f"'{first.about.name}' and '{second.about.name}'"
    if len(first.levels) != len(second.levels) or not np.allclose(first.levels, second.levels, rtol=1e-6, atol=0):
        raise Incompatible(
            f"comparison: {names} were measured at different noise levels ({len(first.levels)} from "
            f"{first.levels[0]:.4g} to {first.levels[-1]:.4g}, {len(second.levels)} from {second.levels[0]:.4g} to "
            f"{second.levels[-1]:.4g}); measure both at the same levels"
        )
    for what in ("reduction", "noise_seed", "images", "draws", "clip"):
        mine, theirs = getattr(first.config, what), getattr(second.config, what)
        if mine != theirs:
            raise Incompatible(f"comparison: {names} were measured with different {what} ({mine} and {theirs})")
    if first.peak != second.peak:
        raise Incompatible(f"comparison: {names} have different intensity ranges ({first.peak} and {second.peak})")
