"""The swap: two models with disjoint training sets, compared on the training images of both.

The PSNR gap sets training images beside other, held-out images, and one set may be easier than the other. Here the same
images with the same noise go through both models, so that their difficulty cancels:

    gap(sigma) = mean over S in {S_A, S_B} of PSNR(trained on S, images S) - PSNR(trained on the other set, images S)

The design is ours (a cross-over); An et al. (2410.21273) compare different images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.analyses.swap_gap.result import SwapResult
from ditlab.errors import Incompatible
from ditlab.metrics.denoising_errors import denoising_errors, grid_levels
from ditlab.models.comparing import OpenedModel
from ditlab.progress import SILENT, Reporter

__all__ = ["check_pair", "measure_swap"]


def check_pair(opened: Sequence[OpenedModel]) -> None:
    """Raises Incompatible unless two models have known training images of one image set and none in common."""
    first, second = (part.model for part in opened)
    names = f"{first.name} and {second.name}"
    for model in (first, second):
        if not model.knows_training_images:
            raise Incompatible(
                f"swap-gap: expected models whose training images are known, found {model.name}; `own_split` says that "
                "a model was trained on the images of its split"
            )
    if first.images.hash != second.images.hash:
        raise Incompatible(f"swap-gap: expected models of one image set, found {names} with different sets")
    shared = len(np.intersect1d(first.split.train, second.split.train))
    if shared:
        raise Incompatible(
            f"swap-gap: expected models without a training image in common, found {shared:,} that {names} share; train "
            "the second with `skip` = N"
        )


def measure_swap(opened: Sequence[OpenedModel], config: PSNRConfig, reporter: Reporter = SILENT) -> SwapResult:
    """Measures both models on as many training images of each as both have, `config.images` at most.

    Args:
        opened: a pair that `check_pair` has accepted.
        config: the settings; levels are those of the first model where it names none.
        reporter: shows the progress.

    Raises:
        DitlabError: the second model lacks a level of the first one, or an estimate is not finite.
    """
    levels = config.sigmas or grid_levels(opened[0].denoiser, config.points)
    opened[1].denoiser.check_levels(np.asarray(levels))
    count = min(config.images, *(len(part.model.split.train) for part in opened))
    draws = config.draws * -(-config.images // count)
    errors = np.empty((2, 2, len(levels), count, draws))
    total, done = errors.size, 0
    with reporter.bar("swap gap") as bar:
        for side, trained in enumerate(opened):
            images, labels = trained.model.batch("train", count)
            for place, part in enumerate(opened):
                errors[int(place != side), side] = denoising_errors(
                    part.denoiser,
                    images,
                    levels,
                    noise_seed=config.noise_seed,
                    draws=draws,
                    labels=labels if part.denoiser.num_classes else None,
                    clip=config.clip,
                    batch_size=config.batch_size,
                    progress=lambda images, before=done: bar(before + images, total),
                )
                done += errors[0, 0].size
    about = opened[0].provenance, opened[1].provenance
    return SwapResult(about, config, tuple(levels), float(opened[0].denoiser.peak), errors[0], errors[1])
