"""Attention maps of a study's trials against N, as An et al.'s Fig. 4: the part of its page that needs weights.

They are drawn from the run folders that exist, and saved as pictures beside the page, so that the page can be made
again when the runs are deleted. A JSON file beside each picture says what it was drawn from; it is used only for the
same runs and noise levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
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
from ditlab.progress import SILENT, Reporter
from ditlab.studies.grid import Plan
from ditlab.studies.store import Store

__all__ = ["attention_map_figures"]

_STEM, _KIND = "attention-maps", "study-attention-maps"


def attention_map_figures(
    plans: Sequence[Plan], store: Store, folder: Path, *, hide_images: bool = False, reporter: Reporter = SILENT
) -> list[ThemedFigure]:
    """Returns a figure for each image set, network and kind of attention of the first seed, with two rows for each N.

    The image is the first held-out one, which all N share, at the middle one of the measured noise levels.

    Args:
        plans: one or several scales of a study.
        store: where the runs are.
        folder: where pictures are saved, and read from if runs are missing.
        hide_images: do not show the image itself; saved pictures that show one are deleted.
        reporter: told which maps could not be drawn again, and why.
    """
    figures = []
    for plan in plans:
        if "attention" not in plan.analyses:
            continue
        for place in product(plan.axes["data"], plan.axes["network"], plan.axes["attention"]):
            figure = _figure(plan, store, folder, place, hide_images, reporter)
            figures += [] if figure is None else [figure]
    if hide_images:
        for file in folder.glob(f"{_STEM}-*.png"):
            if not _shows_no_image(file):
                file.unlink()
    return figures


def _shows_no_image(file: Path) -> bool:
    """Whether a saved picture is known to show no image."""
    try:
        return read_json(_source_file(file.name.rpartition("-")[0], file.parent), _KIND, 1).get("hidden") is True
    except DitlabError:
        return False


def _figure(
    plan: Plan, store: Store, folder: Path, place: tuple[str, ...], hide_images: bool, reporter: Reporter
) -> ThemedFigure | None:
    data, network, label = place
    seed = plan.axes["seed"][0]
    hashes = {
        trial["n"]: trial["hash"]
        for trial in plan.trials
        if (trial["data"], trial["network"], trial["attention"], trial["seed"]) == (data, network, label, seed)
    }
    results = {
        n: LocalityResult.load(store.trial(name) / "attention.json")
        for n, name in sorted(hashes.items())
        if store.measured(name, plan, "attention")
    }
    if not results:
        return None
    alt = f"Attention maps by layer for {label} attention, two rows for each number of training images."
    caption = f"{label} attention, {data}, {network}, seed {seed}: mean over heads, on one held-out image with noise."
    stem = "-".join([_STEM, plan.scale, data, network, label]).replace("/", "-")
    source_file = _source_file(stem, folder)
    drawn_from = {
        "cells": {str(n): hashes[n] for n in results},
        "levels": {str(n): [_level(result), result.config.noise_seed] for n, result in results.items()},
    }
    files = [folder / f"{stem}-{theme}.png" for theme in ("light", "dark")]
    try:
        rows, image = _maps({n: (hashes[n], result) for n, result in results.items()}, store)
        shown = None if hide_images else image
        figure = ThemedFigure.draw(lambda theme: attention_map_figure(rows, picture=shown, theme=theme), alt, caption)
    except DitlabError as error:
        if not _usable(source_file, drawn_from, hide_images) or not all(file.is_file() for file in files):
            reporter.note(f"no attention maps of {label} attention: {error}")
            return None
        reporter.note(f"attention maps of {label} attention are those drawn before: {error}")
        return ThemedFigure(files[0].read_bytes(), files[1].read_bytes(), alt, caption)
    source_file.unlink(missing_ok=True)  # so that a kill before the end leaves no file that describes other pictures
    for file, content in zip(files, (figure.light, figure.dark), strict=True):
        write_bytes(file, content)
    write_json(source_file, {"kind": _KIND, "version": 1, "hidden": hide_images, **drawn_from})
    return figure


def _source_file(stem: str, folder: Path) -> Path:
    """The file that says what a saved picture was drawn from."""
    return folder / f"{stem}.json"


def _usable(source_file: Path, drawn_from: Mapping[str, Any], hide_images: bool) -> bool:
    """Whether a saved picture was drawn from exactly these trials and levels, and may be shown."""
    try:
        record = read_json(source_file, _KIND, 1)
    except DitlabError:
        return False
    return all(record.get(name) == value for name, value in drawn_from.items()) and (
        record.get("hidden") is True or not hide_images
    )


def _level(result: LocalityResult) -> float:
    """The noise level that is shown: the middle one of those measured."""
    return result.levels[len(result.levels) // 2]


def _maps(
    results: Mapping[int, tuple[str, LocalityResult]], store: Store
) -> tuple[list[tuple[str, AttentionMaps]], np.ndarray | None]:
    """(name, maps) of each N, and the image that they are of, uint8 [C, H, W]."""
    rows, image = [], None
    for n, (name, result) in results.items():
        run = Run.open(store.run(name))
        denoiser = run.denoiser()
        images, labels = run.batch("test", 1)
        numbers = [layer.number for layer in attention_layers(denoiser)]
        maps = attention_maps(
            denoiser,
            images,
            _level(result),
            layers=layers_shown(numbers),
            noise_seed=result.config.noise_seed,
            label=labels,
        )
        rows.append((f"N = {n:,}", maps))
        image = run.decode(images)[0]
    return rows, image
