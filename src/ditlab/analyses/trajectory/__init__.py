"""Train and test PSNR along training: when a gap opens, and how kinds of models compare at equal fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ditlab.analyses.base import Analysis, Comparison, NoOptions, ReportContext
from ditlab.pages.drawing import Drawing
from ditlab.pages.page import Section, Table, ThemedFigure
from ditlab.progress import SILENT, Reporter

if TYPE_CHECKING:
    from ditlab.analyses.trajectory.comparison import Course
    from ditlab.models.comparing import ModelSet

__all__ = ["AlongTraining"]

_WHY = (
    "A gap at equal steps cannot tell a network that generalizes better from one that fits more slowly. So kinds are "
    "also compared where both have reached the same train PSNR, and at the best test PSNR that each reaches."
)


class AlongTraining(Analysis[NoOptions, NoOptions]):
    """Reads train and test PSNR along training from the logs of runs, and compares kinds at equal fit."""

    name = "trajectory"
    question = "When does the gap open, and do kinds of models differ at equal fit?"
    verb = False

    def for_report(self, models: ModelSet, context: ReportContext, reporter: Reporter = SILENT) -> list[Comparison]:
        """Returns one comparison of the models that have a log; none where no model has."""
        from ditlab.analyses.trajectory.comparison import Course

        course = Course.of(models)
        return [Comparison(self, course, course.trajectories, models, context=context)] if course.logs else []

    def notes(self, comparison: Comparison) -> list[str]:
        """Returns notes on seeds that are left out or cannot be matched."""
        course: Course = comparison.detail
        notes = [f"{m.first} and {m.second}, {note}" for m in course.matched for note in m.notes()]
        return [*course.notes, *notes, "PSNR and gaps in dB, averaged over the noise levels measured during training."]

    def tables(self, comparison: Comparison) -> list[Table]:
        from ditlab.analyses.trajectory.tables import course_table

        course: Course = comparison.detail
        return [course_table(course.trajectories)] if course.trajectories else []

    def figures(self, comparison: Comparison) -> Mapping[str, Drawing]:
        from ditlab.analyses.trajectory.figures import gap_along_training, loss_curves, matched_psnr

        course, slots = comparison.detail, comparison.slots
        drawings: dict[str, Drawing] = {}
        for n in course.counts:
            ending, which = (f"-n{n}", f"N = {n}. ") if len(course.counts) > 1 else ("", "")
            along = [t for t in course.trajectories if t.n == n]
            logs = {label: log for (count, label), log in course.logs.items() if count == n}
            pairs = [m for m in course.matched if m.n == n]
            pair = pairs[0] if len(pairs) == 1 else None
            names = " and ".join(dict.fromkeys([*(t.label for t in along), *logs]))
            style: dict[str, Any] = {"latents": course.latents, "slots": slots}
            if along:
                drawings[f"gap-along-training{ending}"] = Drawing(
                    lambda theme, along=along, style=style: gap_along_training(along, theme=theme, **style),
                    f"{which}The PSNR gap and the test PSNR of {names} against training steps.",
                    f"{which}Averaged weights, a coarse grid of noise levels, the same images and noise each time.",
                )
                drawings[f"matched-psnr{ending}"] = Drawing(
                    lambda theme, along=along, pair=pair, style=style: matched_psnr(along, pair, theme=theme, **style),
                    f"{which}Test PSNR against train PSNR along the training of {names}.",
                    f"{which}At equal train PSNR a higher curve generalizes better at the same fit.",
                )
            if any("loss" in line or "train_loss" in line for log in logs.values() for line in log):
                drawings[f"losses{ending}"] = Drawing(
                    lambda theme, logs=logs: loss_curves(logs, slots=slots, theme=theme),
                    f"{which}Losses of {names} against training steps.",
                    f"{which}The loss of the batches, and the loss of the averaged weights on fixed train and test "
                    "images (first seed).",
                )
        return drawings

    def section(self, comparison: Comparison, figures: Mapping[str, ThemedFigure], number: int = 1) -> Section:
        from ditlab.analyses.trajectory.comparison import thinned
        from ditlab.analyses.trajectory.tables import best_sentence, matched_differences, matched_table

        course: Course = comparison.detail
        compared = [
            Section(
                f"matched-{i}",
                f"{m.first} and {m.second}" + ("" if m.n is None else f", N = {m.n}") + ", seed by seed",
                tables=[matched_table(m)],
                data={f"matched-{i}.json": m.to_json()},
                folded=True,
            )
            for i, m in enumerate(course.matched)
        ]
        matched = Section(
            "matched",
            "At equal steps, at matched train PSNR, and at their best" if compared else "Test against train PSNR",
            [_WHY] if compared else (),
            tables=[matched_differences(course.matched)] if compared else (),
            pictures=[figure for name, figure in figures.items() if name.startswith("matched-psnr")],
            parts=compared,
        )
        return Section(
            "training",
            "Along training",
            verdict=best_sentence(course.trajectories),
            tables=self.tables(comparison),
            notes=self.notes(comparison) if course.trajectories else (),
            pictures=[figure for name, figure in figures.items() if not name.startswith("matched-psnr")],
            data={f"{label}-n{n}-log.json": thinned(log) for (n, label), log in course.logs.items()},
            parts=[matched],
        )

    def sentences(self, comparison: Comparison) -> list[str]:
        course: Course = comparison.detail
        several = len(course.counts) > 1
        return [f"N = {m.n}. {s}" if several else s for m in course.matched for s in m.sentences()]

    def to_json(self, comparison: Comparison) -> dict[str, Any]:
        return {"matched": [matched.to_json() for matched in comparison.detail.matched]}
