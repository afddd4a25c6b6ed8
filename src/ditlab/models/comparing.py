"""Several models side by side: opening them, refusing those that cannot be compared, naming their kinds."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ditlab.config import differing_settings
from ditlab.data import ImageSet, is_source, prepare, prepare_held_out
from ditlab.diffusion.denoisers import Denoiser
from ditlab.errors import AlreadyExists, DitlabError, Incompatible, InvalidConfig
from ditlab.models.model import Model
from ditlab.models.opening import keep_own, open_model
from ditlab.models.run import Run
from ditlab.models.split_config import SplitConfig
from ditlab.progress import SILENT, Reporter
from ditlab.provenance import Provenance
from ditlab.training.distributed import Device

__all__ = ["ModelSet", "OpenedModel", "Source", "check_output", "kinds_of", "open_models"]

Source = str | Path | Model
"""What names a model: a source string (`ditlab.models.opening`), or the model itself."""

_SAME_KIND = ("data.", "training.seed", "training.keep", "training.save_every", "training.log_every", "evaluation.")
"""Settings by which runs of one kind may differ: the images, the seeds, and what does not touch the weights."""


@dataclass(frozen=True, eq=False)
class OpenedModel:
    """A model with its weights loaded."""

    model: Model
    denoiser: Denoiser
    provenance: Provenance

    @property
    def name(self) -> str:
        """What results call the model."""
        return self.provenance.name


@dataclass(frozen=True, eq=False)
class ModelSet(Sequence[Model]):
    """Models that are measured together, which of their weights, and where they compute."""

    models: tuple[Model, ...]
    kinds: tuple[str, ...]
    """The kind of each: what runs that differ only in seed and N share."""
    step: int | None = None
    """The checkpoint of runs; the newest of each where None."""
    ema: bool = True
    """The averaged weights, or the raw ones."""
    device: Device = "cpu"

    def __getitem__(self, place: int) -> Model:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.models[place]

    def __len__(self) -> int:
        return len(self.models)

    def only(self, *places: int) -> ModelSet:
        """Returns the models at these places."""
        models, kinds = tuple(self.models[i] for i in places), tuple(self.kinds[i] for i in places)
        return replace(self, models=models, kinds=kinds)

    @property
    def folder(self) -> Path:
        """Where what is said of all of them together goes by default: the first one's results."""
        return self.models[0].path / "analysis"

    @cached_property
    def names(self) -> tuple[str, ...]:
        """A name for each model, no two alike: its own, with the folders above it where several share one."""
        plain, paths = [model.name for model in self.models], [model.path.resolve().parts for model in self.models]
        depths = range(1, max(map(len, paths)) + 1)
        for names in (plain, *(["-".join(parts[-depth:]) for parts in paths] for depth in depths)):
            if len(set(names)) == len(names):
                return tuple(names)
        return tuple(f"{name}-{number}" for number, name in enumerate(plain, 1))

    @property
    def chosen_names(self) -> tuple[str, ...]:
        """The kinds that the caller named; "" for each model where none was named."""
        return ("",) * len(self) if self.kinds == tuple(kinds_of(self.models)) else self.kinds

    def open(self, reporter: Reporter = SILENT) -> list[OpenedModel]:
        """Loads the weights of every model."""
        return [self.open_one(place, reporter) for place in range(len(self))]

    def open_one(self, place: int, reporter: Reporter = SILENT) -> OpenedModel:
        """Loads the weights of one model."""
        model = self.models[place]
        denoiser, provenance = model.denoiser_and_provenance(
            step=self.step, ema=self.ema, label=self.kinds[place], device=self.device, reporter=reporter
        )
        return OpenedModel(model, denoiser, provenance)


