"""Scaling: what networks of several sizes cost and reached (Peebles & Xie, 2212.09748, Figs. 2, 6, 8 to 10)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ditlab.analyses.base import Analysis, Comparison, NoOptions, ReportContext
from ditlab.progress import SILENT, Reporter

if TYPE_CHECKING:
    from ditlab.models.comparing import ModelSet
    from ditlab.pages.drawing import Drawing
    from ditlab.pages.page import Section, Table, ThemedFigure

__all__ = ["Scaling"]

_NOTE = (
    "GMACs: 10^9 multiply-accumulates of a forward pass for one image. Training compute: GMACs x batch size x steps x "
    "3. Losses of objectives or noise schedules that differ cannot be compared."
)


class Scaling(Analysis[NoOptions, NoOptions]):
    """Reads from logs and evaluations how quality goes with parameters, operations and compute."""

    name = "scaling"
    question = "What do networks of several sizes cost, and what do they reach?"
    Config = NoOptions
    verb = False

    def for_report(self, models: ModelSet, context: ReportContext, reporter: Reporter = SILENT) -> list[Comparison]:
        """Returns one comparison where networks of several sizes were trained on as many images; else none."""
        from ditlab.analyses.scaling.points import Sizes

        sizes = Sizes.of(models)
        return [Comparison(self, sizes, sizes.points, models, NoOptions(), NoOptions(), context)] if sizes.by_n else []

    def tables(self, comparison: Comparison) -> list[Table]:
        """Returns a row for each run, with its last values."""
        from ditlab.analyses.scaling.points import sizes_table

        return [sizes_table(comparison.detail.points)]

    def figures(self, comparison: Comparison) -> Mapping[str, Drawing]:
        """Returns for each N what was measured against cost, and against the compute of a sample."""
        from ditlab.analyses.scaling.figures import sampling_figure, scaling_figure
        from ditlab.analyses.scaling.points import by_sampling, measured
        from ditlab.pages.drawing import Drawing

        sizes, slots = comparison.detail, comparison.slots
        drawings: dict[str, Drawing] = {}
        for n, points in sizes.by_n.items():
            ending, which = (f"-n{n}", f"N = {n}. ") if sizes.several else ("", "")
            drawings[f"scaling{ending}"] = Drawing(
                lambda theme, points=points: scaling_figure(points, slots=slots, theme=theme),
                f"{which}What was measured against GMACs, training steps and training compute.",
                f"{which}GMACs of a forward pass for one image; training compute is GMACs x batch size x steps x 3.",
            )
            if any(by_sampling(points, metric) for metric in measured(points)):
                drawings[f"sampling-compute{ending}"] = Drawing(
                    lambda theme, points=points: sampling_figure(points, slots=slots, theme=theme),
                    f"{which}What was measured of samples against the compute of one sample.",
                    f"{which}Compute of a sample: GMACs times network calls; a dot for each number of sampling steps.",
                )
        return drawings

    def section(self, comparison: Comparison, figures: Mapping[str, ThemedFigure], number: int = 1) -> Section:
        """Returns the section: which network reached most, the table, the figures."""
        from ditlab.pages.page import Section

        return Section(
            "scaling",
            "Scaling: quality against compute",
            verdict=" ".join(self.sentences(comparison)),
            tables=self.tables(comparison),
            notes=[_NOTE],
            pictures=list(figures.values()),
            data={"scaling.json": self.to_json(comparison)},
        )
