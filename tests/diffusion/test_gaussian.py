"""The terms of the discrete process against the original implementations' numbers (golden 02_terms)."""

from __future__ import annotations

import pytest
import torch

from ditlab.diffusion.gaussian import Gaussian, GaussianProcess, discretized_log_likelihood, kl
from ditlab.diffusion.schedules import make_schedule

SCHEDULES = pytest.mark.golden_keys("02_terms", r"[a-z]+\.q_sample")
"""Runs a test on every schedule of the golden."""


@pytest.fixture
def name(golden_key):
    """The schedule."""
    return golden_key.partition(".")[0]


@pytest.fixture
def terms(golden):
    return golden("02_terms")


@pytest.fixture
def close(terms):
    def compare(result: torch.Tensor, expected: torch.Tensor) -> None:
        # The golden's tolerance: a share of the largest value, or absolutely below 1.
        limit = terms.tolerance("default") * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(result.broadcast_to(expected.shape), expected, rtol=0, atol=limit)

    return compare


def state(terms, name, process):
    x0, t = terms["in.x0"], terms["in.t"]
    return x0, t, process.q_sample(x0, t, terms["in.noise"])


@SCHEDULES
def test_forward_marginals_and_posterior(terms, close, name):
    process = GaussianProcess(make_schedule(name, terms.config["T"]))
    x0, t, x = state(terms, name, process)
    close(x, terms[f"{name}.q_sample"])
    q = process.q(x0, t)
    close(q.mean, terms[f"{name}.q_mean"])
    close(q.log_variance.exp().flatten(), terms[f"{name}.q_var"])
    close(q.log_variance.flatten(), terms[f"{name}.q_logvar"])
    posterior = process.posterior(x0, x, t)
    close(posterior.mean, terms[f"{name}.post_mean"])
    close(posterior.log_variance.flatten(), terms[f"{name}.post_logvar"])
    # The variance itself is 0 at t = 0, where its logarithm is clipped.
    close(torch.where(t == 0, 0, posterior.log_variance.exp().flatten()), terms[f"{name}.post_var"])


@SCHEDULES
@pytest.mark.parametrize("clip", [True, False])
def test_reverse_step_with_learned_variance(terms, close, name, clip):
    process = GaussianProcess(make_schedule(name, terms.config["T"]))
    _, t, x = state(terms, name, process)
    x0, v = process.split(terms["in.model_output"], x, t)
    x0 = x0.clamp(-1, 1) if clip else x0
    reverse, prefix = process.reverse(x0, v, x, t), f"{name}.p_range.clip_{clip}"
    close(x0, terms[f"{prefix}.pred_xstart"])
    close(reverse.mean, terms[f"{prefix}.mean"])
    close(reverse.log_variance, terms[f"{prefix}.log_variance"])
    close(reverse.log_variance.exp(), terms[f"{prefix}.variance"])


@SCHEDULES
@pytest.mark.parametrize("variance", ["fixed-large", "fixed-small"])
def test_reverse_step_with_fixed_variance(terms, close, name, variance):
    process = GaussianProcess(make_schedule(name, terms.config["T"]), variance=variance)
    _, t, x = state(terms, name, process)
    x0, v = process.split(terms["in.model_output"][:, : terms.config["image"][0]], x, t)
    assert v is None
    reverse, prefix = process.reverse(x0.clamp(-1, 1), v, x, t), f"{name}.p_{variance.replace('-', '')}"
    close(reverse.mean, terms[f"{prefix}.mean"])
    close(reverse.log_variance.flatten(), terms[f"{prefix}.log_variance"])
    if variance == "fixed-large":
        close(reverse.log_variance.exp().flatten(), terms[f"{prefix}.variance"])
    else:
        close(torch.where(t == 0, 0, reverse.log_variance.exp().flatten()), terms[f"{prefix}.variance"])


@SCHEDULES
def test_reverse_step_of_a_network_that_predicts_the_image(terms, close, name):
    process = GaussianProcess(make_schedule(name, terms.config["T"]), prediction="x0")
    _, t, x = state(terms, name, process)
    x0, v = process.split(terms["in.model_output"], x, t)
    close(x0, terms[f"{name}.p_xstart.pred_xstart"])
    close(process.reverse(x0, v, x, t).mean, terms[f"{name}.p_xstart.mean"])


@SCHEDULES
@pytest.mark.parametrize("clip", [True, False])
def test_terms_of_the_bound_in_bits(terms, close, name, clip):
    process = GaussianProcess(make_schedule(name, terms.config["T"]))
    x0, t, x = state(terms, name, process)
    estimate, v = process.split(terms["in.model_output"], x, t)
    estimate = estimate.clamp(-1, 1) if clip else estimate
    bits = process.bound(x0, x, t, process.reverse(estimate, v, x, t))
    rtol, expected = terms.tolerance("vb, kl, loss"), terms[f"{name}.vb_terms_bpd.clip_{clip}"]
    # 3e-8: float32's rounding of 1, which is what the recorded KL of nearly equal distributions is made of.
    torch.testing.assert_close(bits, expected, rtol=rtol, atol=3e-8)
    close(process.prior(x0), terms[f"{name}.prior_bpd"])


def test_decoder_likelihood_and_kl(terms, close):
    x0, mean, log_scale = terms["in.x0"], terms["in.dgll_means"], terms["in.dgll_log_scales"]
    expected = terms["dgll"]
    result = discretized_log_likelihood(x0, mean, log_scale)
    tolerance, threshold = (terms.tolerance("dgll", place) for place in (0, 1))
    likely = expected > threshold
    assert (result - expected)[likely].abs().max() <= tolerance
    assert likely.float().mean().item() == pytest.approx(terms.values[f"fraction with dgll > {threshold:g}"])
    log_variance = torch.tensor(terms.mapped("normal_kl")[-1])
    close(kl(Gaussian(x0, log_scale), Gaussian(mean, log_variance)), terms["normal_kl"])
