"""The network of the originals' recorded numbers, which several tests sample."""

from __future__ import annotations

import pytest

from ditlab.interop.original_dit import from_original
from ditlab.networks.dit import DiT, DiTConfig


@pytest.fixture(scope="session")
def golden_dit(golden) -> DiT:
    """The DiT of golden 01_dit_a, with its weights."""
    fixture = golden("01_dit_a")
    c = fixture.about["config"]
    config = DiTConfig(
        image_size=(8, 8),
        channels=4,
        patch=c["patch_size"],
        width=c["hidden_size"],
        depth=c["depth"],
        heads=c["num_heads"],
        num_classes=c["num_classes"],
    )
    return from_original(fixture.weights(), config).eval()
