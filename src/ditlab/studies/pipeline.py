"""From the trials of a plan to jobs: train, then measure; each result is recorded as soon as it exists."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from ditlab.config import RunConfig, to_json
from ditlab.data import ImageSet, is_source, prepare
from ditlab.errors import DitlabError, InvalidConfig
from ditlab.models.run import Run
from ditlab.progress import Reporter
from ditlab.studies.grid import Plan
from ditlab.studies.runner import Job, Outcome, Progress, ResourceUse, Slot, Stage
from ditlab.studies.store import TRAINED, Store
from ditlab.studies.trial import Trial
from ditlab.training.log import read_log

__all__ = ["image_set", "memory_estimate", "train_job", "training_progress", "trial_job"]

_PROCESS_BYTES = 700 * 2**20
"""Memory of a process before it trains anything: Python, torch and its libraries."""

_OPTIONS: Mapping[str, Mapping[str, Any]] = {"psnr-gap": {"baselines": False}}
"""Analysis -> options that differ from its defaults: baselines are no trials."""


def image_set(source: str, size: int, reporter: Reporter) -> ImageSet:
    """Opens an image set's folder, or prepares the set of a source."""
    if not source:
        raise InvalidConfig("study: expected `data` with an image set's folder or a source of images, found nothing")
    return prepare(source, size=size, reporter=reporter) if is_source(source) else ImageSet.open(source)


def train_job(
    config: RunConfig, images: ImageSet, out: Path, *, device: str | None, threads: int, command: str
) -> dict[str, Any]:
    """Returns what a worker needs to train a run in the folder `out` (`ditlab.studies.worker`)."""
    job = {"call": "train", "config": to_json(config), "images": str(images.path), "out": str(out)}
    return {**job, "device": device, "threads": threads, "command": command}


def trial_job(trial: Trial, plan: Plan, store: Store, images: ImageSet) -> Job:
    """Returns the job that trains and measures a trial, as far as that is not on record."""

    def ended(outcome: Outcome) -> None:
        if outcome.state == "failed":
            store.note_failure(trial.hash, outcome.reason, outcome.command)
        else:
            store.forget_failure(trial.hash)

    return Job(
        name=trial.name,
        output=store.file(trial.hash, "txt"),
        stages=partial(_stages, trial, plan, store, images),
        lock=partial(store.lock, trial.hash),
        ended=ended,
    )


def _stages(trial: Trial, plan: Plan, store: Store, images: ImageSet, slot: Slot) -> list[Stage]:
    """Returns what is left to do for a trial; one without a run folder is trained again only if a result is missing."""
    missing = store.missing(trial.hash, plan)
    if not missing:
        return []
    folder, facts = store.run(trial.hash), plan.images[trial.data]
    begun = (folder / "config.json").is_file()
    finished = begun and Run.open(folder).finished
    stages = []
    if not finished:
        job = train_job(trial.config, images, folder, device=slot.device, threads=slot.threads, command=plan.command)

        def trained(use: ResourceUse) -> None:
            store.record_training(trial, facts, None if begun else use)

        progress = training_progress(folder, trial.config.training.steps)
        stages.append(Stage("train", job, store.file(trial.hash, "train.json"), trained, progress))
    elif {*TRAINED} & {*missing}:
        # The runner was killed after training and before recording it.
        store.record_training(trial, facts, None)
    for name in plan.analyses:
        if name not in missing:
            continue
        measured = partial(store.record_analysis, trial, plan, name)
        if finished:
            # The same after a measurement; what is missing or was measured with other settings is refused.
            with suppress(DitlabError):
                measured(None)
                continue
        job = {
            "call": "analyze",
            "analysis": name,
            "model": str(folder),
            "images": str(images.path),
            "config": dict(plan.analyses[name]),
            "options": dict(_OPTIONS.get(name, {})),
            "names": [trial.attention],
            "device": slot.device,
            "threads": slot.threads,
        }
        stages.append(Stage(name, job, store.file(trial.hash, f"{name}.json"), measured))
    return stages


def training_progress(run: Path, steps: int) -> Callable[[], Progress | None]:
    """Returns a function that tells by its log how far the training of a run, which need not exist yet, is."""

    def progress() -> Progress | None:
        try:
            lines = read_log(run / "log.jsonl")
        except (DitlabError, OSError):  # the trainer refuses a damaged log
            return None
        line = next((line for line in reversed(lines) if "loss" in line), None)
        if line is None:
            return Progress(0, steps, None, "starting")
        rate = line["machine"].get("images_per_second", 0)
        batch = line["images"] / line["step"]
        left = (steps - line["step"]) * batch / rate if rate else None
        return Progress(line["step"], steps, left, f"loss {line['loss']:.4f}")

    return progress


def memory_estimate(trials: Sequence[Trial]) -> int:
    """Returns roughly how many bytes training the largest trial takes on the CPU: process, weights, activations."""
    runs = [(trial.config.network, trial.config.training) for trial in trials]
    return _PROCESS_BYTES + max(network.training_bytes(t.batch_size // t.accumulate) for network, t in runs)
