"""Detects samples that are too close to a training image to be published."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ditlab.metrics.nearest import Nearest, nearest_in
from ditlab.models.model import Model

DECODE_BATCH = 64
"""Training images that are decoded at once."""
MAX_CONTROLS = 300
"""Held-out images whose nearest training images are looked for, at most."""
BLANK = np.uint8(127)
"""What is shown in the place of an image that may not be."""


def training_images(model: Model, mirror: bool) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Parts of the training images as the denoiser knows them, with their mirrored twins where those count."""
    train = model.split.train
    for start in range(0, len(train), DECODE_BATCH):
        part = train[start : start + DECODE_BATCH]
        yield model.decoded(part), model.decoded(part, mirrored=True) if mirror else None


def training_pictures(model: Model, places: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """The original training images at these places, uint8 [n, C, H, W], mirrored where `mirrored` (bool [n])."""
    images = model.originals(model.split.train[places])
    return np.where(mirrored[:, None, None, None], images[..., ::-1], images)


def nearest_training(model: Model, images: np.ndarray) -> tuple[Nearest, Nearest | None]:
    """The nearest training images of pictures uint8 [n, C, H, W], and those of held-out images, where there are any."""
    held_out = model.decoded_held_out(MAX_CONTROLS)
    # All at once, so that training images are decoded once.
    nearest = nearest_in(np.concatenate([images, held_out]), training_images(model, model.mirrored))
    return nearest.take(len(images)), nearest.take(len(held_out), len(images)) if len(held_out) else None


def near_copies(nearest: Nearest, held_out: Nearest | None, *, known: bool = True) -> np.ndarray:
    """Returns whether each image shows too much of a training image where none may be shown, bool [n].

    A copy does (d1 / d2 < 1/3), and so does an image that is less than half as far from a training image as held-out
    images are. Where the training images are not `known`, each image may show one.
    """
    if not known:
        return np.ones(len(nearest.first), bool)
    near = 0.0 if held_out is None else float(np.median(held_out.first)) / 2
    return nearest.copied | (nearest.first < near)


def mask_images(images: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Pictures uint8 [..., C, H, W], those that are `hidden` (bool [...]) grey."""
    return np.where(hidden[..., None, None, None], BLANK, images)
