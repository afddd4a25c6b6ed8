"""From a plan's cells to the runner's jobs: train, then measure, each result recorded as soon as it exists."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ditlab.data.imageset import ImageSet
from ditlab.errors import DitlabError
from ditlab.models.run import Run
from ditlab.studies.cells import Cell, train_words
from ditlab.studies.grid import Plan
from ditlab.studies.runner import Job, Outcome, Progress, Slot, Spent, Stage
from ditlab.studies.store import Store
from ditlab.training.log import read_log

_PROCESS_BYTES = 700 * 2**20
"""What a process takes before it trains anything: Python, torch and its libraries."""


def cell_jobs(cells: Sequence[Cell], plan: Plan, store: Store, images: Mapping[str, ImageSet]) -> list[Job]:
    """One job a cell.

    Args:
        cells: of `resolve`.
        plan: of `resolve`.
        store: where results and runs lie.
        images: name on the data axis -> image set.
    """
    return [_job(cell, plan, store, images[cell.data]) for cell in cells]


def _job(cell: Cell, plan: Plan, store: Store, images: ImageSet) -> Job:
    def ended(outcome: Outcome) -> None:
        if outcome.state == "failed":
            store.note_failure(cell.hash, outcome.reason, outcome.command)
        else:
            store.forget_failure(cell.hash)

    return Job(
        name=cell.name,
        output=store.output(cell.hash),
        stages=lambda slot: _stages(cell, plan, store, images, slot),
        lock=lambda: store.lock(cell.hash),
        ended=ended,
    )


def _stages(cell: Cell, plan: Plan, store: Store, images: ImageSet, slot: Slot) -> list[Stage]:
    """What is still to be done on a cell. One whose run folder is gone is trained again only where a result misses."""
    if store.complete(cell.hash, plan):
        return []
    run = store.run(cell.hash)
    place = ["--device", slot.device, "--threads", str(slot.threads)]
    stages = []
    finished = (run / "config.json").is_file() and Run.open(run).finished
    facts = plan.images[cell.data]
    if finished and not store.trained(cell.hash):
        # Model, and killed before it was recorded.
        store.record_training(cell, facts, None)
    if not finished:
        fresh = not (run / "config.json").is_file()
        words = [*train_words(cell.config), "--data", str(images.path), "--out", str(run), *place]

        def record(spent: Spent) -> None:
            store.record_training(cell, facts, spent if fresh else None)

        stages.append(Stage("train", tuple(words), record, training_progress(run, cell.config.training.steps)))
    for analysis in plan.analyses:
        if finished and not store.measured(cell.hash, plan, analysis):
            # Measured, and killed before it was recorded; what is absent or was measured otherwise is refused.
            with suppress(DitlabError):
                store.record_analysis(cell, plan, analysis, None)
        if not store.measured(cell.hash, plan, analysis):
            words = [*_analysis_words(analysis, plan, cell, run), "--data", str(images.path), *place]
            stages.append(Stage(analysis, tuple(words), _recorder(store, cell, plan, analysis)))
    return stages


def _recorder(store: Store, cell: Cell, plan: Plan, analysis: str) -> Callable[[Spent], None]:
    return lambda spent: store.record_analysis(cell, plan, analysis, spent)


def _analysis_words(analysis: str, plan: Plan, cell: Cell, run: Path) -> list[str]:
    """The command line of an analysis, but for where the images lie and where it computes."""
    words = [analysis, str(run)]
    for name, value in plan.analyses[analysis].items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{flag}")
        elif value is not None and value != []:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    if analysis == "psnr-gap":
        words.append("--no-references")
    return [*words, "--labels", cell.attention]


def training_progress(run: Path, steps: int) -> Callable[[], Progress | None]:
    """How far the training of a run is, by its log.

    Args:
        run: the run's folder; it need not exist yet.
        steps: its last step.
    """

    def progress() -> Progress | None:
        try:
            lines = read_log(run / "log.jsonl")
        except (DitlabError, OSError):  # a damaged log is the trainer's to refuse; here there is just no news
            return None
        line = next((line for line in reversed(lines) if "loss" in line), None)
        if line is None:
            return Progress(0, steps, None, "starting")
        rate = line["machine"].get("images_per_second", 0)
        batch = line["images"] / line["step"]
        left = (steps - line["step"]) * batch / rate if rate else None
        return Progress(line["step"], steps, left, f"loss {line['loss']:.4f}")

    return progress


def memory_estimate(cells: Sequence[Cell]) -> int:
    """Bytes that training the largest cell takes on the CPU, roughly: the process, weights, and kept activations."""
    largest = 0
    for cell in cells:
        training = cell.config.training
        largest = max(largest, cell.config.network.training_bytes(training.batch_size // training.accumulate))
    return _PROCESS_BYTES + largest
