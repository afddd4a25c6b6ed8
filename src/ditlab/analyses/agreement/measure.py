"""Agreement: does a trained denoiser draw the images that a closed-form denoiser draws from the same noise?

The denoiser and the baselines start from the same noise and take the same steps of a deterministic sampler on the
denoiser's own noise levels. Their final images are compared in pairs by correlation and R^2. The control is the same
between images of different noise: any two faces correlate.

The windows of Kamb and Ganguli's local denoisers are calibrated as in the paper. At each level of the denoiser's own
trajectories, the odd side is chosen whose score has the highest cosine with the denoiser's score; then the median over
the trajectories. In these coordinates the score is (D(y) - y) / sigma^2.

Sources: Kamb and Ganguli, 2412.20292 (local denoisers, windows, correlation; 20 steps); Lukoianov et al., 2509.09672
(R^2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ditlab.analyses.agreement.config import TITLES, AgreementConfig, BaselineName
from ditlab.analyses.agreement.result import AgreementResult, BaselineAgreement
from ditlab.diffusion.baselines import EmpiricalBayesDenoiser, WienerDenoiser, WienerLocalityDenoiser
from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.local_scores import EquivariantLocalScoreDenoiser, LocalScoreDenoiser, WindowSchedule
from ditlab.diffusion.samplers import (
    DDIMConfig,
    HeunConfig,
    ImageNoise,
    SamplerConfig,
    SamplerStep,
    evaluations,
    sample,
)
from ditlab.errors import DitlabError, Incompatible
from ditlab.metrics.similarity import cosines, mean_squares, r_squared, unit_vectors
from ditlab.models.comparing import OpenedModel
from ditlab.progress import SILENT, Bar, Reporter
from ditlab.provenance import Provenance

__all__ = ["calibrate", "check_agreement", "make_baseline", "make_sampler", "measure_agreement", "measure_model"]

_WITHOUT_WINDOWS: Mapping[BaselineName, Callable[[Tensor], Denoiser]] = {
    "empirical-bayes": EmpiricalBayesDenoiser,
    "wiener": WienerDenoiser,
    "wiener-locality": WienerLocalityDenoiser,
}


Trajectories = Sequence[tuple[float, Tensor, Tensor]]
"""By level: sigma, noisy images and the denoiser's estimates of the clean ones, float32 [trajectories, C, H, W]."""


@dataclass(frozen=True, eq=False)
class Sampled:
    """What the denoiser drew, and how."""

    denoiser: Denoiser
    sampler: SamplerConfig
    noise: Tensor
    images: np.ndarray
    """Final images, float32 [n, C, H, W]."""
    path: Trajectories
    """The first trajectories."""

    @property
    def levels(self) -> tuple[float, ...]:
        """The levels of the path."""
        return tuple(sigma for sigma, _, _ in self.path)


def measure_model(opened: OpenedModel, config: AgreementConfig, reporter: Reporter = SILENT) -> AgreementResult:
    """Measures the agreement of a model with baselines of its training images."""
    denoiser, model = opened.denoiser, opened.model
    check_agreement(denoiser, config)  # before images are read
    used = config.training_images or model.split_record.train
    images, mirrored = model.batch("train", used)[0], model.mirrored_batch(used)
    with reporter.bar(f"agreement of {opened.name}") as bar:
        return measure_agreement(denoiser, images, config, about=opened.provenance, mirrored=mirrored, bar=bar)


def make_baseline(
    name: BaselineName, images: Float[Tensor, "n c h w"], window: int | WindowSchedule | None = None
) -> Denoiser:
    """Returns a baseline made of training images in [-1, 1], or of scaled latents; some need the side of their windows.

    Raises:
        DitlabError: the side is needed and was not given.
    """
    if name in _WITHOUT_WINDOWS:
        return _WITHOUT_WINDOWS[name](images)
    if window is None:
        raise DitlabError(f"baseline {TITLES[name]}: expected the side of its windows as `window`, found none")
    if name == "ls":
        return LocalScoreDenoiser(images, window)
    return EquivariantLocalScoreDenoiser(images, window, "circular" if name == "els" else "broken")


