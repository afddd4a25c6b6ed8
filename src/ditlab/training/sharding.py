"""Training networks that are large for one device: sharded over the processes, with activations computed twice.

`shard_network` is FSDP2 (`torch.distributed.fsdp.fully_shard`; Zhao et al., 2304.11277, for the method): each process
keeps one part of every weight, and so of its gradient, its average and the optimizer's moments. A block's weights are
whole only while the block computes. A sharded weight is a `DTensor`: its shape is the whole one's, its memory one part.
Checkpoints hold whole tensors all the same, so that a run goes on sharded or not, on any number of processes.

`checkpoint_activations` is gradient checkpointing (Chen et al., 1604.06174): of each block only the input is kept for
the backward pass, which runs the block again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ditlab.training.distributed import Processes


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The network's list of `blocks`, in which nearly all of its weights and activations lie; empty without one."""
    return list(getattr(network, "blocks", None) or ())


def checkpoint_activations(network: nn.Module) -> bool:
    """Makes each of the network's blocks run again in the backward pass, instead of keeping what it computed.

    Losses and gradients stay the same to the bit: dropout and autocast are as they were the first time. Call it before
    `compile_blocks` and `shard_network`, so that what they put around a block stays outside.

    Returns:
        Whether there were blocks. (A network run again as a whole would need as much memory as before.)
    """
    for block in blocks_of(network):
        # On the instance and not by a module around it, which would change the names of the weights.
        block.forward = _again(block.forward)
    return bool(blocks_of(network))


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    # A function of this file and not a `partial`: torch's compiler passes over whatever starts in torch's own files.
    def run(*args: Any, **named: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **named)

    return run


def shard_network(network: nn.Module, processes: Processes, precision: str) -> None:
    """Shards a network in place over all processes and moves it to their devices, block by block.

    The names of its weights stay as they are. Make the optimizer and the averages afterwards. From then on a forward
    pass is a matter of all processes together, and under "bf16" it has to be one under autocast, for then the blocks
    are gathered in bfloat16 (half the traffic; what autocast would make of them anyway, in a copy of its own that would
    live until the backward pass). Everything outside of the blocks stays float32, as do gradients and optimizer.

    Args:
        network: whole and with the same weights in every process, on the CPU or the device: only one block at a time
            is whole on the device.
        processes: two or more.
        precision: "float32" or "bf16", as in TrainingConfig.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.world,))
    half = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in blocks_of(network):
        block.to(processes.device)
        fully_shard(block, mesh=mesh, mp_policy=half, reshard_after_forward=True)
    # The rest is small. It too goes back to its parts after each forward pass, so that between two nothing is whole.
    network.to(processes.device)
    # FSDP wants no view as output, for an in-place operation on one would undo what it hooks to it.
    network.register_forward_hook(lambda module, args, output: output.clone())
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    for part in network.modules():
        if isinstance(part, FSDPModule):
            # The buffers for whole weights are made here, lest the first measurement makes them in inference mode:
            # training could not use such tensors.
            part.unshard()
            part.reshard()


def local(value: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    # Known by the method, for importing DTensor takes most of a second that unsharded runs need not spend.
    part = getattr(value, "to_local", None)
    return value if part is None else part()


def placed_like(value: Tensor, other: Tensor) -> Tensor:
    """A whole tensor cut and placed as `other` is, without communication; as it is where `other` is not sharded.

    Args:
        value: the same in every process; only this process's part of its memory is read on the CPU.
        other: a tensor of the same shape.
    """
    if local(other) is other:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    return distribute_tensor(value, other.device_mesh, other.placements, src_data_rank=None)


class Gathered(Mapping[str, Any]):
    """Sharded values by name, each made whole when it is read, so that one at a time is.

    Reading one is a matter of all processes together, in the same order and once. Where one process alone makes use of
    them, it reads and then everyone calls `drain`.
    """

    def __init__(self, values: Mapping[str, Any], processes: Processes) -> None:
        """Communicates nothing yet.

        Args:
            values: tensors, sharded or not, and anything else; the same names in all processes.
            processes: the first one gets whole tensors on the CPU; the others nothing that is of use.
        """
        self._values, self._processes = values, processes
        self._unread = set(values)

    def __getitem__(self, name: str) -> Any:
        value = self._values[name]
        if not isinstance(value, Tensor) or local(value) is value:
            self._unread.discard(name)
            return value
        if name not in self._unread:
            raise RuntimeError(f"'{name}' was gathered before; the other processes would wait for ever")
        self._unread.remove(name)
        whole: Tensor = value.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
        if not self._processes.first:
            return whole
        whole = whole.cpu()
        # Parts of unequal size are gathered into more memory than the whole needs.
        return whole if whole.untyped_storage().nbytes() == whole.nbytes else whole.clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def drain(self) -> None:
        """Takes part in gathering what was not read here."""
        for name in self:
            if name in self._unread:
                self[name]
