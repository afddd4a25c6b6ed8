"""`ditlab report` and `ditlab study report`: one HTML page about one or several models, or about a study."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from ditlab.cli.console import Output, command_line
from ditlab.cli.options import ComputeFlags, ComputeOptions, ModelFlags, ModelOptions, Models, keywords


@dataclass(frozen=True)
class Report:
    """Write one self-contained HTML page about models.

    The first screen has the answer: a sentence, a table with train and test PSNR, their gap and the share of copies,
    and a figure. A section for each analysis follows.

    What `ditlab psnr-gap` and the other analyses have already measured of the newest averaged weights is used; PSNR and
    attention are measured if they are missing. Other analyses are shown where they were measured.
    """

    models: Models
    out: Path | None = None
    """The page; report.html in the first model's folder if not given. Its figures go into figures/ beside it."""
    title: str | None = None
    """The page's title; the model's name, or the names of the kinds, if not given."""
    samples: int = 16
    """Images to draw of each kind of model at each N, at most 64; 0 for none."""
    hide_training_images: bool = False
    """Leave out pictures of all real images, training and held-out ones (for sets whose terms forbid passing them on).
    Attention is then shown on a sample, and samples stand alone with their distance to the nearest training image."""
    jacobian: bool = False
    """Also take the Jacobian, at one held-out image, of models that have none: about a minute of a core for 3x32x32
    pixels and a small network, many for a large one. (`ditlab jacobian` has the settings.)"""
    model: ModelOptions = field(default_factory=ModelFlags)
    compute: ComputeOptions = field(default_factory=ComputeFlags)

    def run(self, output: Output) -> dict[str, Any]:
        """Measures what is missing and writes the page."""
        from ditlab import api

        commands = [("this page", command_line("report"))]
        result = api.report(**keywords(self), commands=commands, reporter=output.reporter)
        output.line(result.sentences[0])
        output.wrote([result.path])
        return {"report": str(result.path), "sentences": list(result.sentences)}


@dataclass(frozen=True)
class StudyReport:
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
