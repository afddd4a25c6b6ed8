"""Which images stand for the training images of a model that is not a run."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SplitConfig"]


@dataclass(frozen=True)
class SplitConfig:
    """The split of a model that is not a run; a run knows its own."""

    n: int | None = None
    """Number of training images of a model that is not a run; all but the test images if not given."""
    test: int = 300
    """Number of test images of a model that is not a run."""
    split_seed: int = 0
    """Seed of the split of a model that is not a run."""
    own_split: bool = False
    """State that such a model was trained on exactly these training images. Otherwise results note that its training
    images are unknown."""
