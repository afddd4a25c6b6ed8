"""Small layers that several networks share."""

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
        """`[B, T, D]` to the same shape."""
        return self.out(tanh_gelu(self.hidden(x)))


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, x (1 + tanh(z)) / 2 with z = sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks and Gimpel,
    1606.08415), in x's dtype.

    As x / (1 + exp(-2 z)), the same function, it is three times as fast in compiled CPU code, whose tanh is slow.
    """
    if x.device.type != "cpu" or not torch.compiler.is_compiling():
        return nn.functional.gelu(x, approximate="tanh")
    wide = x if x.dtype == torch.float64 else x.float()
    twice = (8 / math.pi) ** 0.5 * (wide + 0.044715 * wide**3)
    return (wide * torch.sigmoid(twice)).to(x.dtype)


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to a few others, such as those of time and label.

    Queries and the last projection work on the tokens, keys and values on the others (Vaswani et al., 1706.03762). With
    as few keys as here plain operations are fast, and they allow every transform of `torch.func`.

    Args:
        width: channels of a token, a multiple of `heads`.
        heads: number of heads.

    Raises:
        DitlabError: where `heads` does not divide `width`.
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
        """Tokens `[B, N, D]`, and those they attend to `[B, K, D]`, to tokens."""
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.key_value(others).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1)
        return self.proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))


def modulate(
    x: Float[Tensor, "b t d"], shift: Float[Tensor, "b d"], scale: Float[Tensor, "b d"]
) -> Float[Tensor, "b t d"]:
    """x (1 + scale) + shift, one shift and one scale for all tokens of an image (adaLN; DiT section 3.2)."""
    return x * (1 + scale[:, None]) + shift[:, None]
