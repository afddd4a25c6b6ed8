"""What every analysis by noise level stands on: the grid, the noise, and a denoiser's errors on a set of images.

Everything is in variance-exploding coordinates, y = x0 + sigma n, where An et al.'s (2410.21273) Eq. 3 is exact for
every kind of diffusion model. Every denoiser sees the same noise, a function of (seed, image, level, draw) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.noise_levels import DiscreteLevels
from ditlab.diffusion.schedules import make_schedule, respace
from ditlab.errors import DitlabError
from ditlab.rng import torch_generator


def chosen_levels(
    what: str,
    denoiser: Denoiser,
    levels: Sequence[float] | None,
    steps: Sequence[int] | None,
    default_steps: Sequence[int],
) -> tuple[float, ...]:
    """The noise levels that settings of the analysis `what` stand for on a denoiser, ascending.

    These are `levels`, or those of `steps` of the denoiser's own process, or else those of `default_steps` of the DDPM
    process (T = 1000, linear): of numbered levels the nearest ones, of a range those inside.

    Raises:
        DitlabError: steps that the denoiser does not have, or levels outside its range.
    """
    known = denoiser.levels
    if steps is not None:
        if not isinstance(known, DiscreteLevels):
            raise DitlabError(f"{what}: expected `sigmas`, for this denoiser has no numbered steps, found `timesteps`")
        place = {int(step): float(sigma) for step, sigma in zip(known.steps, known.sigmas, strict=True)}
        for step in steps:
            if step not in place:
                raise DitlabError(f"{what}: expected `timesteps` from {min(place)} to {max(place)}, found {step}")
        return tuple(place[step] for step in steps)
    if levels is not None:
        denoiser.check_levels(np.asarray(levels))
        return tuple(levels)
    if isinstance(known, DiscreteLevels):
        wanted = make_schedule("linear", 1000).sigmas[list(default_steps)]
        return tuple(sorted({known.nearest(sigma) for sigma in wanted}))
    inside = _levels_of_ddpm(denoiser, default_steps)
    if not inside:
        raise DitlabError(f"{what}: no default noise level is in the denoiser's range; give `sigmas`")
    return inside


def grid_levels(denoiser: Denoiser, points: int = 50) -> tuple[float, ...]:
    """The default grid: `points` levels spread evenly over the steps of the denoiser's own process, both ends included
    (0, 20, 41, ..., 979, 999 for 50 of 1000), or all of them where it has fewer.

    A denoiser that knows a continuous range gets the grid of the DDPM process (T = 1000, linear), as far as it lies
    inside its range, so that its curve shares the axis of the paper.
    """
    if isinstance(denoiser.levels, DiscreteLevels):
        return tuple(denoiser.levels.grid(min(points, len(denoiser.levels))).tolist())
    return _levels_of_ddpm(denoiser, respace(1000, min(points, 1000)))


def _levels_of_ddpm(denoiser: Denoiser, steps: Iterable[int]) -> tuple[float, ...]:
    """The levels of steps of the DDPM process (T = 1000, linear) that lie in a denoiser's range."""
    sigmas = make_schedule("linear", 1000).sigmas[list(steps)].tolist()
    return tuple(sigma for sigma in sigmas if denoiser.levels.min <= sigma <= denoiser.levels.max)


def own_steps(denoiser: Denoiser, levels: Sequence[float]) -> tuple[int, ...] | None:
    """The numbered steps of the denoiser's own process with these levels [L], or None where it has none with them."""
    if not isinstance(denoiser.levels, DiscreteLevels):
        return None
    sigmas = denoiser.levels.sigmas
    nearest = [int(np.abs(sigmas - s).argmin()) for s in levels]
    if not np.allclose(sigmas[nearest], levels, rtol=1e-6, atol=0.0):
        return None
    return tuple(denoiser.levels.steps[nearest].tolist())


def level_noise(
    noise_seed: int, sigma: float, images: Sequence[int], draws: Sequence[int], shape: tuple[int, int, int]
) -> Float[Tensor, "b c h w"]:
    """Unit-normal noise for (image, draw) pairs at one level, float32 [B, C, H, W] on the CPU.

    Each is a pure function of (noise_seed, sigma, image's place on its side, draw), whatever the grid, the batch and
    the denoiser. The k-th training and the k-th test image share theirs, which lowers the variance of the gap.
    """
    generators = (
        torch_generator(noise_seed, "psnr", f"{sigma:.6g}", image, draw)
        for image, draw in zip(images, draws, strict=True)
    )
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


@torch.inference_mode()
def denoising_errors(
    denoiser: Denoiser,
    images: Float[Tensor, "n c h w"],
    levels: Sequence[float],
    *,
    noise_seed: int = 0,
    draws: int = 1,
    labels: Int64[Tensor, " n"] | None = None,
    clip: bool = False,
    batch_size: int = 100,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Mean squared errors of the estimates at every level, for every image and noise draw, float64 [L, N, draws].

    Args:
        denoiser: the contract; a network inside must be in evaluation mode.
        images: float32 [N, C, H, W] in [-1, 1], or scaled latents.
        levels: noise levels sigma [L].
        noise_seed: see `level_noise`.
        draws: noise draws per image and level.
        labels: int64 [N], or None for no label.
        clip: clip estimates to [-1, 1] first; not for latents.
        batch_size: images at once.
        progress: called with the number of images denoised so far.

    Raises:
        DitlabError: an estimate has another shape than its image, or is not finite; latents are to be clipped.
    """
    if clip:
        denoiser.require_pixel_space("psnr-gap: clip")
    if tuple(images.shape[1:]) != tuple(denoiser.shape):
        raise DitlabError(
            f"psnr-gap: the denoiser takes images {tuple(denoiser.shape)}, found images {tuple(images.shape[1:])}"
        )
    count = len(images) * draws
    errors = np.empty((len(levels), count))
    for row, sigma in enumerate(levels):
        for start in range(0, count, batch_size):
            # Pairs in row-major order of (image, draw), so that a batch may span several draws of few images.
            which, draw = np.divmod(np.arange(start, min(start + batch_size, count)), draws)
            x0 = images[which].to(denoiser.device)
            noise = level_noise(noise_seed, sigma, which.tolist(), draw.tolist(), denoiser.shape)
            label = None if labels is None else labels[which].to(denoiser.device)
            estimate = denoiser(x0 + sigma * noise.to(x0), sigma, label)
            if estimate.shape != x0.shape:
                raise DitlabError(
                    f"psnr-gap: expected estimates of shape {tuple(x0.shape)}, found {tuple(estimate.shape)}"
                )
            if clip:
                estimate = estimate.clamp(-denoiser.peak / 2, denoiser.peak / 2)
            squares = (estimate.double() - x0.double()).square().flatten(1)
            errors[row, start : start + len(which)] = squares.mean(1).cpu().numpy()
            if progress is not None:
                progress(row * count + start + len(which))
        if not np.isfinite(errors[row]).all():
            raise DitlabError(f"psnr-gap: the denoiser's estimates at noise level {sigma:.4g} are not finite")
    return errors.reshape(len(levels), len(images), draws)
