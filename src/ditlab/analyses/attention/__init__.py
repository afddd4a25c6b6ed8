"""Attention: which tokens a denoiser's attention connects, and how local it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ditlab.analyses.attention.config import AttentionConfig, AttentionOptions
from ditlab.analyses.base import Analysis, Comparison
from ditlab.progress import SILENT, Reporter

if TYPE_CHECKING:
    from ditlab.analyses.attention.comparison import LocalityComparison
    from ditlab.analyses.attention.result import LocalityResult
    from ditlab.analyses.base import ReportContext
    from ditlab.models.comparing import ModelSet
    from ditlab.pages.drawing import Drawing
    from ditlab.pages.page import Section, Table, ThemedFigure

__all__ = ["Attention", "AttentionConfig", "AttentionOptions"]


class Attention(Analysis[AttentionConfig, AttentionOptions]):
    """Draws attention maps and measures how local they are (An et al. 2410.21273, Figs. 4 and 5).

    Writes attention.json (distance, mass by radius, entropy and similarity of maps, by noise level, layer and head) and
    attention.npz into each model's analysis folder, and figures of all models together into `out`. Layers and heads
    count from 1, tokens from 0. Models with different test images are refused.
    """

    name = "attention"
    question = "Which tokens does attention connect, and how local is it?"
    Config, Options = AttentionConfig, AttentionOptions
    Result = "ditlab.analyses.attention.result:LocalityResult"
    report = "measure"
    pickers = True
    comparison_file = "attention-comparison.json"

    def measure(
        self, models: ModelSet, config: AttentionConfig, options: AttentionOptions, reporter: Reporter = SILENT
    ) -> list[LocalityResult]:
        from ditlab.analyses.attention.measure import measure_models

        return measure_models(self, models.open(reporter), config, options, reporter)

    def report_result(
        self, models: ModelSet, place: int, config: AttentionConfig, context: ReportContext, reporter: Reporter
    ) -> LocalityResult | None:
        """Returns the result of a model on held-out images; None for a model without attention.

        Of a network with attention on several grids, the layers of `uniform_grid_layers` are measured.
        """
        from ditlab.analyses.attention.maps import attention_layers, has_attention, uniform_grid_layers
        from ditlab.analyses.attention.measure import measure_models

        opened = models.open_one(place, reporter)
        if not has_attention(opened.denoiser):
            return None
        if not config.layers:
            config = replace(config, layers=uniform_grid_layers(attention_layers(opened.denoiser)))
        return measure_models(self, [opened], config, self.Options(), reporter)[0]

    def group_key(self, result: LocalityResult) -> Any:
        return (result.grid, tuple(f"{sigma:.5g}" for sigma in result.levels), result.layers, result.images)

    def compare(self, results: Sequence[LocalityResult]) -> LocalityComparison:
        from ditlab.analyses.attention.comparison import compare_locality

        return compare_locality(results)

    def sentences(self, comparison: Comparison) -> Sequence[str]:
        """Returns the differences if they are few, else none, for a table has them; of a single model its sentence."""
        from ditlab.analyses.attention.section import MAX_SENTENCES

        differences = comparison.detail.differences()
        if not differences:
            return comparison.detail.sentences()[:1]
        return differences if len(differences) <= MAX_SENTENCES else ()

    def tables(self, comparison: Comparison) -> list[Table]:
        from ditlab.analyses.attention.section import attention_tables

        return attention_tables(comparison.detail)

    def legend(self, comparison: Comparison) -> str:
        return (
            "mean distance: of attention, in tokens; uniform: the same if attention were uniform within each layer's "
            "window; within 3x3: share of attention there; consistency: cosine between maps of different images; "
            "control: the same with the rows of one map permuted"
        )

    def figures(self, comparison: Comparison) -> Mapping[str, Drawing]:
        from ditlab.analyses.attention.section import attention_drawings

        return attention_drawings(comparison)

    def section(self, comparison: Comparison, figures: Mapping[str, ThemedFigure], number: int = 1) -> Section:
        from ditlab.analyses.attention.section import attention_section

        return attention_section(comparison, figures, number)
