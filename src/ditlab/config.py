"""The configuration of a run: composes the components' configs, and reads and writes them as JSON.

The same frozen dataclasses define the flags of the command line (tyro), the checks of config.json (pydantic) and the
arguments of the library, so each default is written once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Union, get_args

import pydantic

from ditlab.data.autoencoder_record import AutoencoderRecord
from ditlab.diffusion.guidance_config import GuidanceConfig
from ditlab.diffusion.objective_configs import BlindObjectiveConfig, EDMObjectiveConfig, VPObjectiveConfig
from ditlab.diffusion.sampler_configs import DDPMConfig, SamplerConfig
from ditlab.errors import Damaged, DitlabError, Incompatible, InvalidConfig, NotFound
from ditlab.networks.dit_config import DiTConfig
from ditlab.networks.registry import NETWORKS, NetworkConfig
from ditlab.training.config import TrainingConfig

_TAGGED = pydantic.Field(discriminator="kind")


class _Registered:
    """Lets pydantic tell networks apart by `kind`, among those that are registered when it reads or writes."""

    @staticmethod
    def __get_pydantic_core_schema__(source: Any, handler: pydantic.GetCoreSchemaHandler) -> Any:
        return handler.generate_schema(Annotated[Union[tuple(NETWORKS)], _TAGGED])  # noqa: UP007


Network = Annotated[NetworkConfig, _Registered]
ObjectiveConfig = VPObjectiveConfig | EDMObjectiveConfig | BlindObjectiveConfig
ObjectiveSettings = Annotated[ObjectiveConfig, _TAGGED]
Sampler = Annotated[SamplerConfig, _TAGGED]

FORMAT = 1
"""Version of config.json's layout; newer ones are refused."""


@dataclass(frozen=True)
class DataConfig:
    """The images that a run is trained and tested on."""

    path: str = ""
    """Folder of the image set; in config.json relative to the run's folder."""
    n: int | None = None
    """Number of training images; all except the test images by default."""
    test: int = 300
    """Number of test images held out (An et al.'s K)."""
    seed: int = 0
    """Seed of the train/test split. With the same seed, a smaller training set is a subset of a larger one."""
    skip: int = 0
    """Number of training images to skip before the n that are used: runs with skip 0 and skip n have disjoint training
    sets and the same test images."""

    def __post_init__(self) -> None:
        """Refuses impossible counts."""
        if self.n is not None and self.n < 1:
            raise InvalidConfig(f"data: n must be at least 1, found {self.n}")
        if self.test < 1:
            raise InvalidConfig(f"data: test must be at least 1, found {self.test}")
        if self.skip < 0:
            raise InvalidConfig(f"data: skip must not be negative, found {self.skip}")


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured every `training.eval_every` steps of training, with the averaged weights."""

    images: int = 64
    """Number of train images, and of test images, to measure; the same images and noise each time."""
    levels: int = 10
    """Number of noise levels of the PSNR, evenly spread over the denoiser's grid; 0 measures the losses only."""

    def __post_init__(self) -> None:
        """Refuses impossible counts."""
        if self.images < 1 or self.levels < 0:
            raise InvalidConfig(
                f"evaluation: images must be at least 1 and levels at least 0, found {self.images} and {self.levels}"
            )


