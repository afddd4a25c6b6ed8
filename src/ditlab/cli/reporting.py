"""From runs and their results to the report's page: which figures, which sentences, which commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ditlab.analysis.comparison import PSNRComparison
from ditlab.analysis.matched import MatchedComparison, Trajectory, compare_trajectories
from ditlab.analysis.psnr import PSNRResult
from ditlab.cli.measuring import trajectories
from ditlab.config import flat
from ditlab.data.pixels import to_uint8
from ditlab.run import Run

_CURVES = (
    "Solid lines: training images; broken lines: held-out images of the same kind. The empirical-Bayes denoiser knows "
    "nothing but the training images (the limit of memorization); the Wiener denoiser knows their mean and covariance."
)


@dataclass(frozen=True, eq=False)
class Material:
    """Everything that was measured, before it is laid out."""

    runs: Sequence[Run]
    labels: Sequence[str]
    comparison: PSNRComparison
    references: Sequence[PSNRResult]
    samples: Mapping[str, np.ndarray]
    """Label -> uint8 [N, C, H, W], drawn from equal noise."""
    commands: Sequence[tuple[str, str]]
    hide_training_images: bool = False

    @property
    def trajectories(self) -> list[Trajectory]:
        """PSNR along training, from the logs."""
        return trajectories(self.runs, self.labels)

    def matched(self) -> list[MatchedComparison]:
        """Each two kinds of runs at each N, compared along training; kinds that share no seed are left out."""
        found = []
        for n in self.comparison.counts:
            kinds: dict[str, list[Trajectory]] = {}
            for t in self.trajectories:
                if t.n == n:
                    kinds.setdefault(t.label, []).append(t)
            for first, second in combinations(kinds.values(), 2):
                if {t.seed for t in first} & {t.seed for t in second}:
                    found.append(compare_trajectories(first, second))
        return found


def figures(material: Material, matched: Sequence[MatchedComparison]) -> dict[str, tuple[Any, str, str]]:
    """File name -> (drawing of a theme, alt text, caption); drawings of parts that were not measured are left out."""
    from ditlab.report.figures import gap_bars, psnr_curves, sample_grid
    from ditlab.report.style import assign
    from ditlab.report.training_figures import gap_along_training, loss_curves, matched_psnr

    comparison, slots = material.comparison, assign(material.comparison.labels)
    names = " and ".join(comparison.labels)
    found: dict[str, tuple[Any, str, str]] = {}
    rows = _rows(material)
    if rows:
        found["samples"] = (
            lambda theme: sample_grid(rows, columns=min(16, len(rows[0][1])), theme=theme),
            "Rows of images: " + "; ".join(caption for caption, _ in rows) + ".",
            "Samples of each run from equal noise"
            + ("." if material.hide_training_images else ", and training images."),
        )
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
    along = material.trajectories
    if along:
        found["gap-along-training"] = (
            lambda theme: gap_along_training(along, slots=slots, theme=theme),
            f"The PSNR gap and the test PSNR of {names} against training steps.",
            "Averaged weights, a coarse grid of noise levels, the same images and noise each time.",
        )
        one = matched[0] if len(matched) == 1 else None
        found["matched-psnr"] = (
            lambda theme: matched_psnr(along, one, slots=slots, theme=theme),
            f"Test PSNR against train PSNR along the training of {names}.",
            "At equal train PSNR a curve that lies higher generalizes better at the same fit.",
        )
    logs = {}
    for run, label in zip(material.runs, material.labels, strict=True):
        logs.setdefault(label, run.log)
    found["losses"] = (
        lambda theme: loss_curves(logs, slots=slots, theme=theme),
        f"Losses of {names} against training steps.",
        "The loss of the batches, and the loss of the averaged weights on fixed train and test images (first seed).",
    )
    return found


def _rows(material: Material) -> list[tuple[str, np.ndarray]]:
    rows = [(f"samples, {label}", images) for label, images in material.samples.items()]
    if rows and not material.hide_training_images:
        count = len(rows[0][1])
        images, _ = material.runs[0].pictures("train", count)
        rows.append(("training images", to_uint8(images).numpy()))
    return rows


def save_figures(drawings: Mapping[str, tuple[Any, str, str]], folder: Path) -> list[Path]:
    """Writes each figure as NAME.png for a light page."""
    from ditlab.report.style import LIGHT, save

    folder.mkdir(parents=True, exist_ok=True)
    return [save(drawing(LIGHT), folder / f"{name}.png") for name, (drawing, _, _) in drawings.items()]


def save_report(material: Material, path: Path, *, title: str, foreword: Sequence[str] = ()) -> list[str]:
    """Writes report.html and returns its sentences."""
    from ditlab.report.page import PageData, Picture, RunCard, save_page

    matched = material.matched()
    drawings = figures(material, matched)

    def pictures(*names: str) -> list[Picture]:
        return [Picture.draw(*drawings[name]) for name in names if name in drawings]

    sentences = [*material.comparison.sentences(), *(s for m in matched for s in m.sentences())]
    notes = dict.fromkeys(note for g in material.comparison.groups for r in g.results for note in r.notes)
    downloads: dict[str, Any] = {"comparison.json": material.comparison.to_json()}
    downloads |= {f"matched-{i}.json": m.to_json() for i, m in enumerate(matched)}
    for run, group in ((r.about.name, r) for g in material.comparison.groups for r in g.results):
        downloads[f"{run}-psnr-gap.json"] = group.to_json()
    data = PageData(
        title=title,
        summary=[*foreword, *sentences],
        runs=[RunCard(r.name, label, flat(r.config)) for r, label in zip(material.runs, material.labels, strict=True)],
        comparison=material.comparison,
        matched=matched,
        samples=pictures("samples"),
        curves=pictures("psnr-curves"),
        bars=pictures("gap-bars"),
        along_training=pictures("gap-along-training", "losses"),
        matched_pictures=pictures("matched-psnr"),
        notes=list(notes),
        commands=material.commands,
        environment=material.runs[0].record.environment,
        downloads=downloads,
    )
    save_page(data, path)
    return sentences
