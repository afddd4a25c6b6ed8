"""The parts of a study's page that need weights: attention maps against N (An et al., Fig. 4) and token pickers.

Both are made from the run folders that exist. Maps are also saved beside the page, so that it can be made again when
the runs are deleted; a JSON file says what each was drawn from, and it is used only for the same runs and levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditlab.analyses.attention.entries import AttentionEntry, token_pickers
from ditlab.analyses.attention.figures import attention_map_figure, layers_shown
from ditlab.analyses.attention.maps import AttentionMaps, attention_layers, attention_maps
from ditlab.analyses.attention.result import LocalityResult
from ditlab.errors import DitlabError
from ditlab.files import read_json, write_bytes, write_json
from ditlab.models.comparing import ModelSet
from ditlab.models.memorization import near_copies, nearest_training
from ditlab.models.run import Run
from ditlab.pages.page import ThemedFigure
from ditlab.pages.token_picker import AttentionPicker
from ditlab.progress import SILENT, Reporter
from ditlab.sampling.draw import draw
from ditlab.sampling.sampler_choice import quick_sampler
from ditlab.studies.grid import Plan
from ditlab.studies.store import Store

__all__ = ["attention_map_figures", "study_pickers"]

_STEM, _KIND = "attention-maps", "study-attention-maps"
PICKER_BYTES = 1_800_000
"""Of all pickers of a page together."""
_CANDIDATES = 16
"""Samples from which one that shows no training image is chosen."""


def _measured(plan: Plan, store: Store, **place: Any) -> list[Mapping[str, Any]]:
    """The places of the trials there, of the first seed, whose attention is on record; N ascending."""
    place["seed"] = plan.axes["seed"][0]
    trials = (t for t in plan.trials if all(t[axis] == value for axis, value in place.items()))
    return sorted((t for t in trials if "attention" in store.records(t["hash"], plan)), key=lambda t: t["n"])


def attention_map_figures(
    plans: Sequence[Plan], store: Store, folder: Path, *, hide_images: bool = False, reporter: Reporter = SILENT
) -> list[ThemedFigure]:
    """Returns a figure for each image set, network and kind of attention of the first seed, with two rows for each N.

    The image is the first held-out one, which all N share, at the middle one of the measured noise levels. Pictures are
    saved into `folder`, and read from it if runs are missing. With `hide_images` the image itself is not shown, and
    saved pictures that show one are deleted.
    """
    axes, figures = ("data", "network", "attention"), []
    for plan in plans:
        for place in product(*(plan.axes[axis] for axis in axes)) if "attention" in plan.analyses else ():
            trials = _measured(plan, store, **dict(zip(axes, place, strict=True)))
            if trials:
                stem = "-".join([_STEM, plan.scale, *place]).replace("/", "-")
                figures.append(_figure(trials, store, folder / stem, hide_images, reporter))
    if hide_images:
        for file in folder.glob(f"{_STEM}-*.png"):
            if _drawn_from(file.with_name(f"{file.name.rpartition('-')[0]}.json")).get("hidden") is not True:
                file.unlink()
    return [figure for figure in figures if figure is not None]


def _drawn_from(file: Path) -> dict[str, Any]:
    """What the file beside a saved picture says that it was drawn from; nothing if it is missing or damaged."""
    try:
        return read_json(file, _KIND, 1)
    except DitlabError:
        return {}


def _figure(
    trials: Sequence[Mapping[str, Any]], store: Store, stem: Path, hide_images: bool, reporter: Reporter
) -> ThemedFigure | None:
    """The maps of trials that differ in N, drawn now if the runs are there, else as they were drawn before."""
    label, of = trials[0]["attention"], ", ".join(str(trials[0][axis]) for axis in ("data", "network"))
    results = [LocalityResult.load(store.trial(t["hash"]) / "attention.json") for t in trials]
    counts = [str(t["n"]) for t in trials]
    source = {
        "cells": {n: t["hash"] for n, t in zip(counts, trials, strict=True)},
        "levels": {n: [_level(r), r.config.noise_seed] for n, r in zip(counts, results, strict=True)},
    }
    alt = f"Attention maps by layer for {label} attention, two rows for each number of training images."
    caption = f"{label} attention, {of}, seed {trials[0]['seed']}: mean over heads, on one held-out image with noise."
    source_file, *files = (stem.with_name(f"{stem.name}{end}") for end in (".json", "-light.png", "-dark.png"))
    try:
        rows, images = [], []
        for trial, result in zip(trials, results, strict=True):
            maps, image = _maps(Run.open(store.run(trial["hash"])), result)
            rows.append((f"N = {trial['n']:,}", maps))
            images.append(image)
        shown = None if hide_images else images[-1]
        figure = ThemedFigure.draw(lambda theme: attention_map_figure(rows, picture=shown, theme=theme), alt, caption)
    except DitlabError as error:
        before = _drawn_from(source_file)
        usable = source.items() <= before.items() and (before.get("hidden") is True or not hide_images)
        if not usable or not all(file.is_file() for file in files):
            reporter.note(f"no attention maps of {label} attention: {error}")
            return None
        reporter.note(f"attention maps of {label} attention are those drawn before: {error}")
        return ThemedFigure(files[0].read_bytes(), files[1].read_bytes(), alt, caption)
    source_file.unlink(missing_ok=True)  # so that a kill before the end leaves no file that describes other pictures
    for file, content in zip(files, (figure.light, figure.dark), strict=True):
        write_bytes(file, content)
    write_json(source_file, {"kind": _KIND, "version": 1, "hidden": hide_images, **source})
    return figure


def _level(result: LocalityResult) -> float:
    """The noise level that is shown: the middle one of those measured."""
    return result.levels[len(result.levels) // 2]


def _maps(run: Run, result: LocalityResult) -> tuple[AttentionMaps, np.ndarray]:
    """The maps of a run and the image that they are of, uint8 [C, H, W]."""
    denoiser = run.denoiser()
    images, labels = run.batch("test", 1)
    layers = layers_shown([layer.number for layer in attention_layers(denoiser)])
    seed = result.config.noise_seed
    maps = attention_maps(denoiser, images, _level(result), layers=layers, noise_seed=seed, label=labels)
    return maps, run.decode(images)[0]


def study_pickers(
    plans: Sequence[Plan], store: Store, room: int, *, hide_images: bool, reporter: Reporter
) -> list[AttentionPicker]:
    """Returns pickers of the first seed's runs of the first image set and network, at the smallest and the largest N.

    All show the same image. N between are left out, so that layers, heads and noise levels fit into `room` bytes. Of
    several scales the first with measured attention is shown. With `hide_images` the image is not a held-out one, but a
    sample that the run of the largest N drew, and that is no copy.
    """
    for plan in plans:
        try:
            if entries := _entries(plan, store):
                return _pickers(entries, min(PICKER_BYTES, room), hide_images, reporter)
        except DitlabError as error:
            reporter.note(f"no token picker: {error}")
    return []


def _pickers(
    entries: Sequence[AttentionEntry], budget: int, hide_images: bool, reporter: Reporter
) -> list[AttentionPicker]:
    if not hide_images:
        return token_pickers(entries, budget)
    sample = _sample(entries[-1], reporter)
    if not len(sample):
        reporter.note("no token picker: every sample shows too much of a training image")
        return []
    samples = {entry.result.about.name: (sample, None) for entry in entries}
    drawn_by = f"{entries[-1].label} attention at N = {entries[-1].result.about.n}"
    return token_pickers(entries, budget, samples=samples, drawn_by=drawn_by)


def _entries(plan: Plan, store: Store) -> list[AttentionEntry]:
    """The measured runs of one facet and seed, at the smallest and the largest N; of each all kinds of attention."""
    if "attention" not in plan.analyses:
        return []
    trials = _measured(plan, store, data=plan.axes["data"][0], network=plan.axes["network"][0])
    trials = [t for t in trials if t["n"] in (trials[0]["n"], trials[-1]["n"])]
    runs = tuple(Run.open(store.run(t["hash"])) for t in trials)
    models = ModelSet(runs, tuple(t["attention"] for t in trials))
    entries = []
    for number, trial in enumerate(trials):
        result = LocalityResult.load(store.trial(trial["hash"]) / "attention.json")
        about = replace(result.about, name=trial["hash"], label=trial["attention"])
        entries.append(AttentionEntry(models, number, replace(result, about=about)))
    return entries


def _sample(entry: AttentionEntry, reporter: Reporter) -> Tensor:
    """One sample of a run that shows no training image, float32 [1, C, H, W]; none if all of them do."""
    model = entry.opened.model
    with reporter.bar("samples for the token pickers", _CANDIDATES) as bar:
        samples = draw(entry.opened.denoiser, quick_sampler(model), range(_CANDIDATES), bar=bar)
    hidden = near_copies(*nearest_training(model, model.decode(samples)))
    return samples[torch.from_numpy(~hidden)][:1]
