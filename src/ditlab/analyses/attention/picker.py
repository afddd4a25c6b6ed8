"""Token pickers of a page: one image, and the attention of each kind of model on it, at each N."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from torch import Tensor

from ditlab.analyses.attention.entries import AttentionEntry, Samples, ShownImage, group_entries, page_image
from ditlab.analyses.attention.maps import AttentionMaps
from ditlab.metrics.denoising_errors import level_noise
from ditlab.pages.token_picker import AttentionPicker, PickerRun, frame_size, pack_run

__all__ = ["token_pickers"]

MAX_PICKERS = 6
"""Pickers on a page, at most: those of the first N."""


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
