"""The PSNR gap: how much better a denoiser is on its training images than on held-out ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ditlab.analyses.base import Analysis, Comparison, Overview, ReportContext
from ditlab.analyses.psnr_gap.config import PSNRConfig, PSNROptions
from ditlab.metrics.bands import noise_bands
from ditlab.pages.drawing import Drawing
from ditlab.pages.page import Section, Table, ThemedFigure
from ditlab.progress import SILENT, Reporter

if TYPE_CHECKING:
    from pathlib import Path

    from ditlab.analyses.psnr_gap.comparison import PSNRComparison, PSNRGroup
    from ditlab.analyses.psnr_gap.result import PSNRResult, Quantity
    from ditlab.models.comparing import ModelSet, OpenedModel

__all__ = ["PSNRConfig", "PSNRGap", "PSNROptions"]


class PSNRGap(Analysis[PSNRConfig, PSNROptions]):
    """Measures train and test PSNR by noise level, and their gap (An et al. 2410.21273, Eqs. 2-4).

    Writes psnr-gap.json, .csv and .npz into each model's analysis folder, and the comparison with its figures into
    `out`. Runs that differ only in seed are averaged. Models with different test images are refused.
    """

    name = "psnr-gap"
    question = "How much better is a denoiser on its training images than on held-out ones?"
    Config, Options = PSNRConfig, PSNROptions
    Result = "ditlab.analyses.psnr_gap.result:PSNRResult"
    report = "measure"
    comparison_file = "comparison.json"

    def measure_model(self, opened: OpenedModel, config: PSNRConfig, reporter: Reporter) -> PSNRResult:
        from ditlab.analyses.psnr_gap.measure import measure_model

        return measure_model(opened, config, reporter)

    def measure(
        self, models: ModelSet, config: PSNRConfig, options: PSNROptions, reporter: Reporter = SILENT
    ) -> list[PSNRResult]:
        """Returns the result of each model, then those of the baselines at each N."""
        from ditlab.analyses.psnr_gap.measure import measure_baselines

        results = list(super().measure(models, config, options, reporter))
        if options.baselines:
            results += measure_baselines(models, config, results[0].levels, reporter)
        return results

    def for_report(self, models: ModelSet, context: ReportContext, reporter: Reporter = SILENT) -> list[Comparison]:
        """Returns one comparison of all models that have images, with the baselines at each N."""
        from ditlab.analyses.psnr_gap.measure import measure_baselines

        comparisons = super().for_report(models, context, reporter)
        for comparison in comparisons:
            assert comparison.models is not None
            levels = comparison.results[0].levels
            baselines = measure_baselines(comparison.models, comparison.config, levels, reporter)
            comparison.detail = self.compare([*comparison.results, *baselines])
        return comparisons

    def report_result(
        self, models: ModelSet, place: int, config: PSNRConfig, context: ReportContext, reporter: Reporter
    ) -> PSNRResult:
        """Returns the result of one model, at the noise levels of the page's first model."""
        from ditlab.metrics.denoising_errors import grid_levels

        if config.sigmas is None:
            own = grid_levels(models.open_one(place, reporter).denoiser, config.points)
            levels = context.shared.setdefault("psnr-gap levels", own)
            same = len(own) == len(levels) and all(abs(a / b - 1) < 1e-6 for a, b in zip(own, levels, strict=True))
            config = config if same else replace(config, sigmas=levels)
        return self.measure(models.only(place), config, PSNROptions(baselines=False), reporter)[0]

    def overview(self, comparison: Comparison) -> Overview:
        from ditlab.analyses.psnr_gap.figures import overview_curves

        gap, slots = comparison.detail, comparison.slots
        cells = {
            (g.label, g.n): {f"{what}, dB": _with_interval(g, what) for what in ("train", "test", "gap")}
            for g in gap.groups
        }
        curves = Drawing(
            lambda theme: overview_curves(gap, slots=slots, theme=theme),
            f"Curves of train and test PSNR by noise level for {' and '.join(gap.labels)}.",
            "The higher a solid line is above the dashed line of its colour, the more the training images are "
            "remembered.",
        )
        single = [g for g in gap.groups if len(g.seeds) == 1]
        over = "seeds, or over images where there is one seed" if single else "seeds"
        if len(single) == len(gap.groups):
            over = "images, for there is one seed"
        truncated = " The gap counts as zero at levels where it is negative"
        truncated += ", so its interval over images does not reach below zero." if single else "."
        averaged = f"PSNR and gap are averages over {len(gap.first.levels)} noise levels."
        note = f"{averaged}{truncated} Beneath: 95 % intervals over {over}."
        return Overview(cells, gap.verdict(), self.figures(comparison).get("gap-differences", curves), note=note)

    def compare(self, results: Sequence[PSNRResult]) -> PSNRComparison:
        from ditlab.analyses.psnr_gap.comparison import compare

        return compare(results)

    def save(self, results: Sequence[PSNRResult], models: ModelSet, out: Path) -> list[Path]:
        for result in results:
            if result.baseline:
                result.save(out, _file_name(result))
        return super().save([result for result in results if not result.baseline], models, out)

    def tables(self, comparison: Comparison) -> list[Table]:
        """Returns one row for each kind of model and N, then one for each baseline; and the same by band."""
        gap: PSNRComparison = comparison.detail
        columns = ("denoiser", "N", "seeds", "train PSNR, dB", "test PSNR, dB", "gap, dB", "train - test, dB")
        levels = len(gap.first.levels)
        over_all = Table(columns, _rows(gap), f"PSNR averaged over {levels} noise levels, with 95 % intervals")
        by_band = [
            (row[0], row[1], f"{band.name}, {band.span}", len(inside.first.levels), *row[3:])
            for band, inside in gap.by_band.items()
            for row in _rows(inside)
        ]
        if not by_band:
            return [over_all]
        caption = "The same by band of noise levels (sigma); an average over all levels hides effects of opposite signs"
        return [over_all, Table((*columns[:2], "band", "levels", *columns[3:]), by_band, caption)]

    def notes(self, comparison: Comparison) -> list[str]:
        gap: PSNRComparison = comparison.detail
        floors = dict.fromkeys(f"{r.about.name}: {r.notes[0]}" for r in gap.baselines if r.floor)
        notes = [*super().notes(comparison), *floors, *gap.unlike_weights()]
        *_, high = noise_bands(gap.first.config.bands)
        inside, levels = len(high.places(gap.first.levels)), len(gap.first.levels)
        if not 0 < inside < levels:
            return notes
        above = gap.by_band[high]
        wiener = {r.about.n: r.average("test") for r in above.baselines if r.about.name == "Wiener"}
        below = [
            f"{g.name} {g.mean('test'):.1f} dB against {wiener[g.n]:.1f} dB"
            for g in above.groups
            if g.n in wiener and g.mean("test") < wiener[g.n]
        ]
        worse = f" Here test PSNR is below that of the Wiener denoiser there: {'; '.join(below)}." if below else ""
        notes.append(
            f"Of the {levels} noise levels, {inside} lie above sigma = {high.low:g}. There an estimate can show little "
            f"more than the mean of the training images, and the average over all levels counts them alike.{worse}"
        )
        return notes

    def figures(self, comparison: Comparison) -> Mapping[str, Drawing]:
        from ditlab.analyses.psnr_gap.figures import gap_bars, gap_differences, psnr_curves

        gap, slots = comparison.detail, comparison.slots
        names = " and ".join(gap.labels)
        drawings = {
            "psnr-curves": Drawing(
                lambda theme: psnr_curves(gap, [r for r in gap.baselines if not r.floor], slots=slots, theme=theme),
                f"Curves of train and test PSNR by diffusion step for {names}, with the gap below.",
                "Solid lines: training images. Dashed lines: held-out images of the same kind. The empirical-Bayes "
                "denoiser knows only the training images (the limit of memorization). The Wiener denoiser knows their "
                "mean and covariance.",
            ),
            "gap-bars": Drawing(
                lambda theme: gap_bars(gap, slots=slots, theme=theme),
                f"Bars of the average PSNR gap of {names}.",
                "The average over noise levels of the gap, truncated at zero at each level.",
            ),
        }
        if any(d.low is not None for _, d in gap.differences):
            drawings["gap-differences"] = Drawing(
                lambda theme: gap_differences(gap, theme=theme),
                f"Differences of the average PSNR gap between {names}, with intervals over paired seeds.",
                "Differences of the average gap over paired seeds; small dots are the seeds.",
            )
        return drawings

    def section(self, comparison: Comparison, figures: Mapping[str, ThemedFigure], number: int = 1) -> Section:
        from ditlab.analyses.groups import differences_table

        gap: PSNRComparison = comparison.detail
        bands = [("", gap), *((f", {band.name} band", inside) for band, inside in gap.by_band.items())]
        rows = [
            (f"{name}{where}", triple.n, triple.all[what])
            for where, inside in bands
            for triple in inside.triples
            for what, name in _QUANTITIES.items()
        ]
        bars = Section(
            "gap",
            "The gap" if not rows else "The gap, and how kinds differ",
            tables=[differences_table(rows)] if rows else (),
            pictures=[figure for name, figure in figures.items() if name != "psnr-curves"],
        )
        return Section(
            "psnr",
            "Train and test PSNR, and the gap between them",
            verdict=gap.verdict(),
            tables=self.tables(comparison),
            notes=[*gap.readings(), *self.notes(comparison)],
            pictures=[figure for name, figure in figures.items() if name == "psnr-curves"],
            parts=[bars],
            data=self.data(comparison),
        )

    def data(self, comparison: Comparison) -> dict[str, Any]:
        gap: PSNRComparison = comparison.detail
        baselines = {f"{_file_name(r)}-psnr-gap.json": r.to_json() for r in gap.baselines}
        return {"comparison.json": gap.to_json(), **super().data(comparison), **baselines}


