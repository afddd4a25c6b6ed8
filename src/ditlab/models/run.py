"""A run: the folder of one trained network, and everything that is known about it.

    runs/NAME/
      config.json     resolved settings, split, command, environment
      log.jsonl       one line an interval
      checkpoints/    see ditlab.training.checkpoint
      samples/  analysis/  report.html

`Run.open` reads one; `ditlab.models.creating` makes one and trains it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ditlab.config import RunConfig, RunRecord, flat, read_record
from ditlab.data.autoencoder import Autoencoder, Identity, reopen_autoencoder
from ditlab.data.imageset import ImageSet
from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.objective_configs import VPObjectiveConfig
from ditlab.diffusion.samplers import DDIMConfig, DDPMConfig, SamplerConfig
from ditlab.errors import DitlabError, NotFound
from ditlab.models.model import Model
from ditlab.networks.registry import build_network
from ditlab.progress import SILENT, Reporter
from ditlab.provenance import Provenance
from ditlab.training.checkpoint import Checkpoint, CheckpointStore, load_network
from ditlab.training.log import read_log


class Run(Model):
    """One run's folder, opened for reading; its images, codec and settings are those that it was trained with."""

    knows_training_images = True

    def __init__(
        self,
        path: Path,
        record: RunRecord,
        data: ImageSet | str | Path | None = None,
        codec: str | Path | None = None,
        *,
        step: int | None = None,
        results: Path | None = None,
    ) -> None:
        """See `open`."""
        self.record, self.config = record, record.config
        self.home, self.path = path, path if results is None else results
        self.name, self._data, self._codec, self._step = self.path.resolve().name, data, codec, step
        self.command, self.environment, self.split_record = record.command, record.environment, record.split
        self.sampler, self.guidance = _own_sampler(self.config), self.config.guidance
        self.conditional, self.mirrored = bool(self.config.network.classes), self.config.training.flip

    @staticmethod
    def open(
        path: str | Path,
        data: ImageSet | str | Path | None = None,
        codec: str | Path | None = None,
        *,
        step: int | None = None,
        results: Path | None = None,
    ) -> Run:
        """Opens a run.

        Args:
            path: its folder.
            data: where its image set is now, if it was moved, or the image set.
            codec: where its autoencoder is now, if it was moved (`ditlab.data.autoencoder`).
            step: the checkpoint that stands for it; the newest where not given.
            results: the folder for what is measured, where its own one may not be written.

        Raises:
            NotFound: there is no run.
            DitlabError: its config.json cannot be used.
        """
        folder = Path(path)
        if not folder.is_dir():
            content = "a file" if folder.exists() else "nothing"
            if folder.is_file() and folder.suffix in (".pt", ".pth", ".ckpt", ".pkl", ".bin"):
                content = "a pickle, which could run code and is not opened"
            raise NotFound(f"run {folder}: expected a run's folder, found {content}")
        return Run(folder, read_record(folder / "config.json"), data, codec, step=step, results=results)

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting by its dotted name; for a run on latents also `codec`, the autoencoder's source."""
        codec = self.record.codec
        return flat(self.config) | ({} if codec is None else {"codec": codec.source})

    @property
    def newest_step(self) -> int | None:
        """Step of the newest checkpoint, or of the one that stands for the run; None where there is none."""
        if self._step is not None:
            return self._step
        steps = self.checkpoints.steps()
        return steps[-1] if steps else None

    @property
    def checkpoints(self) -> CheckpointStore:
        """The run's checkpoints."""
        training = self.config.training
        return CheckpointStore(self.home / "checkpoints", keep=training.keep, keep_every=training.keep_every)

    @property
    def log(self) -> list[dict[str, Any]]:
        """The lines of the training log."""
        return read_log(self.home / "log.jsonl")

    @property
    def finished(self) -> bool:
        """Whether the last step was made, and saved in a checkpoint that is whole."""
        steps = self.checkpoints.steps()
        if not steps or steps[-1] < self.config.training.steps:
            return False
        try:
            self.checkpoints.load(steps[-1])
        except DitlabError:
            return False
        return True

    @cached_property
    def images(self) -> ImageSet:
        """The image set that it was trained on."""
        if isinstance(self._data, ImageSet):
            return self._data
        if self._data is None and not self.config.data.path:
            raise NotFound(f"run {self.name}: its images did not come with it; give their set's folder as `data`")
        return ImageSet.open(self.home / self.config.data.path if self._data is None else self._data)

    @cached_property
    def codec(self) -> Autoencoder:
        """Its autoencoder, loaded when first asked for; the identity for a run on pixels.

        Raises:
            DitlabError: the autoencoder is not where it was, or another one is there.
        """
        if self.record.codec is None:
            return Identity()
        return reopen_autoencoder(self.record.codec, self.home, self._codec)

    def checkpoint(self, step: int | None = None, reporter: Reporter = SILENT) -> Checkpoint:
        """The checkpoint of a step, the one that stands for the run, or the newest whole one.

        Raises:
            NotFound: there is none.
            Damaged: the one that was asked for is damaged.
        """
        step = self._step if step is None else step
        if step is not None:
            if step not in self.checkpoints.steps():
                steps = ", ".join(str(s) for s in self.checkpoints.steps()) or "none"
                raise NotFound(f"run {self.path}: no checkpoint of step {step}, found {steps}")
            return self.checkpoints.load(step)
        checkpoint = self.checkpoints.newest(reporter.note)
        if checkpoint is None:
            raise NotFound(f"run {self.path}: expected a checkpoint, found none; was it trained?")
        return checkpoint

    def network(self, checkpoint: Checkpoint, *, ema: bool = True) -> nn.Module:
        """The network with a checkpoint's weights, in evaluation mode, on the CPU."""
        network = build_network(self.config.network)
        load_network(network, checkpoint.ema if ema else checkpoint.model, checkpoint.path)
        return network.eval().requires_grad_(False)

    def _load(
        self, step: int | None, ema: bool, device: torch.device, reporter: Reporter
    ) -> tuple[Denoiser, int | None, str]:
        checkpoint = self.checkpoint(step, reporter)
        denoiser = self.config.objective.build().denoiser(self.network(checkpoint, ema=ema).to(device))
        denoiser.pixel_space = self.record.codec is None
        self.device = device
        return denoiser, checkpoint.step, checkpoint.weights_hash(ema)

    def provenance(self, step: int | None = None, *, ema: bool = True, label: str = "") -> Provenance:
        """See `Model.provenance`."""
        config = self.config
        settings = {"preset": config.preset, "attention": config.network.attention_plan}
        settings |= {"training_seed": config.training.seed, "image_set": self.split_record.imageset}
        return self._with_split(Provenance(self.name, label, step=step, ema=ema, settings=settings))


def _own_sampler(config: RunConfig) -> SamplerConfig:
    """The sampler of a run's settings; all steps of a process that has fewer than the sampler takes by default."""
    sampler, objective = config.sampler, config.objective
    if isinstance(sampler, (DDPMConfig, DDIMConfig)) and isinstance(objective, VPObjectiveConfig):
        usual = type(sampler)().steps
        if sampler.steps == usual and objective.steps < int(usual):
            return replace(sampler, steps=str(objective.steps))
    return sampler
