from __future__ import annotations

import pytest
import torch

from ditlab.diffusion.baselines import EmpiricalBayesDenoiser, WienerDenoiser
from ditlab.errors import DitlabError
from ditlab.rng import torch_generator


def images(count: int, shape=(2, 3, 4)) -> torch.Tensor:
    return torch.rand(count, *shape, generator=torch_generator(count, "images")).double() * 2 - 1


def noisy(x0: torch.Tensor, sigma: float) -> torch.Tensor:
    return x0 + sigma * torch.randn(x0.shape, dtype=x0.dtype, generator=torch_generator(1, "noise"))


@pytest.mark.parametrize("sigma", [0.05, 0.5, 5.0, 100.0])
def test_empirical_bayes_is_the_posterior_mean(sigma):
    train = images(11)
    y = noisy(train[:4], sigma)
    distance = ((y[:, None] - train[None]) ** 2).sum((2, 3, 4))
    weights = torch.softmax(-distance / (2 * sigma**2), 1)
    expected = torch.einsum("bn,nchw->bchw", weights, train)
    torch.testing.assert_close(EmpiricalBayesDenoiser(train)(y, sigma), expected, rtol=1e-10, atol=1e-12)


def test_empirical_bayes_does_not_depend_on_the_chunk():
    train = images(37)
    y, sigma = noisy(train[:5], 0.4), torch.tensor([0.01, 0.1, 0.4, 2.0, 50.0], dtype=torch.float64)
    whole = EmpiricalBayesDenoiser(train, chunk=37)(y, sigma)
    for chunk in (1, 2, 7, 36, 1000):
        torch.testing.assert_close(EmpiricalBayesDenoiser(train, chunk=chunk)(y, sigma), whole, rtol=1e-11, atol=1e-12)


def test_empirical_bayes_ends_in_the_nearest_image_and_begins_in_the_mean():
    train = images(20).float()
    y = noisy(train[:6], 0.3)
    nearest = train[((y[:, None] - train[None]) ** 2).sum((2, 3, 4)).argmin(1)]
    for sigma in (1e-2, 1e-6, 1e-12):
        assert torch.equal(EmpiricalBayesDenoiser(train, chunk=3)(y, sigma), nearest)
    far = EmpiricalBayesDenoiser(train)(y, 1e6)
    torch.testing.assert_close(far, train.mean(0).expand_as(far), rtol=0, atol=1e-5)


def test_empirical_bayes_shares_between_images_that_are_equally_near():
    black, white = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    result = EmpiricalBayesDenoiser(torch.cat([black, white]), chunk=1)(0.5 * white, 1e-4)
    torch.testing.assert_close(result, 0.5 * white)


@pytest.mark.parametrize("count", [5, 24, 200])
def test_wiener_is_the_linear_minimum_of_squared_error(count):
    train = images(count)
    flat = train.flatten(1)
    mean = flat.mean(0)
    covariance = (flat - mean).T @ (flat - mean) / count
    sigma = 0.4
    y = noisy(images(3), sigma)
    gain = covariance @ torch.linalg.inv(covariance + sigma**2 * torch.eye(24, dtype=torch.float64))
    expected = (mean + (y.flatten(1) - mean) @ gain.T).reshape(y.shape)
    denoiser = WienerDenoiser(train, chunk=7)
    torch.testing.assert_close(denoiser(y, sigma), expected, rtol=1e-8, atol=1e-10)
    assert len(denoiser.variances) == min(count - 1, 24)
    assert (denoiser.variances.diff() <= 0).all()
    identity = torch.eye(len(denoiser.variances), dtype=torch.float64)
    torch.testing.assert_close(denoiser.basis.T @ denoiser.basis, identity, rtol=0, atol=1e-8)


def test_the_jacobian_of_empirical_bayes_is_the_posterior_covariance():
    # Miyasawa: sigma^2 dD/dy = Cov[x0 | y].
    train, sigma = images(9, (1, 2, 2)), 0.8
    y = noisy(train[:1], sigma)
    denoiser = EmpiricalBayesDenoiser(train, chunk=4)
    jacobian = torch.autograd.functional.jacobian(lambda z: denoiser(z, sigma), y).reshape(4, 4)
    flat = train.flatten(1)
    weights = torch.softmax(-(y.flatten(1) - flat).square().sum(1) / (2 * sigma**2), 0)
    centred = flat - weights @ flat
    torch.testing.assert_close(jacobian * sigma**2, (weights[:, None] * centred).T @ centred)


def test_wiener_knows_the_ends():
    train = images(300).float()
    denoiser = WienerDenoiser(train)
    y = noisy(train[:3], 0.3)
    torch.testing.assert_close(denoiser(y, 1e-6), y, rtol=0, atol=1e-4)
    torch.testing.assert_close(denoiser(y, 1e6), train.mean(0).expand_as(y), rtol=0, atol=1e-5)


def test_a_single_image_is_all_that_either_knows():
    train = images(1).float()
    y = noisy(train, 0.5)
    torch.testing.assert_close(WienerDenoiser(train)(y, 0.5), train)
    torch.testing.assert_close(EmpiricalBayesDenoiser(train)(y, 0.5), train)


@pytest.mark.parametrize("baseline", [EmpiricalBayesDenoiser, WienerDenoiser])
def test_on_its_own_images_it_beats_the_noise_and_memory_beats_linearity(baseline):
    train = images(60)
    y = noisy(train, 0.3)
    error = {kind: (kind(train)(y, 0.3) - train).square().mean() for kind in (EmpiricalBayesDenoiser, WienerDenoiser)}
    assert error[baseline] < 0.3**2
    assert error[EmpiricalBayesDenoiser] < error[WienerDenoiser]


@pytest.mark.parametrize("baseline", [EmpiricalBayesDenoiser, WienerDenoiser])
def test_no_images_is_an_error(baseline):
    with pytest.raises(DitlabError, match="expected float images"):
        baseline(torch.zeros(0, 1, 2, 2))
    with pytest.raises(DitlabError, match="chunk"):
        baseline(torch.zeros(2, 1, 2, 2), chunk=0)