def check_output(out: Path | None) -> None:
    """Raises DitlabError where a folder of results cannot be made or written to, before the work starts."""
    if out is None:
        return
    place = out.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise AlreadyExists(f"`out` {out}: expected a folder, found a file at {place}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise DitlabError(f"`out` {out}: expected a folder that can be written to, found {place}, which cannot")


def open_models(
    sources: Sequence[Source],
    data: ImageSet | str | Path | None = None,
    *,
    held_out: ImageSet | str | Path | None = None,
    split: SplitConfig | None = None,
    names: str | Sequence[str] = (),
    step: int | None = None,
    ema: bool = True,
    codec: str | Path | None = None,
    device: Device = "cpu",
    out: Path | None = None,
    reporter: Reporter = SILENT,
) -> ModelSet:
    """Opens models that are to stand side by side, and notes what a reader must know of each.

    The settings are those of `ditlab.analyze`; `out` is also for results of models that have no folder of their own.
    """
    check_output(out)
    names = (names,) if isinstance(names, str) and names else names
    if not sources:
        raise InvalidConfig("`models`: expected at least one model, found none")
    if all(isinstance(source, Model) for source in sources):
        own_split = None if split == SplitConfig() else split
        keep_own("a model that is open already", data=data, codec=codec, split=own_split)
    models = [_open(source, data, codec, split, out, reporter) for source in sources]
    if held_out is not None:
        models = [copy.copy(model) for model in models]  # those of the caller keep their own test images
        for model in models:
            train, place = model.split.train, str(model.device)
            images = prepare_held_out(model.images, held_out, train=train, codec=codec, device=place, reporter=reporter)
            model.use_held_out(images)
    _check_named_once(models)
    _check_images(models)
    if names and len(names) != len(models):
        raise InvalidConfig(f"`names`: expected {len(models)} names, one for each model, found {len(names)}")
    for model in models:
        for note in model.notes:
            reporter.note(f"{model.name}: {note}")
    return ModelSet(tuple(models), tuple(names) or tuple(kinds_of(models)), step, ema, device)


def _check_named_once(models: Sequence[Model]) -> None:
    places = [model.path.resolve() for model in models]
    for place, model in zip(places, models, strict=True):
        if places.count(place) > 1:
            if isinstance(model, Run):
                raise Incompatible(f"run {place}: named twice")
            raise Incompatible(
                f"model {model.name}: named twice, or two models have this name and would share the results in "
                f"{model.path}"
            )


def _check_images(models: Sequence[Model]) -> None:
    """Refuses models of different image sets, and models of one split seed with different test images."""
    models = [model for model in models if model.provenance().split_family]  # without images nothing tells
    if len(models) < 2:
        return
    first, by_seed = models[0], dict[int, Model]()
    for model in models:
        mine, theirs = model.split_record.imageset, first.split_record.imageset
        if mine != theirs:
            raise Incompatible(
                f"models {first.path} and {model.path} were trained on different image sets ({theirs[:12]} and "
                f"{mine[:12]}), so they cannot be compared"
            )
        other = by_seed.setdefault(model.split_record.seed, model)
        if other.test_hash != model.test_hash:
            raise Incompatible(
                f"models {other.path} and {model.path} have different splits (test images {other.test_hash[:12]} and "
                f"{model.test_hash[:12]}), so they cannot be compared"
            )


def _open(
    source: Source,
    data: ImageSet | str | Path | None,
    codec: str | Path | None,
    split: SplitConfig | None,
    out: Path | None,
    reporter: Reporter,
) -> Model:
    """Opens one of them; a source of images is prepared at the model's size, and open models stay as they are."""
    if isinstance(source, Model):
        return source
    if not isinstance(data, str) or not is_source(data):
        return open_model(source, data, codec=codec, split=split, out=out)
    model = open_model(source, codec=codec, split=split, out=out)
    if isinstance(model, Run):
        raise InvalidConfig(
            f"`data`: expected the folder of the image set of run {model.name}, found the source '{data}'"
        )
    height, width = model.source_denoiser.shape[1:]
    if height != width:
        raise InvalidConfig(f"`data`: expected a prepared set of {height}x{width} images, found the source '{data}'")
    return open_model(source, prepare(data, size=height, reporter=reporter), codec=codec, split=split, out=out)


def kinds_of(models: Sequence[Model]) -> list[str]:
    """Returns a short name of the kind of each model: the settings in which the kinds differ.

    Runs that differ only in their images, N and seeds are of one kind. Where only the attention differs, the name is
    the attention plan; where nothing differs, it is the preset.
    """
    first = models[0].settings
    differing: dict[str, None] = {}
    for other in models[1:]:
        for name in differing_settings(first, other.settings):
            if not name.startswith(_SAME_KIND):
                differing[name] = None
    by_preset = "preset" in differing
    if by_preset and len(differing) > 1:
        del differing["preset"]  # what the presets differ in is listed by itself
    names = list(differing)
    if not names:
        return [first.get("preset") or "run"] * len(models)
    if len(names) > 3 and by_preset:
        names = ["preset", *(["network.attention"] if "network.attention" in names else [])]

    def value(model: Model, name: str) -> str:
        text = str(model.settings.get(name, "-"))
        return text if name in ("network.attention", "preset") else f"{name.rpartition('.')[2]} {text}"

    return [", ".join(value(model, name) for name in names if name in model.settings) for model in models]
