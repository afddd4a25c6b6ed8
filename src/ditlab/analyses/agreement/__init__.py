"""Agreement: does a model draw what closed-form denoisers of its training images draw from the same noise?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ditlab.analyses.agreement.config import AgreementConfig, AgreementOptions
from ditlab.analyses.base import Analysis, Comparison
from ditlab.progress import SILENT, Reporter

if TYPE_CHECKING:
    from ditlab.analyses.agreement.result import AgreementResult
    from ditlab.models.comparing import ModelSet
    from ditlab.pages.drawing import Drawing
    from ditlab.pages.page import Section, Table, ThemedFigure

__all__ = ["Agreement", "AgreementConfig", "AgreementOptions"]


class Agreement(Analysis[AgreementConfig, AgreementOptions]):
    """Compares a model's samples with those of closed-form denoisers of its training images, from the same noise (Kamb
    and Ganguli; Lukoianov et al.).

    Writes agreement.json and .npz into the model's analysis folder, and the figures into `out`. Calibrating the windows
    of ls, els and bbels takes most of the time; a fixed `window` is faster.
    """

    name = "agreement"
    question = "Does a model draw what closed-form denoisers of its training images draw from the same noise?"
    Config, Options = AgreementConfig, AgreementOptions
    Result = "ditlab.analyses.agreement.result:AgreementResult"
    models = (1, 1)

    def measure(
        self, models: ModelSet, config: AgreementConfig, options: AgreementOptions, reporter: Reporter = SILENT
    ) -> list[AgreementResult]:
        """Returns the result of the model, alone in a list."""
        from ditlab.analyses.agreement.measure import measure_model

        opened = models.open_one(0, reporter)
        opened = replace(opened, provenance=replace(opened.provenance, label=models.chosen_names[0]))
        return [self.cached(opened, config, lambda: measure_model(opened, config, reporter), reporter)]

    def compare(self, results: Sequence[AgreementResult]) -> Sequence[AgreementResult]:
        """Returns the results as they are: each model is compared with its own baselines."""
        return results

    def sentences(self, comparison: Comparison) -> list[str]:
        """Returns the sentences of each result."""
        return [sentence for result in comparison.results for sentence in result.sentences()]

    def to_json(self, comparison: Comparison) -> dict[str, Any]:
        """Returns the numbers of the model."""
        [result] = comparison.results
        return result.to_json()

    def legend(self, comparison: Comparison) -> str:
        """Returns what the columns are."""
        return (
            "correlation: of the final images, the cosine about their means. other noise: the same between the model's "
            "image and the baseline's images of other seeds. R²: 1 - |x - y|² / (n Var y), y the model's image. one "
            "step: correlation of single estimates on the model's trajectories. window: side in pixels. Medians over "
            "images."
        )

    def tables(self, comparison: Comparison) -> list[Table]:
        """Returns one row for each model and baseline."""
        from ditlab.analyses.agreement.result import table_row
        from ditlab.pages.page import Table

        columns = ("model", "N", "baseline", "correlation", "other noise", "R²", "MSE", "one step", "window")
        rows = [table_row(result, baseline) for result in comparison.results for baseline in result.baselines]
        counts = sorted({result.config.images for result in comparison.results})
        caption = (
            f"Medians over {' or '.join(map(str, counts))} image{'' if counts == [1] else 's'} from the same noise"
        )
        return [Table(columns, rows, caption, digits=3)]

    def figures(self, comparison: Comparison) -> Mapping[str, Drawing]:
        """Returns the images side by side and the correlations, of each model; numbered on a page."""
        from ditlab.analyses.agreement.figures import drawings

        hide = comparison.context.hide_training_images or comparison.options.hide_training_images
        figures: dict[str, Drawing] = {}
        for place, (model, result) in enumerate(zip(comparison.models or (), comparison.results, strict=True), 1):
            ending = f"-{place}" if comparison.number else ""
            figures |= {f"{name}{ending}": drawing for name, drawing in drawings(model, result, hide).items()}
        return figures

    def section(self, comparison: Comparison, figures: Mapping[str, ThemedFigure], number: int = 1) -> Section:
        """Returns the section: the best baseline of each model, the table, the figures."""
        from ditlab.pages.page import Section

        return Section(
            "agreement",
            "Beside closed-form denoisers",
            points=self.sentences(comparison),
            tables=self.tables(comparison),
            notes=[f"Baselines are made of the training images alone. {self.legend(comparison)}", *comparison.notes],
            pictures=list(figures.values()),
            data={f"{result.about.name}-agreement.json": result.to_json() for result in comparison.results},
        )
