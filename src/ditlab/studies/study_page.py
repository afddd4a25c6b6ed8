"""The page of a study: what its recorded trials show, beside what was published, and which trials are empty.

It is made from plan.json and cells/ alone. Every sentence about a difference comes from the interval of paired seeds;
tables and figures are those of the analyses.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

from ditlab.analyses import analysis
from ditlab.analyses.attention.figures import patterns_figure
from ditlab.analyses.attention.section import MAX_SENTENCES, locality_section
from ditlab.analyses.base import Comparison, Overview, ReportContext
from ditlab.analyses.groups import differences_table
from ditlab.analyses.trajectory.comparison import Course
from ditlab.analyses.trajectory.tables import matched_table
from ditlab.files import write_bytes, write_json, write_text
from ditlab.metrics.paired import PairedDifference, mean_interval
from ditlab.nn.attention_plan import parse_plan
from ditlab.pages.drawing import Drawing
from ditlab.pages.page import PAGE_BYTES, PageData, Section, Table, ThemedFigure, page_size, save_page
from ditlab.pages.theme import assign
from ditlab.pages.token_picker import AttentionPicker
from ditlab.reporting.first_screen import FirstScreen
from ditlab.studies.figures import differences_figure
from ditlab.studies.findings import WAYS, answer, findings, headline
from ditlab.studies.grid import Plan, Study
from ditlab.studies.published import Published, differing, published, settings_here
from ditlab.studies.results import ALONG, FULL, Facet, TrialResults, facets
from ditlab.studies.store import Store

__all__ = ["StudyPage"]

_NOT_CORRECTED = (
    "Intervals are 95 % t intervals over paired seeds; each seed has its own split of the images. They are not "
    "corrected for comparing at several N: about one of twenty intervals excludes zero by chance."
)
_THREE_WAYS = (
    "A smaller gap at equal steps can only mean slower fitting. So each two kinds of runs are compared in three ways: "
    "the gap after the same number of steps, the gap at the same train PSNR, and the best test PSNR that each reaches "
    "along training. These three are measured in the same way, along training, and can be compared with each other."
)
_MEANS = "The table has means over seeds; beneath, where there are several, 95 % t intervals."
_FIRST: Mapping[str, Mapping[str, Any]] = {
    "psnr-gap": {"train, dB": "train", "test, dB": "test", "gap, dB": "gap"},
    "attention": {"mean attention distance, tokens": "distance"},
}
"""Analysis -> column of the first screen's table -> the quantity in it."""
_ANSWERS: Mapping[str, Sequence[str]] = {"lowers": ("full", "lowers", "matched")}
"""A claim's question -> the questions whose answers belong to it, if they are several."""
_MAPS = "maps"
"""The section of attention maps and token pickers."""


