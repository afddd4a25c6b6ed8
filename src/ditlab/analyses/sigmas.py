"""Checks of noise levels that a user gives to an analysis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from ditlab.errors import InvalidConfig

__all__ = ["check_levels", "check_sigmas"]


def check_sigmas(sigmas: Sequence[float], analysis: str) -> None:
    """Raises InvalidConfig unless noise levels are positive, finite and ascending without repeats."""
    if not sigmas or any(not math.isfinite(s) or s <= 0 for s in sigmas):
        raise InvalidConfig(f"{analysis}: `sigmas` must be positive and at least one, found {list(sigmas)[:5]}")
    if any(b <= a for a, b in pairwise(sigmas)):
        raise InvalidConfig(f"{analysis}: `sigmas` must be ascending without repeats, found {list(sigmas)[:5]}")


def check_levels(sigmas: Sequence[float] | None, timesteps: Sequence[int] | None, analysis: str) -> None:
    """Raises InvalidConfig unless at most one of them is given, ascending without repeats."""
    if sigmas is not None and timesteps is not None:
        raise InvalidConfig(f"{analysis}: expected `sigmas` or `timesteps`, found both")
    if sigmas is not None:
        check_sigmas(sigmas, analysis)
    if timesteps is not None and (not timesteps or list(timesteps) != sorted(set(timesteps))):
        raise InvalidConfig(f"{analysis}: `timesteps` must be ascending without repeats, found {list(timesteps)}")
