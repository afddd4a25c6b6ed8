"""Where studies keep results: small JSON files of every trial, made to be committed, beside the run folders.

    OUT/
      cells/HASH/    cell.json  trajectory.json  psnr-gap.json  attention.json: the results of a trial
      runs/HASH/     the run's folder (weights; not to be committed)
      runs/          HASH.txt, the output of its processes; HASH.STAGE.json, what each of them was to do
      STUDY-SCALE/   plan.json  report.html  table.csv  table.json  figures/

Each file is written whole or not at all. What is recorded in `cells/` stays valid if the run's folder is deleted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ditlab.analyses import analysis as find_analysis
from ditlab.analyses.cache import same_config
from ditlab.analyses.stored import config_from_json
from ditlab.config import to_json
from ditlab.errors import Damaged, DitlabError, Incompatible, InvalidConfig
from ditlab.files import read_json, write_json
from ditlab.models.run import Run
from ditlab.provenance import Provenance
from ditlab.studies.grid import Plan
from ditlab.studies.runner import ResourceUse
from ditlab.studies.trial import Trial, trial_hash
from ditlab.training.checkpoint import read_manifest

try:
    import fcntl
except ImportError:  # Windows has no such lock; there the user must not start two runners on one store
    fcntl = None

__all__ = ["TRAINED", "State", "Store", "TrialStatus"]

TRAINED = ("cell", "trajectory")
"""The files of a trial's training."""
_FIELDS: Mapping[str, Mapping[str, type]] = {
    "cell": {"name": str, "split": dict, "spent": dict, "environment": dict, "command": str},
    "trajectory": {"points": list},
    "psnr-gap": {"about": dict, "config": dict, "averages": dict, "curves": dict, "peak": float},
}
"""File -> fields without which it counts as damaged, and their types; of other analyses "about" and "config"."""

_PROBES, _PROBE_SECONDS = 3, 0.02
"""How often a trial's lock is tried, and the pause between: `locked` holds it for a moment."""

State = Literal["empty", "partial", "running", "trained", "failed", "done"]


@dataclass(frozen=True)
class TrialStatus:
    """How far a trial is."""

    state: State
    note: str = ""
    """Details, for a table."""
    command: str | None = None
    """What repeats the process that failed, if one is known to have failed."""


