"""Sharded training and recomputed activations: the same numbers as without them, in less memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import sharded_runs  # noqa: E402
import test_trainer  # noqa: E402

from ditlab.training.checkpoint import CheckpointStore  # noqa: E402
from ditlab.training.sharding import Gathered, checkpoint_activations, like_placement, to_local  # noqa: E402

ALONE = test_trainer.ALONE


def two_processes(folder: Path, *scenes: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    return subprocess.run(
        [*launch, str(HERE / "sharded_runs.py"), str(folder), *scenes],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with `one/` and `two/` processes' runs, and `mixed/`, begun by one and ended by two or the reverse."""
    folder = tmp_path_factory.mktemp("sharded")
    for scene in ("plain", "accumulate", "half"):
        sharded_runs.SCENES[scene](folder / "one" / scene, ALONE)
    sharded_runs.SCENES["to-five"](folder / "two" / "one-then-two", ALONE)
    done = two_processes(folder / "two", "killed")
    assert done.returncode
    assert CheckpointStore(folder / "two" / "killed" / "checkpoints").steps() == [5]
    scenes = [s for s in sharded_runs.SCENES if s not in ("to-five", "from-five", "killed", "after-kill")]
    mixed = ["from-five@one-then-two", "to-five@two-then-one", "after-kill@killed"]
    done = two_processes(folder / "two", *scenes, *mixed)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    sharded_runs.SCENES["from-five"](folder / "two" / "two-then-one", ALONE)
    return folder


def values(folder: Path, name: str) -> list[float]:
    return [line[name] for line in test_trainer.lines(folder) if name in line]


def assert_close(two: Path, one: Path, *, losses: float = 1e-5, weights: float = 1e-5) -> None:
    np.testing.assert_allclose(values(two, "loss"), values(one, "loss"), rtol=losses)
    np.testing.assert_allclose(values(two, "measured"), values(one, "measured"), rtol=10 * losses, atol=1e-8)
    assert len(values(two, "loss")) >= 10
    assert len(values(two, "measured")) >= 3
    for left, right in zip(test_trainer.everything(two)[:3], test_trainer.everything(one)[:3], strict=True):
        assert list(left) == list(right)
        for name, value in left.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, right[name], rtol=0, atol=weights, msg=name)
            else:
                assert value == right[name], name


@pytest.mark.slow
@pytest.mark.parametrize("scene", ["plain", "accumulate", "again", "compiled"])
def test_two_sharded_processes_train_what_one_does(runs, scene):
    """Losses, measured averages, and all of the checkpoint: weights, averages, optimizer."""
    assert_close(runs / "two" / scene, runs / "one" / (scene if scene == "accumulate" else "plain"))


@pytest.mark.slow
def test_bf16(runs):
    """Each process rounds the gradients of its own half, so they are as near as that lets them be."""
    assert_close(runs / "two" / "half", runs / "one" / "half", losses=3e-4, weights=3e-3)
    assert (
        np.abs(np.subtract(values(runs / "two" / "half", "loss"), values(runs / "two" / "plain", "loss"))).max() > 1e-5
    )
    test_trainer.assert_equal(runs / "two" / "half", runs / "two" / "half-again")


@pytest.mark.slow
def test_every_process_holds_one_part(runs):
    held = [json.loads((runs / "two" / "plain" / f"held-{rank}.json").read_text()) for rank in range(2)]
    for name, (_, whole) in held[0].items():
        parts = [process[name][0] for process in held]
        assert sum(parts) == whole, name
        assert max(parts) < 0.52 * whole, name
    assert held[0]["optimizer"][1] == 2 * held[0]["weights"][1]


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["one-then-two", "two-then-one"])
def test_a_run_goes_on_sharded_or_not(runs, folder):
    assert_close(runs / "two" / folder, runs / "one" / "plain")


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["stopped", "killed"])
def test_stopped_and_killed_runs_go_on_to_the_bit(runs, folder):
    test_trainer.assert_equal(runs / "two" / folder, runs / "two" / "long")
    assert sorted(p.name for p in (runs / "two" / folder / "checkpoints").iterdir()) == ["000000015", "000000020"]


@pytest.mark.slow
def test_recomputed_dropout_is_the_same_dropout(runs):
    test_trainer.assert_equal(runs / "two" / "dropout-again", runs / "two" / "dropout")
    assert values(runs / "two" / "dropout", "loss") != values(runs / "two" / "plain", "loss")


@pytest.mark.slow
def test_a_network_without_blocks_is_sharded_as_one(runs):
    """Also: its counters and running statistics are those of the first process, as with replicas."""
    assert_close(runs / "two" / "unblocked", runs / "two" / "unblocked-replicas", weights=1e-6)


def test_one_process_shards_nothing_and_says_so(tmp_path):
    notes = []
    network = test_trainer.run(tmp_path / "a", 3, shard=True, note=notes.append)
    assert notes == ["there is one process, so nothing is sharded; start several with torchrun"]
    assert all(to_local(p) is p for p in network.parameters())
    test_trainer.run(tmp_path / "b", 3)
    test_trainer.assert_equal(tmp_path / "a", tmp_path / "b")


def test_recomputing_changes_no_bit(tmp_path):
    for again in (False, True):
        for name, network in (("plain", test_trainer.small()), ("dropout", sharded_runs.dropping())):
            sharded_runs.train(tmp_path / f"{name}-{again}", ALONE, network=network, again=again, accumulate=2)
    for name in ("plain", "dropout"):
        test_trainer.assert_equal(tmp_path / f"{name}-True", tmp_path / f"{name}-False")


def saved_bytes(network: torch.nn.Module) -> int:
    """Bytes that the forward pass keeps for the backward pass, the weights themselves not counted."""
    known = {p.untyped_storage().data_ptr() for p in network.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(test_trainer.Noise().all[:8], torch.rand(8), torch.zeros(8, dtype=torch.int64)).sum()
        return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def test_recomputing_saves_memory():
    """Of each block its input alone is saved, so the bytes of one more block are those of its input."""
    saved = {}
    for depth in (4, 8):
        for again in (False, True):
            network = test_trainer.small(depth=depth, attention=f"g*{depth}")
            if again:
                assert checkpoint_activations(network)
            saved[depth, again] = saved_bytes(network)
    block, recomputed = ((saved[8, again] - saved[4, again]) / 4 for again in (False, True))
    tokens = 8 * 16 * 32 * 4
    assert recomputed == tokens
    assert (
        block > 12 * tokens
    )  # at least: inputs of two norms, of three Linears (one four times as wide), q, k, v, GELU
    assert saved[8, True] < 0.25 * saved[8, False]


def test_a_network_without_blocks_is_not_run_twice():
    network = sharded_runs.Unblocked()
    assert not checkpoint_activations(network)
    assert "forward" not in vars(network)


def test_what_is_not_sharded_passes_through():
    values = {"a": torch.zeros(3), "b": [1, 2]}
    gathered = Gathered(values, ALONE)
    assert dict(gathered) == values
    gathered.drain()
    assert to_local(values["a"]) is values["a"]
    assert like_placement(values["a"], torch.ones(3)) is values["a"]
