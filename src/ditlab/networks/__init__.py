"""Denoising networks: `(x, t, label=None) -> raw output`, with no knowledge of any noise schedule."""

from ditlab.networks.dit import DiT, DiTConfig

__all__ = ["DiT", "DiTConfig"]
