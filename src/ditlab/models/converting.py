"""Converting models between ditlab, diffusers and the original codes. The outputs of the network stay the same."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditlab.data.autoencoder import open_autoencoder
from ditlab.errors import AlreadyExists, DitlabError
from ditlab.files import atomic_folder
from ditlab.interop.checkpoints import open_checkpoint
from ditlab.interop.converted import write_converted
from ditlab.interop.diffusers_dit import convert_diffusers, write_diffusers
from ditlab.interop.formats import Format, UNetFile
from ditlab.interop.imported import ImportedModel, objective_of
from ditlab.interop.improved_diffusion import write_improved
from ditlab.interop.original_dit import write_original
from ditlab.interop.original_files import SUFFIXES
from ditlab.models.external import ExternalModel
from ditlab.models.opening import open_model
from ditlab.models.run import Run
from ditlab.networks.dit import DiT
from ditlab.networks.dit_config import DiTConfig
from ditlab.networks.unet import UNet
from ditlab.progress import SILENT, Reporter

__all__ = ["Conversion", "Converted"]

_NO_CODEC = "convert: `codec`: expected a run on latents and `to` diffusers, found another conversion"


@dataclass(frozen=True)
class Converted:
    """What a conversion made."""

    out: str
    """The folder or file, or the address on the hub."""
    format: str
    """"ditlab", "diffusers", "original" or "hub"."""
    description: str
    """What it is, in words."""
    parameters: int | None = None
    difference: float | None = None
    """Largest difference between the outputs of both networks, in their standard deviations, where it was measured."""
    sent: bool | None = None
    """For the hub: whether it was sent."""

    def to_json(self) -> dict[str, Any]:
        """Returns the values that are known."""
        values = {name: getattr(self, name) for name in ("out", "format", "parameters", "difference", "sent")}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Conversion:
    """A conversion from a source to a new file or folder; the fields are the settings of `ditlab.convert`."""

    source: str
    out: str
    to: Format | None = None
    checkpoint: int | None = None
    raw: bool = False
    heads: int | None = None
    unet: UNetFile = field(default_factory=UNetFile)
    codec: str | None = None

    def run(self, reporter: Reporter = SILENT) -> Converted:
        """Converts; nothing is left behind where that is refused."""
        out, to = Path(self.out), self._format()
        if out.exists() and (out.is_file() or any(out.iterdir())):
            raise AlreadyExists(f"{out}: expected a new file or folder, found something there")
        if to == "ditlab":
            return self._to_ditlab(out, reporter)
        source, network, objective = self._ours(reporter)
        autoencoder = self._autoencoder(source, to, reporter)
        difference = None
        if to == "diffusers":
            if not isinstance(network, DiT):
                raise DitlabError(f"convert: expected a DiT for diffusers, found a {type(network).__name__}")
            difference = write_diffusers(network, objective, out, source.sampler, autoencoder)
        elif isinstance(network, DiT):
            write_original(network, objective, out)
        else:
            reporter.note(write_improved(network, objective, out))
        return _converted(out, to, network, difference)

    def _format(self) -> Format:
        """What is to be made."""
        named = Path(self.out).suffix in SUFFIXES
        to: Format = self.to or ("original" if named else "ditlab")
        if (to == "original") != named:
            raise DitlabError(
                f"convert: expected `out` to end in {', '.join(SUFFIXES)} for the original format and for it alone, "
                f"found '{self.out}' for {to}"
            )
        return to

    def _to_ditlab(self, out: Path, reporter: Reporter) -> Converted:
        opened = self._read()
        if self.codec is not None:
            raise DitlabError(_NO_CODEC)
        if isinstance(opened, Run):
            if not self.source.startswith("hub:"):
                raise DitlabError(f"convert: {self.source} is a run of ditlab already; name another format as `to`")
            if self.checkpoint is not None or self.raw:
                raise DitlabError(
                    f"convert: {self.source} is a run, fetched as it is; expected no `checkpoint` or `raw`, found one"
                )
            try:
                with atomic_folder(out) as folder:
                    shutil.copytree(opened.home, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
            except OSError as error:
                raise DitlabError(f"{out}: could not be written ({error.strerror or error})") from None
            return Converted(str(out), "ditlab", "a run of ditlab")
        model, difference = opened
        network = _convertible(model.denoiser.network)
        write_converted(model, out)
        _note_all(reporter, model)
        return _converted(out, "ditlab", network, difference)

    def _read(self) -> Run | tuple[ImportedModel, float | None]:
        """The source: a run, or another model as ditlab's network with the difference that was measured."""
        if (self.heads is not None or self.unet != UNetFile()) and not self._original:
            raise DitlabError(
                "convert: `heads` and `unet`: only checkpoints of original codes leave open what these say"
            )
        if self._original:
            self._check_no_step()
            return open_checkpoint(Path(self.source), ema=not self.raw, heads=self.heads, unet=self.unet), None
        if self.source.startswith("diffusers:"):
            self._check_averaged()
            return convert_diffusers(self.source.removeprefix("diffusers:"))
        opened = open_model(self.source, codec=self.codec)
        if isinstance(opened, Run):
            return opened
        assert isinstance(opened, ExternalModel)
        self._check_averaged()
        if not isinstance(opened.model.denoiser.network, DiT | UNet):  # a diffusers model on the hub
            return convert_diffusers(self.source.removeprefix("hub:"))
        return opened.model, None

    @property
    def _original(self) -> bool:
        return Path(self.source).suffix in SUFFIXES and not Path(self.source).is_dir()

    def _check_averaged(self) -> None:
        self._check_no_step()
        if self.raw:
            raise DitlabError(f"convert: `raw`: {self.source} has one set of weights only")

    def _check_no_step(self) -> None:
        if self.checkpoint is not None:
            raise DitlabError(f"convert: `checkpoint`: only a run has checkpoints to choose from, found {self.source}")

    def _ours(self, reporter: Reporter) -> tuple[Run | ImportedModel, DiT | UNet, object]:
        """The source, its network, which is one of ditlab's, and how that was trained."""
        opened = self._read()
        if isinstance(opened, Run):
            source: Run | ImportedModel = opened
            network = opened.network(opened.checkpoint(self.checkpoint, reporter), ema=not self.raw)
            objective: object = opened.config.objective
        else:
            source = opened[0]
            network, objective = source.denoiser.network, objective_of(source.denoiser, self.source)
            _note_all(reporter, source)
        return source, _convertible(network), objective

    def _autoencoder(self, source: Run | ImportedModel, to: Format, reporter: Reporter) -> Any:
        """The library's autoencoder of a model of latents, which goes along to diffusers; a note where it cannot."""
        stored = source.decoder if isinstance(source, ImportedModel) else None
        codec = None if stored is None else open_autoencoder(stored)
        record = source.record.codec if isinstance(source, Run) else codec and codec.record
        if self.codec is not None and (not isinstance(source, Run) or record is None or to != "diffusers"):
            raise DitlabError(_NO_CODEC)
        if record is None:
            return None
        if to == "diffusers" and record.kind == "kl":
            autoencoder: Any = source.codec if isinstance(source, Run) else codec
            return autoencoder.module
        why = "a DiTPipeline takes an AutoencoderKL only" if to == "diffusers" else "the original format has no place"
        reporter.note(
            f"its autoencoder does not go along ({why}): these are latents of '{record.source}', SHA-256 "
            f"{record.sha256[:12]}, scale {record.scale:g}, shift {record.shift:g}"
        )
        return None


def _convertible(network: object) -> DiT | UNet:
    """The network, if it is of a kind that is converted."""
    if not isinstance(network, DiT | UNet):
        raise DitlabError(f"convert: expected a DiT or a UNet, found a {type(network).__name__}")
    return network


def _note_all(reporter: Reporter, model: ImportedModel) -> None:
    for note in model.notes:
        reporter.note(note)


def _converted(out: Path, to: Format, network: DiT | UNet, difference: float | None) -> Converted:
    config = network.config
    count = sum(value.numel() for value in network.parameters())
    if isinstance(config, DiTConfig):
        shape = f"{config.depth} blocks of width {config.width}, {config.heads} heads, patch {config.patch}"
    else:
        shape = f"{config.res_blocks} blocks a level, levels of {', '.join(map(str, config.widths))} channels"
    classes = f"{config.num_classes} classes" if config.num_classes else "no classes"
    description = f"a {type(network).__name__} of {count:,} parameters ({shape}, {classes})"
    return Converted(str(out), to, description, count, difference)
