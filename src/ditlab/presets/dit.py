"""Presets of DiTs."""

from __future__ import annotations

from ditlab.config import RunConfig
from ditlab.networks.dit_config import DiTConfig
from ditlab.presets.recipes import TRAINING, with_edm

_SIZES = {  # depth, width, heads
    "nano": (4, 64, 2),
    "micro": (6, 128, 4),
    "xs": (12, 252, 4),  # An et al., Fig. 6: DiT-XS
    "s": (12, 384, 6),  # this and the following: Peebles & Xie, Table 1
    "b": (12, 768, 12),
    "l": (24, 1024, 16),
    "xl": (28, 1152, 16),
}
_PATCHES = {size: (2, 4, 8) if size in ("b", "l", "xl") else (1, 2, 4, 8) for size in _SIZES}


def _training(size: str, patch: int) -> str:
    if size in ("nano", "micro"):
        return size
    return "an2024" if size == "xs" or (size, patch) == ("s", 1) else "dit"


def _presets() -> dict[str, RunConfig]:
    presets = {}
    for size, (depth, width, heads) in _SIZES.items():
        for patch in _PATCHES[size]:
            name = f"dit-{size}/{patch}"
            network = DiTConfig(patch=patch, depth=depth, width=width, heads=heads)
            recipe = RunConfig(preset=name, network=network, training=TRAINING[_training(size, patch)])
            presets |= with_edm(recipe, name)
    return presets


PRESETS = _presets()
"""`dit-s/2` to `dit-xl/8` are the twelve networks of Peebles & Xie, trained as in their paper. `dit-xs/1` and `dit-s/1`
are An et al.'s (pixel space, patch 1, DDPM with learned variance); `dit-xs` with other patches has the same training.
`dit-nano` and `dit-micro` are ditlab's own sizes for a CPU. `-edm` trains the same network in EDM's framework."""

__all__ = ["PRESETS"]
