"""Checkpoints: whole or not there, never pickled, and clear about what is wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    read_manifest,
    read_state,
    read_tensors,
    write_tensors,
)

FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


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


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


def as_format_1(path: Path, **changes: Any) -> dict[str, Any]:
    """Makes a checkpoint one of the old form: no manifest, the weights' files listed in state.json."""
    manifest = json.loads((path / "manifest.json").read_text())
    state = json.loads((path / "state.json").read_text())
    files = {name: entry for name, entry in manifest["files"].items() if name != "state.json"}
    head = {"format": 1, "step": state["step"], "files": files, "optimizer": state["optimizer"]}
    state = {**head, "images": 7, "loss_sum": 0.5, "loss_count": 1, "objective": {}, **changes}
    (path / "state.json").write_text(json.dumps(state, indent=1))
    (path / "manifest.json").unlink()
    return state


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_comes_back(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints")
    assert store.steps() == []
    assert store.newest() is None
    path = save(store, 7, 1.0)
    assert path == tmp_path / "checkpoints" / "000000007"
    assert names(path) == sorted(FILES)
    loaded = store.newest()
    assert loaded is not None
    assert (loaded.step, loaded.state["objective"]) == (7, {})
    net, optimizer = trained()
    assert all(torch.equal(loaded.model[k], v + 1) for k, v in net.state_dict().items())
    assert all(torch.equal(loaded.ema[k], v) for k, v in net.state_dict().items())
    # The optimizer goes on exactly where it was.
    other = network()
    other.load_state_dict(loaded.ema)
    fresh = torch.optim.AdamW(other.parameters(), lr=1e-2, fused=True)
    load_optimizer(other, fresh, loaded.optimizer)
    for n, o in ((net, optimizer), (other, fresh)):
        n(torch.ones(2, 3)).square().sum().backward()
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_tied_weights_are_stored_once(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    write_tensors(tmp_path / "a.safetensors", {"a": weight, "b": weight, "c": weight.clone(), "view": weight[0]})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["a", "c", "view"]
    tensors = read_tensors(tmp_path / "a.safetensors")
    assert torch.equal(tensors["b"], weight)
    assert tensors["b"] is tensors["a"]
    assert torch.equal(tensors["view"], weight[0])


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
    notes = []
    loaded = store.newest(notes.append)
    assert loaded is not None
    assert loaded.step == 1
    whole_ema = loaded.files["ema.safetensors"].bytes
    problems = (
        f"{file}: expected {len(whole)} bytes, found {len(whole) - 10} (truncated?)",
        f"{tmp_path}/000000002/ema.safetensors: expected {whole_ema} bytes, found nothing",
    )
    assert notes == [f"{problem}; going back to the checkpoint of step 1" for problem in problems]
    save(store, 3)
    assert file.read_bytes() == whole
    assert store.steps() == [1, 2, 3]


def test_a_whole_checkpoint_is_not_written_again(tmp_path):
    store = CheckpointStore(tmp_path)
    before = (save(store, 1) / "state.json").stat().st_mtime_ns
    assert (save(store, 1, 5.0) / "state.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "deleted"])
def test_damage_of_any_file_is_named_and_the_checkpoint_before_is_used(tmp_path, name, damage):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    file = save(store, 2) / name
    size = file.stat().st_size
    if damage == "flipped":
        rewrite(file, lambda whole: whole[: size // 2] + bytes([whole[size // 2] ^ 1]) + whole[size // 2 + 1 :])
    elif damage == "cut":
        rewrite(file, lambda whole: whole[:-9])
    elif damage == "emptied":
        file.write_bytes(b"")
    else:
        file.unlink()
    notes: list[str] = []
    newest = store.newest(notes.append)
    assert newest is not None
    assert newest.step == 1
    assert len(notes) == 1
    assert notes[0].startswith(f"{file}: ")
    assert notes[0].endswith("; going back to the checkpoint of step 1")
    with pytest.raises(DitlabError, match=name):
        store.load(2)


@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_each_flipped_bit_of_the_json_files_is_noticed(tmp_path, name):
    file = save(CheckpointStore(tmp_path), 1) / name
    whole = file.read_bytes()
    for place in range(len(whole)):
        for bit in range(8) if place % 7 == 0 else (place % 8,):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
            with pytest.raises(DitlabError, match=name):
                read_manifest(file.parent).verify()
    file.write_bytes(whole)
    read_manifest(file.parent).verify()


def test_the_step_is_that_of_the_folder(tmp_path):
    store = CheckpointStore(tmp_path, keep=9)
    shutil.copytree(save(store, 1), tmp_path / "000000005")
    as_format_1(save(store, 3), step=4)
    rewrite(save(store, 2) / "state.json", lambda whole: whole.replace(b'"step": 2', b'"step": 3'))
    notes: list[str] = []
    newest = store.newest(notes.append)
    assert newest is not None
    assert newest.step == 1
    problems = (
        "000000005/manifest.json: expected the step that the folder is named after, found 1",
        "000000003/state.json: expected the step that the folder is named after, found 4",
        "000000002/state.json: its SHA-256 is not the recorded one; the file was changed or damaged",
    )
    assert notes == [f"{tmp_path}/{problem}; going back to the checkpoint of step 1" for problem in problems]


def test_weights_are_identified_without_reading_them(tmp_path):
    store = CheckpointStore(tmp_path)
    hashes = {}
    for step, value in ((1, 0.0), (2, 1.0)):
        path = save(store, step, value)
        loaded = store.load(step)
        hashes[step] = [loaded.weights_hash(), loaded.weights_hash(ema=False)]
        files = [path / "ema.safetensors", path / "model.safetensors"]
        assert hashes[step] == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        for file in files:
            file.unlink()
        assert read_manifest(path).weights_hash() == hashes[step][0]
    assert hashes[1][0] == hashes[2][0]
    assert hashes[1][1] != hashes[2][1]


def test_a_checkpoint_of_the_old_form_is_read(tmp_path):
    store = CheckpointStore(tmp_path)
    path = save(store, 1)
    new = store.load(1)
    as_format_1(path)
    old = store.load(1)
    assert (old.step, old.log, old.state["loss_sum"]) == (1, None, 0.5)
    assert old.weights_hash() == new.weights_hash()
    assert all(torch.equal(value, old.model[name]) for name, value in new.model.items())
    assert old.optimizer.keys() == new.optimizer.keys()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (b'"loss_sum"', "state.json: expected a checkpoint's state, found one without 'loss_sum'"),
        (b'"model.safetensors"', "state.json: expected a checkpoint's state, found one without 'model.safetensors'"),
        (b'"optimizer"', "state.json: expected a checkpoint's state as JSON, found something else"),
        (b'"format"', "state.json: expected a checkpoint's state as JSON, found something else"),
        (b'"sha256": "', "safetensors: its SHA-256 is not the recorded one; the file was changed or damaged"),
    ],
)
def test_damage_of_the_old_form_is_noticed(tmp_path, change, says):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    path = save(store, 2)
    as_format_1(path)
    # The last character of the name becomes another: the quotation mark of the hash's first digit, or a letter.
    other = change[:-2] + bytes([change[-2] ^ 1]) + change[-1:] if not change.endswith(b': "') else change + b"x"
    rewrite(path / "state.json", lambda whole: whole.replace(change, other, 1))
    notes: list[str] = []
    newest = store.newest(notes.append)
    assert newest is not None
    assert newest.step == 1
    assert says in notes[0]


def test_json_that_cannot_be_used(tmp_path):
    store = CheckpointStore(tmp_path)
    path = save(store, 1)
    state = as_format_1(path)
    newer = {**state, "format": 3}
    for name in ("state.json", "manifest.json"):
        for content, says in (
            (json.dumps(newer), "the checkpoint's format is 3, this ditlab reads up to 2; a newer ditlab wrote it"),
            ("{", "as JSON, found something else"),
            ("[]", "as JSON, found something else"),
            ("{}", "as JSON, found something else"),
        ):
            (path / name).write_text(content)
            with pytest.raises(DitlabError) as raised:
                store.load(1)
            assert str(raised.value).startswith(f"{path / name}: ")
            assert says in str(raised.value)
            with pytest.raises(DitlabError, match="no whole checkpoint is left"):
                store.newest()
    (path / "manifest.json").unlink()
    (path / "state.json").unlink()
    with pytest.raises(DitlabError, match=r"state.json: expected a checkpoint's state, found nothing"):
        read_state(path)
    assert store.steps() == [1]


def test_a_checkpoint_stays_that_is_older_than_a_damaged_one(tmp_path):
    """The newest ones count up to the step that was saved: a run that went back must not remove what it then writes."""
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 1)
    shutil.copytree(tmp_path / "000000001", tmp_path / "000000009")
    save(store, 3)
    assert store.steps() == [3, 9]
    newest = store.newest()
    assert newest is not None
    assert newest.step == 3
    save(store, 9)
    assert store.steps() == [9]


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


@pytest.mark.parametrize("stage", ["before", "middle", "before manifest", "before rename"])
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
