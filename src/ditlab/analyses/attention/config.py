"""Settings of the attention analysis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ditlab.analyses.sigmas import check_levels
from ditlab.errors import InvalidConfig

__all__ = ["AttentionConfig", "AttentionOptions", "ImagesFrom", "MapScale"]

ImagesFrom = Literal["test", "train", "samples"]
MapScale = Literal["uniform", "paper"]


@dataclass(frozen=True)
class AttentionConfig:
    """What is measured. The paper names layers 2, 4, ..., 12 and no noise level."""

    images: int = 16
    """Images, at least 2 (consistency compares images)."""
    sigmas: tuple[float, ...] | None = None
    """Noise levels (sigma), ascending; those of steps 100, 300 and 500 of the DDPM process if not given."""
    timesteps: tuple[int, ...] | None = None
    """Noise levels as timesteps of the model's own process, ascending, instead of sigmas."""
    layers: tuple[int, ...] = ()
    """Layers, from 1; all if not given."""
    noise_seed: int = 0
    """Seed of the noise. Equal seeds give every denoiser the same noise."""
    batch_size: int = 4
    """Images in one forward pass. Does not change the result beyond float rounding."""

    def __post_init__(self) -> None:
        for name, least in (("images", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise InvalidConfig(f"attention: `{name}` must be at least {least}, found {getattr(self, name)}")
        check_levels(self.sigmas, self.timesteps, "attention")
        if len(set(self.layers)) < len(self.layers) or any(layer < 1 for layer in self.layers):
            raise InvalidConfig(f"attention: `layers` must be different, counted from 1, found {list(self.layers)}")


@dataclass(frozen=True)
class AttentionOptions:
    """Which images are used, and what figures show of them."""

    images_from: ImagesFrom = "test"
    """Which images: held-out ones, training images, or samples that each model draws from the same noise."""
    image: int = 0
    """Which of the images the figures show, from 0."""
    token: str | tuple[int, int] | None = None
    """ROW,COLUMN of the token whose attention the figures show, from 0; the middle of the grid if not given."""
    heads: tuple[int, ...] = ()
    """Heads that the figures show one by one, from 1; the mean over heads if not given. All heads are measured."""
    map_scale: MapScale = "uniform"
    """Colours of the maps. uniform: the weight relative to uniform attention, on one logarithmic scale for all maps.
    paper: each map from its own least to its own largest weight, cut off at 0.1, as An et al. draw them."""

    def __post_init__(self) -> None:
        if self.image < 0:
            raise InvalidConfig(f"attention: `image` must be at least 0, found {self.image}")
        if isinstance(self.token, str):
            parts = self.token.split(",")
            if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
                raise InvalidConfig(f"attention: `token` must be ROW,COLUMN such as 8,8, found '{self.token}'")

    @property
    def place(self) -> tuple[int, int] | None:
        """(row, column) of the token; None for the middle of the grid."""
        if not isinstance(self.token, str):
            return self.token
        row, column = self.token.split(",")
        return int(row), int(column)
