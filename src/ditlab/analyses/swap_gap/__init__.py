"""The swap gap: how much better is a model on its own training images than one that was trained on others?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ditlab.analyses.base import Comparison, NoOptions
from ditlab.analyses.cache import find_results, same_config
from ditlab.analyses.pairs import PairAnalysis, same_pair
from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.pages.drawing import Drawing
from ditlab.pages.page import Table
from ditlab.progress import SILENT, Reporter

if TYPE_CHECKING:
    from ditlab.analyses.swap_gap.result import SwapResult
    from ditlab.models.comparing import ModelSet

__all__ = ["SwapGap"]


class SwapGap(PairAnalysis[PSNRConfig, NoOptions]):
    """Compares two models that were trained on disjoint images, each on the training images of both.

    The images and the noise are the same for both models, so the difficulty of the images cancels, as it does not in
    the PSNR gap. Train the second run with the first one's settings and `skip` = N. Writes swap-gap.json, .npz and the
    figure into `out`.
    """

    name = "swap-gap"
    question = "How much better is a model on its own training images than one that was trained on others?"
    heading = "Two runs, each on the training images of both"
    Config, Options = PSNRConfig, NoOptions
    Result = "ditlab.analyses.swap_gap.result:SwapResult"

    def measure(
        self, models: ModelSet, config: PSNRConfig, options: NoOptions, reporter: Reporter = SILENT
    ) -> list[SwapResult]:
        """Returns the result of the pair, alone in a list; from the first model's folder if it is there."""
        from ditlab.analyses.swap_gap.measure import check_pair, measure_swap

        opened = list(models.open(reporter))
        check_pair(opened)
        for result in find_results(self, opened[0].model, reporter):
            if same_pair(result, opened) and same_config(result.config, config):
                first, second = (part.provenance for part in opened)
                return [replace(result, about=(first, second), config=config)]
        return [measure_swap(opened, config, reporter)]

    def legend(self, comparison: Comparison) -> str:
        return (
            "on images of A, of B: PSNR of the model that was trained on them minus PSNR of the other one. swap gap: "
            "the mean of both, which is 0 where nothing is memorized; it is not truncated."
        )

    def tables(self, comparison: Comparison) -> list[Table]:
        rows = []
        for result in comparison.results:
            bands = [(f"{band.name}, {band.span}", inside) for band, inside in result.by_band().items()]
            for name, inside in (("all", result), *bands):
                interval = "" if inside.interval is None else "\n{:+.2f} to {:+.2f}".format(*inside.interval)
                gaps = [f"{inside.curve(side).mean():+.2f}" for side in (0, 1)]
                row = (result.names, result.about[0].n, name, len(inside.levels), *gaps)
                rows.append((*row, f"{inside.average:+.2f}{interval}"))
        columns = ("A and B", "N", "sigma", "levels", "on images of A, dB", "on images of B, dB", "swap gap, dB")
        return [Table(columns, rows, "PSNR on own training images minus PSNR of the other model on the same images")]

    def result_figures(self, comparison: Comparison, place: int) -> Mapping[str, Drawing]:
        from ditlab.analyses.swap_gap.figures import swap_curves

        result = comparison.results[place]
        return {
            "swap-gap": Drawing(
                lambda theme: swap_curves(result, theme=theme),
                f"Swap gap of {result.names} by noise level.",
                "Thin lines: on the training images of each model. Thick line: their mean. Zero: no memorization.",
            )
        }
