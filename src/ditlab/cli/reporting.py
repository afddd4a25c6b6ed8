"""From runs and their results to the report's page: which figures, which sentences, which commands."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ditlab.analyses.agreement import section as closed_forms
from ditlab.analyses.jacobian.section import NAMES, jacobian_drawings, jacobian_section, of_number
from ditlab.analyses.psnr_gap.comparison import PSNRComparison
from ditlab.analyses.psnr_gap.result import PSNRResult
from ditlab.analyses.trajectory.comparison import MatchedComparison, Trajectory, compare_kinds
from ditlab.cli import scaling
from ditlab.cli.copies import blanked, nearest_training, telling
from ditlab.cli.jacobian_points import Directions
from ditlab.cli.left import Left
from ditlab.cli.looking import Look, localities, map_rows, pickers
from ditlab.cli.measuring import trajectories
from ditlab.files import write_bytes
from ditlab.metrics.nearest import NearestResult
from ditlab.models.model import Model

if TYPE_CHECKING:
    from ditlab.pages.page import ThemedFigure

_CURVES = (
    "Solid lines: training images; broken lines: held-out images of the same kind. The empirical-Bayes denoiser knows "
    "nothing but the training images (the limit of memorization); the Wiener denoiser knows their mean and covariance."
)
_LOSSES = (
    "The loss of the batches, and the loss of the averaged weights on fixed train and test images (first shuffle)."
)
_NO_IMAGE = "No image may be shown here (there is no sample, or only copies of training images), so no token picker."
_NO_ROOM = "The rest of the page leaves no room for a token picker; `ditlab report` of fewer runs has one."
_MAPS = (
    "Above: each layer's map (mean over heads, queries downwards), brought to [0, 1] and cut off at 0.1, with its "
    "centre enlarged. Below: what the middle token attends to. The style is that of An et al., Fig. 4."
)


@dataclass(frozen=True, eq=False)
class Drawn:
    """Samples of a run, and the training images nearest to them."""

    run: Model
    label: str
    seen: torch.Tensor
    """float32 [count, C, H, W], as the denoiser sees images; drawn from the same noise for every run."""
    images: np.ndarray
    """What they look like, uint8 [count, C, H, W]."""
    nearest: NearestResult
    classes: torch.Tensor | None = None
    """The class that each was drawn for, int64 [count]; None of unconditional runs, or where none was named."""

    @classmethod
    def of(
        cls, run: Model, label: str, seen: torch.Tensor, *, name: str = "", classes: torch.Tensor | None = None
    ) -> Drawn:
        """Finds the nearest training images, and those of held-out images as a control.

        Distances are between pictures as the denoiser knows them: of latents, decoded ones on both sides, so that a
        replay of a training image lies at 0.

        Args:
            run: what drew the images.
            label: its kind.
            seen: the images, float32 [count, C, H, W], as its denoiser sees them.
            name: the run's name; that of its folder where not given.
            classes: that the images were drawn for, int64 [count].
        """
        images = run.pixels(seen)
        found, control = nearest_training(run, images)
        about = replace(run.facts(run.newest_step, label=label), name=name or run.name)
        if run.images.latents is not None:
            about = replace(about, settings={**about.settings, "space": "latents"})
        result = NearestResult(about, found, control, run.mirrored)
        return cls(run, label, seen, images, result, classes)

    @property
    def pictures(self) -> np.ndarray:
        """The nearest training image of each sample, uint8 [count, C, H, W], mirrored where that is nearer."""
        found = self.nearest.samples
        images = self.run.pixels_at(self.run.split.train[found.index])
        return np.where(found.mirrored[:, None, None, None], images[..., ::-1], images)

    @property
    def telling(self) -> np.ndarray:
        """Whether each sample shows too much of a training image where none may be shown, bool [count]."""
        return telling(self.nearest.samples, self.nearest.held_out)


SHOWN = 16
"""Samples of each kind that the page shows, at most; distances are given for all."""
SHEET = 96
"""Samples of all kinds together that the page shows, at most."""
ROOM = 1_000_000
"""Bytes of the page that are kept for token pickers, where there is attention to show."""
FIGURES = (
    r"samples|psnr-curves|gap-bars|(gap-along-training|matched-psnr|losses)(-n\w+)?|attention-maps"
    rf"|attention-locality(-by-n)?-\d+|{scaling.NAMES}|{NAMES}|{closed_forms.NAMES}"
)
"""The names of a report's figures, as a regular expression."""


