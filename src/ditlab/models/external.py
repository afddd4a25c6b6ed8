"""Models that ditlab did not train: read from somebody else's checkpoint, or handed over in memory.

Such a model has no images and no split of its own: it is given an image set, and a split of it stands in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditlab.data.autoencoder import Autoencoder, Identity, open_autoencoder
from ditlab.data.imageset import ImageSet
from ditlab.diffusion.denoisers import Denoiser, hash_of_weights
from ditlab.errors import Incompatible, NotFound
from ditlab.interop.imported import ImportedModel
from ditlab.models.model import RESULTS, Model, Side
from ditlab.models.split_config import SplitConfig
from ditlab.networks.base import NetworkConfig
from ditlab.progress import Reporter

__all__ = ["ExternalModel"]


class ExternalModel(Model):
    """A model that ditlab did not train, with an image set to measure it on."""

    def __init__(
        self,
        model: ImportedModel,
        path: Path | None = None,
        *,
        read_raw: Callable[[], ImportedModel] | None = None,
        data: ImageSet | str | Path | None = None,
        codec: str | Path | None = None,
        split: SplitConfig | None = None,
        out: Path | None = None,
    ) -> None:
        """Takes the model itself; all else is read when it is first needed.

        Args:
            model: the model, with its averaged weights.
            path: the folder for results, where the model has one.
            read_raw: reads it with its raw weights, where it may have some.
            data: the image set.
            codec: the autoencoder of a model of latents, where none is stored with it.
            split: which images stand for its training images.
            out: where a folder NAME-DIGEST for results is made, if there is no `path`.
        """
        self.model, self._read_raw, self._images, self._codec = model, read_raw, data, codec
        self.name, self.source_denoiser, self.sampler = model.name, model.denoiser, model.sampler
        self.split_config = split or SplitConfig()
        self.knows_training_images = self.split_config.own_split
        self.conditional = bool(model.denoiser.num_classes)
        self.path = (out or RESULTS) / f"{self.name}-{model.digest[:8]}" if path is None else path

    @property
    def settings(self) -> Mapping[str, Any]:
        """The format, and the network's config where it is one of ditlab's; `preset` is its name."""
        network: Any = getattr(self.model.denoiser.network, "config", None)
        values = asdict(network) if isinstance(network, NetworkConfig) else {}
        shape = {f"network.{name}": value for name, value in values.items()}
        return {"preset": self.name, "format": self.model.source.get("format"), **shape}

    @property
    def _source(self) -> dict[str, Any]:
        return dict(self.model.source)

    def _check_images(self, images: ImageSet) -> None:
        self.model.fit(images.shape)
        super()._check_images(images)
        if self._own_codec is None:
            return
        own = self._own_codec.record
        if images.latents is None:
            raise Incompatible(
                f"model {self.name}: expected latents of the autoencoder '{own.source}', found pixels in "
                f"{images.path}; make latents of them with `ditlab data encode`"
            )
        theirs = images.latents.record.codec
        if (wrong := own.difference(theirs)) is not None:
            name, expected, actual = wrong
            raise Incompatible(
                f"model {self.name}: expected latents of its own autoencoder '{own.source}', with {name} {expected}, "
                f"found latents of '{theirs.source}' with {name} {actual} in {images.path}"
            )

    @cached_property
    def _own_codec(self) -> Autoencoder | None:
        """The autoencoder that was given, or that is stored with the model."""
        place = self.model.decoder if self._codec is None else self._codec
        return None if place is None else open_autoencoder(place)

    @cached_property
    def codec(self) -> Autoencoder:
        """See `Model.codec`; NotFound for a model of latents without any."""
        codec, channels = super().codec, self.source_denoiser.shape[0]
        if isinstance(codec, Identity) and channels not in (1, 3):
            raise NotFound(
                f"model {self.name}: its images have {channels} channels, so they are latents, and no autoencoder is "
                "stored with it to make pictures of them; give one as `codec`, such as stabilityai/sd-vae-ft-ema"
            )
        return codec

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of how it was read, and of the images that it is measured on."""
        notes = [*self.model.notes, *super().notes]
        if self._images is None:
            return tuple(notes)
        if self.conditional and not self._labelled:
            notes.append(
                f"It has {self.model.denoiser.num_classes} classes and the set {self.images.num_classes or 'none'}, so "
                "it got no class labels."
            )
        if self._own_codec is None and (latents := self.images.latents) is not None:
            codec = latents.record.codec
            notes.append(
                "No autoencoder is stored with this model, so it is assumed to work on the latents of "
                f"'{codec.source}' (scale {codec.scale:g}, shift {codec.shift:g}) that {self.images.path} holds; with "
                "those of another its numbers would mean nothing."
            )
        return tuple(notes)

    def batch(self, side: Side, count: int) -> tuple[Tensor, Tensor | None]:
        """Returns the first train or test images, and their labels where set and model have as many classes.

        Raises:
            Incompatible: the classes differ, and the model needs labels.
        """
        images, labels = super().batch(side, count)
        denoiser = self.model.denoiser
        if self.conditional and not self._labelled:
            if not denoiser.null_class:
                raise Incompatible(
                    f"model {self.name}: expected images of its {denoiser.num_classes} classes, for it has no null "
                    f"class, found {self.images.num_classes or 'no'} classes in {self.images.path}"
                )
            labels = None
        return images, labels

    @property
    def _labelled(self) -> bool:
        return self.images.num_classes == self.model.denoiser.num_classes

    def _load(
        self, step: int | None, ema: bool, device: torch.device, reporter: Reporter
    ) -> tuple[Denoiser, int | None, str]:
        self._check_weights(step, ema or self._read_raw is not None)
        model = self.model if ema or self._read_raw is None else self._read_raw()
        if self._images is not None:
            model.fit(self.images.shape)
        denoiser = model.denoiser
        denoiser.network.to(device)
        latent = self.model.decoder is not None or self._codec is not None
        latent = latent or (self._images is not None and self.images.latents is not None)
        denoiser.pixel_space = denoiser.shape[0] in (1, 3) and not latent
        self.device = device
        # The file's digest says how it was read; its averaged and raw weights, and those changed in memory, differ.
        return denoiser, None, hash_of_weights(denoiser, model.digest)