class StudyPage:
    """The page of one study, at one or several scales."""

    def __init__(self, study: Study, plans: Sequence[Plan], store: Store, maps: Sequence[ThemedFigure] = ()) -> None:
        self.study, self.plans, self.store = study, plans, store
        self.facets: list[Facet] = [facet for plan in plans for facet in facets(plan, store)]
        self.paper = published(study.published) if study.published else None
        self.slots = assign(label for facet in self.facets for label in facet.labels)
        self._maps = maps
        self._figures: dict[str, ThemedFigure] = {}

    def save(
        self, folder: Path, pickers: Callable[[int], Sequence[AttentionPicker]] = lambda room: ()
    ) -> tuple[Path, list[str]]:
        """Writes report.html, table.csv, table.json and figures/; returns the path of the page and its sentences.

        `pickers` makes token pickers of at most so many bytes, which is what the rest of the page leaves.
        """
        sentences, screens = self.sentences(), self.first_screens()
        rows = [{"scale": f.plan.scale, **trial.row()} for f in self.facets for trial in f.trials]
        trained = [record for facet in self.facets for record in facet.records("cell").values()]
        data = PageData(
            title=self.study.title,
            summary=[*(line for screen in screens for line in screen.sentences), self.study.question],
            tables=[screen.table for screen in screens],
            pictures=[picture for screen in screens for picture in screen.pictures],
            notes=[note for screen in screens for note in screen.notes],
            sections=[*self.sections(), _costs(trained, self.plans)],
            labels=list(self.slots),
            commands=[(f"this study, scale {plan.scale}", plan.command) for plan in self.plans if plan.command],
            environment=trained[0]["environment"] if trained else {},
            downloads={"table.json": rows, **{f"plan-{plan.scale}.json": plan.to_json() for plan in self.plans}},
        )
        chosen = pickers(max(0, PAGE_BYTES - page_size(data)))
        shown = [replace(section, pickers=chosen) if section.id == _MAPS else section for section in data.sections]
        page = save_page(replace(data, sections=shown), folder / "report.html")
        write_json(folder / "table.json", {"kind": "study-table", "version": 1, "cells": rows, "sentences": sentences})
        write_text(folder / "table.csv", _csv(rows))
        for name, figure in self._figures.items():
            write_bytes(folder / "figures" / f"{name}.png", figure.light)
        return page, sentences

    def sentences(self) -> list[str]:
        """Returns what was found, the most important first."""
        return [self._prefix(facet) + line for facet in self.facets for line in findings(facet, self.study.asks)]

    def _name(self, facet: Facet) -> str:
        """The name of a facet in headings; with the scale if there are several."""
        return facet.name + (f", scale {facet.plan.scale}" if len(self.plans) > 1 else "")

    def _prefix(self, facet: Facet) -> str:
        return f"{self._name(facet)}: " if len(self.facets) > 1 else ""

    def first_screens(self) -> list[FirstScreen]:
        """Returns what a reader sees before scrolling: one screen, or one for each facet that has results."""
        screens = []
        for facet in self.facets:
            overview = self._overview(facet)
            if overview.cells or len(self.facets) == 1:
                rows = [(label, n) for n in facet.counts for label in facet.labels]
                screen = FirstScreen.of(rows, [overview], findings(facet, ())[0])
                prefix = self._prefix(facet)
                caption = self._name(facet) if prefix else ""
                lines = [prefix + line for line in screen.sentences]
                screens.append(replace(screen, sentences=lines, table=replace(screen.table, caption=caption)))
        return screens

    def _overview(self, facet: Facet) -> Overview:
        """The gap of each kind at each N with its differences; where no gap was measured, attention against N."""
        for name, detail in (("psnr-gap", facet.comparison), ("attention", facet.locality)):
            if detail is not None:
                cells = {
                    (g.label, g.n): {column: _cell(g.averages(what)) for column, what in _FIRST[name].items()}
                    for g in detail.groups
                }
                comparison = self._compared(name, detail)
                figure = analysis(name).overview(comparison).figure
                if figure is None and len(facet.counts) > 1:
                    figure = _distance_by_n(facet)
                note = f"{self._prefix(facet)}{findings(facet, ())[0]} {_MEANS}"
                return Overview(cells, headline(facet), figure, note=note)
        return Overview()

    def sections(self) -> list[Section]:
        """Returns every section, facet by facet."""
        sections: list[Section] = []
        for number, facet in enumerate(self.facets, 1):
            tail = "" if number == 1 else f"-{number}"
            name = f" ({self._name(facet)})" if len(self.facets) > 1 else ""
            sections.append(self._grid(facet, tail, name))
            if "psnr-gap" in facet.plan.analyses:
                sections += [make(facet, tail, name) for make in (self._gap, self._ways, self._curves, self._along)]
            sections.append(self._locality(facet, number, tail, name))
        sections.append(Section(_MAPS, "Attention maps against N", pictures=self._maps))
        if self.paper is not None:
            sections += [self._claims(self.paper), self._published(self.paper), self._settings(self.paper)]
        return sections

    def _compared(self, room: str, detail: Any) -> Comparison:
        """The recorded results as a comparison of their analysis, which has its tables and figures."""
        return Comparison(analysis(room), detail, (), context=ReportContext(slots=self.slots))

    def _picture(self, name: str, drawing: Drawing) -> ThemedFigure:
        self._figures[name] = ThemedFigure.of(drawing)
        return self._figures[name]

    def _grid(self, facet: Facet, tail: str, name: str) -> Section:
        """Which trials are on record."""
        trials = {tuple(t.place[axis] for axis in ("attention", "seed", "n")): t for t in facet.trials}
        rows = [
            (label, seed, *(_mark(trials.get((label, seed, n))) for n in facet.counts))
            for label in facet.labels
            for seed in facet.plan.axes["seed"]
        ]
        columns = ("attention", "seed", *(f"N = {n:,}" for n in facet.counts))
        states = Counter(trial.status.state for trial in facet.trials)
        words = ", ".join(f"{count} {state}" for state, count in states.items())
        what = "gap in dB" if "psnr-gap" in facet.plan.analyses else "mean attention distance in tokens"
        facts = facet.plan.images[facet.data]
        plans = ", ".join(f"{label}: `{text}`" for label, text in facet.plan.plans.items())
        about = (
            f"Images: {facts['count']:,} of {facet.data} at {facts['size']}x{facts['size']} pixels (set "
            f"{str(facts['hash'])[:12]}). Network: {facet.network}. Attention plans, one entry for each layer: {plans}."
        )
        caption = f"Each trial's {what}, or how far it is; {len(facet.trials)} trials: {words}"
        return Section(
            f"cells{tail}",
            f"Trials of the grid{name}",
            [about],
            verdict=findings(facet, ())[0],
            pictures=self._patterns(facet, tail),
            tables=[Table(columns, rows, caption)],
        )

    def _patterns(self, facet: Facet, tail: str) -> list[ThemedFigure]:
        """What each plan with windows lets a token see (An et al., Fig. 5)."""
        settings = settings_here(facet.plan, facet.network)
        side = int(facet.plan.images[facet.data]["size"]) // settings["network.patch"]
        pictures = []
        for label, text in facet.plan.plans.items():
            plan = parse_plan(text, settings["network.depth"], settings["network.border"])
            if any(pattern.name != "global" for pattern in plan):
                drawing = Drawing(
                    lambda theme, plan=plan: patterns_figure(plan, (side, side), theme=theme),
                    f"What a corner, an edge and a middle token see in each layer of {label} attention.",
                    f"The tokens that {label} attention lets a token see, by layer (An et al., Fig. 5).",
                )
                pictures.append(self._picture(f"patterns-{len(pictures) + 1}{tail}", drawing))
        return pictures

    def _gap(self, facet: Facet, tail: str, name: str) -> Section:
        """The gap of each kind at each N, and how it falls with N."""
        if facet.comparison is None:
            return Section(f"gap{tail}", "")
        compared = self._compared("psnr-gap", facet.comparison)
        trends = [
            (f"gap of {label}", None, difference)
            for label in facet.labels
            for few, many in pairwise(facet.counts)
            if (difference := facet.trend(label, few, many)) is not None
        ]
        fall = [differences_table(trends, "The gap minus that at the next smaller N")] if trends else []
        records = facet.records("psnr-gap")
        notes = list(dict.fromkeys(note for record in records.values() for note in record["notes"]))
        if facet.alone:
            notes.append(f"Not counted, because no other kind has the same seed: {', '.join(facet.alone)}.")
        return Section(
            f"gap{tail}",
            f"The PSNR gap against N{name}",
            points=answer(facet, "falls"),
            tables=[*compared.tables(), *fall],
            notes=notes,
            pictures=[self._picture(f"gap-bars{tail}", compared.drawings()["gap-bars"])],
            data={f"psnr-gap{tail}.json": records},
        )

    def _ways(self, facet: Facet, tail: str, name: str) -> Section:
        """Two kinds of attention, compared in the full measurement and in three ways along training."""
        contrasts = {pair: facet.contrasts(*pair) for pair in combinations(facet.labels, 2)}
        tables, pictures = [], []
        for caption, shown in (("Along training", ALONG), ("Full measurement", (FULL,))):
            every = [(way, c) for ways in contrasts.values() for way in shown for c in ways[way]]
            rows = [(way, c.n, c.difference) for way, c in every if c.difference is not None]
            tables += [differences_table(rows, caption)] if rows else []
        if not tables:
            return Section(f"ways{tail}", "")
        for number, (pair, ways) in enumerate(contrasts.items(), 1):
            # The full measurement has bars of its own (`_gap`); here are those that were measured in the same way.
            along = {way: {c.n: c.difference for c in ways[way]} for way in ALONG}
            if any(difference is not None for way in along.values() for difference in way.values()):
                ending = f"-{number}" if len(contrasts) > 1 else ""
                pictures.append(self._picture(f"differences{tail}{ending}", _along_drawing(*pair, along)))
        two = f"{' against '.join(reversed(facet.labels)).capitalize()}, three ways"
        return Section(
            f"ways{tail}",
            (two if len(contrasts) == 1 else "The kinds of attention, compared in three ways") + name,
            [_THREE_WAYS, _instruments(facet)],
            points=[line for question in WAYS for line in answer(facet, question)],
            tables=tables,
            notes=[_NOT_CORRECTED],
            pictures=pictures,
            data={f"matched{tail}.json": [m.to_json() for m in facet.matched]},
        )

    def _curves(self, facet: Facet, tail: str, name: str) -> Section:
        if facet.comparison is None:
            return Section(f"curves{tail}", "")
        solid = "Solid lines: training images. Dashed lines: held-out images of the same kind (An et al., Fig. 2)."
        drawing = replace(self._compared("psnr-gap", facet.comparison).drawings()["psnr-curves"], caption=solid)
        picture = self._picture(f"psnr-curves{tail}", drawing)
        return Section(f"curves{tail}", f"Train and test PSNR by noise level{name}", pictures=[picture])

    def _along(self, facet: Facet, tail: str, name: str) -> Section:
        """PSNR along training, a part for each N."""
        parts = []
        for n in facet.counts:
            runs = tuple(run for run in facet.trajectories if run.n == n)
            matched = tuple(m for m in facet.matched if m.n == n)
            if runs:
                course = Course(runs, matched, {(n, run.label): () for run in runs})
                drawings = self._compared("trajectory", course).drawings().items()
                pictures = [self._picture(f"{file}-n{n}{tail}", drawing) for file, drawing in drawings]
                tables = [replace(matched_table(m), folded=f"Seed by seed: {m.first} and {m.second}") for m in matched]
                parts.append(Section(f"along-{n}{tail}", f"N = {n:,}", pictures=pictures, tables=tables))
        note = "Measured with averaged weights at few noise levels, each time with the same images and noise."
        return Section(f"along{tail}", f"Along training{name}", notes=[note] if parts else (), parts=parts)

    def _locality(self, facet: Facet, number: int, tail: str, name: str) -> Section:
        comparison = facet.locality
        if comparison is None:
            return Section(f"locality{tail}", "")
        drawings = self._compared("attention", comparison).drawings().items()
        pictures = [self._picture(file.removeprefix("attention-") + tail, drawing) for file, drawing in drawings]
        differences = comparison.differences()
        sentences = differences if len(differences) <= MAX_SENTENCES else ()  # else they are in a table
        data = {f"attention{tail}.json": facet.records("attention")}
        section = locality_section(comparison, pictures, number=number, sentences=sentences, data=data)
        return replace(section, title=f"How local attention is{name}")

    def _claims(self, paper: Published) -> Section:
        """What the paper reports, and what was measured here."""
        parts = []
        for number, claim in enumerate(paper.claims, 1):
            here = [
                self._prefix(facet) + line
                for facet in self.facets
                for question in _ANSWERS.get(claim["about"], (claim["about"],))
                for line in answer(facet, question)
            ]
            where = f"The paper: {claim['source']}, {claim['certainty']}. Here:"
            parts.append(Section(f"claim-{number}", claim["text"], [where], here or ["Nothing is on record."]))
        notes = [f"{word[0].upper()}{word[1:]}: {meaning}." for word, meaning in paper.certainty.items()]
        title = "What the paper reports, and what was measured here"
        return Section("claims", title, [f"{paper.paper}."], notes=notes, parts=parts)

    def _published(self, paper: Published) -> Section:
        """Published gaps and the measured ones, in one table by N."""
        reported = paper.gaps()
        if not reported:
            return Section("published", "")
        measured = [row for facet in self.facets for row in self._measured_gaps(facet)]
        here = {(facet.network, n) for facet in self.facets for n in facet.counts}
        words = (
            "Trials of this page with a network and an N of the paper are beside its numbers."
            if any((network, n) in here for _, network, n, *_ in reported)
            else "No trial of this page has a network and an N of the paper, so only the pattern of the numbers can be "
            "compared, not their sizes."
        )
        columns = ("images", "network", "N", "gap, global", "gap, local", "difference", "source")
        first = [row for row in reported if row[0] == reported[0][0]]
        mine = Table(columns, [*measured, *first], "Average PSNR gap, dB")
        more = Table(columns, reported[len(first) :], folded="The paper's other image sets")
        return Section("published", "Published and measured gaps", [words], tables=[mine, more])

    def _measured_gaps(self, facet: Facet) -> list[tuple[Any, ...]]:
        """The gap of global and of local attention at each N, as rows of the table of published ones."""
        rows, size = [], facet.plan.images[facet.data]["size"]
        place = f"{facet.data} at {size}x{size}" + (f", scale {facet.plan.scale}" if len(self.plans) > 1 else "")
        for n in facet.counts:
            groups = [facet.comparison and facet.comparison.group(label, n) for label in ("global", "local")]
            a, b = (g and g.mean() for g in groups)
            if a is not None or b is not None:
                seeds = max(len(g.seeds) for g in groups if g is not None)
                source = f"measured here, {seeds} seed{'s' if seeds > 1 else ''}"
                rows.append((place, facet.network, n, a, b, None if a is None or b is None else b - a, source))
        return rows

    def _settings(self, paper: Published) -> Section:
        """How the settings here differ from the paper's."""
        tables, columns = [], ("setting", "the paper", "how that is known", "here")
        for plan in self.plans:
            for network in plan.axes["network"]:
                rows = [(f"`{name}`", there, sure, here) for name, there, sure, here in differing(paper, plan, network)]
                tables.append(Table(columns, rows, f"{network}, scale {plan.scale}"))
        why = "These settings differ from the paper's. All others are the same, or the paper does not state them."
        return Section("differs", "How the settings differ from the paper's", [why], tables=tables)


