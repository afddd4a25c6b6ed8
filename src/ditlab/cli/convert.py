"""`ditlab convert`: models between ditlab, diffusers and the original codes, and runs to and from the hub."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from ditlab.cli.common import noting
from ditlab.data.autoencoder import open_autoencoder
from ditlab.errors import DitlabError
from ditlab.files import atomic_folder
from ditlab.interop.checkpoints import open_checkpoint
from ditlab.interop.converted import write_converted
from ditlab.interop.diffusers_dit import convert_diffusers, write_diffusers
from ditlab.interop.hub import upload
from ditlab.interop.imported import ImportedModel, objective_of
from ditlab.interop.improved_diffusion import UNetFile, write_improved
from ditlab.interop.original_dit import write_original
from ditlab.interop.original_files import SUFFIXES
from ditlab.models.opening import ExternalModel, open_model
from ditlab.models.run import Run
from ditlab.networks.dit import DiT, DiTConfig
from ditlab.networks.unet import UNet
from ditlab.reporting.hub_export import export_run

Format = Literal["ditlab", "diffusers", "original"]


@dataclass(frozen=True)
class Convert:
    """Convert a DiT or a UNet between ditlab, diffusers and the original codes' checkpoints, or send a run to the hub.

    `ditlab convert DiT-XL-2.pt models/dit` makes a folder that every other verb takes. The outputs stay the same; what
    the other format cannot express is refused.
    """

    source: tyro.conf.Positional[str]
    """A run's folder or one of its checkpoints, a converted model's folder, a checkpoint of the original DiT or of
    improved-diffusion (.pt, .pth, .ckpt, .safetensors), diffusers:PATH_OR_ID or hub:ID."""
    out: tyro.conf.Positional[str]
    """The folder or file to make, or hub:ORG/NAME to send a run there with a model card."""
    to: Format | None = None
    """What to make: a model for ditlab, a diffusers folder, or a checkpoint of the network's original code. Where not
    given: the latter for a name that ends in .pt, .pth or .safetensors, else a model for ditlab."""
    step: int | None = None
    """The checkpoint of a run; the newest where not given."""
    raw: bool = False
    """Take the raw weights instead of the averaged ones."""
    heads: int | None = None
    """Number of attention heads of an original checkpoint, where neither its width nor its settings tell."""
    unet: UNetFile = field(default_factory=UNetFile)
    """What else a checkpoint of improved-diffusion does not say."""
    codec: str | None = None
    """To diffusers: where the autoencoder of a run on latents lies now, if it was moved."""
    licence: str = ""
    """For the hub: the licence of the weights, by the hub's short name (apache-2.0, cc-by-4.0, ...)."""
    samples: bool = False
    """For the hub: show the newest samples on the card. Those of a run that memorizes are its training images."""
    dry_run: Path | None = None
    """For the hub: write what would be sent into this new folder, and send nothing."""

    def run(self, console: Console) -> dict[str, Any]:
        """Converts and says what was made."""
        if self.out.startswith("hub:"):
            return self._send(console)
        if self.licence or self.samples or self.dry_run is not None:
            raise DitlabError(
                "convert: --licence, --samples and --dry-run are for the hub; expected OUT as hub:ORG/NAME"
            )
        out, to = Path(self.out), self._format()
        if out.exists() and (out.is_file() or any(out.iterdir())):
            raise DitlabError(f"{out}: expected a new file or folder, found something there")
        if to == "ditlab":
            return self._to_ditlab(out, console)
        found, network, objective = self._ours(console)
        autoencoder = self._autoencoder(found, to, console)
        difference: dict[str, float] = {}
        if to == "diffusers":
            if not isinstance(network, DiT):
                raise DitlabError(f"convert: expected a DiT for diffusers, found a {type(network).__name__}")
            difference["difference"] = write_diffusers(network, objective, out, found.sampler, autoencoder)
        elif isinstance(network, DiT):
            write_original(network, objective, out)
        else:
            console.print(write_improved(network, objective, out), markup=False, soft_wrap=True)
        return _told(console, out, to, network, **difference)

    def _format(self) -> Format:
        """What is to be made."""
        named = Path(self.out).suffix in SUFFIXES
        to: Format = self.to or ("original" if named else "ditlab")
        if (to == "original") != named:
            raise DitlabError(
                f"convert: expected OUT to end in {', '.join(SUFFIXES)} for the original format and for it alone, "
                f"found '{self.out}' for {to}"
            )
        return to

    def _to_ditlab(self, out: Path, console: Console) -> dict[str, Any]:
        found = self._foreign()
        if self.codec is not None:
            raise DitlabError("convert --codec: expected a run on latents and --to diffusers, found another conversion")
        if isinstance(found, Run):
            if not self.source.startswith("hub:"):
                raise DitlabError(f"convert: {self.source} is a run of ditlab already; name another format with --to")
            if self.step is not None or self.raw:
                raise DitlabError(
                    f"convert: {self.source} is a run, fetched as it is; expected no --step or --raw, found one"
                )
            try:
                with atomic_folder(out) as folder:
                    shutil.copytree(found.home, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
            except OSError as error:
                raise DitlabError(f"{out}: could not be written ({error.strerror or error})") from None
            console.print(f"wrote {out}: a run of ditlab")
            return {"out": str(out), "format": "ditlab"}
        model, difference = found
        network = _convertible(model.denoiser.network)
        write_converted(model, out)
        _print_notes(console, model)
        return _told(console, out, "ditlab", network, **({} if difference is None else {"difference": difference}))

    def _foreign(self) -> Run | tuple[ImportedModel, float | None]:
        """The source: a run, or another model as ditlab's network with the difference that was measured."""
        if (self.heads is not None or self.unet != UNetFile()) and not self._original:
            raise DitlabError(
                "convert --heads and --unet: only checkpoints of original codes leave open what these say"
            )
        if self._original:
            self._check_no_step()
            return open_checkpoint(Path(self.source), ema=not self.raw, heads=self.heads, unet=self.unet), None
        if self.source.startswith("diffusers:"):
            self._check_averaged()
            return convert_diffusers(self.source.removeprefix("diffusers:"))
        found = open_model(self.source, codec=self.codec)
        if isinstance(found, Run):
            return found
        assert isinstance(found, ExternalModel)
        self._check_averaged()
        if not isinstance(found.model.denoiser.network, DiT | UNet):  # a diffusers model on the hub
            return convert_diffusers(self.source.removeprefix("hub:"))
        return found.model, None

    @property
    def _original(self) -> bool:
        return Path(self.source).suffix in SUFFIXES and not Path(self.source).is_dir()

    def _check_averaged(self) -> None:
        self._check_no_step()
        if self.raw:
            raise DitlabError(f"convert --raw: {self.source} has one set of weights only")

    def _check_no_step(self) -> None:
        if self.step is not None:
            raise DitlabError(f"convert --step: only a run has checkpoints to choose from, found {self.source}")

    def _ours(self, console: Console) -> tuple[Run | ImportedModel, DiT | UNet, object]:
        """The source, its network, which is one of ditlab's, and how that was trained."""
        opened = self._foreign()
        if isinstance(opened, Run):
            found: Run | ImportedModel = opened
            network = opened.network(opened.checkpoint(self.step, noting(console)), ema=not self.raw)
            objective: object = opened.config.objective
        else:
            found = opened[0]
            network, objective = found.denoiser.network, objective_of(found.denoiser, self.source)
            _print_notes(console, found)
        return found, _convertible(network), objective

    def _autoencoder(self, found: Run | ImportedModel, to: Format, console: Console) -> Any:
        """The library's autoencoder of a model of latents, which goes along to diffusers; a note where it cannot.

        Raises:
            DitlabError: it is not where it should be, or a place was given for one that is not there.
        """
        codec = (
            open_autoencoder(found.decoder) if isinstance(found, ImportedModel) and found.decoder is not None else None
        )
        record = found.record.codec if isinstance(found, Run) else codec and codec.record
        if self.codec is not None and (not isinstance(found, Run) or record is None or to != "diffusers"):
            raise DitlabError("convert --codec: expected a run on latents and --to diffusers, found another conversion")
        if record is None:
            return None
        if to == "diffusers" and record.kind == "kl":
            kept: Any = found.codec if isinstance(found, Run) else codec
            return kept.module
        why = "a DiTPipeline takes an AutoencoderKL only" if to == "diffusers" else "the original format has no place"
        note = (
            f"note: its autoencoder does not go along ({why}): these are latents of '{record.source}', SHA-256 "
            f"{record.sha256[:12]}, scale {record.scale:g}, shift {record.shift:g}"
        )
        console.print(note, markup=False, soft_wrap=True)
        return None

    def _send(self, console: Console) -> dict[str, Any]:
        """Exports a run, and sends it to the hub unless this is a dry run."""
        named = self.to is not None or self.heads is not None or self.unet != UNetFile()
        if named or self.raw or self.codec is not None:
            raise DitlabError(
                "convert: a run goes to the hub as it is; expected no --to, --heads, --unet, --raw or --codec, found "
                "some"
            )
        run = open_model(self.source)
        if not isinstance(run, Run):
            raise DitlabError(f"convert: expected a run of ditlab to send to the hub, found {self.source}")
        repo = self.out.removeprefix("hub:")
        if repo.count("/") != 1 or not all(repo.split("/")):
            raise DitlabError(f"convert: expected hub:ORG/NAME, found '{self.out}'")
        words: dict[str, Any] = {"step": self.step, "licence": self.licence, "samples": self.samples}
        if not self.licence:
            console.print("note: no --licence was given, so the card names none", markup=False)
        if self.dry_run is not None:
            folder = export_run(run, self.dry_run, repo, **words)
            console.print(f"wrote {folder}, which `ditlab convert {self.source} {self.out}` would send")
            return {"out": str(folder), "format": "hub", "sent": False}
        with tempfile.TemporaryDirectory() as temporary:
            address = upload(export_run(run, Path(temporary) / "export", repo, **words), repo)
        console.print(f"sent to {address}")
        return {"out": address, "format": "hub", "sent": True}


def _convertible(network: object) -> DiT | UNet:
    """The network, if it is of a kind that is converted."""
    if not isinstance(network, DiT | UNet):
        raise DitlabError(f"convert: expected a DiT or a UNet, found a {type(network).__name__}")
    return network


def _print_notes(console: Console, model: ImportedModel) -> None:
    for note in model.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def _told(console: Console, out: Path, to: Format, network: DiT | UNet, **measured: float) -> dict[str, Any]:
    """Says what was made, and gives it for --json."""
    config = network.config
    count = sum(value.numel() for value in network.parameters())
    if isinstance(config, DiTConfig):
        shape = f"{config.depth} blocks of width {config.width}, {config.heads} heads, patch {config.patch}"
    else:
        shape = f"{config.res_blocks} blocks a level, levels of {', '.join(map(str, config.widths))} channels"
    classes = f"{config.num_classes} classes" if config.num_classes else "no classes"
    kind = type(network).__name__
    console.print(f"wrote {out}: a {kind} of {count:,} parameters ({shape}, {classes})", markup=False)
    if "difference" in measured:
        console.print(
            f"outputs of both networks differ by {measured['difference']:.1g} of their standard deviation at most"
        )
    return {"out": str(out), "format": to, "parameters": count, **measured}
