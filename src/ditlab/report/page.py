"""The report page: one HTML file with its style, pictures and result files inside, which opens anywhere.

It asks nothing of the network (its content-security policy forbids it), follows the reader's light or dark setting, and
can be read on a phone. `build_page` only lays out what it is given.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ditlab
from ditlab.analysis.comparison import PSNRComparison
from ditlab.analysis.matched import MatchedComparison
from ditlab.analysis.store import write_text
from ditlab.errors import DitlabError
from ditlab.report.style import DARK, DPI, LIGHT, Theme, assign, png

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A figure for both themes, with what it shows in words."""

    light: bytes
    """PNG."""
    dark: bytes
    """PNG; the same as `light` where it needs no other."""
    alt: str
    """What is to be seen, for a reader who does not see it."""
    caption: str

    @property
    def width(self) -> int:
        """Width on the page in CSS pixels, so that text has the same size in all figures."""
        # The width in pixels stands in bytes 16 to 19 of every PNG.
        return round(int.from_bytes(self.light[16:20], "big") / DPI * 108)

    @classmethod
    def draw(cls, drawing: Callable[[Theme], Figure], alt: str, caption: str) -> Picture:
        """Draws a figure in both themes.

        Example:
            >>> picture = Picture.draw(lambda theme: gap_bars(comparison, theme=theme), "Bars of ...", "The gap ...")
        """
        return cls(png(drawing(LIGHT)), png(drawing(DARK)), alt, caption)


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
    """All that a report shows. A part that is empty leaves its section out."""

    title: str
    summary: Sequence[str]
    """Sentences with the numbers, the most important first."""
    runs: Sequence[RunCard]
    comparison: PSNRComparison | None = None
    """For the table of numbers and the sentences of differences."""
    matched: Sequence[MatchedComparison] = ()
    samples: Sequence[Picture] = ()
    curves: Sequence[Picture] = ()
    bars: Sequence[Picture] = ()
    along_training: Sequence[Picture] = ()
    """The gap against steps, and the losses."""
    matched_pictures: Sequence[Picture] = ()
    notes: Sequence[str] = ()
    """What a reader must know about how it was measured (`PSNRResult.notes`)."""
    commands: Sequence[tuple[str, str]] = ()
    """(what it does, the exact command line)."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Versions and machine."""
    downloads: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """File name -> the JSON that it holds."""
    made: str = ""
    """When, in words; left out where empty, so that the same data make the same page."""


def build_page(data: PageData) -> str:
    """The page as HTML.

    Raises:
        DitlabError: there is neither a summary nor a run, or a download is not JSON.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    if not data.summary and not data.runs:
        raise DitlabError("report: expected at least one sentence or one run to show, found neither")
    pages = Environment(
        loader=PackageLoader("ditlab.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {"base64": _base64, "value": _value}
    differing, shared = _settings(data.runs)
    labels = data.comparison.labels if data.comparison else [run.label for run in data.runs]
    return pages.get_template("report.html.j2").render(
        page=data,
        differing=differing,
        shared=shared,
        slots=assign(labels),
        light=LIGHT,
        dark=DARK,
        downloads={name: _download(name, record) for name, record in data.downloads.items()},
        version=ditlab.__version__,
    )


def save_page(data: PageData, path: Path | str) -> Path:
    """Writes the page, whole or not at all, and returns its path."""
    return write_text(Path(path), build_page(data))


def _settings(runs: Sequence[RunCard]) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    """(name -> its value in each run) for settings that differ, (name -> value) for those that do not."""
    differing, shared = {}, {}
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        values = [run.settings.get(name, "") for run in runs]
        if all(value == values[0] for value in values):
            shared[name] = values[0]
        else:
            differing[name] = values
    return differing, shared


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _download(name: str, record: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(record, indent=1, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise DitlabError(f"report: the download '{name}' is not JSON ({error})") from error


def _value(value: Any) -> str:
    """A setting as a reader would write it."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ", ".join(_value(v) for v in value)
    return str(value)
