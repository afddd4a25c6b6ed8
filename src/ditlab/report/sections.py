"""The standard sections of a page, made of results: samples, PSNR, gap, along training, matched, scaling,
attention, locality.

Each function lays out what it is given and computes nothing; pictures come from the modules of figures. A part that has
nothing to show makes an empty section, which the page leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ditlab.analyses.attention.comparison import LocalityComparison
from ditlab.analyses.psnr_gap.comparison import PSNRComparison
from ditlab.analyses.scaling.figures import WORDS
from ditlab.analyses.scaling.points import ScalingPoint, along_training, measured
from ditlab.analyses.trajectory.comparison import MatchedComparison
from ditlab.metrics.nearest import NearestResult
from ditlab.pages.page import Section, Table, ThemedFigure
from ditlab.pages.token_picker import AttentionPicker


def samples_section(pictures: Sequence[ThemedFigure], nearest: Sequence[NearestResult] = ()) -> Section:
    """Samples, and how far each lies from its nearest training image."""
    rows = [
        (
            r.about.group,
            r.about.n,
            r.about.seed,
            len(r.samples.first),
            float(np.median(r.samples.first)),
            None if r.held_out is None else float(np.median(r.held_out.first)),
            r.samples.copies,
        )
        for r in nearest
    ]
    columns = ("run", "N", "seed", "samples", "distance of samples", "distance of held-out images", "copies")
    caption = "Median distance to the nearest training image, in grey levels (0 to 255)"
    note = (
        "Distance: root mean square difference of pixels. A copy is a sample whose nearest training image is less than "
        "a third as far as the second nearest (d1/d2 < 1/3). Held-out images show what the distance is where nothing "
        "was copied."
    )
    if any(r.latents for r in nearest):
        note += (
            " Of runs on latents both sides are decoded: the distance is that of the pictures which the autoencoder "
            "makes of the latents, not of the original pictures."
        )
    return Section(
        "samples",
        "Samples and their nearest training images",
        tables=[Table(columns, rows, caption, digits=1)] if rows else (),
        notes=[note] if rows else (),
        pictures=pictures,
        data={f"{r.about.name}-nearest.json": r.to_json() for r in nearest},
    )


def psnr_section(
    comparison: PSNRComparison, pictures: Sequence[ThemedFigure] = (), data: Mapping[str, Any] | None = None
) -> Section:
    """Train and test PSNR: a row a kind of run and N, what must be said about the measurement, and the curves."""
    rows = [
        (g.label, g.n, len(g.seeds), g.mean("train"), g.mean("test"), g.mean("gap"), g.std()) for g in comparison.groups
    ]
    columns = ("run", "N", "shuffles", "train PSNR, dB", "test PSNR, dB", "gap, dB", "std of gap")
    notes = dict.fromkeys(note for g in comparison.groups for r in g.results for note in r.notes)
    return Section(
        "psnr",
        "Train and test PSNR by noise level",
        tables=[Table(columns, rows)],
        notes=list(notes),
        pictures=pictures,
        data=data or {},
    )


def gap_section(comparison: PSNRComparison, pictures: Sequence[ThemedFigure] = ()) -> Section:
    """The differences of the gap between kinds of runs, and the bars."""
    # The comparison's sentences are one a group, then one a difference.
    differences = comparison.sentences()[len(comparison.groups) :]
    record = {"comparison.json": comparison.to_json()}
    return Section("gap", "PSNR gap", points=differences, pictures=pictures, data=record)


def training_section(pictures: Sequence[ThemedFigure], data: Mapping[str, Any] | None = None) -> Section:
    """The gap and the losses against training steps."""
    return Section("training", "Along training", pictures=pictures, data=data or {})


def matched_section(matched: Sequence[MatchedComparison], pictures: Sequence[ThemedFigure] = ()) -> Section:
    """Equal steps, equal train PSNR, best test PSNR: a part for each two kinds of runs at each N."""
    why = (
        "A gap at equal steps cannot tell a network that generalizes better from one that fits more slowly. So the "
        "runs are also compared where both have reached the same train PSNR, and at the best test PSNR that each "
        "reaches."
    )
    parts = []
    for i, comparison in enumerate(matched):
        between = f"{comparison.first} and {comparison.second}"
        parts.append(
            Section(
                f"matched-{i}",
                between if comparison.n is None else f"{between}, N = {comparison.n}",
                points=comparison.sentences(),
                tables=[matched_table(comparison)],
                data={f"matched-{i}.json": comparison.to_json()},
            )
        )
    return Section(
        "matched",
        "At equal steps, at matched train PSNR, and at their best",
        [why] if matched or pictures else (),
        notes=["PSNR and gaps in dB, averaged over the noise levels measured during training."] if matched else (),
        pictures=pictures,
        parts=parts,
    )


def matched_table(comparison: MatchedComparison) -> Table:
    """A row for each seed and side."""
    columns = (
        "run",
        "seed",
        "gap at equal steps",
        "at step",
        "gap at matched train PSNR",
        "that train PSNR",
        "test PSNR there",
        "reached at step",
        "best test PSNR",
        "at step ",
    )
    rows = []
    for seed in comparison.seeds:
        for side, label in enumerate((comparison.first, comparison.second)):
            there = (None,) * 4
            if seed.matched_train is not None and seed.gap_matched and seed.test_matched and seed.step_matched:
                step = round(seed.step_matched[side])
                there = (seed.gap_matched[side], seed.matched_train, seed.test_matched[side], step)
            best = (seed.best_test[side], seed.best_step[side])
            rows.append((label, seed.seed, seed.gap_at_step[side], seed.step, *there, *best))
    return Table(columns, rows)


def scaling_section(points: Sequence[ScalingPoint], pictures: Sequence[ThemedFigure] = ()) -> Section:
    """What networks of several sizes cost and reached: a row a run with its last values, and the figures."""
    metrics = measured(points)
    last = {metric: {run: mine[-1] for run, mine in along_training(points, metric).items()} for metric in metrics}
    rows = []
    for run in dict.fromkeys(point.run for point in points):
        end = max((point for point in points if point.run == run), key=lambda point: point.step)
        values = [last[metric][run].metrics[metric] if run in last[metric] else None for metric in metrics]
        rows.append((run, end.label, end.parameters / 1e6, end.gmacs, end.step, f"{end.training_gmacs:.2e}", *values))
    columns = (
        "run",
        "kind",
        "parameters, M",
        "GMACs",
        "steps",
        "training, GMACs",
        *(WORDS[metric] for metric in metrics),
    )
    note = (
        "GMACs: 10^9 multiply-accumulates of a forward pass for one image. Training compute: GMACs x batch size x "
        "steps x 3. Losses of objectives or noise schedules that differ cannot be compared."
    )
    return Section(
        "scaling",
        "Scaling: quality against compute",
        tables=[Table(columns, rows, digits=3)] if rows else (),
        notes=[note] if rows else (),
        pictures=pictures,
        data={"scaling.json": {"points": [point.to_json() for point in points]}} if rows else {},
    )


def attention_section(
    pickers: Sequence[AttentionPicker], pictures: Sequence[ThemedFigure] = (), *, instead: str = ""
) -> Section:
    """Where tokens attend: pickers, or the words to show instead of any, and figures for paper."""
    what = (
        "Each map shows how one token of the image shares out its attention over all tokens, in one layer. A broken "
        "line is the border of what the layer lets the token see."
    )
    words = [what] if pickers else [instead] if instead else []
    return Section("attention", "Where a token attends", words, pickers=pickers, pictures=pictures)


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
        pictures: of `ditlab.analyses.attention.figures`.
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
        "shuffles",
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
