"""What the trials of a facet show, in sentences that claim no more than the intervals of paired seeds allow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

from ditlab.metrics.paired import PairedDifference
from ditlab.studies.results import ALONG, CONTRASTS, FULL, Contrast, Facet

__all__ = ["WAYS", "answer", "findings", "headline", "verdict"]

WAYS = dict(zip(("full", "lowers", "matched", "best"), CONTRASTS, strict=True))
"""Question -> the way of comparing that answers it."""


def findings(facet: Facet, asks: Sequence[str]) -> list[str]:
    """Returns how many trials of a facet are on record, and its answers to a study's questions."""
    done = sum(trial.status.state == "done" for trial in facet.trials)
    seeds = len(facet.plan.axes["seed"])
    over = "one seed, so the spread is unknown" if seeds == 1 else f"{seeds} paired seeds"
    lines = [f"{done} of {len(facet.trials)} trials are on record ({over})."]
    return lines + [line for question in asks for line in answer(facet, question)]


def headline(facet: Facet) -> str:
    """Returns the verdict of a page in one sentence: of the gap, or of attention where no gap was measured."""
    if facet.comparison is None:
        return " ".join(answer(facet, "locality"))
    few, many = facet.counts[0], facet.counts[-1]
    trends = [(label, d) for label in facet.labels if few != many and (d := facet.trend(label, few, many)) is not None]
    falls = [f"{claim} ({labels})" for claim, labels in _by_claim((label, _claim(d)) for label, d in trends)]
    parts = [f"at N = {many:,} against N = {few:,}: {', '.join(falls)}"] if falls else []
    for first, second in combinations(facet.labels, 2):
        contrasts = facet.contrasts(first, second)[FULL]
        if any(contrast.difference is not None for contrast in contrasts):
            parts.append(f"{second} against {first}: {verdict(contrasts).replace('; ', ', ')}")
    return f"Average PSNR gap, {'; '.join(parts)}." if parts else ""


def answer(facet: Facet, question: str) -> list[str]:
    """Returns what a facet answers to one of the questions "falls", "locality", "consistency" and those of `WAYS`."""
    if question == "falls":
        return _falls(facet)
    if question in WAYS:
        lines, way = [], WAYS[question]
        for first, second in combinations(facet.labels, 2):
            contrasts = facet.contrasts(first, second)[way]
            if any(contrast.difference is not None for contrast in contrasts):
                lines.append(f"{_phrase(way)}, {second} against {first}: {verdict(contrasts)}.")
        return lines
    if facet.locality is None:
        return []
    if question == "locality":
        return [d.sentence("Mean attention distance", "tokens") for _, d in facet.locality.between_counts()]
    return [
        f"Maps of different images, {g.label} at N = {g.n:,}: mean cosine {g.mean('consistency'):.2f}, with rows "
        f"permuted {g.mean('consistency_control'):.2f}."
        for g in facet.locality.groups
        if g.n in (facet.counts[0], facet.counts[-1])
    ]


def _falls(facet: Facet) -> list[str]:
    lines = []
    for label in facet.labels:
        groups = [facet.comparison and facet.comparison.group(label, n) for n in facet.counts]
        gaps = ", ".join(f"{g.mean():.2f} dB at N = {g.n:,}" for g in groups if g is not None)
        whole = facet.trend(label, facet.counts[0], facet.counts[-1])
        if gaps and whole is not None and len(facet.counts) > 1:
            lines.append(f"Gap of {label}: {gaps}. {whole.sentence('From the smallest to the largest N')}")
    return lines


def _phrase(way: str) -> str:
    """A way of comparing as a sentence begins with it; it always says which of the two measurements it is."""
    return f"{way[0].upper()}{way[1:]}" + (" along training" if way in ALONG else "")


def verdict(contrasts: Iterable[Contrast]) -> str:
    """Returns where a difference was seen, by N: "at N = 10, 30 lower; at N = 100 no difference seen"."""
    claims = [(f"{c.n:,}", _claim(c.difference, c.measured)) for c in contrasts]
    return "; ".join(f"at N = {counts} {claim}" for claim, counts in _by_claim(claims))


def _by_claim(claims: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Returns (claim, the places where it holds) of (place, claim) pairs, what was seen first."""
    places: dict[str, list[str]] = {}
    for place, claim in claims:
        places.setdefault(claim, []).append(place)
    order = ("lower", "higher", "similar", "no difference", "one seed", "cannot", "not yet")
    claimed = sorted(places, key=lambda claim: next(i for i, start in enumerate(order) if claim.startswith(start)))
    return [(claim, ", ".join(places[claim])) for claim in claimed]


def _claim(d: PairedDifference | None, measured: bool = True) -> str:
    if d is None:
        return "cannot be compared" if measured else "not yet measured"
    if d.low is None:
        return "one seed, so nothing can be said"
    if not d.seen:
        return f"similar (within {d.margin:g} dB)" if d.similar else "no difference seen"
    return ("higher" if d.mean > 0 else "lower") + (f" (by less than {d.margin:g} dB)" if d.similar else "")
