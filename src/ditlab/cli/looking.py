"""Attention in a report: how local each run's is (measured, or what `ditlab attention` left), and token pickers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ditlab.analysis.attention_maps import (
    AttentionConfig,
    AttentionMaps,
    LocalityResult,
    attention_layers,
    attention_maps,
    measure_attention,
)
from ditlab.analysis.denoising import level_noise
from ditlab.analysis.locality_comparison import LocalityComparison, compare_locality
from ditlab.cli.common import counting
from ditlab.data.pixels import to_float, to_uint8
from ditlab.diffusion.denoisers import Denoiser
from ditlab.nn.attention import attention_modules
from ditlab.report.picker import AttentionPicker, PickerRun, pack_run
from ditlab.run import Run

PICKERS = 6
"""At most so many pickers on a page, the first numbers of training images first."""
ROWS = 4
"""At most so many runs in the figure of attention maps."""


@dataclass(frozen=True, eq=False)
class Look:
    """The attention of one run."""

    run: Run
    label: str
    denoiser: Denoiser
    result: LocalityResult

    @property
    def kind(self) -> tuple[Any, ...]:
        """Runs of one kind share a picker: one N and shuffle, one grid, the same noise levels."""
        facts, result = self.result.about, self.result
        return (facts.n, facts.seed, result.grid, tuple(f"{sigma:.5g}" for sigma in result.levels))


def holds(run: Run, found: Any, settings: Any) -> bool:
    """Whether a kept result is of the run's newest weights and split, and was measured with these settings."""
    steps, about = run.checkpoints.steps(), found.about
    fresh = bool(steps) and about.step == steps[-1] and about.split_hash == run.record.split.hash and about.ema
    return bool(fresh) and replace(found.config, batch_size=1) == replace(settings, batch_size=1)


def look_at(
    runs: Sequence[Run],
    labels: Sequence[str],
    settings: AttentionConfig,
    console: Console,
    *,
    device: torch.device | str = "cpu",
) -> list[Look]:
    """The locality of every run that has attention, on held-out images; measurements are kept in its folder."""
    found = []
    for run, label in zip(runs, labels, strict=True):
        checkpoint = run.checkpoint(None, lambda sentence: console.print(f"note: {sentence}"))
        network = run.network(checkpoint).to(device)
        if not attention_modules(network):
            continue
        denoiser = run.config.objective.build().denoiser(network)
        facts = run.facts(checkpoint.step, label=label)
        saved = run.path / "analysis" / "attention.json"
        result = LocalityResult.load(saved) if saved.is_file() else None
        held_out = result is not None and result.about.settings.get("images_from", "test") == "test"
        if result is None or not held_out or not holds(run, result, settings):
            images, classes = run.pictures("test", settings.images)
            with counting(console, f"attention of {run.name}") as progress:
                result = measure_attention(denoiser, images, settings, labels=classes, about=facts, progress=progress)
            result.save(saved.parent)
        found.append(Look(run, label, denoiser, _about(result, facts)))
    return found


def _about(result: LocalityResult, facts: Any) -> LocalityResult:
    """The result under the name that this report gives its run."""
    return replace(result, about=facts)


