"""The two-subset test: do two runs that share no training image draw the same images from the same noise?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ditlab.analyses.base import Analysis, Comparison, ReportContext
from ditlab.analyses.cache import find_results, save_result
from ditlab.analyses.two_subsets.config import TwoSubsetsConfig, TwoSubsetsOptions
from ditlab.progress import SILENT, Reporter

if TYPE_CHECKING:
    from pathlib import Path

    from ditlab.analyses.two_subsets.result import TwoSubsetsResult
    from ditlab.models.comparing import ModelSet
    from ditlab.pages.drawing import Drawing
    from ditlab.pages.page import Section, Table, ThemedFigure

__all__ = ["TwoSubsets", "TwoSubsetsConfig", "TwoSubsetsOptions"]


class TwoSubsets(Analysis[TwoSubsetsConfig, TwoSubsetsOptions]):
    """Compares two runs that were trained on disjoint images: their samples from the same noise with each other, and
    with their closest training images (Kadkhodaie et al. 2024).

    Train the second run with the first one's settings and `skip` = N. Writes two-subsets.json, .npz and the figures
    into `out`.
    """

    name = "two-subsets"
    question = "Do two runs that share no training image draw the same images from the same noise?"
    Config, Options = TwoSubsetsConfig, TwoSubsetsOptions
    Result = "ditlab.analyses.two_subsets.result:TwoSubsetsResult"
    models = (2, 2)

    def measure(
        self, models: ModelSet, config: TwoSubsetsConfig, options: TwoSubsetsOptions, reporter: Reporter = SILENT
    ) -> list[TwoSubsetsResult]:
        """Returns the result of the pair, alone in a list; from the first run's folder if it is there."""
        from ditlab.analyses.two_subsets.compatibility import check_runs
        from ditlab.analyses.two_subsets.measure import is_current, measure_runs

        runs = check_runs(models)
        opened = [
            replace(part, provenance=replace(part.provenance, label=label))
            for part, label in zip(models.open(reporter), models.chosen_names, strict=True)
        ]
        for result in find_results(self, runs[0], reporter):
            if is_current(result, runs, opened, config):
                return [replace(result, about=(opened[0].provenance, opened[1].provenance))]
        return [measure_runs(runs, opened, config, reporter)]

    def save(self, results: Sequence[TwoSubsetsResult], models: ModelSet, out: Path) -> list[Path]:
        """Writes the result, which is about both runs, into `out`."""
        return [save_result(result, out, self.name) for result in results]

    def compare(self, results: Sequence[TwoSubsetsResult]) -> Sequence[TwoSubsetsResult]:
        """Returns the results as they are: each is about a pair of runs."""
        return results

    def sentences(self, comparison: Comparison) -> list[str]:
        """Returns the sentences of each pair."""
        return [sentence for result in comparison.results for sentence in result.sentences()]

    def notes(self, comparison: Comparison) -> list[str]:
        """Returns in what else the runs of a pair differ: steps, and the recipe of training if both are at hand."""
        from ditlab.analyses.two_subsets.compatibility import differing_recipes

        models = comparison.models or ()
        notes = differing_recipes(*models) if len(models) == 2 and not comparison.number else []
        for first, second in (result.about for result in comparison.results):
            if first.step != second.step:
                notes.append(f"{first.name} was trained for {first.step} steps, {second.name} for {second.step}.")
        return notes

    def to_json(self, comparison: Comparison) -> dict[str, Any]:
        """Returns the numbers of the pair."""
        [result] = comparison.results
        return result.to_json()

    def legend(self, comparison: Comparison) -> str:
        """Returns what the columns are."""
        return (
            "pair: of the two samples of a seed. closest training image: of a sample and the closest image of its own "
            "training set. difference: pair - closest training image. control: of an image of the first training set "
            "and the closest image of the second. Means of cosines."
        )

    def tables(self, comparison: Comparison) -> list[Table]:
        """Returns the mean cosines, one row for each pair of runs, and their spread."""
        from ditlab.analyses.two_subsets.result import cosine_rows, table_row
        from ditlab.pages.page import Table

        results: Sequence[TwoSubsetsResult] = comparison.results
        about = " about their means" if all(result.mean_removed for result in results) else ""
        columns = ("runs", "N", "pairs", "pair", "closest training image", "difference", "control")
        spread = ("between", "mean", "median", "5 %", "95 %")
        return [
            Table(columns, [table_row(result) for result in results], f"Mean cosine of images{about}"),
            *(
                Table(
                    spread, cosine_rows(result), f"Cosines of {result.names}", digits=3, folded="Spread of the cosines"
                )
                for result in results
            ),
        ]

    def figures(self, comparison: Comparison) -> Mapping[str, Drawing]:
        """Returns histograms and pairs of samples of each pair of runs; numbered on a page."""
        from ditlab.analyses.two_subsets.figures import drawings

        hide = comparison.context.hide_training_images or comparison.options.hide_training_images
        models = () if comparison.number else comparison.models or ()
        figures: dict[str, Drawing] = {}
        for place, result in enumerate(comparison.results, 1):
            ending = f"-{place}" if comparison.number else ""
            figures |= {f"{name}{ending}": drawing for name, drawing in drawings(models, result, hide).items()}
        return figures

    def section(self, comparison: Comparison, figures: Mapping[str, ThemedFigure], number: int = 1) -> Section:
        """Returns the section: whether the two runs agree, the cosines, the figures."""
        from ditlab.pages.page import Section

        return Section(
            "two-subsets",
            "Two runs that share no training image",
            points=self.sentences(comparison),
            tables=self.tables(comparison),
            notes=[self.legend(comparison), *comparison.notes],
            pictures=list(figures.values()),
            data={f"two-subsets-{place}.json": r.to_json() for place, r in enumerate(comparison.results, 1)},
        )

    def for_report(self, models: ModelSet, context: ReportContext, reporter: Reporter = SILENT) -> list[Comparison]:
        """Returns the saved results whose first run is on the page; the second one need not be."""
        results = [self.report_result(models, place, None, context, reporter) for place in range(len(models))]
        pairs = [result for result in results if result is not None]
        return [Comparison(self, pairs, pairs, models, None, self.Options(), context, number=1)] if pairs else []

    def report_result(
        self, models: ModelSet, place: int, config: Any, context: ReportContext, reporter: Reporter
    ) -> TwoSubsetsResult | None:
        """Returns the last saved result whose first run is this model with these weights; None if there is none."""
        results = find_results(self, models[place], reporter)
        current = models.open_one(place, reporter).provenance if results else None
        for result in results:
            first, second = result.about
            if current and current.weights and first.same_model(current):
                return replace(result, about=(replace(first, name=models.names[place], label=""), second))
        return None
