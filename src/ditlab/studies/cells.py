"""Cells: one run of a study, found by what it is rather than by a name.

A cell's hash covers every setting that decides its weights or what is logged along training, and the images; not the
folder where anything lies. So two studies that span the same run share it, and a run that was trained once is found
again whatever study or scale asks for it.
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
from ditlab.errors import DitlabError, unknown_name
from ditlab.presets import preset

_FREE = ("preset", "data.path", "sampler.", "guidance.", "training.keep", "training.save_every")
"""How the names of those settings start that neither change a weight nor a line of the log."""

LATER: Mapping[str, Any] = MappingProxyType(
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
"""Settings that were added after the first cells had been committed, each with the value that means what was done
before. They count only where they differ from it, so that the hashes of older cells stay as they are."""

_DERIVED = frozenset(
    {"preset", "data.path", "data.n", "data.test", "data.seed", "data.skip", "training.seed"}
    | {f"network.{name}" for name in ("image_size", "channels", "num_classes", "learn_sigma")}
)
"""Settings that `ditlab train` takes from other flags or from the image set."""


@dataclass(frozen=True)
class Cell:
    """One run of a study and its place on the axes."""

    hash: str
    """16 hexadecimal digits (`cell_hash`)."""
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
        """Its hash and its place on the axes, as JSON values."""
        names = ("hash", "data", "network", "attention", "n", "seed")
        return {name: getattr(self, name) for name in names}


def canonical(config: RunConfig, imageset: str) -> dict[str, Any]:
    """What identifies a cell: its settings by dotted name and the hash of its images, as JSON values."""
    settings = {
        name: value
        for name, value in flat(config).items()
        if not name.startswith(_FREE) and not (name in LATER and value == LATER[name])
    }
    return {"format": 1, "images": imageset, "settings": settings}


def cell_hash(config: RunConfig, imageset: str) -> str:
    """The name of a cell: 16 hexadecimal digits of the SHA-256 of its canonical JSON.

    Args:
        config: resolved settings (fitted to the images).
        imageset: hash of the image set.
    """
    text = json.dumps(canonical(config, imageset), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cell_config(
    name: str, settings: Mapping[str, Any], images: ImageSet, *, attention: str, n: int, seed: int
) -> RunConfig:
    """A cell's settings: a preset, changed, fitted to the images.

    Args:
        name: the preset.
        settings: values by dotted name ("training.lr"), on top of the preset.
        images: the image set.
        attention: the attention plan.
        n: number of training images.
        seed: of the split, of the initial weights and of training.

    Raises:
        DitlabError: an unknown preset or setting, or values that do not fit together.
    """
    values = to_json(preset(name))
    channels, *sides = images.shape
    fixed = {
        "data.n": n,
        "data.seed": seed,
        "training.seed": seed,
        "network.attention": attention,
        "network.image_size": sides,
        "network.channels": channels,
    }
    for dotted in settings:
        if dotted in _DERIVED - {"data.test", "data.skip"} or dotted == "network.attention":
            raise DitlabError(f"study setting '{dotted}': follows from the axes and the images, so it cannot be set")
    for dotted, value in {**settings, **fixed}.items():
        _put(values, dotted, value)
    return from_json(RunConfig, values, f"study settings on {name}")


def _put(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parts, last = dotted.split(".")
    inner = values
    for part in parts:
        inner = inner.get(part)  # pyright: ignore[reportAssignmentType]
        if not isinstance(inner, dict):
            break
    if not isinstance(inner, dict) or last not in inner or isinstance(inner[last], dict):
        known = {f"{top}.{name}" for top, group in values.items() if isinstance(group, dict) for name in group}
        raise unknown_name("study setting", dotted, known)
    inner[last] = value


def train_words(config: RunConfig) -> list[str]:
    """The flags of `ditlab train` that give these settings, from the preset on; without --data and --out."""
    data = config.data
    words = ["train", config.preset, "--n", str(data.n), "--test", str(data.test), "--seed", str(data.seed)]
    words += ["--skip", str(data.skip)] if data.skip else []
    before = flat(preset(config.preset))
    for name, value in flat(config).items():
        if name in _DERIVED or value == before.get(name):
            continue
        group, _, last = name.rpartition(".")
        flag = last.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{group}.{'' if value else 'no-'}{flag}")
        else:
            words += [f"--{group}.{flag}", *map(str, value if isinstance(value, list) else [value])]
    return words
