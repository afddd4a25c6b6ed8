"""Attention maps of a study's cells against N, as An et al.'s Fig. 4: the one part of its page that needs weights.

Drawn from the run folders that are there, and kept as pictures beside the page, so that the page can be made again
when the runs are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ditlab.analysis.attention_maps import AttentionMaps, attention_layers, attention_maps
from ditlab.analysis.locality_result import LocalityResult
from ditlab.analysis.store import write_bytes
from ditlab.data.pixels import to_uint8
from ditlab.errors import DitlabError
from ditlab.report.attention_figures import attention_map_figure, layers_shown
from ditlab.report.page import Picture
from ditlab.run import Run
from ditlab.studies.grid import Plan
from ditlab.studies.store import Store


def map_pictures(
    plans: Sequence[Plan],
    store: Store,
    folder: Path,
    *,
    hide_images: bool = False,
    say: Callable[[str], None] = lambda sentence: None,
) -> list[Picture]:
    """For each image set, network and kind of attention of the first seed: maps, one pair of lines a number of images.

    The image is the first held-out one, which all N share, at the middle one of the measured noise levels.

    Args:
        plans: one or several scales of a study.
        store: where the runs lie.
        folder: where pictures are kept, and read from where runs are missing.
        hide_images: do not show the image itself.
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
    return found


def _picture(
    plan: Plan,
    store: Store,
    folder: Path,
    place: tuple[str, str, str],
    hide_images: bool,
    say: Callable[[str], None],
) -> Picture | None:
    data, network, label = place
    seed = plan.axes["seed"][0]
    names = {
        cell["n"]: cell["hash"]
        for cell in plan.cells
        if (cell["data"], cell["network"], cell["attention"], cell["seed"]) == (data, network, label, seed)
    }
    recorded = {n: name for n, name in names.items() if store.measured(name, plan, "attention")}
    if not recorded:
        return None
    alt = f"Attention maps by layer for {label} attention, a pair of lines for each number of training images."
    caption = f"{label} attention, {data}, {network}, seed {seed}: mean over heads, on one held-out image with noise."
    stem = "-".join(["attention-maps", plan.scale, data, network, label]).replace("/", "-")
    files = [folder / f"{stem}-{theme}.png" for theme in ("light", "dark")]
    try:
        lines, image = _maps(recorded, store)
        shown = None if hide_images else image
        made = Picture.draw(lambda theme: attention_map_figure(lines, picture=shown, theme=theme), alt, caption)
    except DitlabError as error:
        if not all(file.is_file() for file in files):
            say(f"no attention maps of {label} attention: {error}")
            return None
        say(f"attention maps of {label} attention are those drawn before: {error}")
        return Picture(files[0].read_bytes(), files[1].read_bytes(), alt, caption)
    for file, content in zip(files, (made.light, made.dark), strict=True):
        write_bytes(file, content)
    return made


def _maps(recorded: Mapping[int, str], store: Store) -> tuple[list[tuple[str, AttentionMaps]], np.ndarray | None]:
    """(name, maps) of each N, and the image that they are of, uint8 [C, H, W]."""
    lines, image = [], None
    for n, name in sorted(recorded.items()):
        run = Run.open(store.run(name))
        denoiser = run.denoiser()
        images, labels = run.pictures("test", 1)
        result = LocalityResult.load(store.cell(name) / "attention.json")
        numbers = [layer.number for layer in attention_layers(denoiser)]
        maps = attention_maps(
            denoiser,
            images,
            result.levels[len(result.levels) // 2],
            layers=layers_shown(numbers),
            noise_seed=result.config.noise_seed,
            label=labels,
        )
        lines.append((f"N = {n:,}", maps))
        image = to_uint8(images).numpy()[0]
    return lines, image
