"""The Jacobian of any denoiser: computed, decomposed, and turned into numbers (`measure_jacobian`).

The parts: `jacobian_operator` has products with it and the whole matrix, `jacobian_decomposition` its values and
vectors, `jacobian_measures` what is read from them, `jacobian_result` what is kept.

Sources: An et al. 2410.21273 (Eq. 5, Figs. 1-3); Kadkhodaie et al., ICLR 2024; Niedoba et al. 2411.19339; Lukoianov et
al. 2509.09672 (the Wiener denoiser's sensitivity beside a network's).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ditlab.analyses.attention.comparison import same_levels
from ditlab.analyses.jacobian.decomposition import (
    Decomposed,
    check_count,
    check_memory,
    decompose,
    decompose_top,
)
from ditlab.analyses.jacobian.measures import (
    LEADING,
    alignment,
    channel_shares,
    edge_energy,
    edge_pixels,
    frequencies,
    harmonicity,
    homogeneity_gap,
    image_correlations,
    linearity_gap,
    matrix_numbers,
    oracle_shrinkage,
    participation,
    sensitivity,
    shrinkage_distance,
    spectrum_numbers,
)
from ditlab.analyses.jacobian.operator import JacobianOperator
from ditlab.analyses.jacobian.result import JacobianConfig, JacobianPoint, JacobianResult, Sensitivity
from ditlab.diffusion.baselines import WienerDenoiser
from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.schedules import make_schedule
from ditlab.errors import DitlabError
from ditlab.memory import available_memory
from ditlab.metrics.denoising_errors import chosen_levels, level_noise, own_steps
from ditlab.provenance import Provenance
from ditlab.rng import numpy_generator, torch_generator

__all__ = [
    "BY_VECTOR",
    "NUMBERS",
    "JacobianConfig",
    "JacobianOperator",
    "JacobianResult",
    "check_differentiable",
    "check_jacobian",
    "jacobian_levels",
    "measure_jacobian",
    "noise_level",
]

DEFAULT_STEPS = (100,)
"""The step of the DDPM process (T = 1000, linear) whose level is looked at by default: sigma 0.34."""
_DEFAULT_LEVELS = tuple(float(sigma) for sigma in make_schedule("linear", 1000).sigmas[list(DEFAULT_STEPS)])

NUMBERS: Mapping[str, str] = MappingProxyType(
    {
        "trace": "sum of the eigenvalues",
        "sum_of_squares": "sum of squared singular values",
        "participation_ratio": "participation ratio of the values",
        "leading_over_median": "leading value over the median one",
        "asymmetry": "|J - J^T| / |J|",
        "negative": "share of negative eigenvalues (eigh)",
        "alignment": "mean |u . v| (svd)",
        "alignment_weighted": "mean |u . v|, weighted by squared singular values (svd)",
        "harmonicity": "rank correlation of frequency with index",
        "harmonicity_leading": f"the same of the {LEADING} leading vectors",
        "harmonicity_shuffled": "harmonicity with the vectors' pixels shuffled, a control",
        "shrinkage_distance": "RMS distance of values to the oracle's shrinkage (x0)",
        "r_hom": "|f - J x| / |f|",
        "r_lin": "|f(x + d) - f(x) - J d| / |f(x + d) - f(x)|",
        "mse": "mean squared error of the estimate of x0",
        "sure": "the same as Stein's unbiased estimate has it, from the trace (x0)",
        "products": "products with the Jacobian or its transpose",
    }
)
"""Name in `JacobianPoint.numbers` -> what it is. Those that a setting leaves without meaning are absent; those
that need the whole matrix are None without it.

