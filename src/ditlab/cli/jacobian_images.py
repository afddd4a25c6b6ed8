"""At which images `ditlab jacobian` looks: the run's own, or picture files; as they are, or with their pixels shuffled.

Picture files show a denoiser at an image of one's own, and several sets' denoisers at the same one. Shuffled pixels are
the control for patterns that follow an image: the values are those of the image, its shapes are gone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ditlab.analyses.jacobian.result import JacobianConfig
from ditlab.data.autoencoder import Autoencoder
from ditlab.data.pixels import centre_crop, decode, planes, to_float
from ditlab.errors import DitlabError
from ditlab.models.model import Model
from ditlab.rng import numpy_generator

Side = Literal["test", "train"]


@dataclass(frozen=True)
class Shown:
    """Which images a denoiser is shown."""

    side: Side = "test"
    """Held-out or training images of the run, where no files are given."""
    files: tuple[Path, ...] = ()
    """Pictures to show instead, all of them."""
    shuffled: bool = False
    """Whether the pixels of each change places, by one permutation for all its channels."""

    def settings(self, config: JacobianConfig) -> JacobianConfig:
        """The config with the places of the files as its images, where there are files.

        Raises:
            DitlabError: the config names images of the run as well.
        """
        if not self.files:
            return config
        if config.images != JacobianConfig().images:
            raise DitlabError(f"jacobian: expected --images or --pictures, found both (--images {config.images})")
        if self.side != "test":
            raise DitlabError(f"jacobian: expected --images-from or --pictures, found both (--images-from {self.side})")
        return replace(config, images=tuple(range(len(self.files))))

    def images(
        self, run: Model, config: JacobianConfig, shape: Sequence[int]
    ) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """The images as a denoiser sees them, their labels, and what a result keeps of where they came from.

        Args:
            run: whose images they are, and whose codec encodes pictures.
            config: which places of the side are asked for.
            shape: (C, H, W) that the denoiser takes.

        Returns:
            float32 [n, C, H, W]; int64 [n], or None where none is told; JSON values.

        Raises:
            DitlabError: a file is missing, no image, or too small; the denoiser's images are not square.
        """
        about: dict[str, Any] = {"images_from": self.side}
        if self.files:
            pictures = _read(self.files, shape, run.codec)
            images, labels = _encoded(pictures, run.codec), None
            found = [hashlib.sha256(picture.tobytes()).hexdigest() for picture in pictures]
            about = {"images_from": "files", "pictures": found}
        else:
            images, labels = run.pictures(self.side, max(config.images) + 1)
        if self.shuffled:
            about["shuffled"] = True
            images = torch.stack([_shuffled(image, place) for place, image in enumerate(images)])
        return images, labels, about


def _read(files: Sequence[Path], shape: Sequence[int], codec: Autoencoder) -> np.ndarray:
    """uint8 [n, C, H, W]: the files' centres at the denoiser's size, as `ditlab data prepare` would cut them."""
    if shape[1] != shape[2]:
        raise DitlabError(f"jacobian --pictures: expected a denoiser of square images, found {shape[1]}x{shape[2]}")
    channels = shape[0] if codec.record.kind == "identity" else codec.record.image_channels
    if channels not in (1, 3):
        raise DitlabError(f"jacobian --pictures: expected a denoiser of 1 or 3 channels, found {channels}")
    size = shape[1] * codec.record.factor
    found = []
    for file in files:
        if not file.is_file():
            raise DitlabError(f"{file}: no such picture file")
        try:
            picture = decode(file, "rgb" if channels == 3 else "grey")
        except DitlabError as error:
            raise DitlabError(f"{file}: {error}") from None
        if min(picture.size) < size:
            raise DitlabError(
                f"{file}: expected a picture of at least {size}x{size} pixels, found {picture.width}x{picture.height}"
            )
        found.append(planes(centre_crop(picture, size)))
    return np.stack(found)


def _encoded(pictures: np.ndarray, codec: Autoencoder) -> Tensor:
    """The pictures as a denoiser sees them: in [-1, 1], or the means of their scaled latents."""
    mean, _ = codec.moments(to_float(torch.from_numpy(np.ascontiguousarray(pictures))).to(codec.device))
    return (mean.float().cpu() - codec.record.shift) * codec.record.scale


def _shuffled(image: Tensor, place: int) -> Tensor:
    """The image [C, H, W] with its pixels in an order that depends on its place alone."""
    order = numpy_generator(0, "shuffled pixels", place).permutation(image[0].numel())
    return image.flatten(1)[:, torch.from_numpy(order)].reshape(image.shape)