def pickers(
    looks: Sequence[Look],
    samples: Mapping[str, np.ndarray],
    budget: int,
    *,
    hide_real_images: bool,
    drawn_by: str | None = None,
) -> list[AttentionPicker]:
    """A token picker for each N: one image, and the attention of each kind of run on it, of one shuffle.

    Args:
        looks: the runs with attention.
        samples: run's name -> samples that may be shown, uint8 [N, C, H, W].
        budget: bytes of all pickers together.
        hide_real_images: take a sample of the first run instead of a held-out image; without one there is no picker.
        drawn_by: what drew the samples, in words, if not the runs that they stand for.
    """
    chosen = []
    for members in _groups(looks)[:PICKERS]:
        image = _image(members[0], samples, hide_real_images, drawn_by)
        if image is not None:
            chosen.append((members, *image))
    made, left = [], sum(len(members) for members, _, _ in chosen)
    for members, image, words in chosen:
        runs = []
        for look in members:
            # Each gets its share of what is left: local attention packs small and leaves more to the others.
            runs.append(_pack(look, image, budget // left))
            budget, left = max(0, budget - runs[-1].size), left - 1
        made.append(_picker(members[0], image, words, runs))
    return made


@dataclass(frozen=True, eq=False)
class MapRows:
    """What the figure of attention maps shows."""

    maps: list[tuple[str, AttentionMaps]]
    layers: list[int]
    picture: np.ndarray | None
    """The image, uint8 [C, H, W], where all rows have the same."""


def map_rows(looks: Sequence[Look], samples: Mapping[str, np.ndarray], *, hide_real_images: bool) -> MapRows | None:
    """The maps of at most `ROWS` runs on one grid, at the middle noise level, on the image of their picker."""
    from ditlab.report.attention_figures import layers_shown

    groups = _groups(looks)
    alike = [members for members in groups if members[0].kind[2:] == groups[0][0].kind[2:]]
    maps, pictures = [], []
    for members in alike:
        found = _image(members[0], samples, hide_real_images)
        for look in members if found is not None else ():
            assert found is not None
            result = look.result
            sigma = result.levels[len(result.levels) // 2]
            label = look.label if len(alike) == 1 else f"{look.label}, N = {result.about.n}"
            seen = attention_maps(
                look.denoiser, found[0], sigma, noise_seed=result.config.noise_seed, label=_no_class(look.denoiser)
            )
            maps.append((label, seen))
            pictures.append(to_uint8(found[0])[0].numpy())
    maps, pictures = maps[:ROWS], pictures[:ROWS]
    if not maps:
        return None
    common = sorted(set.intersection(*(set(seen.maps) for _, seen in maps)))
    same = all(np.array_equal(picture, pictures[0]) for picture in pictures)
    return MapRows(maps, layers_shown(common), pictures[0] if same else None)


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


def _image(
    look: Look, samples: Mapping[str, np.ndarray], hide: bool, drawn_by: str | None = None
) -> tuple[torch.Tensor, str] | None:
    """The image to look at, float32 [1, C, H, W], and what it is."""
    if not hide:
        return look.run.pictures("test", 1)[0], "the first held-out image"
    if not len(samples.get(look.run.name, ())):
        return None
    return to_float(
        torch.from_numpy(samples[look.run.name][:1].copy())
    ), f"a sample drawn by {drawn_by or look.run.name}"


def _picker(look: Look, image: torch.Tensor, words: str, runs: Sequence[PickerRun]) -> AttentionPicker:
    """A picker of packed runs; `look` is the first of them."""
    result, facts = look.result, look.result.about
    noisy = []
    for sigma in result.levels:
        noise = level_noise(result.config.noise_seed, sigma, [0], [0], look.denoiser.shape)
        seen = float(look.denoiser.scale(sigma)) * (image + sigma * noise)
        noisy.append(_picture(seen.clamp(-1, 1)))
    steps = result.timesteps
    names = [f"σ = {s:.2f}" + ("" if steps is None else f" (t = {steps[i]})") for i, s in enumerate(result.levels)]
    title = words if facts.n is None else f"N = {facts.n}, shuffle {facts.seed}: {words}"
    return AttentionPicker(title, _picture(image), noisy, names, result.grid, runs)


def _picture(image: torch.Tensor) -> np.ndarray:
    return to_uint8(image)[0].numpy().transpose(1, 2, 0)


def _no_class(denoiser: Denoiser) -> torch.Tensor | None:
    """The label that stands for no class, where there are classes."""
    return torch.full((1,), denoiser.num_classes) if denoiser.num_classes else None


def _pack(look: Look, image: torch.Tensor, budget: int) -> PickerRun:
    result = look.result
    label = _no_class(look.denoiser)

    @lru_cache(maxsize=1)  # the maps of one level at a time
    def at(level: int) -> AttentionMaps:
        sigma, noise_seed = result.levels[level], result.config.noise_seed
        return attention_maps(look.denoiser, image, sigma, noise_seed=noise_seed, label=label)

    def maps(level: int, layer: int) -> np.ndarray:
        return at(level).maps[layer][0].numpy()

    patterns = {layer.number: layer.pattern for layer in attention_layers(look.denoiser)}
    return pack_run(look.label, patterns, result.grid, len(result.levels), maps, budget)
