"""`ditlab report`: one HTML page about one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from ditlab.analysis.comparison import compare
from ditlab.analysis.psnr import PSNRConfig, PSNRResult
from ditlab.cli.common import use_threads
from ditlab.cli.measuring import measure_references, measure_run, open_runs, run_labels
from ditlab.cli.reporting import Material, figures, save_figures, save_report
from ditlab.cli.sample import draw, sampler_config
from ditlab.errors import DitlabError
from ditlab.run import Run
from ditlab.training.distributed import pick_device


@dataclass(frozen=True)
class Report:
    """Write one self-contained HTML page about runs: settings, samples, PSNR curves, gap bars, gap along training.

    PSNR gaps that `ditlab psnr-gap` has already measured for the newest checkpoint are used; others are measured now.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of one or several runs."""
    out: Path | None = None
    """The page; report.html in the first run's folder where not given. Its figures go into figures/ beside it."""
    title: str = "Train and test PSNR"
    """The page's title."""
    labels: tuple[str, ...] = ()
    """Names of the kinds of runs, one a run; found from the settings that differ where not given."""
    samples: int = 16
    """Images to draw from each kind of run; 0 for none."""
    hide_training_images: bool = False
    """Leave out pictures of training images (for sets whose terms forbid passing them on)."""
    data: Path | None = None
    """Where the image set lies now, if it was moved."""
    device: str | None = None
    """cpu, cuda or cuda:N; CUDA where there is one."""
    threads: int | None = None
    """CPU threads; all cores where not given."""

    def run(self, console: Console) -> dict[str, Any]:
        """Measures what is missing and writes the page."""
        use_threads(self.threads)
        if self.samples < 0:
            raise DitlabError(f"report --samples: must not be negative, found {self.samples}")
        runs = open_runs(self.runs, self.data)
        if self.labels and len(self.labels) != len(runs):
            raise DitlabError(f"report --labels: expected {len(runs)} labels, one a run, found {len(self.labels)}")
        labels = list(self.labels) or run_labels(runs)
        out = self.out if self.out is not None else runs[0].path / "report.html"
        sentences = write_report(
            runs,
            labels,
            out,
            console,
            title=self.title,
            samples=self.samples,
            hide_training_images=self.hide_training_images,
            device=str(pick_device(self.device)),
        )
        console.print(f"wrote {out}")
        return {"report": str(out), "sentences": sentences}


def write_report(
    runs: Sequence[Run],
    labels: Sequence[str],
    out: Path,
    console: Console,
    *,
    title: str,
    foreword: Sequence[str] = (),
    samples: int = 16,
    hide_training_images: bool = False,
    device: str = "cpu",
    settings: PSNRConfig | None = None,
    commands: Sequence[tuple[str, str]] = (),
) -> list[str]:
    """Measures what is missing, draws, and writes the page with its figures beside it; returns its sentences."""
    settings = settings or PSNRConfig()
    results = [_result(run, label, settings, console, device) for run, label in zip(runs, labels, strict=True)]
    comparison = compare(results)
    references: list[PSNRResult] = []
    for n in comparison.counts:
        first = next(run for run in runs if run.record.split.train == n)
        references += measure_references(first, settings, results[0].levels, console, device=device)
    drawn: dict[str, np.ndarray] = {}
    if samples:
        for run, label in zip(runs, labels, strict=True):
            if label not in drawn:
                denoiser = run.denoiser(device=device)
                config = sampler_config(run)
                drawn[label] = draw(denoiser, config, samples, seed=0)
    told = [(f"train {run.name}", run.record.command) for run in runs]
    material = Material(runs, labels, comparison, references, drawn, [*commands, *told], hide_training_images)
    save_figures(figures(material, material.matched()), out.parent / "figures")
    return save_report(material, out, title=title, foreword=foreword)


def _result(run: Run, label: str, settings: PSNRConfig, console: Console, device: str) -> PSNRResult:
    """The saved result of the newest checkpoint if it was measured with these settings, else a new one, saved."""
    from dataclasses import replace

    saved = run.path / "analysis" / "psnr-gap.json"
    steps = run.checkpoints.steps()
    if saved.is_file():
        found = PSNRResult.load(saved)
        about = found.about
        fresh = bool(steps) and about.step == steps[-1] and about.split_hash == run.record.split.hash and about.ema
        if fresh and replace(found.config, batch_size=1) == replace(settings, batch_size=1):
            return replace(found, about=replace(about, label=label))
    made = measure_run(run, settings, console, label=label, device=device)
    made.save(run.path / "analysis")
    return made
