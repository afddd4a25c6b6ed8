"""`ditlab sample`: images from a trained denoiser."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console

from ditlab.cli.common import counting, noting, use_threads
from ditlab.cli.drawing import draw, sampler_config
from ditlab.data.atomic import atomic_folder
from ditlab.data.contact_sheet import fitting_scale, image_grid
from ditlab.diffusion.denoisers import Denoiser
from ditlab.errors import DitlabError
from ditlab.run import Run
from ditlab.training.distributed import pick_device


@dataclass(frozen=True)
class Sample:
    """Draw images from a run: a PNG grid, a folder of PNGs and samples.npz (uint8 [N, H, W, C] as arr_0).

    Image i depends on --seed and i alone, whatever the batch size. The same command again gives the same files.
    """

    run_folder: tyro.conf.Positional[Path]
    """The run's folder."""
    count: int = 64
    """How many images."""
    sampler: Literal["run", "ddpm", "ddim", "heun"] = "run"
    """The sampler; run: the one in the run's config."""
    steps: str | None = None
    """Steps of the sampler: a count, for DDPM and DDIM also ddim50 or 10,15,20; its default if not given."""
    labels: tuple[int, ...] | None = None
    """Classes to draw, one after another, for a class-conditional run; all of them in turn where not given."""
    seed: int = 0
    """Seed of the noise."""
    batch: int = 64
    """Images drawn at once."""
    step: int | None = None
    """The checkpoint; the newest where not given."""
    raw: bool = False
    """Use the raw weights instead of the averaged ones."""
    out: Path | None = None
    """The folder to write; RUN/samples/STEP-SAMPLER-SEED where not given."""
    device: str | None = None
    """cpu, cuda or cuda:N; CUDA where there is one."""
    threads: int | None = None
    """CPU threads; all cores where not given."""

    def run(self, console: Console) -> dict[str, Any]:
        """Draws and writes the images."""
        use_threads(self.threads)
        if self.count < 1 or self.batch < 1:
            raise DitlabError(f"sample: count and batch must be at least 1, found {self.count} and {self.batch}")
        run = Run.open(self.run_folder)
        denoiser, facts = run.denoiser_and_facts(
            step=self.step, ema=not self.raw, device=pick_device(self.device), say=noting(console)
        )
        config = sampler_config(run, self.sampler, self.steps)
        label = self._labels(denoiser)
        name = f"{facts.step:09d}-{config.kind}{config.steps}-seed{self.seed}" + ("-raw" if self.raw else "")
        out = self.out if self.out is not None else run.path / "samples" / name
        if out.exists() and not (out / "samples.json").is_file() and not (out.is_dir() and not any(out.iterdir())):
            raise DitlabError(f"sample --out {out}: expected a new folder or one of samples, found something else")
        with counting(console, "sampling") as progress:
            seeds = range(self.seed, self.seed + self.count)
            drawn = draw(denoiser, config, seeds, batch=self.batch, label=label, progress=progress)
        images = run.pixels(drawn)
        about = {
            "run": run.name,
            "step": facts.step,
            "ema": not self.raw,
            "sampler": {"kind": config.kind, **{k: v for k, v in vars(config).items() if k != "kind"}},
            "seed": self.seed,
            "count": self.count,
            "labels": None if label is None else label.tolist(),
        }
        try:
            write_samples(out, images, about, label)
        except OSError as error:
            reason = error.strerror or str(error)
            raise DitlabError(f"sample {out}: could not be written ({reason}); nothing was kept") from None
        console.print(f"wrote {self.count} images to {out} (grid.png, samples.npz, images/)")
        return {"out": str(out), **about}

    def _labels(self, denoiser: Denoiser) -> torch.Tensor | None:
        if self.labels is None and not denoiser.num_classes:
            return None
        if not denoiser.num_classes:
            raise DitlabError("sample --labels: the run is unconditional, it takes no labels")
        chosen = self.labels if self.labels is not None else tuple(range(denoiser.num_classes))
        for label in chosen:
            if not 0 <= label <= denoiser.num_classes:
                raise DitlabError(
                    f"sample --labels: expected classes 0..{denoiser.num_classes - 1} "
                    f"(or {denoiser.num_classes} for none), found {label}"
                )
        return torch.tensor([chosen[i % len(chosen)] for i in range(self.count)])


def write_samples(out: Path, images: np.ndarray, about: dict[str, Any], label: torch.Tensor | None) -> None:
    """Writes a grid, single PNGs, the array of the ADM evaluator and the settings; the folder appears whole.

    Samples that lie there already are replaced.
    """
    from PIL import Image

    with atomic_folder(out, replace=True) as folder:
        scale = fitting_scale(images.shape[-1])
        image_grid(images[:100], scale=scale).save(folder / "grid.png")
        (folder / "images").mkdir()
        for number, image in enumerate(images):
            pixels = image.transpose(1, 2, 0)
            Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(
                folder / "images" / f"{number:06d}.png"
            )
        arrays = {"arr_0": images.transpose(0, 2, 3, 1)}
        if label is not None:
            arrays["arr_1"] = label.numpy()
        np.savez(folder / "samples.npz", **arrays)  # pyright: ignore[reportArgumentType]
        (folder / "samples.json").write_text(json.dumps(about, indent=1) + "\n")
