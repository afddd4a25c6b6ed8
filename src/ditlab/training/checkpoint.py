"""Checkpoints: folders that either exist whole or do not exist.

    checkpoints/000020000/  model.safetensors  ema.safetensors  optimizer.safetensors  state.json

A checkpoint is written into a hidden folder beside its final place, flushed to the disk and renamed
(`ditlab.files`): a process that is killed at any moment leaves the older checkpoints as they were. `state.json`
lists the size and SHA-256 of the other files, so a damaged checkpoint is recognised. Nothing is pickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ditlab.errors import DitlabError
from ditlab.files import atomic_folder
from ditlab.training.sharding import placed_like

FORMAT = 1
"""Version of the checkpoint's layout; a newer one is refused."""

_ALIAS = "same as "


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, in memory."""

    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    path: Path


def _stage(name: str) -> None:
    """Called between the stages of a save; tests replace it to die there."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as safetensors; those that share their memory are stored once, the others as a note."""
    seen: dict[tuple[int, int, tuple[int, ...]], str] = {}
    unique: dict[str, Tensor] = {}
    notes: dict[str, str] = {"format": "pt"}
    for name, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        place = (value.data_ptr(), value.numel(), tuple(value.stride()))
        if value.numel() and place in seen:
            notes[name] = _ALIAS + seen[place]
        else:
            seen[place] = name
            # safetensors refuses a part of another tensor's memory, so that is copied.
            unique[name] = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
    save_file(unique, path, metadata=notes)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads what `write_tensors` wrote.

    Raises:
        DitlabError: for a file that is missing, or is not a whole safetensors file (a pickle is never opened).
    """
    if not path.is_file():
        raise DitlabError(f"{path}: expected a safetensors file, found nothing")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            notes = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            start = file.read(4)
        if start[:2] == b"PK" or start[:1] == b"\x80":
            raise DitlabError(
                f"{path}: expected a safetensors file, found a pickle, which could run code and is not opened"
            ) from None
        raise DitlabError(f"{path}: expected a whole safetensors file, found a damaged one ({error})") from None
    for name, note in notes.items():
        if note.startswith(_ALIAS):
            tensors[name] = tensors[note.removeprefix(_ALIAS)]
    return tensors


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _split_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, value in state.items():
        (tensors if isinstance(value, Tensor) else scalars)[name] = value
    return tensors, scalars


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, *, keep: int = 2, keep_every: int = 0) -> None:
        """Nothing is written until the first save.

        Args:
            folder: the run's `checkpoints` folder.
            keep: how many of the newest checkpoints stay.
            keep_every: checkpoints at multiples of this many steps stay for good; 0 for none.
        """
        self.folder = folder
        self.keep = keep
        self.keep_every = keep_every

    def steps(self) -> list[int]:
        """The steps at which there is a checkpoint, ascending. Unfinished ones are not there."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.is_dir() and p.name.isdigit())

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step lies."""
        return self.folder / f"{step:09d}"

    def save(
        self,
        step: int,
        *,
        model: Mapping[str, Tensor],
        ema: Mapping[str, Tensor],
        optimizer: Mapping[str, Any],
        state: Mapping[str, Any],
    ) -> Path:
        """Writes one checkpoint and removes those that are no longer kept.

        Args:
            step: optimizer steps done.
            model: the network's state.
            ema: the averaged state.
            optimizer: flat optimizer state, tensors and JSON values.
            state: further JSON values, returned at loading.

        Raises:
            DitlabError: when the disk is full or the folder cannot be written; older checkpoints are untouched.
        """
        final = self.path(step)
        if final.exists():
            # A step's checkpoint is a pure function of the run, so a whole one stays; a damaged one makes room.
            try:
                return self.load(step).path
            except DitlabError:
                shutil.rmtree(final)
        try:
            _stage("before")
            with atomic_folder(final) as folder:
                write_tensors(folder / "model.safetensors", model)
                _stage("middle")
                write_tensors(folder / "ema.safetensors", ema)
                # Each mapping is read once and in this order: those of a sharded run gather what is read.
                tensors, scalars = _split_optimizer(optimizer)
                write_tensors(folder / "optimizer.safetensors", tensors)
                files = {
                    p.name: {"bytes": p.stat().st_size, "sha256": _digest(p)}
                    for p in sorted(folder.glob("*.safetensors"))
                }
                record = {"format": FORMAT, "step": step, "files": files, "optimizer": scalars, **state}
                (folder / "state.json").write_text(json.dumps(record, indent=1))
                _stage("before rename")
            _stage("after rename")
        except (OSError, SafetensorError) as error:
            raise DitlabError(f"{final}: the checkpoint could not be written: {_reason(error, self.folder)}") from None
        self._prune()
        return final

    def _prune(self) -> None:
        steps = self.steps()
        for step in steps[: -self.keep] if self.keep else []:
            if not (self.keep_every and step % self.keep_every == 0):
                shutil.rmtree(self.path(step))

    def load(self, step: int) -> Checkpoint:
        """Reads and checks the checkpoint of a step.

        Raises:
            DitlabError: naming the file, what was expected and what was found.
        """
        path = self.path(step)
        record = read_state(path)
        for name, expected in record["files"].items():
            file = path / name
            if not file.is_file():
                raise DitlabError(f"{file}: expected {expected['bytes']} bytes, found nothing")
            if file.stat().st_size != expected["bytes"]:
                raise DitlabError(
                    f"{file}: expected {expected['bytes']} bytes, found {file.stat().st_size} (truncated?)"
                )
            if _digest(file) != expected["sha256"]:
                raise DitlabError(f"{file}: its SHA-256 is not the one in state.json; the file was changed or damaged")
        return Checkpoint(
            step=record["step"],
            model=read_tensors(path / "model.safetensors"),
            ema=read_tensors(path / "ema.safetensors"),
            optimizer={**read_tensors(path / "optimizer.safetensors"), **record["optimizer"]},
            state=record,
            path=path,
        )

    def newest(self, say: Any = None) -> Checkpoint | None:
        """The newest checkpoint that is whole; None where there is none at all.

        Args:
            say: called with one sentence for each damaged checkpoint that is passed over.

        Raises:
            DitlabError: when there are checkpoints and none is whole.
        """
        problems: list[str] = []
        for step in reversed(self.steps()):
            try:
                found = self.load(step)
            except DitlabError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                if say is not None:
                    say(f"{problem}; going back to the checkpoint of step {step}")
            return found
        if problems:
            raise DitlabError(f"no whole checkpoint is left: {problems[0]}")
        return None


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's `state.json`.

    Raises:
        DitlabError: where it is missing, not JSON, or of a newer layout.
    """
    file = path / "state.json"
    try:
        record = json.loads(file.read_text())
        version = int(record["format"])
    except FileNotFoundError:
        raise DitlabError(f"{file}: expected a checkpoint's state, found nothing") from None
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise DitlabError(f"{file}: expected a checkpoint's state as JSON, found something else") from None
    if version > FORMAT:
        raise DitlabError(
            f"{file}: the checkpoint's format is {version}, this ditlab reads up to {FORMAT}; a newer ditlab wrote it"
        )
    return record


