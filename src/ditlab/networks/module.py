"""What the modules of ditlab's networks share: their shape, their call, and the refusal of inputs that do not fit."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from ditlab.errors import DitlabError
from ditlab.networks.base import NetworkConfig

_Config = TypeVar("_Config", bound=NetworkConfig)


class Network(nn.Module, Generic[_Config]):
    """Base of the networks: a module with its config, `in_shape` and `num_classes`."""

    title = ""
    """Name of the network in errors."""

    def __init__(self, config: _Config) -> None:
        super().__init__()
        self.config = config

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the input."""
        return self.config.channels, *self.config.image_size

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 if unconditional. With a null class, the label `num_classes` means "no class"."""
        return self.config.classes

    def refuse_augment(self, augment: Tensor | None) -> None:
        """Raises a DitlabError if there are augmentation labels."""
        if augment is not None:
            found = f"augmentation labels of shape {list(augment.shape)}"
            raise DitlabError(f"{self.title}: expected no `augment`, found {found}")


class BlindNetwork(Network[_Config]):
    """Base of networks whose only input is the image, of any size: noisy image -> noise, in the units of the image."""

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        t: Tensor | None = None,
        label: Tensor | None = None,
        *,
        augment: Tensor | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Runs the network.

        Args:
            x: noisy images `[B, C, H, W]`; values are scaled about zero.
            t: ignored: the network is blind.
            label: ignored.
            augment: not supported; must be None.

        Raises:
            DitlabError: when `augment` is given, or for sides that the network cannot halve.
        """
        self.refuse_augment(augment)
        return self._noise(x)

    def _noise(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        raise NotImplementedError


class ConditionedNetwork(Network[_Config]):
    """Base of networks for images of one size that are given the time step, and a label if they have classes."""

    def __init__(self, config: _Config) -> None:
        super().__init__(config)
        if not config.sized:
            raise DitlabError(
                f"{self.title}: expected a config with an image_size, found (0, 0), which means not known yet"
            )
        self.outputs = config.channels * (2 if config.learns_variance else 1)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        t: Shaped[Tensor, " b"],
        label: Int[Tensor, " b"] | None = None,
        *,
        augment: Tensor | None = None,
    ) -> Float[Tensor, "b o h w"]:
        """Runs the network.

        Args:
            x: noisy images `[B, C, H, W]`.
            t: time steps `[B]`, whole or fractional.
            label: classes `[B]`, or None for "no class". Ignored by an unconditional network.
            augment: not supported by this network; must be None.

        Returns:
            `[B, C, H, W]`, or `[B, 2C, H, W]` with learn_sigma: the prediction first, then v.

        Raises:
            DitlabError: for images of another shape than the config's, or a missing label without a null class.
        """
        if tuple(x.shape[1:]) != self.in_shape:
            raise DitlabError(f"{self.title}: expected images of shape {self.in_shape}, found {tuple(x.shape[1:])}")
        self.refuse_augment(augment)
        return self._output(x, self.condition(t, label))

    def condition(self, t: Shaped[Tensor, " b"], label: Int[Tensor, " b"] | None = None) -> Tensor:
        """Returns the condition: time, and label if the network has classes.

        Raises:
            DitlabError: a missing label without a null class.
        """
        if self.num_classes and label is None:
            if not self.config.label_optional:
                raise DitlabError(
                    f"{self.title}: this network has no null class, so every image needs a label; found none"
                )
            label = torch.full_like(t, self.num_classes, dtype=torch.long)
        return self._condition(t, label if self.num_classes else None)

    def _condition(self, t: Tensor, label: Tensor | None) -> Tensor:
        """Returns the condition; there is a label exactly if the network has classes."""
        raise NotImplementedError

    def _output(self, x: Float[Tensor, "b c h w"], c: Tensor) -> Float[Tensor, "b o h w"]:
        raise NotImplementedError


__all__ = ["BlindNetwork", "ConditionedNetwork", "Network"]
