"""Statistics across a batch, with memory or without: the same in one process and in two, and after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import statistics_runs  # noqa: E402
import test_trainer  # noqa: E402

from ditlab.training.checkpoint import CheckpointStore  # noqa: E402

ALONE = test_trainer.ALONE
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in test_trainer.lines(folder) if "loss" in line]


def remembered(folder: Path) -> dict:
    store = CheckpointStore(folder / "checkpoints")
    return store.load(store.steps()[-1]).state["objective"]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A folder with a run of two processes for each scene."""
    folder = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    scenes = [scene for scene in statistics_runs.SCENES if scene != "killed"]
    done = subprocess.run(
        [*launch, str(HERE / "statistics_runs.py"), str(folder), *scenes],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("scene", ["unet", "cnn", "shard", "edm"])
def test_two_processes_divide_by_the_deviation_of_the_whole_batch(two, tmp_path, scene):
    statistics_runs.SCENES[scene](tmp_path, ALONE)
    np.testing.assert_allclose(losses(two / scene), losses(tmp_path), rtol=1e-5)
    for one, other in zip(test_trainer.everything(tmp_path)[:2], test_trainer.everything(two / scene)[:2], strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-5, msg=f"{scene} {name}")


@pytest.mark.slow
@pytest.mark.parametrize("scene", ["importance", "importance-accumulate"])
def test_two_processes_remember_the_same_losses(two, tmp_path, scene):
    statistics_runs.SCENES[scene](tmp_path, ALONE)
    assert len(losses(tmp_path)) == 20
    np.testing.assert_allclose(losses(two / scene), losses(tmp_path), rtol=1e-5)
    one, other = remembered(tmp_path), remembered(two / scene)
    assert one["counts"] == other["counts"]


def test_importance_sampling_weighs_its_losses_in_training(tmp_path):
    statistics_runs.importance(tmp_path / "importance", ALONE)
    assert set(json.loads(json.dumps(remembered(tmp_path / "importance")))) == {"time_sampling", "losses", "counts"}
    statistics_runs.importance(tmp_path / "accumulate", ALONE, accumulate=4)
    # Cut into micro-batches it sees the same losses in the same order.
    np.testing.assert_allclose(losses(tmp_path / "accumulate"), losses(tmp_path / "importance"), rtol=1e-4)


@pytest.mark.slow
def test_a_kill_loses_nothing_of_what_is_remembered(tmp_path):
    done = subprocess.run(
        [sys.executable, str(HERE / "statistics_runs.py"), str(tmp_path), "killed"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert CheckpointStore(tmp_path / "killed" / "checkpoints").steps() == [7, 14]
    statistics_runs.importance(tmp_path / "killed", ALONE)
    statistics_runs.importance(tmp_path / "whole", ALONE)
    test_trainer.assert_equal(tmp_path / "whole", tmp_path / "killed")
