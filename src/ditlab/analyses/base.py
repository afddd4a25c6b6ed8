"""What every analysis has: a name, a question, settings, results on disk, a comparison, figures, a section.

A room subclasses `Analysis` and gives what is its own. The base gives caching, saving, the verb of the command line
(from the fields of `Config` and `Options`), the call `ditlab.analyze(name, models, ...)`, `--json`, and the section of
a report.

This module, and the `__init__` and `config` modules of rooms, import neither torch nor numpy, so that help texts are
instant; methods import what they need.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from ditlab.analyses.cache import find_current, find_results, same_config, save_result
from ditlab.arguments import check_fields, plain
from ditlab.errors import DitlabError, InvalidConfig
from ditlab.files import write_json
from ditlab.pages.page import Section, Table, ThemedFigure
from ditlab.pages.theme import assign
from ditlab.progress import SILENT, Reporter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ditlab.models.comparing import ModelSet, OpenedModel
    from ditlab.pages.drawing import Drawing

__all__ = ["Analysis", "Comparison", "NoOptions", "Overview", "ReportContext", "SeparateResults", "settings_of"]


@dataclass(frozen=True)
class NoOptions:
    """An analysis without options beside its settings."""


@dataclass(frozen=True, eq=False)
class ReportContext:
    """What a report tells the analyses about itself."""

    hide_training_images: bool = False
    """Show no picture of a real image, neither of training nor of held-out ones."""
    samples: int = 16
    """Images to draw of each kind of model."""
    measure: frozenset[str] = frozenset()
    """Analyses that are measured although a report only shows what is cached of them."""
    configs: Mapping[str, Any] = field(default_factory=dict)
    """Analysis -> settings to measure it with, instead of its defaults."""
    shared: dict[str, Any] = field(default_factory=dict)
    """What an analysis leaves for those after it, e.g. samples that attention maps are shown on."""
    slots: Mapping[str, int] = field(default_factory=dict)
    """Kind of model -> its colour, the same in all figures of the page."""
    picker_bytes: int = 0
    """Bytes of the page that are left for token pickers; known when sections are made."""
    notes: list[str] = field(default_factory=list)
    """Takes what a reader of the page must know, such as a model that an analysis cannot measure."""


@dataclass(frozen=True, eq=False)
class Overview:
    """What an analysis puts on the first screen of a page."""

    cells: Mapping[tuple[str, int | None], Mapping[str, Any]] = field(default_factory=dict)
    """(kind, N) -> column -> cell; a second line in a cell is its interval."""
    verdict: str = ""
    """The answer in one sentence."""
    figure: Drawing | None = None
    """The figure of the answer."""
    images: Drawing | None = None
    """Small images beside it."""
    note: str = ""
    """What a reader must know about the cells."""


@dataclass(frozen=True, eq=False)
class SeparateResults:
    """Results that are not compared with each other."""

    results: Sequence[Any]

    def sentences(self) -> list[str]:
        """Returns the sentences of each result."""
        return [sentence for result in self.results for sentence in result.sentences()]

    def to_json(self) -> dict[str, Any]:
        """Returns the numbers of the only result."""
        [result] = self.results
        return result.to_json()


ConfigT = TypeVar("ConfigT")
OptionsT = TypeVar("OptionsT")


@dataclass(eq=False)
class Comparison:
    """What an analysis found about one or several models; a notebook shows its table, sentences and figures.

    Attributes of the room's own comparison (`detail`) can be read from it directly, e.g. `gap.groups`.
    """

    analysis: Analysis[Any, Any]
    detail: Any
    """The room's own comparison of the results."""
    results: Sequence[Any]
    """One for each model; what else there is, is in `detail`."""
    models: ModelSet | None = None
    """The models, where they are at hand: some figures need them."""
    config: Any = None
    options: Any = None
    context: ReportContext = field(default_factory=ReportContext)
    files: list[Path] = field(default_factory=list)
    """Files that were written."""
    number: int = 0
    """Its place among the comparisons that a page shows of this analysis, from 1; 0 if it is on no page."""
    count: int = 1
    """How many comparisons a page shows of this analysis."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "detail":
            raise AttributeError(name)
        return getattr(self.detail, name)

    def __repr__(self) -> str:
        return f"<{self.analysis.name} of {len(self.results)} models: {' '.join(self.sentences()[:2])}>"

    @property
    def slots(self) -> Mapping[str, int]:
        """Kind of model -> its colour."""
        return self.context.slots or assign(self.detail.labels)

    @property
    def hides_training_images(self) -> bool:
        """Whether no training image may be shown."""
        return self.context.hide_training_images or getattr(self.options, "hide_training_images", False)

    def table(self) -> Table:
        """Returns the table of the numbers."""
        return self.analysis.tables(self)[0]

    def tables(self) -> Sequence[Table]:
        """Returns all tables, the most important first."""
        return self.analysis.tables(self)

    def sentences(self) -> Sequence[str]:
        """Returns what was found, the most important first; no sentence claims more than its interval allows."""
        return self.analysis.sentences(self)

    @property
    def notes(self) -> list[str]:
        """What a reader must know about how it was measured."""
        return self.analysis.notes(self)

    def drawings(self) -> Mapping[str, Drawing]:
        """Returns file name -> a figure that can be drawn in any theme."""
        return self.analysis.figures(self)

    def figures(self) -> dict[str, Figure]:
        """Returns file name -> matplotlib figure."""
        return {name: drawing.figure() for name, drawing in self.drawings().items()}

    def section(self, figures: Mapping[str, ThemedFigure], number: int = 1) -> Section:
        """Returns the section of a page, with the figures of `drawings`, as the `number`-th of this analysis."""
        return self.analysis.section(self, figures, number)

    def to_json(self) -> dict[str, Any]:
        """Returns the numbers as JSON values."""
        return self.analysis.to_json(self)

    def save(self, out: Path) -> list[Path]:
        """Writes the comparison and its figures into a folder; returns the paths."""
        from ditlab.pages.drawing import save_drawings

        file = self.analysis.comparison_file
        return [*([write_json(out / file, self.to_json())] if file else []), *save_drawings(self.drawings(), out)]

    def _repr_html_(self) -> str:
        from ditlab.pages.notebook import comparison_html

        return comparison_html(self)


class Analysis(Generic[ConfigT, OptionsT]):
    """One question asked of models."""

    name: ClassVar[str]
    """The verb, the kind of its results, and the file name of a result."""
    question: ClassVar[str]
    """One sentence: the help text, the docs, the head of the section."""
    heading: ClassVar[str] = ""
    """The head of the section, instead of the question."""
    Config: type[Any] = NoOptions
    """Its settings, a frozen dataclass: flags and JSON."""
    Options: type[Any] = NoOptions
    """What else a call may say, such as what figures show; not part of the cached settings."""
    Result: ClassVar[str]
    """Where the class of its results is, "package.module:Class"."""
    models: ClassVar[tuple[int, int | None]] = (1, None)
    """The fewest and the most models it takes."""
    pickers: ClassVar[bool] = False
    """Whether its section has token pickers, which get the bytes that the rest of a page leaves."""
    verb: ClassVar[bool] = True
    """Whether the command line has it; an analysis that only makes sense on a page has no verb."""
    report: ClassVar[Literal["measure", "cached"]] = "cached"
    """Whether a report measures it, or shows what is cached of it."""
    comparison_file: ClassVar[str] = ""
    """The file of the comparison; "" where the results say it all."""

    # -- what a room gives ------------------------------------------------------------------------------------------

    def measure_model(self, opened: OpenedModel, config: ConfigT, reporter: Reporter) -> Any:
        """Measures one model."""
        raise NotImplementedError

    def tables(self, comparison: Comparison) -> Sequence[Table]:
        """Returns the tables of a comparison, the most important first."""
        raise NotImplementedError

    # -- what may be changed ----------------------------------------------------------------------------------------

    def measure(
        self, models: ModelSet, config: ConfigT, options: OptionsT, reporter: Reporter = SILENT
    ) -> Sequence[Any]:
        """Returns a result for each model, measured or from the cache, then those of baselines (`result.baseline`)."""
        return [
            self.cached(opened, config, lambda opened=opened: self.measure_model(opened, config, reporter), reporter)
            for opened in models.open(reporter)
        ]

    def compare(self, results: Sequence[Any]) -> Any:
        """Returns the room's own comparison; raises Incompatible for results that cannot be compared."""
        return SeparateResults(results)

    def figures(self, comparison: Comparison) -> Mapping[str, Drawing]:
        """Returns file name -> figure: those of each result, numbered on a page."""
        figures: dict[str, Drawing] = {}
        for place in range(len(comparison.results)):
            ending = f"-{place + 1}" if comparison.number else ""
            figures |= {f"{name}{ending}": figure for name, figure in self.result_figures(comparison, place).items()}
        return figures

    def result_figures(self, comparison: Comparison, place: int) -> Mapping[str, Drawing]:
        """Returns file name -> figure of one of the results."""
        return {}

    def section(self, comparison: Comparison, figures: Mapping[str, ThemedFigure], number: int = 1) -> Section:
        """Returns the section of a page: verdict, table, figures, details."""
        return Section(
            self.name if number == 1 else f"{self.name}-{number}",
            self.heading or self.question,
            points=self.sentences(comparison),
            tables=self.tables(comparison),
            notes=[*filter(None, [self.legend(comparison)]), *self.notes(comparison)],
            pictures=list(figures.values()),
            data=self.data(comparison),
        )

    def data(self, comparison: Comparison) -> dict[str, Any]:
        """Returns file name -> the JSON behind the section."""
        return {f"{r.about.name}-{self.name}.json": r.to_json() for r in comparison.results}

    def overview(self, comparison: Comparison) -> Overview:
        """Returns what the first screen of a page says of a comparison: nothing by default."""
        return Overview()

    def sentences(self, comparison: Comparison) -> Sequence[str]:
        """Returns the sentences of the room's own comparison."""
        return comparison.detail.sentences()

    def notes(self, comparison: Comparison) -> list[str]:
        """Returns each note of the results once."""
        notes = (f"{r.about.name}: {note}" for r in comparison.results for note in getattr(r, "notes", ()))
        return list(dict.fromkeys(notes))

    def legend(self, comparison: Comparison) -> str:
        """Returns what the columns of the tables are."""
        return ""

    def to_json(self, comparison: Comparison) -> dict[str, Any]:
        """Returns the numbers of a comparison."""
        return comparison.detail.to_json()

    def save(self, results: Sequence[Any], models: ModelSet, out: Path) -> list[Path]:
        """Writes each result into its model's folder, and what belongs to none of them into `out`; returns the paths.

        The results are as `measure` gave them, the models in the same order.
        """
        return [save_result(r, m.path / "analysis", self.name) for r, m in zip(results, models, strict=True)]

    def group_key(self, result: Any) -> Any:
        """Returns what results must share to be compared on a page; results of other keys get sections of their own."""
        return None

    def for_report(self, models: ModelSet, context: ReportContext, reporter: Reporter = SILENT) -> list[Comparison]:
        """Returns the comparisons that a report shows: what is cached of the models, or measured where it is missing.

        The models have their newest averaged weights. Those that cannot be measured leave a note.
        """
        settings = context.configs.get(self.name) or self.Config()
        groups: dict[Any, list[tuple[int, Any]]] = {}
        for place, name in enumerate(models.names):
            try:
                result = self.report_result(models, place, settings, context, reporter)
            except DitlabError as error:
                context.notes.append(f"{name}: no {self.name} ({error}).")
                continue
            if result is not None:
                result = self.renamed(result, name, models.kinds[place])
                groups.setdefault(self.group_key(result), []).append((place, result))
        comparisons = []
        for number, members in enumerate(groups.values(), 1):
            places, results = zip(*members, strict=True)
            shown = (self.compare(results), results, models.only(*places), settings, self.Options(), context)
            comparisons.append(Comparison(self, *shown, number=number, count=len(groups)))
        return comparisons

    def renamed(self, result: Any, name: str, kind: str) -> Any:
        """Returns a result with the name and the kind that a page gives its model, the first one of several."""
        if isinstance(result.about, tuple):
            first, *others = result.about
            return replace(result, about=(replace(first, name=name, label=""), *others))
        return replace(result, about=replace(result.about, name=name, label=kind))

    def report_result(
        self, models: ModelSet, place: int, config: Any, context: ReportContext, reporter: Reporter
    ) -> Any | None:
        """Returns the result of one model that a report shows; None where there is none."""
        if self.report == "measure" or self.name in context.measure:
            return self.measure(models.only(place), config, self.Options(), reporter)[0]
        opened = models.open_one(place, reporter)
        return find_current(self, opened.model, opened.provenance, reporter)

    # -- what the base gives ----------------------------------------------------------------------------------------

    def result_class(self) -> Any:
        """Returns the class of the results."""
        return resolve_name(self.Result)

    def check_count(self, count: int) -> None:
        """Raises InvalidConfig for fewer or more models than the analysis takes."""
        least, most = self.models
        if count < least or (most is not None and count > most):
            wanted = f"{least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
            raise InvalidConfig(
                f"{self.name}: expected {wanted} model{'' if (most or least) == 1 else 's'}, found {count}"
            )

    def cached(
        self, opened: OpenedModel, config: ConfigT, measure: Callable[[], Any], reporter: Reporter = SILENT
    ) -> Any:
        """Returns the cached result of a model, or measures it and saves the result.

        A result is found again by the hashes of the weights and of the images, and by the settings. One that was
        measured here does not take the place of NAME.json, which `save` writes.
        """
        for result in find_results(self, opened.model, reporter):
            alike = result.about.same_measurement(opened.provenance) and same_config(result.config, config)
            if alike and not getattr(result, "outdated", False):  # which results of other packages need not say
                about = replace(opened.provenance, settings=result.about.settings)
                return replace(result, about=about, config=config)
        result = measure()
        save_result(result, opened.model.path / "analysis", self.name, aside=True)
        return result

    def run(
        self,
        models: ModelSet,
        config: ConfigT,
        options: OptionsT,
        *,
        out: Path | None = None,
        reporter: Reporter = SILENT,
    ) -> Comparison:
        """Measures models, writes the results and the comparison with its figures, and returns the comparison."""
        self.check_count(len(models))
        results = self.measure(models, config, options, reporter)
        own = [result for result in results if not getattr(result, "baseline", False)]
        comparison, folder = Comparison(self, self.compare(results), own, models, config, options), out or models.folder
        written = self.save(results, models, folder)
        comparison.files = [*([] if self.comparison_file else written), *comparison.save(folder)]
        return comparison


def settings_of(kind: type[Any], values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns a config made of those values that are its fields, and the values that are left; checks their types."""
    names = set(kind.__dataclass_fields__)
    mine = {name: plain(value) for name, value in values.items() if name in names}
    check_fields(kind, mine)
    return kind(**mine), {name: value for name, value in values.items() if name not in names}