def _costs(trained: Sequence[Mapping[str, Any]], plans: Sequence[Plan]) -> Section:
    """What each trial took, and a command that repeats one."""
    stages = ("train", *(plans[0].analyses if plans else ()))
    rows = []
    for record in trained:
        seconds = [record["spent"].get(stage, {}).get("cpu_seconds") for stage in stages]
        rows.append((f"`{record['hash']}`", record["name"], *seconds, record["memory_bytes"] / 2**20))
    columns = ("trial", "run", *(f"{stage}, CPU s" for stage in stages), "memory, MiB")
    table = [Table(columns, rows, digits=0, folded=f"Time and memory of each trial ({len(rows)})")] if rows else []
    code = [("One of the trials", record["command"]) for record in trained[:1]]
    return Section("costs", "What the trials took", tables=table, code=code)


def _along_drawing(first: str, second: str, ways: Mapping[str, Mapping[int, PairedDifference | None]]) -> Drawing:
    minus = f"{second} minus {first}"
    return Drawing(
        lambda theme: differences_figure(ways, f"{minus} (dB)", theme=theme),
        f"Differences {minus} against N in three plots: {', '.join(ways)}.",
        f"{minus} along training, over paired seeds. A lower gap and a higher test PSNR are better.",
    )


def _distance_by_n(facet: Facet) -> Drawing:
    """The mean attention distance of each kind at each N minus that at the smallest N."""
    few, *others = facet.counts
    ways = {f"{label} attention": {n: facet.trend(label, few, n, "distance") for n in others} for label in facet.labels}
    return Drawing(
        lambda theme: differences_figure(ways, f"distance minus that at N = {few:,} (tokens)", theme=theme),
        f"The mean attention distance at each N minus that at N = {few:,}, of {' and '.join(facet.labels)} attention.",
        f"The mean attention distance minus that at N = {few:,}, over paired seeds.",
    )


