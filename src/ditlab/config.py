"""The configuration of a run: the components' own configs composed, and JSON both ways.

The same frozen dataclasses give the command line its flags (tyro), the config.json its checks (pydantic) and the
library its arguments, so there is one place where a default stands.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import pydantic

from ditlab.data.autoencoder import AutoencoderRecord
from ditlab.diffusion.blind_objective import BlindObjectiveConfig
from ditlab.diffusion.guidance import GuidanceConfig
from ditlab.diffusion.objectives import EDMObjectiveConfig, VPObjectiveConfig
from ditlab.diffusion.samplers import DDIMConfig, DDPMConfig, DPMSolverConfig, HeunConfig
from ditlab.errors import DitlabError
from ditlab.networks.bf_cnn import BFCNNConfig
from ditlab.networks.bf_unet import BFUNetConfig
from ditlab.networks.dit import DiTConfig
from ditlab.networks.unet import UNetConfig
from ditlab.training.config import TrainingConfig

_TAGGED = pydantic.Field(discriminator="kind")
Network = Annotated[DiTConfig | UNetConfig | BFCNNConfig | BFUNetConfig, _TAGGED]
ObjectiveSettings = Annotated[VPObjectiveConfig | EDMObjectiveConfig | BlindObjectiveConfig, _TAGGED]
Sampler = Annotated[DDPMConfig | DDIMConfig | HeunConfig | DPMSolverConfig, _TAGGED]

FORMAT = 1
"""Version of config.json's layout; a newer one is refused."""


@dataclass(frozen=True)
class DataConfig:
    """Which images a run is trained and tested on."""

    path: str = ""
    """The image set's folder; in config.json relative to the run's folder."""
    n: int | None = None
    """Number of training images; None for all but the test images."""
    test: int = 300
    """Number of test images held out (An et al.'s K)."""
    seed: int = 0
    """Seed of the shuffle that the train and test images come from; training sets are nested in n."""
    skip: int = 0
    """Leave out so many images at the head of the shuffled training images and take the next n: runs with skip 0 and
    skip n have disjoint training sets, and the same test images."""

    def __post_init__(self) -> None:
        """Refuses counts that cannot be."""
        if self.n is not None and self.n < 1:
            raise DitlabError(f"data: n must be at least 1, found {self.n}")
        if self.test < 1:
            raise DitlabError(f"data: test must be at least 1, found {self.test}")
        if self.skip < 0:
            raise DitlabError(f"data: skip must not be negative, found {self.skip}")


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured during training, with the averaged weights, each `training.eval_every` steps."""

    images: int = 64
    """Train images, and as many test images, that are measured; the same ones and the same noise each time."""
    levels: int = 10
    """Noise levels of the PSNR, spread evenly over the denoiser's grid; 0 measures the losses alone."""

    def __post_init__(self) -> None:
        """Refuses counts that cannot be."""
        if self.images < 1 or self.levels < 0:
            raise DitlabError(
                f"evaluation: images must be at least 1 and levels at least 0, found {self.images} and {self.levels}"
            )


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run's weights will be, and how it is measured and sampled by default."""

    preset: str = ""
    """The preset that the run started from."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images."""
    network: Network = field(default_factory=DiTConfig)
    """The network; its image size, channels and classes follow the image set."""
    objective: ObjectiveSettings = field(default_factory=VPObjectiveConfig)
    """How it is trained."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How long, and with which optimizer."""
    sampler: Sampler = field(default_factory=DDPMConfig)
    """How samples are drawn by default."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    """How strongly samples are pulled towards their class by default."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured during training."""

    def __post_init__(self) -> None:
        """Refuses components that do not fit each other, before any work starts."""
        learns = bool(getattr(self.network, "learn_sigma", False))
        if isinstance(self.objective, VPObjectiveConfig):
            learned = self.objective.variance == "learned-range"
            if learned != learns and hasattr(self.network, "learn_sigma"):
                raise DitlabError(
                    f"config: objective.variance '{self.objective.variance}' needs network.learn_sigma "
                    f"{learned}, found {learns}"
                )
            if learned != learns:
                raise DitlabError(
                    f"config: a {self.network.kind} network learns no variance; expected objective.variance "
                    "fixed-small or fixed-large, found learned-range"
                )
        elif learns:
            raise DitlabError(
                f"config: the {self.objective.kind} objective learns no variance; expected network.learn_sigma False"
            )
        told = not isinstance(self.network, BFCNNConfig | BFUNetConfig)
        if isinstance(self.objective, BlindObjectiveConfig) and told:
            raise DitlabError(
                f"config: the blind objective tells the network no noise level, which a {self.network.kind} network "
                "needs; expected a bf-unet or bf-cnn network, or objective.kind vp or edm"
            )
        dropout = getattr(self.objective, "label_dropout", 0.0)
        if dropout and getattr(self.network, "num_classes", 0) and not getattr(self.network, "null_class", True):
            raise DitlabError(
                "config: a network without a null class cannot be told of dropped labels; expected "
                f"objective.label_dropout 0 or network.null_class True, found {dropout}"
            )
        if self.guidance.on:
            check_guidance(self)


