"""The quickstart: two networks on the same few photograph crops, one with global and one with local attention.

Each seed trains both, in worker processes like the trials of a study; then a report compares them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from ditlab.config import RunConfig
from ditlab.data import ImageSet, prepare
from ditlab.errors import DitlabError
from ditlab.models.comparing import open_models
from ditlab.models.configuring import fit_run
from ditlab.progress import SILENT, Reporter
from ditlab.studies.pipeline import image_set, train_job, training_progress
from ditlab.studies.quickstart_config import QuickstartConfig
from ditlab.studies.runner import Job, Slot, Snapshot, Stage, run_jobs
from ditlab.studies.trial import trial_config
from ditlab.training.distributed import Device, pick_device

if TYPE_CHECKING:
    from ditlab.reporting.report import ReportResult

__all__ = ["PLANS", "QuickstartResult", "run_config", "run_quickstart"]

PLANS = {"global attention": "global", "local attention": "3*4"}
"""Kind of network -> attention plan: every token sees every other, or its 3x3 neighbourhood in all four layers."""

_POINTS = 20
"""Measurements and checkpoints during each run."""


@dataclass(frozen=True, eq=False)
class QuickstartResult:
    """The page that was written, and the runs that it compares."""

    report: ReportResult
    runs: Sequence[Path]
    seconds: float
    """Of everything."""
    training_seconds: float
    """Of preparing the images and training."""

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


def run_quickstart(
    config: QuickstartConfig,
    out: Path = Path("quickstart"),
    *,
    device: Device | None = None,
    command: str = "",
    show: Callable[[Snapshot], None] | None = None,
    reporter: Reporter = SILENT,
) -> QuickstartResult:
    """Prepares the images, trains both kinds of networks for each seed, and writes the report; the same call resumes.

    The arguments are those of `ditlab.quickstart`; `command` is for the page and the runs' config.json.
    """
    begun, place = time.monotonic(), pick_device(device)
    folder = out / f"photos-{config.size}"
    images = (
        prepare("photos", folder, size=config.size, reporter=reporter)
        if config.data == "photos"
        else image_set(config.data, config.size, reporter)
    )
    side = f"{images.shape[1]}x{images.shape[2]}"
    reporter.note(
        f"{len(images)} images of {side} pixels in {images.path}; training on {config.n} of them, with global and with "
        f"local attention, {config.steps:,} steps each"
    )
    jobs, kinds = [], list(PLANS) * len(config.seeds)
    for seed, (kind, plan) in product(config.seeds, PLANS.items()):
        folder = out / "runs" / f"{kind.split()[0]}-seed{seed}"
        jobs.append(_job(run_config(config, images, plan, seed, reporter), images, folder, command))
    cores = os.cpu_count() or 1
    parallel = min(len(jobs), cores) if place.type == "cpu" else 1
    slots = [Slot(max(cores // parallel, 1), str(place))] * parallel
    for outcome in run_jobs(jobs, slots, title="quickstart", show=show, reporter=reporter):
        if outcome.reason:
            raise DitlabError(f"training {outcome.name} failed: {outcome.reason}; to repeat it: {outcome.command}")
    trained = time.monotonic() - begun
    reporter.note("measuring the PSNR gap and writing the report")
    from ditlab.reporting.report import write_report

    runs = [out / "runs" / job.name for job in jobs]
    foreword = (
        f"Two small diffusion transformers were trained on the same {config.n} images of {side} pixels for "
        f"{config.steps:,} steps. In one, tokens attend to all others; in the other, to their 3x3 neighbourhood in "
        "every layer."
    )
    report = write_report(
        open_models(runs, images.path, names=kinds, device=place, reporter=reporter),
        out / "report.html",
        title="Global and local attention on the same photographs",
        foreword=[foreword],
        commands=[("everything on this page", command)] if command else [],
        reporter=reporter,
    )
    return QuickstartResult(report, runs, time.monotonic() - begun, trained)


def run_config(
    config: QuickstartConfig, images: ImageSet, attention: str, seed: int, reporter: Reporter = SILENT
) -> RunConfig:
    """Returns the settings of one run, of an attention plan and a seed of split and training."""
    every = max(config.steps // _POINTS, 1)
    settings = {
        "training.steps": config.steps,
        "training.lr": config.lr,
        "training.eval_every": every,
        "training.save_every": every,
        "evaluation.images": 50,
    }
    chosen = trial_config(config.preset, settings, images, attention=attention, n=config.n, seed=seed)
    return fit_run(chosen, images, reporter=reporter)


def _job(config: RunConfig, images: ImageSet, folder: Path, command: str) -> Job:
    def stages(slot: Slot) -> list[Stage]:
        job = train_job(config, images, folder, device=slot.device, threads=slot.threads, command=command)
        file = folder.with_name(f"{folder.name}.train.json")
        return [Stage("train", job, file, progress=training_progress(folder, config.training.steps))]

    return Job(folder.name, folder.with_name(f"{folder.name}.txt"), stages)
