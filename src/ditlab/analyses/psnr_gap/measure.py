"""The PSNR gap: how much better a denoiser is on the images it was trained on than on others of the same kind.

The protocol of An et al. (2410.21273), Eq. 2-4: K training and K held-out images are noised at each level of a grid,
denoised, and the peak signal-to-noise ratio of the estimates is compared,

    PSNR(sigma) = 10 log10(M^2 / ((1/K) sum_k MSE_k)),     gap(sigma) = max(PSNR_train - PSNR_test, 0),

with M the intensity range (2 for images in [-1, 1], and by convention for latents, which have none: M moves both
curves alike and leaves the gap as it is). The reported number is the mean over levels of the truncated gap:
the truncation comes first, which is the only reading under which the paper's Fig. 2 adds up. Kadkhodaie et al.
(2310.02557) average the PSNR of each image instead; both reductions are computed from the same kept errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor

from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.analyses.psnr_gap.result import FLOOR, PSNRResult
from ditlab.diffusion.baselines import EmpiricalBayesDenoiser, WienerDenoiser
from ditlab.diffusion.denoisers import Denoiser
from ditlab.errors import Incompatible, InvalidConfig
from ditlab.metrics.denoising_errors import denoising_errors, grid_levels, own_steps
from ditlab.models.comparing import ModelSet, OpenedModel
from ditlab.models.model import Model
from ditlab.progress import SILENT, Bar, Reporter
from ditlab.provenance import Provenance

__all__ = ["measure_baselines", "measure_gap", "measure_model"]


def measure_model(opened: OpenedModel, config: PSNRConfig, reporter: Reporter = SILENT) -> PSNRResult:
    """Measures the PSNR gap of a model on its own split."""
    return _measure(opened.model, opened.denoiser, config, opened.provenance, reporter)


FLOOR_IMAGES = 3000
"""Images on neither side that the floor's denoiser is made of, at most."""


def measure_baselines(
    models: ModelSet, config: PSNRConfig, sigmas: Sequence[float], reporter: Reporter = SILENT
) -> list[PSNRResult]:
    """Measures closed-form denoisers for the first model with each N.

    Empirical Bayes and Wiener are made of its training images. The floor is a Wiener denoiser of images of the set that
    are on neither side, where there are at least two: training and test images are not the same, so even a denoiser
    that saw neither has a "gap" on them.
    """
    config, results = replace(config, sigmas=tuple(sigmas)), []
    for n, model in sorted({model.split_record.train: model for model in reversed(models)}.items()):
        images, about = model.batch("train", n)[0].to(models.device), model.provenance(0)
        settings = {**about.settings, "baseline": True}
        about = replace(about, label="", step=None, ema=None, settings=settings)
        baselines: list[tuple[Denoiser, Provenance]] = [
            (EmpiricalBayesDenoiser(images), replace(about, name="empirical Bayes")),
            (WienerDenoiser(images), replace(about, name="Wiener")),
        ]
        if len(others := _on_neither_side(model)) > 1:
            settings = {**settings, "floor": len(others)}
            floor = WienerDenoiser(model.images.batch(others).to(models.device))
            baselines.append((floor, replace(about, name=FLOOR, settings=settings)))
        for denoiser, facts in baselines:
            denoiser.pixel_space = model.images.latents is None
            results.append(_measure(model, denoiser, config, facts, reporter))
    return results


def _on_neither_side(model: Model) -> np.ndarray:
    """Returns places of images that are neither training nor test images, spread over the set."""
    rest = np.setdiff1d(np.arange(len(model.images)), np.concatenate([model.split.train, model.split.test]))
    return rest[np.linspace(0, len(rest) - 1, min(len(rest), FLOOR_IMAGES)).astype(int)] if len(rest) else rest


def _measure(model: Model, denoiser: Denoiser, config: PSNRConfig, about: Provenance, reporter: Reporter) -> PSNRResult:
    (train, train_labels), (test, test_labels) = (model.batch(side, config.images) for side in ("train", "test"))
    if not denoiser.num_classes:  # as baselines of a conditional model's images
        train_labels = test_labels = None
    with reporter.bar(f"PSNR gap of {about.name}") as bar:
        labels = {"train_labels": train_labels, "test_labels": test_labels}
        return measure_gap(denoiser, train, test, config, about=about, **labels, bar=bar)


def measure_gap(
    denoiser: Denoiser,
    train_images: Float[Tensor, "n c h w"],
    test_images: Float[Tensor, "m c h w"],
    config: PSNRConfig | None = None,
    *,
    about: Provenance | None = None,
    train_labels: Int64[Tensor, " n"] | None = None,
    test_labels: Int64[Tensor, " m"] | None = None,
    bar: Bar | None = None,
) -> PSNRResult:
    """Measures train and test PSNR by noise level and their gap (An et al. Eq. 2-4).

    The first `config.images` of each side are used. Where a side has fewer, all of them are used, each with so many
    noise draws that there are at least as many estimates; the result's `notes` say so.

    Args:
        denoiser: the contract (ditlab's, a baseline, or one made by `Denoiser.wrap`).
        train_images: float32 [N, C, H, W] in [-1, 1] (or scaled latents), images it was trained on.
        test_images: float32 [M, C, H, W] in [-1, 1], images it was not trained on.
        config: the settings; the paper's where None.
        about: which run this is, kept with the result.
        train_labels: int64 [N] for a class-conditional denoiser.
        test_labels: int64 [M].
        bar: shows how many images are denoised.

    Raises:
        DitlabError: a side is empty, shapes disagree, no level is in the denoiser's range, an estimate is not finite.
    """
    config = config or PSNRConfig()
    levels = config.sigmas or grid_levels(denoiser, config.points)
    if not levels:
        raise Incompatible("psnr-gap: no default noise level is in the denoiser's range; give `sigmas`")
    sides = []
    for name, images, labels in (("training", train_images, train_labels), ("test", test_images, test_labels)):
        if len(images) == 0:
            raise InvalidConfig(f"psnr-gap: expected {name} images, found none")
        used, labels = images[: config.images], None if labels is None else labels[: config.images]
        sides.append((used, labels, config.draws * math.ceil(config.images / len(used))))
    total = sum(len(used) * draws for used, _, draws in sides) * len(levels)
    errors, before = [], 0
    for used, labels, draws in sides:
        errors.append(
            denoising_errors(
                denoiser,
                used,
                levels,
                noise_seed=config.noise_seed,
                draws=draws,
                labels=labels,
                clip=config.clip,
                batch_size=config.batch_size,
                progress=None if bar is None else lambda done, before=before: bar(before + done, total),
            )
        )
        before += len(used) * draws * len(levels)
    about = about or Provenance(name="denoiser")
    if not denoiser.pixel_space:
        about = replace(about, settings={**about.settings, "space": "latents"})
    return PSNRResult(
        about=about,
        config=config,
        levels=tuple(float(s) for s in levels),
        timesteps=own_steps(denoiser, levels),
        peak=float(denoiser.peak),
        train_mse=errors[0],
        test_mse=errors[1],
    )
