"""Converted models: external weights in a network of ditlab, in a folder that every verb reads.

    OUT/
      model.json          network, process, sampler, and the origin of the weights
      model.safetensors   the weights
      vae/                the diffusers autoencoder of a model of latents, if the source had one

Unlike a run, the folder has no image set, split or log, since these are unknown.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pydantic

from ditlab.config import Network, Sampler, from_json
from ditlab.data.manifest import hash_file
from ditlab.diffusion.objective_configs import VPObjectiveConfig
from ditlab.errors import DitlabError
from ditlab.files import new_folder
from ditlab.interop.imported import ImportedModel, freeze, objective_of
from ditlab.networks.registry import NETWORKS, build_network
from ditlab.training.checkpoint import load_network, read_tensors, write_tensors

FORMAT = 1
"""Version of model.json's layout; newer ones are refused."""

RECORD, WEIGHTS, DECODER = "model.json", "model.safetensors", "vae"


@dataclass(frozen=True)
class ModelRecord:
    """The content of model.json."""

    __pydantic_config__: ClassVar[pydantic.ConfigDict] = pydantic.ConfigDict(extra="forbid")

    network: Network
    """Config of the network."""
    objective: VPObjectiveConfig
    """The process that it was trained on."""
    sampler: Sampler
    """The default sampler."""
    source: dict[str, Any]
    """Origin of the weights."""
    weights: str
    """SHA-256 of model.safetensors."""
    format: int = FORMAT
    """Version of this layout."""


def is_converted(folder: Path) -> bool:
    """Whether a folder contains a converted model."""
    return (folder / RECORD).is_file()


def write_converted(model: ImportedModel, out: Path) -> None:
    """Writes a model with a network of ditlab, trained on a VP process that has a name, to a new folder."""
    network: Any = model.denoiser.network
    assert type(network.config) in NETWORKS
    objective = objective_of(model.denoiser, f"model {model.name}")
    with new_folder(out) as folder:
        write_tensors(folder / WEIGHTS, network.state_dict())
        if model.decoder is not None:
            shutil.copytree(model.decoder, folder / DECODER)
        digest = hash_file(folder / WEIGHTS).sha256
        record = ModelRecord(network.config, objective, model.sampler, dict(model.source), digest)
        values = pydantic.TypeAdapter(ModelRecord).dump_python(record, mode="json")
        (folder / RECORD).write_text(json.dumps(values, indent=1) + "\n")


def open_converted(folder: Path) -> ImportedModel:
    """Reads a converted model; DitlabError where model.json is invalid, or the weights are not those it names."""
    file = folder / RECORD
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError):
        raise DitlabError(f"{file}: expected a converted model's record as JSON, found something else") from None
    version = values.get("format") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise DitlabError(f"{file}: expected a converted model's record with a 'format', found none")
    if version > FORMAT:
        raise DitlabError(f"{file}: its format is {version}, this ditlab reads up to {FORMAT}; a newer ditlab wrote it")
    record: ModelRecord = from_json(ModelRecord, values, str(file))
    weights = folder / WEIGHTS
    tensors = read_tensors(weights)
    if hash_file(weights).sha256 != record.weights:
        raise DitlabError(f"{weights}: its SHA-256 is not the one in {RECORD}; the file was changed or damaged")
    network = build_network(record.network)
    load_network(network, tensors, weights)
    decoder = folder / DECODER
    return ImportedModel(
        name=folder.resolve().name,
        denoiser=record.objective.build().denoiser(freeze(network)),
        sampler=record.sampler,
        source=record.source,
        digest=hash_file(file).sha256,
        decoder=decoder if decoder.is_dir() else None,
    )


__all__ = ["FORMAT", "ModelRecord", "is_converted", "open_converted", "write_converted"]
