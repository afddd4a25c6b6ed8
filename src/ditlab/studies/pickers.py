"""Token pickers of a study's page: one image, and the attention of each kind of network on it at few and many N.

They need the weights, so they are made from the run folders that exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ditlab.analyses.attention.entries import AttentionEntry, token_pickers
from ditlab.analyses.attention.result import LocalityResult
from ditlab.errors import DitlabError
from ditlab.models.comparing import ModelSet
from ditlab.models.memorization import near_copies, nearest_training
from ditlab.models.run import Run
from ditlab.pages.token_picker import AttentionPicker
from ditlab.progress import Reporter
from ditlab.sampling.draw import draw
from ditlab.sampling.sampler_choice import quick_sampler
from ditlab.studies.grid import Plan
from ditlab.studies.store import Store

__all__ = ["study_pickers"]

MAX_BYTES = 1_800_000
"""Of all pickers of a page together."""
_CANDIDATES = 16
"""Samples from which one that shows no training image is chosen."""


def study_pickers(
    plans: Sequence[Plan], store: Store, room: int, *, hide_images: bool, reporter: Reporter
) -> list[AttentionPicker]:
    """Returns pickers of the first seed's runs of the first image set and network, at the smallest and the largest N.

    All show the same image. N between are left out, so that layers, heads and noise levels fit.

    Args:
        plans: one or several scales of a study; the first with measured attention is shown.
        store: where runs and results are.
        room: bytes that are left on the page.
        hide_images: show a sample that the run of the largest N drew, and that is no copy, not a held-out image.
        reporter: told why there is nothing to show.
    """
    for plan in plans:
        try:
            entries = _entries(plan, store)
            if entries:
                return _pickers(entries, room, hide_images, reporter)
        except DitlabError as error:
            reporter.note(f"no token picker: {error}")
    return []


def _pickers(
    entries: Sequence[AttentionEntry], room: int, hide_images: bool, reporter: Reporter
) -> list[AttentionPicker]:
    budget, last = min(MAX_BYTES, room), entries[-1]
    if not hide_images:
        return token_pickers(entries, budget)
    sample = _sample(last, reporter)
    if not len(sample):
        reporter.note("no token picker: every sample shows too much of a training image")
        return []
    samples = {entry.result.about.name: (sample, None) for entry in entries}
    drawn_by = f"{last.label} attention at N = {last.result.about.n}"
    return token_pickers(entries, budget, samples=samples, drawn_by=drawn_by)


def _entries(plan: Plan, store: Store) -> list[AttentionEntry]:
    """The measured runs of one facet and seed, at the smallest and the largest N; of each all kinds of attention."""
    if "attention" not in plan.analyses:
        return []
    first = {"data": plan.axes["data"][0], "network": plan.axes["network"][0], "seed": plan.axes["seed"][0]}
    places = [
        place
        for place in sorted(plan.trials, key=lambda place: place["n"])
        if all(place[axis] == value for axis, value in first.items())
        and store.measured(place["hash"], plan, "attention")
    ]
    shown = [place for place in places if place["n"] in (places[0]["n"], places[-1]["n"])]
    runs = tuple(Run.open(store.run(place["hash"])) for place in shown)
    models = ModelSet(runs, tuple(place["attention"] for place in shown))
    entries = []
    for number, place in enumerate(shown):
        result = LocalityResult.load(store.trial(place["hash"]) / "attention.json")
        about = replace(result.about, name=place["hash"], label=place["attention"])
        entries.append(AttentionEntry(models, number, replace(result, about=about)))
    return entries


def _sample(entry: AttentionEntry, reporter: Reporter) -> Tensor:
    """One sample of a run that shows no training image, float32 [1, C, H, W]; none if all of them do."""
    model = entry.opened.model
    with reporter.bar("samples for the token pickers", _CANDIDATES) as bar:
        samples = draw(entry.opened.denoiser, quick_sampler(model), range(_CANDIDATES), bar=bar)
    hidden = near_copies(*nearest_training(model, model.decode(samples)))
    return samples[torch.from_numpy(~hidden)][:1]
