"""A run: the folder of one trained network, and everything that is known about it.

    runs/NAME/
      config.json     resolved settings, split, command, environment
      log.jsonl       one line an interval
      checkpoints/    see ditlab.training.checkpoint
      samples/  analysis/  report.html

`Run.open` reads one, `start` makes one (or takes up one that was interrupted), and `train_run` trains it.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

import ditlab
from ditlab.config import RunConfig, RunRecord, SplitRecord, differences, flat, read_record, to_json
from ditlab.data.autoencoder import Codec, CodecRecord, Identity, reopen_codec
from ditlab.data.imageset import ImageSet
from ditlab.data.splits import make_split
from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.guidance import GuidanceConfig
from ditlab.diffusion.objectives import VPObjectiveConfig
from ditlab.diffusion.samplers import DDIMConfig, DDPMConfig, SamplerConfig
from ditlab.errors import DitlabError
from ditlab.metrics.denoising_errors import grid_levels
from ditlab.metrics.psnr import psnr_point
from ditlab.models.model import Model
from ditlab.networks.registry import build_network
from ditlab.provenance import Provenance
from ditlab.rng import torch_generator
from ditlab.training.checkpoint import Checkpoint, CheckpointStore, load_network
from ditlab.training.compiling import compile_blocks
from ditlab.training.distributed import Processes
from ditlab.training.log import TrainingLog, read_log
from ditlab.training.sharding import checkpoint_activations
from ditlab.training.trainer import StopFlag, train

RESUMABLE = frozenset(
    f"training.{name}" for name in ("steps", "keep", "keep_every", "save_every", "shard", "checkpoint_activations")
)
"""Settings that may change when a run goes on, beside the sampler's and the guidance's: they do not change any step
already made."""


_UNFINISHED = "config.json.tmp"
"""What a kill while config.json was first written leaves: a folder with nothing else in it is still to be a run's."""


class Run(Model):
    """One run's folder, opened for reading."""

    def __init__(
        self,
        path: Path,
        record: RunRecord,
        data: Path | None = None,
        codec: str | Path | None = None,
        *,
        step: int | None = None,
        results: Path | None = None,
    ) -> None:
        """See `open`."""
        self.home, self.path, self.record = path, path if results is None else results, record
        self._data, self._codec, self._step = data, codec, step

    @staticmethod
    def open(
        path: str | Path,
        data: str | Path | None = None,
        codec: str | Path | None = None,
        *,
        step: int | None = None,
        results: Path | None = None,
    ) -> Run:
        """Opens a run.

        Args:
            path: its folder.
            data: where its image set lies now, if it was moved.
            codec: where its autoencoder lies now, if it was moved (`ditlab.data.autoencoder`).
            step: the checkpoint that stands for it; the newest where not given.
            results: the folder for what is measured, where its own one may not be written.

        Raises:
            DitlabError: there is no run, or its config.json cannot be used.
        """
        folder = Path(path)
        if not folder.is_dir():
            found = "a file" if folder.exists() else "nothing"
            if folder.is_file() and folder.suffix in (".pt", ".pth", ".ckpt", ".pkl", ".bin"):
                found = "a pickle, which could run code and is not opened"
            raise DitlabError(f"run {folder}: expected a run's folder, found {found}")
        record = read_record(folder / "config.json")
        return Run(folder, record, None if data is None else Path(data), codec, step=step, results=results)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def config(self) -> RunConfig:
        """The resolved settings."""
        return self.record.config

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting by its dotted name; for a run on latents also `codec`, the autoencoder's source."""
        codec = self.record.codec
        return flat(self.config) | ({} if codec is None else {"codec": codec.source})

    @property
    def split_record(self) -> SplitRecord:
        """The split that config.json keeps."""
        return self.record.split

    @property
    def sampler(self) -> SamplerConfig:
        """The sampler of its settings; all steps of a process that has fewer than the sampler takes by default."""
        config, objective = self.config.sampler, self.config.objective
        if isinstance(config, (DDPMConfig, DDIMConfig)) and isinstance(objective, VPObjectiveConfig):
            usual = type(config)().steps
            if config.steps == usual and objective.steps < int(usual):
                return replace(config, steps=str(objective.steps))
        return config

    @property
    def guidance(self) -> GuidanceConfig:
        """The guidance of its settings."""
        return self.config.guidance

    @property
    def command(self) -> str:
        """The command that started it."""
        return self.record.command

    @property
    def environment(self) -> dict[str, str]:
        """Versions and machine when it was started."""
        return self.record.environment

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
        if self._data is None and not self.config.data.path:
            raise DitlabError(f"run {self.name}: its images did not come with it; give --data with their set's folder")
        return ImageSet.open(self._data if self._data is not None else self.home / self.config.data.path)

    @cached_property
    def codec(self) -> Codec:
        """Its autoencoder, loaded when first asked for; the identity for a run on pixels.

        Raises:
            DitlabError: the autoencoder is not where it was, or another one is there.
        """
        if self.record.codec is None:
            return Identity()
        return reopen_codec(self.record.codec, self.home, self._codec)

    @property
    def conditional(self) -> bool:
        """Whether the network takes class labels."""
        return bool(getattr(self.config.network, "num_classes", 0))

    def checkpoint(self, step: int | None = None, say: Callable[[str], None] | None = None) -> Checkpoint:
        """The checkpoint of a step, the one that stands for the run, or the newest whole one.

        Raises:
            DitlabError: there is none, or the one asked for is damaged.
        """
        step = self._step if step is None else step
        if step is not None:
            if step not in self.checkpoints.steps():
                kept = ", ".join(str(s) for s in self.checkpoints.steps()) or "none"
                raise DitlabError(f"run {self.path}: no checkpoint of step {step}, found {kept}")
            return self.checkpoints.load(step)
        found = self.checkpoints.newest(say)
        if found is None:
            raise DitlabError(f"run {self.path}: expected a checkpoint, found none; was it trained?")
        return found

    def network(self, checkpoint: Checkpoint, *, ema: bool = True) -> nn.Module:
        """The network with a checkpoint's weights, in evaluation mode, on the CPU."""
        network = build_network(self.config.network)
        load_network(network, checkpoint.ema if ema else checkpoint.model, checkpoint.path)
        return network.eval().requires_grad_(False)

    def denoiser_and_provenance(
        self,
        *,
        step: int | None = None,
        ema: bool = True,
        label: str = "",
        device: torch.device | str = "cpu",
        say: Callable[[str], None] | None = None,
    ) -> tuple[Denoiser, Provenance]:
        """See `Model.denoiser_and_provenance`."""
        checkpoint = self.checkpoint(step, say)
        network = self.network(checkpoint, ema=ema).to(device)
        denoiser = self.config.objective.build().denoiser(network)
        denoiser.pixel_space = self.record.codec is None
        self.device = device
        return denoiser, self.facts(checkpoint.step, ema=ema, label=label)

    def facts(self, step: int | None, *, ema: bool = True, label: str = "") -> Provenance:
        """What a result keeps about this run."""
        config = self.config
        return Provenance(
            name=self.name,
            label=label,
            n=self.record.split.train,
            seed=self.record.split.seed,
            step=step,
            ema=ema,
            split_family=self.record.split.family,
            split_hash=self.record.split.hash,
            settings={
                "preset": config.preset,
                "attention": getattr(config.network, "attention", ""),
                "training_seed": config.training.seed,
                "image_set": self.record.split.imageset,
            },
        )


