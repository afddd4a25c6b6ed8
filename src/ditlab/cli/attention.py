"""`ditlab attention`: where a run's attention looks, as maps and as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ditlab.analyses.attention.comparison import LocalityComparison, compare_locality, same_levels
from ditlab.analyses.attention.maps import (
    AttentionConfig,
    AttentionLayer,
    AttentionMaps,
    attention_layers,
    attention_maps,
    check_heads,
    check_layers,
    check_token,
    measure_attention,
    noise_levels_of,
)
from ditlab.cli.common import counting, noting, use_threads
from ditlab.cli.drawing import draw, guided_as, quick_sampler
from ditlab.cli.measuring import chosen_labels, open_runs
from ditlab.diffusion.denoisers import Denoiser
from ditlab.errors import DitlabError
from ditlab.files import write_json
from ditlab.models.model import Model
from ditlab.models.opening import ExternalConfig
from ditlab.provenance import Provenance, check_groups
from ditlab.training.distributed import pick_device

Source = Literal["test", "train", "samples"]
Given = tuple[Tensor, Tensor | None]
"""Images [B, C, H, W] in [-1, 1] that a run is shown, and their labels."""


@dataclass(frozen=True)
class Attention:
    """Draw the attention maps of runs and measure how local they are (An et al., Figs. 4 and 5).

    Writes attention.json (distance, mass by radius, entropy and what maps share, by noise level, layer and head) and
    .npz into each run's analysis folder, and figures of all runs together into --out. Layers and heads count from 1,
    tokens from 0. Runs that were held back different test images are refused.
    """

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Runs' folders, or other models: a converted model's folder, a published checkpoint, diffusers:PATH_OR_ID,
    hub:ID."""
    labels: tuple[str, ...] = ()
    """Names of the kinds of runs, one a run, in their order; found from the settings that differ where not given."""
    settings: Annotated[AttentionConfig, tyro.conf.arg(name="")] = field(default_factory=AttentionConfig)
    """What is looked at."""
    heads: tuple[int, ...] = ()
    """Heads that the figures show one by one, from 1; the mean over heads where not given. All are measured."""
    token: str | None = None
    """ROW,COLUMN of the token whose attention the figures show, from 0; the middle of the grid where not given."""
    images_from: Source = "test"
    """Which images: held-out ones, training images, or samples that each run draws from equal noise."""
    image: int = 0
    """Which of the images the figures show, from 0."""
    step: int | None = None
    """The checkpoint; the newest of each run where not given. (--steps are noise levels.)"""
    raw: bool = False
    """Use the raw weights instead of the averaged ones."""
    out: Path | None = None
    """Where figures and the comparison go; the first run's analysis folder where not given. Also where the results of
    models that are not runs go, each under its name; foreign/ in the current folder where not given."""
    data: str | None = None
    """Where the image set lies now, if it was moved. For a model that is not a run: the set, or the source of one, to
    look at it with."""
    foreign: Annotated[ExternalConfig, tyro.conf.arg(name="")] = field(default_factory=ExternalConfig)
    """Which of its images stand for the training images of such a model."""
    codec: str | None = None
    """Where the autoencoder of runs on latents lies now, if it was moved."""
    device: str | None = None
    """cpu, cuda or cuda:N; CUDA where there is one."""
    threads: int | None = None
    """CPU threads; all cores where not given."""

    def run(self, console: Console) -> dict[str, Any]:
        """Measures, draws, writes, and prints a table."""
        use_threads(self.threads)
        device = pick_device(self.device)
        runs = open_runs(self.runs, self.data, console, config=self.foreign, results=self.out, codec=self.codec)
        labels = chosen_labels("attention", self.labels, runs)
        looked = [self._open(run, label, device, console) for run, label in zip(runs, labels, strict=True)]
        token = self._check(looked)
        results = []
        pictures = self._pictures(looked, console)
        for one, (images, classes) in zip(looked, pictures, strict=True):
            with counting(console, f"attention of {one.facts.name}") as progress:
                results.append(
                    measure_attention(
                        one.denoiser, images, self.settings, labels=classes, about=one.facts, progress=progress
                    )
                )
        comparison = compare_locality(results)
        for run, result in zip(runs, results, strict=True):
            result.save(run.path / "analysis")
        out = self.out if self.out is not None else runs[0].path / "analysis"
        files = self._save(out, comparison, _one_a_kind(looked, pictures), token)
        console.print(_table(comparison))
        console.print(
            "distance: mean attention distance in tokens; uniform: that of uniform attention over what the layers may "
            "see; 3x3: share of attention there; cosine: between maps of different images; permuted: its control"
        )
        for line in comparison.sentences()[len(comparison.groups) :]:
            console.print(line)
        for note in dict.fromkeys(f"{r.about.name}: {note}" for r in results for note in r.notes):
            console.print(f"note: {note}")
        console.print(f"wrote {', '.join(str(f) for f in files)}")
        return {**comparison.to_json(), "files": [str(f) for f in files]}

    def _open(self, run: Model, label: str, device: torch.device, console: Console) -> _Looked:
        """A run's denoiser, and the layers that are to be measured."""
        denoiser, facts = run.denoiser_and_provenance(
            step=self.step, ema=not self.raw, label=label, device=device, say=noting(console)
        )
        facts = replace(facts, settings={**facts.settings, "images_from": self.images_from})
        try:
            known = attention_layers(denoiser)
            layers = check_layers(self.settings.layers, known)
            levels = noise_levels_of(denoiser, self.settings)
        except DitlabError as error:
            raise DitlabError(f"run {run.path}: {error}") from None
        return _Looked(run, denoiser, facts, known, layers, levels)

    def _check(self, looked: Sequence[_Looked]) -> tuple[int, int]:
        """The token that figures show, after checking everything that must hold for all runs before work starts."""
        check_groups([one.facts for one in looked], "attention")
        first = looked[0].layers
        for one in looked:
            if not same_levels(one.levels, looked[0].levels):
                raise DitlabError(
                    f"attention: expected runs with the same noise levels, found others in {looked[0].run.path} and "
                    f"{one.run.path}; give --levels"
                )
            check_heads(self.heads, one.layers[0].heads)
            found = [(layer.number, layer.grid) for layer in one.layers]
            if found != [(layer.number, layer.grid) for layer in first]:
                raise DitlabError(
                    f"attention: expected runs with the same layers and grid, found {_shape(first)} in "
                    f"{looked[0].run.path} and {_shape(one.layers)} in {one.run.path}; name common --layers"
                )
        if not 0 <= self.image < self.settings.images:
            raise DitlabError(
                f"attention --image: expected 0 to {self.settings.images - 1}, one of --images, found {self.image}"
            )
        grid = first[0].grid
        if self.token is None:
            return grid[0] // 2, grid[1] // 2
        parts = self.token.split(",")
        if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
            raise DitlabError(f"attention --token: expected ROW,COLUMN such as 8,8, found '{self.token}'")
        token = int(parts[0]), int(parts[1])
        check_token(token, grid)
        return token

    def _pictures(self, looked: Sequence[_Looked], console: Console) -> list[Given]:
        """The images that each run is shown, as many for each, and their labels."""
        found = [self._images(one, console) for one in looked]
        count = min(len(images) for images, _ in found)
        if count <= self.image:
            raise DitlabError(f"attention --image: expected one of the {count} images that exist, found {self.image}")
        return [(images[:count], None if labels is None else labels[:count]) for images, labels in found]

    def _images(self, one: _Looked, console: Console) -> Given:
        count = self.settings.images
        if self.images_from != "samples":
            return one.run.pictures(self.images_from, count)
        classes = one.denoiser.num_classes
        label = torch.arange(count) % classes if classes else None
        with counting(console, f"samples of {one.facts.name}") as progress:
            sampled = guided_as(one.run, one.denoiser)
            drawn = draw(sampled, quick_sampler(one.run), range(count), label=label, progress=progress)
        return drawn, label

    def _maps(self, one: _Looked, given: Given, sigma: float) -> AttentionMaps:
        """The maps of the layers that figures show, for the image that they show."""
        from ditlab.analyses.attention.map_figures import layers_shown

        images, labels = given
        numbers = [layer.number for layer in one.layers]
        return attention_maps(
            one.denoiser,
            images[self.image : self.image + 1],
            sigma,
            layers=numbers if self.settings.layers else layers_shown(numbers),
            noise_seed=self.settings.noise_seed,
            place=self.image,
            label=None if labels is None else labels[self.image : self.image + 1],
        )

    def _save(
        self,
        out: Path,
        comparison: LocalityComparison,
        rows: dict[str, tuple[_Looked, Given]],
        token: tuple[int, int],
    ) -> list[Path]:
        """Writes the comparison and the figures; returns their paths."""
        from ditlab.analyses.attention.locality_figures import locality_by_n, locality_curves
        from ditlab.analyses.attention.map_figures import attention_map_figure, patterns_figure
        from ditlab.pages.theme import save

        out.mkdir(parents=True, exist_ok=True)
        results = [result for group in comparison.groups for result in group.results]
        files = [
            write_json(out / "attention-comparison.json", comparison.to_json()),
            save(locality_curves(results), out / "attention-locality.png"),
        ]
        if len(comparison.counts) > 1:
            files.append(save(locality_by_n(results), out / "attention-locality-by-n.png"))
        shown = [images[self.image] for _, (images, _) in rows.values()]
        # Shuffles have test images of their own: a picture beside all rows must be what all of them saw.
        run = next(iter(rows.values()))[0].run
        picture = run.pixels(shown[0][None])[0] if all(torch.equal(shown[0], image) for image in shown) else None
        for sigma in comparison.first.levels:
            maps = [(name, self._maps(one, given, sigma)) for name, (one, given) in rows.items()]
            figure = attention_map_figure(maps, token=token, heads=self.heads, picture=picture)
            files.append(save(figure, out / f"attention-maps-sigma{sigma:.3g}.png"))
        plans = {tuple(layer.pattern for layer in one.known): one.known[0].grid for one, _ in rows.values()}
        # A plan that is global throughout has nothing to show.
        plans = {plan: grid for plan, grid in plans.items() if not all(p.covers(grid) for p in plan)}
        for number, (plan, grid) in enumerate(plans.items(), 1):
            name = "attention-patterns" + (f"-{number}" if len(plans) > 1 else "")
            files.append(save(patterns_figure(plan, grid), out / f"{name}.png"))
        return files


