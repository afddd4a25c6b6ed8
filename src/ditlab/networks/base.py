"""What every network's config has, which networks there are, and how a config builds its network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_args, get_type_hints

from ditlab.errors import DitlabError

if TYPE_CHECKING:
    from torch import nn

_Network = TypeVar("_Network")


@dataclass(frozen=True)
class NetworkConfig:
    """Base of the networks' configs: the settings that all have, and class attributes that say what a network can do.

    A subclass is a frozen dataclass that repeats `kind` as a `Literal` with a default, its name in config.json, and
    `image_size` and `channels` where their help texts differ. Whoever asks what a network can do reads the class
    attributes and the properties here; nobody lists the networks that can.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    # pydantic reads this attribute of a dataclass: a key in config.json that no field has is an error.

    takes_noise_level: ClassVar[bool] = True
    """Whether the network is given the timestep or noise level; False for a blind network."""
    takes_labels: ClassVar[bool] = False
    """Whether its config has `num_classes` (0 for unconditional) and `null_class` (a label for "no class")."""
    can_learn_variance: ClassVar[bool] = False
    """Whether its config has `learn_sigma`, which doubles the output channels."""
    takes_attention_plan: ClassVar[bool] = False
    """Whether its config has `attention`, an attention plan (`ditlab.nn.attention_plan`)."""

    kind: str
    """Name of this network in config.json."""
    image_size: tuple[int, int] = (32, 32)
    """Height and width of the image or latent. 0 0 means not known yet: such a config can be changed, not built."""
    channels: int = 3
    """Channels of the image or latent."""

    @property
    def sized(self) -> bool:
        """Whether the image size is known."""
        return tuple(self.image_size) != (0, 0)

    @property
    def classes(self) -> int:
        """Number of classes that the network is conditioned on; 0 for an unconditional network."""
        return getattr(self, "num_classes") if self.takes_labels else 0  # noqa: B009

    @property
    def label_optional(self) -> bool:
        """Whether the network can do without a label: it is unconditional, or has a label for "no class"."""
        return not self.classes or getattr(self, "null_class")  # noqa: B009

    @property
    def learns_variance(self) -> bool:
        """Whether the network has output channels for the variance of the reverse step."""
        return self.can_learn_variance and getattr(self, "learn_sigma")  # noqa: B009

    @property
    def attention_plan(self) -> str:
        """The attention plan; empty for a network that takes none."""
        return getattr(self, "attention") if self.takes_attention_plan else ""  # noqa: B009

    @property
    def width_step(self) -> int:
        """Number that `width` must be a multiple of."""
        return 1

    def training_bytes(self, images: int) -> int:
        """Returns a rough estimate of the memory that a training step on so many images takes; 0 if unknown."""
        return 0

    def check_counts(self, where: str, *names: str) -> None:
        """Raises a DitlabError if one of these settings is below 1 (None may be), or `num_classes` below 0."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DitlabError(f"{where}: {name} must be at least 1, found {value}")
        if self.classes < 0:
            raise DitlabError(f"{where}: num_classes must be 0 (unconditional) or more, found {self.classes}")


NETWORKS: dict[type[NetworkConfig], Any] = {}
"""The registered networks: config class -> module class, or where it is: "package.module:Class"."""

_FIELDS = {
    "takes_labels": {"num_classes", "null_class"},
    "can_learn_variance": {"learn_sigma"},
    "takes_attention_plan": {"attention"},
}
"""Class attribute of a config -> the fields that it announces."""


def register(config: type[NetworkConfig]) -> Callable[[_Network], _Network]:
    """Registers a network, as a decorator of its module class; configs of its kind can then be read and built.

    Registering a class of the same name again (a notebook cell that ran twice) replaces the first. ditlab's own list
    gives the decorator "package.module:Class" instead of a class, so that configs are read without torch.

    Args:
        config: the config class, from which `network(config)` builds the module.

    Raises:
        DitlabError: `kind` is no `Literal` with a default or is taken, or a class attribute and the fields disagree.

    Example:
        >>> from typing import Literal
        >>> @dataclass(frozen=True)
        ... class PointwiseConfig(NetworkConfig):
        ...     kind: Literal["pointwise"] = "pointwise"
        >>> @register(PointwiseConfig)  # doctest: +SKIP
        ... class Pointwise(nn.Module): ...
    """
    kind = getattr(config, "kind", None)
    where = f"register {config.__name__}"
    if get_args(get_type_hints(config)["kind"]) != (kind,):
        raise DitlabError(f"{where}: expected kind as a Literal with its value as default, found {kind!r}")
    names = {field.name for field in fields(config)}
    for attribute, announced in _FIELDS.items():
        present, declared = announced & names, getattr(config, attribute)
        if present != (announced if declared else set()):
            raise DitlabError(
                f"{where}: {attribute} {declared} expects {'the' if declared else 'none of the'} fields "
                f"{', '.join(sorted(announced))}, found {', '.join(sorted(present)) or 'none'}"
            )
    for other in [other for other in NETWORKS if other.kind == kind]:
        if (other.__module__, other.__qualname__) != (config.__module__, config.__qualname__):
            raise DitlabError(f"{where}: expected a new kind, found '{kind}', which {other.__name__} has")
        del NETWORKS[other]

    def add(network: _Network) -> _Network:
        NETWORKS[config] = network
        return network

    return add


def network_class(config: type[NetworkConfig]) -> Any:
    """Returns the module class of a registered network; imports its module where necessary."""
    network = NETWORKS[config]
    if not isinstance(network, str):
        return network
    module, _, name = network.partition(":")
    return getattr(import_module(module), name)


def build_network(config: NetworkConfig, seed: int = 0) -> nn.Module:
    """Returns a network on the CPU with the initial weights of a seed; torch's global generator stays unchanged.

    Raises:
        DitlabError: no network is registered for this config.
    """
    if type(config) not in NETWORKS:
        raise DitlabError(f"build network: expected the config of a registered network, found {type(config).__name__}")
    import torch

    from ditlab.rng import key

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "weights"))
        return network_class(type(config))(config)


__all__ = ["NETWORKS", "NetworkConfig", "build_network", "network_class", "register"]
