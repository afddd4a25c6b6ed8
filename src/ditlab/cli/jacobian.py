"""`ditlab jacobian`: what a run's denoiser does to an image, direction by direction, as pictures and as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from ditlab.analyses.jacobian.comparison import (
    LEGEND,
    MATRIX,
    VECTORS,
    Column,
    JacobianComparison,
    compare_jacobians,
    same_noise,
)
from ditlab.analyses.jacobian.result import JacobianConfig
from ditlab.cli.common import use_threads
from ditlab.cli.jacobian_images import Shown, Side
from ditlab.cli.jacobian_points import Looked, pixels_of
from ditlab.cli.measuring import chosen_labels, open_runs
from ditlab.errors import DitlabError
from ditlab.files import write_json
from ditlab.models.model import Model
from ditlab.models.opening import ExternalConfig
from ditlab.provenance import check_groups
from ditlab.training.distributed import pick_device


@dataclass(frozen=True)
class Jacobian:
    """Take the Jacobians of denoisers at noisy images, and draw and measure their vectors (An et al., Figs. 1-3;
    Kadkhodaie et al.).

    Writes jacobian.json (the numbers, r_hom and r_lin among them) and .npz into each run's analysis folder, and figures
    of all runs together into --out. All runs of one seed get the same images and noise. What is there already of the
    same weights and settings is used again; a command that was broken off goes on at the image where it was.
    """

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Runs' folders, or other models: a converted model's folder, a published checkpoint, diffusers:PATH_OR_ID,
    hub:ID."""
    labels: tuple[str, ...] = ()
    """Names of the kinds of runs, one a run, in their order; found from the settings that differ where not given."""
    settings: Annotated[JacobianConfig, tyro.conf.arg(name="")] = field(default_factory=JacobianConfig)
    """Which Jacobians are taken, and how."""
    images_from: Side = "test"
    """Which images: held-out ones or training images."""
    pictures: tuple[Path, ...] = ()
    """Picture files to look at instead of images of the runs, cut to their size; all of them. Runs with classes are
    told none."""
    shuffled: bool = False
    """Shuffle the images' pixels, the same way for all runs: the control for vectors that follow an image's shapes."""
    right: bool = False
    """Also draw the right singular vectors, directions of the input (svd)."""
    step: int | None = None
    """The checkpoint; the newest of each run where not given. (--steps are noise levels.)"""
    raw: bool = False
    """Use the raw weights instead of the averaged ones."""
    out: Path | None = None
    """Where figures and the comparison go; the first run's analysis folder where not given. Also where the results of
    models that are not runs go, each under its name; foreign/ in the current folder where not given."""
    data: str | None = None
    """Where the image set lies now, if it was moved. For a model that is not a run: the set, or the source of one, to
    look at it with."""
    foreign: Annotated[ExternalConfig, tyro.conf.arg(name="")] = field(default_factory=ExternalConfig)
    """Which of its images stand for the training images of such a model."""
    codec: str | None = None
    """Where the autoencoder of runs on latents lies now, if it was moved."""
    device: str | None = None
    """cpu, cuda or cuda:N; CUDA where there is one."""
    threads: int | None = None
    """CPU threads; all cores where not given."""

    def run(self, console: Console) -> dict[str, Any]:
        """Measures, draws, writes, and prints a table."""
        use_threads(self.threads)
        if self.right and self.settings.decomposition != "svd":
            raise DitlabError(
                f"jacobian --right: expected the decomposition svd, found {self.settings.decomposition}, which has one "
                "kind of vectors"
            )
        device = pick_device(self.device)
        shown = Shown(self.images_from, self.pictures, self.shuffled)
        runs = open_runs(self.runs, self.data, console, config=self.foreign, results=self.out, codec=self.codec)
        labels = chosen_labels("jacobian", self.labels, runs)
        looked = [
            Looked.open(
                run,
                self.settings,
                console,
                shown=shown,
                label=label,
                step=self.step,
                ema=not self.raw,
                device=device,
            )
            for run, label in zip(runs, labels, strict=True)
        ]
        _check(looked)
        comparison = compare_jacobians([one.measure(console) for one in looked])
        out = self.out if self.out is not None else runs[0].path / "analysis"
        files = self._save(out, comparison, runs[0])
        if "trace" in comparison.measured:
            console.print(_table(comparison, comparison.title, MATRIX))
        console.print(_table(comparison, f"Its vectors ({self.settings.decomposition})", VECTORS))
        console.print(LEGEND, markup=False)
        for line in comparison.sentences():
            console.print(line, markup=False)
        for note in dict.fromkeys(f"{r.about.name}: {note}" for r in comparison.results for note in r.notes):
            console.print(f"note: {note}", markup=False)
        console.print(f"wrote {', '.join(str(f) for f in files)}", markup=False)
        return {**comparison.to_json(), "files": [str(f) for f in files]}

    def _save(self, out: Path, comparison: JacobianComparison, run: Model) -> list[Path]:
        """Writes the comparison and the figures; returns their paths."""
        from ditlab.analyses.jacobian.section import jacobian_drawings
        from ditlab.pages.theme import LIGHT, save

        out.mkdir(parents=True, exist_ok=True)
        drawings = jacobian_drawings(comparison, pixels_of(run), right=self.right)
        files = [write_json(out / "jacobian-comparison.json", comparison.to_json())]
        return [*files, *(save(draw(LIGHT), out / f"{name}.png") for name, (draw, _, _) in drawings.items())]


def _check(looked: Sequence[Looked]) -> None:
    """Everything that must hold of all runs together, before work starts."""
    check_groups([one.facts for one in looked], "jacobian")
    first = looked[0]
    for one in looked:
        if one.denoiser.shape != first.denoiser.shape:
            raise DitlabError(
                f"jacobian: expected runs with images of one size, found {list(first.denoiser.shape)} in "
                f"{first.run.path} and {list(one.denoiser.shape)} in {one.run.path}"
            )
        if not same_noise(one.levels, first.levels):
            raise DitlabError(
                f"jacobian: expected runs with the same noise levels, found others in {first.run.path} and "
                f"{one.run.path}; give --levels"
            )


def _table(comparison: JacobianComparison, title: str, columns: Sequence[Column]) -> Table:
    headings, rows = comparison.table(columns)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for place, heading in enumerate(headings):
        # No number is cut off in a narrow console, for none of the vectors is to stand without r_hom and r_lin.
        least = max(len(heading), *(len(row[place]) for row in rows))
        table.add_column(heading, justify="right" if place else "left", no_wrap=True, min_width=least)
    for row in rows:
        table.add_row(*row)
    return table
