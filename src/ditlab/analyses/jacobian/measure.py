"""The Jacobian of any denoiser: computed, decomposed, and turned into numbers (`measure_jacobian`).

The parts: `operator` has products with it and the whole matrix, `decomposition` its values and vectors, `measures` the
numbers that follow from them, `result` what is saved. `job` measures a whole model, image by image.

Sources: An et al. 2410.21273 (Eq. 5, Figs. 1-3); Kadkhodaie et al., ICLR 2024; Niedoba et al. 2411.19339; Lukoianov et
al. 2509.09672 (the Wiener denoiser's sensitivity beside a network's).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ditlab.analyses.jacobian import measures
from ditlab.analyses.jacobian.config import JacobianConfig
from ditlab.analyses.jacobian.decomposition import Decomposition, check_count, check_memory, decompose, decompose_top
from ditlab.analyses.jacobian.measures import LEADING
from ditlab.analyses.jacobian.operator import JacobianOperator
from ditlab.analyses.jacobian.result import JacobianPoint, JacobianResult, Sensitivity
from ditlab.diffusion.baselines import WienerDenoiser
from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.schedules import make_schedule
from ditlab.errors import Incompatible, InvalidConfig
from ditlab.memory import available_memory
from ditlab.metrics.denoising_errors import chosen_levels, level_noise, own_steps
from ditlab.provenance import Provenance
from ditlab.rng import numpy_generator, torch_generator

__all__ = ["BY_VECTOR", "NUMBERS", "check_jacobian", "jacobian_levels", "measure_jacobian", "noise_level"]

DEFAULT_STEPS = (100,)
"""The step of the DDPM process (T = 1000, linear) that gives the default noise level: sigma 0.34."""
_DEFAULT_LEVELS = tuple(float(sigma) for sigma in make_schedule("linear", 1000).sigmas[list(DEFAULT_STEPS)])

NUMBERS: Mapping[str, str] = {
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
    "sure": "Stein's unbiased estimate of mse, from the trace (x0)",
    "products": "products with the Jacobian or its transpose",
}
"""Name in `JacobianPoint.numbers` -> what it is. Numbers without meaning for the settings are absent; numbers that need
the whole matrix are None without it.