@dataclass(frozen=True)
class RunConfig:
    """All settings that determine a run's weights, and how it is measured and sampled by default."""

    preset: str = ""
    """The preset that the run started from."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images."""
    network: Network = field(default_factory=DiTConfig)
    """The network; image size, channels and classes are taken from the image set."""
    objective: ObjectiveSettings = field(default_factory=VPObjectiveConfig)
    """The training objective."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Duration and optimizer."""
    sampler: Sampler = field(default_factory=DDPMConfig)
    """The default sampler."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    """Default guidance of samples towards their class."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Measurements during training."""

    def __post_init__(self) -> None:
        """Refuses components that do not fit together, before any work starts."""
        network, learns = self.network, self.network.learns_variance
        # A network without a size gets its classes and a learned variance with it, when it is fitted to images.
        fitted = network.sized
        if isinstance(self.objective, VPObjectiveConfig):
            learned = self.objective.variance == "learned-range"
            if learned != learns and network.can_learn_variance and fitted:
                raise InvalidConfig(
                    f"config: objective.variance '{self.objective.variance}' needs network.learn_sigma "
                    f"{learned}, found {learns}"
                )
            if learned != learns and not network.can_learn_variance:
                raise InvalidConfig(
                    f"config: a {network.kind} network learns no variance; expected objective.variance "
                    "fixed-small or fixed-large, found learned-range"
                )
        elif learns and fitted:
            raise InvalidConfig(
                f"config: the {self.objective.kind} objective learns no variance; expected network.learn_sigma False"
            )
        if isinstance(self.objective, BlindObjectiveConfig) and network.takes_noise_level:
            blind = " or ".join(sorted(config.kind for config in NETWORKS if not config.takes_noise_level))
            raise InvalidConfig(
                f"config: the blind objective gives the network no noise level, which a {network.kind} network needs; "
                f"expected a {blind} network, or objective.kind vp or edm"
            )
        dropout = getattr(self.objective, "label_dropout", 0.0)
        if dropout and not network.label_optional:
            raise InvalidConfig(
                "config: label dropout needs a network with a null class; expected objective.label_dropout 0 or "
                f"network.null_class True, found {dropout}"
            )
        if self.guidance.on and fitted:
            if not network.classes:
                raise InvalidConfig("guidance: expected a class-conditional network, found an unconditional one")
            if not network.label_optional or not dropout:
                raise InvalidConfig(
                    "guidance: expected a network that was trained with label dropout, found one that has no estimate "
                    "without a class (network.null_class False or objective.label_dropout 0)"
                )


def fit_to_images(config: RunConfig, shape: tuple[int, int, int], num_classes: int) -> RunConfig:
    """Returns the config with the network's image size and channels set to those of images of a shape (C, H, W).

    The network stays unconditional unless `network.num_classes` is set; then it must be the images' number of classes.

    Raises:
        DitlabError: the numbers of classes differ, or the network cannot have this size.
    """
    network = config.network
    if network.classes not in (0, num_classes):
        raise InvalidConfig(f"config: expected network.num_classes {num_classes} or 0, found {network.classes}")
    return replace(config, network=replace(network, image_size=shape[1:], channels=shape[0]))


def fit_to_latents(config: RunConfig, std: float) -> RunConfig:
    """Returns the config with EDM's sigma_data set to the deviation of scaled latents, rounded to three digits.

    Other objectives stay unchanged, as does a sigma_data other than the default, which is for pixels.
    """
    objective, rounded = config.objective, float(f"{std:.3g}")
    default = EDMObjectiveConfig.sigma_data
    if not isinstance(objective, EDMObjectiveConfig) or objective.precond != "edm" or objective.sigma_data != default:
        return config
    # The deviation of constant latents is 0.
    return replace(config, objective=replace(objective, sigma_data=rounded)) if rounded > 0 else config


@dataclass(frozen=True)
class SplitRecord:
    """The train and test images of a run: the fields of `ditlab.data.splits.Split.to_json`."""

    seed: int
    train: int
    """Number of training images."""
    test: int
    imageset: str
    """Hash of the image set."""
    family: str
    """Hash of image set, seed and test images; equal for runs with nested training sets."""
    hash: str
    """Hash of all of these and the training images."""
    skip: int = 0
    """Number of training images that were skipped before those used."""


@dataclass(frozen=True)
class RunRecord:
    """The content of config.json."""

    config: RunConfig
    split: SplitRecord
    command: str = ""
    """The command that started the run."""
    environment: dict[str, str] = field(default_factory=dict)
    """Versions and machine when the run started."""
    format: int = FORMAT
    """Version of this layout."""
    codec: AutoencoderRecord | None = None
    """The autoencoder of a run on latents, with its path relative to the run's folder; None for a run on pixels."""


_PARTS = (DataConfig, EvaluationConfig, TrainingConfig, RunConfig, SplitRecord, RunRecord, GuidanceConfig)
for _part in (*_PARTS, *get_args(ObjectiveConfig), *get_args(SamplerConfig)):
    # pydantic reads this attribute of a dataclass: a key that no field has is an error.
    _part.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # pyright: ignore[reportAttributeAccessIssue]


