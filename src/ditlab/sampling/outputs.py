"""The files of a sampling job: PNGs, a grid, samples.npz, the sweep of guidance scales, the strip of trajectories."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ditlab.data.contact_sheet import fitting_scale, image_grid
from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.noise_levels import DiscreteLevels
from ditlab.diffusion.samplers import SamplerStep
from ditlab.pages.grids import labelled_grid
from ditlab.pages.theme import png
from ditlab.sampling.batch_store import Batches, first_images, write_npz

if TYPE_CHECKING:
    from ditlab.sampling.job import SamplingJob
    from ditlab.sampling.model import Sampled

__all__ = ["TrajectoryRecorder", "overview_png", "write_outputs", "write_pngs"]

GRID_IMAGES = 100
"""Images in grid.png, at most."""
STRIP_STEPS = 8
"""Steps in strip.png, at most, before the image itself."""


class TrajectoryRecorder:
    """Records the first `count` images of a batch on their way from noise to image; a callback of the sampler."""

    def __init__(self, model: Sampled, count: int) -> None:
        self._model, self._count = model, count
        self._sigmas: list[float] = []
        self._images: dict[str, list[np.ndarray]] = {"states": [], "estimates": []}

    def __call__(self, step: SamplerStep) -> None:
        """Records the state, scaled to unit variance, and the estimate, at some of the steps."""
        if self._count and step.index in np.linspace(0, step.steps - 1, min(STRIP_STEPS, step.steps)).round():
            self._sigmas.append(step.sigma)
            for name, images in (("states", step.y / math.sqrt(1 + step.sigma**2)), ("estimates", step.x0)):
                pictures = self._model.decode(images[: self._count].float())
                self._images[name].append(pictures.transpose(0, 2, 3, 1))

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns levels [K], and states and estimates, uint8 [n, K, H, W, C]; empty if nothing was recorded."""
        if not self._sigmas:
            return {}
        return {"sigmas": np.array(self._sigmas), **{k: np.stack(images, 1) for k, images in self._images.items()}}


def write_pngs(folder: Path, images: np.ndarray, seeds: Sequence[int]) -> None:
    """Writes one PNG for each seed and flushes it to disk; images uint8 [b, H, W, C]."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for seed, image in zip(seeds, images, strict=True):
        with (folder / f"{seed:06d}.png").open("wb") as file:
            Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, "png")
            file.flush()
            os.fsync(file.fileno())


def write_outputs(job: SamplingJob, batches: Batches, folder: Path) -> None:
    """Writes the files that are made of all batches: grid.png and samples.npz, or sweep.png; and strip.png."""
    if job.sweep:
        (folder / "sweep.png").write_bytes(overview_png(job, batches))
    else:
        (folder / "grid.png").write_bytes(overview_png(job, batches))
        write_npz(folder / "samples.npz", batches, len(job.seeds), job.classes)
    if job.settings.strip:
        (folder / "strip.png").write_bytes(_strip_png(job, batches))


def overview_png(job: SamplingJob, batches: Batches) -> bytes:
    """Returns the PNG of the first images; of a sweep, of all, with a row for each guidance scale."""
    if job.sweep:
        images = first_images(batches, job.count).transpose(0, 3, 1, 2)
        table = images.reshape(len(job.guidances), len(job.seeds), *images.shape[1:])
        rows = [f"w = {guidance.scale:g}" for guidance in job.guidances]
        return png(labelled_grid(table, rows, [job.image_label(place) for place in range(len(job.seeds))]))
    images = first_images(batches, GRID_IMAGES).transpose(0, 3, 1, 2)
    buffer = io.BytesIO()
    image_grid(images, scale=fitting_scale(images.shape[-1])).save(buffer, "png")
    return buffer.getvalue()


def _strip_png(job: SamplingJob, batches: Batches) -> bytes:
    """Returns the PNG of the first images' trajectories: two rows for each, the state and the estimate."""
    count = job.settings.strip
    columns: dict[str, list[np.ndarray]] = {"states": [], "estimates": [], "images": []}
    sigmas = np.empty(0)
    for batch in (batch for batch in batches.done() if batch.start < count):
        sigmas = batches.array(batch, "sigmas")
        for name, arrays in columns.items():
            arrays.append(batches.array(batch, name))
    images = np.concatenate(columns["images"])[:count, None]
    rows = [np.concatenate([np.concatenate(columns[name]), images], 1) for name in ("states", "estimates")]
    table = np.stack(rows, 1).reshape(-1, *rows[0].shape[1:]).transpose(0, 1, 4, 2, 3)
    labels = [text for i in range(count) for text in (f"{job.image_label(i)}\nstate", "estimate of\nthe image")]
    return png(labelled_grid(table, labels, [*(_level(job.denoisers[0], float(s)) for s in sigmas), "image"]))


def _level(denoiser: Denoiser, sigma: float) -> str:
    """Returns the label of a noise level: its step if the denoiser's steps are numbered, else sigma."""
    levels = denoiser.levels
    if isinstance(levels, DiscreteLevels):
        return f"t = {levels.step(sigma):.0f}"
    return f"σ = {sigma:.3g}"
