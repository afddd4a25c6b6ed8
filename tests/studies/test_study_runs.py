"""Studies at work on six tiny trials: killed, half deleted, on a full disk, failed, shared; nothing lost or done twice."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from threading import Timer

import numpy as np
import pytest

from ditlab.analyses.psnr_gap.result import PSNRResult
from ditlab.config import RunConfig, from_json
from ditlab.errors import DitlabError
from ditlab.studies.grid import Plan
from ditlab.studies.results import facets, psnr_of_levels
from ditlab.studies.store import Store
from ditlab.studies.trial import trial_hash

pytestmark = pytest.mark.slow


def plan_of(folder: Path) -> Plan:
    return Plan.load(folder / "out" / "tiny-six-smoke" / "plan.json")


def numbers(folder: Path) -> dict[str, dict]:
    """Everything that a trial's committed files say, but for times and places."""
    found = {}
    for cell in sorted((folder / "out" / "cells").iterdir()):
        files = {path.name: json.loads(path.read_text()) for path in sorted(cell.iterdir())}
        for name in ("command", "environment", "step_seconds", "memory_bytes", "spent"):
            files["cell.json"].pop(name)
        files["psnr-gap.json"]["about"].pop("name", None)
        found[cell.name] = files
    return found


def steps(folder: Path, name: str) -> list[int]:
    log = folder / "out" / "runs" / name / "log.jsonl"
    return [json.loads(line)["step"] for line in log.read_text().splitlines()]


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_a_killed_runner_loses_nothing_and_trains_nothing_twice(unbroken, commands, ditlab, tmp_path):
    """Killed with -9 amid six runs; the same command again: the table is that of an unbroken study."""
    pytest.importorskip("fcntl")
    runs = tmp_path / "out" / "runs"
    first = commands.start(tmp_path, *commands.run)
    # One trial is on record, and another is being trained and has a checkpoint.
    wait_for(lambda: any((tmp_path / "out" / "cells").glob("*/psnr-gap.json")))
    wait_for(lambda: len(list(runs.glob("*/checkpoints/0*"))) > len(list(runs.glob("*/checkpoints/000000120"))) * 2)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    before = numbers_of_complete(tmp_path)
    assert 1 <= len(before) < 6
    done = ditlab(tmp_path, *commands.run, "--json")
    assert done.status == 0, done.err
    assert numbers(tmp_path) == numbers(unbroken)
    mtimes = {name: (tmp_path / "out" / "cells" / name / "trajectory.json").stat().st_mtime_ns for name in before}
    assert mtimes == before
    rows = json.loads(done.out)["cells"]
    assert [row["state"] for row in rows] == ["done"] * 6
    outputs = {path.stem: path.read_text() for path in runs.glob("*.txt")}
    assert len(outputs) == 6
    for name, text in outputs.items():
        # Every step was made once, whatever was interrupted, and only what was interrupted began again.
        assert steps(tmp_path, name) == steps(unbroken, name)
        begun, again = text.count("\nnote: training "), text.count("resuming from step")
        assert begun <= 1 + again + text.count("stopped and saved after step 0;"), text
    assert rows == json.loads(ditlab(unbroken, *commands.status).out)["cells"]


def numbers_of_complete(folder: Path) -> dict[str, int]:
    cells = [path.parent for path in (folder / "out" / "cells").glob("*/psnr-gap.json")]
    return {cell.name: (cell / "trajectory.json").stat().st_mtime_ns for cell in cells}


def test_what_is_on_record_is_not_done_again(unbroken, copied, commands, ditlab):
    folder = copied
    before = {path: path.stat().st_mtime_ns for path in (folder / "out" / "cells").rglob("*.json")}
    done = ditlab(folder, *commands.run)
    assert done.status == 0, done.err
    assert "6 trials, 6 on record, 0 to do" in done.out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # A second study of the same trials, or part of them, uses them.
    done = ditlab(folder, *commands.run, "--attention", "local", "--seeds", 1)
    assert "1 trials, 1 on record, 0 to do" in done.out


def test_trials_hold_their_settings_and_no_path(unbroken):
    for cell in (unbroken / "out" / "cells").iterdir():
        record = json.loads((cell / "cell.json").read_text())
        config = from_json(RunConfig, record["config"], str(cell))
        assert trial_hash(config, record["split"]["imageset"]) == cell.name == record["hash"]
        assert record["spent"].keys() == {"train", "psnr-gap"}
        assert all(str(unbroken) not in path.read_text() for path in cell.iterdir())
        assert sum(path.stat().st_size for path in cell.iterdir()) < 30_000


