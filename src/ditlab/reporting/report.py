"""The report: one page about one or several models, made of the sections that the analyses give.

Nothing here knows which analyses there are: `write_report` asks each of `ditlab.analyses.analysis_names()` what it has
to show. What one of them cannot show is a note on the page; it never keeps the page from being made.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

from ditlab.analyses import analysis, analysis_names, unusable_analyses
from ditlab.analyses.base import Comparison, ReportContext
from ditlab.errors import DitlabError, InvalidConfig
from ditlab.files import write_bytes, write_json
from ditlab.models.comparing import ModelSet
from ditlab.pages import page as pages
from ditlab.pages import token_picker
from ditlab.pages.page import PageData, RunCard, Section, ThemedFigure, fit_page, page_size, save_page, with_pickers
from ditlab.pages.theme import assign
from ditlab.progress import SILENT, Reporter
from ditlab.provenance import check_groups
from ditlab.reporting.first_screen import FirstScreen, rows_of, title_of

__all__ = ["MAX_SAMPLES", "ReportResult", "write_report"]

MAX_SAMPLES = 64
"""Samples of each kind, at most, so that the page stays small."""
PICKER_ROOM = 1_000_000
"""Bytes of the page that are kept for token pickers, where an analysis has any."""
LIST = "figures.json"
"""The names of the figures that the last report wrote."""
_EARLIER = re.compile(
    r"samples|psnr-curves|gap-bars|(gap-along-training|matched-psnr|losses|scaling|sampling-compute)(-n\w+)?"
    r"|attention-maps|attention-locality(-by-n)?-\d+|agreement(-images)?-\d+|two-subsets(-pairs)?-\d+"
    r"|jacobian-(denoised|spectra|vectors|right-vectors|measures|shrinkage|sensitivity)[\w.+-]*"
)
"""The names that reports of earlier versions, which kept no list, gave their figures."""

_NO_VERDICT = "Nothing was measured that tells whether {title} generalizes or memorizes; the notes below say why."

_Figures = Mapping[str, ThemedFigure]


@dataclass(frozen=True, eq=False)
class ReportResult:
    """A page that was written, and what it shows."""

    path: Path
    sentences: Sequence[str]
    """The verdict, then what each analysis found."""
    comparisons: Sequence[Comparison] = field(default=(), repr=False)
    """What the sections were made of, in their order; none of a study's page."""

    def _repr_html_(self) -> str:
        path = escape(self.path.resolve().as_uri())
        lines = "".join(f"<li>{escape(sentence)}</li>" for sentence in self.sentences[:3])
        return f'<a href="{path}">{escape(str(self.path))}</a><ul>{lines}</ul>'


def write_report(
    models: ModelSet,
    out: Path,
    *,
    title: str | None = None,
    samples: int = 16,
    hide_training_images: bool = False,
    jacobian: bool = False,
    configs: Mapping[str, Any] | None = None,
    commands: Sequence[tuple[str, str]] = (),
    foreword: Sequence[str] = (),
    reporter: Reporter = SILENT,
) -> ReportResult:
    """Measures what is missing, draws, and writes the page with its figures beside it.

    Args:
        models: one or several.
        out: the page; its figures go into figures/ beside it.
        title: the model's name, or the names of the kinds, if None.
        samples: images to draw of each kind of model at each N, at most 64.
        hide_training_images: show no picture of a real image, nor a sample that is nearly one.
        jacobian: also measure Jacobians of models that have none, which takes minutes.
        configs: analysis -> the settings to measure it with, instead of its defaults.
        commands: (what it does, the exact command line), shown before the commands that trained the models.
        foreword: sentences under the verdict.
        reporter: takes notes and progress.

    Raises:
        InvalidConfig: a number of samples below 0 or above 64.
        Incompatible: models that cannot be compared; nothing was measured.
        DitlabError: the page cannot be written, or is too large with its figures as small as they can be.
    """
    if not 0 <= samples <= MAX_SAMPLES:
        raise InvalidConfig(
            f"report: `samples` must be from 0 to {MAX_SAMPLES}, found {samples}; `ditlab sample` draws more"
        )
    _check_comparable(models)
    context = ReportContext(
        hide_training_images,
        samples,
        frozenset({"jacobian"} if jacobian else ()),
        configs or {},
        slots=assign(models.kinds),
    )
    comparisons = _comparisons(models, context, reporter)
    figures, files = _drawn(comparisons)
    title = title or title_of(models)
    overviews = [comparison.analysis.overview(comparison) for comparison in comparisons]
    first = FirstScreen.of(rows_of(models), overviews, _NO_VERDICT.format(title=title))
    notes = [f"{name}: {note}" for name, model in zip(models.names, models, strict=True) for note in model.notes]
    names = zip(models.names, models.kinds, models, strict=True)
    data = PageData(
        title=title,
        summary=[*first.sentences, *foreword],
        tables=[first.table],
        pictures=first.pictures,
        notes=[*first.notes, *notes, *context.notes],
        sections=[_section(*of, context) for of in zip(comparisons, figures, strict=True)],
        runs=[RunCard(name, kind, dict(model.settings)) for name, kind, model in names],
        labels=list(context.slots),
        commands=[
            *commands,
            *((f"train {n}", m.command) for n, m in zip(models.names, models, strict=True) if m.command),
        ],
        environment=models[0].environment,
    )
    save_page(_with_pickers(data, comparisons, figures, context), out)
    _save_figures(files, out.parent / "figures")
    sentences = [*first.sentences, *(sentence for comparison in comparisons for sentence in comparison.sentences())]
    return ReportResult(out, list(dict.fromkeys(sentences)), comparisons)


