"""Presets: complete recipes by name, each a network, its training and its sampler. One file for each family."""

from __future__ import annotations

from ditlab.config import RunConfig
from ditlab.errors import unknown_name
from ditlab.presets import bias_free, dit, unet

PRESETS: dict[str, RunConfig] = {**dit.PRESETS, **unet.PRESETS, **bias_free.PRESETS}
"""Name -> recipe; the docstring of each family's `PRESETS` says whose recipes they are."""


def preset(name: str) -> RunConfig:
    """Returns the recipe of a name.

    Raises:
        DitlabError: for an unknown name, with the nearest known ones.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]


__all__ = ["PRESETS", "preset"]
