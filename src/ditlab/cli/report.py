"""`ditlab report`: one HTML page about one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from ditlab.analyses.attention.maps import AttentionConfig
from ditlab.analyses.psnr_gap.comparison import compare
from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.analyses.psnr_gap.result import PSNRResult
from ditlab.cli.common import command_line, counting, use_threads
from ditlab.cli.drawing import draw, guided_as, sampler_config
from ditlab.cli.jacobian_points import directions
from ditlab.cli.left import left_behind
from ditlab.cli.looking import keep, look_at, recall
from ditlab.cli.measuring import chosen_labels, measure_references, measure_run, open_runs
from ditlab.cli.reporting import Drawn, Material, draw_all, figures, run_names, save_figures, save_report
from ditlab.errors import DitlabError
from ditlab.models.model import Model
from ditlab.models.opening import ExternalConfig
from ditlab.training.distributed import pick_device

KINDS = 12
"""At most so many kinds of runs are sampled."""
SAMPLES = 64
"""At most so many samples of each, so that the page stays small."""


@dataclass(frozen=True)
class Report:
    """Write one self-contained HTML page about runs: settings, samples and their nearest training images, PSNR curves,
    gap bars, gap along training, attention maps with a token picker, locality of attention, Jacobians.

    What `ditlab psnr-gap` and `ditlab attention` have already measured for the newest checkpoint is used; the rest is
    measured now. Jacobians are shown where `ditlab jacobian` has left any; they are measured with --jacobian only.
    """

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Runs' folders, or other models: a converted model's folder, a published checkpoint, diffusers:PATH_OR_ID,
    hub:ID."""
    out: Path | None = None
    """The page; report.html in the first run's folder where not given. Its figures go into figures/ beside it."""
    title: str = "Train and test PSNR"
    """The page's title."""
    labels: tuple[str, ...] = ()
    """Names of the kinds of runs, one a run; found from the settings that differ where not given."""
    samples: int = 16
    """Images to draw from each kind of run at each N, at most 64; 0 for none."""
    hide_training_images: bool = False
    """Leave out pictures of all real images, training and held-out ones (for sets whose terms forbid passing them on).
    Attention is then shown on a sample, and samples stand alone with their distance to the nearest training image."""
    jacobian: bool = False
    """Also take the Jacobian, at one held-out image, of runs that have none: about a minute of a core for 3x32x32
    pixels and a small network, many for a large one. (`ditlab jacobian` has the settings.)"""
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
        """Measures what is missing and writes the page."""
        use_threads(self.threads)
        if self.samples < 0:
            raise DitlabError(f"report --samples: must not be negative, found {self.samples}")
        if self.samples > SAMPLES:
            raise DitlabError(
                f"report --samples: expected at most {SAMPLES}, found {self.samples}; `ditlab sample` draws more"
            )
        runs = open_runs(
            self.runs,
            self.data,
            console,
            config=self.foreign,
            results=None if self.out is None else self.out.parent,
            codec=self.codec,
        )
        labels = chosen_labels("report", self.labels, runs)
        out = self.out if self.out is not None else runs[0].path / "report.html"
        sentences = write_report(
            runs,
            labels,
            out,
            console,
            title=self.title,
            foreword=[f"{run.name}: {note}" for run in runs for note in run.notes],
            samples=self.samples,
            hide_training_images=self.hide_training_images,
            jacobian=self.jacobian,
            device=str(pick_device(self.device)),
            commands=[("this page", command_line("report"))],
        )
        console.print(f"wrote {out}")
        return {"report": str(out), "sentences": sentences}


def write_report(
    runs: Sequence[Model],
    labels: Sequence[str],
    out: Path,
    console: Console,
    *,
    title: str,
    foreword: Sequence[str] = (),
    samples: int = 16,
    hide_training_images: bool = False,
    jacobian: bool = False,
    device: str = "cpu",
    settings: PSNRConfig | None = None,
    attention: AttentionConfig | None = None,
    commands: Sequence[tuple[str, str]] = (),
) -> list[str]:
    """Measures what is missing, draws, and writes the page with its figures beside it; returns its sentences."""
    settings = settings or PSNRConfig()
    names = run_names(runs)
    results = []
    for run, label, name in zip(runs, labels, names, strict=True):
        found = _result(run, settings, console, device)
        results.append(replace(found, about=replace(found.about, label=label, name=name)))
    comparison = compare(results)
    references: list[PSNRResult] = []
    for n in comparison.counts:
        first = next(run for run in runs if run.split_record.train == n)
        references += measure_references(first, settings, results[0].levels, console, device=device)
    sampled = _samples(runs, labels, names, samples, console, device) if samples else []
    looks = look_at(runs, labels, attention or AttentionConfig(), console, names=names, device=device)
    jacobians = directions(runs, labels, names, console, measure=jacobian, device=device)
    told = [(f"train {name}", run.command) for run, name in zip(runs, names, strict=True)]
    words = [*commands, *told]
    left = left_behind(runs, labels, names)
    material = Material(
        runs, labels, comparison, references, sampled, looks, words, hide_training_images, jacobians, left
    )
    drawn = draw_all(figures(material, material.matched()))
    save_figures(drawn, out.parent / "figures")
    return save_report(material, drawn, out, title=title, foreword=foreword)


def _samples(
    runs: Sequence[Model], labels: Sequence[str], names: Sequence[str], count: int, console: Console, device: str
) -> list[Drawn]:
    """Samples of each kind of run at each N, of its first shuffle; of conditional runs of each class in turn."""
    found: dict[tuple[str, int], Drawn] = {}
    for run, label, name in zip(runs, labels, names, strict=True):
        kind = (label, run.split_record.train)
        if kind not in found and len(found) < KINDS:
            denoiser = guided_as(run, run.denoiser(device=device))
            classes = torch.arange(count) % denoiser.num_classes if denoiser.num_classes else None
            with counting(console, f"samples of {name}") as progress:
                seen = draw(denoiser, sampler_config(run), range(count), label=classes, progress=progress)
            found[kind] = Drawn.of(run, label, seen, name=name, classes=classes)
    return list(found.values())


def _result(run: Model, settings: PSNRConfig, console: Console, device: str) -> PSNRResult:
    """The kept result of the newest checkpoint, if it was measured with these settings; else a new one, now kept."""
    found = recall(run, "psnr-gap", PSNRResult, settings)
    if found is None:
        found = measure_run(run, settings, console, device=device)
        keep(run, "psnr-gap", found)
    return found
