"""The Jacobian: what a denoiser does to an image, direction by direction."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ditlab.analyses.base import Analysis, Comparison, ReportContext
from ditlab.analyses.jacobian.config import JacobianConfig, JacobianOptions
from ditlab.errors import InvalidConfig
from ditlab.progress import SILENT, Reporter

if TYPE_CHECKING:
    from ditlab.analyses.jacobian.comparison import JacobianComparison
    from ditlab.analyses.jacobian.result import JacobianResult
    from ditlab.models.comparing import ModelSet
    from ditlab.pages.drawing import Drawing
    from ditlab.pages.page import Section, Table, ThemedFigure

__all__ = ["Jacobian", "JacobianConfig", "JacobianOptions"]


class Jacobian(Analysis[JacobianConfig, JacobianOptions]):
    """Computes the Jacobians of denoisers at noisy images, and draws and measures their vectors (An et al., Figs. 1-3;
    Kadkhodaie et al.).

    Writes jacobian.json (the numbers) and jacobian.npz into each model's analysis folder, and the figures of all models
    together into `out`. Models of one seed get the same images and noise. Jacobians of the same weights, images and
    settings that were measured before are reused. An interrupted measurement resumes at the image where it stopped.
    """

    name = "jacobian"
    question = "Which directions of an image does a denoiser keep, and what do these directions look like?"
    Config, Options = JacobianConfig, JacobianOptions
    Result = "ditlab.analyses.jacobian.result:JacobianResult"
    comparison_file = "jacobian-comparison.json"

    def measure(
        self, models: ModelSet, config: JacobianConfig, options: JacobianOptions, reporter: Reporter = SILENT
    ) -> list[JacobianResult]:
        from ditlab.analyses.jacobian.job import JacobianJob, check_jobs

        if options.right and config.decomposition != "svd":
            raise InvalidConfig(
                f"jacobian: `right` needs the `decomposition` svd, found {config.decomposition}, which has one kind of "
                "vectors"
            )
        jobs = [JacobianJob.prepare(self, opened, config, options) for opened in models.open(reporter)]
        check_jobs(jobs)
        return [job.run(reporter) for job in jobs]

    def compare(self, results: Sequence[JacobianResult]) -> JacobianComparison:
        from ditlab.analyses.jacobian.comparison import compare_jacobians

        return compare_jacobians(results)

    def group_key(self, result: JacobianResult) -> Hashable:
        from ditlab.analyses.jacobian.comparison import comparison_key

        return tuple(comparison_key(result).items())

    def report_result(
        self, models: ModelSet, place: int, config: Any, context: ReportContext, reporter: Reporter
    ) -> JacobianResult | None:
        """Returns the saved result of a model; measures only if there is none and the report asks for it.

        A report that gives the settings measures with these.
        """
        if self.name not in context.configs:
            saved = super().report_result(models, place, config, replace(context, measure=frozenset()), reporter)
            if saved is not None:
                return saved
        return super().report_result(models, place, config, context, reporter)

    def tables(self, comparison: Comparison) -> list[Table]:
        from ditlab.analyses.jacobian.section import jacobian_tables

        return jacobian_tables(comparison.detail)

    def legend(self, comparison: Comparison) -> str:
        from ditlab.analyses.jacobian.section import definitions

        return "\n".join(definitions(comparison.detail))

    def figures(self, comparison: Comparison) -> Mapping[str, Drawing]:
        from ditlab.analyses.jacobian.section import jacobian_drawings

        options: JacobianOptions | None = comparison.options
        return jacobian_drawings(
            comparison.detail,
            None if comparison.models is None else comparison.models[0].decode,
            right=options is not None and options.right,
            hide_images=comparison.context.hide_training_images,
            slots=comparison.slots,
        )

    def section(self, comparison: Comparison, figures: Mapping[str, ThemedFigure], number: int = 1) -> Section:
        from ditlab.analyses.jacobian.section import jacobian_section

        return jacobian_section(comparison.detail, list(figures.values()), number=number, data=self.data(comparison))
