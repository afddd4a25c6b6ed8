"""`ditlab agreement`: does a run draw what closed-form denoisers of its training images draw from the same noise?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from ditlab.analyses.agreement.measure import check_agreement, measure_agreement
from ditlab.analyses.agreement.result import AgreementConfig, AgreementResult
from ditlab.cli.common import counting, noting, use_threads
from ditlab.cli.left import agreement_pictures
from ditlab.cli.measuring import open_runs
from ditlab.models.model import Model
from ditlab.models.opening import ExternalConfig
from ditlab.training.distributed import pick_device


@dataclass(frozen=True)
class Agreement:
    """Compare what a run draws with what closed-form denoisers of its training images draw from the same noise.

    Writes agreement.json and .npz into the run's analysis folder and figures beside them, or into --out. Windows of ls,
    els and bbels are calibrated by noise level, which takes most of the time; --window sets one for all levels.
    """

    reference: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder, or another model that ditlab can open."""
    settings: Annotated[AgreementConfig, tyro.conf.arg(name="")] = field(default_factory=AgreementConfig)
    """What is compared."""
    step: int | None = None
    """The checkpoint; the newest where not given."""
    raw: bool = False
    """Use the raw weights instead of the averaged ones."""
    out: Path | None = None
    """Where the figures go; the run's analysis folder where not given. Also where the results of a model that is not a
    run go, under its name; foreign/ in the current folder where not given."""
    data: str | None = None
    """Where the image set lies now, if it was moved. For a model that is not a run: the set, or the source of one, to
    look at it with."""
    foreign: Annotated[ExternalConfig, tyro.conf.arg(name="")] = field(default_factory=ExternalConfig)
    """Which of its images stand for the training images of such a model."""
    codec: str | None = None
    """Where the autoencoder of a run on latents lies now, if it was moved."""
    hide_training_images: bool = False
    """Leave out the pictures of empirical Bayes and Wiener locality, which are training images or nearly so, and those
    of the others that are nearly one."""
    device: str | None = None
    """cpu, cuda or cuda:N; CUDA where there is one."""
    threads: int | None = None
    """CPU threads; all cores where not given."""

    def run(self, console: Console) -> dict[str, Any]:
        """Measures, draws, writes, and prints a table."""
        use_threads(self.threads)
        device = pick_device(self.device)
        [run] = open_runs([self.reference], self.data, console, config=self.foreign, results=self.out, codec=self.codec)
        denoiser, facts = run.denoiser_and_provenance(
            step=self.step, ema=not self.raw, device=device, say=noting(console)
        )
        check_agreement(denoiser, self.settings)
        count = self.settings.training_images or run.split_record.train
        images, twins = run.pictures("train", count)[0], run.mirrored_twins(count)
        with counting(console, f"agreement of {facts.name}") as progress:
            result = measure_agreement(denoiser, images, self.settings, about=facts, mirrored=twins, progress=progress)
        files = [result.save(run.path / "analysis"), *self._draw(run, result)]
        console.print(_table(result))
        console.print(
            "correlation: cosine about the images' means; other noise: of the run's image with the reference's images "
            "of other seeds; R²: 1 - |x - y|² / (n Var y), y the run's image"
        )
        for line in result.sentences():
            console.print(line, markup=False)
        for note in result.notes:
            console.print(f"note: {note}", markup=False)
        console.print(f"wrote {', '.join(str(f) for f in files)}", markup=False)
        return {**result.to_json(), "files": [str(f) for f in files]}

    def _draw(self, run: Model, result: AgreementResult) -> list[Path]:
        from ditlab.analyses.agreement.figures import agreement_curves, agreement_images
        from ditlab.pages.theme import save

        out = self.out if self.out is not None else run.path / "analysis"
        pictures = agreement_pictures(run, result, hide_training_images=self.hide_training_images)
        return [
            save(agreement_images(result, pictures), out / "agreement-images.png"),
            save(agreement_curves(result), out / "agreement.png"),
        ]


def _table(result: AgreementResult) -> Table:
    count = result.config.images
    table = Table(title=f"Agreement of {result.about.name}, medians over {count} image{'s' if count > 1 else ''}")
    for name in ("reference", "correlation", "other noise", "R²", "MSE", "one step", "windows"):
        table.add_column(name, justify="left" if name == "reference" else "right")
    for one in result.references:
        sizes = [] if one.windows is None else sorted(set(one.windows.sizes))
        table.add_row(
            one.word,
            f"{np.median(one.correlation):.3f}",
            f"{np.median(one.control):.3f}" if count > 1 else "-",
            f"{np.median(one.r2):.3f}",
            f"{np.median(one.mse):.4f}",
            f"{np.median(one.one_step):.3f}",
            "-" if not sizes else f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}",
        )
    return table
