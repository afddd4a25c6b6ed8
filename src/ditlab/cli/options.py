"""Flags that several verbs share, each written once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from ditlab.models.split_config import SplitConfig


@dataclass(frozen=True)
class ModelFlags:
    """Which models, and which of their weights and images."""

    names: tuple[str, ...] = ()
    """Names of the kinds of models, one for each model, in their order; found from the settings that differ if not
    given."""
    checkpoint: int | None = None
    """The step of the checkpoint of runs; the newest of each if not given."""
    raw: bool = False
    """Use the raw weights instead of the averaged ones."""
    data: str | None = None
    """Where the image set is now, if it was moved. For a model that is not a run: the image set, or a source of one, to
    measure it on."""
    held_out: str | None = None
    """An image set or a source (folder:PATH) whose images take the place of the test images."""
    split: Annotated[SplitConfig, tyro.conf.arg(name="")] = field(default_factory=SplitConfig)
    """Which images stand for the training images of a model that is not a run."""
    codec: str | None = None
    """Where the autoencoder of models of latents is now, if it was moved."""


@dataclass(frozen=True)
class ComputeFlags:
    """Where it computes."""

    device: str | None = None
    """cpu, cuda or cuda:N; CUDA if there is one."""
    threads: int | None = None
    """CPU threads; all cores if not given. On a machine that other processes use too, 1 is often faster."""


MODELS = """Runs' folders, or other models: a converted model's folder, a published checkpoint, diffusers:PATH_OR_ID,
hub:ID, or one's own as package.module:NAME or FILE.py:NAME."""

Models = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(name="models", metavar="MODEL", help=MODELS)]
ModelOptions = Annotated[ModelFlags, tyro.conf.arg(name="")]
ComputeOptions = Annotated[ComputeFlags, tyro.conf.arg(name="")]
Out = Annotated[Path | None, tyro.conf.arg(name="out")]


def keywords(*parts: Any) -> dict[str, Any]:
    """Returns the flags of dataclasses as the keyword arguments of a call.

    The groups that verbs share are taken apart, and `settings` are called `config`; other groups stay as they are.
    """
    values: dict[str, Any] = {}
    for name, value in ((name, getattr(part, name)) for part in parts for name in part.__dataclass_fields__):
        values |= keywords(value) if isinstance(value, ModelFlags | ComputeFlags) else {name: value}
    return {("config" if name == "settings" else name): value for name, value in values.items()}
