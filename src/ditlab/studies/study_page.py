"""The page of a study: what its recorded cells say, beside what was published, and which cells are empty.

Made from plan.json and cells/ alone. Every sentence about a difference comes from the interval of paired seeds; nothing
here computes a statistic of its own.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditlab.analyses.attention.figures import locality_by_n, locality_curves, patterns_figure
from ditlab.analyses.attention.section import locality_section
from ditlab.analyses.psnr_gap.figures import gap_bars, psnr_curves
from ditlab.analyses.trajectory.comparison import MatchedComparison
from ditlab.analyses.trajectory.figures import gap_along_training, matched_psnr
from ditlab.analyses.trajectory.tables import matched_table
from ditlab.files import write_bytes, write_json, write_text
from ditlab.metrics.paired import PairedDifference
from ditlab.nn.attention_plan import parse_plan
from ditlab.pages.page import PAGE_BYTES, PageData, Section, Table, ThemedFigure, page_size, save_page
from ditlab.pages.theme import Theme, assign
from ditlab.pages.token_picker import AttentionPicker
from ditlab.studies.figures import differences_figure
from ditlab.studies.findings import findings, said, seen, ways_of
from ditlab.studies.grid import Study
from ditlab.studies.published import Published, differing, published, settings_here
from ditlab.studies.results import ALONG, CONTRASTS, FULL, Contrast, Panel, panels
from ditlab.studies.store import Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ditlab.studies.grid import Plan

_NOT_CORRECTED = (
    "Intervals are 95 % t intervals over paired seeds, each seed with its own shuffle of the images. No correction is "
    "made for looking at several N: of twenty intervals about one leaves zero out by chance."
)
_THREE_WAYS = (
    "A smaller gap at equal steps can be mere slower fitting. So each two kinds of runs are compared in three ways: "
    "the gap after the same number of steps, the gap where both have reached the same train PSNR, and the best test "
    "PSNR that each reaches along training. These three are measured alike, along training, and can be held against "
    "each other."
)


_ANSWERS: Mapping[str, Sequence[str]] = {"lowers": ("full", "lowers", "matched")}
"""A claim's question -> the questions of `seen` whose answers belong to it, where they are several."""

_MAPS = "maps"
"""The section of attention maps and token pickers."""


