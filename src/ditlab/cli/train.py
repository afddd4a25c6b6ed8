"""`ditlab train`: one denoiser on N images."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from ditlab.cli.common import (
    TrainingBar,
    command_line,
    noting,
    open_images,
    parent_gone,
    run_lock,
    stopping,
    use_threads,
)
from ditlab.config import (
    DataConfig,
    EvaluationConfig,
    Network,
    ObjectiveSettings,
    RunConfig,
    Sampler,
    differences,
    fit_to_images,
    fit_to_latents,
)
from ditlab.diffusion.guidance import GuidanceConfig
from ditlab.diffusion.objectives import VPObjectiveConfig
from ditlab.diffusion.samplers import DDPMConfig
from ditlab.errors import DitlabError
from ditlab.models.run import Run, start, train_run
from ditlab.networks.dit import DiTConfig
from ditlab.presets import PRESETS, preset
from ditlab.progress import Bar, Reporter, StopFlag
from ditlab.training.config import TrainingConfig
from ditlab.training.distributed import init_distributed, pick_device
from ditlab.training.trainer import TrainingInterrupted, check_batch


@dataclass(frozen=True)
class Train:
    """Train a denoiser on N images of a set; the same command again goes on where an interrupted run was.

    Several processes: torchrun --nproc-per-node 2 -m ditlab train ... trains the same run, the batch shared among them.
    There the number of images is -n, for torchrun itself refuses --n as one of its own.
    """

    preset: Annotated[str, tyro.conf.Positional]
    """The recipe to start from; every other flag changes it."""
    data: str = ""
    """An image set's folder, or a source (photos, digits, folder:PATH, hub:ID, array:PATH, mosaic:PATH)."""
    n: Annotated[int | None, tyro.conf.arg(aliases=["-n"])] = None
    """Number of training images; all but the test images where not given."""
    test: int = 300
    """Number of test images held out."""
    seed: int = 0
    """Seed of the split, of the initial weights and of training."""
    skip: int = 0
    """Leave out so many of the shuffled training images and take the next N: two runs of one --seed, with --skip 0 and
    --skip N, have disjoint training sets (two-subsets)."""
    size: int = 32
    """Side of the images in pixels, when --data is a source."""
    out: Path | None = None
    """The run's folder; runs/PRESET-DATA-nN-ATTENTION-sSEED where not given."""
    conditional: bool = False
    """Give the network the image set's class labels."""
    shard: bool = False
    """The same as --training.shard: each process keeps one part of the network and of its optimizer (torchrun)."""
    checkpoint_activations: bool = False
    """The same as --training.checkpoint-activations: activations are computed a second time instead of kept."""
    device: str | None = None
    """cpu, cuda or cuda:N; CUDA where there is one."""
    threads: int | None = None
    """CPU threads; all cores where not given."""
    network: Network = field(default_factory=DiTConfig)
    """The network; its image size, channels, classes and learn_sigma follow the image set and the objective."""
    objective: ObjectiveSettings = field(default_factory=VPObjectiveConfig)
    """How it is trained."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """How long, and with which optimizer."""
    sampler: Sampler = field(default_factory=DDPMConfig)
    """How samples are drawn by default."""
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    """How strongly samples of a conditional run are pulled towards their class by default."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured during training."""
    measured_sigma: Annotated[bool, tyro.conf.Suppress] = True
    """Whether sigma_data of an EDM objective follows a set of latents; not where the user gave it."""

    @staticmethod
    def parse(words: list[str]) -> Train:
        """The flags of a command line, on top of the preset that it names."""
        name = next((word for word in words if not word.startswith("-")), None) if words else None
        if name is not None and words[0] == name:
            recipe = preset(name)
        elif words and words[0] in ("-h", "--help"):
            recipe = preset("dit-xs/1")
        else:
            raise DitlabError(
                f"train: expected a preset first ({', '.join(PRESETS)}), found {words[0] if words else 'nothing'}"
            )
        # Flags such as the patch and the windows are checked against the image set's size, not the preset's.
        network = replace(recipe.network, image_size=(0, 0))
        default = Train(
            preset=recipe.preset,
            network=network,
            objective=recipe.objective,
            training=recipe.training,
            sampler=recipe.sampler,
            guidance=recipe.guidance,
            evaluation=recipe.evaluation,
        )
        given = any(re.match(r"--objective\.sigma[-_]data(=|$)", word) for word in words)
        default = replace(default, measured_sigma=not given)
        return tyro.cli(
            Train,
            prog="ditlab train",
            args=words,
            default=default,
            config=(tyro.conf.AvoidSubcommands,),
            description=f"{Train.__doc__}\n\nPresets: {', '.join(PRESETS)}.",
        )

    def settings(self, shape: tuple[int, int, int], num_classes: int) -> RunConfig:
        """The run's configuration for an image set of this shape (C, H, W)."""
        network, training = self.network, self.training
        derived: dict[str, Any] = {"image_size": shape[1:]}
        if network.can_learn_variance:
            objective = self.objective
            derived["learn_sigma"] = isinstance(objective, VPObjectiveConfig) and objective.variance == "learned-range"
        if self.conditional:
            if not num_classes:
                raise DitlabError("train --conditional: the image set has no classes")
            if not network.takes_labels:
                raise DitlabError(f"train --conditional: a {network.kind} network takes no classes")
            derived["num_classes"] = num_classes
        network = replace(network, **derived)
        if self.seed and not training.seed:
            training = replace(training, seed=self.seed)
        training = replace(
            training,
            shard=training.shard or self.shard,
            checkpoint_activations=training.checkpoint_activations or self.checkpoint_activations,
        )
        config = RunConfig(
            preset=self.preset,
            data=DataConfig(n=self.n, test=self.test, seed=self.seed, skip=self.skip),
            network=network,
            objective=self.objective,
            training=training,
            sampler=self.sampler,
            guidance=self.guidance,
            evaluation=self.evaluation,
        )
        return fit_to_images(config, shape, num_classes)

    def _out(self, config: RunConfig) -> Path:
        if self.out is not None:
            return self.out
        plan = config.network.attention_plan.replace(",", "-").replace("*", "x").replace("@", "-")
        source = Path(self.data.split(":")[-1]).name or "data"
        n = ("all" if self.n is None else str(self.n)) + (f"-skip{self.skip}" if self.skip else "")
        parts = [self.preset.replace("/", "-"), source, f"n{n}", plan, f"s{self.seed}"]
        return Path("runs") / "-".join(filter(None, parts))

    def run(self, console: Console) -> dict[str, Any]:
        """Trains, and says where the run lies."""
        use_threads(self.threads)
        pick_device(self.device)  # a device that is not there is refused before a source is prepared
        images = open_images(self.data, self.size, console)
        fitted = config = self.settings(images.shape, images.num_classes)
        if self.measured_sigma and images.latents is not None:
            config = fit_to_latents(fitted, images.latents.record.overall_std)
        out = self._out(config)
        with init_distributed(self.device) as here:
            run, refusal = None, None
            if here.is_main:
                try:
                    check_batch(config.training, here)
                    run = start(out, config, images, device=here.device, command=command_line("train"))
                except DitlabError as error:
                    refusal = error
            # The others wait here: they read what the first one wrote, or end without a word where it refuses.
            if not here.raise_together(refusal):
                return {}
            if here.is_main:
                for name, (_, now) in differences(fitted, config).items():
                    console.print(f"{name} = {now:g}, the standard deviation of these latents")
            return _train(run or Run.open(out, images.path), here, console)