def check_guidance(config: RunConfig) -> None:
    """Refuses guidance of a network that was not trained to know its images' classes, and to do without.

    Raises:
        DitlabError: the network is unconditional, has no "no class", or never saw an image without its label.
    """
    network = config.network
    if not getattr(network, "num_classes", 0):
        raise DitlabError("guidance: expected a class-conditional network, found an unconditional one")
    if not getattr(network, "null_class", True) or not getattr(config.objective, "label_dropout", 0.0):
        raise DitlabError(
            "guidance: expected a network that was trained with label dropout, found one that knows no estimate "
            "without a class (network.null_class False or objective.label_dropout 0)"
        )


def fit_to_images(config: RunConfig, shape: tuple[int, int, int], num_classes: int) -> RunConfig:
    """The config with the network's image size, channels and classes set to those of an image set.

    Args:
        config: a preset, perhaps changed.
        shape: (C, H, W) of the images.
        num_classes: classes of the image set. The network stays unconditional unless `network.num_classes` was set;
            then both must be equal.
    """
    network = config.network
    asked = getattr(network, "num_classes", 0)
    if asked not in (0, num_classes):
        raise DitlabError(f"config: network.num_classes is {asked}, the image set has {num_classes} classes")
    return replace(config, network=replace(network, image_size=shape[1:], channels=shape[0]))


def fit_to_latents(config: RunConfig, std: float) -> RunConfig:
    """The config with EDM's sigma_data set to the standard deviation of latents, rounded to three digits.

    Left alone are other objectives, and a sigma_data that is not the default, which is meant for pixels.

    Args:
        config: a preset, perhaps changed.
        std: of the scaled latents (`LatentRecord.overall_std`).
    """
    objective, rounded = config.objective, float(f"{std:.3g}")
    default = EDMObjectiveConfig.sigma_data
    if not isinstance(objective, EDMObjectiveConfig) or objective.precond != "edm" or objective.sigma_data != default:
        return config
    # Latents that are all alike have no deviation to tell.
    return replace(config, objective=replace(objective, sigma_data=rounded)) if rounded > 0 else config


@dataclass(frozen=True)
class SplitRecord:
    """Which train and test images a run used: the fields of `ditlab.data.splits.Split.to_json`."""

    seed: int
    """Seed of the shuffle."""
    train: int
    """Number of training images."""
    test: int
    """Number of test images."""
    imageset: str
    """Hash of the image set."""
    family: str
    """Hash of image set, seed and test images: equal for runs whose training sets are nested."""
    hash: str
    """Hash that also covers the training images."""
    skip: int = 0
    """Images at the head of the shuffle that were left out before the training images."""


