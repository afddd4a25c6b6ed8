"""The page of a study: what its recorded trials show, beside what was published, and which trials are empty.

It is made from plan.json and cells/ alone. Every sentence about a difference comes from the interval of paired seeds;
nothing here computes a statistic of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditlab.analyses.attention.figures import locality_by_n, locality_curves, patterns_figure
from ditlab.analyses.attention.section import MAX_SENTENCES, locality_section
from ditlab.analyses.psnr_gap.figures import gap_bars, psnr_curves
from ditlab.analyses.trajectory.comparison import MatchedComparison
from ditlab.analyses.trajectory.figures import gap_along_training, matched_psnr
from ditlab.files import write_bytes, write_json, write_text
from ditlab.nn.attention_plan import parse_plan
from ditlab.pages.page import PAGE_BYTES, PageData, Section, Table, ThemedFigure, page_size, save_page
from ditlab.pages.theme import Theme, assign
from ditlab.pages.token_picker import AttentionPicker
from ditlab.studies.figures import differences_figure
from ditlab.studies.findings import answer, contrasts, findings, phrase
from ditlab.studies.grid import Study
from ditlab.studies.published import Published, differing, published, settings_here
from ditlab.studies.results import ALONG, CONTRASTS, FULL, Facet, facets
from ditlab.studies.store import Store
from ditlab.studies.study_tables import csv_text, differences_table, interval_cells, seed_table, trial_mark

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ditlab.studies.grid import Plan

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

        Args:
            folder: where they go.
            pickers: makes token pickers of at most so many bytes, which is what the rest of the page leaves.
        """
        sentences = self.sentences()
        sections, tables, pictures = _first_screen(self.sections())
        rows = [{"scale": f.plan.scale, **trial.row()} for f in self.facets for trial in f.trials]
        data = PageData(
            title=self.study.title,
            summary=[self.study.question, *sentences],
            tables=tables,
            pictures=pictures,
            sections=sections,
            labels=list(self.slots),
            commands=[(f"this study, scale {plan.scale}", plan.command) for plan in self.plans if plan.command],
            environment=self._environment(),
            downloads={"table.json": rows, **{f"plan-{plan.scale}.json": plan.to_json() for plan in self.plans}},
        )
        chosen = pickers(max(0, PAGE_BYTES - page_size(data)))
        shown = [replace(section, pickers=chosen) if section.id == _MAPS else section for section in sections]
        page = save_page(replace(data, sections=shown), folder / "report.html")
        write_json(folder / "table.json", {"kind": "study-table", "version": 1, "cells": rows, "sentences": sentences})
        write_text(folder / "table.csv", csv_text(rows))
        for name, figure in self._figures.items():
            write_bytes(folder / "figures" / f"{name}.png", figure.light)
        return page, sentences

    def sentences(self) -> list[str]:
        """Returns what was found, the most important first."""
        lines = []
        for facet in self.facets:
            prefix = f"{self._name(facet)}: " if len(self.facets) > 1 else ""
            lines += [prefix + line for line in findings(facet, self.study.asks)]
        return lines

    def _name(self, facet: Facet) -> str:
        """The name of a facet in headings; with the scale if there are several."""
        return facet.name + (f", scale {facet.plan.scale}" if len(self.plans) > 1 else "")

    def sections(self) -> list[Section]:
        """Returns every section, facet by facet."""
        sections: list[Section] = []
        for number, facet in enumerate(self.facets, 1):
            tail = "" if number == 1 else f"-{number}"
            name = f" ({self._name(facet)})" if len(self.facets) > 1 else ""
            sections += [
                self._grid(facet, tail, name),
                self._gap(facet, tail, name),
                self._ways(facet, tail, name),
                self._curves(facet, tail, name),
                self._along(facet, tail, name),
                self._locality(facet, number, tail, name),
            ]
        sections.append(Section(_MAPS, "Attention maps against N", pictures=self._maps))
        if self.paper is not None:
            sections += [self._claims(self.paper), self._published(self.paper), self._settings(self.paper)]
        sections.append(self._costs())
        return sections

    def _picture(self, name: str, drawing: Callable[[Theme], Figure], alt: str, caption: str) -> ThemedFigure:
        self._figures[name] = ThemedFigure.draw(drawing, alt, caption)
        return self._figures[name]

    def _grid(self, facet: Facet, tail: str, name: str) -> Section:
        """Which trials are on record."""
        rows = []
        for label in facet.labels:
            for seed in facet.plan.axes["seed"]:
                trials = {
                    t.place["n"]: t for t in facet.trials if (t.place["attention"], t.place["seed"]) == (label, seed)
                }
                rows.append(
                    (label, seed, *(trial_mark(trials[n].row()) if n in trials else None for n in facet.counts))
                )
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
        return Section(
            f"cells{tail}",
            f"Trials of the grid{name}",
            [about],
            pictures=self._patterns(facet, tail),
            tables=[
                Table(columns, rows, f"Each trial's {what}, or how far it is; {len(facet.trials)} trials: {words}")
            ],
        )

    def _patterns(self, facet: Facet, tail: str) -> list[ThemedFigure]:
        """What each plan with windows lets a token see (An et al., Fig. 5)."""
        settings = settings_here(facet.plan, facet.network)
        side = int(facet.plan.images[facet.data]["size"]) // settings["network.patch"]
        pictures = []
        for label, text in facet.plan.plans.items():
            plan = parse_plan(text, settings["network.depth"], settings["network.border"])
            if any(pattern.name != "global" for pattern in plan):
                pictures.append(
                    self._picture(
                        f"patterns-{len(pictures) + 1}{tail}",
                        lambda theme, plan=plan: patterns_figure(plan, (side, side), theme=theme),
                        f"What a corner, an edge and a middle token see in each layer of {label} attention.",
                        f"The tokens that {label} attention lets a token see, by layer (An et al., Fig. 5).",
                    )
                )
        return pictures

    def _gap(self, facet: Facet, tail: str, name: str) -> Section:
        """The gap of each kind at each N, and how it falls with N."""
        comparison = facet.comparison
        if comparison is None:
            return Section(f"gap{tail}", "")
        rows = []
        for n in facet.counts:
            for label in facet.labels:
                g = comparison.group(label, n)
                if g is not None:
                    values = (g.mean("train"), g.mean("test"), g.mean("gap"), g.std())
                    rows.append((label, n, len(g.seeds), *values))
        table = Table(("attention", "N", "seeds", "train PSNR, dB", "test PSNR, dB", "gap, dB", "std of gap"), rows)
        trends = []
        for label in facet.labels:
            for d in facet.trends(label):
                trends.append((label, d.second, d.first, *interval_cells(d)))
        fall = Table(
            ("attention", "gap at", "minus gap at", "difference, dB", "95 % interval", "seeds"),
            trends,
            "The gap minus that at the next smaller N",
        )
        bars = self._picture(
            f"gap-bars{tail}",
            lambda theme: gap_bars(comparison, slots=self.slots, theme=theme),
            f"Bars of the average PSNR gap by number of training images, for {' and '.join(facet.labels)}.",
            "Average over noise levels of the gap, truncated at zero at each level (as Fig. 6). Dots are seeds.",
        )
        notes = list(dict.fromkeys(note for t in facet.trials if t.psnr_record for note in t.psnr_record["notes"]))
        if facet.alone:
            notes.append(f"Not counted, because no other kind has the same seed: {', '.join(facet.alone)}.")
        return Section(
            f"gap{tail}",
            f"The PSNR gap against N{name}",
            tables=[table, *([fall] if trends else [])],
            notes=notes,
            pictures=[bars],
            data={f"psnr-gap{tail}.json": {t.place["hash"]: t.psnr_record for t in facet.trials if t.psnr_record}},
        )

    def _ways(self, facet: Facet, tail: str, name: str) -> Section:
        """Two kinds of attention, compared in the full measurement and in three ways along training."""
        pairs = list(combinations(facet.labels, 2))
        tables, pictures, points = [], [], []
        for i, (first, second) in enumerate(pairs):
            ways = contrasts(facet, first, second)
            if not any(c.difference is not None for way in ways.values() for c in way):
                continue
            tables += [
                differences_table(
                    facet.counts, {what: ways[what] for what in ALONG}, f"{second} minus {first}, along training"
                ),
                differences_table(facet.counts, {FULL: ways[FULL]}, f"{second} minus {first}, full measurement"),
            ]
            points += [
                c.difference.sentence(f"{phrase(what)}, N = {n:,}")
                for place, n in enumerate(facet.counts)
                for what in CONTRASTS
                if (c := ways[what][place]).difference is not None
            ]
            # The full measurement has bars of its own (`_gap`); here are those that were measured in the same way.
            shown = [(what, {c.n: c.difference for c in ways[what]}) for what in ALONG]
            if any(d is not None for _, way in shown for d in way.values()):
                pictures.append(
                    self._picture(
                        f"differences{tail}" + (f"-{i + 1}" if len(pairs) > 1 else ""),
                        lambda theme, shown=shown: differences_figure(shown, theme=theme),
                        f"Differences {second} minus {first} against N in three plots: {', '.join(ALONG)}.",
                        f"{second} minus {first} along training, over paired seeds. A lower gap and a higher test PSNR "
                        "are better.",
                    )
                )
        if not tables:
            return Section(f"ways{tail}", "")
        return Section(
            f"ways{tail}",
            f"{' against '.join(reversed(facet.labels)).capitalize()}, three ways{name}"
            if len(facet.labels) == 2
            else f"The kinds of attention, compared in three ways{name}",
            [_THREE_WAYS, _instruments(facet)],
            points=points,
            tables=tables,
            notes=[_NOT_CORRECTED],
            pictures=pictures,
            data={f"matched{tail}.json": [m.to_json() for m in facet.matched]},
        )

    def _curves(self, facet: Facet, tail: str, name: str) -> Section:
        comparison = facet.comparison
        if comparison is None:
            return Section(f"curves{tail}", "")
        picture = self._picture(
            f"psnr-curves{tail}",
            lambda theme: psnr_curves(comparison, slots=self.slots, theme=theme),
            f"Train and test PSNR by diffusion step for {' and '.join(facet.labels)}, a column for each N.",
            "Solid lines: training images. Dashed lines: held-out images of the same kind (An et al., Fig. 2).",
        )
        return Section(f"curves{tail}", f"Train and test PSNR by noise level{name}", pictures=[picture])

    def _along(self, facet: Facet, tail: str, name: str) -> Section:
        """PSNR along training, a part for each N."""
        parts = []
        for n in facet.counts if "psnr-gap" in facet.plan.analyses else ():
            runs = facet.trajectories(n)
            if not runs:
                continue
            matched = [m for m in facet.matched if m.n == n]
            only = matched[0] if len(matched) == 1 else None
            parts.append(
                Section(
                    f"along-{n}{tail}",
                    f"N = {n:,}",
                    pictures=self._along_pictures(facet, n, tail, only),
                    tables=[seed_table(m) for m in matched],
                )
            )
        note = "Measured with averaged weights at few noise levels, each time with the same images and noise."
        return Section(f"along{tail}", f"Along training{name}", notes=[note] if parts else (), parts=parts)

    def _along_pictures(self, facet: Facet, n: int, tail: str, matched: MatchedComparison | None) -> list[ThemedFigure]:
        runs, names = facet.trajectories(n), " and ".join(facet.labels)
        return [
            self._picture(
                f"gap-along-training-n{n}{tail}",
                lambda theme: gap_along_training(runs, slots=self.slots, theme=theme),
                f"The PSNR gap and the test PSNR of {names} against training steps, N = {n}.",
                "Thin lines are seeds, thick ones their mean.",
            ),
            self._picture(
                f"matched-psnr-n{n}{tail}",
                lambda theme: matched_psnr(runs, matched, slots=self.slots, theme=theme),
                f"Test PSNR against train PSNR along the training of {names}, N = {n}.",
                "At equal train PSNR, the higher curve generalizes better.",
            ),
        ]

    def _locality(self, facet: Facet, number: int, tail: str, name: str) -> Section:
        comparison = facet.locality
        if comparison is None:
            return Section(f"locality{tail}", "")
        results = [r for g in comparison.groups for r in g.results]
        pictures = [
            self._picture(
                f"locality{tail}",
                lambda theme: locality_curves(results, slots=self.slots, theme=theme),
                "Mean attention distance by layer and attention by distance, a column for each N.",
                "Means over heads, noise levels, images and seeds.",
            )
        ]
        if len(comparison.counts) > 1:
            pictures.insert(
                0,
                self._picture(
                    f"locality-by-n{tail}",
                    lambda theme: locality_by_n(results, slots=self.slots, theme=theme),
                    f"Locality of attention against the number of training images for {' and '.join(facet.labels)}.",
                    "Means over layers, heads, noise levels and images. Small dots are seeds.",
                ),
            )
        records = {t.place["hash"]: t.locality_record for t in facet.trials if t.locality_record}
        data = {f"attention{tail}.json": records}
        differences = comparison.differences()
        sentences = differences if len(differences) <= MAX_SENTENCES else ()  # else they are in a table
        section = locality_section(comparison, pictures, number=number, sentences=sentences, data=data)
        return replace(section, title=f"How local attention is{name}")

    def _claims(self, paper: Published) -> Section:
        """What the paper reports, and what was measured here."""
        parts = []
        for number, claim in enumerate(paper.claims, 1):
            here = [
                f"{self._name(facet)}: {line}" if len(self.facets) > 1 else line
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
        columns = ("images", "network", "N", "gap, global", "gap, local", "difference", "source")
        measured = []
        for facet in self.facets:
            for n in facet.counts:
                groups = [facet.comparison and facet.comparison.group(label, n) for label in ("global", "local")]
                a, b = (None if g is None else g.mean() for g in groups)
                if a is not None or b is not None:
                    seeds = max(len(g.seeds) for g in groups if g is not None)
                    gap = None if a is None or b is None else b - a
                    size = facet.plan.images[facet.data]["size"]
                    scale = f", scale {facet.plan.scale}" if len(self.plans) > 1 else ""
                    place = (f"{facet.data} at {size}x{size}{scale}", facet.network, n)
                    measured.append((*place, a, b, gap, f"measured here, {seeds} seed{'s' if seeds > 1 else ''}"))
        reported = []
        keys = dict.fromkeys((v["images"], v["network"], v["n"]) for v in paper.values if v["quantity"] == "gap")
        for images, network, n in keys:
            pair = [
                paper.value(images=images, network=network, n=n, attention=kind, quantity="gap", source="Fig. 6")
                for kind in ("global", "local")
            ]
            if pair[0] is not None and pair[1] is not None:
                a, b = pair[0]["value"], pair[1]["value"]
                reported.append((images, network, n, a, b, b - a, f"{pair[0]['source']}, {pair[0]['certainty']}"))
        if not reported:
            return Section("published", "")
        first = reported[0][0]
        shared = {(facet.network, n) for facet in self.facets for n in facet.counts} & {(r[1], r[2]) for r in reported}
        words = (
            "Trials of this page with a network and an N of the paper are beside its numbers."
            if shared
            else "No trial of this page has a network and an N of the paper, so only the pattern of the numbers can be "
            "compared, not their sizes."
        )
        mine = Table(columns, [*measured, *(row for row in reported if row[0] == first)], "Average PSNR gap, dB")
        more = Table(columns, [row for row in reported if row[0] != first], folded="The paper's other image sets")
        return Section("published", "Published and measured gaps", [words], tables=[mine, more])

    def _settings(self, paper: Published) -> Section:
        """How the settings here differ from the paper's."""
        parts = []
        for plan in self.plans:
            for network in plan.axes["network"]:
                rows = [(f"`{name}`", there, sure, here) for name, there, sure, here in differing(paper, plan, network)]
                columns = ("setting", "the paper", "how that is known", "here")
                parts.append(Table(columns, rows, f"{network}, scale {plan.scale}"))
        why = "These settings differ from the paper's. All others are the same, or the paper does not state them."
        return Section("differs", "How the settings differ from the paper's", [why], tables=parts)

    def _costs(self) -> Section:
        """What each trial took, and a command that repeats one."""
        rows, code = [], []
        for facet in self.facets:
            for trial in facet.trials:
                if trial.record is None:
                    continue
                spent = trial.record["spent"]
                cpu = [spent.get(stage, {}).get("cpu_seconds") for stage in ("train", *facet.plan.analyses)]
                memory = trial.record["memory_bytes"] / 2**20
                rows.append((f"`{trial.place['hash']}`", trial.record["name"], *cpu, memory))
                code = code or [("One of the trials", trial.record["command"])]
        stages = ("train", *(self.plans[0].analyses if self.plans else ()))
        columns = ("trial", "run", *(f"{stage}, CPU s" for stage in stages), "memory, MiB")
        table = [Table(columns, rows, digits=0, folded=f"Time and memory of each trial ({len(rows)})")] if rows else []
        return Section("costs", "What the trials took", tables=table, code=code)

    def _environment(self) -> Mapping[str, Any]:
        records = (trial.record for facet in self.facets for trial in facet.trials)
        return next((record["environment"] for record in records if record is not None), {})


def _first_screen(sections: Sequence[Section]) -> tuple[list[Section], list[Table], list[ThemedFigure]]:
    """The sections, and the table and the figure that answer the question, which stand before them."""
    place = next((i for i, s in enumerate(sections) if s.id in ("gap", "locality") and not s.empty), None)
    if place is None:
        return list(sections), [], []
    first = sections[place]
    # The figure is drawn once; the table is small, and its section refers to it.
    shown = replace(first, pictures=first.pictures[1:])
    return [*sections[:place], shown, *sections[place + 1 :]], list(first.tables[:1]), list(first.pictures[:1])


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
