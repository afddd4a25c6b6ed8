"""Agreement: does a trained denoiser draw the images that a closed-form one draws from the same noise?

All of them start from equal noise and take the same steps of a deterministic sampler on the network's own noise levels.
The final images are compared in pairs, by their correlation and by R^2. Beside it stands the same of images from other
noise: faces are alike, whoever draws them.

The windows of Kamb and Ganguli's machines are calibrated as theirs were: on paths of the network from noise to image,
at each level the odd side whose score has the highest cosine with the network's, the median over the paths. In these
coordinates the score is (D(y) - y) / sigma^2.

Sources: Kamb and Ganguli, 2412.20292 (machines, scales, correlation; 20 steps); Lukoianov et al., 2509.09672 (R^2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ditlab.analyses.agreement.result import (
    WORDS,
    AgreementConfig,
    AgreementResult,
    Reference,
    ReferenceAgreement,
)
from ditlab.diffusion.baselines import EmpiricalBayesDenoiser, WienerDenoiser, WienerLocalityDenoiser
from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.local_scores import EquivariantLocalScoreDenoiser, LocalScoreDenoiser, WindowSchedule
from ditlab.diffusion.samplers import DDIMConfig, HeunConfig, ImageNoise, SamplerConfig, evaluations, sample
from ditlab.errors import DitlabError
from ditlab.metrics.similarity import cosines, mean_squares, r_squared, unit_vectors
from ditlab.provenance import Provenance

WINDOWED: tuple[Reference, ...] = ("ls", "els", "bbels")
"""Those that look through a window."""

Progress = Callable[[int, int], object]


class PathPoint(NamedTuple):
    """Where the network's paths were at one level."""

    sigma: float
    y: Tensor
    """The noisy images, float32 [trajectories, C, H, W]."""
    x0: Tensor
    """What the network took them for, the same shape."""


def make_reference(
    name: Reference, images: Float[Tensor, "n c h w"], window: int | WindowSchedule | None = None
) -> Denoiser:
    """A reference made of training images.

    Args:
        name: which.
        images: in [-1, 1], or scaled latents.
        window: the side of its windows, for those that have some.

    Raises:
        DitlabError: one that looks through windows was given none.
    """
    if name not in WINDOWED:
        kinds = {
            "empirical-bayes": EmpiricalBayesDenoiser,
            "wiener": WienerDenoiser,
            "wiener-locality": WienerLocalityDenoiser,
        }
        return kinds[name](images)
    if window is None:
        raise DitlabError(f"reference {WORDS[name]}: expected the side of its windows, found none")
    if name == "ls":
        return LocalScoreDenoiser(images, window)
    return EquivariantLocalScoreDenoiser(images, window, "circular" if name == "els" else "broken")


def calibrated(
    levels: Sequence[float], candidates: Sequence[int], scores: Float[np.ndarray, "levels candidates trajectories"]
) -> WindowSchedule:
    """The side of the windows at each level: for each path the candidate with the highest cosine, then their median.

    Of an even number of paths it is the lower of the two middle ones, so that it is one of the candidates. A level
    that occurs twice (Heun's corrections are not looked at) is one.

    Args:
        levels: noise levels, in any order.
        candidates: odd sides, ascending.
        scores: cosine of the machine's and the network's score.
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
    progress: Progress = lambda done, total: None,
) -> AgreementResult:
    """A denoiser beside references of its training images.

    Args:
        denoiser: a trained one. Where it takes classes it is told none.
        images: its training images as it sees them, in their order.
        config: which references, and how they are compared.
        about: which denoiser, trained on what.
        mirrored: the same images left to right reversed, where training mirrored them: references know them too.
        progress: told how many calls of references are done, of how many.

    Raises:
        DitlabError: a denoiser of other images, or that cannot do without a class; windows that do not fit; images
            that are not finite.
    """
    check_agreement(denoiser, config)
    if tuple(images.shape[1:]) != tuple(denoiser.shape):
        raise DitlabError(
            f"agreement: the denoiser takes images {tuple(denoiser.shape)}, found images {tuple(images.shape[1:])}"
        )
    sampler, sizes = sampler_of(config), _sizes(config, denoiser)
    known = images[: config.training_images]
    count_known = len(known)
    if mirrored is not None:
        known = torch.cat([known, mirrored[: config.training_images]])
    known = known.to(denoiser.device)
    noise = ImageNoise(range(config.images), denoiser.shape).initial()
    label = torch.full((len(noise),), denoiser.num_classes) if denoiser.num_classes else None
    points: list[PathPoint] = []
    kept = min(config.trajectories, config.images)
    drawn = sample(
        denoiser,
        sampler,
        noise,
        label=label,
        callback=lambda step: points.append(
            PathPoint(step.sigma, step.y[:kept].float().clone(), step.x0[:kept].float().clone())
        ),
    )
    mine = _array(drawn, "the denoiser's images")
    count = _Count(progress, sum(len(points) * (1 + len(sizes[name])) for name in config.references))
    found = [_compare(name, known, denoiser, sampler, noise, mine, points, sizes[name], count) for name in sizes]
    return AgreementResult(
        about=about,
        config=config,
        levels=tuple(point.sigma for point in points),
        references=tuple(found),
        training_images=count_known,
        shape=denoiser.shape,
        notes=_notes(denoiser, count_known, max(len(images), about.n or 0), mirrored is not None),
        images=mine,
    )


def check_agreement(denoiser: Denoiser, config: AgreementConfig) -> None:
    """Raises DitlabError where `measure_agreement` could not compare this denoiser, whatever its training images."""
    if denoiser.num_classes and not denoiser.null_class:
        raise DitlabError(
            "agreement: references know no classes; expected an unconditional denoiser, or one that knows 'no class'"
        )
    _sizes(config, denoiser)
    evaluations(sampler_of(config), denoiser)


def sampler_of(config: AgreementConfig) -> SamplerConfig:
    """The sampler that all of them take; on the network's own steps where it has numbered ones."""
    if config.sampler == "ddim":
        return DDIMConfig(steps=str(config.sampler_steps))
    return HeunConfig(steps=config.sampler_steps, levels="grid", second_order=config.sampler == "heun")


