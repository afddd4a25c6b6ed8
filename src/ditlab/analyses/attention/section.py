"""The tables, figures and section of attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from ditlab.analyses.attention.comparison import LocalityComparison
from ditlab.analyses.attention.config import AttentionOptions
from ditlab.analyses.attention.entries import (
    AttentionEntry,
    MapRow,
    Samples,
    page_rows,
    picture_of,
    token_pickers,
    verb_rows,
)
from ditlab.analyses.attention.figures import (
    attention_map_figure,
    layers_shown,
    locality_by_n,
    locality_curves,
    patterns_figure,
)
from ditlab.analyses.attention.maps import attention_layers
from ditlab.analyses.attention.result import OLDER
from ditlab.nn.patterns import Grid, Pattern
from ditlab.pages.drawing import Drawing
from ditlab.pages.page import Section, Table, ThemedFigure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ditlab.analyses.base import Comparison, ReportContext
    from ditlab.pages.theme import Theme

__all__ = ["attention_drawings", "attention_section", "attention_tables", "locality_section"]

_NO_IMAGE = "No token picker: real images are hidden here, and there is no sample that may be shown instead."
_NO_ROOM = "No token picker: the page reached its size limit. Report fewer models to get one."
_PICKER = (
    "Each map shows how one token of the image distributes its attention over all tokens, in one layer. A dashed line "
    "marks the tokens that the layer lets it see."
)
_SCALES = {
    "uniform": "Colours show the weight relative to uniform attention, on one logarithmic scale for all maps.",
    "paper": "Each map is scaled from its least to its largest weight and cut off at 0.1, as in An et al., Fig. 4.",
}
_NOTE = (
    "Uniform: the mean distance if attention were uniform within each layer's window. Position invariance: mean cosine "
    "between the rows of different queries. Consistency: mean cosine between the maps of different images. Control: "
    "the same with the rows of one of the two maps permuted."
)
MAX_SENTENCES = 2
"""Differences in sentences, at most; more are a table."""


def attention_entries(comparison: Comparison) -> list[AttentionEntry]:
    """Returns the models of a comparison with their results; none if the models are not at hand."""
    if comparison.models is None:
        return []
    return [AttentionEntry(comparison.models, place, result) for place, result in enumerate(comparison.results)]


def attention_tables(locality: LocalityComparison) -> list[Table]:
    """Returns a row for each kind of model and N; then, if there are more than a few, a table of the differences."""
    rows = []
    for g in locality.groups:
        std = g.std("distance")
        distance = f"{g.mean('distance'):.2f}" + ("" if std is None else f" ± {std:.2f}")
        near = (distance, float(g.results[0].pattern_distance.mean()), 100 * g.mean(1), 100 * g.mean(3))
        maps = (g.mean("position_invariance"), g.mean("consistency"), g.mean("consistency_control"))
        rows.append((g.label, g.n, len(g.results), *near, *maps))
    columns = (
        *("model", "N", "seeds", "mean distance, tokens", "uniform", "within 3x3, %", "within 7x7, %"),
        *("position invariance", "consistency", "control"),
    )
    first = locality.first
    levels = ", ".join(f"{sigma:.2g}" for sigma in first.levels)
    caption = (
        f"Locality of attention: means over {len(first.layers)} layers, {first.heads} heads, {first.images} images and "
        f"noise levels σ = {levels}; uniform attention over the whole grid has a mean distance of "
        f"{first.uniform_distance:.2f} tokens{f'; {OLDER}' if first.outdated else ''}"
    )
    tables = [Table(columns, rows, caption)]
    differences = [(None, d) for _, d in locality.between_counts()] + [*locality.between_labels()]
    if len(differences) > MAX_SENTENCES:
        rows = []
        for n, d in differences:
            interval = None if d.low is None else f"{d.low:+.2f} to {d.high:+.2f}"
            between = f"{d.second} minus {d.first}"
            rows.append((between, n, len(d.seeds), f"{d.mean:+.2f}", interval, d.verdict("tokens")))
        columns = ("difference", "N", "paired seeds", "tokens", "95 % interval", "what it shows")
        tables.append(Table(columns, rows, "Differences of the mean attention distance"))
    return tables


def attention_drawings(comparison: Comparison) -> dict[str, Drawing]:
    """Returns file name -> figure: the curves, the maps, and for models with windows the patterns.

    A page has the maps of the middle noise level only, and no patterns. File names on a page end in the number of the
    comparison; that of the first figure of maps has none.
    """
    locality: LocalityComparison = comparison.detail
    entries, number = attention_entries(comparison), comparison.number
    ending = f"-{number}" if number else ""
    drawings = _curves(comparison, ending)
    if not entries:
        return drawings
    if number:
        rows = page_rows(entries, _samples(comparison.context))
        if rows:
            sigma = locality.first.levels[len(locality.first.levels) // 2]
            name = "attention-maps" + (ending if number > 1 else "")
            drawings = {name: _maps(rows, sigma, AttentionOptions(), every=False)} | drawings
        return drawings
    rows, every = verb_rows(entries, comparison.options), bool(comparison.config.layers)
    for sigma in locality.first.levels:
        drawings[f"attention-maps-sigma{sigma:.3g}"] = _maps(rows, sigma, comparison.options, every=every)
    return drawings | _patterns(rows)


def _samples(context: ReportContext) -> Samples | None:
    """Returns the samples to show where a page hides real images; None where it shows them."""
    return context.shared.get("samples", {}) if context.hide_training_images else None


def _curves(comparison: Comparison, ending: str) -> dict[str, Drawing]:
    locality: LocalityComparison = comparison.detail
    results, slots = [r for g in locality.groups for r in g.results], comparison.slots
    names = " and ".join(locality.labels)
    drawings = {
        f"attention-locality{ending}": Drawing(
            lambda theme: locality_curves(results, slots=slots, theme=theme),
            f"Mean attention distance by layer and mass by window side of {names}.",
            "Thin dashed lines: uniform attention within each layer's window. Dotted lines: over the whole grid.",
        )
    }
    if len(locality.counts) > 1 and None not in locality.counts:
        drawings[f"attention-locality-by-n{ending}"] = Drawing(
            lambda theme: locality_by_n(results, slots=slots, theme=theme),
            f"Locality of {names} against the number of training images.",
            "Means over layers, heads and noise levels. Dots are seeds.",
        )
    return drawings


def _maps(rows: Sequence[MapRow], sigma: float, options: AttentionOptions, *, every: bool) -> Drawing:
    """Returns the figure of maps at a noise level, of every layer or of a few."""
    layers = sorted(set.intersection(*({*row.entry.result.layers} for row in rows)))
    # Maps are large, so those that are not shown are not made.
    layers = layers if every else layers_shown(layers)
    shown = cache(lambda: ([(row.name, row.entry.maps(row.image, sigma, layers)) for row in rows], picture_of(rows)))
    settings: Any = {"token": options.place, "heads": options.heads, "scale": options.map_scale}

    def draw(theme: Theme) -> Figure:
        maps, picture = shown()
        return attention_map_figure(maps, layers=layers, picture=picture, theme=theme, **settings)

    token = "the middle token" if options.place is None else f"the token {options.place}"
    return Drawing(
        draw,
        f"Attention maps of {', '.join(row.name for row in rows)}, layer by layer, with those of {token}.",
        f"Above: the map of each layer, queries downwards, with its centre enlarged. Below: the attention of {token}. "
        f"{_SCALES[options.map_scale]}",
    )


def _patterns(rows: Sequence[MapRow]) -> dict[str, Drawing]:
    """Returns the patterns of each plan with windows; a plan that is global throughout shows nothing."""
    plans: dict[tuple[tuple[Pattern, ...], tuple[int, ...]], Grid] = {}
    for row in rows:
        result, layers = row.entry.result, attention_layers(row.entry.opened.denoiser)
        if any(layer.grid != result.grid for layer in layers):
            layers = [layers[number - 1] for number in result.layers]
        if not all(layer.pattern.covers(result.grid) for layer in layers):
            plan = tuple(layer.pattern for layer in layers), tuple(layer.number for layer in layers)
            plans.setdefault(plan, result.grid)
    drawings = {}
    for place, ((plan, numbers), grid) in enumerate(plans.items(), 1):
        drawings["attention-patterns" + (f"-{place}" if len(plans) > 1 else "")] = Drawing(
            lambda theme, plan=plan, numbers=numbers, grid=grid: patterns_figure(
                plan, grid, numbers=numbers, theme=theme
            ),
            "The keys that a corner, an edge and a middle token see under each pattern, and the whole mask.",
        )
    return drawings


def attention_section(comparison: Comparison, figures: Mapping[str, ThemedFigure], number: int) -> Section:
    """Returns the section "attention": token pickers and maps, and within it "locality": table, curves, numbers.

    Token pickers are made where the context has bytes for them, shared equally by the comparisons of the page.
    """
    locality: LocalityComparison = comparison.detail
    context, number = comparison.context, max(number, comparison.number)
    samples, pickers, paragraphs = _samples(context), [], []
    if samples is not None and not any(len(images) for images, _ in samples.values()):
        paragraphs = [_NO_IMAGE]
    elif context.picker_bytes > 0:
        budget = context.picker_bytes // comparison.count
        pickers = token_pickers(attention_entries(comparison), budget, samples=samples)
        paragraphs = [_PICKER] if pickers else [_NO_ROOM]
    maps = [figure for name, figure in figures.items() if name.startswith("attention-maps")]
    curves = [figure for name, figure in figures.items() if not name.startswith("attention-maps")]
    files = {f"{r.about.name}-attention.json": r.to_json() for g in locality.groups for r in g.results}
    verdict, *points = comparison.sentences() or ("",)
    return Section(
        "attention" + ("" if number == 1 else f"-{number}"),
        "Where a token attends" + ("" if number == 1 else f" ({number})"),
        paragraphs,
        pickers=pickers,
        pictures=maps,
        parts=[locality_section(locality, curves, number=number, sentences=points, notes=comparison.notes, data=files)],
        verdict=verdict,
    )


def locality_section(
    locality: LocalityComparison,
    pictures: Sequence[ThemedFigure],
    *,
    number: int = 1,
    sentences: Sequence[str] = (),
    notes: Sequence[str] = (),
    data: Mapping[str, Any] | None = None,
) -> Section:
    """Returns the section "locality" of models that were measured alike: the table, the curves, the numbers.

    `number` is its place among such sections of a page, `data` what there is behind it beside the comparison itself.
    """
    name = "locality" if number == 1 else f"locality-{number}"
    return Section(
        name,
        "How local attention is" + ("" if number == 1 else f" ({number})"),
        points=sentences,
        tables=attention_tables(locality),
        notes=[_NOTE, *notes],
        pictures=pictures,
        data={f"{name}.json": locality.to_json(), **(data or {})},
    )
