"""The batch of a step: images, labels and random draws, all functions of (seed, step) (DESIGN 3.4)."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ditlab.diffusion.objectives import Objective
from ditlab.rng import numpy_generator, torch_generator
from ditlab.training.config import TrainingConfig
from ditlab.training.distributed import DistributedContext

__all__ = ["Batch", "Batches", "Images", "image_order"]


@runtime_checkable
class Images(Protocol):
    """The interface of an image set (ditlab.data.imageset)."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        ...

    @property
    def stochastic(self) -> bool:
        """Whether each use of an image is a new draw (of the latents' posterior), so that `batch` takes noise."""
        ...

    def batch(self, indices: np.ndarray, noise: Tensor | None = None, mirrored: Tensor | None = None) -> Tensor:
        """Returns images `[B, C, H, W]` as the network sees them, mirrored left to right where `mirrored` is True."""
        ...

    def batch_labels(self, indices: np.ndarray) -> Tensor | None:
        """Returns labels `[B]`, or None."""
        ...


def image_order(seed: int, step: int, batch: int, train: np.ndarray) -> np.ndarray:
    """Returns the `[batch]` images of one step: seeded permutations of the train images, epoch after epoch.

    Args:
        seed: the run's seed.
        step: steps done before this one.
        batch: images in the global batch.
        train: indices of the train images in the image set.
    """
    positions = np.arange(step * batch, (step + 1) * batch)
    epochs = positions // len(train)
    chosen = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(epochs):
        in_epoch = epochs == epoch
        order = numpy_generator(seed, "order", int(epoch)).permutation(len(train))
        chosen[in_epoch] = train[order[positions[in_epoch] % len(train)]]
    return chosen


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step's batch, on its device."""

    images: Tensor
    label: Tensor | None
    draws: dict[str, Tensor]


class Batches:
    """Makes the batch of any step. On CUDA the next batch is made while the device computes.

    That is not done where the objective's draws depend on the losses of the step before.
    """

    def __init__(
        self,
        images: Images,
        train: np.ndarray,
        objective: Objective,
        config: TrainingConfig,
        context: DistributedContext,
    ) -> None:
        self._images, self._train, self._objective = images, train, objective
        self._config, self._context = config, context
        ahead = context.device.type == "cuda" and not objective.history_keys
        self._worker = ThreadPoolExecutor(1) if ahead else None
        self._ahead: tuple[int, Any] | None = None

    def _make(self, step: int) -> Batch:
        seed, size, shape, device = self._config.seed, self._config.batch_size, self._images.shape, self._context.device
        share = self._context.share(size)
        indices = image_order(seed, step, size, self._train)[share]
        mirrored, noise = None, None
        if self._config.flip:
            mirrored = (torch.rand(size, generator=torch_generator(seed, "flip", step)) < 0.5)[share]
        if self._images.stochastic:
            noise = torch.randn(size, *shape, generator=torch_generator(seed, "posterior", step))[share]
        images = self._images.batch(indices, noise=noise, mirrored=mirrored)
        label = self._images.batch_labels(indices)
        draws = self._objective.draw(torch_generator(seed, "objective", step), size, shape)

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

        return Batch(
            move(images),
            None if label is None else move(label),
            {name: move(value[share].contiguous()) for name, value in draws.items()},
        )

    def __call__(self, step: int) -> Batch:
        """Returns the batch of the step after `step` steps."""
        if self._worker is None:
            return self._make(step)
        ready = self._ahead[1].result() if self._ahead is not None and self._ahead[0] == step else self._make(step)
        self._ahead = (step + 1, self._worker.submit(self._make, step + 1))
        return ready

    def close(self) -> None:
        """Ends the thread that makes batches ahead."""
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)
