"""`ditlab psnr-gap`: train and test PSNR by noise level, and the gap."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from ditlab.analyses.psnr_gap.comparison import PSNRComparison, compare
from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.analyses.psnr_gap.result import PSNRResult
from ditlab.cli.common import use_threads
from ditlab.cli.measuring import chosen_labels, measure_references, measure_run, open_runs
from ditlab.files import write_json
from ditlab.models.opening import ExternalConfig
from ditlab.training.distributed import pick_device


@dataclass(frozen=True)
class PSNRGap:
    """Measure how much better denoisers are on their training images than on held-out ones (An et al., Eqs. 2-4).

    Writes psnr-gap.json, .csv and .npz into each run's analysis folder, and figures of all runs together into --out.
    Runs that differ only in seed are averaged; runs that were held back different test images are refused.
    """

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Runs' folders, or other models: a converted model's folder, a published checkpoint, diffusers:PATH_OR_ID,
    hub:ID."""
    labels: tuple[str, ...] = ()
    """Names of the kinds of runs, one a run, in their order; found from the settings that differ where not given."""
    settings: Annotated[PSNRConfig, tyro.conf.arg(name="")] = field(default_factory=PSNRConfig)
    """How the gap is measured."""
    references: bool = True
    """Also measure the empirical-Bayes and Wiener denoisers of the training images."""
    step: int | None = None
    """The checkpoint; the newest of each run where not given."""
    raw: bool = False
    """Measure the raw weights instead of the averaged ones."""
    out: Path | None = None
    """Where figures and the comparison go; the first run's analysis folder where not given. Also where the results of
    models that are not runs go, each under its name; foreign/ in the current folder where not given."""
    data: str | None = None
    """Where the image set lies now, if it was moved. For a model that is not a run: the set, or the source of one, to
    look at it with."""
    foreign: Annotated[ExternalConfig, tyro.conf.arg(name="")] = field(default_factory=ExternalConfig)
    """Which of its images stand for the training images of such a model."""
    device: str | None = None
    """cpu, cuda or cuda:N; CUDA where there is one."""
    threads: int | None = None
    """CPU threads; all cores where not given."""

    def run(self, console: Console) -> dict[str, Any]:
        """Measures, writes, and prints a table."""
        use_threads(self.threads)
        device = pick_device(self.device)
        runs = open_runs(self.runs, self.data, console, config=self.foreign, results=self.out)
        labels = chosen_labels("psnr-gap", self.labels, runs)
        results = [
            measure_run(run, self.settings, console, label=label, step=self.step, ema=not self.raw, device=device)
            for run, label in zip(runs, labels, strict=True)
        ]
        comparison = compare(results)
        references: list[PSNRResult] = []
        if self.references:
            for n in comparison.counts:
                first = next(run for run in runs if run.split_record.train == n)
                references += measure_references(first, self.settings, results[0].levels, console, device=device)
        for run, result in zip(runs, results, strict=True):
            result.save(run.path / "analysis")
        out = self.out if self.out is not None else runs[0].path / "analysis"
        files = save_comparison(out, comparison, references)
        console.print(_table(comparison, references))
        for result in results:
            for note in result.notes:
                console.print(f"note: {result.about.name}: {note}")
        console.print(f"wrote {', '.join(str(f) for f in files)}")
        return {**comparison.to_json(), "files": [str(f) for f in files]}


def save_comparison(out: Path, comparison: PSNRComparison, references: list[PSNRResult]) -> list[Path]:
    """Writes comparison.json and the figures; returns their paths."""
    from ditlab.analyses.psnr_gap.figures import gap_bars, psnr_curves
    from ditlab.pages.theme import save

    out.mkdir(parents=True, exist_ok=True)
    for reference in references:
        kind = reference.about.name.replace(" ", "-").lower()
        reference.save(out, f"{kind}-n{reference.about.n}")
    summary = write_json(out / "comparison.json", comparison.to_json())
    return [
        summary,
        save(psnr_curves(comparison, references), out / "psnr-curves.png"),
        save(gap_bars(comparison), out / "gap-bars.png"),
    ]


def _table(comparison: PSNRComparison, references: list[PSNRResult]) -> Table:
    table = Table(title=f"PSNR averaged over {len(comparison.groups[0].results[0].levels)} noise levels, dB")
    for name in ("denoiser", "N", "shuffles", "train", "test", "gap"):
        table.add_column(name, justify="left" if name == "denoiser" else "right")
    for group in comparison.groups:
        std = group.std()
        gap = f"{group.mean():.2f}" + ("" if std is None else f" ± {std:.2f}")
        row = [
            group.label,
            str(group.n),
            str(len(group.seeds)),
            f"{group.mean('train'):.2f}",
            f"{group.mean('test'):.2f}",
            gap,
        ]
        table.add_row(*row)
    for r in references:
        sign = ">= " if r.bounded else ""
        row = [r.about.name, str(r.about.n), "-", f"{sign}{r.average('train'):.2f}", f"{r.average('test'):.2f}"]
        table.add_row(*row, f"{sign}{r.average('gap'):.2f}", style="dim")
    return table
