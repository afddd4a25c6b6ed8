"""Where studies keep what they know: small JSON of every cell, made to be committed, beside the run folders.

    OUT/
      cells/HASH/    cell.json  trajectory.json  psnr-gap.json  attention.json
      runs/HASH/     the run's folder (weights; not to be committed), HASH.txt what its processes said
      STUDY-SCALE/   plan.json  report.html  table.csv  table.json  figures/

Each file is written whole or not at all. What is recorded in `cells/` stays valid when the run's folder is deleted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ditlab.config import to_json
from ditlab.errors import DitlabError
from ditlab.files import read_json, write_json
from ditlab.models.run import Run
from ditlab.studies.cells import Cell, cell_hash
from ditlab.studies.grid import Plan
from ditlab.studies.runner import Spent

RESULTS = {"psnr-gap": "psnr-gap", "attention": "attention-locality"}
"""Analysis (the verb, and the file's name) -> the kind that its JSON states."""

_FIELDS: Mapping[str, Mapping[str, type]] = {
    "cell": {"name": str, "split": dict, "spent": dict, "environment": dict, "command": str},
    "trajectory": {"points": list},
    "psnr-gap": {"about": dict, "config": dict, "averages": dict, "curves": dict, "peak": float},
    "attention": {"about": dict, "config": dict},
}
"""File -> fields without which it counts as damaged, and what they must be."""

_PROBES, _PROBE_SECONDS = 3, 0.02
"""How often a cell's lock is tried, and the pause between: `locked` holds it for a moment."""

State = Literal["empty", "partial", "running", "trained", "failed", "done"]


@dataclass(frozen=True)
class Standing:
    """How far a cell is."""

    state: State
    note: str = ""
    """What else there is to say, for a table."""


class Store:
    """The folder that studies share."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def plan(self, study: str, scale: str) -> Path:
        """The folder of a study at a scale."""
        return self.root / f"{study.replace('/', '-')}-{scale}"

    def cell(self, name: str) -> Path:
        """The folder of a cell's results."""
        return self.root / "cells" / name

    def run(self, name: str) -> Path:
        """The folder of a cell's run."""
        return self.root / "runs" / name

    def output(self, name: str) -> Path:
        """The file of all that a cell's processes said."""
        return self.root / "runs" / f"{name}.txt"

    @contextmanager
    def lock(self, name: str) -> Iterator[bool]:
        """Holds a cell for this process, where no other holds it; yields whether it does.

        The lock goes with the process, however it ends.
        """
        try:
            import fcntl
        except ImportError:  # no such lock on Windows; there two runners on one store are the user's own care
            yield True
            return
        path = self.root / "runs" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            for probe in range(_PROBES):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if probe == _PROBES - 1:
                        yield False
                        return
                    time.sleep(_PROBE_SECONDS)
            yield True

    def locked(self, name: str) -> bool:
        """Whether a runner works on a cell at this moment."""
        try:
            import fcntl

            with (self.root / "runs" / f"{name}.lock").open() as file:
                try:
                    # Shared, so that those who only look are not in each other's way.
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return True
        except (ImportError, OSError):  # no lock was ever made, or it may not be read: nobody works there
            return False
        return False

    def record(self, name: str, file: str) -> dict[str, Any] | None:
        """One of a cell's JSON files; None where it is absent or damaged, so that it is made again."""
        kind = RESULTS.get(file, f"study-{file}")
        try:
            found = read_json(self.cell(name) / f"{file}.json", kind, 1)
        except DitlabError:
            return None
        return found if _whole(found, file) else None

    def trained(self, name: str) -> bool:
        """Whether a cell's training is on record."""
        found = self.record(name, "cell")
        return found is not None and self.record(name, "trajectory") is not None

    def measured(self, name: str, plan: Plan, analysis: str) -> bool:
        """Whether a cell has an analysis on record that was made with the plan's settings."""
        found = self.record(name, analysis)
        return found is not None and measured_alike(found, plan, analysis)

    def complete(self, name: str, plan: Plan) -> bool:
        """Whether all that a plan asks of a cell is on record."""
        return self.trained(name) and all(self.measured(name, plan, analysis) for analysis in plan.analyses)

    def standing(self, name: str, plan: Plan) -> Standing:
        """How far a cell is, from what lies on the disk."""
        folder = self.run(name)
        gone = "" if folder.is_dir() else "run folder deleted"
        if self.complete(name, plan):
            return Standing("done", f"{gone}, its results stand" if gone else "")
        if self.locked(name):
            return Standing("running")
        failure = self.record_failure(name)
        if failure is not None:
            return Standing("failed", failure["reason"])
        if self.trained(name):
            missing = [a for a in plan.analyses if not self.measured(name, plan, a)]
            todo = f"{' and '.join(missing)} to be measured"
            return Standing("empty", f"{gone}, {todo}: to be trained again") if gone else Standing("trained", todo)
        if (folder / "config.json").is_file():
            try:
                steps = Run.open(folder).checkpoints.steps()
            except DitlabError as error:
                return Standing("failed", str(error))
            return Standing("partial", f"step {steps[-1]:,} saved" if steps else "begun")
        return Standing("empty")

    def _failure(self, name: str) -> Path:
        return self.root / "runs" / f"{name}.failed.json"

    def record_failure(self, name: str) -> dict[str, Any] | None:
        """Why a cell failed when it was last tried, and the command to repeat it; None where it did not."""
        try:
            return read_json(self._failure(name), "study-failure", 1)
        except DitlabError:
            return None

    def note_failure(self, name: str, reason: str, command: str) -> None:
        """Keeps why a cell failed; a disk too full for that loses only the note."""
        record = {"kind": "study-failure", "version": 1, "reason": reason, "command": command}
        try:
            write_json(self._failure(name), record)
        except DitlabError:
            return

    def forget_failure(self, name: str) -> None:
        """Removes the note of a failure."""
        self._failure(name).unlink(missing_ok=True)

    def record_training(self, cell: Cell, images: Mapping[str, Any], spent: Spent | None) -> None:
        """Writes trajectory.json and then cell.json from a finished run's folder.

        Args:
            cell: the cell.
            images: what the plan says of its image set.
            spent: by its process; None where it took several, of which not all are known.

        Raises:
            DitlabError: the run is not finished, or is not the cell's; or the disk is full.
        """
        run = Run.open(self.run(cell.hash))
        found = cell_hash(run.config, run.record.split.imageset)
        if found != cell.hash:
            raise DitlabError(f"run {run.path}: expected the settings of cell {cell.hash}, found those of {found}")
        if not run.finished:
            raise DitlabError(f"run {run.path}: expected {run.config.training.steps} steps, found fewer")
        log = run.log
        folder = self.cell(cell.hash)
        names = ("step", "train_psnr", "test_psnr", "psnr_gap", "train_loss", "test_loss")
        points = [{name: line[name] for name in names if name in line} for line in log if "train_loss" in line]
        write_json(folder / "trajectory.json", {"kind": "study-trajectory", "version": 1, "points": points})
        write_json(
            folder / "cell.json",
            {
                "kind": "study-cell",
                "version": 1,
                **cell.place(),
                "name": cell.name,
                "images": dict(images),
                "split": asdict(run.record.split),
                "config": _without_path(to_json(run.config)),
                "command": run.record.command,
                "environment": run.record.environment,
                "step_seconds": round(_step_seconds(log), 1),
                "spent": {} if spent is None else {"train": asdict(spent)},
                "memory_bytes": max((line.get("machine", {}).get("memory_bytes", 0) for line in log), default=0),
            },
        )

    def record_analysis(self, cell: Cell, plan: Plan, analysis: str, spent: Spent | None) -> None:
        """Copies an analysis from the run's folder into the cell, and its time into cell.json.

        Args:
            cell: the cell.
            plan: the plan whose settings it must have.
            analysis: its verb.
            spent: by its process; None where that is not known.

        Raises:
            DitlabError: the analysis is absent, damaged, of other weights or images, or made with other settings; or
                the disk is full.
        """
        run = Run.open(self.run(cell.hash))
        path = run.path / "analysis" / f"{analysis}.json"
        record = read_json(path, RESULTS[analysis], 1)
        if not _whole(record, analysis):
            raise DitlabError(f"{path}: expected a whole result, found one that lacks fields")
        about = record["about"]
        expected = (run.config.training.steps, True, run.record.split.hash)
        if tuple(about.get(name) for name in ("step", "ema", "split_hash")) != expected:
            raise DitlabError(f"{path}: expected a result of the averaged weights of step {expected[0]}, found another")
        if about.get("settings", {}).get("images_from", "test") != "test":
            raise DitlabError(f"{path}: expected a result on held-out images, found one on other images")
        if not measured_alike(record, plan, analysis):
            raise DitlabError(f"{path}: expected a result with the study's settings, found other settings")
        write_json(self.cell(cell.hash) / f"{analysis}.json", record)
        known = self.record(cell.hash, "cell")
        if known is not None and spent is not None:
            known["spent"][analysis] = asdict(spent)
            write_json(self.cell(cell.hash) / "cell.json", known)


def _whole(record: Mapping[str, Any], file: str) -> bool:
    """Whether a record has the fields that everything here relies on."""
    wanted = _FIELDS.get(file, {})
    # A whole number is a number too.
    return all(isinstance(record.get(name), (float, int) if kind is float else kind) for name, kind in wanted.items())


def measured_alike(record: Mapping[str, Any], plan: Plan, analysis: str) -> bool:
    """Whether a result was measured with a plan's settings."""
    found = record.get("config", {})
    return all(found.get(name) == value for name, value in plan.analyses[analysis].items())


def _without_path(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "data": {name: value for name, value in config["data"].items() if name != "path"}}


def _step_seconds(log: list[dict[str, Any]]) -> float:
    """Time of the training steps by the log, over all the times that the run was taken up."""
    seconds, before = 0.0, 0
    for line in log:
        rate = line.get("machine", {}).get("images_per_second", 0)
        if rate:
            seconds += (line["images"] - before) / rate
            before = line["images"]
    return seconds