def test_results_without_single_errors_are_the_results(unbroken):
    for path in (unbroken / "out" / "runs").glob("*/analysis/psnr-gap.json"):
        whole = PSNRResult.load(path)
        part = psnr_of_levels(json.loads(path.read_text()))
        for side in ("train", "test"):
            np.testing.assert_allclose(part.curve(side), whole.curve(side), rtol=1e-12)
            assert part.average(side) == pytest.approx(whole.average(side), rel=1e-12)
        assert part.average_gap == pytest.approx(whole.average_gap, rel=1e-9)


def test_deleted_run_folders(unbroken, copied, commands, ditlab):
    """Recorded results stand; a trial that lacks one is trained again; the status shows which is which."""
    folder = copied
    one, two, *_ = [cell["hash"] for cell in plan_of(folder).trials]
    for name in (one, two):
        shutil.rmtree(folder / "out" / "runs" / name)
    (folder / "out" / "cells" / two / "psnr-gap.json").unlink()
    rows = {row["hash"]: row for row in json.loads(ditlab(folder, *commands.status).out)["cells"]}
    assert (rows[one]["state"], rows[one]["note"]) == ("done", "run folder deleted, its results stay valid")
    assert rows[two]["state"] == "empty"
    assert rows[two]["note"] == "run folder deleted, psnr-gap to be measured: to be trained again"
    done = ditlab(folder, *commands.run)
    assert done.status == 0, done.err
    assert "6 trials, 5 on record, 1 to do" in done.out
    assert not (folder / "out" / "runs" / one).exists()
    assert numbers(folder) == numbers(unbroken)


def test_a_record_of_before_a_setting_has_its_default(copied, commands, ditlab):
    """Results without `draws` were measured with one draw; two are another measurement, other bands are not."""
    first, second, third, *_ = [cell["hash"] for cell in plan_of(copied).trials]
    for name, changes in ((first, {}), (second, {"draws": 2}), (third, {"draws": 1, "bands": [0.2, 2.0]})):
        path = copied / "out" / "cells" / name / "psnr-gap.json"
        record = json.loads(path.read_text())
        del record["config"]["draws"], record["config"]["bands"]
        path.write_text(json.dumps(record | {"config": record["config"] | changes}))
    rows = {row["hash"]: row for row in json.loads(ditlab(copied, *commands.status).out)["cells"]}
    assert rows[first]["state"] == rows[third]["state"] == "done"
    assert rows[second]["state"] != "done"


def test_a_damaged_record_is_measured_again_and_nothing_trained(unbroken, copied, commands, ditlab):
    folder = copied
    name = plan_of(folder).trials[0]["hash"]
    (folder / "out" / "cells" / name / "psnr-gap.json").write_text('{"kind": "psnr-g')
    (folder / "out" / "runs" / name / "analysis" / "psnr-gap.json").unlink()
    (folder / "out" / "cells" / name / "cell.json").unlink()
    weights = {path: path.stat().st_mtime_ns for path in (folder / "out" / "runs" / name).rglob("*.safetensors")}
    done = ditlab(folder, *commands.run)
    assert done.status == 0, done.err
    assert re.search(r"N=10 seed 0: psnr-gap$", done.out, re.MULTILINE)
    assert not re.search(r"N=10 seed 0: train$", done.out, re.MULTILINE)
    assert weights == {path: path.stat().st_mtime_ns for path in weights}
    assert numbers(folder) == numbers(unbroken)


def test_what_was_measured_but_not_recorded_is_recorded(unbroken, copied, commands, ditlab):
    """As after a kill between the two; a result that was measured otherwise is not taken for it."""
    folder = copied
    one, two, *_ = [cell["hash"] for cell in plan_of(folder).trials]
    for name in (one, two):
        (folder / "out" / "cells" / name / "psnr-gap.json").unlink()
    other = folder / "out" / "runs" / two / "analysis" / "psnr-gap.json"
    other.write_text(other.read_text().replace('"noise_seed": 0', '"noise_seed": 7'))
    done = ditlab(folder, *commands.run)
    assert done.status == 0, done.err
    assert not re.search(r"global N=10 seed 0: psnr-gap$", done.out, re.MULTILINE)
    assert re.search(r"local N=10 seed 0: psnr-gap$", done.out, re.MULTILINE)
    assert numbers(folder) == numbers(unbroken)


