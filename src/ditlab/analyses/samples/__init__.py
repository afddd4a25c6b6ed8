"""Samples of each kind of model, and the training images that are nearest to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ditlab.analyses.base import Analysis, Comparison, NoOptions, Overview, ReportContext
from ditlab.pages.drawing import Drawing
from ditlab.pages.page import Section, Table, ThemedFigure
from ditlab.progress import SILENT, Reporter

if TYPE_CHECKING:
    from ditlab.analyses.samples.measure import SampleSet
    from ditlab.models.comparing import ModelSet

__all__ = ["Samples"]


class Samples(Analysis[NoOptions, NoOptions]):
    """Draws samples of each kind of model at each N, and finds the training images nearest to them."""

    name = "samples"
    question = "Are samples copies of training images?"
    verb = False

    def for_report(self, models: ModelSet, context: ReportContext, reporter: Reporter = SILENT) -> list[Comparison]:
        """Returns one comparison of all kinds, and leaves in `context.shared["samples"]` what may be shown.

        That is model name -> (float32 [n, C, H, W], int64 [n] or None): samples as the denoiser sees images, and the
        classes that they were drawn for.
        """
        from ditlab.analyses.samples.measure import SampleSet

        sample_set = SampleSet.draw(models, context, reporter)
        context.shared["samples"] = sample_set.shown()
        if not sample_set.kinds and sample_set.training is None:
            return []
        nearest = [kind.nearest for kind in sample_set.kinds if kind.nearest is not None]
        return [Comparison(self, sample_set, nearest, models, context=context)]

    def sentences(self, comparison: Comparison) -> list[str]:
        return [result.sentence() for result in comparison.results]

    def tables(self, comparison: Comparison) -> list[Table]:
        from ditlab.analyses.samples.tables import distances_table

        return [distances_table(comparison.results)] if comparison.results else []

    def figures(self, comparison: Comparison) -> Mapping[str, Drawing]:
        from ditlab.analyses.samples.figures import samples_with_nearest

        samples: SampleSet = comparison.detail
        rows = samples.rows()
        if not rows:
            return {}
        beneath = ", each above its nearest training image, with their distance and the file of the image"
        if samples.hide:
            beneath = (
                ", with their distance to the nearest training image (no real image is shown, nor any copy of one)"
            )
        if not comparison.results:
            beneath = ""
        drawing = Drawing(
            lambda theme: samples_with_nearest(rows, theme=theme),
            f"Rows of images: samples of {'; '.join(row.caption for row in rows)}{beneath}.",
            f"Samples from equal noise{beneath}." + (" Distances are in grey levels (0 to 255)." if beneath else ""),
            exact=True,
        )
        return {"samples": drawing}

    def section(self, comparison: Comparison, figures: Mapping[str, ThemedFigure], number: int = 1) -> Section:
        from ditlab.analyses.samples.tables import ABOUT_LATENTS, copies_sentence, nearest_table

        results, names = comparison.results, nearest_table(comparison.detail)
        return Section(
            "samples",
            "Samples and their nearest training images" if results else "Samples",
            verdict=copies_sentence(results),
            tables=[*self.tables(comparison), *([names] if names else [])],
            notes=[ABOUT_LATENTS] if any(result.latents for result in results) else (),
            pictures=list(figures.values()),
            data={f"{result.about.name}-nearest.json": result.to_json() for result in results},
        )

    def overview(self, comparison: Comparison) -> Overview:
        from ditlab.analyses.samples.tables import copies_cell, copies_sentence
        from ditlab.pages.grids import sample_grid

        samples: SampleSet = comparison.detail
        cells = {(r.about.group, r.about.n): {"copies": copies_cell(r.samples)} for r in comparison.results}
        rows = samples.thumbnails()
        images = Drawing(
            lambda theme: sample_grid(rows, columns=8, inches=0.5, theme=theme),
            f"Small images: {'; '.join(caption for caption, _ in rows)}.",
            exact=True,
        )
        copied = any(result.samples.copies for result in comparison.results)
        verdict = copies_sentence(comparison.results) if copied else ""
        note = (
            "Copies: samples less than a third as far from one training image as from any other, with the 95 % "
            "interval of their share."
        )
        return Overview(cells, verdict, images=images if rows else None, note=note if cells else "")

    def to_json(self, comparison: Comparison) -> dict[str, Any]:
        return {"kinds": [result.to_json() for result in comparison.results]}
