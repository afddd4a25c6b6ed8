"""Attention maps of a study's cells against N, as An et al.'s Fig. 4: the one part of its page that needs weights.

Drawn from the run folders that are there, and kept as pictures beside the page, so that the page can be made again
when the runs are gone. Beside each lies what it was drawn from; it stands only for the same runs and noise levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ditlab.analyses.attention.figures import attention_map_figure, layers_shown
from ditlab.analyses.attention.maps import AttentionMaps, attention_layers, attention_maps
from ditlab.analyses.attention.result import LocalityResult
from ditlab.errors import DitlabError
from ditlab.files import read_json, write_bytes, write_json
from ditlab.models.run import Run
from ditlab.pages.page import ThemedFigure
from ditlab.studies.grid import Plan
from ditlab.studies.store import Store

_STEM, _KIND = "attention-maps", "study-attention-maps"


def map_pictures(
    plans: Sequence[Plan],
    store: Store,
    folder: Path,
    *,
    hide_images: bool = False,
    say: Callable[[str], None] = lambda sentence: None,
) -> list[ThemedFigure]:
    """For each image set, network and kind of attention of the first seed: maps, one pair of lines a number of images.

    The image is the first held-out one, which all N share, at the middle one of the measured noise levels.

    Args:
        plans: one or several scales of a study.
        store: where the runs lie.
        folder: where pictures are kept, and read from where runs are missing.
        hide_images: do not show the image itself; kept pictures that show one are removed.
        say: told which maps could not be drawn anew, and why.
    """
    found = []
    for plan in plans:
        if "attention" not in plan.analyses:
            continue
        for data in plan.axes["data"]:
            for network in plan.axes["network"]:
                for label in plan.axes["attention"]:
                    picture = _picture(plan, store, folder, (data, network, label), hide_images, say)
                    found += [] if picture is None else [picture]
    if hide_images:
        for file in folder.glob(f"{_STEM}-*.png"):
            if not _hidden(file):
                file.unlink()
    return found


def _hidden(file: Path) -> bool:
    """Whether a kept picture is known to show no image."""
    try:
        return read_json(_about(file.name.rpartition("-")[0], file.parent), _KIND, 1).get("hidden") is True
    except DitlabError:
        return False


def _picture(
    plan: Plan,
    store: Store,
    folder: Path,
    place: tuple[str, str, str],
    hide_images: bool,
    say: Callable[[str], None],
) -> ThemedFigure | None:
    data, network, label = place
    seed = plan.axes["seed"][0]
    names = {
        cell["n"]: cell["hash"]
        for cell in plan.cells
        if (cell["data"], cell["network"], cell["attention"], cell["seed"]) == (data, network, label, seed)
    }
    recorded = {
        n: LocalityResult.load(store.cell(name) / "attention.json")
        for n, name in sorted(names.items())
        if store.measured(name, plan, "attention")
    }
    if not recorded:
        return None
    alt = f"Attention maps by layer for {label} attention, a pair of lines for each number of training images."
    caption = f"{label} attention, {data}, {network}, seed {seed}: mean over heads, on one held-out image with noise."
    stem = "-".join([_STEM, plan.scale, data, network, label]).replace("/", "-")
    about = _about(stem, folder)
    drawn_from = {
        "cells": {str(n): names[n] for n in recorded},
        "levels": {str(n): [_level(result), result.config.noise_seed] for n, result in recorded.items()},
    }
    files = [folder / f"{stem}-{theme}.png" for theme in ("light", "dark")]
    try:
        lines, image = _maps({n: (names[n], result) for n, result in recorded.items()}, store)
        shown = None if hide_images else image
        made = ThemedFigure.draw(lambda theme: attention_map_figure(lines, picture=shown, theme=theme), alt, caption)
    except DitlabError as error:
        if not _kept(about, drawn_from, hide_images) or not all(file.is_file() for file in files):
            say(f"no attention maps of {label} attention: {error}")
            return None
        say(f"attention maps of {label} attention are those drawn before: {error}")
        return ThemedFigure(files[0].read_bytes(), files[1].read_bytes(), alt, caption)
    about.unlink(missing_ok=True)  # so that a kill before the end leaves none that speaks of other pictures
    for file, content in zip(files, (made.light, made.dark), strict=True):
        write_bytes(file, content)
    write_json(about, {"kind": _KIND, "version": 1, "hidden": hide_images, **drawn_from})
    return made


def _about(stem: str, folder: Path) -> Path:
    """The file that says what a kept picture was drawn from."""
    return folder / f"{stem}.json"


def _kept(about: Path, drawn_from: Mapping[str, Any], hide: bool) -> bool:
    """Whether a picture is kept that was drawn from just these cells and levels, and that may be shown."""
    try:
        found = read_json(about, _KIND, 1)
    except DitlabError:
        return False
    return all(found.get(name) == value for name, value in drawn_from.items()) and (
        found.get("hidden") is True or not hide
    )


def _level(result: LocalityResult) -> float:
    """The noise level that is shown: the middle one of those measured."""
    return result.levels[len(result.levels) // 2]


def _maps(
    recorded: Mapping[int, tuple[str, LocalityResult]], store: Store
) -> tuple[list[tuple[str, AttentionMaps]], np.ndarray | None]:
    """(name, maps) of each N, and the image that they are of, uint8 [C, H, W]."""
    lines, image = [], None
    for n, (name, result) in recorded.items():
        run = Run.open(store.run(name))
        denoiser = run.denoiser()
        images, labels = run.pictures("test", 1)
        numbers = [layer.number for layer in attention_layers(denoiser)]
        maps = attention_maps(
            denoiser,
            images,
            _level(result),
            layers=layers_shown(numbers),
            noise_seed=result.config.noise_seed,
            label=labels,
        )
        lines.append((f"N = {n:,}", maps))
        image = run.pixels(images)[0]
    return lines, image
