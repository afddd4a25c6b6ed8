"""`torchrun -m ditlab train`: what the first process refuses or has finished, the others take quietly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ditlab.errors import DitlabError
from ditlab.training.distributed import Processes, pick_device
from ditlab.training.loop import TrainingConfig, check_batch

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
    said = [line for line in done.stderr.splitlines() if line.startswith("ditlab: ")]
    assert said == ["ditlab: training: batch_size 9 must be a multiple of accumulate x processes = 2"]
    assert "init_process_group" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["image-sets"]
    words = ("--out", "run", "--training.batch-size", "8")
    done = torchrun(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    done = torchrun(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "run is finished (2 steps)\n"


def test_shares_of_a_batch():
    cpu = torch.device("cpu")
    shares = [Processes(rank, 3, cpu).share(12) for rank in range(3)]
    assert [i for share in shares for i in range(12)[share]] == list(range(12))
    check_batch(TrainingConfig(batch_size=12, accumulate=2), Processes(0, 3, cpu))
    with pytest.raises(DitlabError, match="batch_size 8 must be a multiple of accumulate x processes = 3"):
        check_batch(TrainingConfig(batch_size=8), Processes(0, 3, cpu))


def test_one_process_is_all_there_is():
    alone = Processes(0, 1, torch.device("cpu"))
    value = torch.tensor(3.0)
    assert alone.mean(value) is value
    assert (alone.first, alone.any(True), alone.any(False)) == (True, True, False)
    alone.wait()


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device(None).type in ("cpu", "cuda")
    with pytest.raises(DitlabError, match="expected 'cpu', 'cuda' or 'cuda:N', found 'abacus'"):
        pick_device("abacus")
    with pytest.raises(DitlabError, match=r"--device cuda:99: this machine has \d+ CUDA devices"):
        pick_device("cuda:99")
