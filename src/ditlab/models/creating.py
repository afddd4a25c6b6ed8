"""Making a run and training it: the folder, the split, the evaluation along training.

`start` makes a run's folder, or opens that of an interrupted run; `train_run` trains it to its last step.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

import ditlab
from ditlab.config import RunConfig, RunRecord, SplitRecord, differences, to_json
from ditlab.data.autoencoder_record import AutoencoderRecord
from ditlab.data.imageset import ImageSet
from ditlab.data.splits import make_split
from ditlab.errors import AlreadyExists, DitlabError, Incompatible
from ditlab.metrics.denoising_errors import grid_levels
from ditlab.metrics.psnr import psnr_point
from ditlab.models.run import Run
from ditlab.networks.registry import build_network
from ditlab.progress import SILENT, Reporter, StopFlag
from ditlab.rng import torch_generator
from ditlab.training.compiling import compile_blocks
from ditlab.training.distributed import Device, DistributedContext, init_distributed
from ditlab.training.log import TrainingLog
from ditlab.training.sharding import checkpoint_activations
from ditlab.training.trainer import Trainer, check_batch

RESUMABLE = frozenset(
    f"training.{name}" for name in ("steps", "keep", "keep_every", "save_every", "shard", "checkpoint_activations")
)
"""Settings that may change when a run is resumed, beside the sampler's and the guidance's: they do not change any step
already made."""


_UNFINISHED = "config.json.tmp"
"""Temporary file of an interrupted first write; a folder that holds only this file may become a run."""


def environment(device: torch.device) -> dict[str, str]:
    """Versions and machine, for config.json and reports."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    versions = {
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
        versions["gpu"] = torch.cuda.get_device_name(device)
        versions["cuda"] = str(torch.version.cuda)
    return versions


def start(path: str | Path, config: RunConfig, images: ImageSet, *, device: torch.device, command: str = "") -> Run:
    """Makes a run's folder, or opens the one that is there if it has the same settings, already fitted to the images.

    `command`: the command line that the user typed, or the call; that of a resumed run whose settings changed takes the
    place of the earlier one.
    """
    path = Path(path)
    split = make_split(images, config.data.n, config.data.test, config.data.seed, config.data.skip)
    relative = os.path.relpath(images.path.resolve(), path.resolve())
    config = replace(config, data=replace(config.data, path=relative))
    record = RunRecord(
        config, SplitRecord(**split.to_json()), command, environment(device), codec=_codec_of(config, images, path)
    )
    if (path / "config.json").exists():
        earlier = Run.open(path)
        changed = {k: v for k, v in differences(earlier.config, config).items() if k != "data.path"}
        wrong = {
            name: pair
            for name, pair in changed.items()
            if name not in RESUMABLE and not name.startswith(("sampler.", "guidance."))
        }
        if wrong:
            name, (before, now) = next(iter(wrong.items()))
            more = f" ({len(wrong)} settings differ)" if len(wrong) > 1 else ""
            raise Incompatible(
                f"run {path}: it was started with {name} = {before}, now {now} is asked for{more}; "
                "give another `out`, or the same settings to resume it"
            )
        if earlier.record.split.hash != split.hash:
            raise Incompatible(f"run {path}: it was started on other images; give another `out`, or the same image set")
        if not changed:
            return Run(path, earlier.record, images.path)
        if "training.steps" in changed and config.training.lr_anneal:
            before, now = changed["training.steps"]
            raise Incompatible(
                f"run {path}: its learning rate falls to 0 over training.steps = {before}, now {now} is asked for, "
                "which would change the steps already made; give another `out`, or the same steps"
            )
        done = earlier.checkpoints.steps()
        if done and config.training.steps < done[-1]:
            raise Incompatible(
                f"run {path}: it has already made {done[-1]} steps, now training.steps = {config.training.steps} is "
                "asked for; give another `out`, or at least as many steps"
            )
        record = replace(earlier.record, config=config, command=command or earlier.record.command)
        with run_lock(path):  # while another process trains it, its settings stay as they are
            _write_record(path, record)
        return Run(path, record, images.path)
    if path.is_file():
        raise AlreadyExists(f"run {path}: expected a new folder or a run's, found a file")
    if path.is_dir() and any(child.name != _UNFINISHED for child in path.iterdir()):
        raise AlreadyExists(f"run {path}: the folder exists and is not a run; give another `out`")
    _write_record(path, record)
    return Run(path, record, images.path)


