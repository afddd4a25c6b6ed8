"""How figures look: two themes (light and dark), one colour a run, and a fixed line style for each reference curve.

Runs take the colours of Okabe and Ito's set that readers with a colour-vision deficiency tell apart, brightened for the
dark theme. References are greyer than runs, and are told apart by their dashes as well as by their colour.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditlab.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Dashes = tuple[int, tuple[float, ...]] | str
DPI = 160
RUN_DASHES: tuple[Dashes, ...] = ("solid", (0, (4.0, 1.4)), (0, (1.2, 1.2)), (0, (6.0, 1.2, 1.2, 1.2)))
"""Lines of runs whose colours are the same."""


@dataclass(frozen=True)
class Theme:
    """Colours of one theme, as hexadecimal strings."""

    name: str
    background: str
    ink: str
    """Text and axes."""
    muted: str
    """Secondary text and the input-noise line."""
    grid: str
    runs: tuple[str, ...]
    """Colours of runs, by slot."""
    references: tuple[str, ...]
    """Colours of reference denoisers, in order."""

    def run(self, slot: int) -> str:
        """The colour of a slot; beyond the last they repeat, see `dashes`."""
        return self.runs[slot % len(self.runs)]

    def dashes(self, slot: int) -> Dashes:
        """The line of a slot: solid, and others where colours repeat."""
        return RUN_DASHES[slot // len(self.runs) % len(RUN_DASHES)]


LIGHT = Theme(
    name="light",
    background="#ffffff",
    ink="#1f2328",
    muted="#6a727c",
    grid="#e4e7eb",
    runs=("#0072b2", "#d55e00", "#009e73", "#b8458b", "#a67c00", "#3d9bd1"),
    references=("#7d5fa3", "#6f7d3a", "#8a5a44"),
)
DARK = Theme(
    name="dark",
    background="#15181c",
    ink="#e6e8eb",
    muted="#9aa3ad",
    grid="#2b3037",
    runs=("#4fa9e6", "#ff8f4d", "#33c49b", "#e58cc0", "#d9b13b", "#9bd4f5"),
    references=("#b79be0", "#b3c26b", "#cf9a80"),
)

REFERENCE_DASHES: tuple[Dashes, ...] = ((0, (6, 1.5, 1.2, 1.5)), (0, (1.2, 1.2)), (0, (3, 1, 1, 1, 1, 1)))
"""Dashes of the reference denoisers' test curves, in order."""

Slots = Mapping[str, int]


def assign(labels: Iterable[str]) -> dict[str, int]:
    """A colour slot for each label, in order of first appearance. Give the same mapping to all figures of a report."""
    return {label: slot for slot, label in enumerate(dict.fromkeys(labels))}


def _settings(theme: Theme) -> dict[Any, Any]:
    return {
        "figure.facecolor": theme.background,
        "savefig.facecolor": theme.background,
        "axes.facecolor": theme.background,
        "axes.edgecolor": theme.muted,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 10,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "text.color": theme.ink,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "legend.handlelength": 2.6,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
        "font.size": 10,
        "font.family": "DejaVu Sans",  # comes with matplotlib, so figures look alike everywhere
    }


@contextmanager
def canvas(width: float, height: float, theme: Theme) -> Iterator[Figure]:
    """A figure of this size in inches, drawn without a display, with the theme's settings while inside."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_settings(theme)):
        yield Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def plain_log(axis: Axis, limits: tuple[float, float]) -> None:
    """Readable numbers on a logarithmic axis between these limits, which may be less than a decade apart."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = limits
    subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    if high / low < 4:
        subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
    axis.set_minor_formatter(NullFormatter())


def _plain(value: float) -> str:
    """0.02, 50, 20,000; from a million on and below a thousandth as a power of ten."""
    if 1e-3 <= value < 1e6:
        return f"{value:,.0f}" if value >= 1000 else f"{value:g}"
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    return rf"$10^{{{int(exponent)}}}$" if mantissa == "1" else rf"${mantissa}\cdot 10^{{{int(exponent)}}}$"


def legend_below(axes: Axes, handles: list[Any], *, title: str = "", columns: int = 1) -> None:
    """Draws a legend that fills an axes of its own, so that it never covers data."""
    axes.axis("off")
    legend = axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.0, 1.0),
        borderaxespad=0.0,
        ncols=columns,
        title=title or None,
        title_fontsize=9,
        alignment="left",
        columnspacing=1.6,
    )
    legend.get_title().set_fontweight("bold")


def png(figure: Figure) -> bytes:
    """The figure as PNG, the same bytes for the same figure (no date or version inside)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def save(figure: Figure, path: Path | str) -> Path:
    """Writes the figure as PNG, whole or not at all. Raises DitlabError where it cannot be written."""
    return write_bytes(Path(path), png(figure))


def wrapped(label: str, width: int) -> str:
    """A label in lines of at most `width` characters where that can be; "N = 10" is not parted, long words are parted
    behind underscores."""
    whole = label.replace(" = ", "\u00a0=\u00a0")
    whole = re.sub(rf"\S{{{width + 1},}}", lambda word: word[0].replace("_", "_ "), whole)
    return "\n".join(textwrap.wrap(whole, width)).replace("\u00a0", " ").replace("_ ", "_")
