"""The processes of one training job, as `torchrun` starts them: one object that also stands for a single process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ditlab.errors import DitlabError


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is, and on which device it computes."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def share(self, batch: int) -> slice:
        """This process's part of a global batch of `batch` images."""
        each = batch // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes (each has an equal share of the batch)."""
        if self.world == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.world

    def gathered(self, value: Tensor) -> Tensor:
        """The processes' shares of a global batch `[b]`, of equal length, one after the other: `[world * b]`."""
        if self.world == 1:
            return value
        parts = [torch.empty_like(value) for _ in range(self.world)]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.world == 1:
            return flag
        votes = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(votes)
        return bool(votes.item() > 0)

    def agree(self, refusal: DitlabError | None) -> bool:
        """Whether all processes may go on.

        Where some refuse, their refusals are raised, or the first process's alone where it is one of them, so that it
        is said once; the others get False and are to end without a word.
        """
        first_refuses = self.any(self.first and refusal is not None)
        refused = self.any(refusal is not None)
        if refusal is not None and (self.first or not first_refuses):
            raise refusal
        return not refused

    def wait(self) -> None:
        """Returns when every process has come here."""
        if self.world > 1:
            dist.barrier()


class _Replica(nn.parallel.DistributedDataParallel):
    """DDP that shows the network's own attributes (its number of classes, say), so objectives need not know of it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def replicate(network: nn.Module, processes: Processes) -> nn.Module:
    """Moves a network to the device and returns what to run there in a forward pass.

    That is the network itself, or with several processes what makes gradients the mean over them. Each has the whole
    network.
    """
    network.to(processes.device)
    if processes.world == 1:
        return network
    return _Replica(network, device_ids=[processes.device] if processes.device.type == "cuda" else None)


def holding(runner: nn.Module, more: bool) -> AbstractContextManager[Any]:
    """The context of one micro-batch's passes: replicas hold their gradients back while there are `more` to come.

    A sharded network adds up its parts of the gradients at each micro-batch: held back, they would be whole ones.
    """
    return runner.no_sync() if more and isinstance(runner, _Replica) else nullcontext()


def pick_device(name: str | None) -> torch.device:
    """The device to compute on: the one named, or else CUDA where there is one, or else the CPU.

    Raises:
        DitlabError: where the named device does not exist here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DitlabError(f"--device: expected 'cpu', 'cuda' or 'cuda:N', found '{name}'") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DitlabError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


@contextmanager
def processes(device: str | None = None) -> Iterator[Processes]:
    """The processes of this job: those that `torchrun` started, else this one alone.

    Under torchrun the group is opened here (nccl on CUDA, gloo on the CPU) and closed at the end of the block.
    """
    picked = pick_device(device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes(0, 1, picked)
        return
    if picked.type == "cuda":
        picked = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(picked)
    dist.init_process_group("nccl" if picked.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), world, picked)
    finally:
        dist.destroy_process_group()
