"""Agreement: does a model draw what closed-form denoisers of its training images draw from the same noise?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ditlab.analyses.agreement.config import AgreementConfig, AgreementOptions
from ditlab.analyses.base import Analysis, Comparison
from ditlab.pages.page import Table
from ditlab.progress import SILENT, Reporter

if TYPE_CHECKING:
    from ditlab.analyses.agreement.result import AgreementResult
    from ditlab.models.comparing import ModelSet
    from ditlab.pages.drawing import Drawing

__all__ = ["Agreement", "AgreementConfig", "AgreementOptions"]


class Agreement(Analysis[AgreementConfig, AgreementOptions]):
    """Compares a model's samples with those of closed-form denoisers of its training images, from the same noise (Kamb
    and Ganguli; Lukoianov et al.).

    Writes agreement.json and .npz into the model's analysis folder, and the figures into `out`. Calibrating the windows
    of ls, els and bbels takes most of the time; a fixed `window` is faster.
    """

    name = "agreement"
    question = "Does a model draw what closed-form denoisers of its training images draw from the same noise?"
    heading = "Beside closed-form denoisers"
    Config, Options = AgreementConfig, AgreementOptions
    Result = "ditlab.analyses.agreement.result:AgreementResult"
    models = (1, 1)

    def measure(
        self, models: ModelSet, config: AgreementConfig, options: AgreementOptions, reporter: Reporter = SILENT
    ) -> list[AgreementResult]:
        from ditlab.analyses.agreement.measure import measure_model

        opened = models.open_one(0, reporter)
        opened = replace(opened, provenance=replace(opened.provenance, label=models.chosen_names[0]))
        return [self.cached(opened, config, lambda: measure_model(opened, config, reporter), reporter)]

    def legend(self, comparison: Comparison) -> str:
        return (
            "correlation: of the final images, the cosine about their means. other noise: the same between the model's "
            "image and the baseline's images of other seeds. R²: 1 - |x - y|² / (n Var y), y the model's image. one "
            "step: correlation of single estimates on the model's trajectories. window: side in pixels. Medians over "
            "images. Baselines are made of the training images alone."
        )

    def tables(self, comparison: Comparison) -> list[Table]:
        from ditlab.analyses.agreement.result import table_row

        columns = ("model", "N", "baseline", "correlation", "other noise", "R²", "MSE", "one step", "window")
        rows = [table_row(result, baseline) for result in comparison.results for baseline in result.baselines]
        counts = sorted({result.config.images for result in comparison.results})
        caption = (
            f"Medians over {' or '.join(map(str, counts))} image{'' if counts == [1] else 's'} from the same noise"
        )
        return [Table(columns, rows, caption, digits=3)]

    def result_figures(self, comparison: Comparison, place: int) -> Mapping[str, Drawing]:
        from ditlab.analyses.agreement.figures import drawings

        assert comparison.models is not None
        return drawings(comparison.models[place], comparison.results[place], comparison.hides_training_images)
