"""Training that is stopped, killed, damaged or continued ends where one that nothing disturbed does."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ditlab.errors import DitlabError
from ditlab.progress import StopFlag
from ditlab.training.checkpoint import CheckpointStore
from ditlab.training.log import read_log
from ditlab.training.trainer import TrainingInterrupted

sys.path.insert(0, str(Path(__file__).parent))

from test_checkpoint import as_format_1
from test_trainer import assert_equal, everything, lines, run


def test_stopped_and_resumed_equals_unbroken(tmp_path):
    calls = []

    def evaluate(step):
        calls.append(step)
        return {"measured": float(step)}

    run(tmp_path / "whole", 12, evaluate=evaluate)
    stop = StopFlag()

    def stop_at_seven(step):
        stop.set = step == 4
        return evaluate(step)

    with pytest.raises(TrainingInterrupted) as raised:
        run(tmp_path / "parts", 12, evaluate=stop_at_seven, stop=stop)
    assert raised.value.step == 4
    run(tmp_path / "parts", 12, evaluate=evaluate)
    assert_equal(tmp_path / "whole", tmp_path / "parts")
    assert [line["step"] for line in lines(tmp_path / "whole")] == [0, 3, 4, 6, 8, 9, 12]


def test_more_steps_later_equals_more_steps_at_once(tmp_path):
    run(tmp_path / "once", 9)
    run(tmp_path / "twice", 5)
    run(tmp_path / "twice", 9)
    for a, b in zip(everything(tmp_path / "once")[:3], everything(tmp_path / "twice")[:3], strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor))


STAGES = ("before", "middle", "before rename", "after rename", "between saves")

CHILD = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {here!r})
import torch; torch.set_num_threads(1)
import test_trainer
from ditlab.training import checkpoint
folder, stage, at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
saves = 0
def die(name):
    global saves
    saves += name == "before"
    if name == stage and saves == at:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint._stage = die
def evaluate(step):
    if stage == "between saves" and step == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return {{"measured": float(step)}}
test_trainer.run(folder, 20, evaluate=evaluate)
"""


