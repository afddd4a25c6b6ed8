"""Running a study, and showing how far it is: `run_study`, `open_study`, `study_report`, `study_list`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditlab.data import ImageSet
from ditlab.errors import DitlabError, InvalidConfig, NotFound, unknown_name
from ditlab.files import write_bytes
from ditlab.progress import SILENT, Reporter
from ditlab.studies.an2024 import STUDIES
from ditlab.studies.grid import SCALES, Overrides, Plan, Scale, Study, apply_overrides, merge_plans, resolve
from ditlab.studies.pipeline import image_set, memory_estimate, trial_job
from ditlab.studies.runner import Outcome, Snapshot, make_slots, run_jobs
from ditlab.studies.store import Store
from ditlab.studies.trial import Trial

if TYPE_CHECKING:
    from ditlab.pages.page import Table
    from ditlab.reporting.report import ReportResult
    from ditlab.training.distributed import Device

__all__ = ["StudyResult", "find_study", "open_study", "run_study", "study_list", "study_report"]

Images = str | Path | ImageSet

_AXES = {"data": "images", "network": "network", "attention": "attention", "n": "N", "seed": "seed"}
"""Axis -> its heading in tables."""
_AVERAGES = ("train", "test", "gap")


@dataclass(frozen=True, eq=False)
class StudyResult:
    """A study at one scale: its plan, and what is on record of its trials."""

    study: Study
    plan: Plan
    store: Store
    outcomes: Sequence[Outcome] = ()
    """How the trials ended that this call worked on."""

    def __repr__(self) -> str:
        states = [trial["state"] for trial in self.status()]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        return f"<study {self.plan.study} at scale {self.plan.scale}: {len(states)} trials, {counts}>"

    @property
    def failed(self) -> list[Outcome]:
        """The trials of this call that failed."""
        return [outcome for outcome in self.outcomes if outcome.state == "failed"]

    @property
    def folder(self) -> Path:
        """Where the plan and the page are."""
        return self.store.plan(self.plan.study, self.plan.scale)

    def status(self) -> list[dict[str, Any]]:
        """Returns for each trial its place, its state ("done", "failed", ...), a note, and its PSNR averages if known.

        A trial that failed also has the command that repeats its process.
        """
        records = []
        for place in self.plan.trials:
            status = self.store.status(place["hash"], self.plan)
            record = {**place, "state": status.state, "note": status.note, "averages": self._averages(place["hash"])}
            if status.command is not None:
                record["command"] = status.command
            records.append(record)
        return records

    def _averages(self, name: str) -> dict[str, Any] | None:
        """Train and test PSNR and the gap of a trial, if they were measured with the plan's settings."""
        record = self.store.records(name, self.plan).get("psnr-gap", {})
        averages = record.get("averages", {}).get("mse_mean")
        whole = isinstance(averages, dict) and all(isinstance(averages.get(k), float | int) for k in _AVERAGES)
        return averages if whole else None

    def table(self) -> Table:
        """Returns a table of the trials; axes with a single value are left out."""
        from ditlab.pages.page import Table

        axes = [name for name in _AXES if len(self.plan.axes[name]) > 1 or name == "n"]
        rows = []
        for trial in self.status():
            averages = trial["averages"] or {}
            note = "see below" if "command" in trial else trial["note"]
            places = [trial[axis] for axis in axes]
            rows.append((f"`{trial['hash'][:8]}`", *places, trial["state"], *map(averages.get, _AVERAGES), note))
        columns = ("trial", *(_AXES[axis] for axis in axes), "state", "train, dB", "test, dB", "gap, dB", "note")
        return Table(columns, rows, f"{self.plan.study} at scale {self.plan.scale}")

    def to_json(self) -> dict[str, Any]:
        """Returns the status as JSON values."""
        place = {"study": self.plan.study, "scale": self.plan.scale, "folder": str(self.folder)}
        return {**place, "cells": self.status()}

    def report(self, *, hide_training_images: bool = False, reporter: Reporter = SILENT) -> ReportResult:
        """Writes the page of the study at this scale (`study_report`)."""
        scales, hidden = (self.plan.scale,), hide_training_images
        return study_report(self.study, scales, out=self.store.root, hide_training_images=hidden, reporter=reporter)

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def find_study(study: str | Study) -> Study:
    """Returns the study of a name, or the study itself; raises NotFound for an unknown name."""
    if isinstance(study, str) and study not in STUDIES:
        raise unknown_name("study", study, STUDIES)
    return STUDIES[study] if isinstance(study, str) else study


def study_list() -> list[dict[str, Any]]:
    """Returns every study at every scale: its name, title, question, scale, number of trials ("cells"), and cost."""
    records = []
    for study in STUDIES.values():
        for name in SCALES:
            scale = study.scale(name)
            sets = max(len(scale.data), 1)
            count = sets * len(scale.networks) * len(scale.attention) * len(scale.n) * len(scale.seeds)
            about = {"study": study.name, "title": study.title, "question": study.question}
            records.append({**about, "scale": name, "cells": count, "cost": scale.cost})
    return records


