"""`ditlab train`: one denoiser on N images."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from ditlab.cli.console import Output, command_line, stop_on_signal
from ditlab.cli.options import ComputeFlags, ComputeOptions, keywords
from ditlab.cli.parsing import parse_words
from ditlab.config import DataConfig, EvaluationConfig, Network, ObjectiveSettings, RunConfig, Sampler
from ditlab.diffusion.guidance_config import GuidanceConfig
from ditlab.diffusion.objective_configs import VPObjectiveConfig
from ditlab.diffusion.sampler_configs import DDPMConfig
from ditlab.errors import DitlabError
from ditlab.networks.dit_config import DiTConfig
from ditlab.presets import PRESETS, preset
from ditlab.training.config import TrainingConfig


@dataclass(frozen=True)
class Train:
    """Train a denoiser on N images of a set; the same command resumes an interrupted run.

    Several processes: torchrun --nproc-per-node 2 -m ditlab train ... trains the same run, the batch shared among them.
    There the number of images is -n, for torchrun itself refuses --n as one of its own.
    """

    preset: Annotated[str, tyro.conf.Positional]
    """The recipe to start from; every other flag changes it."""
    data: str = ""
    """An image set's folder, or a source (photos, digits, folder:PATH, hub:ID, array:PATH, mosaic:PATH)."""
    n: Annotated[int | None, tyro.conf.arg(aliases=["-n"])] = None
    """Number of training images; all but the test images if not given."""
    test: int = 300
    """Number of test images held out."""
    seed: int = 0
    """Seed of the split, of the initial weights and of training."""
    skip: int = 0
    """Leave out so many training images at the head of the seeded order and take the next N: two runs of one --seed,
    with --skip 0 and --skip N, have disjoint training sets (two-subsets)."""
    size: int = 32
    """Side of the images in pixels, when --data is a source."""
    out: Path | None = None
    """The run's folder; runs/PRESET-DATA-nN-ATTENTION-sSEED if not given."""
    conditional: bool = False
    """Give the network the image set's class labels."""
    shard: bool = False
    """The same as --training.shard: each process keeps one part of the network and of its optimizer (torchrun)."""
    checkpoint_activations: bool = False
    """The same as --training.checkpoint-activations: activations are computed a second time instead of kept."""
    minutes: float | None = None
    """Save and stop after so many minutes; the same command resumes."""
    compute: ComputeOptions = field(default_factory=ComputeFlags)
    """Where it computes."""
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
    """Whether sigma_data of an EDM objective follows a set of latents; not if the user gave it."""

    @staticmethod
    def parse(words: list[str]) -> Train:
        """Returns the flags of a command line, on top of the preset that it names."""
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
        same = ("preset", "objective", "training", "sampler", "guidance", "evaluation")
        chosen = any(re.match(r"--objective\.sigma[-_]data(=|$)", word) for word in words)
        default = Train(network=network, measured_sigma=not chosen, **{part: getattr(recipe, part) for part in same})
        return parse_words(
            Train,
            "train",
            words,
            description=f"{Train.__doc__}\n\nPresets: {', '.join(PRESETS)}.",
            default=default,
            config=(tyro.conf.AvoidSubcommands,),
        )

    @property
    def config(self) -> RunConfig:
        """All settings, not yet fitted to the images."""
        from ditlab.models.configuring import with_variance

        training = replace(
            self.training,
            shard=self.training.shard or self.shard,
            checkpoint_activations=self.training.checkpoint_activations or self.checkpoint_activations,
        )
        return RunConfig(
            preset=self.preset,
            data=DataConfig(n=self.n, test=self.test, seed=self.seed, skip=self.skip),
            network=with_variance(self.network, self.objective),
            objective=self.objective,
            training=training,
            sampler=self.sampler,
            guidance=self.guidance,
            evaluation=self.evaluation,
        )

    def run(self, output: Output) -> dict[str, Any]:
        """Trains, and says where the run is."""
        from ditlab.api.making import train_config

        with stop_on_signal() as stop:
            run = train_config(
                self.config,
                self.data,
                size=self.size,
                conditional=self.conditional,
                keep_sigma_data=not self.measured_sigma,
                out=self.out,
                command=command_line("train"),
                minutes=self.minutes,
                stop=stop,
                reporter=output.reporter,
                **keywords(self.compute),
            )
        if run is None or not output.main:
            return {}
        lines = run.log
        measured = next((line for line in reversed(lines) if "train_psnr" in line), None)
        if measured is not None:
            unit = "PSNR" if run.record.codec is None else "PSNR of latents"
            output.line(
                f"done: train {unit} {measured['train_psnr']:.2f} dB, test {unit} {measured['test_psnr']:.2f} dB, gap "
                f"{measured['psnr_gap']:.2f} dB (quick measure; `ditlab psnr-gap {run.path}` for the full one)"
            )
        return {"run": str(run.path), "steps": run.config.training.steps, "last": lines[-1] if lines else None}