@dataclass(frozen=True)
class RunRecord:
    """What config.json holds."""

    config: RunConfig
    """The resolved configuration."""
    split: SplitRecord
    """The split that it gave."""
    command: str = ""
    """The command that started the run."""
    environment: dict[str, str] = field(default_factory=dict)
    """Versions and machine at the start."""
    format: int = FORMAT
    """Version of this layout."""
    codec: AutoencoderRecord | None = None
    """The autoencoder of a run on latents, its place relative to the run's folder; None for a run on pixels."""


for _part in (
    DataConfig,
    EvaluationConfig,
    TrainingConfig,
    RunConfig,
    SplitRecord,
    RunRecord,
    DiTConfig,
    UNetConfig,
    BFCNNConfig,
    BFUNetConfig,
    VPObjectiveConfig,
    EDMObjectiveConfig,
    BlindObjectiveConfig,
    DDPMConfig,
    DDIMConfig,
    HeunConfig,
    DPMSolverConfig,
    GuidanceConfig,
):
    # pydantic reads this attribute of a dataclass: a key that no field has is an error.
    _part.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # pyright: ignore[reportAttributeAccessIssue]


def to_json(record: RunRecord | RunConfig) -> dict[str, Any]:
    """JSON values of a record or a config."""
    return pydantic.TypeAdapter(type(record)).dump_python(record, mode="json")


def from_json(kind: type, values: Any, where: str) -> Any:
    """A record or a config from JSON values.

    Args:
        kind: RunRecord or RunConfig.
        values: what `to_json` gave.
        where: named in errors, usually a path.

    Raises:
        DitlabError: for an unknown key, a missing one, a value of the wrong kind, or values that do not fit together.
    """
    try:
        return pydantic.TypeAdapter(kind).validate_python(values)
    except DitlabError as error:
        raise DitlabError(f"{where}: {error}") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        if isinstance(cause := first.get("ctx", {}).get("error"), DitlabError):  # a config's own check
            raise DitlabError(f"{where}: {cause}") from None
        # The tag of a union's member stands in the location; the key in the file has no such step.
        tags = {"dit", "unet", "bf-cnn", "bf-unet", "vp", "edm", "blind", "ddpm", "ddim", "heun", "dpm++2m"}
        place = ".".join(str(part) for part in first["loc"] if part not in tags)
        if first["type"] == "unexpected_keyword_argument":
            raise DitlabError(f"{where}: unknown key '{place}'") from None
        raise DitlabError(f"{where}: '{place}': {first['msg']}, found {first['input']!r:.60}") from None


def read_record(path: Path) -> RunRecord:
    """Reads a run's config.json.

    Raises:
        DitlabError: where it is missing, not JSON, of a newer layout, or has unknown keys.
    """
    if not path.is_file():
        raise DitlabError(f"{path}: expected a run's config.json, found nothing")
    try:
        values = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError):
        raise DitlabError(f"{path}: expected JSON, found something else") from None
    version = values.get("format") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise DitlabError(f"{path}: expected a run's config.json with a 'format', found none")
    if version > FORMAT:
        raise DitlabError(f"{path}: its format is {version}, this ditlab reads up to {FORMAT}; a newer ditlab wrote it")
    return from_json(RunRecord, values, str(path))


def flat(config: RunConfig) -> dict[str, Any]:
    """Every setting by its dotted name, as JSON values."""

    def leaves(values: Any, prefix: str) -> dict[str, Any]:
        if isinstance(values, dict):
            return {k: v for name, value in values.items() for k, v in leaves(value, f"{prefix}{name}.").items()}
        return {prefix[:-1]: values}

    return leaves(to_json(config), "")


def differences(a: RunConfig, b: RunConfig) -> dict[str, tuple[Any, Any]]:
    """The settings in which two configs differ, by dotted name."""

    return differing_settings(flat(a), flat(b))


def differing_settings(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The same of settings by dotted name; one that only the other has is None."""
    return {
        name: (left.get(name), right.get(name))
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    }
