"""Small layers shared by several networks."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ditlab.errors import DitlabError


class MLP(nn.Module):
    """Linear, tanh-GELU, Linear, token by token (DiT's feed-forward layer)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Maps `[B, T, D]` to the same shape."""
        return self.out(tanh_gelu(self.hidden(x)))


def tanh_gelu(x: Tensor) -> Tensor:
    """Returns GELU in its tanh form (Hendrycks and Gimpel, 1606.08415), in x's dtype.

    This is x (1 + tanh(z)) / 2 with z = sqrt(2 / pi) (x + 0.044715 x^3). Compiled CPU code computes the equal
    x / (1 + exp(-2 z)), which is three times as fast, because its tanh is slow.
    """
    if x.device.type != "cpu" or not torch.compiler.is_compiling():
        return nn.functional.gelu(x, approximate="tanh")
    wide = x if x.dtype == torch.float64 else x.float()
    twice = (8 / math.pi) ** 0.5 * (wide + 0.044715 * wide**3)
    return (wide * torch.sigmoid(twice)).to(x.dtype)


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to a few other tokens, such as those of time and label.

    Queries come from the tokens, keys and values from the others (Vaswani et al., 1706.03762). With few keys plain
    operations are fast, and they support every transform of `torch.func`.

    Args:
        width: channels of a token, a multiple of `heads`.
        heads: number of heads.

    Raises:
        DitlabError: `heads` does not divide `width`.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise DitlabError(f"cross-attention: expected a width that {heads} heads divide, found {width}")
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b n d"], others: Float[Tensor, "b k d"]) -> Float[Tensor, "b n d"]:
        """Maps tokens `[B, N, D]` and the tokens that they attend to, `[B, K, D]`, to tokens `[B, N, D]`."""
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.key_value(others).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1)
        return self.proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))


def modulate(
    x: Float[Tensor, "b t d"], shift: Float[Tensor, "b d"], scale: Float[Tensor, "b d"]
) -> Float[Tensor, "b t d"]:
    """Returns x (1 + scale) + shift, with one shift and scale for all tokens of an image (adaLN; DiT section 3.2)."""
    return x * (1 + scale[:, None]) + shift[:, None]


__all__ = ["MLP", "CrossAttention", "modulate", "tanh_gelu"]
