"""The report page: one HTML file with its style, pictures, script and result files inside, which opens anywhere.

A page is a first screen that answers the question (a sentence, a table, a figure) and a sequence of sections; a
section has a verdict, tables, pictures, attention pickers and the JSON behind them. Each analysis makes its own
section, a study adds others. `build_page` only lays them out, and `save_page` makes a page that would be too large
smaller. The page asks nothing of the network and runs no script but its own (its content-security policy names that
script's hash), follows the reader's light or dark setting, and can be read on a phone and on paper.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ditlab
from ditlab.errors import DitlabError
from ditlab.files import write_text
from ditlab.pages.drawing import Drawing
from ditlab.pages.theme import DARK, DPI, LIGHT, Theme, assign, png

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

    from ditlab.pages.token_picker import AttentionPicker

PAGE_BYTES = 9_500_000
"""A report stays below this size: many mail servers refuse 10 MB."""

EXACT_BYTES = 1_000_000
"""A figure of photographs keeps all its colours up to this size."""
_SMALLEST = 4
"""Figures lose at most so much of their resolution, in each direction, where a page would be too large."""
_NOT_HERE = "The data files are left out because the page would be too large; they are stored next to the results."

_NUMBER = re.compile(r"[<>≥≤~−+-]{0,2} ?\d+(,\d{3})*(\.\d+)?(e[+-]?\d+)?(?![^\s%±–])")
"""How a cell starts that is set as a number: "12", "-0.3 ± 0.1", "≥ 4"; not "3*4" nor "3,5,g*2"."""


@dataclass(frozen=True)
class ThemedFigure:
    """A figure for both themes, with what it shows in words."""

    light: bytes
    """PNG."""
    dark: bytes
    """PNG; the same as `light` where it needs no other."""
    alt: str
    """What is to be seen, for a reader who does not see it."""
    caption: str
    shrunk: int = 1
    """Of how many pixels of the drawing, in each direction, one is kept."""

    @property
    def size(self) -> int:
        """Bytes on the page."""
        return sum(-(-len(content) // 3) * 4 for content in {self.light, self.dark})

    @property
    def width(self) -> int:
        """Width on the page in CSS pixels, so that text has the same size in all figures."""
        # The width in pixels stands in bytes 16 to 19 of every PNG.
        return round(int.from_bytes(self.light[16:20], "big") * self.shrunk / DPI * 108)

    @classmethod
    def draw(cls, drawing: Callable[[Theme], Figure], alt: str, caption: str, *, exact: bool = False) -> ThemedFigure:
        """Draws a figure in both themes.

        A large PNG is brought to 256 colours, which curves and maps do not show; not so where `exact`, for figures of
        photographs, up to `EXACT_BYTES`.
        """
        light, dark = (png(drawing(theme)) for theme in (LIGHT, DARK))
        exact = exact and len(light) <= EXACT_BYTES
        return cls(light, dark, alt, caption) if exact else cls(_smaller(light), _smaller(dark), alt, caption)

    @classmethod
    def of(cls, drawing: Drawing) -> ThemedFigure:
        """Draws a drawing in both themes."""
        return cls.draw(drawing.draw, drawing.alt, drawing.caption, exact=drawing.exact)


@dataclass(frozen=True)
class Table:
    """Rows under named columns; the first column names the row.

    A cell may be None (shown as "–"), a number, a truth value or words; a second line in it is small print, such as an
    interval. Columns of numbers stand to the right. A cell that is the name of a kind of model (`PageData.labels`)
    carries its colour. `words in backticks` are set as code.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""
    digits: int = 2
    """Decimals of floats."""
    folded: str = ""
    """The label under which the table is collapsed; "" for a table that is shown."""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise DitlabError(
                    f"report table '{self.caption or ', '.join(self.columns)}': expected {len(self.columns)} cells in "
                    f"each row, found {len(row)}"
                )

    def __str__(self) -> str:
        rows = [list(self.columns), *([cell.replace("\n", " ") for cell in row] for row in self.texts)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.columns))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.texts)
        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"

    @property
    def texts(self) -> list[list[str]]:
        """The cells as a reader sees them."""
        return [[_value(cell, self.digits) for cell in row] for row in self.rows]

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether all that stands in it are numbers (at least one)."""
        columns = ([row[i] for row in self.rows if row[i] is not None] for i in range(len(self.columns)))
        return [bool(cells) and all(map(_is_number, cells)) for cells in columns]


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading. What is empty is left out; the order on the page is that of the fields."""

    id: str
    """Its anchor: letters, digits and hyphens, once on a page."""
    title: str
    paragraphs: Sequence[str] = ()
    points: Sequence[str] = ()
    """Sentences in a list."""
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    """Small print, folded away with the data: what a reader must know about how it was measured."""
    code: Sequence[tuple[str, str]] = ()
    """(what it does, the exact command line)."""
    pickers: Sequence[AttentionPicker] = ()
    pictures: Sequence[ThemedFigure] = ()
    parts: Sequence[Section] = ()
    """Sections within this one."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """File name -> the JSON behind this section, offered as a download."""
    verdict: str = ""
    """The section's answer in one sentence, under its title."""
    folded: bool = False
    """Whether only the title is to be seen until a reader opens it."""

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        own = (self.paragraphs, self.points, self.tables, self.code, self.pickers, self.pictures, self.data)
        return not any(own) and all(part.empty for part in self.parts)


