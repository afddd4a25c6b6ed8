"""The Jacobians of one model: its images; reused from earlier results, measured where missing, saved image by image.

The images are those of the model, picture files, or either with permuted pixels. Picture files show a denoiser at any
image, and denoisers of several image sets at the same one. Permuted pixels are the control for patterns that follow an
image: its values stay, its shapes are gone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ditlab.analyses.cache import find_results, save_result
from ditlab.analyses.jacobian.comparison import same_noise
from ditlab.analyses.jacobian.config import JacobianConfig, JacobianOptions
from ditlab.analyses.jacobian.measure import check_jacobian, measure_jacobian
from ditlab.analyses.jacobian.result import JacobianPoint, JacobianResult
from ditlab.data.autoencoder import Autoencoder
from ditlab.data.pixels import centre_crop, decode, planes, to_float
from ditlab.errors import DitlabError, Incompatible, InvalidConfig, NotFound
from ditlab.models.comparing import OpenedModel
from ditlab.models.model import Model
from ditlab.progress import SILENT, Reporter
from ditlab.provenance import Provenance, check_groups
from ditlab.rng import numpy_generator

if TYPE_CHECKING:
    from ditlab.analyses.jacobian import Jacobian

__all__ = ["JacobianJob", "check_jobs"]

UNFINISHED = "jacobian-unfinished"
"""The file of the images that are measured so far, until all are."""


@dataclass(frozen=True, eq=False)
class JacobianJob:
    """A model whose Jacobians are to be measured, checked as far as possible before the work starts."""

    analysis: Jacobian
    opened: OpenedModel
    config: JacobianConfig
    about: Provenance
    sigmas: tuple[float, ...]
    """The noise levels, ascending."""
    images: Tensor
    """The images up to the last one that is needed, float32 [n, C, H, W], as the denoiser sees them."""
    labels: Tensor | None
    """Their classes, int64 [n]."""

    @classmethod
    def prepare(
        cls, analysis: Jacobian, opened: OpenedModel, config: JacobianConfig, options: JacobianOptions
    ) -> JacobianJob:
        """Loads the images and checks the settings (`check_jacobian`)."""
        config = _config_of_images(config, options)
        model, denoiser = opened.model, opened.denoiser
        images, labels, images_about = _load_images(model, config, options, denoiser.shape)
        about = replace(opened.provenance, settings={**opened.provenance.settings, **images_about})
        try:
            sigmas = check_jacobian(denoiser, images, config, labels)
        except DitlabError as error:
            raise type(error)(f"model {model.name}: {error}") from None
        return cls(analysis, opened, config, about, sigmas, images, labels)

    @property
    def folder(self) -> Path:
        """Where results of the model are."""
        return self.opened.model.path / "analysis"

    @property
    def keys(self) -> list[tuple[int, float]]:
        """(image, level) of each Jacobian."""
        return [(image, sigma) for image in self.config.images for sigma in self.sigmas]

    def run(self, reporter: Reporter = SILENT) -> JacobianResult:
        """Returns the Jacobians at all images and levels, and saves them in the model's folder.

        Those that were measured before with the same weights, images and settings are reused. Finished images are saved
        one by one, so that an interrupted measurement resumes.
        """
        points = self._measured_before(reporter)
        reused, total = len(points), len(self.keys)
        if reused:
            reporter.note(f"{self.about.name}: {reused} of {total} Jacobians were measured before and are reused")
        if reused < total:
            self._measure_missing(points, reporter)
        result = self._result(points)
        if reused < total:
            save_result(result, self.folder, self.analysis.name, aside=True)
        for ending in (".json", ".npz"):
            (self.folder / f"{UNFINISHED}{ending}").unlink(missing_ok=True)
        return result

    def _measure_missing(self, points: dict[tuple[int, float], JacobianPoint], reporter: Reporter) -> None:
        """Adds the Jacobians that are missing, and saves what is finished after each image."""
        missing, measured, train = len(self.keys) - len(points), 0, self._training_images()
        with reporter.bar(f"Jacobian of {self.about.name}") as bar:
            for image in self.config.images:
                sigmas = tuple(sigma for sigma in self.sigmas if (image, sigma) not in points)
                if not sigmas:
                    continue

                def on_progress(done: int, work: int, before: int = measured, count: int = len(sigmas)) -> None:
                    each = work // count
                    bar(before * each + done, missing * each)

                config = replace(self.config, images=(image,), sigmas=sigmas, timesteps=None)
                settings: Any = {"labels": self.labels, "about": self.about, "train": train, "progress": on_progress}
                result = measure_jacobian(self.opened.denoiser, self.images, config, **settings)
                points |= {(point.image, point.sigma): point for point in result.points}
                measured += len(sigmas)
                if measured < missing:
                    self._result(points).save(self.folder, UNFINISHED)

    def _training_images(self) -> Tensor:
        """Returns the images that the weights know, [N, C, H, W], and their mirror images if training mirrored them."""
        model = self.opened.model
        count = model.split_record.train
        images, mirrored = model.batch("train", count)[0], model.mirrored_batch(count)
        return images if mirrored is None else torch.cat([images, mirrored])

    def _result(self, points: dict[tuple[int, float], JacobianPoint]) -> JacobianResult:
        return JacobianResult(self.about, self.config, tuple(points[key] for key in self.keys if key in points))

    def _measured_before(self, reporter: Reporter) -> dict[tuple[int, float], JacobianPoint]:
        """Returns the points that earlier measurements of the same kind saved, by image and level."""
        results = find_results(self.analysis, self.opened.model, reporter)
        unfinished = self.folder / f"{UNFINISHED}.json"
        if unfinished.is_file():
            try:
                results.append(JacobianResult.load(unfinished))
            except DitlabError as error:
                reporter.note(f"not used: {error}")
        points: dict[tuple[int, float], JacobianPoint] = {}
        for result in results:
            if result.about.same_measurement(self.about) and _by_image(result.config) == _by_image(self.config):
                points = {(point.image, point.sigma): point for point in result.points} | points
        return {key: points[key] for key in self.keys if key in points}


def _by_image(config: JacobianConfig) -> JacobianConfig:
    """Returns a config without the settings that do not change a single Jacobian."""
    return replace(config, images=(0,), sigmas=None, timesteps=None, mode="auto", chunk=1)


def check_jobs(jobs: Sequence[JacobianJob]) -> None:
    """Raises Incompatible for models that cannot be compared, or have images of several sizes or other noise levels."""
    check_groups([job.about for job in jobs], "jacobian")
    first = jobs[0]
    for job in jobs:
        names = f"{first.opened.model.name} and {job.opened.model.name}"
        shapes = [list(each.opened.denoiser.shape) for each in (first, job)]
        if shapes[0] != shapes[1]:
            raise Incompatible(
                f"jacobian: expected models with images of one size, found {shapes[0]} and {shapes[1]} ({names})"
            )
        if not same_noise(job.sigmas, first.sigmas):
            raise Incompatible(
                f"jacobian: expected models with the same noise levels, found different ones ({names}); give `sigmas`"
            )


def _config_of_images(config: JacobianConfig, options: JacobianOptions) -> JacobianConfig:
    """Returns the config, with the places of the picture files as its images where there are such files."""
    if not options.pictures:
        return config
    if config.images != JacobianConfig().images:
        raise InvalidConfig(f"jacobian: expected `images` or `pictures`, found both (images {config.images})")
    if options.images_from != "test":
        raise InvalidConfig(f"jacobian: expected `images_from` or `pictures`, found both ({options.images_from})")
    return replace(config, images=tuple(range(len(options.pictures))))


def _load_images(
    model: Model, config: JacobianConfig, options: JacobianOptions, shape: Sequence[int]
) -> tuple[Float[Tensor, "n c h w"], Int64[Tensor, " n"] | None, dict[str, Any]]:
    """Loads the images as a denoiser of this shape (C, H, W) sees them, with what a result keeps about their origin.

    Returns images of a side up to the last that the config names, float32 [n, C, H, W]; their labels, int64 [n], or
    None; JSON values.
    """
    about: dict[str, Any] = {"images_from": options.images_from}
    if options.pictures:
        pictures = _read([Path(file) for file in options.pictures], shape, model.codec)
        images, labels = _encode(pictures, model.codec), None
        hashes = [hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures]
        about = {"images_from": "files", "pictures": hashes}
    else:
        images, labels = model.batch(options.images_from, max(config.images) + 1)
    if options.shuffled:
        about["shuffled"] = True
        images = torch.stack([_permute_pixels(image, place) for place, image in enumerate(images)])
    return images, labels, about


def _read(files: Sequence[Path], shape: Sequence[int], codec: Autoencoder) -> np.ndarray:
    """Returns the centres of the files, uint8 [n, C, H, W], at the denoiser's size, cut as by `ditlab data prepare`."""
    if shape[1] != shape[2]:
        raise Incompatible(f"jacobian `pictures`: expected a denoiser of square images, found {shape[1]}x{shape[2]}")
    channels = shape[0] if codec.record.kind == "identity" else codec.record.image_channels
    if channels not in (1, 3):
        raise Incompatible(f"jacobian `pictures`: expected a denoiser of 1 or 3 channels, found {channels}")
    size = shape[1] * codec.record.factor
    pictures = []
    for file in files:
        if not file.is_file():
            raise NotFound(f"{file}: no such picture file")
        try:
            picture = decode(file, "rgb" if channels == 3 else "grey")
        except DitlabError as error:
            raise DitlabError(f"{file}: {error}") from None
        if min(picture.size) < size:
            raise Incompatible(
                f"{file}: expected a picture of at least {size}x{size} pixels, found {picture.width}x{picture.height}"
            )
        pictures.append(planes(centre_crop(picture, size)))
    return np.stack(pictures)


def _encode(pictures: np.ndarray, codec: Autoencoder) -> Tensor:
    """Returns the pictures as a denoiser sees them: in [-1, 1], or the means of their scaled latents."""
    mean, _ = codec.moments(to_float(torch.from_numpy(np.ascontiguousarray(pictures))).to(codec.device))
    return (mean.float().cpu() - codec.record.shift) * codec.record.scale


def _permute_pixels(image: Tensor, place: int) -> Tensor:
    """Returns the image [C, H, W] with its pixels in an order that depends on its place alone."""
    order = numpy_generator(0, "shuffled pixels", place).permutation(image[0].numel())
    return image.flatten(1)[:, torch.from_numpy(order)].reshape(image.shape)