def _codec_of(config: RunConfig, images: ImageSet, path: Path) -> AutoencoderRecord | None:
    """What a run's record keeps of the codec of its images; None for pixels."""
    if images.latents is None:
        return None
    latents = images.latents.record
    if config.training.flip and not latents.mirrored:
        raise Incompatible(
            f"training.flip: {images.path} holds no latents of mirrored pictures; encode it with `mirrored`, or train "
            "with training.flip False"
        )
    return latents.codec.moved(images.path, path)


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


@contextmanager
def run_lock(folder: Path, wait: float = 30.0) -> Iterator[None]:
    """Holds a run for this process: only one at a time trains it. The lock goes with the process, however it ends.

    `wait`: seconds to wait for another process that is just ending.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such lock; there the user must not train a run twice at once
        yield
        return
    try:
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise DitlabError(f"run {folder}: its folder could not be written: {error.strerror}") from None
    with file:
        end = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > end:
                    raise Incompatible(f"run {folder}: another process is training it") from None
                time.sleep(0.2)
        yield


def create_and_train(
    config: RunConfig,
    images: ImageSet,
    out: str | Path,
    *,
    device: Device | None = None,
    command: str = "",
    minutes: float | None = None,
    stop: StopFlag | None = None,
    reporter: Reporter = SILENT,
) -> Run | None:
    """Makes a run or opens an interrupted one, and trains it to its last step; with torchrun, every rank calls it.

    Raises `TrainingInterrupted` after so many `minutes` or when `stop` is set; the same call resumes. Returns None on a
    rank other than 0 whose rank 0 refused the input.
    """
    with init_distributed(device) as context, ExitStack() as held:
        run, refusal = None, None
        if context.is_main:
            try:
                check_batch(config.training, context)
                run = start(out, config, images, device=context.device, command=command)
                if not run.finished:
                    held.enter_context(run_lock(run.path))
                    if differences(Run.open(run.path).config, run.config):  # between `start` and the lock
                        raise Incompatible(f"run {run.path}: another process changed its settings")
            except DitlabError as error:
                refusal = error
        # The other ranks wait here: they read what rank 0 wrote, or return silently where it refuses.
        if not context.raise_together(refusal):
            return None
        run = run or Run.open(out, images.path)
        notes = reporter if context.is_main else SILENT
        if run.finished:  # every rank finds the same, for nothing is written before all have begun to train
            notes.note(f"{run.path} is finished ({run.config.training.steps} steps)")
            return run
        done = run.checkpoints.steps()
        notes.note(
            f"training {run.path} on {run.record.split.train} images, {run.record.split.test} held out, on "
            f"{context.device}" + (f", resuming from step {done[-1]}" if done else "")
        )
        train_run(run, context, reporter=notes, stop=stop, minutes=minutes)
        return run


def train_run(
    run: Run,
    context: DistributedContext,
    *,
    reporter: Reporter = SILENT,
    stop: StopFlag | None = None,
    minutes: float | None = None,
) -> None:
    """Trains a run from `start` until its last step, from its newest whole checkpoint; see `create_and_train`."""
    config = run.config
    network = build_network(config.network, config.training.seed)
    if config.training.checkpoint_activations and not checkpoint_activations(network) and context.is_main:
        reporter.note("this network has no list of blocks, so its activations are kept")
    compiled = compile_blocks(network, config.training.compile, device=context.device, steps=config.training.steps)
    if compiled and context.is_main:
        reporter.note("compiling the network's blocks; the first steps take longer")
    Trainer(
        network,
        config.objective.build(),
        run.images if run.conditional else _Unlabelled(run.images),
        run.split.train,
        config.training,
        checkpoints=run.checkpoints,
        log=TrainingLog(run.path / "log.jsonl"),
        context=context,
        # An objective of its own, so that measuring does not change what the trained one remembers of its steps.
        measure=_evaluation(run, network, config.objective.build(), context.device),
        reporter=reporter,
        title=run.name,
        stop=stop,
        minutes=minutes,
    ).fit()


class _Unlabelled:
    """An image set whose labels an unconditional network does not get."""

    def __init__(self, images: ImageSet) -> None:
        self.shape, self.stochastic, self.batch = images.shape, images.stochastic, images.batch

    def batch_labels(self, indices: np.ndarray) -> None:
        """None."""


def _evaluation(
    run: Run, network: nn.Module, objective: Any, device: torch.device
) -> Callable[[int], dict[str, float]]:
    """What is measured during training: denoising loss and PSNR on fixed train and test images with fixed noise."""
    settings = run.config.evaluation
    sides = {side: run.batch(side, settings.images) for side in ("train", "test")}
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
