"""`torchrun -m ditlab train`: what the first process refuses or has finished, the others take quietly."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ditlab.cli.train import Train
from ditlab.config import RunConfig
from ditlab.errors import DitlabError
from ditlab.models.creating import start, train_run
from ditlab.models.run import Run
from ditlab.training.config import TrainingConfig
from ditlab.training.distributed import DistributedContext, pick_device
from ditlab.training.trainer import check_batch

TINY = [
    "--size",
    "8",
    "-n",
    "20",
    "--test",
    "20",
    "--network.width",
    "16",
    "--network.heads",
    "2",
    "--network.depth",
    "2",
    "--training.steps",
    "2",
    "--training.log-every",
    "1",
    "--evaluation.images",
    "2",
    "--evaluation.levels",
    "0",
    "--device",
    "cpu",
]


def torchrun(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # -n, not --n: torchrun takes the latter for an abbreviation of its own options.
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "ditlab"]
    return subprocess.run(
        [*command, "train", "dit-nano/1", "--data", "digits", *TINY, *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_two_processes_at_the_command_line(tmp_path):
    done = torchrun(tmp_path, "--out", "run", "--training.batch-size", "9")
    assert done.returncode
    errors = [line for line in done.stderr.splitlines() if line.startswith("ditlab: ")]
    assert errors == ["ditlab: training: batch_size 9 must be a multiple of accumulate x processes = 2"]
    assert "init_process_group" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["image-sets"]
    words = ("--out", "run", "--training.batch-size", "8")
    done = torchrun(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    done = torchrun(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "note: run is finished (2 steps)\n"


@pytest.mark.slow
def test_a_run_resumes_sharded_at_the_command_line(tmp_path):
    words = ("--out", "run", "--training.batch-size", "8", "--evaluation.levels", "2")
    done = torchrun(tmp_path, *words, "--shard", "--checkpoint-activations")
    assert done.returncode == 0, done.stderr
    run = Run.open(tmp_path / "run")
    assert (run.config.training.shard, run.config.training.checkpoint_activations) == (True, True)
    assert (run.checkpoints.steps(), run.log[-1]["step"]) == ([2], 2)
    train_run(
        start(run.path, replaced(run.config, steps=4, shard=False), run.images, device=torch.device("cpu")),
        DistributedContext(0, 1, torch.device("cpu")),
    )
    run = Run.open(run.path)
    assert run.finished
    assert (run.checkpoints.steps(), run.config.training.shard) == ([2, 4], False)
    assert [line["step"] for line in run.log if math.isfinite(line.get("psnr_gap", math.nan))] == [0, 2, 4]
    words = (*words, "--training.steps", "6", "--training.shard", "--training.checkpoint-activations")
    done = torchrun(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert ", resuming from step 4" in done.stdout
    assert done.stdout.count("note: training run on ") == 1
    assert Run.open(run.path).finished


def replaced(config: RunConfig, **training: Any) -> RunConfig:
    return replace(config, training=replace(config.training, **training))


@pytest.mark.parametrize("command", [[], ["--shard"], ["--training.shard"], ["--shard", "--training.shard"]])
def test_both_names_of_the_flag(command):
    training = Train.parse(["dit-nano/1", *command]).config.training
    assert training.shard is bool(command)
    assert not training.checkpoint_activations


def test_shares_of_a_batch():
    cpu = torch.device("cpu")
    shares = [DistributedContext(rank, 3, cpu).share(12) for rank in range(3)]
    assert [i for share in shares for i in range(12)[share]] == list(range(12))
    check_batch(TrainingConfig(batch_size=12, accumulate=2), DistributedContext(0, 3, cpu))
    with pytest.raises(DitlabError, match="batch_size 8 must be a multiple of accumulate x processes = 3"):
        check_batch(TrainingConfig(batch_size=8), DistributedContext(0, 3, cpu))


def test_one_process_is_all_there_is():
    alone = DistributedContext(0, 1, torch.device("cpu"))
    value = torch.tensor(3.0)
    assert alone.mean(value) is value
    assert (alone.is_main, alone.any(True), alone.any(False)) == (True, True, False)
    alone.wait()


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device(None).type in ("cpu", "cuda")
    with pytest.raises(DitlabError, match="expected 'cpu', 'cuda' or 'cuda:N', found 'abacus'"):
        pick_device("abacus")
    with pytest.raises(
        DitlabError, match=r"`device`: expected one of the \d+ CUDA devices of this machine, found 'cuda:99'"
    ):
        pick_device("cuda:99")
