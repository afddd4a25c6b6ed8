"""What a network costs: parameters, operations, memory for a backward pass, training compute.

Operations are multiply-accumulates (MACs) of a forward pass for one image, half of what torch's flop counter counts.
Peebles & Xie ("Scalable Diffusion Models with Transformers", 2023) print the same number under the name "Gflops"; like
there, element-wise work is not counted. Papers differ in whether they count attention matrices, the products of two
activations (q k^T and weights v). Of these only the pairs that a pattern lets through count, whatever a kernel does.

Memory is what autograd keeps of one image for the backward pass, each storage once, attention computed by a fused
kernel. It is no peak: gradients, optimizer, weights and work space come on top.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ditlab.errors import DitlabError
from ditlab.nn.attention import Global, SelfAttention, adapted_layers, attention_kernel


@dataclass(frozen=True)
class Complexity:
    """What a network costs for images of one shape."""

    parameters: int
    macs: int
    """Multiply-accumulates of a forward pass, for one image, attention matrices included."""
    attention_macs: int
    """Of these, those of the attention matrices: products of two activations, over the pairs that may attend."""
    activation_bytes: int | None = None
    """Bytes kept of one image for the backward pass in float32; None where it was not asked for."""
    activation_bytes_bf16: int | None = None
    """The same under bfloat16 autocast (of the CPU, which leaves norms in bfloat16)."""

    @property
    def gmacs(self) -> float:
        """Multiply-accumulates of a forward pass, in 10^9."""
        return self.macs / 1e9

    @property
    def gmacs_without_attention(self) -> float:
        """The same without the attention matrices."""
        return (self.macs - self.attention_macs) / 1e9

    def training_compute(self, batch_size: int, steps: int) -> float:
        """GMACs of a training run (`training_compute`)."""
        return training_compute(self.gmacs, batch_size, steps)

    def to_json(self) -> dict[str, Any]:
        """JSON values: the fields, and GMACs."""
        return {**asdict(self), "gmacs": self.gmacs, "gmacs_without_attention": self.gmacs_without_attention}


def training_compute(gmacs: float, batch_size: int, steps: int) -> float:
    """GMACs of training: a step costs three forward passes, as a backward pass costs two (Peebles & Xie, section 4)."""
    return gmacs * batch_size * steps * 3


def complexity(
    network: nn.Module, shape: tuple[int, int, int], *, labelled: bool = True, memory: bool = True
) -> Complexity:
    """Counts what a network costs.

    The network is left as it is; its weights may be anywhere, on the meta device too, for no number is computed.

    Args:
        network: called as network(x [B, C, H, W], t [B], label [B]), in the mode (training or not) that it is in.
        shape: (C, H, W) of an image.
        labelled: whether it is given labels.
        memory: whether to measure the memory, which takes four more passes.

    Raises:
        DitlabError: a network that refuses such images.

    Example:
        >>> from ditlab.networks.dit import DiT
        >>> from ditlab.networks.dit_config import DiTConfig
        >>> network = DiT(DiTConfig(image_size=(8, 8), width=16, depth=2, heads=2))
        >>> complexity(network, (3, 8, 8)).macs
        672512
    """
    run = partial(_run, network, shape, labelled)
    # Whatever device the caller has made the default: counting is done as if on the CPU.
    with torch.device("cpu"):
        macs, attention = _count(network, run)
        # The difference of two batches is what one image takes: masks, weights and their copies cancel out.
        dtypes = (None, torch.bfloat16) if memory else ()
        activation_bytes = [_saved_bytes(run, 3, dtype) - _saved_bytes(run, 2, dtype) for dtype in dtypes]
    return Complexity(sum(p.numel() for p in network.parameters()), macs, attention, *activation_bytes)


def _count(network: nn.Module, run: Callable[[int, Any], None]) -> tuple[int, int]:
    """MACs of one image, and of these the attention matrices'."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def flash_attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)  # of shapes

    # torch's counter does not know its own kernel on the CPU, where layers of others end up.
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mode = FlopCounterMode(display=False, custom_mapping={on_cpu: flash_attention})
    with attention_kernel("math"), torch.no_grad():
        run(1, mode)
    counts = mode.get_flop_counts()
    # Kernels that mask compute every pair; what the pattern hides is taken off, layer by layer.
    names = {module: name for name, module in network.named_modules()}
    hidden = 0
    for module, view in adapted_layers(network):
        tokens = view.grid[0] * view.grid[1]
        unseen = tokens**2 - int(view.pattern.mask(view.grid).sum())
        name = ".".join(filter(None, (type(network).__name__, names[module])))
        hidden += _of_activations(counts[name]) * unseen // (tokens + view.extra) ** 2
    return (mode.get_total_flops() - hidden) // 2, (_of_activations(counts["Global"]) - hidden) // 2