def _cell(averages: Mapping[int, float]) -> str:
    """The mean over seeds and, if there are several, its interval beneath."""
    values = list(averages.values())
    interval = mean_interval(values)
    return f"{sum(values) / len(values):.2f}" + ("" if interval is None else "\n{:.2f} to {:.2f}".format(*interval))


def _mark(trial: TrialResults | None) -> str | None:
    """What the table of the grid shows of a trial: its number, or how far it is."""
    if trial is None:
        return None
    row, state = trial.row(), trial.status.state
    value = row["gap"] if row["gap"] is not None else row["attention_distance"]
    return state if value is None else f"{value:.2f}" + ("" if state == "done" else f" ({state})")


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]) if rows else ["hash"], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def _instruments(facet: Facet) -> str:
    """On how many images and noise levels the full measurement and the measurements along training are based."""
    here = settings_here(facet.plan, facet.network)
    levels = len(here.get("psnr-gap.levels") or ()) or here["psnr-gap.points"]
    return (
        f"The full measurement takes up to {here['psnr-gap.images']:,} images of each side at {levels} noise levels, "
        f"after training. Along training, up to {here['evaluation.images']:,} images of each side are measured at "
        f"{here['evaluation.levels']} noise levels. So differences of the full measurement cannot be compared with "
        "those along training."
    )
