"""From a reference that a user typed to what it names: a run's folder, or somebody else's checkpoint.

    a run's folder, or one of its checkpoints   what `ditlab train` leaves
    a converted model's folder                  what `ditlab convert` leaves (`ditlab.interop.converted`)
    a .pt, .pth, .ckpt or .safetensors file     weights of an original code (`ditlab.interop.checkpoints`)
    diffusers:PATH or diffusers:ORG/NAME        a model of the diffusers library, in a folder or on the hub
    hub:ORG/NAME                                on the hub: an exported run, a converted model or a diffusers model

A model that is not a run has no images and no split of its own: `ExternalModel` is given a set, and splits it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ditlab.config import SplitRecord
from ditlab.data.autoencoder import Codec, Identity, open_codec, reopen_codec
from ditlab.data.imageset import ImageSet
from ditlab.data.splits import make_split
from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.samplers import SamplerConfig
from ditlab.errors import DitlabError
from ditlab.interop.checkpoints import open_checkpoint
from ditlab.interop.converted import RECORD, is_converted, open_converted
from ditlab.interop.diffusers_models import open_diffusers
from ditlab.interop.hub import download
from ditlab.interop.imported import ImportedModel
from ditlab.interop.original_files import SUFFIXES
from ditlab.models.model import Model
from ditlab.models.run import Run
from ditlab.provenance import Provenance

RESULTS = Path("foreign")
"""Where results go of a model that does not lie in a folder of the user's own, under the model's name and the beginning
of its digest, for many a model is called dit.pt."""


@dataclass(frozen=True)
class ExternalConfig:
    """Which images of --data stand for the training images of a model that is not a run; a run knows its own."""

    n: int | None = None
    """Number of training images, for a model that is not a run; all but the test images where not given."""
    test: int = 300
    """Number of test images, for a model that is not a run."""
    split_seed: int = 0
    """Seed of the shuffle that both come from, for a model that is not a run."""
    own_split: bool = False
    """Say that such a model was trained on just these training images; otherwise results note that nobody knows."""


class ExternalModel(Model):
    """A model that ditlab did not train, with a set of images to look at it with."""

    def __init__(
        self,
        read: Callable[[bool], ImportedModel],
        path: Path | None = None,
        *,
        data: str | Path | None = None,
        codec: str | Path | None = None,
        config: ExternalConfig | None = None,
    ) -> None:
        """Nothing but the model itself is read before it is asked for.

        Args:
            read: opens the model, with its averaged weights or the raw ones.
            path: the folder for results; foreign/NAME-DIGEST in the current folder where not given.
            data: the image set's folder.
            codec: the autoencoder of a model of latents, where none lies beside it.
            config: which images stand for its training images.
        """
        self._read, self.model = read, read(True)
        self.path = RESULTS / self.folder_name if path is None else path
        self._data, self._codec = data, codec
        self.config = config or ExternalConfig()

    def look_at(self, data: str | Path) -> None:
        """Takes the image set in this folder, before any other was asked for."""
        self._data = data

    @property
    def name(self) -> str:
        """What its checkpoint is called."""
        return self.model.name

    @property
    def folder_name(self) -> str:
        """What a folder for results about it is called: its name, and 8 hexadecimal digits that tell it apart."""
        return f"{self.name}-{self.model.digest[:8]}"

    @property
    def settings(self) -> Mapping[str, Any]:
        """The format, and the network's config where it is a DiT of ours; `preset` is its name."""
        network = getattr(self.model.denoiser.network, "config", None)
        shape = {f"network.{name}": value for name, value in asdict(network).items()} if network is not None else {}
        return {"preset": self.name, "format": self.model.source.get("format"), **shape}

    @property
    def sampler(self) -> SamplerConfig:
        """That of its scheduler, or DDPM's."""
        return self.model.sampler

    @property
    def newest_step(self) -> None:
        """None: its training is not known."""
        return

    @property
    def conditional(self) -> bool:
        """Whether its network takes class labels."""
        return bool(self.model.denoiser.num_classes)

    @cached_property
    def images(self) -> ImageSet:
        """The image set that was given.

        Raises:
            DitlabError: none was given, or its images are of another shape or are latents of another autoencoder.
        """
        if self._data is None:
            raise DitlabError(
                f"model {self.name}: which images it was trained on is not known; give --data with a set to look at it "
                "with"
            )
        images = ImageSet.open(self._data)
        self.model.fit(images.shape)
        shape = self.model.denoiser.shape
        if images.shape != shape:
            raise DitlabError(
                f"model {self.name}: expected images {_dims(shape)}, found {_dims(images.shape)} in {images.path}"
            )
        self._check_codec(images)
        return images

    def _check_codec(self, images: ImageSet) -> None:
        """Raises DitlabError where the model and the set are known to be of other latents, or of pixels."""
        if self._own_codec is None:
            return
        own = self._own_codec.record
        if images.latents is None:
            raise DitlabError(
                f"model {self.name}: expected latents of the autoencoder '{own.source}', found pixels in "
                f"{images.path}; make latents of them with ditlab data encode"
            )
        theirs = images.latents.record.codec
        if (wrong := own.difference(theirs)) is not None:
            name, expected, found = wrong
            raise DitlabError(
                f"model {self.name}: expected latents of its own autoencoder '{own.source}', with {name} {expected}, "
                f"found latents of '{theirs.source}' with {name} {found} in {images.path}"
            )

    @cached_property
    def _own_codec(self) -> Codec | None:
        """The autoencoder that was given, or that lies beside the model."""
        place = self.model.decoder if self._codec is None else self._codec
        return None if place is None else open_codec(place)

    @cached_property
    def split_record(self) -> SplitRecord:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A split of the image set that was given."""
        config = self.config
        return SplitRecord(**make_split(self.images, config.n, config.test, config.split_seed).to_json())

    @cached_property
    def codec(self) -> Codec:
        """The autoencoder that was given, that lies beside the model, or that its images were encoded with.

        Raises:
            DitlabError: a model of latents without any.
        """
        if self._own_codec is not None:
            return self._own_codec
        channels = self.model.denoiser.shape[0]
        if self._data is not None and (latents := self.images.latents) is not None:
            return reopen_codec(latents.record.codec, self.images.path)
        if channels not in (1, 3):
            raise DitlabError(
                f"model {self.name}: its images have {channels} channels, so they are latents, and no autoencoder lies "
                "beside it to make pictures of them; give --codec, such as stabilityai/sd-vae-ft-ema"
            )
        return Identity(channels)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know of how it was read, and of the images that it is looked at with."""
        split, notes = self.split_record, list(self.model.notes)
        if not self.config.own_split:
            notes.append(
                f"Nobody said which images this model was trained on: {split.train} training and {split.test} test "
                f"images of {self.images.path} are a split that ditlab made (seed {split.seed}), so a gap of 0 is no "
                "sign that it does not memorize."
            )
        if self.conditional and not self._labelled:
            notes.append(
                f"It has {self.model.denoiser.num_classes} classes and the set {self.images.num_classes or 'none'}, so "
                "it was told no class."
            )
        if self._own_codec is None and (latents := self.images.latents) is not None:
            codec = latents.record.codec
            notes.append(
                f"No autoencoder lies beside this model, so it is taken for one of the latents of '{codec.source}' "
                f"(scale {codec.scale:g}, shift {codec.shift:g}) that {self.images.path} holds; with those of another "
                "its numbers would mean nothing."
            )
        return tuple(notes)

    def pictures(self, side: Literal["train", "test"], count: int) -> tuple[Tensor, Tensor | None]:
        """The first training or test images, and their labels where set and model have as many classes.

        Raises:
            DitlabError: the classes differ, and the model cannot do without.
        """
        images, labels = super().pictures(side, count)
        denoiser = self.model.denoiser
        if self.conditional and not self._labelled:
            if not denoiser.null_class:
                raise DitlabError(
                    f"model {self.name}: expected images of its {denoiser.num_classes} classes, for it has no null "
                    f"class, found {self.images.num_classes or 'no'} classes in {self.images.path}"
                )
            labels = None
        return images, labels

    @property
    def _labelled(self) -> bool:
        return self.images.num_classes == self.model.denoiser.num_classes

    def facts(self, step: int | None, *, ema: bool = True, label: str = "") -> Provenance:
        """What a result keeps about it; where no images were given, nothing of a split."""
        facts = Provenance(name=self.name, label=label, step=step, ema=ema, settings={"model": dict(self.model.source)})
        if self._data is None:
            return facts
        split = self.split_record
        return replace(
            facts,
            n=split.train,
            seed=split.seed,
            split_family=split.family,
            split_hash=split.hash,
            settings={**facts.settings, "image_set": split.imageset, "notes": list(self.notes)},
        )

    def denoiser_and_provenance(
        self,
        *,
        step: int | None = None,
        ema: bool = True,
        label: str = "",
        device: torch.device | str = "cpu",
        say: Callable[[str], None] | None = None,
    ) -> tuple[Denoiser, Provenance]:
        """See `Model.denoiser_and_provenance`.

        Raises:
            DitlabError: a step was asked for, or raw weights that are not there.
        """
        if step is not None:
            raise DitlabError(f"model {self.name}: expected no step, for it has one set of weights, found {step}")
        model = self.model if ema else self._read(False)
        if self._data is not None:
            model.fit(self.images.shape)
        denoiser = model.denoiser
        denoiser.network.to(device)
        latent = self.model.decoder is not None or self._codec is not None
        latent = latent or (self._data is not None and self.images.latents is not None)
        denoiser.pixel_space = denoiser.shape[0] in (1, 3) and not latent
        self.device = device
        return denoiser, self.facts(None, ema=ema, label=label)