class Store:
    """The folder that studies share."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def plan(self, study: str, scale: str) -> Path:
        """Returns the folder of a study at a scale."""
        return self.root / f"{study.replace('/', '-')}-{scale}"

    def trial(self, name: str) -> Path:
        """Returns the folder of a trial's results."""
        return self.root / "cells" / name

    def run(self, name: str) -> Path:
        """Returns the folder of a trial's run."""
        return self.root / "runs" / name

    def file(self, name: str, ending: str) -> Path:
        """Returns a file beside a trial's run: "txt", the output of its processes; "STAGE.json", what one is to do."""
        return self.root / "runs" / f"{name}.{ending}"

    @contextmanager
    def lock(self, name: str) -> Iterator[bool]:
        """Holds a trial for this process, unless another process holds it; yields whether it does.

        The lock is released when the process ends, however it ends.
        """
        if fcntl is None:
            yield True
            return
        path = self.file(name, "lock")
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
        """Returns whether a runner works on a trial at this moment."""
        if fcntl is None:
            return False
        try:
            with self.file(name, "lock").open() as file:
                # Shared, so that several readers do not block each other.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no lock was ever made, or it may not be read: no runner works there
            pass
        return False

    def record(self, name: str, file: str) -> dict[str, Any] | None:
        """Returns one of a trial's JSON files; None if it is missing or damaged, so that it is made again."""
        kind, version = (f"study-{file}", 1) if file in TRAINED else _kind(file)
        try:
            record = read_json(self.trial(name) / f"{file}.json", kind, version)
        except DitlabError:
            return None
        return record if _whole(record, file) else None

    def records(self, name: str, plan: Plan) -> dict[str, dict[str, Any]]:
        """Returns file -> JSON of what is on record of a trial: its training, and analyses with the plan's settings."""
        records = {}
        for file in (*TRAINED, *plan.analyses):
            record = self.record(name, file)
            if record is not None and (file in TRAINED or _measured_alike(record, plan, file)):
                records[file] = record
        return records

    def missing(self, name: str, plan: Plan) -> list[str]:
        """Returns the files that a plan asks of a trial and that are not on record."""
        records = self.records(name, plan)
        return [file for file in (*TRAINED, *plan.analyses) if file not in records]

    def status(self, name: str, plan: Plan) -> TrialStatus:
        """Returns how far a trial is, from the files on the disk."""
        folder = self.run(name)
        gone = "" if folder.is_dir() else "run folder deleted"
        missing = self.missing(name, plan)
        if not missing:
            return TrialStatus("done", f"{gone}, its results stay valid" if gone else "")
        if self.locked(name):
            return TrialStatus("running")
        with suppress(DitlabError):
            failure = read_json(self.file(name, "failed.json"), "study-failure", 1)
            return TrialStatus("failed", failure["reason"], failure["command"])
        if not {*TRAINED} & {*missing}:
            todo = f"{' and '.join(missing)} to be measured"
            if gone:
                return TrialStatus("empty", f"{gone}, {todo}: to be trained again")
            return TrialStatus("trained", todo)
        if (folder / "config.json").is_file():
            try:
                steps = Run.open(folder).checkpoints.steps()
            except DitlabError as error:
                return TrialStatus("failed", str(error))
            return TrialStatus("partial", f"step {steps[-1]:,} saved" if steps else "started")
        return TrialStatus("empty")

    def note_failure(self, name: str, reason: str, command: str) -> None:
        """Records why a trial failed; if the disk is too full for that, only the note is lost."""
        record = {"kind": "study-failure", "version": 1, "reason": reason, "command": command}
        with suppress(DitlabError):
            write_json(self.file(name, "failed.json"), record)

    def forget_failure(self, name: str) -> None:
        """Removes the note of a failure."""
        self.file(name, "failed.json").unlink(missing_ok=True)

    def record_training(self, trial: Trial, images: Mapping[str, Any], use: ResourceUse | None) -> None:
        """Writes trajectory.json and then cell.json from a finished run's folder.

        `images` is what the plan says of its image set; `use` is None where not all of its processes are known.

        Raises:
            DitlabError: the run is not finished, or is another trial's; or the disk is full.
        """
        run = Run.open(self.run(trial.hash))
        actual = trial_hash(run.config, run.record.split.imageset)
        if actual != trial.hash:
            raise Incompatible(f"run {run.path}: expected the settings of trial {trial.hash}, found those of {actual}")
        if not run.finished:
            raise Incompatible(f"run {run.path}: expected {run.config.training.steps} steps, found fewer")
        log, folder = run.log, self.trial(trial.hash)
        names = ("step", "train_psnr", "test_psnr", "psnr_gap", "train_loss", "test_loss")
        points = [{name: line[name] for name in names if name in line} for line in log if "train_loss" in line]
        config = to_json(run.config)
        config["data"].pop("path")
        write_json(folder / "trajectory.json", {"kind": "study-trajectory", "version": 1, "points": points})
        write_json(
            folder / "cell.json",
            {
                "kind": "study-cell",
                "version": 1,
                **trial.place(),
                "name": trial.name,
                "images": dict(images),
                "split": asdict(run.record.split),
                "config": config,
                "command": run.record.command,
                "environment": run.record.environment,
                "step_seconds": round(_step_seconds(log), 1),
                "spent": {} if use is None else {"train": asdict(use)},
                "memory_bytes": max((line.get("machine", {}).get("memory_bytes", 0) for line in log), default=0),
            },
        )

    def record_analysis(self, trial: Trial, plan: Plan, analysis: str, use: ResourceUse | None) -> None:
        """Copies an analysis from the run's folder to the trial's results, and what it used into cell.json.

        Raises:
            DitlabError: the analysis is missing, damaged, of other weights or images, or made with other settings; or
                the disk is full.
        """
        run = Run.open(self.run(trial.hash))
        path = run.path / "analysis" / f"{analysis}.json"
        record = read_json(path, *_kind(analysis))
        if not _whole(record, analysis):
            raise Damaged(f"{path}: expected a whole result, found one without some fields")
        try:
            about = Provenance(**record["about"])
        except TypeError:
            raise Damaged(f"{path}: expected a whole result, found other fields") from None
        step = run.config.training.steps
        weights = read_manifest(run.checkpoints.path(step)).weights_hash()
        if not about.same_model(replace(run.provenance(step), weights=weights)):
            raise Incompatible(
                f"{path}: expected a result of the averaged weights of step {step} on the run's own split, found "
                "another"
            )
        if about.settings.get("images_from", "test") != "test":
            raise Incompatible(f"{path}: expected a result on held-out images, found one on other images")
        if not _measured_alike(record, plan, analysis):
            raise Incompatible(f"{path}: expected a result with the study's settings, found other settings")
        write_json(self.trial(trial.hash) / f"{analysis}.json", record)
        known = self.record(trial.hash, "cell")
        if known is not None and use is not None:
            known["spent"][analysis] = asdict(use)
            write_json(self.trial(trial.hash) / "cell.json", known)


def _kind(analysis: str) -> tuple[str, int]:
    """The kind and the newest known version of the JSON of an analysis's results."""
    result = find_analysis(analysis).result_class()
    return result.kind, result.version


def _whole(record: Mapping[str, Any], file: str) -> bool:
    """Whether a record has the fields that are read from it."""
    fields = _FIELDS.get(file, {"about": dict, "config": dict})
    # JSON writes whole numbers without a point.
    return all(isinstance(record.get(name), (float, int) if kind is float else kind) for name, kind in fields.items())


def _measured_alike(record: Mapping[str, Any], plan: Plan, analysis: str) -> bool:
    """Whether a plan's settings are those of a result; one that an older record does not name had its default."""
    kind, config = find_analysis(analysis).Config, record.get("config", {})
    try:
        measured, wanted = (config_from_json(kind, c) for c in (config, {**config, **plan.analyses[analysis]}))
    except (TypeError, InvalidConfig):
        return False
    return same_config(measured, wanted)


def _step_seconds(log: list[dict[str, Any]]) -> float:
    """Seconds of all training steps by the log, those before resuming included."""
    seconds, before = 0.0, 0
    for line in log:
        rate = line.get("machine", {}).get("images_per_second", 0)
        if rate:
            seconds += (line["images"] - before) / rate
            before = line["images"]
    return seconds
