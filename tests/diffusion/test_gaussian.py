"""The terms of the discrete process against the original implementations' numbers (golden 02_terms)."""

from __future__ import annotations

import pytest
import torch

from ditlab.diffusion.gaussian import Gaussian, GaussianProcess, discretized_log_likelihood, kl
from ditlab.diffusion.schedules import make_schedule

SCHEDULES = pytest.mark.parametrize("name", ["linear", "cosine"])


def close(result: torch.Tensor, expected: torch.Tensor):
    # The golden's tolerance: 1e-5 of the largest value, or absolutely below 1.
    limit = 1e-5 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(result.broadcast_to(expected.shape), expected, rtol=0, atol=limit)


@pytest.fixture
def terms(golden):
    return golden("02_terms")


def state(terms, name, process):
    x0, t = terms["in.x0"], terms["in.t"]
    return x0, t, process.q_sample(x0, t, terms["in.noise"])


@SCHEDULES
def test_forward_marginals_and_posterior(terms, name):
    process = GaussianProcess(make_schedule(name, 1000))
    x0, t, x = state(terms, name, process)
    close(x, terms[f"{name}.q_sample"])
    q = process.q(x0, t)
    close(q.mean, terms[f"{name}.q_mean"])
    close(q.variance.flatten(), terms[f"{name}.q_var"])
    close(q.log_variance.flatten(), terms[f"{name}.q_logvar"])
    posterior = process.posterior(x0, x, t)
    close(posterior.mean, terms[f"{name}.post_mean"])
    close(posterior.log_variance.flatten(), terms[f"{name}.post_logvar"])
    # The variance itself is 0 at t = 0, where its logarithm is clipped.
    close(torch.where(t == 0, 0, posterior.variance.flatten()), terms[f"{name}.post_var"])


@SCHEDULES
@pytest.mark.parametrize("clip", [True, False])
def test_reverse_step_with_learned_variance(terms, name, clip):
    process = GaussianProcess(make_schedule(name, 1000))
    _, t, x = state(terms, name, process)
    x0, v = process.split(terms["in.model_output"], x, t)
    x0 = x0.clamp(-1, 1) if clip else x0
    reverse, prefix = process.reverse(x0, v, x, t), f"{name}.p_range.clip_{clip}"
    close(x0, terms[f"{prefix}.pred_xstart"])
    close(reverse.mean, terms[f"{prefix}.mean"])
    close(reverse.log_variance, terms[f"{prefix}.log_variance"])
    close(reverse.variance, terms[f"{prefix}.variance"])


@SCHEDULES
@pytest.mark.parametrize("variance", ["fixed-large", "fixed-small"])
def test_reverse_step_with_fixed_variance(terms, name, variance):
    process = GaussianProcess(make_schedule(name, 1000), variance=variance)
    _, t, x = state(terms, name, process)
    x0, v = process.split(terms["in.model_output"][:, :4], x, t)
    assert v is None
    reverse, prefix = process.reverse(x0.clamp(-1, 1), v, x, t), f"{name}.p_{variance.replace('-', '')}"
    close(reverse.mean, terms[f"{prefix}.mean"])
    close(reverse.log_variance.flatten(), terms[f"{prefix}.log_variance"])
    if variance == "fixed-large":
        close(reverse.variance.flatten(), terms[f"{prefix}.variance"])
    else:
        close(torch.where(t == 0, 0, reverse.variance.flatten()), terms[f"{prefix}.variance"])


@SCHEDULES
def test_reverse_step_of_a_network_that_predicts_the_image(terms, name):
    process = GaussianProcess(make_schedule(name, 1000), prediction="x0")
    _, t, x = state(terms, name, process)
    x0, v = process.split(terms["in.model_output"], x, t)
    close(x0, terms[f"{name}.p_xstart.pred_xstart"])
    close(process.reverse(x0, v, x, t).mean, terms[f"{name}.p_xstart.mean"])


@SCHEDULES
@pytest.mark.parametrize("clip", [True, False])
def test_terms_of_the_bound_in_bits(terms, name, clip):
    process = GaussianProcess(make_schedule(name, 1000))
    x0, t, x = state(terms, name, process)
    estimate, v = process.split(terms["in.model_output"], x, t)
    estimate = estimate.clamp(-1, 1) if clip else estimate
    bits = process.bound(x0, x, t, process.reverse(estimate, v, x, t))
    # 3e-8: float32's rounding of 1, which is what the recorded KL of nearly equal distributions is made of.
    torch.testing.assert_close(bits, terms[f"{name}.vb_terms_bpd.clip_{clip}"], rtol=3e-5, atol=3e-8)
    close(process.prior(x0), terms[f"{name}.prior_bpd"])


def test_decoder_likelihood_and_kl(terms):
    x0, mean, log_scale = terms["in.x0"], terms["in.dgll_means"], terms["in.dgll_log_scales"]
    expected = terms["dgll"]
    result = discretized_log_likelihood(x0, mean, log_scale)
    likely = expected > -8
    assert (result - expected)[likely].abs().max() <= 1e-3
    assert likely.float().mean() > 0.9
    close(kl(Gaussian(x0, log_scale), Gaussian(mean, torch.tensor(-4.0))), terms["normal_kl"])
