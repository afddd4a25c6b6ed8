"""A model: a denoiser with its images, the split of them, and a folder for what is measured.

`Model` is one of a user's own denoiser; `ditlab.models.run.Run` is one that ditlab trained, and
`ditlab.models.external.ExternalModel` one that was read from somebody else's checkpoint. Sampling, every analysis and
the report take any of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ditlab.arguments import checks_arguments
from ditlab.config import SplitRecord
from ditlab.data.autoencoder import Autoencoder, Identity, reopen_autoencoder
from ditlab.data.autoencoder_record import AutoencoderRecord
from ditlab.data.imageset import ImageSet
from ditlab.data.pixels import to_uint8
from ditlab.data.splits import Split, held_out_order, make_split, verify
from ditlab.diffusion.denoisers import Denoiser, hash_of_weights
from ditlab.diffusion.fingerprint import UNKNOWN, fingerprint
from ditlab.diffusion.guidance_config import GuidanceConfig
from ditlab.diffusion.samplers import DDIMConfig, HeunConfig, SamplerConfig
from ditlab.errors import Incompatible, NotFound
from ditlab.models.split_config import SplitConfig
from ditlab.progress import SILENT, Reporter
from ditlab.provenance import Provenance
from ditlab.training.distributed import Device

if TYPE_CHECKING:
    from ditlab.sampling.samples import Samples

__all__ = ["Model"]

RESULTS = Path("external")
"""The folder for results of models that have no folder of their own: RESULTS/NAME-DIGEST."""

Side = Literal["train", "test"]


class Model:
    """A denoiser with its images, split and results folder. What comes from images is read when it is first needed.

    Example:
        >>> denoiser = ditlab.Denoiser.wrap(network, shape=(3, 32, 32))  # doctest: +SKIP
        >>> mine = ditlab.Model(denoiser, "sets/faces", n=1000, name="mine")  # doctest: +SKIP
        >>> ditlab.psnr_gap([mine, "runs/global"]).table()  # doctest: +SKIP
    """

    name: str
    """What results call it."""
    path: Path
    """The folder for what is measured: analysis/, samples/, report.html."""
    conditional: bool
    """Whether the network takes class labels."""
    sampler: SamplerConfig
    """How samples are drawn by default."""
    guidance: GuidanceConfig = GuidanceConfig()
    """How strongly samples are pulled towards their class by default: not at all."""
    mirrored: bool = False
    """Whether training mirrored images left to right."""
    knows_training_images: bool
    """Whether the training images of the split are those that the denoiser was trained on."""
    command: str = ""
    """The command that trained it, where that is known."""
    environment: Mapping[str, str] = {}
    """Versions and machine of the training, where they are known."""
    device: torch.device = torch.device("cpu")
    """Where its denoiser was last put; latents are decoded there too."""
    held_out: ImageSet | None = None
    """Images of a set of their own that take the place of the split's test images; see `use_held_out`."""

    @checks_arguments({})
    def __init__(
        self,
        denoiser: Denoiser,
        images: ImageSet | str | Path | None = None,
        *,
        n: int | None = None,
        test: int = 300,
        seed: int = 0,
        own_split: bool = False,
        name: str = "model",
        out: str | Path | None = None,
        sampler: SamplerConfig | None = None,
        autoencoder: Autoencoder | None = None,
        mirrored: bool = False,
    ) -> None:
        """Makes a model of a denoiser.

        Args:
            denoiser: ditlab's, or a user's own from `Denoiser.wrap`.
            images: the image set, or its folder; None for a model that only samples.
            n: number of training images; all but the test images where None.
            test: number of test images.
            seed: of the split; the same as a run's `seed` gives the same images.
            own_split: whether the denoiser was trained on exactly these training images. If not, results note that its
                training images are unknown.
            name: what results call it.
            out: the folder for results; `external/NAME-DIGEST` in the current folder where None.
            sampler: how samples are drawn by default; DDIM in 50 steps, or Heun's method on a continuous range of
                levels, where None.
            autoencoder: what turns latents into pictures; that of the image set where None.
            mirrored: whether training mirrored images left to right.
        """
        self.name, self.mirrored, self.knows_training_images = name, mirrored, own_split
        self.source_denoiser, self._images, self._autoencoder = denoiser, images, autoencoder
        self.split_config = SplitConfig(n, test, seed, own_split)
        self.conditional = bool(denoiser.num_classes)
        discrete = hasattr(denoiser.levels, "steps")
        usual = DDIMConfig(steps="50") if discrete else HeunConfig(sigma_min=0.02, sigma_max=80.0)
        self.sampler = usual if sampler is None else sampler
        # What cannot be hashed as a whole is told apart by its code and by what it holds.
        digest = hash_of_weights(denoiser) or fingerprint(denoiser).strip(UNKNOWN)
        self.path = Path(out) if out is not None else RESULTS / f"{name}-{digest[:8]}"

    @staticmethod
    @checks_arguments({})
    def from_diffusers(
        module: nn.Module,
        scheduler: Any,
        images: ImageSet | str | Path | None = None,
        *,
        n: int | None = None,
        test: int = 300,
        seed: int = 0,
        own_split: bool = False,
        name: str = "diffusers",
        out: str | Path | None = None,
    ) -> Model:
        """Makes a model of a network and a scheduler of the diffusers library that are in memory.

        Args:
            module: a `UNet2DModel` or a `DiTTransformer2DModel`; it is put in evaluation mode.
            scheduler: a scheduler of a discrete VP process.
            images: as for `Model`, like all that follow.

        Raises:
            DitlabError: diffusers is not installed, or module or scheduler is of another kind.
        """
        from ditlab.interop.diffusers_models import import_diffusers
        from ditlab.models.external import ExternalModel

        model, split = import_diffusers(module, scheduler, name), SplitConfig(n, test, seed, own_split)
        return ExternalModel(model, None if out is None else Path(out), data=images, split=split)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, results in {str(self.path)!r})"

    @cached_property
    def images(self) -> ImageSet:
        """The image set of the split.

        Raises:
            DitlabError: none is known, or its images have another shape than the denoiser takes.
        """
        if self._images is None:
            raise NotFound(f"model {self.name}: training images unknown; pass an image set as `data`")
        images = self._images if isinstance(self._images, ImageSet) else ImageSet.open(self._images)
        self._check_images(images)
        return images

    def _check_images(self, images: ImageSet) -> None:
        """Raises Incompatible where the denoiser cannot take these images."""
        shape = tuple(self.source_denoiser.shape)
        if images.shape != shape:
            raise Incompatible(
                f"model {self.name}: expected images {_dims(shape)}, found {_dims(images.shape)} in {images.path}"
            )

    @cached_property
    def split_record(self) -> SplitRecord:
        """Which images were trained on and which were held out."""
        config = self.split_config
        return SplitRecord(**make_split(self.images, config.n, config.test, config.split_seed).to_json())

    @cached_property
    def split(self) -> Split:
        """The train and test images, made again and checked against the recorded hash."""
        return verify(asdict(self.split_record), self.images)

    @property
    def test_hash(self) -> str:
        """Hash of the test images: equal for models that are measured on the same ones."""
        if self.held_out is None:
            return self.split_record.family
        return hashlib.sha256(f"held out {self.held_out.hash}".encode()).hexdigest()

    def use_held_out(self, images: ImageSet) -> None:
        """Takes the test images from a set of their own, whatever the split held out.

        Raises:
            Incompatible: its images have another shape.
        """
        if images.shape != self.images.shape:
            raise Incompatible(
                f"model {self.name}: expected held-out images {_dims(self.images.shape)}, found "
                f"{_dims(images.shape)} in {images.path}"
            )
        self.held_out = images

    @property
    def settings(self) -> Mapping[str, Any]:
        """Every known setting by its dotted name ("network.attention"), as JSON values; kinds are told apart by it."""
        return {"preset": self.name}

    @property
    def newest_step(self) -> int | None:
        """Training step of the newest weights; None where there are none, or the step is not known."""
        return None

    def provenance(self, step: int | None = None, *, ema: bool = True, label: str = "") -> Provenance:
        """Returns what a result keeps about the model, with a label of its kind and these weights of it."""
        about = Provenance(self.name, label, step=step, ema=ema, settings={"model": self._source})
        if self._images is None:
            return about
        settings = {**about.settings, "image_set": self.split_record.imageset, "notes": list(self.notes)}
        return self._with_split(replace(about, settings=settings))

    def _with_split(self, about: Provenance) -> Provenance:
        split = self.split_record
        if self.held_out is not None:
            about = replace(about, settings={**about.settings, "held_out": self.held_out.hash})
        return replace(about, n=split.train, seed=split.seed, split_family=self.test_hash, split_hash=split.hash)

    @property
    def _source(self) -> dict[str, Any]:
        """Where the denoiser comes from, as JSON values."""
        return {"format": "python"}

    def denoiser_and_provenance(
        self,
        *,
        step: int | None = None,
        ema: bool = True,
        label: str = "",
        device: Device = "cpu",
        reporter: Reporter = SILENT,
    ) -> tuple[Denoiser, Provenance]:
        """Returns what an analysis needs: the denoiser, and what its result keeps about these weights.

        Args:
            step: of which checkpoint; the newest whole one where None.
            ema: the averaged weights (usual), or the raw ones.
            label: the kind of model.
            device: where it computes.
            reporter: told when a damaged checkpoint is passed over.

        Raises:
            DitlabError: a checkpoint or raw weights that are not there.
        """
        denoiser, step, weights = self._load(step, ema, torch.device(device), reporter)
        return denoiser, replace(self.provenance(step, ema=ema, label=label), weights=weights)

    def _load(
        self, step: int | None, ema: bool, device: torch.device, reporter: Reporter
    ) -> tuple[Denoiser, int | None, str]:
        """Returns the denoiser with some weights on a device, their step where there are several, and their hash."""
        self._check_weights(step, ema)
        denoiser = self.source_denoiser
        if denoiser.module is not None:
            denoiser.module.to(device)
            if not isinstance(getattr(type(denoiser), "device", None), property):  # else it follows the weights
                denoiser.device = device
        self.device = denoiser.device
        return denoiser, None, hash_of_weights(denoiser)

    def _check_weights(self, step: int | None, ema: bool) -> None:
        """Refuses other weights than the only set of them."""
        if step is not None:
            raise NotFound(f"model {self.name}: expected no `checkpoint`, for it has one set of weights, found {step}")
        if not ema:
            raise NotFound(f"model {self.name}: expected raw weights beside averaged ones, found one set only")

    def denoiser(
        self,
        *,
        step: int | None = None,
        ema: bool = True,
        device: Device = "cpu",
        reporter: Reporter = SILENT,
    ) -> Denoiser:
        """Returns the denoiser alone; arguments as for `denoiser_and_provenance`."""
        return self.denoiser_and_provenance(step=step, ema=ema, device=device, reporter=reporter)[0]

    def sample(self, **settings: Any) -> Samples | None:
        """Draws images, in memory or into a folder (`out`), where the same call resumes after a kill.

        Args:
            settings: those of `ditlab.sampling.samples.sample_model`: seeds, sampler, steps, classes, out, ...

        Example:
            >>> samples = ditlab.open("runs/global").sample(seeds=range(64))  # doctest: +SKIP
            >>> samples.save("samples")  # doctest: +SKIP

        Returns:
            The samples; None on a rank other than 0 whose rank 0 refused.

        Raises:
            DitlabError: anything that cannot be drawn or written.
        """
        from ditlab.sampling.samples import sample_model

        return sample_model(self, **settings)

    @property
    def log(self) -> list[dict[str, Any]]:
        """The lines of the training log; empty where there is none."""
        return []

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of the images that the model is measured on, one sentence each."""
        if self.knows_training_images or self._images is None:
            return ()
        split = self.split_record
        unknown = (
            f"The training images of this model are unknown: the {split.train} training and {split.test} test images "
            f"of {self.images.path} are a split that ditlab made (seed {split.seed}), so a gap of 0 does not show that "
            "it does not memorize."
        )
        return (unknown,)

    def batch(self, side: Side, count: int) -> tuple[Tensor, Tensor | None]:
        """Returns the first train or test images as the denoiser sees them, and their labels if it takes any.

        Returns:
            float32 [B, C, H, W], B at most `count`; int64 [B], or None where the model takes no labels.
        """
        images, indices = self.images, getattr(self.split, side)[:count]
        if side == "test" and self.held_out is not None:
            images, indices = self.held_out, held_out_order(self.held_out, self.split_record.seed)[:count]
        labels = images.batch_labels(indices) if self.conditional else None
        return images.batch(indices), labels

    def mirrored_batch(self, count: int) -> Tensor | None:
        """Returns the first train images mirrored, float32 [B, C, H, W]; None where training never mirrored them.

        Raises:
            DitlabError: mirrored latents are needed and were not stored.
        """
        if not self.mirrored:
            return None
        return self._mirrored(self.split.train[:count])

    def _mirrored(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        return self.images.batch(indices, mirrored=torch.ones(len(indices), dtype=torch.bool))

    @cached_property
    def codec(self) -> Autoencoder:
        """The model's own autoencoder, else the one its images were encoded with, else the identity."""
        if (own := self._own_codec) is not None:
            return own
        if self._images is not None and (latents := self.images.latents) is not None:
            return reopen_autoencoder(latents.record.codec, self.images.path)
        return Identity(self.source_denoiser.shape[0])

    @cached_property
    def _own_codec(self) -> Autoencoder | None:
        return self._autoencoder

    @property
    def autoencoder_record(self) -> AutoencoderRecord:
        """What the autoencoder is; the identity's for pixels."""
        return self.codec.record

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes of the image set."""
        return self.images.class_names

    def decode(self, images: Tensor) -> np.ndarray:
        """Returns pictures, uint8 [B, C, H, W], of images [B, c, h, w] as the denoiser sees them."""
        return to_uint8(self.codec.to(self.device).decode(images)).numpy()

    def decoded(self, indices: Sequence[int] | np.ndarray, *, mirrored: bool = False) -> np.ndarray:
        """Returns pictures, uint8 [B, C, H, W], of what the denoiser sees of some images of the set.

        Samples are compared with these: for latents, with what the autoencoder makes of them.

        Raises:
            DitlabError: mirrored latents are needed and were not stored.
        """
        return self.decode(self._mirrored(indices) if mirrored else self.images.batch(indices))

    def decoded_held_out(self, count: int) -> np.ndarray:
        """Returns pictures, uint8 [B, C, H, W], of what the denoiser sees of the first test images."""
        if self.held_out is None:
            return self.decoded(self.split.test[:count])
        return self.decode(self.batch("test", count)[0])

    def originals(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Returns pictures, uint8 [B, C, H, W], of some images of the set, to look at.

        For latents these are the pictures that were encoded, where their set is still there; else the decoded latents.
        """
        pictures = self._original_images
        return self.decode(self.images.batch(indices)) if pictures is None else pictures.take(indices)

    @cached_property
    def _original_images(self) -> ImageSet | None:
        return self.images.original


def _dims(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