def load_network(network: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Puts weights into a network after comparing names and shapes.

    Raises:
        DitlabError: for the weights of another network: the first name or shape that differs.
    """
    expected = network.state_dict()
    for name, value in expected.items():
        if name not in tensors:
            raise DitlabError(f"{where}: expected weights '{name}', found none; are these another network's weights?")
        if tensors[name].shape != value.shape:
            raise DitlabError(
                f"{where}: '{name}' has shape {tuple(tensors[name].shape)}, expected {tuple(value.shape)}; "
                "are these another network's weights?"
            )
    surplus = sorted(tensors.keys() - expected.keys())
    if surplus:
        raise DitlabError(f"{where}: '{surplus[0]}' belongs to another network; this one has no such weights")
    network.load_state_dict({name: placed_like(tensors[name], value) for name, value in expected.items()})


def optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state by parameter name, flat: "NAME/exp_avg" and so on, and "param_groups".

    The tensors are the optimizer's own, on its device, sharded where the network is.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    nested: dict[str, Any] = dict(get_optimizer_state_dict(network, optimizer))
    state: dict[str, dict[str, Any]] = nested["state"]
    flat = {f"{name}/{slot}": value for name, slots in state.items() for slot, value in slots.items()}
    return {**flat, "param_groups": nested["param_groups"]}


def load_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """The reverse of `optimizer_state`, from whole tensors, the same in every process."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    nested: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        name, _, slot = key.rpartition("/")
        if name:
            nested.setdefault(name, {})[slot] = value
    # JSON has no tuples; AdamW wants its betas as one.
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in state["param_groups"]]
    whole: dict[str, Any] = {"state": nested, "param_groups": groups}
    set_optimizer_state_dict(network, optimizer, whole, options=StateDictOptions(full_state_dict=True))


def _reason(error: Exception, folder: Path) -> str:
    if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(error):
        near = next(p for p in [folder, *folder.parents] if p.exists())
        free = shutil.disk_usage(near).free
        return f"the disk is full ({free / 2**20:.0f} MiB free); earlier checkpoints are as they were"
    return str(error)