def run_study(
    study: str | Study,
    scale: str = "small",
    overrides: Overrides | None = None,
    *,
    images: Mapping[str, ImageSet] | None = None,
    out: Path = Path("studies"),
    plan_only: bool = False,
    parallel: int | None = None,
    device: Device | None = None,
    command: str = "",
    show: Callable[[Snapshot], None] | None = None,
    reporter: Reporter = SILENT,
) -> StudyResult:
    """Trains and measures every trial that is not yet on record, as many at a time as fit; the same call resumes.

    The rest is as in `ditlab.study`; `images` are sets of sources that are already open.

    Raises:
        DitlabError: the study cannot be run as it is asked for. A trial that fails later is in the result.
    """
    from ditlab.training.distributed import pick_device

    study = find_study(study)
    place = str(pick_device(device))
    make_slots(1, device=place, parallel=parallel, memory=1)  # refuses what cannot be before images are prepared
    chosen = apply_overrides(study, scale, overrides or Overrides())
    plan, trials, sets = _resolve(study, scale, chosen, command, images or {}, reporter)
    store = Store(out)
    _save_plan(plan, store.plan(study.name, scale), reporter, keep=plan_only)
    todo = [trial for trial in trials if store.missing(trial.hash, plan)]
    counts = f"{len(trials)} trials, {len(trials) - len(todo)} on record, {len(todo)} to do"
    reporter.note(f"{study.name} at scale {scale}: {counts}")
    if plan_only or not todo:
        return StudyResult(study, plan, store)
    slots = make_slots(len(todo), device=place, parallel=parallel, memory=memory_estimate(todo))
    jobs = [trial_job(trial, plan, store, sets[trial.data]) for trial in todo]
    outcomes = run_jobs(jobs, slots, title=f"{study.name} {scale}", show=show, reporter=reporter)
    return StudyResult(study, plan, store, outcomes)


def open_study(study: str | Study, scale: str = "small", *, out: Path = Path("studies")) -> StudyResult:
    """Opens the study that was planned in a folder; trains nothing.

    Raises:
        NotFound: there is no such study or scale, or no plan of it.
    """
    study, store = find_study(study), Store(out)
    study.scale(scale)
    path = store.plan(study.name, scale) / "plan.json"
    return StudyResult(study, Plan.load(_planned(study, path)), store)


def study_report(
    study: str | Study,
    scales: Sequence[str] = ("small",),
    *,
    out: Path = Path("studies"),
    hide_training_images: bool = False,
    reporter: Reporter = SILENT,
) -> ReportResult:
    """Writes the page of a study from what is on record of its trials; nothing is trained or measured.

    It needs plan.json and cells/ alone. Attention maps and token pickers are made if the run folders exist.

    Args:
        study: its name, or the study itself.
        scales: one or several; several are on one page, in the first one's folder.
        out: the folder of trials, runs and pages.
        hide_training_images: show no real image beside attention maps.
        reporter: takes notes and progress.

    Raises:
        DitlabError: an unknown study or scale, or a recorded result that is damaged.
    """
    from ditlab.reporting.report import ReportResult
    from ditlab.studies.attention_pictures import attention_map_figures, study_pickers
    from ditlab.studies.study_page import StudyPage

    study, store = find_study(study), Store(out)
    if not scales or len(set(scales)) != len(scales):
        raise InvalidConfig(f"study report: expected different values of `scale`, found {list(scales)}")
    plans = [_recorded_plan(study, name, store, reporter) for name in scales]
    folder, hidden = store.plan(study.name, scales[0]), hide_training_images
    maps = attention_map_figures(plans, store, folder / "figures", hide_images=hidden, reporter=reporter)
    pickers = partial(study_pickers, plans, store, hide_images=hidden, reporter=reporter)
    return ReportResult(*StudyPage(study, plans, store, maps).save(folder, pickers))


def _resolve(
    study: Study, name: str, scale: Scale, command: str, images: Mapping[str, ImageSet], reporter: Reporter
) -> tuple[Plan, list[Trial], Mapping[str, ImageSet]]:
    """The plan, its trials, and the image set of each name on the data axis."""
    sets = {source: images.get(source) or image_set(source, scale.size, reporter) for source in scale.data}
    plan, trials = resolve(study, name, scale, sets, command)
    return plan, trials, {label: sets[str(facts["source"])] for label, facts in plan.images.items()}


def _save_plan(plan: Plan, folder: Path, reporter: Reporter, *, keep: bool) -> None:
    """Writes plan.json with the trials of earlier calls; keeps a plan of another grid as plan-previous.json."""
    path = folder / "plan.json"
    if not path.exists():
        plan.save(folder)
        return
    if keep:
        reporter.note(f"{path} stays as it is; without `plan` this call would change it or add to it")
        return
    both = None
    try:
        both = merge_plans(Plan.load(path), plan)
    except DitlabError as error:
        reporter.note(str(error))
    if both is None:
        previous = write_bytes(folder / "plan-previous.json", path.read_bytes())
        reporter.note(
            f"WARNING: the plan of {plan.study} at scale {plan.scale} changed: its runs, images or analyses have other "
            f"settings than before. Its page now has only the trials of this call. The earlier plan is kept as "
            f"{previous}; its trials stay on record."
        )
    elif len(both.trials) > len(plan.trials):
        reporter.note(f"the study's plan has {len(both.trials)} trials, those of earlier calls included")
    (both or plan).save(folder)


def _planned(study: Study, path: Path) -> Path:
    if not path.exists():
        raise NotFound(f"study {study.name}: expected a plan at {path}, found none; `ditlab study run` makes it")
    return path


def _recorded_plan(study: Study, name: str, store: Store, reporter: Reporter) -> Plan:
    """The plan on record, or else that of the scale itself, with every trial possibly empty."""
    scale, path = study.scale(name), store.plan(study.name, name) / "plan.json"
    if path.exists() or not scale.data:
        return Plan.load(_planned(study, path))
    return _resolve(study, name, apply_overrides(study, name, Overrides()), "", {}, reporter)[0]
