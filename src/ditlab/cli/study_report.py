"""`ditlab study report`: the page of a study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from ditlab.cli.console import Output
from ditlab.cli.options import keywords


@dataclass(frozen=True)
class Report:
    """Write the page of a study from what is on record of its trials; nothing is trained or measured.

    It needs plan.json and cells/ alone. Attention maps and token pickers are made if the run folders exist. Several
    scales are on one page, in the first one's folder.
    """

    study: tyro.conf.Positional[str]
    """Its name, e.g. an2024/fig6."""
    scale: tuple[str, ...] = ("small",)
    """smoke, small, paper; one or several."""
    out: Path = Path("studies")
    """The folder of trials, runs and pages."""
    hide_training_images: bool = False
    """Show no real image beside attention maps (for sets whose terms forbid publishing them)."""

    def run(self, output: Output) -> dict[str, Any]:
        """Writes report.html, table.csv, table.json and figures."""
        from ditlab.studies import study_report

        flags = keywords(self)
        page = study_report(flags.pop("study"), flags.pop("scale"), **flags, reporter=output.reporter)
        for sentence in page.sentences:
            output.line(f"  {sentence}")
        output.wrote([page.path])
        return {"report": str(page.path), "sentences": list(page.sentences)}