def test_a_failed_trial_does_not_stop_the_others(unbroken, copied, commands, ditlab):
    """Its reason and its command are printed, at the end and by the status; tried again, it is done."""
    folder = copied
    bad, good = (cell["hash"] for cell in plan_of(folder).trials[:2])
    run = folder / "out" / "runs" / bad
    shutil.rmtree(folder / "out" / "cells" / bad)
    (folder / "out" / "cells" / good / "psnr-gap.json").unlink()
    run.rename(folder / "aside")
    run.write_text("a file where the run's folder should be")
    done = ditlab(folder, *commands.run)
    assert done.status == 2
    name = "digits dit-nano/1 global N=10 seed 0"
    reason = f"run out/runs/{bad}: expected a new folder or a run's, found a file"
    assert done.err.startswith(f"ditlab: study tiny/six: 1 of 6 trials failed (first: {name}: {reason} (status 2; ")
    assert f"{bad[:8]} failed: {reason}" in done.out
    repeat = f"python -m ditlab.studies.worker out/runs/{bad}.train.json"
    assert f"to repeat it: {repeat}" in done.out
    assert (folder / "out" / "cells" / good / "psnr-gap.json").is_file()
    rows = json.loads(ditlab(folder, *commands.status).out)["cells"]
    assert [row["state"] for row in rows] == ["failed", *["done"] * 5]
    assert reason in rows[0]["note"]
    assert rows[0]["command"] == repeat
    run.unlink()
    (folder / "aside").rename(run)
    assert ditlab(folder, *commands.run).status == 0
    assert numbers(folder) == numbers(unbroken)


def test_a_full_disk_loses_nothing(unbroken, disk_of, commands, ditlab):
    """What is on record stays, the trial fails with the reason; with room again, the same command finishes."""
    plan, disk = plan_of(unbroken), disk_of("24m")
    (disk / "out").mkdir()
    shutil.copytree(unbroken / "image-sets", disk / "image-sets")
    for part in ("cells", "runs"):
        for cell in plan.trials[:5]:
            shutil.copytree(unbroken / "out" / part / cell["hash"], disk / "out" / part / cell["hash"])
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass
    # Room for the plan and for the start of a run, not for its weights.
    os.truncate(filler, filler.stat().st_size - 40 * 1024)
    recorded = sorted(path.name for path in (disk / "out" / "cells").iterdir())
    done = ditlab(disk, *commands.run)
    assert done.status == 2, done.err
    assert "1 of 6 trials failed" in done.err
    assert re.search("disk is full|No space left", done.err)
    assert sorted(path.name for path in (disk / "out" / "cells").iterdir()) == recorded
    filler.unlink()
    done = ditlab(disk, *commands.run)
    assert done.status == 0, done.err
    assert numbers(disk) == numbers(unbroken)


def test_the_status_shows_a_damaged_run(copied, commands, ditlab):
    name = plan_of(copied).trials[0]["hash"]
    shutil.rmtree(copied / "out" / "cells" / name)
    (copied / "out" / "runs" / name / "config.json").write_text("{")
    row, *others = json.loads(ditlab(copied, *commands.status).out)["cells"]
    assert (row["state"], {other["state"] for other in others}) == ("failed", {"done"})
    assert "config.json: expected JSON" in row["note"]


def test_another_runners_trial_is_left_to_it(unbroken, tmp_path):
    pytest.importorskip("fcntl")
    store = Store(tmp_path / "out")
    with store.lock("ab") as mine:
        assert mine
        assert Store(tmp_path / "out").locked("ab")
        with Store(tmp_path / "out").lock("ab") as theirs:
            assert not theirs
    assert not store.locked("ab")
    # Reading whether a trial is locked takes it from nobody, however many read.
    with (tmp_path / "out" / "runs" / "ab.lock").open() as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_SH)
        assert not store.locked("ab")
        with store.lock("ab") as mine:
            assert not mine
        Timer(0.01, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        with store.lock("ab") as mine:
            assert mine
    plan = plan_of(unbroken)
    name = plan.trials[0]["hash"]
    with store.lock(name):
        assert store.status(name, plan).state == "running"
    assert store.status(name, plan).state == "empty"


def test_runs_of_different_splits_are_refused(copied):
    """A trial whose record was changed to another split does not get into one table with the others."""
    folder = copied
    plan = plan_of(folder)
    path = folder / "out" / "cells" / plan.trials[0]["hash"] / "psnr-gap.json"
    record = json.loads(path.read_text())
    record["about"]["split_family"] = "f" * 64
    path.write_text(json.dumps(record))
    (facet,) = facets(plan, Store(folder / "out"))
    with pytest.raises(DitlabError, match="have different splits"):
        assert facet.comparison
