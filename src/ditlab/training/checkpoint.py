"""Checkpoints: folders that either exist whole or do not exist.

    checkpoints/000020000/  model.safetensors  ema.safetensors  optimizer.safetensors  state.json  manifest.json

A checkpoint is written into a hidden folder, flushed to the disk and renamed (`ditlab.files`): a process that is killed
at any moment leaves the older ones as they were. `manifest.json`, written last, holds the step, the length of the
training log, and size and SHA-256 of every other file; it ends with a SHA-256 of its own, so that damage of any file is
noticed. Nothing is pickled. In format 1, which is still read, there is no manifest: `state.json` lists the files of
weights, and nothing vouches for `state.json`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ditlab.data.manifest import FileRecord, hash_file
from ditlab.errors import Damaged, DitlabError, Incompatible, NotFound
from ditlab.files import atomic_folder
from ditlab.progress import SILENT
from ditlab.training.log import LogLength
from ditlab.training.sharding import like_placement

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "Manifest",
    "load_network",
    "load_optimizer",
    "optimizer_state",
    "read_manifest",
    "read_state",
    "read_tensors",
    "write_manifest",
    "write_tensors",
]

FORMAT = 2
"""Version of the checkpoint's layout; a newer one is refused."""

_ALIAS = "same as "
_TENSOR_FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
_FORMAT_1_KEYS = ("step", "objective", "loss_sum", "loss_count")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of."""

    path: Path
    """The checkpoint's folder."""
    step: int
    """Optimizer steps done."""
    files: dict[str, FileRecord]
    log: LogLength | None
    """Length of the training log when the checkpoint was written; None where unknown (format 1)."""

    def weights_hash(self, ema: bool = True) -> str:
        """Returns the SHA-256 of the file of the averaged or the raw weights."""
        return self.files["ema.safetensors" if ema else "model.safetensors"].sha256

    def verify(self) -> None:
        """Raises Damaged for the first file that is missing, or whose size or SHA-256 is not the recorded one."""
        for name, record in self.files.items():
            file = self.path / name
            if not file.is_file():
                raise Damaged(f"{file}: expected {record.bytes} bytes, found nothing")
            if file.stat().st_size != record.bytes:
                raise Damaged(f"{file}: expected {record.bytes} bytes, found {file.stat().st_size} (truncated?)")
            if hash_file(file) != record:
                raise Damaged(f"{file}: its SHA-256 is not the recorded one; the file was changed or damaged")


@dataclass(frozen=True)
class Checkpoint(Manifest):
    """A checkpoint in memory."""

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]


