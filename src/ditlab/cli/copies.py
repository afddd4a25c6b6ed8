"""Which images that a run drew show too much of a training image, where none may be shown."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ditlab.metrics.nearest import Nearest, nearest_in
from ditlab.models.model import Model

PART = 64
"""Training images that are decoded at once."""
CONTROLS = 300
"""Held-out images whose nearest training images are looked for, at most."""
BLANK = np.uint8(127)
"""What is shown in the place of an image that may not be."""


def training_images(run: Model, mirror: bool) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Parts of the training images as the denoiser knows them, with their mirrored twins where those count."""
    train = run.split.train
    for start in range(0, len(train), PART):
        part = train[start : start + PART]
        yield run.decoded_at(part), run.decoded_at(part, mirrored=True) if mirror else None


def nearest_training(run: Model, images: np.ndarray) -> tuple[Nearest, Nearest | None]:
    """The nearest training images of pictures uint8 [n, C, H, W], and those of held-out images, where there are any."""
    held_out = run.decoded_at(run.split.test[:CONTROLS])
    # All at once, so that training images are decoded once.
    found = nearest_in(np.concatenate([images, held_out]), training_images(run, run.mirrored))
    return found.take(len(images)), found.take(len(held_out), len(images)) if len(held_out) else None


def telling(found: Nearest, held_out: Nearest | None) -> np.ndarray:
    """Whether each image shows too much of a training image where none may be shown, bool [n].

    So does a copy (d1 / d2 < 1/3), and what lies less than half as far from a training image as held-out images do.
    """
    near = 0.0 if held_out is None else float(np.median(held_out.first)) / 2
    return found.copied | (found.first < near)


def blanked(images: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Pictures uint8 [..., C, H, W], those that are `hidden` (bool [...]) grey."""
    return np.where(hidden[..., None, None, None], BLANK, images)
