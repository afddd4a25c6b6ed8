"""How the frequencies of a time embedding are spaced; a module of its own, for configs that import no torch."""

from __future__ import annotations

from typing import Literal

Spacing = Literal["original", "diffusers"]
"""Spacing of a time embedding's frequencies; see `ditlab.nn.embeddings.frequencies`."""

__all__ = ["Spacing"]
