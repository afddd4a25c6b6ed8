"""Settings of the quickstart."""

from __future__ import annotations

from dataclasses import dataclass

from ditlab.errors import InvalidConfig

__all__ = ["QuickstartConfig"]


@dataclass(frozen=True)
class QuickstartConfig:
    """What is trained, on what."""

    n: int = 30
    """Number of training images."""
    size: int = 8
    """Side of the images in pixels."""
    preset: str = "dit-nano/1"
    """The recipe of all runs."""
    steps: int = 4000
    """Training steps of each run."""
    lr: float = 2e-3
    """Learning rate: higher than usual, so that a short run memorizes visibly."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of split and training. Each trains both kinds of networks once; several give intervals."""
    data: str = "photos"
    """The images: photos (built in), or any other source or image set."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise InvalidConfig(f"quickstart: expected different values of `seeds`, found {list(self.seeds)}")