def _sizes(config: AgreementConfig, denoiser: Denoiser) -> dict[Reference, tuple[int | None, ...]]:
    """The sides to try for each reference; (None,) for one without windows."""
    side = min(denoiser.shape[1:])
    fitting = tuple(size for size in config.candidates if size <= side)
    if config.window is not None:
        if config.window > side:
            raise DitlabError(
                f"agreement --window: expected at most {side}, the images' side in pixels, found {config.window}"
            )
        fitting = (config.window,)
    if not fitting and any(name in WINDOWED for name in config.references):
        raise DitlabError(
            f"agreement --candidates: expected one of at most {side}, the images' side in pixels, found "
            f"{list(config.candidates)}"
        )
    return {name: fitting if name in WINDOWED else (None,) for name in config.references}


class _Count:
    """Counts calls of references."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        progress(0, total)

    def __call__(self, step: object = None) -> None:
        self._done += 1
        self._progress(self._done, self._total)


def _compare(
    name: Reference,
    known: Tensor,
    denoiser: Denoiser,
    sampler: SamplerConfig,
    noise: Tensor,
    mine: np.ndarray,
    points: Sequence[PathPoint],
    sizes: Sequence[int | None],
    count: _Count,
) -> ReferenceAgreement:
    """One reference; see `measure_agreement`."""

    def made(window: int | WindowSchedule | None) -> Denoiser:
        reference = make_reference(name, known, window)
        # The same levels, so that the same sampler takes the same steps.
        reference.levels, reference.pixel_space = denoiser.levels, denoiser.pixel_space
        return reference

    tried = [_on_the_path(made(size), points, count) for size in sizes]
    scores = np.stack([score for score, _ in tried], 1)
    likeness = np.stack([step for _, step in tried], 1)
    levels = [point.sigma for point in points]
    windows = None
    if name in WINDOWED:
        windows = calibrated(levels, [size for size in sizes if size is not None], scores)
        chosen = [sizes.index(windows.at(sigma)) for sigma in levels]
    else:
        chosen = [0] * len(levels)
    drawn = _array(sample(made(windows), sampler, noise, callback=count), f"images of the reference {WORDS[name]}")
    return ReferenceAgreement(
        name=name,
        correlation=cosines(drawn, mine),
        r2=r_squared(drawn, mine),
        mse=mean_squares(drawn, mine),
        control=_with_others(mine, drawn),
        one_step=likeness[np.arange(len(levels)), chosen],
        windows=windows,
        calibration=scores if len(sizes) > 1 else None,
        images=drawn,
    )


@torch.no_grad()
def _on_the_path(reference: Denoiser, points: Sequence[PathPoint], count: _Count) -> tuple[np.ndarray, np.ndarray]:
    """At each level and for each path: cosine of both scores, correlation of both estimates; [levels, trajectories]."""
    scores, likeness = [], []
    for sigma, y, x0 in points:
        theirs = reference(y, sigma)
        noisy, estimate, network = (one.cpu().double().numpy() for one in (y, theirs, x0))
        scores.append(cosines(estimate - noisy, network - noisy, mean_removed=False))
        likeness.append(cosines(estimate, network))
        count()
    return np.stack(scores), np.stack(likeness)


def _with_others(mine: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The mean correlation of each image of one side with those of the other that come from other noise."""
    products = unit_vectors(mine) @ unit_vectors(drawn).T
    others = len(mine) - 1
    return (products.sum(1) - products.diagonal()) / others if others else np.zeros(1)


def _array(images: Tensor, what: str) -> np.ndarray:
    found = images.float().cpu().numpy()
    if not np.isfinite(found).all():
        raise DitlabError(f"agreement: {what} are not finite")
    return found


def _notes(denoiser: Denoiser, known: int, trained_on: int, mirrored: bool) -> tuple[str, ...]:
    notes = []
    if known < trained_on:
        notes.append(f"References were made of the first {known} of {trained_on} training images.")
    if mirrored:
        notes.append("Training mirrored images left to right, so references know each of them both ways.")
    if denoiser.num_classes:
        notes.append("The denoiser was told no class; references know none.")
    if not denoiser.pixel_space:
        notes.append("Images are latents: correlations, R² and errors are those of latents.")
    return tuple(notes)