_QUANTITIES: dict[Quantity, str] = {
    "train": "train PSNR",
    "test": "test PSNR",
    "gap": "gap",
    "gap_untruncated": "train - test PSNR",
}


def _with_interval(group: PSNRGroup, what: Quantity) -> str:
    """A mean, and its interval in small print."""
    mean, interval = f"{group.mean(what):.2f}", group.interval(what)
    if interval is None:
        return mean
    low, high = interval
    return f"{mean}\n{low:.2f}{'–' if low >= 0 else ' to '}{high:.2f}"


def _rows(gap: PSNRComparison) -> list[tuple[Any, ...]]:
    """Rows of kinds with their intervals, then of baselines."""
    rows: list[tuple[Any, ...]] = [
        (g.label, g.n, len(g.seeds), *(_with_interval(g, what) for what in _QUANTITIES)) for g in gap.groups
    ]
    for r in gap.baselines:
        # An exact estimate counts as `EXACT_DB`, so that what rests on it is a lower bound.
        signs = {what: "≥ " if r.bounded and what != "test" else "" for what in _QUANTITIES}
        values = [f"{signs[what]}{r.average(what):.2f}" for what in _QUANTITIES]
        rows.append((r.about.name, r.about.n, None, *values))
    return rows


def _file_name(baseline: PSNRResult) -> str:
    return f"{baseline.about.name.replace(' ', '-').lower()}-n{baseline.about.n}"