def _train(run: Run, here: Any, console: Console) -> dict[str, Any]:
    training = run.config.training
    finished = run.finished  # every process finds the same, for nothing is written before all have begun to train
    if not here.is_main:
        if finished:
            return {}
        flag = StopFlag()
        with stopping(flag), suppress(TrainingInterrupted):  # the first process says where to go on
            train_run(run, here, stop=flag)
        return {}
    done = run.checkpoints.steps()
    if finished:
        console.print(f"{run.path} is finished ({training.steps} steps)")
        return _result(run)
    console.print(
        f"training {run.path} on {run.record.split.train} images, {run.record.split.test} held out, on {here.device}"
        + (f", going on from step {done[-1]}" if done else "")
    )
    flag = _Watched()
    with run_lock(run.path), stopping(flag):
        try:
            train_run(run, here, reporter=_ConsoleReporter(console, training.batch_size), stop=flag)
        except TrainingInterrupted as stop:
            console.print(f"stopped and saved after step {stop.step}; the same command goes on from there")
            raise KeyboardInterrupt from None
    last = next((line for line in reversed(run.log) if "train_psnr" in line), None)
    if last is not None:
        of = "PSNR" if run.record.codec is None else "PSNR of latents"
        console.print(
            f"done: train {of} {last['train_psnr']:.2f} dB, test {of} {last['test_psnr']:.2f} dB, "
            f"gap {last['psnr_gap']:.2f} dB (quick measure; `ditlab psnr-gap {run.path}` for the full one)"
        )
    return _result(run)


class _ConsoleReporter(Reporter):
    """Prints notes, and shows training as a `TrainingBar`."""

    def __init__(self, console: Console, batch: int) -> None:
        self._console, self._batch = console, batch

    def note(self, sentence: str) -> None:
        """Prints a note."""
        noting(self._console)(sentence)

    @contextmanager
    def bar(self, title: str, total: int | None = None) -> Iterator[Bar]:
        """Shows the bar within the block."""
        with TrainingBar(self._console, title, total or 0, self._batch) as bar:
            yield lambda done, total=None, **fields: bar(done, fields.get("loss", math.nan))  # pyright: ignore


class _Watched(StopFlag):
    """A stop flag that also goes up when the program that started this one has ended."""

    @property
    def set(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether to stop."""
        return self._asked or parent_gone()

    @set.setter
    def set(self, value: bool) -> None:
        self._asked = value


def _result(run: Run) -> dict[str, Any]:
    lines = run.log
    return {"run": str(run.path), "steps": run.config.training.steps, "last": lines[-1] if lines else None}
