"""`ditlab sample`: images from a trained denoiser."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console

from ditlab.cli.common import counting, noting, use_threads
from ditlab.cli.drawing import GuidanceFlags, SamplerName, guided_as, sampler_config, sampler_name
from ditlab.cli.sample_job import Job, about_guidance, about_sampler, fingerprint
from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.guidance import GuidanceConfig
from ditlab.diffusion.sampler_configs import Spacing
from ditlab.diffusion.samplers import SamplerConfig, evaluations
from ditlab.errors import DitlabError
from ditlab.models.opening import open_model
from ditlab.training.distributed import DistributedContext, init_distributed

MOST = 10_000_000
"""Images of one command, at most: a typing error in --seeds should not fill the memory."""
SWEEP_COLUMNS = 16
"""Images of one row of a guidance sweep, at most."""


@dataclass(frozen=True)
class Sample:
    """Draw images from a run: a PNG grid, a folder of PNGs and samples.npz (uint8 [N, H, W, C] as arr_0).

    Each image depends on its own seed and class alone, whatever the batch and the number of processes. A command that
    was interrupted or killed goes on where it was when it is given again; one that is finished says so.
    Several processes: torchrun --nproc-per-node 2 -m ditlab sample ... share the batches among them.
    """

    reference: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's folder, or another model that ditlab can open."""
    seeds: str | None = None
    """Seeds of the images: numbers and ranges such as 0-9,20,30-39; 0-63 where not given (0-7 for a sweep)."""
    sampler: SamplerName = "run"
    """The sampler; run: the one in the run's config."""
    steps: str | None = None
    """Steps of the sampler: a count, for DDPM and DDIM also ddim50 or 10,15,20; its default if not given."""
    levels: Spacing | None = None
    """How euler, heun and dpm++2m space their levels; grid, the denoiser's own steps, where not given."""
    labels: tuple[int, ...] | None = None
    """Classes to draw: the image of seed S has the class in place S, counted round and round; all of them in turn
    where not given."""
    guidance: GuidanceFlags = field(default_factory=GuidanceFlags)
    """Classifier-free guidance of a class-conditional run."""
    guidance_sweep: tuple[float, ...] = ()
    """Guidance scales to compare: a picture with a row for each and a column for each seed, instead of the grid."""
    strip: int = 0
    """Also draw the path from noise to image of so many of the first images."""
    images: bool = True
    """Also write each image as a PNG of its own, named by its seed."""
    batch: int = 64
    """Images drawn at once; a command of another size goes on where one was interrupted."""
    step: int | None = None
    """The checkpoint; the newest where not given."""
    raw: bool = False
    """Use the raw weights instead of the averaged ones."""
    out: Path | None = None
    """The folder to write; RUN/samples/STEP-SAMPLER-SEEDS... where not given."""
    codec: str | None = None
    """Where the autoencoder of a run on latents lies now, if it was moved."""
    device: str | None = None
    """cpu, cuda or cuda:N; CUDA where there is one."""
    threads: int | None = None
    """CPU threads; all cores where not given."""

    def run(self, console: Console) -> dict[str, Any]:
        """Draws and writes the images."""
        use_threads(self.threads)
        with init_distributed(self.device) as here, ExitStack() as held:
            job, refusal = None, None
            if here.is_main:
                try:
                    job = self._job(here, console)
                    if job.finished() is None:
                        held.enter_context(job.parts.taken())
                except DitlabError as error:
                    refusal = error
            # The others wait here: they go the same way, or end without a word where the first one refuses.
            if not here.raise_together(refusal):
                return {}
            job = job or self._job(here, Console(quiet=True))
            return self._work(job, here, console)

    def _work(self, job: Job, here: DistributedContext, console: Console) -> dict[str, Any]:
        if here.is_main:
            for folder, count in job.parts.others().items():
                console.print(f"note: {count} unfinished images with other settings lie in {folder}", markup=False)
        found = job.finished()
        if found is not None:
            if here.is_main:
                console.print(f"{job.out} is finished ({found['count']} images)", markup=False)
            return {"out": str(job.out), **found} if here.is_main else {}
        if not job.parts.complete:
            here.wait()
            missing = job.missing()
            kept = len(job.parts.done())
            here.wait()  # nobody begins before all have seen what is missing
            if here.is_main and kept:
                console.print(f"going on: {kept} of {kept + len(missing)} batches are there already")
            mine = missing[here.rank :: here.world]
            title = "sampling" + (f", process 1 of {here.world}" if here.world > 1 else "")
            with counting(console if here.is_main else Console(quiet=True), title) as progress:
                job.draw(mine, progress)
            here.wait()
        if not here.is_main:
            return {}
        found = job.finish()
        files = "sweep.png" if job.sweep else "grid.png, samples.npz"
        files += ", strip.png" if job.strip else ""
        files += ", images/" if job.pngs else ""
        console.print(f"wrote {found['count']} images to {job.out} ({files})", markup=False)
        console.print(
            f"{found['nfe']} network calls an image{_more(found['nfe'], found['passes'])}, "
            f"{found['seconds_per_image']:.3g} s an image"
        )
        return {"out": str(job.out), **found}

    def _job(self, here: DistributedContext, console: Console) -> Job:
        """What is to be drawn. Raises DitlabError for everything that cannot be, before any work starts."""
        if self.batch < 1:
            raise DitlabError(f"sample --batch: expected at least 1, found {self.batch}")
        seeds = parse_seeds(self.seeds if self.seeds is not None else "0-7" if self.guidance_sweep else "0-63")
        if not 0 <= self.strip <= len(seeds):
            raise DitlabError(f"sample --strip: expected 0 to {len(seeds)}, the number of images, found {self.strip}")
        self._check_sweep(len(seeds))
        run = open_model(self.reference, codec=self.codec)
        denoiser, facts = run.denoiser_and_provenance(
            step=self.step, ema=not self.raw, device=here.device, say=noting(console)
        )
        config = sampler_config(run, self.sampler, self.steps, self.levels)
        labels = self._labels(denoiser)
        own = self.guidance.over(run.guidance)
        guidances = [replace(own, scale=scale) for scale in self.guidance_sweep] or [own]
        denoisers = [guided_as(run, denoiser, guidance) for guidance in guidances]
        evaluations(config, denoiser)  # refuses steps that the sampler cannot take
        about = {
            "run": run.name,
            "step": facts.step,
            "ema": not self.raw,
            "weights": fingerprint(run, denoiser),
            "sampler": about_sampler(config),
            "guidance": about_guidance(guidances, denoiser.shape[0]),
            "guidance_sweep": list(self.guidance_sweep) or None,
            "seeds": seeds_text(seeds),
            "labels": labels,
            "strip": self.strip,
            "images": self.images,
        }
        name = self._name(facts.step, config, guidances[0], seeds_text(seeds), denoiser)
        return Job(
            run=run,
            denoisers=denoisers,
            guidances=guidances,
            config=config,
            seeds=seeds,
            labels=None if labels is None else torch.tensor([labels[seed % len(labels)] for seed in seeds]),
            batch=self.batch,
            strip=self.strip,
            pngs=self.images,
            out=self.out if self.out is not None else run.path / "samples" / name,
            about=about,
        )

    def _check_sweep(self, count: int) -> None:
        scales = self.guidance_sweep
        if not scales:
            return
        if len(scales) < 2 or len(set(scales)) < len(scales):
            raise DitlabError(f"sample --guidance-sweep: expected different scales, at least 2, found {_list(scales)}")
        if self.guidance.scale is not None:
            raise DitlabError("sample: --guidance-sweep gives the scales; expected no --guidance.scale besides")
        if self.strip:
            raise DitlabError("sample: expected --strip or --guidance-sweep, found both")
        if count > SWEEP_COLUMNS:
            raise DitlabError(f"sample --guidance-sweep: expected at most {SWEEP_COLUMNS} seeds, found {count}")

    def _labels(self, denoiser: Denoiser) -> list[int] | None:
        """The classes to go through, or None."""
        if not denoiser.num_classes:
            if self.labels is not None:
                raise DitlabError("sample --labels: the run is unconditional, it takes no labels")
            return None
        if not self.labels:
            return list(range(denoiser.num_classes))
        for label in self.labels:
            last = denoiser.num_classes - 1
            if not 0 <= label <= last + denoiser.null_class:
                none = f" (or {last + 1} for none)" if denoiser.null_class else ""
                raise DitlabError(f"sample --labels: expected classes 0..{last}{none}, found {label}")
        return list(self.labels)

    def _name(
        self, step: int | None, config: SamplerConfig, guidance: GuidanceConfig, seeds: str, denoiser: Denoiser
    ) -> str:
        """The folder's name where --out is not given: what tells samples apart."""
        words = ["weights" if step is None else f"{step:09d}", f"{sampler_name(config)}{config.steps}", f"seeds{seeds}"]
        if self.levels is not None:
            words[1] += f"-{self.levels}"
        if self.labels:
            words.append(f"labels{_list(self.labels)}")
        if self.guidance_sweep:
            words.append(f"sweep{_list(self.guidance_sweep)}")
        elif guidance.on:
            words.append(f"w{guidance.scale:g}")
        if self.guidance_sweep or guidance.on:
            if guidance.schedule != "constant":
                words.append(f"{guidance.schedule}{guidance.power:g}")
            if guidance.interval is not None:
                words.append("from{:g}to{:g}".format(*guidance.interval))
            if guidance.channels is not None:
                words.append(f"channels{guidance.guided_channels(denoiser.shape[0])}")
        if self.raw:
            words.append("raw")
        return "-".join(word if len(word) <= 60 else word[:57] + "..." for word in words)


def _list(values: tuple[float | int, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _more(nfe: int, passes: int | list[int]) -> str:
    """What guidance adds to the calls, in words."""
    if isinstance(passes, list):
        return f" (each image through it {min(passes)} to {max(passes)} times)" if max(passes) > nfe else ""
    return f" (with guidance each image goes through it {passes} times)" if passes > nfe else ""
