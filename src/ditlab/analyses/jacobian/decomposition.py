"""Singular values and eigenvalues of a Jacobian: all of the whole matrix, or the leading ones from products alone.

The Jacobian of a denoiser need not be symmetric, so there are several decompositions: singular vectors (`svd`),
eigenvectors of the symmetric part (J + J^T) / 2 (`eigh`), and the complex eigenvectors of the matrix itself: left ones,
w^T J = l w^T (`eig`), and right ones, J v = l v (`eig-right`), with the same eigenvalues. From products alone they are
computed by the methods of Lanczos and Arnoldi in ARPACK (Lehoucq, Sorensen and Yang, 1998), applied to J^T J, the
symmetric part, J^T and J. The residual of every pair is computed again at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ditlab.analyses.jacobian.config import DecompositionKind
from ditlab.analyses.jacobian.operator import JacobianOperator
from ditlab.errors import DitlabError
from ditlab.rng import numpy_generator

_COPIES = {"svd": 9, "eigh": 6, "eig": 7, "eig-right": 7}
"""Matrices in float64 in memory at the same time, work space of LAPACK included, as measured."""
_CHUNK = 256

Rows = Callable[[slice], np.ndarray]
"""Returns some rows of a matrix that need not be in memory as a whole."""


@dataclass(frozen=True, eq=False)
class Decomposition:
    """Values and vectors of a matrix, largest first (by modulus for `eig` and `eig-right`)."""

    values: np.ndarray
    """float64 [K]; complex128 for `eig` and `eig-right`."""
    left: np.ndarray
    """float64 [K, D], rows of length 1, the entry of largest modulus positive: left singular vectors; eigenvectors for
    `eigh`; for `eig` and `eig-right` the real part of the left or right eigenvectors, rotated to have the largest
    possible length."""
    right: np.ndarray
    """float64 [K, D]: right singular vectors, signed as the matrix pairs them; else `left`."""
    residuals: np.ndarray
    """float64 [K]: the larger of |J^T u - s v| and |J v - s u| (svd), |S v - l v| (eigh), |J^T w - l w| (eig),
    |J v - l v| (eig-right); the last two before the vectors are made real."""


def check_memory(size: int, itemsize: int, kind: DecompositionKind, available: int | None) -> None:
    """Raises DitlabError if a D x D matrix (D = size) and its decomposition would not fit in memory.

    `itemsize` is the bytes of an entry of the network's output, `available` those that are free, None if unknown.
    """
    matrix = size * size * itemsize
    needed = matrix + _COPIES[kind] * size * size * 8
    if available is not None and needed > available:
        raise DitlabError(
            f"jacobian: the whole matrix of {size} x {size} ({matrix / 1e6:,.0f} MB) and its {kind} need about "
            f"{needed / 1e9:.1f} GB of memory, found {available / 1e9:.1f} GB; `top` computes only the leading ones, "
            "without the matrix"
        )


def check_count(count: int, size: int) -> None:
    """Raises DitlabError if products alone cannot give so many leading vectors of a D x D matrix, D = size."""
    if not 1 <= count <= size - 2:
        raise DitlabError(
            f"jacobian: `top` must be 1 to {size - 2} for a matrix of {size} x {size}, found {count}; 0 computes all"
        )


def decompose(matrix: Float[np.ndarray, "d d"], kind: DecompositionKind) -> Decomposition:
    """Computes all values and vectors of a real matrix, in float64."""
    matrix = matrix.astype(np.float64, copy=False)
    if kind == "svd":
        left, values, right = np.linalg.svd(matrix)
        left = left.T
        return _singular(values, left, right, lambda rows: left[rows] @ matrix, lambda rows: right[rows] @ matrix.T)
    if kind == "eigh":
        symmetric = (matrix + matrix.T) / 2
        values, vectors = np.linalg.eigh(symmetric)
        vectors = vectors.T
        return _symmetric(values, vectors, lambda rows: vectors[rows] @ symmetric)
    if kind == "eig":
        matrix = matrix.T
    values, vectors = np.linalg.eig(matrix)
    vectors = vectors.T
    # In parts, because numpy would make a complex copy of the matrix.
    return _general(
        values, vectors, lambda rows: np.real(vectors[rows]) @ matrix.T + 1j * (np.imag(vectors[rows]) @ matrix.T)
    )


def decompose_top(
    operator: JacobianOperator,
    kind: DecompositionKind,
    count: int,
    *,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Decomposition:
    """Computes the leading values and vectors from products with the Jacobian, which is never stored.

    `svd` and `eigh` need J v and J^T u, `eig` J^T u alone, `eig-right` J v alone. `count` is 1 to D - 2; the last value
    of `eig` or `eig-right` may be half of a complex pair. If values are equal to the last digit, as symmetry can make
    them, some may be missed; the whole matrix gives them all. Memory: a few times `count` vectors.

    `seed` draws the first vector. `progress` is called with the number of products so far. Raises DitlabError if the
    values do not converge.
    """
    from scipy.sparse.linalg import eigs, eigsh

    check_count(count, operator.size)
    solve = partial(_arpack, operator, count=count, seed=seed, progress=progress)
    forward, reverse = partial(_apply, operator, operator.forward), partial(_apply, operator, operator.reverse)
    if kind == "svd":
        _, vectors = solve(eigsh, lambda v: reverse(forward(v)), "LM")
        # The best pairs in the span of these vectors; dividing J v by its length would leave rounding where J v is 0.
        images = forward(vectors.T)
        left, values, turned = np.linalg.svd(images.T, full_matrices=False)
        left, right = left.T, turned @ vectors.T
        by_left, by_right = reverse(left), turned @ images
        return _singular(values, left, right, lambda rows: by_left[rows], lambda rows: by_right[rows])
    if kind == "eigh":

        def symmetric(v: np.ndarray) -> np.ndarray:
            return (forward(v) + reverse(v)) / 2

        values, vectors = solve(eigsh, symmetric, "LA")
        images = symmetric(vectors.T)
        return _symmetric(values, vectors.T, lambda rows: images[rows])
    product = reverse if kind == "eig" else forward
    values, vectors = solve(eigs, product, "LM")
    images = _complex_images(partial(product, together=True), vectors.T)
    return _general(values, vectors.T, lambda rows: images[rows])


def _arpack(
    operator: JacobianOperator,
    solver: Callable[..., Any],
    product: Callable[[np.ndarray], np.ndarray],
    which: str,
    *,
    count: int,
    seed: int,
    progress: Callable[[int], object] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the leading values [K] and vectors [D, K] of a matrix that is known by its products with rows."""
    from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator

    def matvec(vector: np.ndarray) -> np.ndarray:
        image = product(vector.reshape(1, -1))[0]
        if progress is not None:
            progress(operator.products)
        return image

    size = operator.size
    start = numpy_generator(seed, "jacobian", "start").standard_normal(size)
    # A basis of 1.5 times the count needed the fewest products for trained networks (the usual factor of 2: 5-10 %
    # more).
    basis = min(size, max(count * 3 // 2, count + 20))
    tolerance = 1e-9 if operator.y.dtype == torch.float64 else 1e-5  # of a residual, relative to the value
    linear: Any = LinearOperator((size, size), matvec=matvec, dtype=np.dtype(np.float64))  # pyright: ignore[reportCallIssue]
    try:
        return solver(linear, k=count, which=which, v0=start, tol=tolerance, ncv=basis)
    except ArpackNoConvergence as error:
        raise DitlabError(
            f"jacobian: only {len(error.eigenvalues)} of the {count} leading values converged after "
            f"{operator.products} products; a smaller `top`, or 0 for the whole matrix, may work"
        ) from error
    except ArpackError as error:
        # For example a matrix of zeros, which has no leading vectors.
        raise DitlabError(
            f"jacobian: no leading values converged ({str(error).splitlines()[0].rstrip('.')}); `top` 0 computes "
            "the whole matrix"
        ) from error


def _complex_images(product: Callable[[np.ndarray], np.ndarray], vectors: np.ndarray) -> np.ndarray:
    """Returns products with complex rows: one product for a real row, two for a row and its conjugate after it."""
    repeats = np.zeros(len(vectors), dtype=bool)
    real, imaginary = np.real(vectors), np.imag(vectors)
    twofold = np.abs(imaginary).max(1) > 0
    repeats[1:] = twofold[1:] & (vectors[1:] == vectors[:-1].conj()).all(1)
    twofold &= ~repeats
    images = np.zeros_like(vectors)
    images[~repeats] = product(real[~repeats])
    if twofold.any():
        images[twofold] += 1j * product(imaginary[twofold])
    images[repeats] = images[np.flatnonzero(repeats) - 1].conj()
    return images


def _apply(
    operator: JacobianOperator, product: Callable[..., Tensor], vectors: np.ndarray, *, together: bool = False
) -> np.ndarray:
    rows = torch.from_numpy(np.ascontiguousarray(vectors)).to(operator.y)
    images = product(rows, together=together).double().cpu().numpy()
    if not np.isfinite(images).all():
        raise operator.not_finite()
    return images


def _residuals(images: Rows, values: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Returns |image - value * vector| of each row, a few rows at a time."""
    residuals = np.empty(len(values))
    for start in range(0, len(values), _CHUNK):
        rows = slice(start, start + _CHUNK)
        residuals[rows] = np.linalg.norm(images(rows) - values[rows, None] * vectors[rows], axis=1)
    return residuals


def _singular(values: np.ndarray, left: np.ndarray, right: np.ndarray, by_left: Rows, by_right: Rows) -> Decomposition:
    """Decomposes by values, largest first, vectors as rows, rows u^T J, and rows (J v)^T."""
    residuals = np.maximum(_residuals(by_left, values, right), _residuals(by_right, values, left))
    signs = _signs(left)
    return Decomposition(values, left * signs, right * signs, residuals)


def _symmetric(values: np.ndarray, vectors: np.ndarray, images: Rows) -> Decomposition:
    """Decomposes by values, vectors as rows, and rows S v."""
    residuals = _residuals(images, values, vectors)
    order = np.argsort(-values, kind="stable")
    vectors = vectors[order]
    vectors *= _signs(vectors)
    return Decomposition(values[order], vectors, vectors, residuals[order])


def _general(values: np.ndarray, vectors: np.ndarray, images: Rows) -> Decomposition:
    """Decomposes by values, complex right eigenvectors as rows, and their products with the matrix."""
    values, residuals = values.astype(np.complex128), _residuals(images, values, vectors)
    # In a complex pair, whose moduli are equal to a bit or two, the positive imaginary part comes first.
    moduli = np.abs(values)
    largest = float(moduli.max(initial=0.0))
    exponent = int(np.floor(np.log10(largest))) if largest > 0 else 0
    order = np.lexsort((-np.imag(values), -moduli.round(10 - exponent)))
    real = np.empty(vectors.shape)
    for row, place in enumerate(order):
        # |Re(e^(i t) v)|^2 = (1 + Re(e^(2 i t) v^T v)) / 2 is largest where e^(2 i t) v^T v is real and positive.
        turn = np.exp(-0.5j * np.angle((vectors[place] ** 2).sum()))
        real[row] = (vectors[place] * turn).real
    real *= _signs(real) / np.linalg.norm(real, axis=1, keepdims=True)
    return Decomposition(values[order], real, real, residuals[order])


def _signs(vectors: np.ndarray) -> np.ndarray:
    """Returns 1 or -1 for each row, [K, 1], so that its entry of largest modulus becomes positive."""
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(1)[:, None], axis=1)
    return np.where(largest < 0, -1.0, 1.0)
