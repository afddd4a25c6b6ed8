"""`ditlab quickstart`: the main job on real photographs, from nothing to a page, in ten minutes on two CPU cores."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ditlab.cli.common import open_images, use_threads
from ditlab.data.preparing import prepare
from ditlab.errors import DitlabError
from ditlab.models.comparing import open_models
from ditlab.progress import RichReporter
from ditlab.reporting.report import write_report
from ditlab.studies.pipeline import training_progress
from ditlab.studies.runner import Job, Slot, Stage, run_jobs
from ditlab.training.distributed import pick_device

PLANS = {"global attention": "global", "local attention": "3*4"}
"""The two kinds of runs: every token sees every other; or, in all four layers, its 3x3 neighbourhood."""


@dataclass(frozen=True)
class Quickstart:
    """Train a DiT with global and one with local attention on the same N photograph crops, and compare them.

    Shows samples, train and test PSNR by noise level, the gap along training and at matched train PSNR, in report.html.
    Interrupted in any way, the same command goes on where it was.
    """

    out: Path = Path("quickstart")
    """The folder of the image set, the runs and the report."""
    n: int = 30
    """Number of training crops."""
    size: int = 8
    """Side of a crop in pixels."""
    preset: str = "dit-nano/1"
    """The recipe of both runs."""
    steps: int = 4000
    """Training steps of each run."""
    lr: float = 2e-3
    """Learning rate: higher than usual, so that a short run memorizes visibly."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of split and training; each trains both kinds of runs once, and several give intervals."""
    data: str = "photos"
    """The images: photos (built in), or any other source or image set."""
    device: str | None = None
    """cpu, cuda or cuda:N; CUDA where there is one."""

    def run(self, console: Console) -> dict[str, Any]:
        """Prepares the crops, trains, measures, and writes the report."""
        begun = time.monotonic()
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise DitlabError(f"quickstart --seeds: expected different seeds, found {list(self.seeds)}")
        device = pick_device(self.device)
        cores = os.cpu_count() or 1
        if self.data == "photos":
            images = prepare("photos", self.out / f"photos-{self.size}", size=self.size)
        else:
            images = open_images(self.data, self.size, console)
        side = f"{images.shape[1]}x{images.shape[2]}"
        console.print(
            f"{len(images)} crops of {side} pixels in {images.path}; training on {self.n} of them, with global and with"
            f" local attention, {self.steps} steps each"
        )
        jobs, labels = [], []
        count = len(self.seeds) * len(PLANS)
        parallel = min(count, cores) if device.type == "cpu" else 1
        for seed in self.seeds:
            for label, plan in PLANS.items():
                name = f"{label.split()[0]}-seed{seed}"
                labels.append(label)
                jobs.append(self._job(plan, seed, name, images.path))
        slots = [Slot(max(cores // parallel, 1), str(device))] * parallel
        for outcome in run_jobs(jobs, slots, console, title="quickstart"):
            if outcome.reason:
                raise DitlabError(f"training {outcome.name} failed: {outcome.reason}")
        trained = time.monotonic() - begun
        console.print("measuring the PSNR gap and writing the report")
        use_threads(None)
        runs = [self.out / "runs" / job.name for job in jobs]
        result = write_report(
            open_models(runs, names=labels, device=str(device)),
            self.out / "report.html",
            title="Global and local attention on the same photographs",
            foreword=[self._foreword(side)],
            commands=[("everything on this page", self._command())],
            reporter=RichReporter(console),
        )
        for sentence in result.sentences:
            console.print(f"  {sentence}")
        seconds = time.monotonic() - begun
        console.print(f"\nDone in {seconds / 60:.1f} minutes. The result: {(self.out / 'report.html').resolve()}")
        return {
            "report": str(self.out / "report.html"),
            "figures": str(self.out / "figures"),
            "runs": [str(run) for run in runs],
            "sentences": list(result.sentences),
            "seconds": round(seconds, 1),
            "training_seconds": round(trained, 1),
        }

    def _foreword(self, side: str) -> str:
        return (
            f"Two small diffusion transformers were trained on the same {self.n} photograph crops of {side} pixels for "
            f"{self.steps:,} steps: one whose tokens attend to all others, one whose tokens attend to their 3x3 "
            "neighbourhood in every layer."
        )

    def _job(self, plan: str, seed: int, name: str, images: Path) -> Job:
        folder = self.out / "runs" / name

        def stages(slot: Slot) -> list[Stage]:
            words = self._words(plan, seed, name, images, slot.threads)
            return [Stage("train", words, progress=training_progress(folder, self.steps))]

        return Job(name, folder.parent / f"{name}.txt", stages)

    def _words(self, plan: str, seed: int, name: str, images: Path, threads: int) -> tuple[str, ...]:
        every = max(self.steps // 20, 1)
        words = ["train", self.preset, "--data", str(images), "--n", str(self.n), "--seed", str(seed)]
        words += ["--network.attention", plan, "--training.steps", str(self.steps), "--training.lr", str(self.lr)]
        words += ["--training.eval-every", str(every), "--training.save-every", str(every)]
        words += [
            "--evaluation.images",
            "50",
            "--out",
            str(self.out / "runs" / name),
            "--threads",
            str(threads),
        ]
        return tuple(words if self.device is None else [*words, "--device", self.device])

    def _command(self) -> str:
        words = ["ditlab quickstart"]
        for name in ("out", "n", "size", "preset", "steps", "lr", "data"):
            value = getattr(self, name)
            if value != getattr(Quickstart, name):
                words.append(f"--{name} {value}")
        if self.seeds != (0,):
            words.append(f"--seeds {' '.join(map(str, self.seeds))}")
        return " ".join(words)
