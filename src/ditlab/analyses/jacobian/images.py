"""The images at which Jacobians are taken: those of a model, picture files, or either with permuted pixels.

Picture files show a denoiser at any image, and denoisers of several image sets at the same one. Permuted pixels are the
control for patterns that follow an image: its values stay, its shapes are gone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ditlab.analyses.jacobian.config import JacobianConfig, JacobianOptions
from ditlab.data.autoencoder import Autoencoder
from ditlab.data.pixels import centre_crop, decode, planes, to_float
from ditlab.errors import DitlabError, Incompatible, InvalidConfig, NotFound
from ditlab.models.model import Model
from ditlab.rng import numpy_generator

__all__ = ["config_of_images", "load_images"]


def config_of_images(config: JacobianConfig, options: JacobianOptions) -> JacobianConfig:
    """Returns the config, with the places of the picture files as its images where there are such files."""
    if not options.pictures:
        return config
    if config.images != JacobianConfig().images:
        raise InvalidConfig(f"jacobian: expected `images` or `pictures`, found both (images {config.images})")
    if options.images_from != "test":
        raise InvalidConfig(f"jacobian: expected `images_from` or `pictures`, found both ({options.images_from})")
    return replace(config, images=tuple(range(len(options.pictures))))


def load_images(
    model: Model, config: JacobianConfig, options: JacobianOptions, shape: Sequence[int]
) -> tuple[Float[Tensor, "n c h w"], Int64[Tensor, " n"] | None, dict[str, Any]]:
    """Loads the images as a denoiser of this shape (C, H, W) sees them, with what a result keeps about their origin.

    Returns:
        Images of a side up to the last that `config_of_images` names, float32 [n, C, H, W]; their labels, int64 [n], or
        None; JSON values.

    Raises:
        DitlabError: a file is missing, no image, or too small; the denoiser's images are not square.
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