def _check_comparable(models: ModelSet) -> None:
    """Refuses models that may not stand in one figure, before anything is measured; those without images may."""
    pairs = zip(models, models.kinds, models.names, strict=True)
    abouts = [replace(model.provenance(label=kind), name=name) for model, kind, name in pairs]
    check_groups([about for about in abouts if about.split_family], "report")


def _comparisons(models: ModelSet, context: ReportContext, reporter: Reporter) -> list[Comparison]:
    """What all analyses show, in the order of their sections; those that cannot show anything leave a note."""
    comparisons: list[Comparison] = []
    context.notes.extend(unusable_analyses())
    for name in analysis_names():
        try:
            shown = analysis(name).for_report(models, context, reporter)
        except DitlabError as error:
            context.notes.append(f"No section on {name}: {error}.")
            continue
        for number, comparison in enumerate(shown, 1):
            comparison.number, comparison.count = number, len(shown)
        comparisons += shown
    return comparisons


def _drawn(comparisons: Sequence[Comparison]) -> tuple[Sequence[_Figures], _Figures]:
    """The figures of each comparison, and all figures by the names of their files."""
    figures = [{name: ThemedFigure.of(drawing) for name, drawing in c.drawings().items()} for c in comparisons]
    count = Counter(name for of in figures for name in of)
    files = {
        name if count[name] == 1 else f"{name}-{comparison.number}": figure
        for comparison, of in zip(comparisons, figures, strict=True)
        for name, figure in of.items()
    }
    return figures, files


def _section(comparison: Comparison, figures: _Figures, context: ReportContext) -> Section:
    """The section of a comparison, as the context wants it."""
    comparison.context = context
    return comparison.section(figures, comparison.number)


def _with_pickers(
    data: PageData, comparisons: Sequence[Comparison], figures: Sequence[_Figures], context: ReportContext
) -> PageData:
    """The page, small enough, with the token pickers that the rest of it leaves room for."""
    fitted = fit_page(data, PICKER_ROOM if any(comparison.analysis.pickers for comparison in comparisons) else 0)
    room = max(0, min(token_picker.BUDGET, pages.PAGE_BYTES - page_size(fitted)))
    context = replace(context, picker_bytes=room)
    sections = [
        with_pickers(section, _section(comparison, of, context)) if comparison.analysis.pickers else section
        for section, comparison, of in zip(fitted.sections, comparisons, figures, strict=False)
    ]
    return replace(fitted, sections=[*sections, *fitted.sections[len(comparisons) :]])


def _save_figures(figures: _Figures, folder: Path) -> None:
    """Writes each figure as NAME.png, as it is on a light page.

    An earlier report's figures that this one lacks are deleted: they may show images that this one hides.
    """
    names = {file.stem for file in folder.glob("*.png")}
    try:
        earlier = names & set(json.loads((folder / LIST).read_text(encoding="utf-8"))["names"])
    except (OSError, ValueError, KeyError, TypeError):
        earlier = {name for name in names if _EARLIER.fullmatch(name)}
    for name in earlier - figures.keys():
        (folder / f"{name}.png").unlink(missing_ok=True)
    for name, figure in figures.items():
        write_bytes(folder / f"{name}.png", figure.light)
    write_json(folder / LIST, {"kind": "report-figures", "version": 1, "names": sorted(figures)})