@dataclass(frozen=True, eq=False)
class Material:
    """Everything that was measured, before it is laid out."""

    runs: Sequence[Model]
    labels: Sequence[str]
    comparison: PSNRComparison
    references: Sequence[PSNRResult]
    samples: Sequence[Drawn]
    looks: Sequence[Look]
    """Runs with attention."""
    commands: Sequence[tuple[str, str]]
    hide_training_images: bool = False
    """No picture of a real image, be it trained on or held out."""
    jacobians: Sequence[Directions] = ()
    """Jacobians of those of the runs that have any."""
    left: Left = field(default_factory=Left)
    """What `ditlab agreement` and `ditlab two-subsets` found of them."""

    @property
    def names(self) -> list[str]:
        """A name for each run, no two alike."""
        return run_names(self.runs)

    @property
    def sampled(self) -> dict[str, torch.Tensor]:
        """Run's name -> its samples that may be shown, as its denoiser sees them."""
        return {one.nearest.about.name: one.seen[torch.from_numpy(self._shown(one))] for one in self.samples}

    @property
    def sampled_classes(self) -> dict[str, torch.Tensor]:
        """Run's name -> the classes of `sampled`, for conditional runs."""
        return {
            one.nearest.about.name: one.classes[torch.from_numpy(self._shown(one))]
            for one in self.samples
            if one.classes is not None
        }

    def _shown(self, one: Drawn) -> np.ndarray:
        """Which samples may be shown, bool [count]."""
        return ~one.telling if self.hide_training_images else np.ones(len(one.images), bool)

    @property
    def trajectories(self) -> list[Trajectory]:
        """PSNR along training, from the logs."""
        return trajectories(self.runs, self.labels)

    @cached_property
    def scaling(self) -> scaling.Scaling:
        """What was measured against compute, where networks of several sizes were trained."""
        return scaling.gather(self.runs, self.labels, self.names)

    def matched(self) -> list[MatchedComparison]:
        """Each two kinds of runs at each N, compared along training; kinds that share no seed are left out."""
        return compare_kinds(self.trajectories)