def _of_activations(counts: dict[Any, int]) -> int:
    """Flops of products of two activations: batched products and attention kernels. Linears are `mm` and `addmm`."""
    return sum(flops for op, flops in counts.items() if any(word in str(op) for word in ("bmm", "attention")))


def _saved_bytes(run: Callable[[int, Any], None], batch: int, dtype: torch.dtype | None) -> int:
    """Bytes that autograd keeps for the backward pass of a batch, weights included where it keeps them."""
    saved: list[Tensor] = []  # held, so that no storage is freed and its address given to another

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with attention_kernel("sdpa"), torch.autocast("cpu", dtype, enabled=dtype is not None), torch.enable_grad():
        run(batch, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor))
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in saved}.values())


def _run(network: nn.Module, shape: tuple[int, int, int], labelled: bool, batch: int, watching: Any) -> None:
    """A forward pass, watched, on tensors that have a shape and a dtype and no data, as if on the CPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def empty(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").requires_grad_(tensor.requires_grad)

    with FakeTensorMode(), _all_seen(network):
        state = {name: empty(p) for named in (network.named_parameters(), network.named_buffers()) for name, p in named}
        inputs = [torch.empty(batch, *shape), torch.empty(batch)]
        label = torch.empty(batch, dtype=torch.long) if labelled else None
        with watching:
            torch.func.functional_call(network, state, (*inputs, label))


@contextmanager
def _all_seen(network: nn.Module) -> Iterator[None]:
    """Within it, no attention layer of ditlab's has a pattern, so that no mask without data is made, and kept."""
    layers = [(module, module.pattern) for module in network.modules() if isinstance(module, SelfAttention)]
    try:
        for layer, _ in layers:
            layer.pattern = Global()
        yield
    finally:
        for layer, pattern in layers:
            layer.pattern = pattern


def match_width(
    build: Callable[[int], nn.Module], shape: tuple[int, int, int], macs: int, multiple: int, *, attention: bool = True
) -> int:
    """The width at which a network's MACs come nearest to a number ("same FLOPs", An et al. 2410.21273, Fig. 6).

    Args:
        build: a network of this width, whose MACs grow with it.
        shape: (C, H, W) of an image.
        macs: what is wanted.
        multiple: of which the width must be one; of two that come equally near, the lower one is taken.
        attention: whether attention matrices count; An et al.'s own numbers leave them out.

    Raises:
        DitlabError: where even the narrowest network costs more than twice what is wanted.
    """

    def cost(units: int) -> int:
        costs = complexity(build(units * multiple), shape, memory=False)
        return costs.macs - (0 if attention else costs.attention_macs)

    costs = {1: cost(1)}
    if costs[1] > 2 * macs:
        raise DitlabError(
            f"match: expected a network that can cost {macs / 1e9:.3g} GMACs, found {costs[1] / 1e9:.3g} at the "
            f"smallest width, {multiple}"
        )
    # MACs grow about with the square of the width: their roots are interpolated, which needs few networks.
    below, above = 0, 1
    while costs[above] < macs:
        below, above = above, math.ceil(above * math.sqrt(macs / costs[above])) + 1
        costs[above] = cost(above)
    while above - below > 1:
        low, high = (math.sqrt(costs.get(units, 0)) for units in (below, above))
        guess = below + round((above - below) * (math.sqrt(macs) - low) / (high - low))
        middle = min(max(guess, below + 1), above - 1)
        costs[middle] = cost(middle)
        below, above = (middle, above) if costs[middle] <= macs else (below, middle)
    return multiple * min((below or above, above), key=lambda units: abs(costs[units] - macs))
