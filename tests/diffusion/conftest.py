"""The network of the originals' recorded sampling loops, which several tests sample."""

from __future__ import annotations

import pytest

from ditlab.networks.dit import DiT


@pytest.fixture(scope="session")
def golden_dit(golden, dit_of) -> DiT:
    """The DiT that golden 02_sampling names, with its weights."""
    return dit_of(golden(golden("02_sampling").config["dit"]))
