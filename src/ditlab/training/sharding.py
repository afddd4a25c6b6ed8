"""Memory for large networks: sharding over the processes, and gradient checkpointing.

`shard_network` is FSDP2 (`torch.distributed.fsdp.fully_shard`; Zhao et al., 2304.11277, for the method): each process
keeps one part of every weight, a `DTensor`, and so of its gradient, its average and the optimizer's moments. A block's
weights are whole only while the block computes. Checkpoints hold whole tensors, so that a run can be resumed sharded or
not, on any number of processes. `checkpoint_activations` is gradient checkpointing (Chen et al., 1604.06174): only the
input of each block is kept for the backward pass, which runs the block again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ditlab.training.distributed import DistributedContext

__all__ = ["Gathered", "blocks_of", "checkpoint_activations", "like_placement", "shard_network", "to_local"]


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Returns the network's list of `blocks`, which hold nearly all weights and activations; empty without one."""
    return list(getattr(network, "blocks", None) or ())


def checkpoint_activations(network: nn.Module) -> bool:
    """Makes each block run again in the backward pass, instead of keeping its activations; False without blocks.

    Losses and gradients stay the same to the bit: dropout and autocast are as they were the first time. Call it before
    `compile_blocks` and `shard_network`, so that their wrappers stay outside. (A network run again as a whole would
    need as much memory as before.)
    """
    blocks = blocks_of(network)
    for block in blocks:
        # On the instance and not by a module around it, which would change the names of the weights.
        block.forward = _again(block.forward)
    return bool(blocks)


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    # Not a `partial`: torch's compiler skips frames that start in torch's own files.
    def run(*args: Any, **named: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **named)

    return run


def shard_network(network: nn.Module, context: DistributedContext, precision: str) -> None:
    """Shards a network in place over all processes and moves it to their devices, block by block.

    The names of its weights stay as they are. Make the optimizer and the averages afterwards. From then on a forward
    pass is collective. Under "bf16" it must run under autocast, because the blocks are gathered in bfloat16: half the
    traffic, and no second copy that autocast would keep until the backward pass. Everything outside of the blocks stays
    float32, as do gradients and optimizer.

    The network comes whole and with the same weights in every process, on the CPU or the device: only one block at a
    time is whole on the device.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(context.device.type, (context.world,))
    half = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in blocks_of(network):
        block.to(context.device)
        fully_shard(block, mesh=mesh, mp_policy=half, reshard_after_forward=True)
    # The rest is small. It too is resharded after each forward pass, so that nothing stays whole between two.
    network.to(context.device)
    # FSDP wants no view as output: an in-place operation on one would undo its hooks.
    network.register_forward_hook(lambda module, args, output: output.clone())
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    for part in network.modules():
        if isinstance(part, FSDPModule):
            # Makes the buffers for whole weights now: made by an evaluation in inference mode, training could not use
            # them.
            part.unshard()
            part.reshard()


def to_local(value: Tensor) -> Tensor:
    """Returns this process's part of a sharded tensor, sharing its memory; any other tensor as it is."""
    # Recognised by its method: importing DTensor takes most of a second, which unsharded runs need not spend.
    part = getattr(value, "to_local", None)
    return value if part is None else part()


def like_placement(value: Tensor, other: Tensor) -> Tensor:
    """Returns a whole tensor, the same in every process, sharded as `other` is (if it is), without communication."""
    if to_local(other) is other:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    return distribute_tensor(value, other.device_mesh, other.placements, src_data_rank=None)


class Gathered(Mapping[str, Any]):
    """Sharded values by name. Each is gathered when it is read, so that only one at a time is whole.

    Reading is collective: all processes read the same names in the same order, each once. Where only rank 0 uses the
    values, which it gets whole on the CPU, it reads them and then every rank calls `drain`.
    """

    def __init__(self, values: Mapping[str, Any], context: DistributedContext) -> None:
        """Communicates nothing yet; the values, tensors or not, have the same names on all ranks."""
        self._values, self._context = values, context
        self._unread = set(values)

    def __getitem__(self, name: str) -> Any:
        value = self._values[name]
        if not isinstance(value, Tensor) or to_local(value) is value:
            self._unread.discard(name)
            return value
        if name not in self._unread:
            raise RuntimeError(f"'{name}' was gathered before; the other ranks would wait for ever")
        self._unread.remove(name)
        whole: Tensor = value.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
        if not self._context.is_main:
            return whole
        whole = whole.cpu()
        # Parts of unequal size are gathered into more memory than the whole needs.
        return whole if whole.untyped_storage().nbytes() == whole.nbytes else whole.clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def drain(self) -> None:
        """Takes part in gathering the values that were not read here."""
        for name in self:
            if name in self._unread:
                self[name]
