"""Attention in a report: how local each run's is (measured, or what `ditlab attention` left), and token pickers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console

from ditlab.analyses.attention.comparison import LocalityComparison, compare_locality
from ditlab.analyses.attention.maps import (
    AttentionConfig,
    AttentionMaps,
    LocalityResult,
    alike_layers,
    attention_layers,
    attention_maps,
    measure_attention,
)
from ditlab.analyses.psnr_gap.result import PSNRResult
from ditlab.cli.common import counting, noting
from ditlab.diffusion.denoisers import Denoiser
from ditlab.metrics.denoising_errors import level_noise
from ditlab.models.model import Model
from ditlab.nn.attention import attention_modules
from ditlab.pages.token_picker import AttentionPicker, PickerRun, frame_size, pack_run

PICKERS = 6
"""At most so many pickers on a page, the first numbers of training images first."""
ROWS = 4
"""At most so many runs in the figure of attention maps."""


@dataclass(frozen=True, eq=False)
class Look:
    """The attention of one run."""

    run: Model
    label: str
    denoiser: Denoiser
    result: LocalityResult
    name: str = ""
    """The run's name where several runs have folders of one name; else the folder's."""

    @property
    def key(self) -> str:
        """The name under which the run's samples are found."""
        return self.name or self.run.name

    @property
    def kind(self) -> tuple[Any, ...]:
        """Runs of one kind share a picker: one N and shuffle, one grid, the same noise levels."""
        facts, result = self.result.about, self.result
        return (facts.n, facts.seed, result.grid, tuple(f"{sigma:.5g}" for sigma in result.levels))


def holds(run: Model, found: Any, settings: Any) -> bool:
    """Whether a kept result is of the run's newest weights and split, and was measured with these settings, on held-out
    images where there is a choice."""
    step, about = run.newest_step, found.about
    fresh = step is not None and about.step == step and about.split_hash == run.split_record.hash and about.ema
    held_out = about.settings.get("images_from", "test") == "test"
    return bool(fresh) and held_out and replace(found.config, batch_size=1) == replace(settings, batch_size=1)


Result = TypeVar("Result", PSNRResult, LocalityResult)
_OWN = "report-"
"""How the names of results start that a report measured because what lay there was measured otherwise."""


def recall(run: Model, name: str, kind: type[Result], settings: Any) -> Result | None:
    """The result that was kept in a run's folder under this name, or by a report, if it `holds`; else None."""
    for path in (run.path / "analysis" / f"{begins}{name}.json" for begins in ("", _OWN)):
        if path.is_file():
            found = kind.load(path)
            if holds(run, found, settings):
                return found
    return None


def keep(run: Model, name: str, result: PSNRResult | LocalityResult) -> None:
    """Saves what a report has measured, under a name of its own where a result lies already: that is its maker's."""
    folder = run.path / "analysis"
    result.save(folder, f"{_OWN}{name}" if (folder / f"{name}.json").exists() else name)


def look_at(
    runs: Sequence[Model],
    labels: Sequence[str],
    settings: AttentionConfig,
    console: Console,
    *,
    names: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
) -> list[Look]:
    """The locality of every run that has attention, on held-out images; measurements are kept in its folder.

    Args:
        runs: the runs.
        labels: the kind of each.
        settings: what is measured.
        console: where progress is shown.
        names: a name for each run, where those of the folders are not enough to tell them apart.
        device: where it is measured.
    """
    found = []
    for run, label, name in zip(runs, labels, names or [run.name for run in runs], strict=True):
        denoiser, facts = run.denoiser_and_provenance(label=label, device=device, say=noting(console))
        if denoiser.module is None or not attention_modules(denoiser.module):
            continue
        chosen = settings if settings.layers else replace(settings, layers=alike_layers(attention_layers(denoiser)))
        result = recall(run, "attention", LocalityResult, chosen)
        if result is None:
            images, classes = run.pictures("test", settings.images)
            with counting(console, f"attention of {run.name}") as progress:
                result = measure_attention(denoiser, images, chosen, labels=classes, about=facts, progress=progress)
            keep(run, "attention", result)
        # Under the name and label that this report gives the run.
        found.append(Look(run, label, denoiser, replace(result, about=replace(facts, name=name)), name))
    return found


