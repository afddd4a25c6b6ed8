"""The parts that networks are made of: attention patterns and their kernels, embeddings, layers."""

from __future__ import annotations

from typing import Literal

__all__ = ["Spacing"]

Spacing = Literal["original", "diffusers"]
"""Spacing of a time embedding's frequencies; see `ditlab.nn.embeddings.frequencies`. Configs use it without torch."""
