"""Which models, and which image, the pictures of attention show: figures of maps and token pickers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ditlab.analyses.attention.maps import AttentionMaps, attention_maps
from ditlab.analyses.attention.measure import images_of
from ditlab.analyses.attention.result import LocalityResult
from ditlab.metrics.denoising_errors import level_noise
from ditlab.models.comparing import ModelSet, OpenedModel
from ditlab.pages.token_picker import AttentionPicker, PickerRun, frame_size, pack_run

if TYPE_CHECKING:
    from ditlab.analyses.attention.config import AttentionOptions

__all__ = ["AttentionEntry", "token_pickers"]

MAX_ROWS = 4
"""Models in the figure of maps on a page, at most."""
MAX_PICKERS = 6
"""Token pickers on a page, at most: those of the first N."""

Samples = Mapping[str, tuple[Tensor, Tensor | None]]
"""Name of a model -> samples that may be shown, float32 [N, C, H, W], and their classes, int64 [N], or None."""


@dataclass(frozen=True, eq=False)
class AttentionEntry:
    """A model and its result; the weights are loaded when they are first needed."""

    models: ModelSet
    place: int
    """Of the model among `models`."""
    result: LocalityResult

    @cached_property
    def opened(self) -> OpenedModel:
        """The model with its weights."""
        return self.models.open_one(self.place)

    @property
    def label(self) -> str:
        """The kind of model."""
        return self.result.about.group

    def maps(self, image: ShownImage, sigma: float, layers: Sequence[int]) -> AttentionMaps:
        """Returns the maps of the model on an image."""
        model, denoiser = self.opened.model, self.opened.denoiser
        label = None
        if denoiser.num_classes:
            label = model.batch("test", 1)[1] if image.held_out else image.classes
        seed = self.result.config.noise_seed
        return attention_maps(
            denoiser, image.pixels, sigma, layers=layers, noise_seed=seed, place=image.place, label=label
        )


@dataclass(frozen=True, eq=False)
class ShownImage:
    """The image on which attention is shown."""

    pixels: Tensor
    """float32 [1, C, H, W], as denoisers see it."""
    title: str
    """What it is, for a reader."""
    classes: Tensor | None
    """Its class, int64 [1], if known."""
    held_out: bool = False
    """Whether it is the first held-out image, which each model gives its own class."""
    place: int = 0
    """Its place among the images, on which its noise depends."""


@dataclass(frozen=True, eq=False)
class MapRow:
    """A row of the figure of maps."""

    name: str
    entry: AttentionEntry
    image: ShownImage


def page_image(entry: AttentionEntry, samples: Samples | None, drawn_by: str = "") -> ShownImage | None:
    """Returns the image on which a page shows the models of a group, whose first is `entry`.

    That is the first held-out image; where no real image may be shown (`samples` is not None), a sample listed under
    the entry's name, `drawn_by` another model if that is named; None without one.
    """
    if samples is None:
        return ShownImage(entry.opened.model.batch("test", 1)[0], "the first held-out image", None, held_out=True)
    name = entry.result.about.name
    if name not in samples or not len(samples[name][0]):
        return None
    images, classes = samples[name]
    title = f"a sample drawn by {drawn_by or name}"
    return ShownImage(images[:1], title, None if classes is None else classes[:1])


def group_entries(entries: Sequence[AttentionEntry]) -> list[list[AttentionEntry]]:
    """Returns, for each N, grid and set of noise levels, a model of each label, all of the seed that comes first."""
    groups: dict[tuple[object, ...], dict[str, AttentionEntry]] = {}
    for entry in entries:
        about, result = entry.result.about, entry.result
        levels = tuple(f"{sigma:.5g}" for sigma in result.levels)
        members = groups.setdefault((about.n, result.grid, levels), {})
        if all(other.result.about.seed == about.seed for other in members.values()):
            members.setdefault(entry.label, entry)
    return [list(members.values()) for members in groups.values()]


def page_rows(entries: Sequence[AttentionEntry], samples: Samples | None) -> list[MapRow]:
    """Returns the rows of a page's figure of maps: at most `MAX_ROWS` models, each on the image of its token picker."""
    groups = group_entries(entries)
    rows: list[MapRow] = []
    for members in groups:
        if len(rows) < MAX_ROWS and (image := page_image(members[0], samples)) is not None:
            rows += [MapRow(_row_name(entry, several=len(groups) > 1), entry, image) for entry in members]
    return rows[:MAX_ROWS]


