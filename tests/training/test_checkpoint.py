"""Checkpoints: whole or not there, never pickled, and clear about what is wrong."""

from __future__ import annotations

import errno
import json
import pickle

import pytest
import torch
from safetensors import safe_open
from torch import nn

from ditlab.errors import DitlabError
from ditlab.training import checkpoint
from ditlab.training.checkpoint import (
    CheckpointStore,
    load_network,
    load_optimizer,
    optimizer_state,
    read_state,
    read_tensors,
    write_tensors,
)


def network(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, 2))


def trained(steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
    for step in range(steps):
        net(torch.full((2, 3), float(step))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


def save(store: CheckpointStore, step: int, value: float = 0.0):
    net, optimizer = trained()
    weights = {name: tensor + value for name, tensor in net.state_dict().items()}
    return store.save(
        step, model=weights, ema=net.state_dict(), optimizer=optimizer_state(net, optimizer), state={"objective": {}}
    )


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_comes_back(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.steps() == []
    assert store.newest() is None
    path = save(store, 7, 1.0)
    assert path == tmp_path / "checkpoints" / "000000007"
    assert names(path) == ["ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]
    found = store.newest()
    assert found is not None
    assert (found.step, found.state["objective"]) == (7, {})
    net, optimizer = trained()
    assert all(torch.equal(found.model[k], v + 1) for k, v in net.state_dict().items())
    assert all(torch.equal(found.ema[k], v) for k, v in net.state_dict().items())
    # The optimizer goes on exactly where it was.
    other = network()
    other.load_state_dict(found.ema)
    fresh = torch.optim.AdamW(other.parameters(), lr=1e-2, fused=True)
    load_optimizer(other, fresh, found.optimizer)
    for n, o in ((net, optimizer), (other, fresh)):
        n(torch.ones(2, 3)).square().sum().backward()
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_tied_weights_are_stored_once(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / "a.safetensors", {"a": weight, "b": weight, "c": weight.clone(), "view": weight[0]})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["a", "c", "view"]
    found = read_tensors(tmp_path / "a.safetensors")
    assert torch.equal(found["b"], weight)
    assert found["b"] is found["a"]
    assert torch.equal(found["view"], weight[0])


def test_only_the_newest_stay_and_those_at_intervals(tmp_path):
    store = CheckpointStore(tmp_path, keep=2, keep_every=4)
    for step in range(1, 8):
        save(store, step)
    assert store.steps() == [4, 6, 7]
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 8)
    assert names(tmp_path) == ["000000008"]


def test_a_damaged_checkpoint_is_passed_over_and_written_anew(tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2, 3):
        save(store, step)
    file = tmp_path / "000000003" / "optimizer.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    (tmp_path / "000000002" / "ema.safetensors").unlink()
    (tmp_path / ".000000004.partial-x").mkdir()
    said = []
    found = store.newest(said.append)
    assert found is not None
    assert found.step == 1
    whole_ema = found.state["files"]["ema.safetensors"]["bytes"]
    problems = (
        f"{file}: expected {len(whole)} bytes, found {len(whole) - 10} (truncated?)",
        f"{tmp_path}/000000002/ema.safetensors: expected {whole_ema} bytes, found nothing",
    )
    assert said == [f"{problem}; going back to the checkpoint of step 1" for problem in problems]
    save(store, 3)
    assert file.read_bytes() == whole
    assert store.steps() == [1, 2, 3]


def test_a_whole_checkpoint_is_not_written_again(tmp_path):
    store = CheckpointStore(tmp_path)
    before = (save(store, 1) / "state.json").stat().st_mtime_ns
    assert (save(store, 1, 5.0) / "state.json").stat().st_mtime_ns == before


def test_state_that_cannot_be_read(tmp_path):
    store = CheckpointStore(tmp_path)
    state = save(store, 1) / "state.json"
    record = json.loads(state.read_text())
    for content, says in (
        (
            json.dumps({**record, "format": 2}),
            "the checkpoint's format is 2, this ditlab reads up to 1; a newer ditlab",
        ),
        ("{", "expected a checkpoint's state as JSON, found something else"),
        ("[]", "expected a checkpoint's state as JSON, found something else"),
        ("{}", "expected a checkpoint's state as JSON, found something else"),
    ):
        state.write_text(content)
        with pytest.raises(DitlabError) as raised:
            read_state(tmp_path / "000000001")
        assert str(raised.value).startswith(f"{state}: ")
        assert says in str(raised.value)
        with pytest.raises(DitlabError, match="no whole checkpoint is left"):
            store.newest()
    state.unlink()
    with pytest.raises(DitlabError, match=r"state.json: expected a checkpoint's state, found nothing"):
        store.load(1)


@pytest.mark.parametrize("protocol", [2, 5])
def test_pickles_are_recognised(tmp_path, protocol):
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps([1], protocol=protocol))
    with pytest.raises(DitlabError, match="found a pickle, which could run code and is not opened"):
        read_tensors(path)
    torch.save([1], path)
    with pytest.raises(DitlabError, match="found a pickle"):
        read_tensors(path)
    path.write_bytes(b"hello, world")
    with pytest.raises(DitlabError, match="expected a whole safetensors file, found a damaged one"):
        read_tensors(path)
    with pytest.raises(DitlabError, match="expected a safetensors file, found nothing"):
        read_tensors(tmp_path / "none")


def test_weights_of_another_network(tmp_path):
    weights = network().state_dict()
    with pytest.raises(DitlabError, match=r"'0.weight' has shape \(4, 3\), expected \(5, 3\); are these another"):
        load_network(network(5), weights, tmp_path)
    with pytest.raises(DitlabError, match=r"expected weights '3.weight', found none; are these another"):
        load_network(nn.Sequential(*network(), nn.Linear(2, 2)), weights, tmp_path)
    with pytest.raises(DitlabError, match=r"'extra' belongs to another network"):
        load_network(network(), {**weights, "extra": torch.zeros(1)}, tmp_path)


@pytest.mark.parametrize("stage", ["before", "middle", "before rename"])
def test_a_disk_that_fills_up_at_any_stage(tmp_path, monkeypatch, stage):
    store = CheckpointStore(tmp_path / "checkpoints")
    save(store, 1)

    def full(name):
        if name == stage:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_stage", full)
        with pytest.raises(DitlabError, match=r"000000002: the checkpoint could not be written: the disk is full \("):
            save(store, 2)
    assert names(tmp_path / "checkpoints") == ["000000001"]
    assert store.load(1).step == 1
    save(store, 2)
    assert store.steps() == [1, 2]
