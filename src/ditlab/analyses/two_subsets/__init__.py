"""The two-subset test: do two runs that share no training image draw the same images from the same noise?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ditlab.analyses.base import Comparison
from ditlab.analyses.cache import find_results
from ditlab.analyses.pairs import PairAnalysis
from ditlab.analyses.two_subsets.config import TwoSubsetsConfig, TwoSubsetsOptions
from ditlab.pages.page import Table
from ditlab.progress import SILENT, Reporter

if TYPE_CHECKING:
    from ditlab.analyses.two_subsets.result import TwoSubsetsResult
    from ditlab.models.comparing import ModelSet
    from ditlab.pages.drawing import Drawing

__all__ = ["TwoSubsets", "TwoSubsetsConfig", "TwoSubsetsOptions"]


class TwoSubsets(PairAnalysis[TwoSubsetsConfig, TwoSubsetsOptions]):
    """Compares two runs that were trained on disjoint images: their samples from the same noise with each other, and
    with their closest training images (Kadkhodaie et al. 2024).

    Train the second run with the first one's settings and `skip` = N. Writes two-subsets.json, .npz and the figures
    into `out`.
    """

    name = "two-subsets"
    question = "Do two runs that share no training image draw the same images from the same noise?"
    heading = "Two runs that share no training image"
    Config, Options = TwoSubsetsConfig, TwoSubsetsOptions
    Result = "ditlab.analyses.two_subsets.result:TwoSubsetsResult"

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

    def notes(self, comparison: Comparison) -> list[str]:
        """Returns in what else the runs of a pair differ: steps, and the recipe of training if both are at hand."""
        from ditlab.analyses.two_subsets.compatibility import differing_recipes

        notes = [] if comparison.number or comparison.models is None else differing_recipes(*comparison.models)
        return notes + super().notes(comparison)

    def legend(self, comparison: Comparison) -> str:
        return (
            "pair: of the two samples of a seed. closest training image: of a sample and the closest image of its own "
            "training set. difference: pair - closest training image. control: of an image of the first training set "
            "and the closest image of the second. Means of cosines."
        )

    def tables(self, comparison: Comparison) -> list[Table]:
        from ditlab.analyses.two_subsets.result import cosine_rows, table_row

        results: Sequence[TwoSubsetsResult] = comparison.results
        about = " about their means" if all(result.mean_removed for result in results) else ""
        columns = ("runs", "N", "pairs", "pair", "closest training image", "difference", "control")
        means = Table(columns, [table_row(result) for result in results], f"Mean cosine of images{about}")
        spread, folded = ("between", "mean", "median", "5 %", "95 %"), "Spread of the cosines"
        return [means, *(Table(spread, cosine_rows(r), f"Cosines of {r.names}", 3, folded) for r in results)]

    def result_figures(self, comparison: Comparison, place: int) -> Mapping[str, Drawing]:
        from ditlab.analyses.two_subsets.figures import drawings

        models = () if comparison.number else comparison.models or ()
        return drawings(models, comparison.results[place], comparison.hides_training_images)
