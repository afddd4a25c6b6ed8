"""Token pickers for the page of a study: one image, and where each kind of attention looks on it at few and many N.

They need the weights, so they are made of the run folders that are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.console import Console
from torch import Tensor

from ditlab.analyses.attention.result import LocalityResult
from ditlab.cli.drawing import draw, quick_sampler
from ditlab.cli.looking import Look, pickers
from ditlab.cli.reporting import Drawn
from ditlab.errors import DitlabError
from ditlab.models.run import Run
from ditlab.pages.token_picker import AttentionPicker
from ditlab.studies.grid import Plan
from ditlab.studies.store import Store

BYTES = 1_800_000
"""Of all pickers of a page together, at most."""
_CANDIDATES = 16
"""Samples among which one is looked for that shows no training image."""


def study_pickers(
    plans: Sequence[Plan], store: Store, console: Console, room: int, *, hide: bool
) -> list[AttentionPicker]:
    """Pickers of the first seed's runs of the first image set and network, at the smallest and the largest N.

    The image is the same in all of them. N between are left out, so that layers, heads and noise levels find room.

    Args:
        plans: one or several scales of a study; the first with measured attention is shown.
        store: where runs and results lie.
        console: where a note is printed if there is nothing to show.
        room: bytes that are left on the page.
        hide: show a sample that the run of the largest N drew, and that is no copy, instead of a held-out image.
    """
    for plan in plans:
        try:
            looks = _looks(plan, store)
            if looks:
                return _pickers(looks, console, room, hide=hide)
        except DitlabError as error:
            console.print(f"note: no token picker: {error}", markup=False)
    return []


def _pickers(looks: Sequence[Look], console: Console, room: int, *, hide: bool) -> list[AttentionPicker]:
    samples = _sample(looks[-1], console) if hide else torch.empty(0)
    if hide and not len(samples):
        console.print("note: no token picker: every sample shows too much of a training image")
        return []
    return pickers(
        looks,
        {look.key: samples for look in looks},
        min(BYTES, room),
        hide_real_images=hide,
        drawn_by=f"{looks[-1].label} attention at N = {looks[-1].result.about.n}",
    )


def _looks(plan: Plan, store: Store) -> list[Look]:
    """The measured runs of one panel and seed, at the smallest and the largest N; of each all kinds of attention."""
    if "attention" not in plan.analyses:
        return []
    place = {"data": plan.axes["data"][0], "network": plan.axes["network"][0], "seed": plan.axes["seed"][0]}
    cells = [
        cell
        for cell in sorted(plan.cells, key=lambda cell: cell["n"])
        if all(cell[axis] == value for axis, value in place.items()) and store.measured(cell["hash"], plan, "attention")
    ]
    found = []
    for cell in cells:
        if cell["n"] in (cells[0]["n"], cells[-1]["n"]):
            run = Run.open(store.run(cell["hash"]))
            result = LocalityResult.load(store.cell(cell["hash"]) / "attention.json")
            result = replace(result, about=replace(result.about, label=cell["attention"]))
            found.append(Look(run, cell["attention"], run.denoiser(), result))
    return found


def _sample(look: Look, console: Console) -> Tensor:
    """One sample of a run that shows no training image, float32 [1, C, H, W]; none where all of them do."""
    console.print(f"drawing {_CANDIDATES} samples of {look.label} at N = {look.result.about.n} for the token pickers")
    drawn = Drawn.of(look.run, look.label, draw(look.denoiser, quick_sampler(look.run), range(_CANDIDATES)))
    return drawn.seen[torch.from_numpy(~drawn.telling)][:1]