@dataclass(frozen=True)
class _Looked:
    """A run that is looked at."""

    run: Model
    denoiser: Denoiser
    facts: Provenance
    known: tuple[AttentionLayer, ...]
    layers: tuple[AttentionLayer, ...]
    """Those of `known` that are measured."""
    levels: tuple[float, ...]


def _one_a_kind(looked: Sequence[_Looked], pictures: Sequence[Given]) -> dict[str, tuple[_Looked, Given]]:
    """By name, the first run of each kind and N: further seeds are in the numbers, not in the pictures."""
    several = len({one.facts.n for one in looked}) > 1
    found: dict[str, tuple[_Looked, Given]] = {}
    for one, given in zip(looked, pictures, strict=True):
        found.setdefault(one.facts.group + (f", N = {one.facts.n}" if several else ""), (one, given))
    return found


def _shape(layers: Sequence[AttentionLayer]) -> str:
    numbers = ", ".join(str(layer.number) for layer in layers)
    return f"layers {numbers} over {layers[0].grid[0]}x{layers[0].grid[1]} tokens"


def _table(comparison: LocalityComparison) -> Table:
    first = comparison.first
    levels = ", ".join(f"{sigma:.2g}" for sigma in first.levels)
    table = Table(
        title=f"Locality of attention, means over {len(first.layers)} layers, {first.images} images and noise levels "
        f"{levels}"
    )
    columns = ("run", "N", "seeds", "distance", "uniform", "3x3", "7x7", "cosine", "permuted")
    for name in columns:
        table.add_column(name, justify="left" if name == "run" else "right")
    for group in comparison.groups:
        std = group.std("distance")
        allowed = float(group.results[0].pattern_distance.mean())
        table.add_row(
            group.label,
            "-" if group.n is None else str(group.n),
            str(len(group.results)),
            f"{group.mean('distance'):.2f}" + ("" if std is None else f" ± {std:.2f}"),
            f"{allowed:.2f}",
            f"{group.mean(1):.0%}",
            f"{group.mean(3):.0%}",
            f"{group.mean('consistency'):.2f}",
            f"{group.mean('consistency_control'):.2f}",
        )
    return table