r_hom and r_lin: for the target x0, f is D and x is y, both less the denoiser's origin; for eps, f is the estimated
noise and x is x_t = scale * (y - origin); for I-eps f is x less that noise."""

BY_VECTOR: Mapping[str, str] = MappingProxyType(
    {
        "frequency": "mean radial frequency, as a share of Nyquist's",
        "participation": "share of pixels that the vector lives on",
        "edges": "energy on edges of the clean image, over their share of pixels",
        "alignment": "|u . v| (svd)",
        "clean_coefficient": "<u, x0 - origin>",
        "noisy_coefficient": "<v, y - origin>",
        "oracle_shrinkage": "c^2 / (c^2 + sigma^2), c the clean coefficient (x0)",
        "image_correlation": "|correlation| with the clean image",
        "nearest_correlation": "|correlation| with the nearest other training image",
        "others_correlation": f"mean |correlation| with up to {LEADING} further training images, a control",
    }
)
"""Name in `JacobianPoint.by_vector` -> what it is, of the left vector u (the right one is v, the same but for svd)."""


def jacobian_levels(denoiser: Denoiser, config: JacobianConfig) -> tuple[float, ...]:
    """The noise levels that a config stands for on this denoiser, ascending (see `chosen_levels`)."""
    return chosen_levels("jacobian", denoiser, config.levels, config.steps, DEFAULT_STEPS)


def noise_level(sigma: float) -> float:
    """The level whose noise is drawn for this one: itself, or the default one where they count as the same.

    Processes other than DDPM's have a step near the default level, and noise that hangs on the last digit of sigma
    would show each of them another picture.
    """
    return next((level for level in _DEFAULT_LEVELS if same_levels((sigma,), (level,))), sigma)


def check_jacobian(denoiser: Denoiser, count: int, config: JacobianConfig) -> None:
    """Raises DitlabError for settings that do not fit a denoiser and the number of images of a side.

    These are images or pixels that are not there, unknown levels, no vector to keep, more leading vectors than there
    are, and a matrix that would not fit in memory.
    """
    channels, height, width = denoiser.shape
    size = channels * height * width
    jacobian_levels(denoiser, config)
    if max(config.images) >= count:
        raise DitlabError(f"jacobian images: expected places from 0 to {count - 1}, found {max(config.images)}")
    for row, column in config.pixels:
        if row >= height or column >= width:
            raise DitlabError(
                f"jacobian pixels: expected rows below {height} and columns below {width}, found {row},{column}"
            )
    if config.top:
        check_count(config.top, size)
    else:
        check_memory(size, 4, config.decomposition, available_memory())
    if min(config.show) >= (config.top or size):
        raise DitlabError(f"jacobian show: expected vectors below {config.top or size}, found {list(config.show)}")


def check_differentiable(
    denoiser: Denoiser,
    images: Float[Tensor, "n c h w"],
    config: JacobianConfig,
    labels: Int64[Tensor, " n"] | None = None,
) -> None:
    """Raises DitlabError for a denoiser whose Jacobian cannot be taken, as one product at the first image shows.

    That is one that is not differentiable, not finite or not a function (dropout that is not switched off), or wants a
    label and has none. What `measure_jacobian` is to be given; its cost are two runs of the network and one product.
    """
    _operator(denoiser, images, config, labels, config.images[0], jacobian_levels(denoiser, config)[0]).check()


def _operator(
    denoiser: Denoiser, images: Tensor, config: JacobianConfig, labels: Tensor | None, image: int, sigma: float
) -> JacobianOperator:
    """The Jacobian at one noisy image."""
    x0 = images[image : image + 1].float()
    noise = level_noise(config.noise_seed, noise_level(sigma), [image], [0], denoiser.shape)
    label = None if labels is None else labels[image : image + 1].to(denoiser.device)
    return JacobianOperator(denoiser, x0 + sigma * noise.to(x0), sigma, label, config.target)


def measure_jacobian(
    denoiser: Denoiser,
    images: Float[Tensor, "n c h w"],
    config: JacobianConfig | None = None,
    *,
    labels: Int64[Tensor, " n"] | None = None,
    about: Provenance | None = None,
    train: Float[Tensor, "m _ _ _"] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> JacobianResult:
    """The Jacobians of a denoiser at noisy images, y = x0 + sigma n, with all that is read from them.

    Memory: that of the matrix in float32 and of its decomposition in float64 (700 MB for 3x32x32); with `config.top`
    that of a few vectors. On a CPU one product takes about as long as two runs of the network.

    Args:
        denoiser: one in evaluation mode; it is left as it was.
        images: all clean images of a side, in [-1, 1]; `config.images` are places among them, on which the noise
            depends, as it does on the level (`analysis.denoising.level_noise` of `noise_level`).
        config: the settings.
        labels: class of each image for a class-conditional denoiser.
        about: which run this is, kept with the result.
        train: training images, for the nearest one and for the Wiener denoiser; both are left out where not given.
        progress: called as progress(done, total), in rows of all matrices, or in products, whose total is a guess.

    Raises:
        DitlabError: settings that do not fit (`check_jacobian`), a denoiser whose Jacobian cannot be taken
            (`check_differentiable`), values that are not finite, leading values that do not converge.

    Example:
        >>> half = Denoiser.wrap(lambda y, sigma, label: 0.5 * y, shape=(1, 4, 4))
        >>> measure_jacobian(half, torch.zeros(1, 1, 4, 4)).points[0].numbers["trace"]
        8.0
    """
    config = config or JacobianConfig()
    if tuple(images.shape[1:]) != tuple(denoiser.shape):
        raise DitlabError(
            f"jacobian: the denoiser takes images {tuple(denoiser.shape)}, found images {tuple(images.shape[1:])}"
        )
    if train is not None and tuple(train.shape[1:]) != tuple(denoiser.shape):
        raise DitlabError(
            f"jacobian: the denoiser takes images {tuple(denoiser.shape)}, found training images "
            f"{tuple(train.shape[1:])}"
        )
    check_jacobian(denoiser, len(images), config)
    check_differentiable(denoiser, images, config, labels)
    levels = jacobian_levels(denoiser, config)
    steps = own_steps(denoiser, levels)
    whole = not config.top
    wiener = _wiener_sensitivities(denoiser, levels, config, train) if whole and config.target == "x0" else {}
    size = int(np.prod(denoiser.shape))
    points, total = [], len(config.images) * len(levels)
    # Lanczos' method took 3 to 5 products a vector and side here.
    work = size if whole else (4 if config.decomposition in ("eig", "eig-right") else 8) * config.top + 40
    for place, image in enumerate(config.images):
        known = _Known.of(images[image : image + 1].float(), train)
        for level, sigma in enumerate(levels):
            before = work * (place * len(levels) + level)

            def tell(done: int, before: int = before) -> None:
                if progress is not None:
                    progress(before + min(done, work), work * total)

            operator = _operator(denoiser, images, config, labels, image, sigma)
            found = _compute(operator, config, tell)
            timestep = None if steps is None else steps[level]
            points.append(_point(operator, found, known, config, image, timestep, wiener.get(sigma)))
            tell(work)
    return JacobianResult(about or Provenance(name="denoiser"), config, tuple(points))


@dataclass(frozen=True, eq=False)
class _Known:
    """What the vectors at an image are compared with, as float64 [C, H, W]."""

    clean: np.ndarray
    nearest: np.ndarray | None
    """The nearest training image that is another one."""
    others: np.ndarray | None
    """Some further training images, [M, C, H, W]."""

    @staticmethod
    def of(x0: Tensor, train: Tensor | None) -> _Known:
        clean = x0[0].double().cpu().numpy()
        if train is None:
            return _Known(clean, None, None)
        apart = torch.cat([(part - x0.to(part)).double().square().flatten(1).mean(1) for part in train.split(1024)])
        # A tenth of a grey level: the image itself, as far as 8 bits can tell.
        other = apart.sqrt() > 1e-3
        order = torch.argsort(torch.where(other, apart, torch.inf))[: int(other.sum())]
        if not len(order):
            return _Known(clean, None, None)
        nearest = train[order[0]].double().cpu().numpy()
        rest = order[1:].sort().values[:LEADING]
        return _Known(clean, nearest, train[rest].double().cpu().numpy() if len(rest) else None)


@dataclass(frozen=True, eq=False)
class _Computed:
    """The Jacobian of one image at one level."""

    parts: Decomposed
    matrix: np.ndarray | None

    def times(self, operator: JacobianOperator, vector: Tensor) -> np.ndarray:
        """J v, float64 [D]."""
        if self.matrix is not None:
            return self.matrix @ vector.double().cpu().numpy().reshape(-1)
        return operator.forward(vector.reshape(1, -1))[0].double().cpu().numpy()


def _compute(operator: JacobianOperator, config: JacobianConfig, tell: Callable[[int], object]) -> _Computed:
    if config.top:
        seed = config.noise_seed
        parts = decompose_top(operator, config.decomposition, config.top, seed=seed, progress=tell)
        return _Computed(parts, None)
    matrix = operator.matrix(config.chunk, config.mode, tell).double().numpy()
    return _Computed(decompose(matrix, config.decomposition), matrix)


def _point(
    operator: JacobianOperator,
    found: _Computed,
    known: _Known,
    config: JacobianConfig,
    image: int,
    timestep: int | None,
    wiener: Sensitivity | None,
) -> JacobianPoint:
    parts, matrix, shape, sigma = found.parts, found.matrix, operator.denoiser.shape, operator.sigma
    with torch.no_grad():
        denoised = operator.denoiser(operator.y, sigma, operator.label)[0].double().cpu().numpy()
    noisy = operator.y[0].double().cpu().numpy()
    by_vector = _by_vector(parts, known, noisy, operator)
    numbers = spectrum_numbers(parts.values, config.decomposition, whole=matrix is not None)
    nothing = dict.fromkeys(("trace", "sum_of_squares", "asymmetry"))
    numbers |= nothing if matrix is None else matrix_numbers(matrix)
    numbers |= _harmonicities(parts, by_vector["frequency"], shape, config.noise_seed)
    numbers |= _gaps(operator, found, config, image)
    numbers["mse"] = float(((denoised - known.clean) ** 2).mean())
    if config.decomposition == "svd":
        # Where values are negligible the pairs are arbitrary; weights of s^2 leave those out by themselves.
        large, weights = parts.values > 1e-5 * parts.values.max(), parts.values**2
        aligned = by_vector["alignment"]
        numbers["alignment"] = float(aligned[large].mean()) if large.any() else None
        numbers["alignment_weighted"] = float((aligned * weights).sum() / weights.sum()) if large.any() else None
    if config.target == "x0":
        numbers["shrinkage_distance"] = shrinkage_distance(parts.values, by_vector["oracle_shrinkage"])
        trace = numbers["trace"]
        # E|D - x0|^2 = E[2 sigma^2 tr(dD/dy) + |y - D|^2] - sigma^2 D.
        error = float(((noisy - denoised) ** 2).mean())
        numbers["sure"] = None if trace is None else error + sigma**2 * (2 * trace / operator.size - 1)
    numbers["products"] = operator.products
    shown = np.array([k for k in config.show if k < len(parts.values)], dtype=np.int64)
    seen = None
    if matrix is not None and config.target == "x0":
        seen = sensitivity(matrix, shape, config.pixels)
    return JacobianPoint(
        image=image,
        sigma=sigma,
        timestep=timestep,
        clean=known.clean.astype(np.float32),
        noisy=noisy.astype(np.float32),
        denoised=denoised.astype(np.float32),
        values=parts.values,
        residuals=parts.residuals,
        shown=shown,
        left=parts.left[shown].reshape(-1, *shape).astype(np.float32),
        right=parts.right[shown].reshape(-1, *shape).astype(np.float32),
        by_vector=by_vector,
        channels=channel_shares(parts.left, shape),
        numbers=numbers,
        sensitivity=seen,
        wiener=wiener,
    )


def _by_vector(
    parts: Decomposed, known: _Known, noisy: np.ndarray, operator: JacobianOperator
) -> dict[str, np.ndarray]:
    shape, origin, left = operator.denoiser.shape, operator.denoiser.origin, parts.left
    clean = left @ (known.clean - origin).reshape(-1)
    found = {
        "frequency": frequencies(left, shape),
        "participation": participation(left, shape),
        "edges": edge_energy(left, edge_pixels(known.clean), shape),
        "clean_coefficient": clean,
        "noisy_coefficient": parts.right @ (noisy - origin).reshape(-1),
        "image_correlation": image_correlations(left, known.clean),
    }
    if parts.right is not left:
        found["alignment"] = alignment(left, parts.right)
    if operator.target == "x0":
        found["oracle_shrinkage"] = oracle_shrinkage(clean, operator.sigma)
    if known.nearest is not None:
        found["nearest_correlation"] = image_correlations(left, known.nearest)
    if known.others is not None:
        found["others_correlation"] = np.mean([image_correlations(left, other) for other in known.others], axis=0)
    return found


def _harmonicities(
    parts: Decomposed, frequency: np.ndarray, shape: tuple[int, int, int], seed: int
) -> dict[str, float | None]:
    channels, height, width = shape
    order = numpy_generator(seed, "jacobian", "shuffle").permutation(height * width)
    shuffled = parts.left.reshape(-1, channels, height * width)[:, :, order].reshape(len(parts.left), -1)
    return {
        "harmonicity": harmonicity(parts.values, frequency),
        "harmonicity_leading": harmonicity(parts.values, frequency, LEADING),
        "harmonicity_shuffled": harmonicity(parts.values, frequencies(shuffled, shape)),
    }


def _gaps(operator: JacobianOperator, found: _Computed, config: JacobianConfig, image: int) -> dict[str, float | None]:
    """r_hom and r_lin; see `NUMBERS` for what f and x are."""
    y, origin = operator.y, operator.denoiser.origin
    # By which of y and x_t the target is differentiated, and what f has of the origin.
    unit = 1.0 if operator.target == "x0" else operator.scale
    shift = {"x0": origin, "eps": 0.0, "I-eps": operator.scale * origin}[operator.target]
    value = operator.function(y).double().cpu().numpy()
    generator = torch_generator(config.noise_seed, "jacobian", "step", f"{noise_level(operator.sigma):.6g}", image)
    step = torch.randn(y.shape, generator=generator).to(y) * (config.step_size * operator.sigma)
    change = operator.function(y + step).double().cpu().numpy() - value
    return {
        "r_hom": homogeneity_gap(value - shift, found.times(operator, unit * (y - origin))),
        "r_lin": linearity_gap(change, found.times(operator, unit * step)),
    }


def _wiener_sensitivities(
    denoiser: Denoiser, levels: tuple[float, ...], config: JacobianConfig, train: Tensor | None
) -> dict[float, Sensitivity]:
    """Of the Wiener denoiser of the training images, at each level; its Jacobian is U diag(l / (l + sigma^2)) U^T."""
    if train is None:
        return {}
    wiener = WienerDenoiser(train)
    basis, variances = wiener.basis, wiener.variances
    return {
        sigma: sensitivity(
            ((basis * (variances / (variances + sigma**2))) @ basis.T).cpu().numpy(), denoiser.shape, config.pixels
        )
        for sigma in levels
    }