@pytest.mark.slow
def test_kill_at_every_stage_of_a_save_loses_nothing(tmp_path):
    """2n steps equal n steps + kill -9 + n steps, to the bit: weights, averages, optimizer, log."""
    here = str(Path(__file__).parent)
    children = {
        stage: subprocess.Popen(
            [sys.executable, "-c", CHILD.format(here=here), str(tmp_path / stage), stage, "2"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for stage in STAGES
    }
    whole = tmp_path / "whole"
    run(whole, 20, evaluate=lambda step: {"measured": float(step)})
    for stage, child in children.items():
        assert child.wait(timeout=120) == -signal.SIGKILL, stage
        saved = CheckpointStore(tmp_path / stage / "checkpoints").steps()
        assert saved == ([5, 10] if stage in ("after rename", "between saves") else [5]), stage
        run(tmp_path / stage, 20, evaluate=lambda step: {"measured": float(step)})
        assert_equal(whole, tmp_path / stage)
        assert sorted(p.name for p in (tmp_path / stage / "checkpoints").iterdir()) == ["000000015", "000000020"]


TWO = """
import sys
from contextlib import contextmanager
from pathlib import Path
sys.path.insert(0, {here!r})
import torch; torch.set_num_threads(1)
import test_trainer
from ditlab.training.distributed import init_distributed
with init_distributed("cpu") as here:
    test_trainer.run(Path(sys.argv[1]), 10, context=here, log_every=1, evaluate=lambda step: {{"measured": 1.0}})
"""


@pytest.mark.slow
def test_two_processes_train_the_same_run(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO.format(here=str(Path(__file__).parent)))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--standalone",
            str(script),
            str(tmp_path / "two"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    run(tmp_path / "one", 10, log_every=1, evaluate=lambda step: {"measured": 1.0})
    one = [line["loss"] for line in lines(tmp_path / "one") if "loss" in line]
    two = [line["loss"] for line in lines(tmp_path / "two") if "loss" in line]
    assert len(one) == 10
    np.testing.assert_allclose(two, one, rtol=1e-5)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_passed_over_in_resuming(tmp_path, name):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, 12)
    run(parts, 10)
    file = parts / "checkpoints" / "000000010" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    notes = []
    run(parts, 12, note=notes.append)
    assert len(notes) == 1
    assert re.fullmatch(rf"{file}: .*; going back to the checkpoint of step 5", notes[0])
    assert_equal(whole, parts)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda log: log[:-2], "the lines of these steps are lost: 6, 8"),
        (lambda log: [log[0], *log[2:]], "the lines of these steps are lost: 3"),
        (lambda log: [log[0], "{" + log[1], *log[2:]], "the lines of these steps are lost: 3"),
        (lambda log: [], "the lines of these steps are lost: 0, 3, 4, 6, 8"),
        (lambda log: [*log[:-1], log[-1].replace(": 8.0", ": 18.0")], "its lines were changed"),
    ],
    ids=["cut", "middle", "unreadable", "emptied", "changed"],
)
def test_lost_lines_of_the_log_are_named(tmp_path, change, says):
    stop = StopFlag()

    def evaluate(step):
        stop.set = step == 8
        return {"measured": float(step)}

    with pytest.raises(TrainingInterrupted):
        run(tmp_path, 12, evaluate=evaluate, stop=stop)
    path = tmp_path / "log.jsonl"
    log = path.read_text().splitlines(keepends=True)
    damaged = change(log)
    path.write_text("".join(damaged))
    readable = [line for line in damaged if not line.startswith("{{")]
    notes = []
    run(tmp_path, 12, evaluate=evaluate, note=notes.append)
    size, left = (sum(map(len, part)) for part in (log, readable))
    expected = f"{path}: expected 5 lines ({size} bytes) up to step 8, found {len(readable)} ({left} bytes); {says}"
    assert notes == [expected]
    assert [line["step"] for line in lines(tmp_path)][-2:] == [9, 12]
    # The next checkpoint was written with the log as it is now.
    notes.clear()
    run(tmp_path, 15, evaluate=evaluate, note=notes.append)
    assert notes == []


def test_a_longer_log_is_cut_back(tmp_path):
    run(tmp_path, 6)
    path = tmp_path / "log.jsonl"
    before = path.read_text()
    path.write_text(before + '{"step": 9, "loss": 1.0}\n{"step": 12, "lo')
    notes = []
    run(tmp_path, 6, note=notes.append)
    assert (notes, path.read_text()) == ([], before)


def test_a_run_of_the_old_form_is_resumed(tmp_path):
    run(tmp_path / "whole", 9)
    run(tmp_path / "parts", 5)
    as_format_1(tmp_path / "parts" / "checkpoints" / "000000005", **kept_state(tmp_path / "parts", 5))
    notes = []
    run(tmp_path / "parts", 9, note=notes.append)
    assert notes == []
    for a, b in zip(everything(tmp_path / "whole")[:3], everything(tmp_path / "parts")[:3], strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor))
    # A value of the state that nothing vouches for gives a sentence.
    as_format_1(tmp_path / "parts" / "checkpoints" / "000000009", loss_sum="much")
    with pytest.raises(DitlabError, match=r"state\.json: expected the state of a training run, found another"):
        run(tmp_path / "parts", 12)


def kept_state(folder: Path, step: int) -> dict:
    state = CheckpointStore(folder / "checkpoints").load(step).state
    return {name: state[name] for name in ("images", "loss_sum", "loss_count", "objective")}


def test_a_log_cut_in_its_last_line_is_read(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_log(path) == [{"step": 1}]
    path.write_text("nonsense\n" + json.dumps({"step": 1}) + "\n")
    with pytest.raises(DitlabError, match="line 1: expected a JSON object with a step, found 'nonsense'"):
        read_log(path)
