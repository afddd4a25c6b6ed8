"""Measuring several runs side by side: their labels, their PSNR gaps, the closed-form references beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.analyses.psnr_gap.result import PSNRResult, psnr_gap
from ditlab.analyses.trajectory.comparison import Trajectory
from ditlab.cli.common import check_out, counting, noting, open_images
from ditlab.config import differing_settings
from ditlab.data.sources.files import is_source
from ditlab.diffusion.baselines import EmpiricalBayesDenoiser, WienerDenoiser
from ditlab.diffusion.denoisers import Denoiser
from ditlab.errors import DitlabError
from ditlab.models.model import Model
from ditlab.models.opening import ExternalConfig, ExternalModel, open_model
from ditlab.provenance import Provenance

_NOT_A_LABEL = ("data.", "training.seed", "training.keep", "training.save_every", "training.log_every", "evaluation.")
"""Settings by which runs of one kind may differ: the images, the seeds, and what does not touch the weights."""


def chosen_labels(verb: str, given: Sequence[str], runs: Sequence[Model]) -> list[str]:
    """The labels that a user gave, one a run, or those found by `run_labels`.

    Raises:
        DitlabError: not as many labels as runs.
    """
    if given and len(given) != len(runs):
        raise DitlabError(f"{verb} --labels: expected {len(runs)} labels, one a run, found {len(given)}")
    return list(given) or run_labels(runs)


def run_labels(runs: Sequence[Model]) -> list[str]:
    """A short name of what kind of run each is: the settings in which the kinds differ.

    Runs that differ only in their images, N and seeds are of one kind. Where the attention is all that differs, a label
    is just the attention plan; where nothing does, it is the preset.
    """
    first = runs[0].settings
    differing: dict[str, None] = {}
    for other in runs[1:]:
        for name in differing_settings(first, other.settings):
            if not name.startswith(_NOT_A_LABEL):
                differing[name] = None
    by_preset = "preset" in differing
    if by_preset and len(differing) > 1:
        del differing["preset"]  # what the presets differ in is listed by itself
    names = list(differing)
    if not names:
        return [first.get("preset") or "run"] * len(runs)
    if len(names) > 3 and by_preset:
        names = ["preset", *(["network.attention"] if "network.attention" in names else [])]

    def value(run: Model, name: str) -> str:
        text = str(run.settings.get(name, "-"))
        return text if name in ("network.attention", "preset") else f"{name.rpartition('.')[2]} {text}"

    return [", ".join(value(run, name) for name in names if name in run.settings) for run in runs]


def measure_run(
    run: Model,
    config: PSNRConfig,
    console: Console,
    *,
    label: str = "",
    step: int | None = None,
    ema: bool = True,
    device: torch.device | str = "cpu",
) -> PSNRResult:
    """The PSNR gap of one run, on its own split, checked against the image set."""
    denoiser, facts = run.denoiser_and_provenance(step=step, ema=ema, label=label, device=device, say=noting(console))
    return _measure(run, denoiser, config, facts, console)


def measure_references(
    run: Model, config: PSNRConfig, levels: Sequence[float], console: Console, *, device: torch.device | str = "cpu"
) -> list[PSNRResult]:
    """The empirical-Bayes and the Wiener denoiser of a run's training images, measured like the run itself."""
    images, _ = run.pictures("train", run.split_record.train)
    images = images.to(device)
    found = []
    for name, denoiser in (("empirical Bayes", EmpiricalBayesDenoiser(images)), ("Wiener", WienerDenoiser(images))):
        denoiser.pixel_space = run.images.latents is None
        facts = replace(run.facts(0), name=name, label="", step=None, ema=None)
        found.append(_measure(run, denoiser, replace(config, levels=tuple(levels)), facts, console, labels=False))
    return found


