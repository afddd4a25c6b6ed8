"""The terms of a discrete VP process on tensors: forward marginals, posterior, reverse step, variational bound.

    q(x_t | x_0) = N(sqrt(abar_t) x_0, 1 - abar_t)
    q(x_{t-1} | x_t, x_0) = N(coef1 x_0 + coef2 x_t, beta~_t)
    L_t = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)),  L_0 = -ln p(x_0 | x_1)

Sources: Ho et al. 2020, Eqs. 4-8 and section 3.3 (discretized decoder); Nichol and Dhariwal 2021, Eq. 15 (learned
range) and section 3.1 (bits per dimension).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ditlab.diffusion.choices import PredictionTarget, Variance
from ditlab.diffusion.schedules import VPSchedule
from ditlab.diffusion.short_repr import short_repr
from ditlab.diffusion.tensors import Images, Steps

__all__ = ["Gaussian", "GaussianProcess", "discretized_log_likelihood", "flat_mean", "kl"]


class Gaussian(NamedTuple):
    """A diagonal normal distribution over images."""

    mean: Tensor
    """[B, C, H, W]."""
    log_variance: Tensor
    """[B, 1, 1, 1] or [B, C, H, W]."""

    __repr__ = short_repr


class GaussianProcess:
    """The terms of a schedule, for a network with this kind of prediction and variance.

    Steps `t` are int64 `[B]` indices into the schedule. Coefficients are float64, rounded once to float32.
    """

    def __init__(
        self, schedule: VPSchedule, prediction: PredictionTarget = "epsilon", variance: Variance = "learned-range"
    ) -> None:
        self.schedule, self.prediction, self.variance = schedule, prediction, variance
        abar = schedule.alphas_cumprod
        log_posterior = schedule.posterior_log_variance_clipped
        tables = {
            "signal": np.sqrt(abar),
            "noise": np.sqrt(1 - abar),
            "log_noise": np.log(1 - abar),
            "inverse_signal": np.sqrt(1 / abar),
            "sigma": schedule.sigmas,
            "coef1": schedule.posterior_mean_coef1,
            "coef2": schedule.posterior_mean_coef2,
            "log_posterior": log_posterior,
            "log_beta": np.log(schedule.betas),
            "log_fixed": np.log(schedule.large_variance) if variance == "fixed-large" else log_posterior,
            "timesteps": schedule.timesteps,
        }
        self._host = {name: torch.from_numpy(np.asarray(table, dtype=np.float32)) for name, table in tables.items()}
        self._tables = {torch.device("cpu"): self._host}

    def __repr__(self) -> str:
        return f"GaussianProcess({self.schedule!r}, {self.prediction}, {self.variance})"

    def at(self, name: str, t: Tensor) -> Tensor:
        """Returns the values of a table at the steps t, [B, 1, 1, 1]."""
        if t.device not in self._tables:
            self._tables[t.device] = {key: table.to(t.device) for key, table in self._host.items()}
        return self._tables[t.device][name][t].reshape(-1, 1, 1, 1)

    def q_sample(self, x0: Images, t: Steps, noise: Images) -> Images:
        """Returns x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise."""
        return self.at("signal", t) * x0 + self.at("noise", t) * noise

    def q(self, x0: Images, t: Steps) -> Gaussian:
        """Returns q(x_t | x_0)."""
        return Gaussian(self.at("signal", t) * x0, self.at("log_noise", t))

    def posterior(self, x0: Images, x: Images, t: Steps) -> Gaussian:
        """Returns q(x_{t-1} | x_t, x_0), its log variance clipped at t = 0."""
        return Gaussian(self.at("coef1", t) * x0 + self.at("coef2", t) * x, self.at("log_posterior", t))

    def split(self, output: Float[Tensor, "b o h w"], x: Images, t: Steps) -> tuple[Tensor, Tensor | None]:
        """Returns (estimate of x0, v or None) from a network's raw output at x_t: the prediction, then a learned v."""
        channels = x.shape[1]
        v = output[:, channels:] if self.variance == "learned-range" else None
        if self.prediction == "x0":
            return output[:, :channels], v
        return self.at("inverse_signal", t) * x - self.at("sigma", t) * output[:, :channels], v

    def reverse(self, x0: Images, v: Tensor | None, x: Images, t: Steps) -> Gaussian:
        """Returns p(x_{t-1} | x_t) from the estimate x0 at x = x_t.

        The log variance v goes from the posterior's (-1) to beta's (1); it is None for the fixed variance.
        """
        if v is None:
            log_variance = self.at("log_fixed", t)
        else:
            log_variance = torch.lerp(self.at("log_posterior", t), self.at("log_beta", t), (v + 1) / 2)
        return Gaussian(self.at("coef1", t) * x0 + self.at("coef2", t) * x, log_variance)

    def bound(self, x0: Images, x: Images, t: Steps, reverse: Gaussian) -> Float[Tensor, " b"]:
        """Returns the term L_t of the variational bound in bits per dimension; at t = 0 the decoder's likelihood.

        x0 are the clean images, x = x_t, and `reverse` is p(x_{t-1} | x_t).
        """
        bits = flat_mean(kl(self.posterior(x0, x, t), reverse)) / math.log(2)
        decoder = -flat_mean(discretized_log_likelihood(x0, reverse.mean, 0.5 * reverse.log_variance)) / math.log(2)
        return torch.where(t == 0, decoder, bits)

    def prior(self, x0: Images) -> Float[Tensor, " b"]:
        """Returns KL(q(x_T | x_0) || N(0, 1)) in bits per dimension."""
        last = torch.full((len(x0),), len(self.schedule) - 1, device=x0.device)
        normal = Gaussian(torch.zeros_like(x0), x0.new_zeros(len(x0), 1, 1, 1))
        return flat_mean(kl(self.q(x0, last), normal)) / math.log(2)


def flat_mean(values: Tensor) -> Tensor:
    """Returns the mean of [B, ...] over all dimensions but the first, [B]."""
    return values.flatten(1).mean(1)


def kl(p: Gaussian, q: Gaussian) -> Tensor:
    """Returns KL(p || q) in nats, element by element."""
    ratio = p.log_variance - q.log_variance
    return 0.5 * (ratio.expm1() - ratio + (p.mean - q.mean) ** 2 * (-q.log_variance).exp())


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Returns the log probability, in nats, of 8-bit images in [-1, 1] under normal distributions, each element's.

    Each of the 256 values has the bin of width 2/255 around it; the outermost bins are open. `log_scale` is the
    logarithm of the standard deviation.
    """
    centred, sharpness = x - mean, (-log_scale).exp()
    below = _normal_cdf((centred + 1 / 255) * sharpness)
    above = 1 - _normal_cdf((centred - 1 / 255) * sharpness)
    # 1e-12 keeps the logarithm finite where float32 rounds a probability to 0.
    inside = (below + above - 1).clamp(min=1e-12).log()
    outermost = torch.where(x > 0.999, above.clamp(min=1e-12).log(), inside)
    return torch.where(x < -0.999, below.clamp(min=1e-12).log(), outermost)


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the published code, with which published bits per dimension were computed."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
