"""The two-subset test: do two networks that share no training image draw the same images from the same noise?

Kadkhodaie et al. (ICLR 2024, 2310.02557; their code: `im_set_corr`) train two networks on disjoint sets of N images and
sample both from the same noise. If networks memorize, the two samples differ, and each is near a training image. If
they generalize, they have learned one density: the two samples are alike, and neither is near a training image.
Similarity is the cosine of images about their means. The control is the similarity of the images of one set with the
closest ones of the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8

from ditlab.analyses.pairs import same_pair
from ditlab.analyses.two_subsets.config import TwoSubsetsConfig
from ditlab.analyses.two_subsets.result import Closest, TwoSubsetsResult
from ditlab.diffusion.samplers import evaluations
from ditlab.errors import DitlabError
from ditlab.metrics.similarity import cosines, unit_vectors
from ditlab.models.comparing import OpenedModel
from ditlab.models.memorization import training_images
from ditlab.models.run import Run
from ditlab.progress import SILENT, Reporter
from ditlab.provenance import Provenance
from ditlab.sampling.draw import draw, with_guidance
from ditlab.sampling.job import about_sampler
from ditlab.sampling.sampler_choice import sampler_config
from ditlab.sampling.seeds import parse_seeds, seeds_text

__all__ = ["MAX_CONTROLS", "closest", "compare_subsets", "is_current", "measure_runs", "sampling_record"]

Parts = Iterable[tuple[np.ndarray, np.ndarray | None]]
"""Training images uint8 [r, C, H, W] part by part, with their mirror images if those count too, or None."""

MAX_SHOWN = 16
"""Pairs of samples that are kept as pictures, at most."""
MAX_CONTROLS = 1000
"""Training images of the first run in the control, at most."""


def measure_runs(
    runs: tuple[Run, Run], opened: Sequence[OpenedModel], config: TwoSubsetsConfig, reporter: Reporter = SILENT
) -> TwoSubsetsResult:
    """Draws the samples of two runs, which `check_runs` let pass, from the same noise, and compares them.

    Both have the first run's guidance; seed s gets the class s mod classes.
    """
    first, second = runs
    sampler, seeds = sampler_config(first, config.sampler, config.sampler_steps), parse_seeds(config.seeds)
    for part in opened:
        evaluations(sampler, part.denoiser)  # refuses steps that the sampler cannot take
    samples = []
    for part in opened:
        classes = part.denoiser.num_classes
        label = torch.tensor([seed % classes for seed in seeds]) if classes else None
        denoiser = with_guidance(part.model, part.denoiser, first.guidance)
        with reporter.bar(f"samples of {part.name}") as bar:
            drawn = draw(denoiser, sampler, seeds, batch=config.batch, label=label, bar=bar)
            samples.append(part.model.decode(drawn))
    return compare_subsets(
        (opened[0].provenance, opened[1].provenance),
        (samples[0], samples[1]),
        (lambda: training_images(first, first.mirrored), lambda: training_images(second, second.mirrored)),
        first.decoded(first.split.train[:MAX_CONTROLS]),
        seeds=seeds,
        mean_removed=not config.keep_mean,
        settings=sampling_record(first, config),
    )


def sampling_record(first: Run, config: TwoSubsetsConfig) -> dict[str, Any]:
    """Returns how samples are drawn, as JSON values; the guidance only if there is one."""
    sampler = sampler_config(first, config.sampler, config.sampler_steps)
    seeds = seeds_text(parse_seeds(config.seeds))
    record: dict[str, Any] = {"sampler": about_sampler(sampler), "seeds": seeds, "batch": config.batch}
    if first.conditional and first.guidance.on:
        record["guidance"] = asdict(first.guidance)
    return json.loads(json.dumps(record))


def is_current(
    result: TwoSubsetsResult, runs: tuple[Run, Run], opened: Sequence[OpenedModel], config: TwoSubsetsConfig
) -> bool:
    """Returns whether a saved result is of these weights, images and settings."""
    wanted = {**sampling_record(runs[0], config), "batch": result.settings.get("batch")}
    alike = dict(result.settings) == wanted and result.mean_removed == (not config.keep_mean)
    return alike and same_pair(result, opened)


def closest(images: UInt8[np.ndarray, "n c h w"], parts: Parts, *, mean_removed: bool = True) -> Closest:
    """Returns the training image with the highest cosine to each image; the search is exact.

    Places are counted through all parts. If the mean is not removed, the cosine is that of images in [-1, 1].

    Raises:
        DitlabError: no training image, or images of another shape.
    """
    vectors = unit_vectors(centred(images), mean_removed=mean_removed)
    count, rows, start = len(images), np.arange(len(images)), 0
    index, best, mirrored = np.full(count, -1), np.full(count, -np.inf), np.zeros(count, bool)
    for part, flipped in parts:
        if part.shape[1:] != images.shape[1:]:
            raise DitlabError(
                f"two-subsets: expected training images {list(images.shape[1:])}, found {list(part.shape[1:])}"
            )
        for side, is_mirrored in ((part, False), (flipped, True)):
            if side is None:
                continue
            products = vectors @ unit_vectors(centred(side), mean_removed=mean_removed).T
            place = products.argmax(1)
            nearer = products[rows, place] > best
            index = np.where(nearer, start + place, index)
            mirrored = np.where(nearer, is_mirrored, mirrored)
            best = np.where(nearer, products[rows, place], best)
        start += len(part)
    if not start:
        raise DitlabError("two-subsets: expected at least one training image, found none")
    return Closest(index, best.clip(-1, 1), mirrored)


def centred(images: UInt8[np.ndarray, "n c h w"]) -> Float[np.ndarray, "n c h w"]:
    """Returns 8-bit values as numbers in [-1, 1], float64."""
    return images / 127.5 - 1


def compare_subsets(
    about: tuple[Provenance, Provenance],
    samples: tuple[UInt8[np.ndarray, "n c h w"], UInt8[np.ndarray, "n c h w"]],
    training: tuple[Callable[[], Parts], Callable[[], Parts]],
    control: UInt8[np.ndarray, "m c h w"],
    *,
    seeds: Sequence[int],
    mean_removed: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> TwoSubsetsResult:
    """Compares samples of two runs, of the same seeds.

    Args:
        about: the two runs.
        samples: of each.
        training: each returns a run's training images, from the first one on, at every call.
        control: training images of the first run; their closest ones are searched in the second's.
        seeds: of the samples.
        mean_removed: subtract each image's mean first.
        settings: how the samples were drawn, as JSON values.

    Raises:
        DitlabError: see `closest`.
    """
    first, second = samples
    return TwoSubsetsResult(
        about=about,
        seeds=tuple(seeds),
        mean_removed=mean_removed,
        pair=cosines(centred(first), centred(second), mean_removed=mean_removed),
        nearest=(
            closest(first, training[0](), mean_removed=mean_removed),
            closest(second, training[1](), mean_removed=mean_removed),
        ),
        control=closest(control, training[1](), mean_removed=mean_removed).cosine,
        settings=settings or {},
        pictures=np.stack([first[:MAX_SHOWN], second[:MAX_SHOWN]]),
    )