def calibrate(
    levels: Sequence[float], candidates: Sequence[int], scores: Float[np.ndarray, "levels candidates trajectories"]
) -> WindowSchedule:
    """Returns the side of the windows at each level: the median over trajectories of the best candidate of each.

    Of an even number of trajectories it is the lower of the two middle ones, so that the median is a candidate. Levels
    are in any order; of one that occurs twice the last one counts. `scores` are cosines between the score of the
    baseline and that of the denoiser.
    """
    best = np.sort(scores.argmax(1), axis=1)
    sizes = [candidates[row[(len(row) - 1) // 2]] for row in best]
    pairs = sorted(dict(zip(levels, sizes, strict=True)).items())
    return WindowSchedule(tuple(level for level, _ in pairs), tuple(size for _, size in pairs))


def measure_agreement(
    denoiser: Denoiser,
    images: Float[Tensor, "n c h w"],
    config: AgreementConfig,
    *,
    about: Provenance,
    mirrored: Float[Tensor, "n c h w"] | None = None,
    bar: Callable[[int, int], object] | Bar | None = None,
) -> AgreementResult:
    """Compares a denoiser with baselines of its training images.

    Args:
        denoiser: a trained one; a conditional one gets the label "no class".
        images: its training images as it sees them, in their order.
        config: which baselines, and how they are compared.
        about: which denoiser, trained on what.
        mirrored: the same images mirrored left to right, if training mirrored them; baselines then use both.
        bar: shows how many calls of baselines are done, of how many.

    Raises:
        DitlabError: the denoiser takes other images, or needs a class; windows do not fit; images are not finite.
    """
    check_agreement(denoiser, config)
    if tuple(images.shape[1:]) != tuple(denoiser.shape):
        raise Incompatible(
            f"agreement: expected images {tuple(denoiser.shape)}, as the denoiser takes them, found "
            f"{tuple(images.shape[1:])}"
        )
    training = images[: config.training_images]
    used = len(training)
    if mirrored is not None:
        training = torch.cat([training, mirrored[: config.training_images]])
    training = training.to(denoiser.device)
    sampled, sides = _sample(denoiser, config), _sides(config, denoiser)
    shown, done = bar or Bar(), count()
    total = sum(len(sampled.path) * (1 + len(tried)) for tried in sides.values())

    def step(_: object = None) -> None:
        """Shows that one more call of a baseline is done."""
        shown(next(done), total)

    step()
    return AgreementResult(
        about=about,
        config=config,
        levels=sampled.levels,
        baselines=tuple(_compare(name, training, sampled, tried, step) for name, tried in sides.items()),
        training_images=used,
        shape=denoiser.shape,
        notes=_notes(denoiser, used, max(len(images), about.n or 0), mirrored is not None),
        images=sampled.images,
    )


def check_agreement(denoiser: Denoiser, config: AgreementConfig) -> None:
    """Raises DitlabError if `measure_agreement` cannot compare this denoiser, whatever its training images."""
    if denoiser.num_classes and not denoiser.null_class:
        raise Incompatible(
            "agreement: baselines take no class; expected an unconditional denoiser or one with a label for 'no "
            "class', found one that needs a class"
        )
    _sides(config, denoiser)
    evaluations(make_sampler(config), denoiser)


def make_sampler(config: AgreementConfig) -> SamplerConfig:
    """Returns the sampler of the denoiser and the baselines; it takes the denoiser's own steps if it has a grid."""
    if config.sampler == "ddim":
        return DDIMConfig(steps=str(config.sampler_steps))
    return HeunConfig(steps=config.sampler_steps, levels="grid", second_order=config.sampler == "heun")


def _sides(config: AgreementConfig, denoiser: Denoiser) -> dict[BaselineName, tuple[int | None, ...]]:
    """The sides of windows to try for each baseline; (None,) for one without windows."""
    side = min(denoiser.shape[1:])
    fitting = tuple(size for size in config.candidates if size <= side)
    if config.window is not None:
        if config.window > side:
            raise Incompatible(
                f"agreement: `window` must be at most {side}, the images' side in pixels, found {config.window}"
            )
        fitting = (config.window,)
    if not fitting and not set(config.baselines) <= _WITHOUT_WINDOWS.keys():
        raise Incompatible(
            f"agreement: `candidates` must have one of at most {side}, the images' side in pixels, found "
            f"{list(config.candidates)}"
        )
    return {name: (None,) if name in _WITHOUT_WINDOWS else fitting for name in config.baselines}


def _sample(denoiser: Denoiser, config: AgreementConfig) -> Sampled:
    """Draws the denoiser's images, and records the first trajectories."""
    sampler = make_sampler(config)
    noise = ImageNoise(range(config.images), denoiser.shape).initial()
    label = torch.full((len(noise),), denoiser.num_classes) if denoiser.num_classes else None
    path: list[tuple[float, Tensor, Tensor]] = []

    def record(step: SamplerStep) -> None:
        y, x0 = (part[: config.trajectories].float().clone() for part in (step.y, step.x0))
        path.append((step.sigma, y, x0))

    images = sample(denoiser, sampler, noise, label=label, callback=record)
    return Sampled(denoiser, sampler, noise, _array(images, "the denoiser's images"), path)


def _compare(
    name: BaselineName, training: Tensor, sampled: Sampled, sides: Sequence[int | None], step: Callable[..., None]
) -> BaselineAgreement:
    """Compares one baseline; calls `step` at each of its calls."""

    def make(window: int | WindowSchedule | None) -> Denoiser:
        baseline = make_baseline(name, training, window)
        # The same levels, so that the same sampler takes the same steps.
        baseline.levels, baseline.pixel_space = sampled.denoiser.levels, sampled.denoiser.pixel_space
        return baseline

    tried = [_along_path(make(side), sampled.path, step) for side in sides]
    scores, correlations = (np.stack(part, 1) for part in zip(*tried, strict=True))
    levels, windows, chosen = sampled.levels, None, [0] * len(sampled.levels)
    if name not in _WITHOUT_WINDOWS:
        windows = calibrate(levels, [side for side in sides if side is not None], scores)
        chosen = [sides.index(windows.at(sigma)) for sigma in levels]
    drawn = sample(make(windows), sampled.sampler, sampled.noise, callback=step)
    images = _array(drawn, f"images of the baseline {TITLES[name]}")
    return BaselineAgreement(
        name=name,
        correlation=cosines(images, sampled.images),
        r2=r_squared(images, sampled.images),
        mse=mean_squares(images, sampled.images),
        control=_control(sampled.images, images),
        one_step=correlations[np.arange(len(levels)), chosen],
        windows=windows,
        calibration=scores if len(sides) > 1 else None,
        images=images,
    )


@torch.no_grad()
def _along_path(baseline: Denoiser, path: Trajectories, step: Callable[[], None]) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of the two scores and correlations of the two estimates along the path; [levels, trajectories] each."""
    scores, correlations = [], []
    for sigma, y, x0 in path:
        noisy, estimate, network = (part.cpu().double().numpy() for part in (y, baseline(y, sigma), x0))
        scores.append(cosines(estimate - noisy, network - noisy, mean_removed=False))
        correlations.append(cosines(estimate, network))
        step()
    return np.stack(scores), np.stack(correlations)


def _control(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The mean correlation of each image with the other side's images of other noise; 0 for a single image."""
    products = unit_vectors(images) @ unit_vectors(others).T
    others_of_each = len(images) - 1
    return (products.sum(1) - products.diagonal()) / others_of_each if others_of_each else np.zeros(1)


def _array(images: Tensor, what: str) -> np.ndarray:
    array = images.float().cpu().numpy()
    if not np.isfinite(array).all():
        raise DitlabError(f"agreement: {what} are not finite")
    return array


def _notes(denoiser: Denoiser, used: int, trained_on: int, mirrored: bool) -> tuple[str, ...]:
    notes = (
        (used < trained_on, f"Baselines were made of the first {used} of {trained_on} training images."),
        (mirrored, "Training mirrored images, so baselines use each training image and its mirror image."),
        (denoiser.num_classes > 0, "The denoiser got the label 'no class'; baselines take no class."),
        (not denoiser.pixel_space, "Images are latents: correlations, R² and errors are those of latents."),
    )
    return tuple(note for applies, note in notes if applies)
