"""`ditlab two-subsets`: do two runs that share no training image draw the same images from the same noise?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from ditlab.analyses.two_subsets.measure import TwoSubsetsResult, check_disjoint, check_facts, compare_subsets
from ditlab.cli.common import counting, noting, use_threads
from ditlab.cli.copies import training_images
from ditlab.cli.drawing import SamplerName, draw, guided_as, sampler_config
from ditlab.cli.left import closest_pictures, without_copies
from ditlab.cli.measuring import open_runs
from ditlab.cli.sample import parse_seeds, seeds_text
from ditlab.cli.sample_job import about_sampler
from ditlab.config import differing_settings
from ditlab.diffusion.samplers import evaluations
from ditlab.errors import DitlabError
from ditlab.models.model import Model
from ditlab.models.run import Run
from ditlab.training.distributed import pick_device

CONTROLS = 1000
"""Training images of the first run that are looked for among those of the second, at most."""

_RECIPE = ("batch_size", "lr", "lr_halve_every", "lr_anneal", "betas", "weight_decay", "ema", "flip", "precision")
"""Settings of training that change what a network becomes; where they differ, the images are not all that does."""


@dataclass(frozen=True)
class TwoSubsets:
    """Compare two runs that were trained on disjoint sets: what both draw from equal noise, and how near each comes to
    its training images (Kadkhodaie et al. 2024).

    Train the second run with the first one's flags and --skip N. Writes two-subsets.json and .npz and the figures into
    the first run's analysis folder, or into --out.
    """

    first: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_A")]
    """A run's folder."""
    second: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_B")]
    """The other run's."""
    seeds: str = "0-63"
    """Seeds of the samples, the same for both: numbers and ranges such as 0-9,20. An image depends on its own alone."""
    sampler: SamplerName = "ddim"
    """The sampler; run: the one in the first run's config. Fresh noise of a step is the same for both, too."""
    sampler_steps: str | None = None
    """Its steps; its default where not given."""
    keep_mean: bool = False
    """Compare images with their means; Kadkhodaie et al. take each image's mean off first."""
    hide_training_images: bool = False
    """Leave out pictures of training images, and of samples that are nearly one (for sets whose terms forbid passing
    them on)."""
    batch: int = 64
    """Images drawn at once."""
    raw: bool = False
    """Use the raw weights instead of the averaged ones."""
    out: Path | None = None
    """Where everything goes; the first run's analysis folder where not given."""
    data: str | None = None
    """Where the image set lies now, if it was moved."""
    codec: str | None = None
    """Where the autoencoder of runs on latents lies now, if it was moved."""
    device: str | None = None
    """cpu, cuda or cuda:N; CUDA where there is one."""
    threads: int | None = None
    """CPU threads; all cores where not given."""

    def run(self, console: Console) -> dict[str, Any]:
        """Checks, draws, compares, writes, and prints a table."""
        use_threads(self.threads)
        device, seeds = pick_device(self.device), parse_seeds(self.seeds)
        if self.batch < 1:
            raise DitlabError(f"two-subsets --batch: expected at least 1, found {self.batch}")
        runs = open_runs([self.first, self.second], self.data, console, results=self.out, codec=self.codec)
        one, two = (_a_run(run) for run in runs)
        _check(one, two)
        config = sampler_config(one, self.sampler, self.sampler_steps)
        opened = [
            run.denoiser_and_provenance(ema=not self.raw, device=device, say=noting(console)) for run in (one, two)
        ]
        (first, about), (second, about_second) = opened
        for denoiser in (first, second):
            evaluations(config, denoiser)  # refuses steps that the sampler cannot take
        for name, (mine, theirs) in differing_settings(one.settings, two.settings).items():
            if name.removeprefix("training.") in _RECIPE:
                console.print(f"note: {name} is {mine} in {one.name} and {theirs} in {two.name}", markup=False)
        if about.step != about_second.step:
            console.print(f"note: {one.name} made {about.step} steps, {two.name} {about_second.step}", markup=False)
        classes = first.num_classes
        label = torch.tensor([seed % classes for seed in seeds]) if classes else None
        samples = []
        for run, denoiser in ((one, first), (two, second)):
            with counting(console, f"samples of {run.name}") as progress:
                sampled = guided_as(run, denoiser, one.guidance)
                drawn = draw(sampled, config, seeds, batch=self.batch, label=label, progress=progress)
            samples.append(run.pixels(drawn))
        result = compare_subsets(
            (about, about_second),
            (samples[0], samples[1]),
            (lambda: training_images(one, one.mirrored), lambda: training_images(two, two.mirrored)),
            one.decoded_at(one.split.train[:CONTROLS]),
            seeds=seeds,
            mean_removed=not self.keep_mean,
            settings={"sampler": about_sampler(config), "seeds": seeds_text(seeds), "batch": self.batch},
        )
        out = self.out if self.out is not None else one.path / "analysis"
        files = [result.save(out), *self._draw(one, two, result, out)]
        console.print(_table(result))
        for line in result.sentences():
            console.print(line, markup=False)
        console.print(f"wrote {', '.join(str(f) for f in files)}", markup=False)
        return {**result.to_json(), "files": [str(f) for f in files]}

    def _draw(self, one: Run, two: Run, result: TwoSubsetsResult, out: Path) -> Iterator[Path]:
        from ditlab.analyses.two_subsets.figures import two_subsets_histograms, two_subsets_pairs
        from ditlab.pages.theme import save

        hide = self.hide_training_images
        nearest = None if hide else closest_pictures(one, two, result)
        yield save(two_subsets_histograms(result), out / "two-subsets.png")
        yield save(
            two_subsets_pairs(without_copies(result) if hide else result, nearest), out / "two-subsets-pairs.png"
        )


def _a_run(run: Model) -> Run:
    if not isinstance(run, Run):
        raise DitlabError(
            f"two-subsets: nobody knows which images the model {run.name} was trained on; expected a run's folder"
        )
    return run


def _check(one: Run, two: Run) -> None:
    """Raises DitlabError where the two runs differ in more than their training images."""
    check_facts(one.facts(None), two.facts(None))
    found = differing_settings(one.settings, two.settings)
    # The kind of a thing first: what belongs to one kind alone says little.
    for name, (mine, theirs) in sorted(found.items(), key=lambda item: not item[0].endswith(".kind")):
        if name.startswith(("network.", "objective.", "codec")):
            raise DitlabError(
                f"two-subsets: expected runs that differ in their training images alone, found {name} = {mine} in "
                f"{one.name} and {theirs} in {two.name}"
            )
    check_disjoint(one.facts(None), two.facts(None), (one.split.train, two.split.train))


def _table(result: TwoSubsetsResult) -> Table:
    table = Table(
        title=f"Cosine of images{' about their means' if result.mean_removed else ''}, N = {result.about[0].n}"
    )
    for name in ("between", "mean", "median", "5 %", "95 %"):
        table.add_column(name, justify="left" if name == "between" else "right")
    rows = (
        ("samples from equal noise", result.pair),
        *(
            (f"samples of {a.name} and its training set", n.cosine)
            for a, n in zip(result.about, result.nearest, strict=True)
        ),
        ("control: one training set and the other", result.control),
    )
    for name, values in rows:
        numbers = (values.mean(), np.median(values), *np.quantile(values, (0.05, 0.95)))
        table.add_row(name, *(f"{number:.3f}" for number in numbers))
    return table
