"""What the cells of a panel say, in sentences that claim no more than the intervals of paired seeds allow."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from ditlab.studies.results import ALONG, CONTRASTS, Contrast, Panel, verdict

_WAYS = dict(zip(("full", "lowers", "matched", "best"), CONTRASTS, strict=True))
"""Question -> the way of comparing that answers it."""


def findings(panel: Panel, asks: Sequence[str]) -> list[str]:
    """What a panel's cells say to a study's questions (`seen`), and how many of them are on record."""
    done = sum(c.standing.state == "done" for c in panel.cells)
    seeds = len(panel.plan.axes["seed"])
    over = "one seed: nothing can be said about spread" if seeds == 1 else f"{seeds} paired seeds"
    lines = [f"{done} of {len(panel.cells)} cells are on record ({over})."]
    for about in asks:
        lines += seen(panel, about)
    return lines


def seen(panel: Panel, about: str) -> list[str]:
    """What a panel says about one of the questions: "falls", those of `_WAYS`, "locality", "consistency"."""
    if about == "falls":
        return _falls(panel)
    if about in _WAYS:
        lines = []
        for first, second in combinations(panel.labels, 2):
            way = ways_of(panel, first, second)[_WAYS[about]]
            if any(c.difference is not None for c in way):
                lines.append(f"{said(_WAYS[about])}, {second} against {first}: {verdict(way)}.")
        return lines
    if panel.locality is None:
        return []
    if about == "locality":
        return [d.sentence("Mean attention distance", "tokens") for _, d in panel.locality.between_counts()]
    return [
        f"Maps of different images, {g.label} at N = {g.n:,}: mean cosine {g.mean('consistency'):.2f}, with rows "
        f"permuted {g.mean('consistency_control'):.2f}."
        for g in panel.locality.groups
        if g.n in (panel.counts[0], panel.counts[-1])
    ]


def _falls(panel: Panel) -> list[str]:
    lines = []
    for label in panel.labels:
        groups = [panel.comparison and panel.comparison.group(label, n) for n in panel.counts]
        gaps = ", ".join(f"{g.mean():.2f} dB at N = {g.n:,}" for g in groups if g is not None)
        whole = panel.trend(label, panel.counts[0], panel.counts[-1])
        if gaps and whole is not None and len(panel.counts) > 1:
            lines.append(f"Gap of {label}: {gaps}. {whole.sentence('From the smallest to the largest N')}")
    return lines


def said(what: str) -> str:
    """A way of comparing as a sentence begins with it: by which of the two instruments is always said."""
    return f"{what[0].upper()}{what[1:]}" + (" along training" if what in ALONG else "")


def ways_of(panel: Panel, first: str, second: str) -> dict[str, list[Contrast]]:
    """Way -> the comparisons of two kinds, one an N."""
    mine = [c for c in panel.contrasts if (c.first, c.second) == (first, second)]
    return {what: [c for c in mine if c.what == what] for what in CONTRASTS}
