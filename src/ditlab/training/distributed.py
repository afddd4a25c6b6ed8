"""The processes of one training job, as `torchrun` starts them. One process alone is the same object with world 1."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ditlab.errors import DitlabError, InvalidConfig, NotFound

__all__ = ["Device", "DistributedContext", "init_distributed", "no_sync", "pick_device", "replicate"]

Device = str | torch.device
"""Where to compute: "cpu", "cuda", "cuda:N", or torch's own object."""


@dataclass(frozen=True)
class DistributedContext:
    """This process's rank, the number of processes, and the device of this one."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and reports."""
        return self.rank == 0

    def share(self, batch: int) -> slice:
        """Returns this rank's part of a global batch of `batch` images."""
        each = batch // self.world
        return slice(self.rank * each, (self.rank + 1) * each)

    def mean(self, value: Tensor) -> Tensor:
        """Returns the mean of a tensor over all ranks (each has an equal share of the batch)."""
        if self.world == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.world

    def gathered(self, value: Tensor) -> Tensor:
        """Concatenates the ranks' shares of a global batch: `[b]`, of equal length, to `[world * b]`."""
        if self.world == 1:
            return value
        parts = [torch.empty_like(value) for _ in range(self.world)]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts)

    def any(self, flag: bool) -> bool:
        """Returns whether the flag is set on any rank."""
        return flag if self.world == 1 else bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def raise_together(self, error: DitlabError | None) -> bool:
        """Returns whether no rank has an error; a rank that has one raises it.

        If rank 0 has one, it alone raises, so that the error is shown once; the others get False and return silently.
        """
        main_fails = self.any(self.is_main and error is not None)
        fails = self.any(error is not None)
        if error is not None and (self.is_main or not main_fails):
            raise error
        return not fails

    def wait(self) -> None:
        """Returns when every rank has called it."""
        if self.world > 1:
            dist.barrier()


class _Replica(nn.parallel.DistributedDataParallel):
    """DDP with the network's own attributes (its number of classes, say), so that objectives need not know of DDP."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def replicate(network: nn.Module, context: DistributedContext) -> nn.Module:
    """Moves a network to the device; returns what to call in a forward pass: with several ranks its DDP wrapper."""
    network.to(context.device)
    if context.world == 1:
        return network
    return _Replica(network, device_ids=[context.device] if context.device.type == "cuda" else None)


def no_sync(runner: nn.Module, more: bool) -> AbstractContextManager[Any]:
    """Returns the context of one micro-batch: replicas exchange gradients only when no `more` follow.

    A sharded network exchanges them at each micro-batch, since gradients that wait would be whole ones.
    """
    return runner.no_sync() if more and isinstance(runner, _Replica) else nullcontext()


def pick_device(name: Device | None) -> torch.device:
    """Returns the named device, which must exist here; without a name CUDA where there is one, else the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidConfig(f"`device`: expected 'cpu', 'cuda' or 'cuda:N', found '{name}'") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise NotFound(
            f"`device`: expected one of the {torch.cuda.device_count()} CUDA devices of this machine, found '{name}'"
        )
    return device


@contextmanager
def init_distributed(device: Device | None = None) -> Iterator[DistributedContext]:
    """Yields the context of the processes that `torchrun` started, with a process group, else of this one alone."""
    picked = pick_device(device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield DistributedContext(0, 1, picked)
        return
    if picked.type == "cuda":
        picked = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(picked)
    dist.init_process_group("nccl" if picked.type == "cuda" else "gloo")
    try:
        yield DistributedContext(dist.get_rank(), world, picked)
    finally:
        dist.destroy_process_group()