@dataclass(frozen=True)
class RunCard:
    """One run on the page."""

    name: str
    label: str
    """By which curves and bars show it."""
    settings: Mapping[str, Any]
    """Every setting, by a dotted name ("network.attention"); the page sets apart those that differ between runs."""


@dataclass(frozen=True)
class PageData:
    """All that a page shows. A part that is empty is left out."""

    title: str
    summary: Sequence[str]
    """The verdict, and what else the first screen says in sentences."""
    sections: Sequence[Section] = ()
    """In this order; the settings, commands and environment follow."""
    runs: Sequence[RunCard] = ()
    labels: Sequence[str] = ()
    """The kinds of models in the order of their colours (as `theme.assign`); those of `runs` where empty."""
    tables: Sequence[Table] = ()
    """On the first screen."""
    pictures: Sequence[ThemedFigure] = ()
    """On the first screen: the figure that answers the question, then what stands under the table."""
    notes: Sequence[str] = ()
    """Small print of the first screen."""
    commands: Sequence[tuple[str, str]] = ()
    """(what it does, the exact command line)."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Versions and machine."""
    downloads: Mapping[str, Any] = field(default_factory=dict)
    """File name -> JSON that stands behind the whole page; what stands behind a section is in its `data`."""


def build_page(data: PageData) -> str:
    """The page as HTML.

    Raises:
        DitlabError: there is nothing to show, two sections have one id, or a file is not JSON.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    sections = _page_sections(data)
    if not data.summary and not sections:
        raise DitlabError("report: expected at least one sentence or one run to show, found neither")
    ids = Counter(part.id for section in sections for part in _all_parts(section))
    for name, count in ids.items():
        if count > 1 or not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", name):
            raise DitlabError(f"report: expected one section with a plain id, found {count} with the id '{name}'")
    pages = Environment(
        loader=PackageLoader("ditlab.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {"base64": _base64, "words": _words, "cell": _cell, "file": _file, "inline_json": _inline_json}
    assert pages.loader is not None
    script = pages.loader.get_source(pages, "page.js")[0].strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return pages.get_template("report.html.j2").render(
        page=data,
        sections=sections,
        slots=assign(data.labels or [run.label for run in data.runs]),
        light=LIGHT,
        dark=DARK,
        script=_safe(script),
        digest=digest,
        version=ditlab.__version__,
    )


def save_page(data: PageData, path: Path | str) -> Path:
    """Writes the page, whole or not at all, and returns its path; what would be too large is made smaller (`fit_page`).

    Raises:
        DitlabError: as `build_page`; the page is too large even so.
    """
    data = fit_page(data)
    html = build_page(data)
    if (size := len(html.encode())) > PAGE_BYTES:
        raise DitlabError(
            f"report {path}: expected a page of at most {PAGE_BYTES:,} bytes, found {size:,} with its figures as small "
            "as they can be; show fewer runs"
        )
    return write_text(Path(path), html)


def page_size(data: PageData) -> int:
    """Bytes of the page; raises as `build_page`."""
    return len(build_page(data).encode())


def fit_page(data: PageData, spare: int = 0) -> PageData:
    """Returns the page, reduced to stay below `PAGE_BYTES` if that is possible.

    In this order, as far as needed: the data files of sections are left out, then those of the whole page (a note
    says so); figures, the largest first, get 256 colours, then one theme, then half and a quarter of their resolution.

    `spare` bytes are kept free for what is still to come. Raises as `build_page`.
    """
    limit = PAGE_BYTES - spare
    if page_size(data) <= limit:
        return data
    data = replace(data, sections=[_each(section, _without_files) for section in data.sections])
    if data.downloads and page_size(data) > limit:
        data = replace(data, sections=[*data.sections, Section("files", "Results as files", [_NOT_HERE])], downloads={})
    excess = page_size(data) - limit
    pictures = {id(p): p for section in data.sections for part in _all_parts(section) for p in part.pictures}
    pictures |= {id(p): p for p in data.pictures}
    for smaller in (_few_colours, _one_theme, *(partial(_shrink, by=by) for by in range(2, _SMALLEST + 1, 2))):
        for key in sorted(pictures, key=lambda key: -pictures[key].size):
            if excess > 0:
                made = smaller(pictures[key])
                excess -= pictures[key].size - made.size
                pictures[key] = made

    def changed(of: Any) -> Any:
        return replace(of, pictures=[pictures[id(picture)] for picture in of.pictures])

    return replace(changed(data), sections=[_each(section, changed) for section in data.sections])


def with_pickers(section: Section, made: Section) -> Section:
    """Returns a section as it is on the page, with the pickers and words of `made`: the same, made again with room."""
    parts = {part.id: part for part in made.parts}
    return replace(
        section,
        verdict=made.verdict,
        paragraphs=made.paragraphs,
        pickers=made.pickers,
        notes=list(dict.fromkeys([*made.notes, *section.notes])),
        parts=[with_pickers(part, parts.get(part.id, part)) for part in section.parts],
    )


def _each(section: Section, change: Callable[[Section], Section]) -> Section:
    """The section and all of its parts, changed."""
    return replace(change(section), parts=[_each(part, change) for part in section.parts])


def _without_files(section: Section) -> Section:
    return replace(section, data={}, notes=[*section.notes, _NOT_HERE] if section.data else section.notes)


def _few_colours(picture: ThemedFigure) -> ThemedFigure:
    return replace(picture, light=_smaller(picture.light, 0), dark=_smaller(picture.dark, 0))


def _one_theme(picture: ThemedFigure) -> ThemedFigure:
    return replace(picture, dark=picture.light)


def _shrink(picture: ThemedFigure, by: int) -> ThemedFigure:
    """With one pixel in `by` times `by` of the drawing."""
    from PIL import Image

    if picture.shrunk >= by:
        return picture

    def shrunk(content: bytes) -> bytes:
        buffer = io.BytesIO()
        with Image.open(io.BytesIO(content)) as image:
            image.convert("RGB").reduce(by // picture.shrunk).save(buffer, format="PNG", optimize=True)
        return _smaller(buffer.getvalue(), 0)

    light = shrunk(picture.light)
    dark = light if picture.dark == picture.light else shrunk(picture.dark)
    return replace(picture, light=light, dark=dark, shrunk=by)


def _page_sections(data: PageData) -> list[Section]:
    """All sections of a page in order: its own, settings, commands, environment, files; none of them empty."""
    sections = [
        *data.sections,
        _settings_section(data.runs),
        Section("commands", "Commands", code=data.commands),
        Section("environment", "Environment", tables=_two_columns(data.environment, "Versions and machine")),
        Section("files", "Results as files", data=data.downloads),
    ]
    return [_without_empty(section) for section in sections if not section.empty]


def _without_empty(section: Section) -> Section:
    return replace(section, parts=[_without_empty(part) for part in section.parts if not part.empty])


def _all_parts(section: Section) -> Iterator[Section]:
    yield section
    for part in section.parts:
        yield from _all_parts(part)


def _two_columns(values: Mapping[str, Any], folded: str = "") -> list[Table]:
    rows = [(f"`{name}`", _value(value)) for name, value in values.items()]
    return [Table(("name", "value"), rows, folded=folded)] if rows else []


def _settings_section(runs: Sequence[RunCard]) -> Section:
    """What differs between the runs in a table, and folded away what they share."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {name: [run.settings.get(name, "") for run in runs] for name in names}
    shared = {name: of[0] for name, of in values.items() if all(value == of[0] for value in of)}
    differing = [name for name in names if name not in shared]
    folded = f"All settings ({len(shared)})" if len(runs) == 1 else f"Settings that all runs share ({len(shared)})"
    tables, words = _two_columns(shared, folded), []
    if differing:
        rows = [(run.name, run.label, *(_value(values[name][i]) for name in differing)) for i, run in enumerate(runs)]
        columns = ("run", "kind", *(f"`{name}`" for name in differing))
        tables = [Table(columns, rows, "What differs between the runs"), *tables]
    elif len(runs) > 1:
        words = [f"No setting differs between the runs: {', '.join(run.name for run in runs)}."]
    return Section("settings", "Settings", words, tables=tables)


