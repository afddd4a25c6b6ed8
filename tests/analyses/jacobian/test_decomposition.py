"""Decompositions against the original's spectra and a known matrix; the leading part without the matrix equals it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ditlab.analyses.jacobian.decomposition import (
    Decomposition,
    check_memory,
    decompose,
    decompose_top,
)
from ditlab.analyses.jacobian.operator import JacobianOperator
from ditlab.diffusion.denoisers import Denoiser
from ditlab.diffusion.network_denoisers import BlindDenoiser
from ditlab.diffusion.noise_levels import LevelRange
from ditlab.errors import DitlabError
from ditlab.rng import numpy_generator

KINDS = ("svd", "eigh", "eig", "eig-right")
COMPLEX = KINDS[2:]
SHAPE, SIZE = (2, 5, 5), 50


def known() -> np.ndarray:
    """Not symmetric, with two complex pairs of eigenvalues among its real ones, all apart."""
    blocks = np.diag(np.linspace(2.0, 0.02, SIZE))
    blocks[2, 3], blocks[3, 2] = 0.7, -0.7
    blocks[20, 21], blocks[21, 20] = 0.3, -0.3
    basis = np.eye(SIZE) + 0.05 * numpy_generator(0, "test").standard_normal((SIZE, SIZE))
    return basis @ blocks @ np.linalg.inv(basis)


def operator_of(matrix: np.ndarray, dtype: torch.dtype = torch.float64) -> JacobianOperator:
    weights = torch.from_numpy(matrix)
    denoiser = Denoiser.wrap(lambda y, s, label: (y.flatten(1) @ weights.to(y).T).reshape(y.shape), SHAPE)
    return JacobianOperator(denoiser, torch.zeros(1, *SHAPE, dtype=dtype), 0.5)


def check_form(found: Decomposition, kind: str) -> None:
    """Order, length and sign, as `Decomposition` promises them."""
    moduli = found.values if kind not in COMPLEX else np.abs(found.values)
    assert (np.diff(moduli) <= 1e-9).all()
    assert found.values.dtype == (np.complex128 if kind in COMPLEX else np.float64)
    for vectors in (found.left, found.right):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-9)
    largest = np.abs(found.left).argmax(1)
    assert (found.left[np.arange(len(largest)), largest] > 0).all()


def test_the_spectra_of_the_original(golden, bf_unet_of):
    from scipy.optimize import linear_sum_assignment

    kad = golden("04_kad_unet_a")
    denoiser = BlindDenoiser(bf_unet_of(kad).double(), LevelRange(0.0, 2.0), low=-1.0, high=1.0)
    y, tolerance = kad["in.x_jac"].double(), kad.tolerance("out64")
    for target, name in (("eps", "J"), ("x0", "ImJ")):
        matrix = JacobianOperator(denoiser, y, 1.0, target=target).matrix(64, "reverse").numpy()
        values = {kind: decompose(matrix, kind).values for kind in KINDS}
        expected = {key: kad[f"out64.{name}.{key}"].numpy() for key in ("singular_values", "sym_eigvals")}
        np.testing.assert_allclose(values["svd"], expected["singular_values"], rtol=0, atol=tolerance)
        np.testing.assert_allclose(values["eigh"][::-1], expected["sym_eigvals"], rtol=0, atol=tolerance)
        theirs = kad[f"out64.{name}.eig_real"].numpy() + 1j * kad[f"out64.{name}.eig_imag"].numpy()
        for kind in COMPLEX:
            apart = np.abs(values[kind][:, None] - theirs)
            pairs = linear_sum_assignment(apart)  # as sets: each has a partner of its own
            assert apart[pairs].max() < kad.tolerance("eigenvalues")


@pytest.mark.parametrize("kind", KINDS)
def test_a_known_matrix(kind):
    matrix = known()
    found = decompose(matrix, kind)
    check_form(found, kind)
    assert found.residuals.max() < 1e-12
    if kind == "svd":
        np.testing.assert_allclose((found.left.T * found.values) @ found.right, matrix, atol=1e-12)
    elif kind == "eigh":
        np.testing.assert_allclose((found.left.T * found.values) @ found.left, (matrix + matrix.T) / 2, atol=1e-12)
    else:
        straight = np.linspace(2.0, 0.02, SIZE)
        place = [k for k in range(SIZE) if k not in (2, 3, 20, 21)]
        real = np.sort(found.values[found.values.imag == 0].real)[::-1]
        np.testing.assert_allclose(real, straight[place], atol=1e-12)
        # Left eigenvectors are the right ones of the transpose.
        matrix = matrix.T if kind == "eig" else matrix
        for k in np.flatnonzero(found.values.imag == 0):
            np.testing.assert_allclose(matrix @ found.left[k], found.values[k].real * found.left[k], atol=1e-11)
        pairs = np.flatnonzero(found.values.imag != 0)
        assert len(pairs) == 4
        for first, second in pairs.reshape(2, 2):
            assert found.values[first] == found.values[second].conj()
            assert found.values[first].imag > 0
            np.testing.assert_allclose(found.left[first], found.left[second], atol=1e-9)
            # Twice on, the plane of a pair is that of (J - l)(J - l*) = J^2 - 2 Re(l) J + |l|^2.
            value, vector = found.values[first], found.left[first]
            once = matrix @ vector
            np.testing.assert_allclose(matrix @ once - 2 * value.real * once + abs(value) ** 2 * vector, 0, atol=1e-11)


def test_the_real_part_of_a_complex_vector_is_as_long_as_can_be():
    # Right eigenvectors (1, +-2i) / sqrt(5): the longest real part of their multiples is the second axis. Left ones
    # (2, -+i) / sqrt(5): the first.
    for kind, longest in (("eig-right", [0, 1]), ("eig", [1, 0])):
        found = decompose(np.array([[0.0, 0.5], [-2.0, 0.0]]), kind)
        np.testing.assert_allclose(found.values, [1j, -1j], atol=1e-12)
        np.testing.assert_allclose(found.left, [longest, longest], atol=1e-12)


@pytest.mark.parametrize("top", [0, 6])
def test_left_and_right_eigenvectors_are_a_dual_pair(top):
    """Of different values they are orthogonal: W V^T is diagonal, and J = sum of l v w^T / (w . v)."""
    matrix = np.linalg.inv(np.eye(SIZE) + 0.1 * numpy_generator(1, "test").standard_normal((SIZE, SIZE)))
    matrix = matrix @ np.diag(np.linspace(2.0, 0.1, SIZE)) @ np.linalg.inv(matrix)
    left, right = (
        decompose_top(operator_of(matrix), kind, top) if top else decompose(matrix, kind) for kind in COMPLEX
    )
    np.testing.assert_allclose(left.values, right.values, atol=1e-9)
    products = left.left @ right.left.T
    np.testing.assert_allclose(products, np.diag(np.diag(products)), atol=1e-7)
    assert np.abs(left.left - right.left).max() > 0.05
    if not top:
        np.testing.assert_allclose((right.left.T * left.values.real / np.diag(products)) @ left.left, matrix, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_residuals_are_those_of_wrong_pairs_too(kind, monkeypatch):
    """A residual is computed anew: vectors that a solver got wrong are seen."""
    matrix, name = known(), kind.removesuffix("-right")
    solve = getattr(np.linalg, name)

    def shifted(a):
        parts = list(solve(a))
        place = 1 if kind == "svd" else 0
        parts[place] = parts[place] + 0.1
        return parts

    monkeypatch.setattr(np.linalg, name, shifted)
    np.testing.assert_allclose(decompose(matrix, kind).residuals, 0.1, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_leading_part_equals_the_whole_one(kind, dtype):
    matrix, count, fine = known(), 8, dtype == torch.float64
    operator, seen = operator_of(matrix, dtype), []
    found, whole = decompose_top(operator, kind, count, progress=seen.append), decompose(matrix, kind)
    check_form(found, kind)
    assert len(found.values) == count
    assert found.residuals.max() < (1e-8 if fine else 1e-4)
    np.testing.assert_allclose(found.values, whole.values[:count], atol=1e-9 if fine else 2e-5)
    np.testing.assert_allclose(found.left, whole.left[:count], atol=1e-7 if fine else 2e-3)
    np.testing.assert_allclose(found.right, whole.right[:count], atol=1e-7 if fine else 2e-3)
    # The products of the search, told as they go; those of the residuals come after.
    assert seen == sorted(seen)
    assert 0 < seen[-1] < operator.products


def test_left_eigenvectors_need_no_second_derivative():
    """Products with the transpose are all that is used, those of the residuals included."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weights):
            ctx.save_for_backward(weights)
            return x @ weights.T

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return grad @ ctx.saved_tensors[0], None

    weights = torch.from_numpy(known())
    once = Denoiser.wrap(lambda y, s, label: Once.apply(y.flatten(1), weights).reshape(y.shape), SHAPE)
    operator = JacobianOperator(once, torch.zeros(1, *SHAPE, dtype=torch.float64), 0.5)
    found = decompose_top(operator, "eig", 8)
    np.testing.assert_allclose(found.values, decompose(known(), "eig").values[:8], atol=1e-9)
    assert found.residuals.max() < 1e-8
    with pytest.raises(DitlabError, match="second derivative"):
        decompose_top(operator, "eig-right", 8)


