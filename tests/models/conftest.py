"""Small image sets, and runs of a tiny network on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ditlab
from ditlab.data import ImageSet, prepare
from ditlab.models.run import Run


@pytest.fixture(scope="session")
def make_images(tmp_path_factory) -> Callable[..., ImageSet]:
    """`make_images(30, rng_seed=0, size=4)` prepares a set of random images of 3 x size x size."""

    def make(count: int, rng_seed: int = 0, size: int = 4) -> ImageSet:
        folder = tmp_path_factory.mktemp("images")
        pixels = np.random.default_rng(rng_seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        np.save(folder / "pixels.npy", pixels)
        return prepare(f"array:{folder / 'pixels.npy'}", folder / "set", size=size)

    return make


@pytest.fixture(scope="session")
def images(make_images) -> ImageSet:
    """30 images."""
    return make_images(30)


@pytest.fixture
def train(images) -> Callable[..., Run]:
    """`train(out, steps=4)` trains a tiny network on 10 of the images through the library's call."""

    def call(out: Path, **settings: object) -> Run:
        small = {"n": 10, "test": 8, "width": 16, "depth": 1, "heads": 2, "batch_size": 4, "steps": 4}
        small |= {"save_every": 2, "log_every": 2, "eval_every": 0, **settings}
        run = ditlab.train("dit-nano/1", images, out=out, device="cpu", **small)
        assert run is not None
        return run

    return call