def environment(device: torch.device) -> dict[str, str]:
    """Versions and machine, for config.json and reports."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    found = {
        "ditlab": ditlab.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": f"{processor}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "device": str(device),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
    return found


def start(path: str | Path, config: RunConfig, images: ImageSet, *, device: torch.device, command: str = "") -> Run:
    """Makes a run's folder, or opens the one that is there if it has the same settings.

    Args:
        path: the run's folder.
        config: the settings, already fitted to the images (`config.fit_to_images`).
        images: the image set.
        device: noted in the environment.
        command: the command line that the user typed.

    Raises:
        DitlabError: the folder holds something else, or a run with other settings, or the split cannot be made.
    """
    path = Path(path)
    split = make_split(images, config.data.n, config.data.test, config.data.seed, config.data.skip)
    relative = os.path.relpath(images.path.resolve(), path.resolve())
    config = replace(config, data=replace(config.data, path=relative))
    record = RunRecord(
        config, SplitRecord(**split.to_json()), command, environment(device), codec=_codec_of(config, images, path)
    )
    if (path / "config.json").exists():
        found = Run.open(path)
        changed = {k: v for k, v in differences(found.config, config).items() if k != "data.path"}
        wrong = {
            name: pair
            for name, pair in changed.items()
            if name not in RESUMABLE and not name.startswith(("sampler.", "guidance."))
        }
        if wrong:
            name, (before, now) = next(iter(wrong.items()))
            more = f" ({len(wrong)} settings differ)" if len(wrong) > 1 else ""
            raise DitlabError(
                f"run {path}: it was started with {name} = {before}, now {now} is asked for{more}; "
                "give another --out, or the same settings to go on"
            )
        if found.record.split.hash != split.hash:
            raise DitlabError(f"run {path}: it was started on other images; give another --out, or the same image set")
        if not changed:
            return Run(path, found.record, images.path)
        if "training.steps" in changed and config.training.lr_anneal:
            before, now = changed["training.steps"]
            raise DitlabError(
                f"run {path}: its learning rate falls to 0 over training.steps = {before}, now {now} is asked for, "
                "which would change the steps already made; give another --out, or the same steps"
            )
        done = found.checkpoints.steps()
        if done and config.training.steps < done[-1]:
            raise DitlabError(
                f"run {path}: it has already made {done[-1]} steps, now training.steps = {config.training.steps} is "
                "asked for; give another --out, or at least as many steps"
            )
        record = replace(found.record, config=config)
    elif path.is_file():
        raise DitlabError(f"run {path}: expected a new folder or a run's, found a file")
    elif path.is_dir() and any(child.name != _UNFINISHED for child in path.iterdir()):
        raise DitlabError(f"run {path}: the folder exists and is not a run; give another --out")
    _write_record(path, record)
    return Run(path, record, images.path)


def _codec_of(config: RunConfig, images: ImageSet, path: Path) -> CodecRecord | None:
    """What a run's record keeps of the codec of its images; None for pixels."""
    if images.latents is None:
        return None
    kept = images.latents.record
    if config.training.flip and not kept.mirrored:
        raise DitlabError(
            f"training.flip: {images.path} holds no latents of mirrored pictures; encode it with --mirrored, or train "
            "with --training.no-flip"
        )
    return kept.codec.moved(images.path, path)


