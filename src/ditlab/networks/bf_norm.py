"""The normalization of bias-free networks: a division by the batch's standard deviation that never subtracts its mean.

In training each channel is divided by its standard deviation over the batch and the pixels; in evaluation by a running
average of it, a fixed factor, so that a network of such layers is homogeneous of degree 1.

The running deviations are buffers, so the average of the weights (`ditlab.training.ema`) averages them too. That is
nearly right and no more: the deviation of an average network's features is not the average of the deviations. The
published recipe averages nothing, and neither do the presets of these networks.

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
    """The factors `[1, width, 1, 1]` that a network starts with: 2 / (9 * 64) times a unit normal, clipped to 0.025.

    The published code has this number, without a root and at every width: a new network puts out next to nothing.
    """
    return nn.Parameter((_GAMMA_STD * torch.randn(1, width, 1, 1)).clamp_(-_GAMMA_LIMIT, _GAMMA_LIMIT))


def bias_free_norm(
    x: Float[Tensor, "b c h w"],
    gamma: Float[Tensor, "1 c 1 1"],
    running: Float[Tensor, "1 c 1 1"],
    training: bool,
) -> Float[Tensor, "b c h w"]:
    """x / deviation * gamma, channel by channel.

    With several processes the batch is that of all of them together, which have equal shares of it, and gradients go
    through what they tell each other: N processes train as one does. Of a step that is cut into micro-batches, each
    has its own deviation, and these are of other images with several processes than with one.

    Args:
        x: features.
        gamma: learned factors.
        running: the running standard deviation; changed in place in training.
        training: divide by the batch's deviation and move the running one towards it, instead of dividing by that.
    """
    if not training:
        return x / running * gamma
    # Half precision would lose the variance's digits.
    wide = x if x.dtype == torch.float64 else x.float()
    deviation = (_batch_variance(wide) + _EPS).sqrt()
    with torch.no_grad():
        running.lerp_(deviation.to(running.dtype), _MOMENTUM)
    return x / deviation.to(x.dtype) * gamma


def _batch_variance(x: Tensor) -> Tensor:
    """The biased variance `[1, C, 1, 1]` about the mean, over the batches of all processes."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1:
        return x.var(dim=(0, 2, 3), keepdim=True, unbiased=False)
    # The variance's gradient by the mean is zero, so no gradient goes that way.
    mean = x.detach().mean(dim=(0, 2, 3), keepdim=True)
    dist.all_reduce(mean)
    return _Sum.apply((x - mean / world).square().mean(dim=(0, 2, 3), keepdim=True)) / world  # pyright: ignore[reportReturnType, reportOperatorIssue]


class _Sum(torch.autograd.Function):
    """The sum over the processes. Each one's loss depends on it, so the gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


class BiasFreeNorm(nn.Module):
    """`bias_free_norm` with its factors and its running deviation, under their published names."""

    running_sd: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gammas = initial_gamma(width)
        self.register_buffer("running_sd", torch.ones(1, width, 1, 1))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Normalized features."""
        return bias_free_norm(x, self.gammas, self.running_sd, self.training)