def pickers(
    looks: Sequence[Look],
    samples: Mapping[str, torch.Tensor],
    budget: int,
    *,
    hide_real_images: bool,
    drawn_by: str | None = None,
    classes: Mapping[str, torch.Tensor] | None = None,
) -> list[AttentionPicker]:
    """A token picker for each N: one image, and the attention of each kind of run on it, of one shuffle.

    Args:
        looks: the runs with attention.
        samples: run's name -> samples that may be shown, float32 [N, C, H, W].
        budget: bytes of all pickers together; those that find no room are left out, and the last one says so.
        hide_real_images: take a sample of the first run instead of a held-out image; without one there is no picker.
        drawn_by: what drew the samples, in words, if not the runs that they stand for.
        classes: run's name -> the classes that its samples were drawn for, int64 [N], of conditional runs.
    """
    chosen = []
    for members in _groups(looks)[:PICKERS]:
        image = _image(members[0], samples, classes or {}, hide_real_images, drawn_by)
        if image is not None:
            chosen.append((members, image))
    frames = [frame_size(m[0].denoiser.shape[1:], len(m[0].result.levels)) for m, _ in chosen]
    # Images that leave no room for maps are of no use.
    while sum(frames) > budget / 2:
        frames.pop()
    made, room = [], budget - sum(frames)
    for number, (members, image) in enumerate(chosen[: len(frames)]):
        runs, left, others = [], room, sum(len(m) for m, _ in chosen[number : len(frames)])
        for look in members:
            # Each gets its share of what is left: local attention packs small and leaves more to the others.
            runs.append(_pack(look, image, max(0, left // others)))
            left, others = left - runs[-1].size, others - 1
        if left >= 0:
            made.append(_picker(members[0], image, runs))
            room = left
    missing = len(chosen) - len(made)
    if made and missing:
        more = f"{missing} more picker{'s' if missing > 1 else ''} found no room on the page."
        made[-1] = replace(made[-1], notes=[*made[-1].notes, more])
    return made


@dataclass(frozen=True, eq=False)
class MapRows:
    """What the figure of attention maps shows."""

    maps: list[tuple[str, AttentionMaps]]
    layers: list[int]
    picture: np.ndarray | None
    """The image, uint8 [C, H, W], where all rows have the same."""


def map_rows(
    looks: Sequence[Look],
    samples: Mapping[str, torch.Tensor],
    *,
    hide_real_images: bool,
    classes: Mapping[str, torch.Tensor] | None = None,
) -> MapRows | None:
    """The maps of at most `ROWS` runs on one grid, at the middle noise level, on the image of their picker."""
    from ditlab.analyses.attention.map_figures import layers_shown

    groups = _groups(looks)
    alike = [members for members in groups if members[0].kind[2:] == groups[0][0].kind[2:]]
    rows: list[tuple[Look, _Image]] = []
    for members in alike:
        found = _image(members[0], samples, classes or {}, hide_real_images)
        if found is not None:
            rows += [(look, found) for look in members]
    rows = rows[:ROWS]
    if not rows:
        return None
    # Maps are large, so those that are not shown are not made.
    numbers = [set(look.result.layers) for look, _ in rows]
    layers = layers_shown(sorted(set.intersection(*numbers)))
    maps, pictures = [], []
    for look, image in rows:
        result = look.result
        sigma, noise_seed = result.levels[len(result.levels) // 2], result.config.noise_seed
        label = look.label if len(alike) == 1 else f"{look.label}, N = {result.about.n}"
        seen = attention_maps(
            look.denoiser, image.pixels, sigma, layers=layers, noise_seed=noise_seed, label=image.label(look)
        )
        maps.append((label, seen))
        pictures.append(look.run.pixels(image.pixels)[0])
    same = all(np.array_equal(picture, pictures[0]) for picture in pictures)
    return MapRows(maps, layers, pictures[0] if same else None)


def localities(looks: Sequence[Look]) -> list[LocalityComparison]:
    """Comparisons of runs that were measured alike: one grid, the same layers and noise levels."""
    groups: dict[tuple[Any, ...], list[LocalityResult]] = {}
    for look in looks:
        groups.setdefault((*look.kind[2:], look.result.layers, look.result.images), []).append(look.result)
    return [compare_locality(results) for results in groups.values()]


def _groups(looks: Sequence[Look]) -> list[list[Look]]:
    """For each N, grid and set of noise levels: one run of each label, of the shuffle that comes first."""
    groups: dict[tuple[Any, ...], dict[str, Look]] = {}
    for look in looks:
        n, seed, *rest = look.kind
        members = groups.setdefault((n, *rest), {})
        if all(other.result.about.seed == seed for other in members.values()):
            members.setdefault(look.label, look)
    return [list(members.values()) for members in groups.values()]


@dataclass(frozen=True, eq=False)
class _Image:
    """The image that runs are looked at on."""

    pixels: torch.Tensor
    """float32 [1, C, H, W]."""
    words: str
    """What it is."""
    drawn_for: torch.Tensor | None
    """The class that a sample was drawn for, int64 [1]; None for none, and for a held-out image."""
    held_out: bool

    def label(self, look: Look) -> torch.Tensor | None:
        """The class that a run is told; None where it takes none, or the image has none."""
        if not look.denoiser.num_classes:
            return None
        return look.run.pictures("test", 1)[1] if self.held_out else self.drawn_for


def _image(
    look: Look,
    samples: Mapping[str, torch.Tensor],
    classes: Mapping[str, torch.Tensor],
    hide: bool,
    drawn_by: str | None = None,
) -> _Image | None:
    """The image to look at: the first held-out one, or where real ones are hidden the first sample, if there is one."""
    if not hide:
        return _Image(look.run.pictures("test", 1)[0], "the first held-out image", None, held_out=True)
    if not len(samples.get(look.key, ())):
        return None
    pixels = samples[look.key][:1]
    drawn_for = classes[look.key][:1] if look.key in classes else None
    return _Image(pixels, f"a sample drawn by {drawn_by or look.key}", drawn_for, held_out=False)


def _picker(look: Look, shown: _Image, runs: Sequence[PickerRun]) -> AttentionPicker:
    """A picker of packed runs; `look` is the first of them."""
    result, facts, image = look.result, look.result.about, shown.pixels
    noisy = []
    for sigma in result.levels:
        noise = level_noise(result.config.noise_seed, sigma, [0], [0], look.denoiser.shape)
        seen = float(look.denoiser.scale(sigma)) * (image + sigma * noise)
        noisy.append(_picture(look, seen))
    steps = result.timesteps
    names = [f"σ = {s:.2f}" + ("" if steps is None else f" (t = {steps[i]})") for i, s in enumerate(result.levels)]
    title = shown.words if facts.n is None else f"N = {facts.n}, shuffle {facts.seed}: {shown.words}"
    return AttentionPicker(title, _picture(look, image), noisy, names, result.grid, runs)


def _picture(look: Look, image: torch.Tensor) -> np.ndarray:
    return look.run.pixels(image)[0].transpose(1, 2, 0)


def _pack(look: Look, image: _Image, budget: int) -> PickerRun:
    result, label = look.result, image.label(look)

    @lru_cache(maxsize=1)  # the maps of one level at a time
    def at(level: int) -> AttentionMaps:
        sigma, noise_seed = result.levels[level], result.config.noise_seed
        layers = result.layers
        return attention_maps(look.denoiser, image.pixels, sigma, layers=layers, noise_seed=noise_seed, label=label)

    def maps(level: int, layer: int) -> np.ndarray:
        return at(level).maps[layer][0].numpy()

    patterns = dict(zip(result.layers, result.patterns, strict=True))
    return pack_run(look.label, patterns, result.grid, len(result.levels), maps, budget)
