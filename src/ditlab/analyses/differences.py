"""Differences between kinds of models as a table of a page."""

from __future__ import annotations

from collections.abc import Sequence

from ditlab.metrics.paired import PairedDifference
from ditlab.pages.page import Table

__all__ = ["differences_table"]


def differences_table(
    rows: Sequence[tuple[str, int | None, PairedDifference]], caption: str = "", unit: str = "dB"
) -> Table:
    """Returns a row for each (quantity, N, difference): its interval over paired seeds, and what that allows to say."""
    cells = []
    for what, n, d in rows:
        digits = 2 if max(abs(d.mean), abs(d.low or 0), abs(d.high or 0)) >= 0.1 else 4
        interval = None if d.low is None else f"{d.low:+.{digits}f} to {d.high:+.{digits}f}"
        between = f"{d.second} minus {d.first}"
        cells.append((what, n, between, f"{d.mean:+.{digits}f}", interval, len(d.seeds), d.verdict(unit)))
    columns = ("quantity", "N", "between", f"difference, {unit}", "95 % interval", "seeds", "result")
    return Table(columns, cells, caption)