def to_json(record: Any) -> dict[str, Any]:
    """Returns a record or a config (RunRecord, RunConfig, or another dataclass of configs) as JSON values."""
    return _adapter(type(record), tuple(NETWORKS)).dump_python(record, mode="json")


@cache
def _adapter(kind: type, networks: tuple[type, ...]) -> Any:
    """Returns the reader of a record or config, made anew (0.1 s) once more networks are registered."""
    return pydantic.TypeAdapter(kind)


def from_json(kind: type, values: Any, where: str) -> Any:
    """Returns a record or a config of a kind from JSON values; `where` is named in errors, usually a path.

    Raises:
        DitlabError: for an unknown or missing key, a value of the wrong type, or values that do not fit together.
    """
    try:
        record = _adapter(kind, tuple(NETWORKS)).validate_python(values)
    except DitlabError as error:
        raise InvalidConfig(f"{where}: {error}") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        if isinstance(cause := first.get("ctx", {}).get("error"), DitlabError):  # a config's own check
            raise InvalidConfig(f"{where}: {cause}") from None
        # pydantic's location contains the tag of a union's member, which is no key of the file.
        tags = {config.kind for config in (*NETWORKS, *get_args(ObjectiveConfig), *get_args(SamplerConfig))}
        place = ".".join(str(part) for part in first["loc"] if part not in tags)
        if first["type"] == "unexpected_keyword_argument":
            raise InvalidConfig(f"{where}: unknown key '{place}'") from None
        raise InvalidConfig(f"{where}: '{place}': {first['msg']}, found {first['input']!r:.60}") from None
    for place, value in _booleans_read_as_numbers(values, to_json(record)):
        raise InvalidConfig(f"{where}: '{place}': expected a number, found {value}")
    return record


def _booleans_read_as_numbers(values: Any, read: Any, place: str = "") -> Iterator[tuple[str, bool]]:
    """Yields dotted name and value of each boolean that pydantic took for 0 or 1."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _booleans_read_as_numbers(value, read[name], f"{place}.{name}" if place else name)
    elif isinstance(values, list | tuple):
        for number, (value, other) in enumerate(zip(values, read, strict=True)):
            yield from _booleans_read_as_numbers(value, other, f"{place}.{number}")
    elif isinstance(values, bool) and not isinstance(read, bool):
        yield place, values


def read_record(path: Path) -> RunRecord:
    """Reads a run's config.json; a DitlabError says if it is missing, damaged or of a newer format."""
    if not path.is_file():
        raise NotFound(f"{path}: expected a run's config.json, found nothing")
    try:
        values = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError):
        raise Damaged(f"{path}: expected JSON, found something else") from None
    version = values.get("format") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise Incompatible(f"{path}: expected a run's config.json with a 'format', found none")
    if version > FORMAT:
        raise Incompatible(
            f"{path}: its format is {version}, this ditlab reads up to {FORMAT}; a newer ditlab wrote it"
        )
    return from_json(RunRecord, values, str(path))


def flat(config: RunConfig) -> dict[str, Any]:
    """Returns every setting by its dotted name, as JSON values."""

    def leaves(values: Any, prefix: str) -> dict[str, Any]:
        if isinstance(values, dict):
            return {k: v for name, value in values.items() for k, v in leaves(value, f"{prefix}{name}.").items()}
        return {prefix[:-1]: values}

    return leaves(to_json(config), "")


def differences(a: RunConfig, b: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Returns the settings in which two configs differ: dotted name -> the two values."""
    return differing_settings(flat(a), flat(b))


def differing_settings(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the same for settings by dotted name; the value of a missing setting is None."""
    return {
        name: (left.get(name), right.get(name))
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    }


__all__ = [
    "FORMAT",
    "DataConfig",
    "EvaluationConfig",
    "Network",
    "ObjectiveConfig",
    "ObjectiveSettings",
    "RunConfig",
    "RunRecord",
    "Sampler",
    "SplitRecord",
    "differences",
    "differing_settings",
    "fit_to_images",
    "fit_to_latents",
    "flat",
    "from_json",
    "read_record",
    "to_json",
]
