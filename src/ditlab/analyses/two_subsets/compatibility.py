"""Which two runs can be compared: they may differ in their training images only, and these must be disjoint."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from ditlab.config import differing_settings
from ditlab.errors import Incompatible
from ditlab.models.model import Model
from ditlab.models.run import Run
from ditlab.provenance import Provenance

__all__ = ["check_disjoint", "check_provenance", "check_runs", "differing_recipes"]

_SAME = ("network.", "objective.", "codec")
"""Settings that must be the same."""
_RECIPE = ("batch_size", "lr", "lr_halve_every", "lr_anneal", "betas", "weight_decay", "ema", "flip", "precision")
"""Settings of training that change the trained network; a difference is noted."""


def check_runs(models: Sequence[Model]) -> tuple[Run, Run]:
    """Returns the two runs.

    Raises:
        Incompatible: a model that is not a run, or runs that differ in more than their training images, or that share
            training images.
    """
    for model in models:
        if not isinstance(model, Run):
            raise Incompatible(
                f"two-subsets: expected runs, found the model {model.name}, whose training images and settings are "
                "unknown"
            )
    first, second = (model for model in models if isinstance(model, Run))
    about = first.provenance(), second.provenance()
    check_provenance(*about)
    differing = differing_settings(first.settings, second.settings)
    # "network.kind" before the settings that only one kind has.
    for name, (mine, theirs) in sorted(differing.items(), key=lambda item: not item[0].endswith(".kind")):
        if name.startswith(_SAME):
            raise Incompatible(
                f"two-subsets: expected runs that differ in their training images only, found {name} = {mine} in "
                f"{first.name} and {theirs} in {second.name}"
            )
    check_disjoint(*about, (first.split.train, second.split.train))
    return first, second


def check_provenance(first: Provenance, second: Provenance) -> None:
    """Raises Incompatible unless the runs have the same test images of one image set, and training sets of one size."""
    if not first.split_family or first.split_family != second.split_family:
        raise Incompatible(
            f"two-subsets: expected runs of one image set, seed and test images, found the split families "
            f"{first.split_family[:12] or 'none'} of {first.name} and {second.split_family[:12] or 'none'} of "
            f"{second.name}"
        )
    if first.n != second.n:
        raise Incompatible(
            f"two-subsets: expected training sets of one size, found N = {first.n} of {first.name} and "
            f"N = {second.n} of {second.name}"
        )


def check_disjoint(
    first: Provenance, second: Provenance, train: tuple[Int64[np.ndarray, " a"], Int64[np.ndarray, " b"]]
) -> None:
    """Raises Incompatible if two runs share training images, given by their places in one image set.

    An image set has no image twice, so equal places are the only shared images.
    """
    shared = len(np.intersect1d(*train))
    if shared:
        raise Incompatible(
            f"two-subsets: expected disjoint training sets, found {shared} of {first.name}'s {len(train[0])} images "
            f"in {second.name}'s too; train one of them with `skip` = {len(train[0])}"
        )


def differing_recipes(first: Model, second: Model) -> list[str]:
    """Returns a sentence for each setting of training that changes the network and is not the same in both."""
    differing = differing_settings(first.settings, second.settings)
    return [
        f"{name} is {mine} in {first.name} and {theirs} in {second.name}."
        for name, (mine, theirs) in differing.items()
        if name.removeprefix("training.") in _RECIPE
    ]