def verb_rows(entries: Sequence[AttentionEntry], options: AttentionOptions) -> list[MapRow]:
    """Returns a row for each kind and N, each on the image of the options; of several seeds the first is shown."""
    several = len({entry.result.about.n for entry in entries}) > 1
    rows: dict[str, MapRow] = {}
    for entry in entries:
        name = _row_name(entry, several=several)
        if name not in rows:
            pixels, classes = images_of(entry.opened, options.images_from, range(options.image, options.image + 1))
            rows[name] = MapRow(name, entry, ShownImage(pixels, name, classes, place=options.image))
    return list(rows.values())


def _row_name(entry: AttentionEntry, *, several: bool) -> str:
    """Returns the label, with N if there are several."""
    return f"{entry.label}, N = {entry.result.about.n}" if several else entry.label


def picture_of(rows: Sequence[MapRow]) -> np.ndarray | None:
    """Returns the image of all rows, uint8 [C, H, W]; None if they differ, as those of several seeds do."""
    pictures = [row.entry.opened.model.decode(row.image.pixels)[0] for row in rows]
    return pictures[0] if all(np.array_equal(picture, pictures[0]) for picture in pictures) else None


def token_pickers(
    entries: Sequence[AttentionEntry], budget: int, *, samples: Samples | None = None, drawn_by: str = ""
) -> list[AttentionPicker]:
    """Returns a token picker for each N, with a model of each kind, all of one seed.

    Those that do not fit into `budget`, the bytes of all together, are left out, and the last picker notes it. Where no
    real image may be shown, pickers show `samples` instead, by the name of their first model (see `page_image`).
    """
    chosen: list[tuple[list[AttentionEntry], ShownImage, np.ndarray]] = []
    for members in group_entries(entries)[:MAX_PICKERS]:
        image = page_image(members[0], samples, drawn_by)
        if image is not None:
            chosen.append((members, image, _picture(members[0], image.pixels)))
    frames = [frame_size(picture.shape[:2], len(members[0].result.levels)) for members, _, picture in chosen]
    # Images that leave no bytes for maps are useless.
    while sum(frames) > budget / 2:
        frames.pop()
    pickers: list[AttentionPicker] = []
    room = budget - sum(frames)
    for number, (members, image, picture) in enumerate(chosen[: len(frames)]):
        packed, left, others = [], room, sum(len(m) for m, _, _ in chosen[number : len(frames)])
        for entry in members:
            # Each gets its share of what is left: local attention packs small and leaves more to the others.
            packed.append(_pack(entry, image, max(0, left // others)))
            left, others = left - packed[-1].size, others - 1
        if left >= 0:
            pickers.append(_picker(members[0], image, picture, packed))
            room = left
    missing = len(chosen) - len(pickers)
    if pickers and missing:
        note = f"The page has no room for {missing} more picker{'s' if missing > 1 else ''}."
        pickers[-1] = replace(pickers[-1], notes=[*pickers[-1].notes, note])
    return pickers


def _picker(
    entry: AttentionEntry, image: ShownImage, picture: np.ndarray, packed: Sequence[PickerRun]
) -> AttentionPicker:
    """Returns a picker of packed models; `entry` is the first of them."""
    result, about, denoiser = entry.result, entry.result.about, entry.opened.denoiser
    noisy = []
    for sigma in result.levels:
        noise = level_noise(result.config.noise_seed, sigma, [0], [0], denoiser.shape)
        noisy.append(_picture(entry, float(denoiser.scale(sigma)) * (image.pixels + sigma * noise)))
    steps = result.timesteps
    names = [f"σ = {s:.2f}" + ("" if steps is None else f" (t = {steps[i]})") for i, s in enumerate(result.levels)]
    title = image.title if about.n is None else f"N = {about.n}, seed {about.seed}: {image.title}"
    return AttentionPicker(title, picture, noisy, names, result.grid, packed)


def _picture(entry: AttentionEntry, image: Tensor) -> np.ndarray:
    """Returns what an image [1, C, H, W] looks like, uint8 [H, W, C]."""
    return entry.opened.model.decode(image)[0].transpose(1, 2, 0)


def _pack(entry: AttentionEntry, image: ShownImage, budget: int) -> PickerRun:
    result = entry.result

    @lru_cache(maxsize=1)  # the maps of one level at a time
    def at(level: int) -> AttentionMaps:
        return entry.maps(image, result.levels[level], result.layers)

    def maps(level: int, layer: int) -> np.ndarray:
        return at(level).maps[layer][0].numpy()

    patterns = dict(zip(result.layers, result.patterns, strict=True))
    return pack_run(entry.label, patterns, result.grid, len(result.levels), maps, budget)
