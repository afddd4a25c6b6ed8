"""The normalization of bias-free networks: division by the batch's standard deviation, without subtracting the mean.

In training each channel is divided by its standard deviation over batch and pixels. In evaluation it is divided by a
running average, a fixed factor, so a network of such layers is homogeneous of degree 1.

The running deviations are buffers, so the weight average (`ditlab.training.ema`) includes them. That is an
approximation: the deviation of an averaged network's features is not the average of the deviations. The published
recipe uses no weight average, and neither do the presets of these networks.

Source: Mohan et al. 2020, section 4; Kadkhodaie et al. 2024 use the same.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

_EPS, _MOMENTUM = 1e-5, 0.1
_GAMMA_STD, _GAMMA_LIMIT = 2 / (9 * 64), 0.025


def initial_gamma(width: int) -> nn.Parameter:
    """Returns the initial factors `[1, width, 1, 1]`: 2 / (9 * 64) times a unit normal, clipped to +-0.025.

    The published code uses this number (without a square root) at every width, so a new network's output is near zero.
    """
    return nn.Parameter((_GAMMA_STD * torch.randn(1, width, 1, 1)).clamp_(-_GAMMA_LIMIT, _GAMMA_LIMIT))


def bias_free_norm(
    x: Float[Tensor, "b c h w"], gamma: Float[Tensor, "1 c 1 1"], running: Float[Tensor, "1 c 1 1"], training: bool
) -> Float[Tensor, "b c h w"]:
    """Returns x / deviation * gamma, channel by channel; in training, updates the running deviation in place.

    With several processes the deviation is that of the global batch (all have equal shares), and gradients flow through
    the reduction: N processes train as one does. With gradient accumulation each micro-batch has its own deviation, and
    the micro-batches of several processes hold other images than those of one.
    """
    if not training:
        return x / running * gamma
    # Half precision has too few digits for the variance.
    wide = x if x.dtype == torch.float64 else x.float()
    deviation = (_batch_variance(wide) + _EPS).sqrt()
    with torch.no_grad():
        running.lerp_(deviation.to(running.dtype), _MOMENTUM)
    return x / deviation.to(x.dtype) * gamma


def _batch_variance(x: Tensor) -> Tensor:
    """Returns the biased variance `[1, C, 1, 1]` over the batches of all processes."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return x.var(dim=(0, 2, 3), keepdim=True, unbiased=False)
    # The variance's gradient with respect to the mean is zero.
    mean = x.detach().mean(dim=(0, 2, 3), keepdim=True)
    dist.all_reduce(mean)
    return _Sum.apply((x - mean / world).square().mean(dim=(0, 2, 3), keepdim=True)) / world  # pyright: ignore[reportReturnType, reportOperatorIssue]


class _Sum(torch.autograd.Function):
    """Sums over the processes. The loss of each depends on the sum, so the gradients are summed too."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        total = value.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return _Sum.forward(ctx, *gradients)


class BiasFreeNorm(nn.Module):
    """`bias_free_norm` as a module; factors and running deviation have their published names."""

    running_sd: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gammas = initial_gamma(width)
        self.register_buffer("running_sd", torch.ones(1, width, 1, 1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Returns normalized features of the same shape."""
        return bias_free_norm(x, self.gammas, self.running_sd, self.training)


__all__ = ["BiasFreeNorm", "bias_free_norm", "initial_gamma"]