class StudyPage:
    """The page of one study, at one or several scales."""

    def __init__(self, study: Study, plans: Sequence[Plan], store: Store, maps: Sequence[ThemedFigure] = ()) -> None:
        self.study, self.plans, self.store = study, plans, store
        self.panels: list[Panel] = [panel for plan in plans for panel in panels(plan, store)]
        self.paper = published(study.published) if study.published else None
        self.slots = assign(label for panel in self.panels for label in panel.labels)
        self._maps = maps
        self._figures: dict[str, ThemedFigure] = {}

    def save(
        self, folder: Path, pickers: Callable[[int], Sequence[AttentionPicker]] = lambda room: ()
    ) -> dict[str, Any]:
        """Writes report.html, table.csv, table.json and figures/; returns the sentences and where the files lie.

        Args:
            folder: where they go.
            pickers: makes token pickers that take at most so many bytes, which is what the rest of the page leaves.
        """
        sentences = self.sentences()
        sections = self.sections()
        rows = [{"scale": p.plan.scale, **cell.row()} for p in self.panels for cell in p.cells]
        data = PageData(
            title=self.study.title,
            summary=[self.study.question, *sentences],
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
        write_text(folder / "table.csv", _csv(rows))
        for name, figure in self._figures.items():
            write_bytes(folder / "figures" / f"{name}.png", figure.light)
        return {"report": str(page), "sentences": sentences}

    def sentences(self) -> list[str]:
        """What was found, in order of importance."""
        lines = []
        for panel in self.panels:
            prefix = f"{self._name(panel)}: " if len(self.panels) > 1 else ""
            lines += [prefix + line for line in findings(panel, self.study.asks)]
        return lines

    def _name(self, panel: Panel) -> str:
        """What headings call a panel; the scale only where there are several."""
        return panel.name + (f", scale {panel.plan.scale}" if len(self.plans) > 1 else "")

    def sections(self) -> list[Section]:
        """Every section, panel by panel."""
        found = []
        for number, panel in enumerate(self.panels, 1):
            tail = "" if number == 1 else f"-{number}"
            name = f" ({self._name(panel)})" if len(self.panels) > 1 else ""
            found += [
                self._grid(panel, tail, name),
                self._gap(panel, tail, name),
                self._ways(panel, tail, name),
                self._curves(panel, tail, name),
                self._along(panel, tail, name),
                self._locality(panel, number, tail, name),
            ]
        found.append(Section(_MAPS, "Attention maps against N", pictures=self._maps))
        if self.paper is not None:
            found += [self._claims(self.paper), self._published(self.paper), self._settings(self.paper)]
        found.append(self._costs())
        return found

    def _picture(self, name: str, drawing: Callable[[Theme], Figure], alt: str, caption: str) -> ThemedFigure:
        self._figures[name] = ThemedFigure.draw(drawing, alt, caption)
        return self._figures[name]

    def _grid(self, panel: Panel, tail: str, name: str) -> Section:
        """Which cells are on record."""
        rows = []
        for label in panel.labels:
            for seed in panel.plan.axes["seed"]:
                cells = {
                    c.place["n"]: c for c in panel.cells if (c.place["attention"], c.place["seed"]) == (label, seed)
                }
                rows.append((label, seed, *(_mark(cells[n].row()) if n in cells else None for n in panel.counts)))
        columns = ("attention", "seed", *(f"N = {n:,}" for n in panel.counts))
        states = Counter(c.standing.state for c in panel.cells)
        words = ", ".join(f"{count} {state}" for state, count in states.items())
        what = "gap in dB" if "psnr-gap" in panel.plan.analyses else "mean attention distance in tokens"
        facts = panel.plan.images[panel.data]
        plans = ", ".join(f"{label}: `{text}`" for label, text in panel.plan.plans.items())
        about = (
            f"Images: {facts['count']:,} of {panel.data} at {facts['size']}x{facts['size']} pixels (set "
            f"{str(facts['hash'])[:12]}). Network: {panel.network}. Attention plans, one entry a layer: {plans}."
        )
        return Section(
            f"cells{tail}",
            f"Cells of the grid{name}",
            [about],
            pictures=self._patterns(panel, tail),
            tables=[Table(columns, rows, f"Each cell's {what}, or how far it is; {len(panel.cells)} cells: {words}")],
        )

    def _patterns(self, panel: Panel, tail: str) -> list[ThemedFigure]:
        """What each plan with windows lets a token see (An et al., Fig. 5)."""
        settings = settings_here(panel.plan, panel.network)
        side = int(panel.plan.images[panel.data]["size"]) // settings["network.patch"]
        pictures = []
        for label, text in panel.plan.plans.items():
            plan = parse_plan(text, settings["network.depth"], settings["network.border"])
            if any(pattern.name != "global" for pattern in plan):
                pictures.append(
                    self._picture(
                        f"patterns-{len(pictures) + 1}{tail}",
                        lambda theme, plan=plan: patterns_figure(plan, (side, side), theme=theme),
                        f"What a corner, an edge and a middle token see in each layer of {label} attention.",
                        f"What {label} attention lets a token see, layer by layer (An et al., Fig. 5).",
                    )
                )
        return pictures

    def _gap(self, panel: Panel, tail: str, name: str) -> Section:
        """The gap of each kind at each N, and its fall with N."""
        comparison = panel.comparison
        if comparison is None:
            return Section(f"gap{tail}", "")
        rows = []
        for n in panel.counts:
            for label in panel.labels:
                g = comparison.group(label, n)
                if g is not None:
                    values = (g.mean("train"), g.mean("test"), g.mean("gap"), g.std())
                    rows.append((label, n, len(g.seeds), *values))
        table = Table(("attention", "N", "seeds", "train PSNR, dB", "test PSNR, dB", "gap, dB", "std of gap"), rows)
        trends = []
        for label in panel.labels:
            for d in panel.trends(label):
                trends.append((label, d.second, d.first, *_interval(d)))
        fall = Table(
            ("attention", "gap at", "minus gap at", "difference, dB", "95 % interval", "seeds"),
            trends,
            "The gap against the next smaller N",
        )
        bars = self._picture(
            f"gap-bars{tail}",
            lambda theme: gap_bars(comparison, slots=self.slots, theme=theme),
            f"Bars of the average PSNR gap by number of training images, for {' and '.join(panel.labels)}.",
            "Average over noise levels of the gap, truncated at zero at each level (as Fig. 6). Dots are seeds.",
        )
        notes = list(dict.fromkeys(note for c in panel.cells if c.psnr_record for note in c.psnr_record["notes"]))
        if panel.alone:
            notes.append(f"Not counted here, for want of other kinds with the same seed: {', '.join(panel.alone)}.")
        return Section(
            f"gap{tail}",
            f"The PSNR gap against N{name}",
            tables=[table, *([fall] if trends else [])],
            notes=notes,
            pictures=[bars],
            data={f"psnr-gap{tail}.json": {c.place["hash"]: c.psnr_record for c in panel.cells if c.psnr_record}},
        )

    def _ways(self, panel: Panel, tail: str, name: str) -> Section:
        """Two kinds of attention compared in the full measurement and in three ways along training."""
        pairs = list(combinations(panel.labels, 2))
        tables, pictures, points = [], [], []
        for i, (first, second) in enumerate(pairs):
            ways = ways_of(panel, first, second)
            if not any(c.difference is not None for way in ways.values() for c in way):
                continue
            tables += [
                _differences(
                    panel.counts, {what: ways[what] for what in ALONG}, f"{second} minus {first}, along training"
                ),
                _differences(panel.counts, {FULL: ways[FULL]}, f"{second} minus {first}, full measurement"),
            ]
            points += [
                c.difference.sentence(f"{said(what)}, N = {n:,}")
                for place, n in enumerate(panel.counts)
                for what in CONTRASTS
                if (c := ways[what][place]).difference is not None
            ]
            # The full measurement is drawn in bars of its own (`_gap`); here those that were measured alike.
            shown = [(what, {c.n: c.difference for c in ways[what]}) for what in ALONG]
            if any(d is not None for _, way in shown for d in way.values()):
                pictures.append(
                    self._picture(
                        f"differences{tail}" + (f"-{i + 1}" if len(pairs) > 1 else ""),
                        lambda theme, shown=shown: differences_figure(shown, theme=theme),
                        f"Differences {second} minus {first} against N in three panels: {', '.join(ALONG)}.",
                        f"{second} minus {first} along training, over paired seeds. A lower gap and a higher test PSNR "
                        "are better.",
                    )
                )
        if not tables:
            return Section(f"ways{tail}", "")
        return Section(
            f"ways{tail}",
            f"{' against '.join(reversed(panel.labels)).capitalize()}, three ways{name}"
            if len(panel.labels) == 2
            else f"The kinds of attention compared, three ways{name}",
            [_THREE_WAYS, _instruments(panel)],
            points=points,
            tables=tables,
            notes=[_NOT_CORRECTED],
            pictures=pictures,
            data={f"matched{tail}.json": [m.to_json() for m in panel.matched]},
        )

    def _curves(self, panel: Panel, tail: str, name: str) -> Section:
        comparison = panel.comparison
        if comparison is None:
            return Section(f"curves{tail}", "")
        picture = self._picture(
            f"psnr-curves{tail}",
            lambda theme: psnr_curves(comparison, slots=self.slots, theme=theme),
            f"Train and test PSNR by diffusion step for {' and '.join(panel.labels)}, a column a number of images.",
            "Solid lines: training images; broken lines: held-out images of the same kind (An et al., Fig. 2).",
        )
        return Section(f"curves{tail}", f"Train and test PSNR by noise level{name}", pictures=[picture])

    def _along(self, panel: Panel, tail: str, name: str) -> Section:
        """PSNR along training, a part for each N."""
        parts = []
        for n in panel.counts if "psnr-gap" in panel.plan.analyses else ():
            runs = panel.trajectories(n)
            if not runs:
                continue
            matched = [m for m in panel.matched if m.n == n]
            one = matched[0] if len(matched) == 1 else None
            parts.append(
                Section(
                    f"along-{n}{tail}",
                    f"N = {n:,}",
                    pictures=self._along_pictures(panel, n, tail, one),
                    tables=[_folded(m) for m in matched],
                )
            )
        note = "Averaged weights, a coarse grid of noise levels, the same images and noise each time."
        return Section(f"along{tail}", f"Along training{name}", notes=[note] if parts else (), parts=parts)

    def _along_pictures(self, panel: Panel, n: int, tail: str, one: MatchedComparison | None) -> list[ThemedFigure]:
        runs, names = panel.trajectories(n), " and ".join(panel.labels)
        return [
            self._picture(
                f"gap-along-training-n{n}{tail}",
                lambda theme: gap_along_training(runs, slots=self.slots, theme=theme),
                f"The PSNR gap and the test PSNR of {names} against training steps, N = {n}.",
                "Thin lines are seeds, thick ones their mean.",
            ),
            self._picture(
                f"matched-psnr-n{n}{tail}",
                lambda theme: matched_psnr(runs, one, slots=self.slots, theme=theme),
                f"Test PSNR against train PSNR along the training of {names}, N = {n}.",
                "At equal train PSNR a curve that lies higher generalizes better at the same fit.",
            ),
        ]

    def _locality(self, panel: Panel, number: int, tail: str, name: str) -> Section:
        comparison = panel.locality
        if comparison is None:
            return Section(f"locality{tail}", "")
        results = [r for g in comparison.groups for r in g.results]
        pictures = [
            self._picture(
                f"locality{tail}",
                lambda theme: locality_curves(results, slots=self.slots, theme=theme),
                "Mean attention distance by layer and attention by distance, a column a number of training images.",
                "Means over heads, noise levels, images and seeds.",
            )
        ]
        if len(comparison.counts) > 1:
            pictures.insert(
                0,
                self._picture(
                    f"locality-by-n{tail}",
                    lambda theme: locality_by_n(results, slots=self.slots, theme=theme),
                    f"Locality of attention against the number of training images for {' and '.join(panel.labels)}.",
                    "Means over layers, heads, noise levels and images; small dots are seeds.",
                ),
            )
        data = {f"attention{tail}.json": {c.place["hash"]: c.locality_record for c in panel.cells if c.locality_record}}
        made = locality_section(comparison, pictures, number=number, sentences=comparison.differences(), data=data)
        return replace(made, title=f"How local attention is{name}")

    def _claims(self, paper: Published) -> Section:
        """What the paper says, and what was seen here."""
        parts = []
        for number, claim in enumerate(paper.claims, 1):
            here = [
                f"{self._name(panel)}: {line}" if len(self.panels) > 1 else line
                for panel in self.panels
                for about in _ANSWERS.get(claim["about"], (claim["about"],))
                for line in seen(panel, about)
            ]
            where = f"The paper: {claim['source']}, {claim['certainty']}. Here:"
            parts.append(Section(f"claim-{number}", claim["text"], [where], here or ["Nothing is on record."]))
        notes = [f"{word[0].upper()}{word[1:]}: {meaning}." for word, meaning in paper.certainty.items()]
        title = "What the paper says, and what was seen here"
        return Section("claims", title, [f"{paper.paper}."], notes=notes, parts=parts)

    def _published(self, paper: Published) -> Section:
        """Published gaps and the measured ones, in one table by N."""
        columns = ("images", "network", "N", "gap, global", "gap, local", "difference", "source")
        measured = []
        for panel in self.panels:
            for n in panel.counts:
                groups = [panel.comparison and panel.comparison.group(label, n) for label in ("global", "local")]
                a, b = (None if g is None else g.mean() for g in groups)
                if a is not None or b is not None:
                    seeds = max(len(g.seeds) for g in groups if g is not None)
                    gap = None if a is None or b is None else b - a
                    size = panel.plan.images[panel.data]["size"]
                    scale = f", scale {panel.plan.scale}" if len(self.plans) > 1 else ""
                    place = (f"{panel.data} at {size}x{size}{scale}", panel.network, n)
                    measured.append((*place, a, b, gap, f"measured here, {seeds} seed{'s' if seeds > 1 else ''}"))
        told = []
        keys = dict.fromkeys((v["images"], v["network"], v["n"]) for v in paper.values if v["quantity"] == "gap")
        for images, network, n in keys:
            pair = [
                paper.value(images=images, network=network, n=n, attention=kind, quantity="gap", source="Fig. 6")
                for kind in ("global", "local")
            ]
            if pair[0] is not None and pair[1] is not None:
                a, b = pair[0]["value"], pair[1]["value"]
                told.append((images, network, n, a, b, b - a, f"{pair[0]['source']}, {pair[0]['certainty']}"))
        if not told:
            return Section("published", "")
        first = told[0][0]
        alike = {(panel.network, n) for panel in self.panels for n in panel.counts} & {(r[1], r[2]) for r in told}
        words = (
            "The cells of this page that have a network and an N of the paper's stand beside its numbers."
            if alike
            else "No cell of this page has a network and an N of the paper's, so only the pattern of the numbers can "
            "be compared, not their sizes."
        )
        mine = Table(columns, [*measured, *(row for row in told if row[0] == first)], "Average PSNR gap, dB")
        more = Table(columns, [row for row in told if row[0] != first], folded="The paper's other image sets")
        return Section("published", "Published and measured gaps", [words], tables=[mine, more])

    def _settings(self, paper: Published) -> Section:
        """In what the settings here differ from the paper's."""
        parts = []
        for plan in self.plans:
            for network in plan.axes["network"]:
                rows = [(f"`{name}`", there, sure, here) for name, there, sure, here in differing(paper, plan, network)]
                columns = ("setting", "the paper", "how that is known", "here")
                parts.append(Table(columns, rows, f"{network}, scale {plan.scale}"))
        why = "What is listed here differs from the paper; what is not listed is as there, or as the paper leaves open."
        return Section("differs", "In what the settings differ from the paper's", [why], tables=parts)

    def _costs(self) -> Section:
        """What each cell took, and the command that trains it."""
        rows, code = [], []
        for panel in self.panels:
            for c in panel.cells:
                if c.cell is None:
                    continue
                spent = c.cell["spent"]
                cpu = [spent.get(stage, {}).get("cpu_seconds") for stage in ("train", *panel.plan.analyses)]
                rows.append((f"`{c.place['hash']}`", c.cell["name"], *cpu, c.cell["memory_bytes"] / 2**20))
                code = code or [("One of the cells", c.cell["command"])]
        stages = ("train", *(self.plans[0].analyses if self.plans else ()))
        columns = ("cell", "run", *(f"{stage}, CPU s" for stage in stages), "memory, MiB")
        table = [Table(columns, rows, digits=0, folded=f"Time and memory of each cell ({len(rows)})")] if rows else []
        return Section("costs", "What the cells took", tables=table, code=code)

    def _environment(self) -> Mapping[str, Any]:
        return next((c.cell["environment"] for p in self.panels for c in p.cells if c.cell is not None), {})


def _instruments(panel: Panel) -> str:
    """On how many images and noise levels the full measurement and the points along training stand."""
    here = settings_here(panel.plan, panel.network)
    levels = len(here.get("psnr-gap.levels") or ()) or here["psnr-gap.points"]
    return (
        f"The full measurement takes up to {here['psnr-gap.images']:,} images of each side at {levels} noise levels, "
        f"once training has ended; along training up to {here['evaluation.images']:,} images of each side are measured "
        f"at {here['evaluation.levels']} noise levels. So a difference in the full measurement is not to be held "
        "against one along training."
    )


def _differences(counts: Sequence[int], ways: Mapping[str, Sequence[Contrast]], caption: str) -> Table:
    """Differences by N, a pair of columns a way of comparing."""
    rows = []
    for place, n in enumerate(counts):
        found = [_interval(way[place].difference) for way in ways.values()]
        words = [(mean, f"{ends} ({seeds})" if seeds and seeds > 1 else ends) for mean, ends, seeds in found]
        rows.append((n, *(word for pair in words for word in pair)))
    heads = [head for what in ways for head in (f"{what}, dB", "95 % interval (seeds)")]
    return Table(("N", *heads), rows, caption)


def _interval(d: PairedDifference | None) -> tuple[str | None, str | None, int | None]:
    """(mean, interval, seeds) in words."""
    if d is None:
        return None, None, None
    if d.low is None or d.high is None:
        return _signed(d.mean), "one seed", 1
    return _signed(d.mean), f"{_signed(d.low)} to {_signed(d.high)}", len(d.seeds)


def _signed(value: float) -> str:
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text


def _mark(row: Mapping[str, Any]) -> str:
    """What stands in a cell's place in the grid: its number, or how far it is."""
    value = row["gap"] if row["gap"] is not None else row["attention_distance"]
    return row["state"] if value is None else f"{value:.2f}" + ("" if row["state"] == "done" else f" ({row['state']})")


def _folded(comparison: MatchedComparison) -> Table:
    table = matched_table(comparison)
    between = f"{comparison.first} and {comparison.second}"
    return Table(table.columns, table.rows, table.caption, table.digits, f"Seed by seed: {between}")


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]) if rows else ["hash"], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()
