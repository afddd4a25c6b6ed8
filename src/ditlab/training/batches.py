"""The batch of a step: images, labels and random draws, all functions of (seed, step) (DESIGN 3.4)."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from ditlab.rng import numpy_generator, torch_generator
from ditlab.training.config import TrainingConfig
from ditlab.training.distributed import DistributedContext

__all__ = ["Batch", "Batches", "Images", "Objective", "image_order"]


@runtime_checkable
class Objective(Protocol):
    """The interface of an objective (ditlab.diffusion.objectives)."""

    @property
    def history_keys(self) -> tuple[str, ...]:
        """Names of the draws and losses `[B]` of a step that it learns from; empty for most objectives."""
        ...

    def update(self, seen: Mapping[str, Tensor]) -> None:
        """Takes them after each step, for all images of the global batch."""
        ...

    def draw(self, generator: torch.Generator, count: int, shape: tuple[int, int, int]) -> dict[str, Tensor]:
        """Returns every random number of `count` images, on the CPU, first dimension `count`."""
        ...

    def losses(
        self, network: nn.Module, images: Tensor, label: Tensor | None, draws: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Returns per-image losses `[B]`; "loss" is the one to minimize."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Returns what the objective has learned from steps, as JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what `state_dict` returned."""
        ...


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
    """Returns the indices of the images of one step: seeded permutations of the train images, epoch after epoch.

    Args:
        seed: the run's seed.
        step: steps done before this one.
        batch: images in the global batch.
        train: indices of the train images in the image set.

    Returns:
        `[batch]` indices, a pure function of the arguments.
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
        self._permutation: tuple[int, np.ndarray] | None = None

    def _make(self, step: int) -> Batch:
        config, device = self._config, self._context.device
        share = self._context.share(config.batch_size)
        indices = image_order(config.seed, step, config.batch_size, self._train)[share]
        flip_mask, noise = None, None
        if config.flip:
            flip_mask = torch.rand(config.batch_size, generator=torch_generator(config.seed, "flip", step)) < 0.5
        if self._images.stochastic:
            noise = torch.randn(
                config.batch_size, *self._images.shape, generator=torch_generator(config.seed, "posterior", step)
            )
        images = self._images.batch(
            indices,
            noise=None if noise is None else noise[share],
            mirrored=None if flip_mask is None else flip_mask[share],
        )
        label = self._images.batch_labels(indices)
        draws = self._objective.draw(
            torch_generator(config.seed, "objective", step), config.batch_size, self._images.shape
        )

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
