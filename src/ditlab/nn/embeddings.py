"""Embeddings of a network's other inputs: position of a patch, timestep, class.

Sources: the fixed position table is that of MAE and DiT (Peebles & Xie 2023, section 3.1 and its released code); the
sinusoid of the timestep is DDPM's and DiT's (Vaswani et al. 2017).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from ditlab.nn import Spacing

_MAX_PERIOD = 10_000.0
"""The longest period of a sinusoid, divided by 2 pi."""


def frequencies(count: int, spacing: Spacing = "original") -> Float[Tensor, " k"]:
    """Returns the angular frequencies f_k = 10000^(-k / count), k < count, in float32.

    With the spacing of diffusers' DiT, f_k = 10000^(-k / (count - 1)). Weights trained with one spacing give
    slightly different outputs with the other.

    The exponent is rounded to float32 as in the originals; its exponential is computed in float64, because torch's
    float32 `exp` differs in the last bit between processors, which changes an angle at t = 999 by up to 6e-5.
    """
    exponents = -math.log(_MAX_PERIOD) * torch.arange(count, dtype=torch.float32)
    exponents = exponents / (count if spacing == "original" else count - 1)
    return exponents.double().exp().float()


def sinusoid(t: Shaped[Tensor, " b"], width: int, *, spacing: Spacing = "original") -> Float[Tensor, "b w"]:
    """Returns sinusoids of timesteps, usually 0..999, whole or fractional: `width` / 2 cosines, then as many sines.

    With half = width / 2, channel k < half is cos(t f_k) and channel half + k is sin(t f_k); f_k as in `frequencies`.
    Computed in float32 for any dtype of `t`, as in the originals.
    """
    angles = t.float()[:, None] * frequencies(width // 2, spacing).to(t.device)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def _sin_cos_1d(positions: Tensor, width: int) -> Tensor:
    """`[n] -> [n, width]`: sines first, then cosines, w_k = 10000^(-k / (width/2)), in float64."""
    angles = positions[:, None] * _MAX_PERIOD ** (-torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def position_table(grid: tuple[int, int], width: int) -> Float[Tensor, "t d"]:
    """Returns the fixed two-dimensional sin-cos table `[rows * columns, width]`; `width` is a multiple of 4.

    The first half of the channels encodes the column, the second half the row (the order of MAE's code, kept by DiT).
    """
    row, column = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    half = width // 2
    return torch.cat([_sin_cos_1d(column.flatten(), half), _sin_cos_1d(row.flatten(), half)], dim=1).float()


class TimeEmbedding(nn.Module):
    """Timestep -> vector: sinusoids of 256 channels, then Linear, SiLU, Linear (DiT)."""

    def __init__(self, width: int, *, sinusoid_width: int = 256, spacing: Spacing = "original") -> None:
        super().__init__()
        self.sinusoid_width = sinusoid_width
        self.spacing: Spacing = spacing
        self.hidden = nn.Linear(sinusoid_width, width)
        self.out = nn.Linear(width, width)

    def forward(self, t: Shaped[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """Maps timesteps `[B]` to `[B, D]`."""
        waves = sinusoid(t, self.sinusoid_width, spacing=self.spacing).to(self.hidden.weight.dtype)
        return self.out(nn.functional.silu(self.hidden(waves)))

    def reset(self) -> None:
        """Sets DiT's initial values: weights N(0, 0.02), biases 0."""
        for layer in (self.hidden, self.out):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


class LabelEmbedding(nn.Module):
    """Class -> vector by a table; with `null`, one more row, the last, means "no class" (for label dropout)."""

    def __init__(self, num_classes: int, width: int, *, null: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + int(null), width)

    def forward(self, label: Int[Tensor, " b"]) -> Float[Tensor, "b d"]:
        """Maps classes `[B]`, 0..num_classes - 1 or num_classes for "no class", to `[B, D]`."""
        return self.table(label)

    def reset(self) -> None:
        """Sets DiT's initial values: N(0, 0.02)."""
        nn.init.normal_(self.table.weight, std=0.02)


__all__ = ["LabelEmbedding", "Spacing", "TimeEmbedding", "frequencies", "position_table", "sinusoid"]
