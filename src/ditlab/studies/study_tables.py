"""Tables of a study's page, and what stands in their cells."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from ditlab.analyses.trajectory.comparison import MatchedComparison
from ditlab.analyses.trajectory.tables import matched_table
from ditlab.metrics.paired import PairedDifference
from ditlab.pages.page import Table
from ditlab.studies.results import Contrast

__all__ = ["csv_text", "differences_table", "interval_cells", "seed_table", "trial_mark"]


def differences_table(counts: Sequence[int], ways: Mapping[str, Sequence[Contrast]], caption: str) -> Table:
    """Returns differences by N, two columns for each way of comparing."""
    rows = []
    for place, n in enumerate(counts):
        intervals = [interval_cells(way[place].difference) for way in ways.values()]
        pairs = [(mean, f"{ends} ({seeds})" if seeds and seeds > 1 else ends) for mean, ends, seeds in intervals]
        rows.append((n, *(text for pair in pairs for text in pair)))
    heads = [head for what in ways for head in (f"{what}, dB", "95 % interval (seeds)")]
    return Table(("N", *heads), rows, caption)


def interval_cells(d: PairedDifference | None) -> tuple[str | None, str | None, int | None]:
    """Returns (mean, interval, seeds) of a difference, as texts and a count; None of each without one."""
    if d is None:
        return None, None, None
    if d.low is None or d.high is None:
        return _signed(d.mean), "one seed", 1
    return _signed(d.mean), f"{_signed(d.low)} to {_signed(d.high)}", len(d.seeds)


def _signed(value: float) -> str:
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text


def trial_mark(row: Mapping[str, Any]) -> str:
    """Returns what the table of the grid shows of a trial: its number, or how far it is."""
    value = row["gap"] if row["gap"] is not None else row["attention_distance"]
    return row["state"] if value is None else f"{value:.2f}" + ("" if row["state"] == "done" else f" ({row['state']})")


def seed_table(comparison: MatchedComparison) -> Table:
    """Returns the folded table of a comparison along training, seed by seed."""
    table = matched_table(comparison)
    between = f"{comparison.first} and {comparison.second}"
    return Table(table.columns, table.rows, table.caption, table.digits, f"Seed by seed: {between}")


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows as CSV, with a head."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]) if rows else ["hash"], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()
