"""What verbs and analyses ask of a trained denoiser, whoever trained it: `ditlab.models.run.Run` is one of them.

It is a denoiser with the images it is looked at with, the split that says which of them it was trained on, and a folder
for what is measured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ditlab.config import SplitRecord
from ditlab.data.autoencoder import Autoencoder, Identity
from ditlab.data.imageset import ImageSet
from ditlab.data.pixels import to_uint8
from ditlab.data.splits import Split, verify
from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.guidance import GuidanceConfig
from ditlab.diffusion.samplers import SamplerConfig
from ditlab.provenance import Provenance


class Model(ABC):
    """A trained denoiser, its images and its folder. What comes from images is read when it is first asked for."""

    path: Path
    """The folder for what is measured: analysis/, samples/, report.html."""
    device: torch.device | str = "cpu"
    """Where its denoiser was last put; latents are decoded there too."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What results call it."""

    @property
    @abstractmethod
    def split_record(self) -> SplitRecord:
        """Which images were trained on and which were held out."""

    @cached_property
    @abstractmethod
    def images(self) -> ImageSet:
        """The image set of the split."""

    @property
    @abstractmethod
    def conditional(self) -> bool:
        """Whether the network takes class labels."""

    @property
    @abstractmethod
    def sampler(self) -> SamplerConfig:
        """How samples are drawn by default."""

    @property
    def guidance(self) -> GuidanceConfig:
        """How strongly samples are pulled towards their class by default; not at all where nothing is known of it."""
        return GuidanceConfig()

    @property
    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """Every known setting by its dotted name ("network.attention"), as JSON values: kinds are told apart by it."""

    @property
    @abstractmethod
    def newest_step(self) -> int | None:
        """Training step of the newest weights; None where there are none, or the step is not known."""

    @abstractmethod
    def facts(self, step: int | None, *, ema: bool = True, label: str = "") -> Provenance:
        """What a result keeps about it.

        Args:
            step: training step of the weights.
            ema: whether they are the averaged ones.
            label: what kind it is.
        """

    @abstractmethod
    def denoiser_and_provenance(
        self,
        *,
        step: int | None = None,
        ema: bool = True,
        label: str = "",
        device: torch.device | str = "cpu",
        say: Callable[[str], None] | None = None,
    ) -> tuple[Denoiser, Provenance]:
        """What an analysis needs: the denoiser, and what its result keeps about these weights.

        Args:
            step: of which checkpoint; the newest whole one where None.
            ema: the averaged weights (usual), or the raw ones.
            label: what kind it is.
            device: where it computes.
            say: told when a damaged checkpoint is passed over.
        """

    @property
    def log(self) -> list[dict[str, Any]]:
        """The lines of the training log; empty where there is none."""
        return []

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of the images that it is looked at with, one sentence each."""
        return ()

    @property
    def mirrored(self) -> bool:
        """Whether training mirrored images left to right."""
        return bool(self.settings.get("training.flip", False))

    @property
    def command(self) -> str:
        """The command that trained it, where that is known."""
        return ""

    @property
    def environment(self) -> Mapping[str, str]:
        """Versions and machine of the training, where they are known."""
        return {}

    @cached_property
    def split(self) -> Split:
        """The train and test images, made again and checked against the recorded hash."""
        return verify(asdict(self.split_record), self.images)

    def pictures(self, side: Literal["train", "test"], count: int) -> tuple[Tensor, Tensor | None]:
        """The first `count` train or test images `[B, C, H, W]` as the denoiser sees them, and their labels."""
        indices = getattr(self.split, side)[:count]
        labels = self.images.batch_labels(indices) if self.conditional else None
        return self.images.batch(indices), labels

    def mirrored_twins(self, count: int) -> Tensor | None:
        """The first `count` train images `[B, C, H, W]` as the denoiser saw them mirrored; None where it never did.

        Raises:
            DitlabError: latents of mirrored pictures that are not there.
        """
        if not self.mirrored:
            return None
        indices = self.split.train[:count]
        return self.images.batch(indices, mirrored=torch.ones(len(indices), dtype=torch.bool))

    def denoiser(
        self,
        *,
        step: int | None = None,
        ema: bool = True,
        device: torch.device | str = "cpu",
        say: Callable[[str], None] | None = None,
    ) -> Denoiser:
        """The denoiser alone; arguments as for `denoiser_and_provenance`."""
        return self.denoiser_and_provenance(step=step, ema=ema, device=device, say=say)[0]

    @cached_property
    def codec(self) -> Autoencoder:
        """What stands between pictures and the images as the denoiser sees them; the identity for pixels."""
        return Identity()

    def pixels(self, images: Tensor) -> np.ndarray:
        """Pictures uint8 `[B, C, H, W]` to look at, of images `[B, c, h, w]` as the denoiser sees them."""
        return to_uint8(self.codec.to(self.device).decode(images)).numpy()

    def decoded_at(self, indices: Sequence[int] | np.ndarray, *, mirrored: bool = False) -> np.ndarray:
        """Pictures uint8 `[B, C, H, W]` of what the denoiser sees of the images at these places of the image set.

        Samples are compared with these: for latents, what the autoencoder makes of them, as it does of samples.

        Args:
            indices: places in the image set.
            mirrored: what it sees of them mirrored left to right.

        Raises:
            DitlabError: latents of mirrored pictures that are not there.
        """
        flip_mask = torch.ones(len(indices), dtype=torch.bool) if mirrored else None
        return self.pixels(self.images.batch(indices, mirrored=flip_mask))

    def pixels_at(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Pictures uint8 `[B, C, H, W]` of the images at these places of the image set, to look at.

        For latents the pictures themselves, where their set still lies where it lay; else the decoded latents.
        """
        pictures = self._pictures
        return self.pixels(self.images.batch(indices)) if pictures is None else pictures.take(indices)

    @cached_property
    def _pictures(self) -> ImageSet | None:
        return self.images.original