def _write_record(path: Path, record: RunRecord) -> None:
    """Writes config.json, whole or not at all; a folder that was made for it goes again where it cannot be written."""
    made = not path.exists()
    beside = path / _UNFINISHED
    try:
        path.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(to_json(record), indent=1) + "\n")
        beside.replace(path / "config.json")
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
            if made:
                path.rmdir()
        raise DitlabError(f"run {path}: its folder could not be written: {error.strerror}") from None


def train_run(
    run: Run,
    processes: Processes,
    *,
    progress: Callable[[int, float], None] = lambda step, loss: None,
    say: Callable[[str], None] = lambda sentence: None,
    stop: StopFlag | None = None,
) -> None:
    """Trains a run until its last step, from its newest checkpoint.

    Args:
        run: from `start`.
        processes: this process and the others.
        progress: called after each step with the steps done and the last known loss.
        say: called with sentences that the user should see.
        stop: when set, the run is saved and `ditlab.training.trainer.Interrupted` raised.
    """
    config = run.config
    split = run.split
    network = build_network(config.network, config.training.seed)
    if config.training.checkpoint_activations and not checkpoint_activations(network) and processes.first:
        say("this network has no list of blocks, so its activations are kept")
    objective = config.objective.build()
    compiled = compile_blocks(network, config.training.compile, device=processes.device, steps=config.training.steps)
    if compiled and processes.first:
        say("compiling the network's blocks; the first steps take longer")
    train(
        network=network,
        objective=objective,
        images=run.images if run.conditional else _Unlabelled(run.images),
        train=split.train,
        config=config.training,
        processes=processes,
        checkpoints=run.checkpoints,
        log=TrainingLog(run.path / "log.jsonl"),
        # An objective of its own: one that remembers draws its steps by what it saw, and a measure must not change.
        evaluate=_evaluation(run, network, config.objective.build(), processes.device),
        progress=progress,
        say=say,
        stop=stop,
    )


class _Unlabelled:
    """An image set whose labels an unconditional network does not get."""

    def __init__(self, images: ImageSet) -> None:
        self.shape, self.sampled, self.batch = images.shape, images.sampled, images.batch

    def batch_labels(self, indices: np.ndarray) -> None:
        """None."""


def _evaluation(
    run: Run, network: nn.Module, objective: Any, device: torch.device
) -> Callable[[int], dict[str, float]]:
    """What is measured during training: denoising loss and PSNR on fixed train and test images with fixed noise."""
    settings = run.config.evaluation
    sides = {side: run.pictures(side, settings.images) for side in ("train", "test")}
    # Both sides get the very same noise levels and noise: the loss varies much more over levels than over images.
    count = min(len(images) for images, _ in sides.values())
    repeats = -(-4 * settings.images // count)
    draws = objective.draw(torch_generator(0, "evaluation"), repeats * count, run.images.shape)
    denoiser = objective.denoiser(network)
    levels = grid_levels(denoiser, settings.levels) if settings.levels else ()

    @torch.no_grad()
    def loss(side: Literal["train", "test"]) -> float:
        images, label = sides[side]
        images, label = images[:count].to(device), None if label is None else label[:count].to(device)
        total = 0.0
        for repeat in range(repeats):
            part = {name: value[repeat * count : (repeat + 1) * count].to(device) for name, value in draws.items()}
            total += objective.losses(network, images, label, part)["loss"].double().mean().item()
        return total / repeats

    def evaluate(step: int) -> dict[str, float]:
        values = {f"{side}_loss": loss(side) for side in ("train", "test")}
        if levels:
            (train_images, train_labels), (test_images, test_labels) = sides["train"], sides["test"]
            point = psnr_point(
                denoiser,
                train_images,
                test_images,
                levels,
                train_labels=train_labels,
                test_labels=test_labels,
            )
            values |= {"train_psnr": point.train, "test_psnr": point.test, "psnr_gap": point.gap}
        return values

    return evaluate
