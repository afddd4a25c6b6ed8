"""`ditlab study list|run|status|report`: declared grids of runs, trained and measured cell by cell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from ditlab.cli.common import command_line, noting, open_images
from ditlab.data.imageset import ImageSet
from ditlab.errors import DitlabError, unknown_name
from ditlab.files import write_bytes
from ditlab.studies.an2024 import STUDIES
from ditlab.studies.trial import Trial
from ditlab.studies.grid import SCALES, Overrides, Plan, Scale, Study, merge_plans, apply_overrides, resolve
from ditlab.studies.pipeline import trial_jobs, memory_estimate
from ditlab.studies.runner import make_slots, run_jobs, summary
from ditlab.studies.store import Store
from ditlab.training.distributed import pick_device


def _study(name: str) -> Study:
    if name not in STUDIES:
        raise unknown_name("study", name, STUDIES)
    return STUDIES[name]


@dataclass(frozen=True)
class List:
    """Show the studies, their questions, scales and costs."""

    def run(self, console: Console) -> dict[str, Any]:
        """Prints a table."""
        table = Table(title="Studies")
        for column in ("study", "question", "scale", "cells", "cost"):
            table.add_column(column, justify="right" if column == "cells" else "left")
        records = []
        for study in STUDIES.values():
            for name in SCALES:
                scale = study.scale(name)
                sets = max(len(scale.data), 1)
                cells = sets * len(scale.networks) * len(scale.attention) * len(scale.n) * len(scale.seeds)
                first = name == SCALES[0]
                table.add_row(
                    study.name if first else "", study.question if first else "", name, str(cells), scale.cost
                )
                records.append(
                    {
                        "study": study.name,
                        "title": study.title,
                        "question": study.question,
                        "scale": name,
                        "cells": cells,
                        "cost": scale.cost,
                    }
                )
        console.print(table)
        return {"studies": records}


@dataclass(frozen=True)
class Run:
    """Train and measure every cell of a study that is not yet on record, as many at a time as fit.

    Interrupted or killed in any way, the same command goes on. A cell that fails does not stop the others.
    """

    study: tyro.conf.Positional[str]
    """Its name, e.g. an2024/fig6."""
    scale: str = "small"
    """smoke (minutes), small (two CPU cores), or paper (the paper's own settings)."""
    data: tuple[str, ...] | None = None
    """Sources of images or image sets, instead of the scale's own."""
    size: int | None = None
    """Side of the images in pixels, instead of the scale's own."""
    network: tuple[str, ...] | None = None
    """Presets, instead of the scale's own."""
    attention: tuple[str, ...] | None = None
    """Names of the scale's attention plans, or plans, instead of all of the scale's own."""
    n: Annotated[tuple[int, ...] | None, tyro.conf.arg(aliases=["-n"])] = None
    """Numbers of training images, instead of the scale's own."""
    seeds: tuple[int, ...] | None = None
    """Seeds of split and training, instead of the scale's own."""
    steps: int | None = None
    """Training steps of each cell, instead of the scale's own."""
    set: tuple[str, ...] = ()
    """Other settings of all runs as NAME=VALUE, e.g. training.lr=1e-3 network.width=96."""
    out: Path = Path("studies")
    """The folder of cells, runs and pages; studies that share it share their cells."""
    parallel: int | None = None
    """Processes at a time; as many as cores, free memory and GPUs allow where not given."""
    plan: bool = False
    """Only check everything and show the table; plan.json is written where there is none yet."""
    device: str | None = None
    """cpu, cuda (all GPUs) or cuda:N; CUDA where there is one."""

    def run(self, console: Console) -> dict[str, Any]:
        """Checks, plans, trains and measures."""
        study = _study(self.study)
        device = pick_device(self.device)
        make_slots(1, device=str(device), parallel=self.parallel, memory=1)
        scale = apply_overrides(study, self.scale, self._overrides())
        plan, cells, images = _resolve(study, self.scale, scale, console)
        store = Store(self.out)
        _keep(plan, store.plan(study.name, self.scale), console, dry=self.plan)
        todo = [cell for cell in cells if not store.complete(cell.hash, plan)]
        console.print(
            f"{study.name} at scale {self.scale}: {len(cells)} cells, {len(cells) - len(todo)} on record, "
            f"{len(todo)} to do"
        )
        if self.plan:
            return _show(store, plan, console)
        memory = memory_estimate(todo)
        slots = make_slots(len(todo), device=str(device), parallel=self.parallel, memory=memory)
        outcomes = run_jobs(trial_jobs(todo, plan, store, images), slots, console, title=f"{study.name} {self.scale}")
        result = _show(store, plan, console)
        failed = summary(outcomes)["failed"]
        if failed:
            first = failed[0]
            raise DitlabError(
                f"study {study.name}: {len(failed)} of {len(cells)} cells failed (first: {first['name']}: "
                f"{first['reason']}); the same command tries them again"
            )
        return result

    def _overrides(self) -> Overrides:
        settings = dict(_setting(text) for text in self.set)
        if self.steps is not None:
            settings["training.steps"] = self.steps
        return Overrides(self.data, self.size, self.network, self.attention, self.n, self.seeds, settings)


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise DitlabError(f"study --set: expected NAME=VALUE, found '{text}'")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _resolve(
    study: Study, name: str, scale: Scale, console: Console
) -> tuple[Plan, list[Trial], Mapping[str, ImageSet]]:
    """The plan, its cells, and the image set of each name on the data axis."""
    sources = {source: open_images(source, scale.size, console) for source in scale.data}
    plan, cells = resolve(study, name, scale, sources, command_line("study"))
    found = {name: sources[str(facts["source"])] for name, facts in plan.images.items()}
    return plan, cells, found


def _keep(plan: Plan, folder: Path, console: Console, *, dry: bool) -> None:
    """Writes plan.json: the cells of earlier commands stay in it where they make one grid with those of this one.

    A plan with other settings replaces it, and the earlier one becomes plan-previous.json.

    Args:
        plan: what this command asks for.
        folder: the study's at this scale.
        console: told where the study's plan is not just what this command asks for.
        dry: leave a plan that is there as it is.
    """
    path = folder / "plan.json"
    if not path.exists():
        plan.save(folder)
        return
    if dry:
        console.print(f"note: {path} stays as it is; without --plan this command would change or add to it")
        return
    try:
        both = merge_plans(Plan.load(path), plan)
    except DitlabError as error:
        console.print(f"note: {error}", markup=False)
        both = None
    if both is None:
        previous = write_bytes(folder / "plan-previous.json", path.read_bytes())
        console.print(
            f"WARNING: the plan of {plan.study} at scale {plan.scale} changed: its runs, images or analyses are set "
            f"otherwise than before. Its page now has the cells of this command alone. The earlier plan is kept as "
            f"{previous}; its cells stay on record."
        )
    elif len(both.cells) > len(plan.cells):
        console.print(f"the study's plan has {len(both.cells)} cells, those of earlier commands included")
    (both or plan).save(folder)


_AXES = {"data": "images", "network": "network", "attention": "attention", "n": "N", "seed": "seed"}


def _averages(store: Store, name: str, plan: Plan) -> dict[str, Any] | None:
    """Train and test PSNR and the gap of a cell, where they were measured with the plan's settings."""
    if "psnr-gap" not in plan.analyses or not store.measured(name, plan, "psnr-gap"):
        return None
    found = (store.record(name, "psnr-gap") or {}).get("averages", {}).get("mse_mean")
    whole = isinstance(found, dict) and all(isinstance(found.get(k), float | int) for k in ("train", "test", "gap"))
    return found if whole else None


def _show(store: Store, plan: Plan, console: Console) -> dict[str, Any]:
    """Prints the table of a plan's cells, and returns it."""
    table = Table(title=f"{plan.study} at scale {plan.scale}", title_justify="left")
    # An axis with a single value would only take room.
    axes = [name for name in _AXES if len(plan.axes[name]) > 1 or name == "n"]
    for name in ("cell", *(_AXES[axis] for axis in axes), "state", "train", "test", "gap", "note"):
        table.add_column(name, justify="right" if name in ("N", "seed", "train", "test", "gap") else "left")
    records, failures = [], []
    for cell in plan.cells:
        standing = store.status(cell["hash"], plan)
        averages = _averages(store, cell["hash"], plan)
        numbers = ["" if averages is None else f"{averages[k]:.2f}" for k in ("train", "test", "gap")]
        record = {**cell, "state": standing.state, "note": standing.note, "averages": averages}
        style = "" if standing.state == "done" else "dim"
        failure = store.record_failure(cell["hash"]) if standing.state == "failed" else None
        if failure is not None:
            style = "red"
            failures.append((cell["hash"], failure))
            record["command"] = failure["command"]
        note = "see below" if failure else standing.note
        table.add_row(cell["hash"][:8], *(str(cell[a]) for a in axes), standing.state, *numbers, note, style=style)
        records.append(record)
    console.print(table)
    for name, failure in failures:
        console.print(f"{name[:8]} failed: {failure['reason']}", markup=False, style="red")
        if failure["command"]:
            console.print(f"  to repeat it: {failure['command']}", markup=False)
    folder = str(store.plan(plan.study, plan.scale))
    return {"study": plan.study, "scale": plan.scale, "folder": folder, "cells": records}


@dataclass(frozen=True)
class Status:
    """Show how far each cell of a study is."""

    study: tyro.conf.Positional[str]
    """Its name, e.g. an2024/fig6."""
    scale: str = "small"
    """smoke, small or paper."""
    out: Path = Path("studies")
    """The folder of cells, runs and pages."""

    def run(self, console: Console) -> dict[str, Any]:
        """Prints a table."""
        study = _study(self.study)
        study.scale(self.scale)
        store = Store(self.out)
        path = store.plan(study.name, self.scale) / "plan.json"
        if not path.exists():
            raise DitlabError(f"study {study.name}: expected a plan at {path}, found none; `ditlab study run` makes it")
        plan = Plan.load(path)
        return _show(store, plan, console)


@dataclass(frozen=True)
class Report:
    """Write the page of a study, with what is on record of its cells; nothing is trained or measured.

    It needs plan.json and cells/ alone; attention maps and token pickers are made where run folders are there. Several
    scales stand on one page, which goes into the first one's folder.
    """

    study: tyro.conf.Positional[str]
    """Its name, e.g. an2024/fig6."""
    scale: tuple[str, ...] = ("small",)
    """smoke, small, paper; one or several."""
    out: Path = Path("studies")
    """The folder of cells, runs and pages."""
    hide_training_images: bool = False
    """Show no real image beside attention maps (for sets whose terms forbid passing them on)."""

    def run(self, console: Console) -> dict[str, Any]:
        """Writes report.html, table.csv, table.json and figures."""
        from ditlab.studies.pickers import study_pickers
        from ditlab.studies.attention_map_figures import attention_map_figures
        from ditlab.studies.study_page import StudyPage

        study, store = _study(self.study), Store(self.out)
        if not self.scale or len(set(self.scale)) != len(self.scale):
            raise DitlabError(f"study report --scale: expected different scales, found {list(self.scale)}")
        plans = [_planned(study, name, store, console) for name in self.scale]
        folder = store.plan(study.name, self.scale[0])
        maps = attention_map_figures(
            plans,
            store,
            folder / "figures",
            hide_images=self.hide_training_images,
            say=noting(console),
        )
        result = StudyPage(study, plans, store, maps).save(
            folder, lambda room: study_pickers(plans, store, console, room, hide=self.hide_training_images)
        )
        for sentence in result["sentences"]:
            console.print(f"  {sentence}", markup=False)
        console.print(f"wrote {result['report']}")
        return result


def _planned(study: Study, name: str, store: Store, console: Console) -> Plan:
    """The plan on record, or else the scale's own, of which every cell may be empty."""
    study.scale(name)
    path = store.plan(study.name, name) / "plan.json"
    if path.exists():
        return Plan.load(path)
    plan, _, _ = _resolve(study, name, apply_overrides(study, name, Overrides()), console)
    return plan
