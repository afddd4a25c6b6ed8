"""Trials: one run of a study, identified by what it is instead of by a name.

The hash of a trial covers every setting that decides its weights or what is logged during training, and the images;
not the folders where they are. So studies that span the same run share it, and a run that was trained once is used by
whatever study or scale needs it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ditlab.config import RunConfig, flat, from_json, to_json
from ditlab.data.imageset import ImageSet
from ditlab.errors import InvalidConfig, unknown_name
from ditlab.presets import preset

__all__ = ["ADDED_DEFAULTS", "NOT_HASHED", "PLACE", "Trial", "hashed_settings", "trial_config", "trial_hash"]

NOT_HASHED = ("preset", "data.path", "sampler.", "guidance.", "training.keep", "training.save_every")
"""Prefixes of settings that affect neither weights nor logs, and so are not part of the hash."""

ADDED_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "network.block": "adaln-zero",
        "network.affine": True,
        "network.time_frequencies": "original",
        "training.shard": False,
        "training.checkpoint_activations": False,
        "network.mlp_norm_eps": 1e-6,
        "data.skip": 0,
        "objective.time_sampling": "uniform",
        "training.lr_halve_every": 0,
        "training.lr_anneal": False,
    }
)
"""Settings that were added after the first trials had been committed, with the value that gives the earlier behaviour.
They are hashed only if they differ from it, so that the hashes of older trials stay the same."""

_DERIVED = frozenset(
    {"preset", "data.path", "data.n", "data.seed", "training.seed", "network.attention"}
    | {f"network.{name}" for name in ("image_size", "channels", "num_classes", "learn_sigma")}
)
"""Settings that follow from the axes of a study or from the image set."""


PLACE = ("hash", "data", "network", "attention", "n", "seed")
"""What a plan lists of a trial."""


@dataclass(frozen=True)
class Trial:
    """One run of a study and its place on the axes."""

    hash: str
    """16 hexadecimal digits (`trial_hash`)."""
    config: RunConfig
    """The resolved settings, without a path."""
    imageset: str
    """Hash of the image set."""
    data: str
    """Short name of the images."""
    network: str
    """Name of the network on its axis, a preset's."""
    attention: str
    """Name of the attention plan on its axis."""
    n: int
    """Number of training images."""
    seed: int
    """Seed of the split and of training."""

    @property
    def name(self) -> str:
        """What tables and errors call it."""
        return f"{self.data} {self.network} {self.attention} N={self.n} seed {self.seed}"

    def place(self) -> dict[str, Any]:
        """Returns its hash and its place on the axes, as JSON values."""
        return {name: getattr(self, name) for name in PLACE}


def hashed_settings(config: RunConfig, imageset: str) -> dict[str, Any]:
    """Returns what identifies a trial: its settings by dotted name and the hash of its images, as JSON values."""
    settings = {
        name: value
        for name, value in flat(config).items()
        if not name.startswith(NOT_HASHED) and not (name in ADDED_DEFAULTS and value == ADDED_DEFAULTS[name])
    }
    return {"format": 1, "images": imageset, "settings": settings}


def trial_hash(config: RunConfig, imageset: str) -> str:
    """Returns the hash of a trial, of settings that fit its images and the hash of these.

    It is 16 hexadecimal digits of the SHA-256 of `hashed_settings` as canonical JSON.
    """
    text = json.dumps(hashed_settings(config, imageset), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def trial_config(
    name: str, settings: Mapping[str, Any], images: ImageSet, *, attention: str, n: int, seed: int
) -> RunConfig:
    """Returns the settings of a trial: a preset with changes by dotted name ("training.lr"), fitted to the images.

    `seed` is that of the split, of the initial weights and of training.

    Raises:
        DitlabError: an unknown preset or setting, or values that do not fit together.
    """
    values = to_json(preset(name))
    channels, *sides = images.shape
    derived = {
        "data.n": n,
        "data.seed": seed,
        "training.seed": seed,
        "network.attention": attention,
        "network.image_size": sides,
        "network.channels": channels,
    }
    for dotted in settings:
        if dotted in _DERIVED:
            raise InvalidConfig(f"study setting '{dotted}': follows from the axes and the images, so it cannot be set")
    for dotted, value in {**settings, **derived}.items():
        _put(values, dotted, value)
    return from_json(RunConfig, values, f"study settings on {name}")


def _put(values: dict[str, Any], dotted: str, value: Any) -> None:
    group, _, name = dotted.rpartition(".")
    known = {f"{top}.{inner}" for top, fields in values.items() if isinstance(fields, dict) for inner in fields}
    if dotted not in known:
        raise unknown_name("study setting", dotted, known)
    values[group][name] = value
