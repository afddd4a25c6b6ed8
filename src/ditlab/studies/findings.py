"""What the trials of a facet show, in sentences that claim no more than the intervals of paired seeds allow."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from ditlab.studies.results import ALONG, CONTRASTS, Contrast, Facet, verdict

__all__ = ["answer", "contrasts", "findings", "phrase"]

_WAYS = dict(zip(("full", "lowers", "matched", "best"), CONTRASTS, strict=True))
"""Question -> the way of comparing that answers it."""


def findings(facet: Facet, asks: Sequence[str]) -> list[str]:
    """Returns how many trials of a facet are on record, and its answers to a study's questions."""
    done = sum(trial.status.state == "done" for trial in facet.trials)
    seeds = len(facet.plan.axes["seed"])
    over = "one seed, so the spread is unknown" if seeds == 1 else f"{seeds} paired seeds"
    lines = [f"{done} of {len(facet.trials)} trials are on record ({over})."]
    for question in asks:
        lines += answer(facet, question)
    return lines


def answer(facet: Facet, question: str) -> list[str]:
    """Returns what a facet answers to one of the questions "falls", "locality", "consistency" and those of `_WAYS`."""
    if question == "falls":
        return _falls(facet)
    if question in _WAYS:
        lines = []
        for first, second in combinations(facet.labels, 2):
            way = contrasts(facet, first, second)[_WAYS[question]]
            if any(contrast.difference is not None for contrast in way):
                lines.append(f"{phrase(_WAYS[question])}, {second} against {first}: {verdict(way)}.")
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


def phrase(way: str) -> str:
    """Returns a way of comparing as a sentence begins with it; it always says which of the two measurements it is."""
    return f"{way[0].upper()}{way[1:]}" + (" along training" if way in ALONG else "")


def contrasts(facet: Facet, first: str, second: str) -> dict[str, list[Contrast]]:
    """Returns for each way of comparing two kinds the contrasts, one for each N."""
    mine = [c for c in facet.contrasts if (c.first, c.second) == (first, second)]
    return {way: [c for c in mine if c.what == way] for way in CONTRASTS}
