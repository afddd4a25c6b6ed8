"""Randomness as a function, not a state (DESIGN 3.3).

Every random draw in ditlab comes from a generator that is made for the occasion from what the draw depends on: the
run's seed, the name of the stream, the step, the image. So nothing has to be saved to resume, and one process and N
processes draw the same numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def key(seed: int, *parts: int | str) -> int:
    """A 63-bit integer that is a pure function of its arguments (`parts`: a stream's name, a step, ...)."""
    text = "/".join([str(int(seed)), *(str(p) for p in parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def torch_generator(seed: int, *parts: int | str) -> torch.Generator:
    """A CPU generator for `(seed, *parts)`: equal arguments, equal draws, in every process and on every device."""
    return torch.Generator().manual_seed(key(seed, *parts))


def numpy_generator(seed: int, *parts: int | str) -> np.random.Generator:
    """NumPy's counterpart of `torch_generator`."""
    return np.random.default_rng(key(seed, *parts))