def test_equal_seeds_give_equal_vectors():
    first, second = (decompose_top(operator_of(known()), "svd", 4, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.left, second.left)


def test_what_does_not_converge_is_said(monkeypatch):
    from scipy.sparse import linalg

    def stop(*args, **settings):
        raise linalg.ArpackNoConvergence("no", np.ones(3), np.ones((SIZE, 3)))

    monkeypatch.setattr(linalg, "eigsh", stop)
    with pytest.raises(DitlabError, match="3 of the 8 leading values converged"):
        decompose_top(operator_of(known()), "eigh", 8)


@pytest.mark.parametrize("count", [0, -1, SIZE - 1, SIZE, 10 * SIZE])
def test_more_than_there_are_is_refused(count):
    with pytest.raises(DitlabError, match="`top` must be 1 to 48 for a matrix"):
        decompose_top(operator_of(known()), "svd", count)


def test_a_matrix_that_would_not_fit_is_refused():
    with pytest.raises(DitlabError, match=r"12288 x 12288 \(604 MB\).*need about 11.5 GB.*found 4.0 GB; `top`"):
        check_memory(12288, 4, "svd", 4 * 10**9)
    check_memory(12288, 4, "svd", 12 * 10**9)
    check_memory(12288, 4, "svd", None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_is_lower_than_what_is_asked_for(kind):
    """Values that are nothing have vectors nonetheless, which fit: J of few training images is such a matrix."""
    rng = numpy_generator(0, "few")
    factors = [rng.standard_normal((SIZE, 3)) for _ in range(2)]
    matrix = factors[0] @ (factors[0] if kind == "eigh" else factors[1]).T
    found = decompose_top(operator_of(matrix, torch.float32), kind, 8)
    check_form(found, kind)
    assert (np.abs(found.values[3:]) < 1e-4 * np.abs(found.values[0])).all()
    assert found.residuals.max() < 1e-4 * np.abs(found.values[0])
    np.testing.assert_allclose(found.values[:3], decompose(matrix, kind).values[:3], rtol=1e-5)
    if kind not in COMPLEX:
        np.testing.assert_allclose(found.left @ found.left.T, np.eye(8), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_leading_values_is_said(kind):
    with pytest.raises(DitlabError, match="no leading values converged"):
        decompose_top(operator_of(np.zeros((SIZE, SIZE))), kind, 4)
    root = Denoiser.wrap(lambda y, s, label: (y - y.detach()).abs().sqrt(), SHAPE)
    operator = JacobianOperator(root, torch.zeros(1, *SHAPE), 0.5)
    with pytest.raises(DitlabError, match=r"derivative at noise level 0.5 is not finite"):
        decompose_top(operator, kind, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_size_whose_matrix_would_not_be_held(kind):
    """3x64x64, 604 MB: blurs down and across, unlike ones so that no values are equal, whose vectors are sines."""
    channels, side, weights = 3, 64, (0.8, 0.3)

    def blur(y, sigma, label):
        padded = torch.nn.functional.pad(y, (1, 1, 1, 1))
        y = (1 - weights[0]) * y + weights[0] * (padded[:, :, :-2, 1:-1] + padded[:, :, 2:, 1:-1]) / 2
        padded = torch.nn.functional.pad(y, (1, 1, 1, 1))
        y = (1 - weights[1]) * y + weights[1] * (padded[:, :, 1:-1, :-2] + padded[:, :, 1:-1, 2:]) / 2
        return y * torch.tensor([1.0, 0.7, 0.4]).to(y)[:, None, None]

    operator = JacobianOperator(Denoiser.wrap(blur, (channels, side, side)), torch.zeros(1, channels, side, side), 0.5)
    found = decompose_top(operator, kind, 3)
    angles = np.pi * np.arange(1, side + 1) / (side + 1)
    down, across = (1 - weight * (1 - np.cos(angles)) for weight in weights)
    expected = np.sort(np.outer(down, across).reshape(-1))[::-1][:3]
    np.testing.assert_allclose(found.values, expected, atol=1e-5)
    assert found.residuals.max() < 1e-3
    assert operator.products < 1000
    sine = np.sin(angles) * (2 / (side + 1)) ** 0.5
    leading = found.left[0].reshape(channels, side, side)
    np.testing.assert_allclose(leading[0], np.outer(sine, sine), atol=1e-3)
    np.testing.assert_allclose(leading[1:], 0, atol=1e-3)