def open_model(
    reference: str | Path,
    data: str | Path | None = None,
    *,
    codec: str | Path | None = None,
    config: ExternalConfig | None = None,
    results: Path | None = None,
) -> Model:
    """Opens what a reference names; see the module.

    Args:
        reference: as a user typed it.
        data: where a run's image set lies now, if it was moved; the set to look at any other model with.
        codec: the same for the autoencoder.
        config: which images stand for the training images of a model that is not a run.
        results: a folder for the results, each under its name, of models that do not lie in one of the user's own.

    Raises:
        DitlabError: there is nothing of that name, or it cannot be used.
    """
    text, base = str(reference), RESULTS if results is None else results

    def foreign(read: Callable[[bool], ImportedModel], path: Path | None = None) -> ExternalModel:
        found = ExternalModel(read, path, data=data, codec=codec, config=config)
        if path is None:
            found.path = base / found.folder_name
        return found

    if text.startswith("diffusers:"):
        return foreign(_averaged(lambda: open_diffusers(text.removeprefix("diffusers:"))))
    if text.startswith("hub:"):
        name = text.removeprefix("hub:")
        described = download(name, ["*.json"])
        if _is_run(described):
            return Run.open(download(name), data, codec, results=base / name.replace("/", "--"))
        if is_converted(described):
            folder = download(name)
            return foreign(_averaged(lambda: replace(open_converted(folder), name=name.replace("/", "--"))))
        return foreign(_averaged(lambda: open_diffusers(name)))
    path = Path(reference)
    if path.suffix in SUFFIXES and not path.is_dir():
        return foreign(lambda ema: open_checkpoint(path, ema=ema))
    if path.is_dir() and is_converted(path):
        return foreign(_averaged(lambda: open_converted(path)), path)
    if path.parent.name == "checkpoints" and path.name.isdigit():
        return Run.open(path.parent.parent, data, codec, step=int(path.name))
    if path.is_dir() and (path / "model_index.json").is_file():
        raise DitlabError(f"{path}: expected a run's folder, found a diffusers model; name it diffusers:{path}")
    return Run.open(path, data, codec)


