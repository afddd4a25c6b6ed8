"""The section of a page about how local attention is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ditlab.analyses.attention.comparison import LocalityComparison
from ditlab.pages.page import Section, Table, ThemedFigure


def locality_section(
    comparison: LocalityComparison,
    pictures: Sequence[ThemedFigure] = (),
    *,
    number: int = 1,
    data: Mapping[str, Any] | None = None,
) -> Section:
    """How local attention is: a row a kind of run and N with its reference values, the sentences, the curves.

    Args:
        comparison: runs that were measured alike.
        pictures: of `ditlab.analyses.attention.locality_figures`.
        number: where a page has several such sections, which one this is.
        data: files behind it, beside the comparison itself.
    """
    rows = []
    for g in comparison.groups:
        allowed = float(g.results[0].pattern_distance.mean())
        near = (g.mean("distance"), g.std("distance"), allowed, 100 * g.mean(1), 100 * g.mean(3))
        maps = (g.mean("position_invariance"), g.mean("consistency"), g.mean("consistency_control"))
        rows.append((g.label, g.n, len(g.results), *near, *maps))
    columns = (
        "run",
        "N",
        "seeds",
        "mean distance, tokens",
        "std",
        "if uniform where allowed",
        "within 3x3, %",
        "within 7x7, %",
        "position invariance",
        "consistency",
        "its control",
    )
    first = comparison.first
    levels = ", ".join(f"{sigma:.2g}" for sigma in first.levels)
    caption = (
        f"Means over {len(first.layers)} layers, {first.heads} heads, {first.images} held-out images and the noise "
        f"levels σ = {levels}; uniform attention over the whole grid has a mean distance of "
        f"{first.uniform_distance:.2f} tokens"
    )
    note = (
        "Position invariance: mean cosine between the rows of different queries. Consistency: mean cosine between the "
        "maps of different images; its control has the rows of one of the two maps permuted."
    )
    notes = dict.fromkeys(n for g in comparison.groups for r in g.results for n in r.notes)
    name = "locality" if number == 1 else f"locality-{number}"
    # The comparison's sentences are one a group, which the table repeats, then one a difference.
    return Section(
        name,
        "How local attention is" + ("" if number == 1 else f" ({number})"),
        points=comparison.sentences()[len(comparison.groups) :],
        tables=[Table(columns, rows, caption)],
        notes=[note, *notes],
        pictures=pictures,
        data={f"{name}.json": comparison.to_json(), **(data or {})},
    )
