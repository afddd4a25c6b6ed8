"""What the calls share: sources of models and images, settings, reporters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditlab.arguments import checks_arguments, plain
from ditlab.errors import InvalidConfig, unknown_name
from ditlab.progress import Reporter, default_reporter
from ditlab.threads import use_threads

if TYPE_CHECKING:
    from ditlab.data.imageset import ImageSet
    from ditlab.models.comparing import ModelSet, Source

__all__ = ["as_tuple", "checked", "chosen_reporter", "open_images", "open_set", "refuse_unknown", "several", "shown"]

checked = checks_arguments(
    {
        "ComplexityConfig": "ditlab.analyses.complexity.config",
        "Device": "ditlab.training.distributed",
        "EncodeConfig": "ditlab.data.encode_config",
        "ImageSet": "ditlab.data.imageset",
        "Images": "ditlab.studies.study",
        "RunConfig": "ditlab.config",
        "Snapshot": "ditlab.studies.runner",
        "Source": "ditlab.models.comparing",
        "Study": "ditlab.studies.grid",
        "UNetFile": "ditlab.interop.formats",
    }
)
"""The decorator of every call: wrong types are refused in one sentence."""


def several(models: Source | Sequence[Source]) -> list[Source]:
    """Returns the models of a call as a list."""
    from ditlab.models.model import Model

    return [models] if isinstance(models, str | Path | Model) else list(models)


def open_images(images: ImageSet | str | Path, size: int | None, reporter: Reporter) -> ImageSet:
    """Opens an image set, or prepares the one of a source."""
    from ditlab.data import ImageSet, is_source
    from ditlab.data import prepare as prepare_images

    if isinstance(images, ImageSet):
        return images
    if not str(images):
        raise InvalidConfig("`data`: expected an image set's folder or a source of images, found nothing")
    if is_source(str(images)):
        return prepare_images(str(images), size=size, reporter=reporter)
    return ImageSet.open(images)


def as_tuple(values: Any) -> tuple[Any, ...] | None:
    """Returns one value or several as a tuple; None stays None."""
    values = plain(values)
    return None if values is None else (values,) if isinstance(values, str | int) else tuple(values)


def shown(value: Any) -> str:
    """Returns a value as a call shows it; a path as text."""
    return repr(str(value)) if isinstance(value, Path) else repr(value)


def refuse_unknown(call: str, settings: Mapping[str, Any], *kinds: Any) -> None:
    """Raises NotFound for a setting that none of the configs has."""
    if settings:
        known = [name for kind in kinds for name in kind.__dataclass_fields__]
        raise unknown_name(f"setting of {call}", next(iter(settings)), known)


def chosen_reporter(reporter: Reporter | None) -> Reporter:
    """Returns the reporter, or the default one where None is given."""
    return default_reporter() if reporter is None else reporter


def open_set(sources: Sequence[Source], data: Any, **keywords: Any) -> ModelSet:
    """Opens models on the device that was asked for, with the threads that were asked for."""
    from ditlab.models.comparing import open_models
    from ditlab.training.distributed import pick_device

    use_threads(keywords.pop("threads"))
    return open_models(sources, data, **{**keywords, "device": pick_device(keywords["device"])})