def _measure(
    run: Model, denoiser: Denoiser, config: PSNRConfig, facts: Provenance, console: Console, *, labels: bool = True
) -> PSNRResult:
    (train, train_labels), (test, test_labels) = (run.pictures(s, config.images) for s in ("train", "test"))
    with counting(console, f"PSNR gap of {facts.name}") as progress:
        return psnr_gap(
            denoiser,
            train,
            test,
            config,
            about=facts,
            train_labels=train_labels if labels else None,
            test_labels=test_labels if labels else None,
            progress=progress,
        )


def trajectories(runs: Sequence[Model], labels: Sequence[str]) -> list[Trajectory]:
    """What the logs of the runs say of PSNR along training; runs without such lines are left out."""
    found = []
    for run, label in zip(runs, labels, strict=True):
        split = run.split_record
        lines = [line for line in run.log if "psnr_gap" in line]
        if lines:
            found.append(Trajectory.from_log(label, split.seed, lines, n=split.train, split_family=split.family))
    return found


def open_runs(
    references: Sequence[str],
    data: str | None,
    console: Console,
    *,
    config: ExternalConfig | None = None,
    results: Path | None = None,
    codec: str | None = None,
) -> list[Model]:
    """Opens runs and other models that are to stand side by side; says what a reader must know of the latter.

    Args:
        references: as a user typed them (`ditlab.models.opening`).
        data: where the runs' image set lies now, and the set (or the source of one) to look at other models with.
        console: where notes are printed.
        config: which images stand for the training images of models that are not runs.
        results: the folder that is to be written to; also for the results of models that do not lie in one of the
            user's own.
        codec: where the autoencoder of those on latents lies now, if it was moved, or does not lie beside a model.

    Raises:
        DitlabError: none was named, or one was named twice, or they are of different image sets, or two of one seed
            were held back different test images, or the folder for the results cannot be written to (said here, before
            anything is measured).
    """
    check_out(results)
    if not references:
        raise DitlabError("expected at least one run's folder, found none")
    runs = [_open(reference, data, console, config, results, codec) for reference in references]
    places = [run.path.resolve() for run in runs]
    for place, run in zip(places, runs, strict=True):
        if places.count(place) > 1:
            if isinstance(run, ExternalModel):
                raise DitlabError(
                    f"model {run.name}: named twice, or two models have this name and would share the results in "
                    f"{run.path}"
                )
            raise DitlabError(f"run {place}: named twice")
    families: dict[int, Model] = {}
    first = runs[0]
    for run in runs:
        if run.split_record.imageset != first.split_record.imageset:
            raise DitlabError(
                f"runs {first.path} and {run.path} were trained on different image sets "
                f"({first.split_record.imageset[:12]} and {run.split_record.imageset[:12]}), so they cannot be compared"
            )
        other = families.setdefault(run.split_record.seed, run)
        if other.split_record.family != run.split_record.family:
            raise DitlabError(
                f"runs {other.path} and {run.path} have different splits (test images "
                f"{other.split_record.family[:12]} and {run.split_record.family[:12]}), so they cannot be compared"
            )
    for run in runs:
        for note in run.notes:
            console.print(f"note: {run.name}: {note}", markup=False)
    return runs


def _open(
    reference: str,
    data: str | None,
    console: Console,
    config: ExternalConfig | None,
    results: Path | None,
    codec: str | None,
) -> Model:
    """Opens one of them; a source of images is prepared at the model's size."""
    if data is None or not is_source(data):
        return open_model(reference, data, config=config, results=results, codec=codec)
    found = open_model(reference, config=config, results=results, codec=codec)
    if not isinstance(found, ExternalModel):
        raise DitlabError(
            f"--data: expected the folder of the image set of run {found.name}, found the source '{data}'"
        )
    height, width = found.model.denoiser.shape[1:]
    if height != width:
        raise DitlabError(f"--data: expected a prepared set of {height}x{width} images, found the source '{data}'")
    found.look_at(open_images(data, height, console).path)
    return found