def load(
    reference: str | Path, *, step: int | None = None, ema: bool = True, device: torch.device | str = "cpu"
) -> Denoiser:
    """A denoiser from a reference to a trained network.

    Args:
        reference: a run's folder, one of its checkpoint folders, a converted model's folder, a published
            checkpoint, `diffusers:PATH_OR_ID` or `hub:ID`.
        step: of which checkpoint, for a run; the newest whole one where None.
        ema: the averaged weights (usual), or the raw ones.
        device: where it computes.

    Example:
        >>> denoiser = ditlab.load("runs/global")  # doctest: +SKIP
        >>> x0 = denoiser(y, sigma=0.3)  # doctest: +SKIP

    Warns:
        UserWarning: a damaged checkpoint was passed over for an older one.

    Raises:
        DitlabError: for anything that is not a whole model of a known kind.
    """

    def say(sentence: str) -> None:
        warnings.warn(sentence, stacklevel=2)

    return open_model(reference).denoiser(step=step, ema=ema, device=device, say=say)


def _averaged(read: Callable[[], ImportedModel]) -> Callable[[bool], ImportedModel]:
    """A reader of models with one set of weights, which are taken for averaged ones."""

    def either(ema: bool) -> ImportedModel:
        found = read()
        if not ema:
            raise DitlabError(f"model {found.name}: expected raw weights beside averaged ones, found one set only")
        return found

    return either


def _is_run(folder: Path) -> bool:
    """Whether a folder holds a run's config.json, and not the config.json of another kind of model."""
    file = folder / "config.json"
    return file.is_file() and '"split"' in file.read_text(errors="replace") and not (folder / RECORD).is_file()


def _dims(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