r_hom and r_lin: for the target x0, f is D and x is y, both minus the denoiser's origin; for eps, f is the estimated
noise and x is x_t = scale * (y - origin); for I-eps f is x minus that noise."""

BY_VECTOR: Mapping[str, str] = {
    "frequency": "mean radial frequency, as a share of Nyquist's",
    "participation": "share of the pixels that the vector covers",
    "edges": "energy on edges of the clean image, over their share of pixels",
    "alignment": "|u . v| (svd)",
    "clean_coefficient": "<u, x0 - origin>",
    "noisy_coefficient": "<v, y - origin>",
    "oracle_shrinkage": "c^2 / (c^2 + sigma^2), c the clean coefficient (x0)",
    "image_correlation": "|correlation| with the clean image",
    "nearest_correlation": "|correlation| with the nearest other training image",
    "others_correlation": f"mean |correlation| with up to {LEADING} further training images, a control",
}
"""Name in `JacobianPoint.by_vector` -> what it is, of the left vector u (v is the right one; v = u for all but svd)."""


def jacobian_levels(denoiser: Denoiser, config: JacobianConfig) -> tuple[float, ...]:
    """Returns the noise levels that a config means on this denoiser, ascending (see `chosen_levels`)."""
    return chosen_levels("jacobian", denoiser, config.sigmas, config.timesteps, DEFAULT_STEPS)


def noise_level(sigma: float) -> float:
    """Returns the level whose noise is drawn for this one: the default level within one per cent of it, else itself.

    Processes other than DDPM's have a step near the default level. Noise that depends on the last digit of sigma would
    give each process a different image.
    """
    return next((level for level in _DEFAULT_LEVELS if abs(sigma - level) <= 1e-2 * level), sigma)


def check_jacobian(
    denoiser: Denoiser, images: Tensor, config: JacobianConfig, labels: Tensor | None
) -> tuple[float, ...]:
    """Returns the noise levels, after checking that the Jacobians of `measure_jacobian` can be computed.

    Costs two runs of the network and one product, at the first image.

    Raises:
        DitlabError: images or pixels that do not exist, unknown levels, no vector to save, too many leading vectors, a
            matrix that would not fit in memory; a denoiser that is not differentiable, not finite or random (dropout in
            training mode), or that needs a label and gets none.
    """
    channels, height, width = denoiser.shape
    size = channels * height * width
    levels = jacobian_levels(denoiser, config)
    if max(config.images) >= len(images):
        raise InvalidConfig(
            f"jacobian: `images` must be places from 0 to {len(images) - 1}, found {max(config.images)}"
        )
    for row, column in config.pixels:
        if row >= height or column >= width:
            raise InvalidConfig(
                f"jacobian: `pixels` must be rows below {height} and columns below {width}, found {row},{column}"
            )
    if config.top:
        check_count(config.top, size)
    else:
        check_memory(size, 4, config.decomposition, available_memory())
    if min(config.show) >= (config.top or size):
        raise InvalidConfig(
            f"jacobian: `show` must have a vector below {config.top or size}, found {list(config.show)}"
        )
    _operator(denoiser, images, config, labels, config.images[0], levels[0]).check()
    return levels


def _operator(
    denoiser: Denoiser, images: Tensor, config: JacobianConfig, labels: Tensor | None, image: int, sigma: float
) -> JacobianOperator:
    """Returns the Jacobian at one noisy image."""
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
    """Measures the Jacobians of a denoiser at noisy images, y = x0 + sigma n.

    Memory: the matrix in float32 and its decomposition in float64 (700 MB for 3x32x32); a few vectors with
    `config.top`. On a CPU one product takes about as long as two runs of the network.

    Args:
        denoiser: a denoiser in evaluation mode; it is not changed.
        images: all clean images of a side, in [-1, 1]; `config.images` are places among them. The noise depends on the
            place and on the level (`ditlab.metrics.denoising_errors.level_noise` of `noise_level`).
        config: the settings.
        labels: class of each image for a class-conditional denoiser.
        about: which model this is, saved with the result.
        train: training images, for the nearest one and for the Wiener denoiser; both are omitted if None.
        progress: called as progress(done, total), in rows of all matrices, or in products, whose total is a guess.

    Raises:
        DitlabError: settings that do not fit, a denoiser whose Jacobian cannot be computed (`check_jacobian`), values
            that are not finite, leading values that do not converge.

    Example:
        >>> half = Denoiser.wrap(lambda y, sigma, label: 0.5 * y, shape=(1, 4, 4))
        >>> measure_jacobian(half, torch.zeros(1, 1, 4, 4)).points[0].numbers["trace"]
        8.0
    """
    config = config or JacobianConfig()
    for what, side in (("images", images), ("training images", train)):
        if side is not None and tuple(side.shape[1:]) != tuple(denoiser.shape):
            raise Incompatible(
                f"jacobian: the denoiser takes images {tuple(denoiser.shape)}, found {what} {tuple(side.shape[1:])}"
            )
    levels = check_jacobian(denoiser, images, config, labels)
    steps = own_steps(denoiser, levels)
    whole = not config.top
    wiener = _wiener_sensitivities(denoiser, levels, config, train) if whole and config.target == "x0" else {}
    size = int(np.prod(denoiser.shape))
    points, total = [], len(config.images) * len(levels)
    # Lanczos' method needed 3 to 5 products for each vector and side in our measurements.
    work = size if whole else (4 if config.decomposition in ("eig", "eig-right") else 8) * config.top + 40
    for place, image in enumerate(config.images):
        compared = _compared_images(images[image : image + 1].float(), train)
        for level, sigma in enumerate(levels):
            before = work * (place * len(levels) + level)

            def on_progress(done: int, before: int = before) -> None:
                if progress is not None:
                    progress(before + min(done, work), work * total)

            operator = _operator(denoiser, images, config, labels, image, sigma)
            parts, matrix = _decompose(operator, config, on_progress)
            timestep = None if steps is None else steps[level]
            points.append(_point(operator, parts, matrix, compared, config, image, timestep, wiener.get(sigma)))
            on_progress(work)
    return JacobianResult(about or Provenance(name="denoiser"), config, tuple(points))


@dataclass(frozen=True, eq=False)
class _ComparedImages:
    """The images that vectors are compared with, float64 [C, H, W]."""

    clean: np.ndarray
    nearest: np.ndarray | None = None
    """The nearest training image that is not the clean image itself."""
    others: np.ndarray | None = None
    """Further training images, [M, C, H, W]."""


def _compared_images(x0: Tensor, train: Tensor | None) -> _ComparedImages:
    clean = x0[0].double().cpu().numpy()
    if train is None:
        return _ComparedImages(clean)
    errors = torch.cat([(part - x0.to(part)).double().square().flatten(1).mean(1) for part in train.split(1024)])
    # Below a tenth of a grey level it is the same 8-bit image.
    other = errors.sqrt() > 1e-3
    order = torch.argsort(torch.where(other, errors, torch.inf))[: int(other.sum())]
    if not len(order):
        return _ComparedImages(clean)
    rest = order[1:].sort().values[:LEADING]
    nearest, others = (train[places].double().cpu().numpy() for places in (order[0], rest))
    return _ComparedImages(clean, nearest, others if len(rest) else None)


def _decompose(
    operator: JacobianOperator, config: JacobianConfig, on_progress: Callable[[int], object]
) -> tuple[Decomposition, np.ndarray | None]:
    """Returns values and vectors, and the matrix [D, D] unless only the leading ones are computed."""
    if config.top:
        seed = config.noise_seed
        return decompose_top(operator, config.decomposition, config.top, seed=seed, progress=on_progress), None
    matrix = operator.matrix(config.chunk, config.mode, on_progress).double().numpy()
    return decompose(matrix, config.decomposition), matrix


def _point(
    operator: JacobianOperator,
    parts: Decomposition,
    matrix: np.ndarray | None,
    compared: _ComparedImages,
    config: JacobianConfig,
    image: int,
    timestep: int | None,
    wiener: Sensitivity | None,
) -> JacobianPoint:
    shape, sigma = operator.denoiser.shape, operator.sigma
    with torch.no_grad():
        denoised = operator.denoiser(operator.y, sigma, operator.label)[0].double().cpu().numpy()
    noisy = operator.y[0].double().cpu().numpy()
    by_vector = _by_vector(parts, compared, noisy, operator)
    numbers = measures.spectrum_numbers(parts.values, config.decomposition, whole=matrix is not None)
    unknown = dict.fromkeys(("trace", "sum_of_squares", "asymmetry"))
    numbers |= unknown if matrix is None else measures.matrix_numbers(matrix)
    numbers |= _harmonicities(parts, by_vector["frequency"], shape, config.noise_seed)
    numbers |= _gaps(operator, matrix, config, image)
    numbers["mse"] = float(((denoised - compared.clean) ** 2).mean())
    if config.decomposition == "svd":
        # Pairs with negligible values are arbitrary; weights of s^2 make them negligible too.
        large, weights = parts.values > 1e-5 * parts.values.max(), parts.values**2
        aligned = by_vector["alignment"]
        numbers["alignment"] = float(aligned[large].mean()) if large.any() else None
        numbers["alignment_weighted"] = float((aligned * weights).sum() / weights.sum()) if large.any() else None
    by_pixel = None
    if config.target == "x0":
        numbers["shrinkage_distance"] = measures.shrinkage_distance(parts.values, by_vector["oracle_shrinkage"])
        trace = numbers["trace"]
        # E|D - x0|^2 = E[2 sigma^2 tr(dD/dy) + |y - D|^2] - sigma^2 D.
        error = float(((noisy - denoised) ** 2).mean())
        numbers["sure"] = None if trace is None else error + sigma**2 * (2 * trace / operator.size - 1)
        by_pixel = None if matrix is None else measures.sensitivity(matrix, shape, config.pixels)
    numbers["products"] = operator.products
    saved = np.array([k for k in config.show if k < len(parts.values)], dtype=np.int64)
    return JacobianPoint(
        image=image,
        sigma=sigma,
        timestep=timestep,
        clean=compared.clean.astype(np.float32),
        noisy=noisy.astype(np.float32),
        denoised=denoised.astype(np.float32),
        values=parts.values,
        residuals=parts.residuals,
        shown=saved,
        left=parts.left[saved].reshape(-1, *shape).astype(np.float32),
        right=parts.right[saved].reshape(-1, *shape).astype(np.float32),
        by_vector=by_vector,
        channels=measures.channel_shares(parts.left, shape),
        numbers=numbers,
        sensitivity=by_pixel,
        wiener=wiener,
    )


def _by_vector(
    parts: Decomposition, compared: _ComparedImages, noisy: np.ndarray, operator: JacobianOperator
) -> dict[str, np.ndarray]:
    """Returns the measures of `BY_VECTOR` that have a meaning here."""
    shape, origin, left = operator.denoiser.shape, operator.denoiser.origin, parts.left
    clean = left @ (compared.clean - origin).reshape(-1)
    measured = {
        "frequency": measures.frequencies(left, shape),
        "participation": measures.participation(left, shape),
        "edges": measures.edge_energy(left, measures.edge_pixels(compared.clean), shape),
        "clean_coefficient": clean,
        "noisy_coefficient": parts.right @ (noisy - origin).reshape(-1),
        "image_correlation": measures.image_correlations(left, compared.clean),
    }
    if parts.right is not left:
        measured["alignment"] = measures.alignment(left, parts.right)
    if operator.target == "x0":
        measured["oracle_shrinkage"] = measures.oracle_shrinkage(clean, operator.sigma)
    if compared.nearest is not None:
        measured["nearest_correlation"] = measures.image_correlations(left, compared.nearest)
    if compared.others is not None:
        correlations = [measures.image_correlations(left, other) for other in compared.others]
        measured["others_correlation"] = np.mean(correlations, axis=0)
    return measured


def _harmonicities(
    parts: Decomposition, frequency: np.ndarray, shape: tuple[int, int, int], seed: int
) -> dict[str, float | None]:
    channels, height, width = shape
    order = numpy_generator(seed, "jacobian", "shuffle").permutation(height * width)
    shuffled = parts.left.reshape(-1, channels, height * width)[:, :, order].reshape(len(parts.left), -1)
    return {
        "harmonicity": measures.harmonicity(parts.values, frequency),
        "harmonicity_leading": measures.harmonicity(parts.values, frequency, LEADING),
        "harmonicity_shuffled": measures.harmonicity(parts.values, measures.frequencies(shuffled, shape)),
    }


def _gaps(
    operator: JacobianOperator, matrix: np.ndarray | None, config: JacobianConfig, image: int
) -> dict[str, float | None]:
    """Returns r_hom and r_lin; see `NUMBERS` for f and x."""
    y, origin = operator.y, operator.denoiser.origin
    # The target is differentiated by y (x0) or by x_t; `shift` is the origin's part of f.
    unit = 1.0 if operator.target == "x0" else operator.scale
    shift = {"x0": origin, "eps": 0.0, "I-eps": operator.scale * origin}[operator.target]
    value = operator.function(y).double().cpu().numpy()
    generator = torch_generator(config.noise_seed, "jacobian", "step", f"{noise_level(operator.sigma):.6g}", image)
    step = torch.randn(y.shape, generator=generator).to(y) * (config.step_size * operator.sigma)
    change = operator.function(y + step).double().cpu().numpy() - value

    def product(vector: Tensor) -> np.ndarray:
        """J v, float64 [D]."""
        if matrix is not None:
            return matrix @ vector.double().cpu().numpy().reshape(-1)
        return operator.forward(vector.reshape(1, -1))[0].double().cpu().numpy()

    return {
        "r_hom": measures.relative_gap(value - shift, product(unit * (y - origin))),
        "r_lin": measures.relative_gap(change, product(unit * step)),
    }


def _wiener_sensitivities(
    denoiser: Denoiser, levels: tuple[float, ...], config: JacobianConfig, train: Tensor | None
) -> dict[float, Sensitivity]:
    """Returns level -> sensitivity of the Wiener denoiser of the training images: J = U diag(l / (l + sigma^2)) U^T."""
    if train is None:
        return {}
    wiener = WienerDenoiser(train)
    basis, variances = wiener.basis, wiener.variances
    return {
        sigma: measures.sensitivity(
            ((basis * (variances / (variances + sigma**2))) @ basis.T).cpu().numpy(), denoiser.shape, config.pixels
        )
        for sigma in levels
    }