def _stage(name: str) -> None:
    """Does nothing between the stages of a save; tests replace it to die there."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors as safetensors. Of tensors that share their memory one is stored, the others as a reference."""
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
            # safetensors refuses a view into another tensor's memory.
            unique[name] = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
    save_file(unique, path, metadata=notes)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file that `write_tensors` wrote; NotFound or Damaged without a whole one."""
    if not path.is_file():
        raise NotFound(f"{path}: expected a safetensors file, found nothing")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            notes = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            start = file.read(4)
        if start[:2] == b"PK" or start[:1] == b"\x80":
            raise Damaged(
                f"{path}: expected a safetensors file, found a pickle, which could run code and is not opened"
            ) from None
        raise Damaged(f"{path}: expected a whole safetensors file, found a damaged one ({error})") from None
    for name, note in notes.items():
        if note.startswith(_ALIAS):
            tensors[name] = tensors[note.removeprefix(_ALIAS)]
    return tensors


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run. Nothing is written until the first save."""

    folder: Path
    """The run's `checkpoints` folder."""
    _: KW_ONLY
    keep: int = 2
    """How many of the newest checkpoints stay."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps stay for good; 0 for none."""

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, ascending. Unfinished checkpoints are not counted."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.is_dir() and p.name.isdigit())

    def path(self, step: int) -> Path:
        """Returns the folder of the checkpoint of a step."""
        return self.folder / f"{step:09d}"

    def save(
        self,
        step: int,
        *,
        model: Mapping[str, Tensor],
        ema: Mapping[str, Tensor],
        optimizer: Mapping[str, Any],
        state: Mapping[str, Any],
        log: LogLength | None = None,
    ) -> Path:
        """Writes one checkpoint and removes those that are no longer needed; older ones survive a full disk.

        The optimizer's state is flat (`optimizer_state`); `state` has further JSON values, `log` the log's length.
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
                values = dict(optimizer)
                tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
                write_tensors(folder / "optimizer.safetensors", tensors)
                scalars = {name: value for name, value in values.items() if name not in tensors}
                record = {"format": FORMAT, "step": step, "optimizer": scalars, **state}
                (folder / "state.json").write_text(json.dumps(record, indent=1))
                _stage("before manifest")
                write_manifest(folder, step, log)
                _stage("before rename")
            _stage("after rename")
        except (OSError, SafetensorError) as error:
            raise DitlabError(f"{final}: the checkpoint could not be written: {_reason(error, self.folder)}") from None
        self._prune(step)
        return final

    def _prune(self, step: int) -> None:
        # Checkpoints after `step` are damaged ones that a resumed run has not reached again: they do not count.
        older = [other for other in self.steps() if other <= step]
        for other in older[: -self.keep] if self.keep else []:
            if not (self.keep_every and other % self.keep_every == 0):
                shutil.rmtree(self.path(other))

    def load(self, step: int) -> Checkpoint:
        """Reads the checkpoint of a step and verifies every file, as `read_manifest` and `Manifest.verify` do."""
        path = self.path(step)
        manifest = read_manifest(path)
        manifest.verify()
        state = read_state(path)
        model, ema, optimizer = (read_tensors(path / name) for name in _TENSOR_FILES)
        return Checkpoint(**vars(manifest), model=model, ema=ema, optimizer=optimizer | state["optimizer"], state=state)

    def newest(self, note: Callable[[str], None] = SILENT.note) -> Checkpoint | None:
        """Returns the newest whole checkpoint; None without any checkpoint, Damaged where none of them is whole.

        `note` gets one sentence for each damaged checkpoint that is passed over.
        """
        problems: list[str] = []
        for step in reversed(self.steps()):
            try:
                checkpoint = self.load(step)
            except DitlabError as error:
                problems.append(str(error))
            else:
                for problem in problems:
                    note(f"{problem}; going back to the checkpoint of step {step}")
                return checkpoint
        if problems:
            raise Damaged(f"no whole checkpoint is left: {problems[0]}")
        return None


def write_manifest(folder: Path, step: int, log: LogLength | None = None) -> None:
    """Writes the `manifest.json` of a folder that holds all other files of a checkpoint."""
    names = sorted(p.name for p in folder.iterdir() if p.name != "manifest.json")
    files = {name: asdict(hash_file(folder / name)) for name in names}
    record = {"format": FORMAT, "step": step, "log": None if log is None else asdict(log), "files": files}
    (folder / "manifest.json").write_text(_sealed(record))


def _sealed(record: Mapping[str, Any]) -> str:
    """Returns a record as JSON that ends with the SHA-256 of the record without it."""
    own = hashlib.sha256(json.dumps(record, indent=1).encode()).hexdigest()
    return json.dumps({**record, "sha256": own}, indent=1) + "\n"


def read_manifest(path: Path) -> Manifest:
    """Reads a checkpoint's `manifest.json` and checks it; of a checkpoint of format 1, what `state.json` has of it.

    The other files are not read: `Manifest.verify` does that. Raises Damaged, Incompatible for a newer layout.
    """
    file = path / "manifest.json"
    if file.is_file():
        record = _read_json(file, "manifest", "files")
        if _sealed({key: value for key, value in record.items() if key != "sha256"}).encode() != file.read_bytes():
            raise Damaged(f"{file}: its SHA-256 is not the one at its end; the file was changed or damaged")
        files = {name: FileRecord(**entry) for name, entry in record["files"].items()}
        manifest = Manifest(path, record["step"], files, None if record["log"] is None else LogLength(**record["log"]))
    else:
        file = path / "state.json"
        manifest = _read_format_1(path)
    if not path.name.isdecimal() or manifest.step != int(path.name):
        raise Damaged(f"{file}: expected the step that the folder is named after, found {manifest.step}")
    return manifest


def _read_format_1(path: Path) -> Manifest:
    state = read_state(path)
    if state["format"] != 1:
        raise Damaged(f"{path / 'manifest.json'}: expected a checkpoint's manifest, found nothing")
    try:
        entries = {name: state["files"][name] for name in _TENSOR_FILES}
        files = {name: FileRecord(entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
        for key in _FORMAT_1_KEYS:
            state[key]
    except (KeyError, TypeError) as error:
        raise Damaged(f"{path / 'state.json'}: expected a checkpoint's state, found one without {error}") from None
    return Manifest(path, state["step"], files, None)


def read_state(path: Path) -> dict[str, Any]:
    """Returns the JSON values of a checkpoint's `state.json`; raises Damaged or Incompatible as `read_manifest`."""
    return _read_json(path / "state.json", "state", "optimizer")


def _read_json(file: Path, what: str, mapping: str) -> dict[str, Any]:
    """Returns what a checkpoint's JSON file holds: a format, and a mapping under this name."""
    try:
        record = json.loads(file.read_bytes())
        version = int(record["format"])
        if version <= FORMAT:
            dict(record[mapping])
    except FileNotFoundError:
        raise Damaged(f"{file}: expected a checkpoint's {what}, found nothing") from None
    except (ValueError, KeyError, TypeError):
        raise Damaged(f"{file}: expected a checkpoint's {what} as JSON, found something else") from None
    if version > FORMAT:
        raise Incompatible(
            f"{file}: the checkpoint's format is {version}, this ditlab reads up to {FORMAT}; a newer ditlab wrote it"
        )
    return record


def load_network(network: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Loads weights into a network; Incompatible for another network's, by the first name or shape that differs."""
    expected = network.state_dict()
    for name, value in expected.items():
        if name not in tensors:
            raise Incompatible(f"{where}: expected weights '{name}', found none; are these another network's weights?")
        if tensors[name].shape != value.shape:
            raise Incompatible(
                f"{where}: '{name}' has shape {tuple(tensors[name].shape)}, expected {tuple(value.shape)}; "
                "are these another network's weights?"
            )
    surplus = sorted(tensors.keys() - expected.keys())
    if surplus:
        raise Incompatible(f"{where}: '{surplus[0]}' belongs to another network; this one has no such weights")
    network.load_state_dict({name: like_placement(tensors[name], value) for name, value in expected.items()})


def optimizer_state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns the optimizer's state by parameter name, flat: "NAME/exp_avg" and so on, and "param_groups".

    The tensors are the optimizer's own, on its device, sharded where the network is.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    nested: dict[str, Any] = dict(get_optimizer_state_dict(network, optimizer))
    state: dict[str, dict[str, Any]] = nested["state"]
    flat = {f"{name}/{slot}": value for name, slots in state.items() for slot, value in slots.items()}
    return {**flat, "param_groups": nested["param_groups"]}


def load_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Loads what `optimizer_state` returned, from whole tensors that are the same on every rank."""
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
