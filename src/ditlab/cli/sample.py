"""`ditlab sample`: images from a trained denoiser."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from ditlab.cli.console import Output
from ditlab.cli.options import ComputeFlags, ComputeOptions, keywords
from ditlab.sampling.options import SampleConfig


@dataclass(frozen=True)
class Sample:
    """Draw images from a model: a PNG grid, a folder of PNGs and samples.npz (uint8 [N, H, W, C] as arr_0).

    Each image depends on its own seed and class alone, whatever the batch and the number of processes. The same command
    resumes an interrupted job, and leaves a finished folder alone.
    Several processes: torchrun --nproc-per-node 2 -m ditlab sample ... share the batches.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run's folder, or any other model that ditlab can open."""
    settings: Annotated[SampleConfig, tyro.conf.arg(name="")] = field(default_factory=SampleConfig)
    """Which images are drawn, and how."""
    out: Path | None = None
    """The folder to write; MODEL/samples/STEP-SAMPLER-SEEDS... if not given."""
    codec: str | None = None
    """Where the autoencoder of a model of latents is now, if it was moved."""
    compute: ComputeOptions = field(default_factory=ComputeFlags)
    """Where it computes."""

    def run(self, output: Output) -> dict[str, Any]:
        """Draws and writes the images."""
        from ditlab import api

        flags = keywords(self)
        flags["out"] = True if self.out is None else self.out
        samples = api.sample(**flags, reporter=output.reporter)
        if samples is None or int(os.environ.get("RANK", "0")):
            return {}
        settings = samples.settings
        if not samples.drawn:
            output.line(f"{samples.folder} is finished ({settings['count']} images)")
        else:
            output.line(f"wrote {settings['count']} images to {samples.folder} ({_files(settings)})")
            output.line(
                f"{settings['nfe']} network calls per image{_passes(settings)}, {settings['seconds_per_image']:.3g} s "
                "per image"
            )
        return {"out": str(samples.folder), **settings}


def _files(settings: Mapping[str, Any]) -> str:
    files = ["sweep.png"] if settings["guidance_sweep"] else ["grid.png", "samples.npz"]
    files += ["strip.png"] if settings["strip"] else []
    return ", ".join([*files, "images/"] if settings["images"] else files)


def _passes(settings: Mapping[str, Any]) -> str:
    """Returns what guidance adds to the calls, in words."""
    nfe, passes = settings["nfe"], settings["passes"]
    if isinstance(passes, list):
        return f" (each image passes through it {min(passes)} to {max(passes)} times)" if max(passes) > nfe else ""
    return f" (with guidance each image passes through it {passes} times)" if passes > nfe else ""
