"""From a reference that a user typed to what it names: a run's folder, or somebody else's checkpoint."""

from __future__ import annotations

from pathlib import Path

from ditlab.run import Run
from ditlab.trained import Trained


def open_trained(reference: str | Path, data: str | Path | None = None) -> Trained:
    """Opens what a reference names.

    Args:
        reference: a run's folder.
        data: where its image set lies now, if it was moved.

    Raises:
        DitlabError: there is no run, or its config.json cannot be used.
    """
    return Run.open(reference, data)
