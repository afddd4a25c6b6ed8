"""`ditlab quickstart`: the main job on real photographs, from nothing to a page, in ten minutes on two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from ditlab.cli.console import Output, command_line
from ditlab.cli.jobs_display import jobs_display
from ditlab.cli.options import keywords
from ditlab.studies.quickstart_config import QuickstartConfig

Settings = Annotated[QuickstartConfig, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Quickstart:
    """Train a DiT with global and one with local attention on the same N photograph crops, and compare them.

    report.html shows samples, train and test PSNR by noise level, and the gap along training and at matched train PSNR.
    If it is interrupted or killed, the same command resumes.
    """

    out: Path = Path("quickstart")
    """The folder of the image set, the runs and the report."""
    settings: Settings = field(default_factory=QuickstartConfig)
    """What is trained, on what."""
    device: str | None = None
    """cpu, cuda or cuda:N; CUDA if there is one."""

    def run(self, output: Output) -> dict[str, Any]:
        """Prepares the crops, trains, measures, and writes the report."""
        from ditlab import api

        with jobs_display(output) as show:
            how = {"command": command_line("quickstart"), "show": show, "reporter": output.reporter}
            result = api.quickstart(self.out, device=self.device, **keywords(self.settings), **how)
        for sentence in result.report.sentences:
            output.line(f"  {sentence}")
        output.line(f"\nDone in {result.seconds / 60:.1f} minutes. The result: {result.report.path.resolve()}")
        page = result.report.path
        return {
            "report": str(page),
            "figures": str(page.parent / "figures"),
            "runs": [str(run) for run in result.runs],
            "sentences": list(result.report.sentences),
            "seconds": round(result.seconds, 1),
            "training_seconds": round(result.training_seconds, 1),
        }
