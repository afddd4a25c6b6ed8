"""Small layers that several networks share."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear, tanh-GELU, Linear, token by token (DiT's feed-forward layer)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """`[B, T, D]` to the same shape."""
        return self.out(nn.functional.gelu(self.hidden(x), approximate="tanh"))


def modulate(
    x: Float[Tensor, "b t d"], shift: Float[Tensor, "b d"], scale: Float[Tensor, "b d"]
) -> Float[Tensor, "b t d"]:
    """x (1 + scale) + shift, one shift and one scale for all tokens of an image (adaLN; DiT section 3.2)."""
    return x * (1 + scale[:, None]) + shift[:, None]