def run_names(runs: Sequence[Model]) -> list[str]:
    """A name for each run, no two alike: its folder's, with those above it where several folders have one name."""
    paths = [run.path.resolve() for run in runs]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["-".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{run.name}-{number}" for number, run in enumerate(runs, 1)]


def figures(material: Material, matched: Sequence[MatchedComparison]) -> dict[str, tuple[Any, str, str]]:
    """File name -> (drawing of a theme, alt text, caption); drawings of parts that were not measured are left out."""
    from ditlab.analyses.psnr_gap.figures import gap_bars, psnr_curves
    from ditlab.pages.theme import assign

    comparison, slots = material.comparison, assign(material.comparison.labels)
    names = " and ".join(comparison.labels)
    found: dict[str, tuple[Any, str, str]] = {}
    if material.samples:
        found["samples"] = _samples_figure(material)
    found["psnr-curves"] = (
        lambda theme: psnr_curves(comparison, material.references, slots=slots, theme=theme),
        f"Curves of train and test PSNR by diffusion step for {names}, with the gap below.",
        _CURVES,
    )
    found["gap-bars"] = (
        lambda theme: gap_bars(comparison, slots=slots, theme=theme),
        f"Bars of the average PSNR gap of {names}.",
        "Average over noise levels of the gap, truncated at zero at each level.",
    )
    for n in comparison.counts:
        found |= _training_figures(material, matched, n, slots)
    found |= scaling.drawings(material.scaling, slots, several=len(comparison.counts) > 1)
    found |= _attention_figures(material, slots)
    for number, one in enumerate(material.jacobians, 1):
        hide = material.hide_training_images
        drawings = jacobian_drawings(one.comparison, one.pixels, hide_images=hide, slots=slots)
        ending = f"-{number}" if len(material.jacobians) > 1 else ""
        found |= {name + ending: drawing for name, drawing in drawings.items()}
    return found | material.left.drawings(hide_training_images=material.hide_training_images)


def _training_figures(
    material: Material, matched: Sequence[MatchedComparison], n: int | None, slots: Mapping[str, int]
) -> dict[str, tuple[Any, str, str]]:
    """Those along training, of the runs with this N; where a report has several N, their names end in it."""
    from ditlab.analyses.trajectory.figures import gap_along_training, loss_curves, matched_psnr

    several = len(material.comparison.counts) > 1
    ending, which = (f"-n{n}", f"N = {n}. ") if several else ("", "")
    names = " and ".join(material.comparison.labels)
    found: dict[str, tuple[Any, str, str]] = {}
    latents = any(result.latents for group in material.comparison.groups for result in group.results)
    along = [t for t in material.trajectories if t.n == n]
    pairs = [comparison for comparison in matched if comparison.n == n]
    if along:
        found[f"gap-along-training{ending}"] = (
            lambda theme: gap_along_training(along, latents=latents, slots=slots, theme=theme),
            f"{which}The PSNR gap and the test PSNR of {names} against training steps.",
            f"{which}Averaged weights, a coarse grid of noise levels, the same images and noise each time.",
        )
        found[f"matched-psnr{ending}"] = (
            lambda theme: matched_psnr(
                along, pairs[0] if len(pairs) == 1 else None, latents=latents, slots=slots, theme=theme
            ),
            f"{which}Test PSNR against train PSNR along the training of {names}.",
            f"{which}At equal train PSNR a curve that lies higher generalizes better at the same fit.",
        )
    logs = _drawn_logs(material, n)
    if any("loss" in line or "train_loss" in line for log in logs.values() for line in log):
        found[f"losses{ending}"] = (
            lambda theme: loss_curves(logs, slots=slots, theme=theme),
            f"{which}Losses of {names} against training steps.",
            f"{which}{_LOSSES}",
        )
    return found


def _drawn_logs(material: Material, n: int | None) -> dict[str, list[dict[str, Any]]]:
    """Label -> the log of its first run with this N."""
    logs: dict[str, list[dict[str, Any]]] = {}
    for run, label in zip(material.runs, material.labels, strict=True):
        if run.split_record.train == n and run.log:
            logs.setdefault(label, run.log)
    return logs


def _attention_figures(material: Material, slots: Mapping[str, int]) -> dict[str, tuple[Any, str, str]]:
    from ditlab.analyses.attention.locality_figures import locality_by_n, locality_curves
    from ditlab.analyses.attention.map_figures import attention_map_figure

    found: dict[str, tuple[Any, str, str]] = {}
    rows = map_rows(
        material.looks,
        material.sampled,
        hide_real_images=material.hide_training_images,
        classes=material.sampled_classes,
    )
    if rows is not None:
        found["attention-maps"] = (
            lambda theme: attention_map_figure(rows.maps, layers=rows.layers, picture=rows.picture, theme=theme),
            f"Attention maps of {', '.join(label for label, _ in rows.maps)}, layer by layer, with the middle token's.",
            _MAPS,
        )
    for number, alike in enumerate(localities(material.looks), 1):
        results = [r for g in alike.groups for r in g.results]
        words = " and ".join(alike.labels)
        found[f"attention-locality-{number}"] = (
            lambda theme, results=results: locality_curves(results, slots=slots, theme=theme),
            f"Mean attention distance by layer and mass by radius of {words}.",
            "Thin broken lines: uniform attention over what each layer may see; dotted: over the whole grid.",
        )
        if len(alike.counts) > 1 and None not in alike.counts:
            found[f"attention-locality-by-n-{number}"] = (
                lambda theme, results=results: locality_by_n(results, slots=slots, theme=theme),
                f"Locality of {words} against the number of training images.",
                "Means over layers, heads and noise levels; dots are shuffles.",
            )
    return found


def _samples_figure(material: Material) -> tuple[Any, str, str]:
    from ditlab.analyses.samples.figures import SampleRow, samples_with_nearest

    hide = material.hide_training_images
    rows, count = [], min(SHOWN, SHEET // len(material.samples))
    for drawn in material.samples:
        found, about = drawn.nearest.samples.take(count), drawn.nearest.about
        images = drawn.images[:count]
        if hide:
            images = blanked(images, drawn.telling[:count])
        name = f"{drawn.label}, N = {about.n}, shuffle {about.seed}"
        rows.append(SampleRow(name, images, found, None if hide else drawn.pictures[:count]))
    beneath = "with their distance to the nearest training image (no real image is shown, nor any copy of one)"
    if not hide:
        beneath = "each above its nearest training image, with their distance"
    return (
        lambda theme: samples_with_nearest(rows, theme=theme),
        f"Rows of images: samples of {'; '.join(row.caption for row in rows)}, {beneath}.",
        f"Samples from equal noise, {beneath} in grey levels (0 to 255).",
    )


def save_figures(pictures: Mapping[str, ThemedFigure], folder: Path) -> list[Path]:
    """Writes each figure as NAME.png, as it looks on a light page.

    An earlier report's figures that this one has not are deleted: they may show images that this one hides.
    """
    for file in folder.glob("*.png"):
        if file.stem not in pictures and re.fullmatch(FIGURES, file.stem):
            file.unlink()
    return [write_bytes(folder / f"{name}.png", picture.light) for name, picture in pictures.items()]


def draw_all(drawings: Mapping[str, tuple[Any, str, str]]) -> dict[str, ThemedFigure]:
    """File name -> the figure in both themes."""
    from ditlab.pages.page import ThemedFigure

    photographs = re.compile(r"samples|jacobian-denoised(-\d+)?|(agreement-images|two-subsets-pairs)-\d+")
    return {
        name: ThemedFigure.draw(*drawing, exact=photographs.fullmatch(name) is not None)
        for name, drawing in drawings.items()
    }


def save_report(
    material: Material,
    drawn: Mapping[str, ThemedFigure],
    path: Path,
    *,
    title: str,
    foreword: Sequence[str] = (),
) -> list[str]:
    """Writes report.html and returns its sentences."""
    from ditlab.pages.page import PAGE_BYTES, PageData, RunCard, fit_page, page_size, save_page
    from ditlab.pages.token_picker import BUDGET
    from ditlab.report.sections import (
        attention_section,
        gap_section,
        locality_section,
        matched_section,
        psnr_section,
        samples_section,
        scaling_section,
        training_section,
    )

    comparison, matched = material.comparison, material.matched()

    def pictures(*names: str) -> list[ThemedFigure]:
        ends = ["", *(f"-n{n}" for n in comparison.counts)]
        return [drawn[name + end] for end in ends for name in names if name + end in drawn]

    results = {f"{r.about.name}-psnr-gap.json": r.to_json() for g in comparison.groups for r in g.results}
    for r in material.references:
        results[f"{r.about.name.replace(' ', '-').lower()}-n{r.about.n}-psnr-gap.json"] = r.to_json()
    logs = {
        f"{label}-n{n}-log.json": _thinned(log)
        for n in comparison.counts
        for label, log in _drawn_logs(material, n).items()
    }
    sections = [
        samples_section(pictures("samples"), [one.nearest for one in material.samples]),
        psnr_section(comparison, pictures("psnr-curves"), results),
        gap_section(comparison, pictures("gap-bars")),
        training_section(pictures("gap-along-training", "losses"), logs),
        matched_section(matched, pictures("matched-psnr")),
        scaling_section(
            [point for points in material.scaling.values() for point in points],
            pictures("scaling", "sampling-compute"),
        ),
        attention_section([], pictures("attention-maps")),
    ]
    for number, alike in enumerate(localities(material.looks), 1):
        files = {f"{r.about.name}-attention.json": r.to_json() for g in alike.groups for r in g.results}
        shown = pictures(*(f"{name}-{number}" for name in ("attention-locality", "attention-locality-by-n")))
        sections.append(locality_section(alike, shown, number=number, data=files))
    for number, one in enumerate(material.jacobians, 1):
        shown = of_number(drawn, number, len(material.jacobians))
        files = {f"{r.about.name}-jacobian.json": r.to_json() for r in one.comparison.results}
        sections.append(jacobian_section(one.comparison, shown, number=number, data=files))
    beside = {name: [drawn[key] for key in drawn if key.startswith(name)] for name in ("agreement-", "two-subsets-")}
    sections += [
        closed_forms.agreement_section([result for _, result in material.left.agreements], beside["agreement-"]),
        closed_forms.two_subsets_section(material.left.subsets, beside["two-subsets-"]),
    ]
    several = len(comparison.counts) > 1
    alone, together = comparison.sentences()[: len(comparison.groups)], comparison.sentences()[len(comparison.groups) :]
    differences = [*together, *(f"N = {m.n}. {s}" if several else s for m in matched for s in m.sentences())]
    data = PageData(
        title=title,
        summary=[*foreword, *(alone if len(alone) <= 4 or not differences else ()), *differences],
        sections=sections,
        runs=[
            RunCard(name, label, dict(run.settings))
            for run, label, name in zip(material.runs, material.labels, material.names, strict=True)
        ],
        labels=comparison.labels,
        commands=material.commands,
        environment=material.runs[0].environment,
    )
    data = fit_page(data, ROOM if material.looks else 0)
    # The pickers get what everything else leaves of the page.
    budget = max(0, min(BUDGET, PAGE_BYTES - page_size(data)))
    chosen = pickers(
        material.looks,
        material.sampled,
        budget,
        hide_real_images=material.hide_training_images,
        classes=material.sampled_classes,
    )
    hidden = material.hide_training_images and not any(len(images) for images in material.sampled.values())
    instead = "" if not material.looks else _NO_IMAGE if hidden else _NO_ROOM
    sections = [
        attention_section(chosen, one.pictures, instead=instead) if one.id == "attention" else one
        for one in data.sections
    ]
    save_page(replace(data, sections=sections), path)
    return [*alone, *differences]


LOG_LINES = 500
"""Lines of a log that a page carries, at most."""


def _thinned(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log, or every second, third, ... line of it and all with measurements."""
    every = -(-len(log) // LOG_LINES)
    return [line for i, line in enumerate(log) if every <= 1 or i % every == 0 or "psnr_gap" in line]