def _smaller(content: bytes, large: int = 30_000) -> bytes:
    """A large PNG with 256 colours; others as they are."""
    from PIL import Image

    if len(content) < large:
        return content
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(content)) as image:
        few = image.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        few.save(buffer, format="PNG", optimize=True)
    return min(content, buffer.getvalue(), key=len)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _safe(html: str) -> Markup:
    from markupsafe import Markup

    return Markup(html)


def _words(text: str) -> Markup:
    """Text as HTML, `words in backticks` as code."""
    from markupsafe import escape

    return _safe(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _cell(text: str) -> Markup:
    """A cell of a table as HTML; its second line is small."""
    first, _, rest = text.partition("\n")
    return _words(first) + _safe("<br><small>") + _words(rest) + _safe("</small>") if rest else _words(first)


def _file(record: Any, name: str) -> bytes:
    """A result as the bytes of a JSON file."""
    try:
        return json.dumps(record, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise DitlabError(f"report: the download '{name}' is not JSON ({error})") from error


def _inline_json(record: Any) -> Markup:
    """JSON for a script element that the browser does not run; nothing in it can end the element."""
    return _safe(json.dumps(record, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))


def _is_number(cell: Any) -> bool:
    if isinstance(cell, str):
        return bool(_NUMBER.match(cell)) or cell == "–"
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def _value(value: Any, digits: int | None = None) -> str:
    """A value as a reader would write it; floats with this many decimals, or as short as they are."""
    if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:g}" if digits is None else f"{value:,.{digits}f}"
    if isinstance(value, list | tuple):
        return ", ".join(_value(v) for v in value)
    return str(value)
