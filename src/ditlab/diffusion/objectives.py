"""Objectives: how a network is trained to denoise.

    VP       L = |eps - eps_theta(x_t, t)|^2 + L_vb,  x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps
    EDM      L = lambda(sigma) |D(x0 + sigma n; sigma) - x0|^2
    blind    L = sum |n_theta(x0 + sigma n) - sigma n|^2,  sigma = max_level u^2,  u uniform in [0, 1]

Sources: Ho et al. 2020, Eq. 14 (simple loss); Nichol and Dhariwal 2021, Eq. 16 (hybrid loss); Peebles and Xie 2023 (the
settings that are the defaults here); Karras et al. 2022, Eq. 8 and Table 1 (EDM); Kadkhodaie et al. 2024, their
published training code (blind).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ditlab.diffusion.choices import LEVEL_LIMITS
from ditlab.diffusion.gaussian import GaussianProcess, flat_mean
from ditlab.diffusion.network_denoisers import BlindDenoiser, EDMDenoiser, NetworkDenoiser, VPDenoiser
from ditlab.diffusion.noise_levels import LevelRange
from ditlab.diffusion.objective_configs import BlindObjectiveConfig, EDMObjectiveConfig, VPObjectiveConfig
from ditlab.diffusion.schedules import VP_BETA_D, VP_BETA_MIN, VPSchedule, make_schedule
from ditlab.diffusion.tensors import Images, Labels, Shape
from ditlab.diffusion.time_sampling import LossSecondMoment
from ditlab.errors import DitlabError

__all__ = ["OBJECTIVES", "Draws", "EDMObjective", "Objective", "VPObjective"]

Draws = Mapping[str, Tensor]


class Objective(ABC):
    """How a network is trained."""

    label_dropout: float = 0.0
    sampling: LossSecondMoment | None = None
    """The history of losses, if `draw` depends on one."""

    @property
    def history_keys(self) -> tuple[str, ...]:
        """Returns the names of the draws and losses of a step that `update` takes."""
        return ("t", "unweighted") if self.sampling else ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({getattr(self, 'config', '')})"

    @abstractmethod
    def draw(self, generator: torch.Generator, count: int, shape: Shape) -> dict[str, Tensor]:
        """Returns all random numbers of `count` images (C, H, W), the global batch: CPU tensors [count, ...].

        They come from a CPU generator, so any number of processes draw the same ones; each keeps its slice.
        """

    @abstractmethod
    def losses(self, network: nn.Module, images: Images, label: Labels, draws: Draws) -> dict[str, Tensor]:
        """Returns losses `[B]` of images in [-1, 1] under the draws that `draw` made for them; "loss" is minimized.

        All tensors are on one device. Labels are 0 .. num_classes - 1; they are dropped here.
        """

    @abstractmethod
    def denoiser(self, network: nn.Module, shape: Shape | None = None) -> NetworkDenoiser:
        """Returns the network as a denoiser, at `shape` (C, H, W), or at its own `in_shape`."""

    def network_outputs(self, channels: int) -> int:
        """Returns the number of output channels that the network needs for images of `channels` channels."""
        return channels

    def update(self, seen: Mapping[str, Tensor]) -> None:
        """Adds a step to the history: the values of `history_keys`, `[B]`, in the order of the global batch."""
        if self.sampling:
            self.sampling.update(seen["t"], seen["unweighted"])

    def state_dict(self) -> dict[str, Any]:
        """Returns the history, as JSON values."""
        return self.sampling.state_dict() if self.sampling else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the history that `state_dict` returned; raises a DitlabError for that of another objective."""
        if self.sampling:
            self.sampling.load_state_dict(state)
        elif state:
            raise DitlabError(f"objective: expected a state without entries, found {', '.join(sorted(state))}")

    def _drop_labels(self, network: nn.Module, label: Tensor | None, coins: Tensor) -> Tensor | None:
        classes = int(getattr(network, "num_classes", 0))
        if label is None or classes == 0:
            return None
        # Without dropout the "no class" row is never used, so a network need not have one.
        return torch.where(coins < self.label_dropout, classes, label) if self.label_dropout else label


class VPObjective(Objective):
    """The loss of a discrete VP process; `draw` gives "t" int64, "noise" unit normal and "coin" uniform.

    With time_sampling loss-second-moment `draw` depends on the history of losses, and gives "weight" too.
    """

    def __init__(self, config: VPObjectiveConfig, schedule: VPSchedule | None = None) -> None:
        """Takes a `schedule` if the process is not the config's full one, but for example a respaced one."""
        self.config, self.label_dropout = config, config.label_dropout
        self.schedule = make_schedule(config.schedule, config.steps) if schedule is None else schedule
        self.process = GaussianProcess(self.schedule, config.prediction, config.variance)
        self.time_factor = 1000 / config.steps if config.rescale_time else 1.0
        if config.time_sampling == "loss-second-moment":
            self.sampling = LossSecondMoment(len(self.schedule))

    def draw(self, generator: torch.Generator, count: int, shape: Shape) -> dict[str, Tensor]:
        if self.sampling:
            steps = dict(zip(("t", "weight"), self.sampling.draw(generator, count), strict=True))
        else:
            steps = {"t": torch.randint(len(self.schedule), (count,), generator=generator)}
        return steps | {
            "coin": torch.rand(count, generator=generator),
            "noise": torch.randn(count, *shape, generator=generator),
        }

    def losses(self, network: nn.Module, images: Images, label: Labels, draws: Draws) -> dict[str, Tensor]:
        """Returns "loss", and "mse" and "vb" (bits per dimension, as in the loss) if they are computed.

        If the draws have a "weight", the loss is multiplied by it, and "unweighted" is the loss without it.
        """
        losses = self._losses(network, images, label, draws)
        if "weight" in draws:
            losses |= {"unweighted": losses["loss"].detach(), "loss": losses["loss"] * draws["weight"]}
        return losses

    def _losses(self, network: nn.Module, images: Tensor, label: Tensor | None, draws: Draws) -> dict[str, Tensor]:
        config, process, t, channels = self.config, self.process, draws["t"], images.shape[1]
        x = process.q_sample(images, t, draws["noise"])
        time = process.at("timesteps", t).reshape(-1) * self.time_factor
        output = network(x, time, self._drop_labels(network, label, draws["coin"])).float()
        if output.shape[1] != (expected := self.network_outputs(channels)):
            raise DitlabError(
                f"objective: expected {expected} channels from the network (variance {config.variance}), "
                f"found {output.shape[1]}"
            )
        if config.loss in ("kl", "kl-unscaled"):
            vb = process.bound(images, x, t, process.reverse(*process.split(output, x, t), x, t))
            # One term of T; T times it estimates the whole bound.
            vb = vb * len(self.schedule) if config.loss == "kl" else vb
            return {"loss": vb, "vb": vb}
        target = draws["noise"] if config.prediction == "epsilon" else images
        mse = flat_mean((target - output[:, :channels]) ** 2)
        if config.variance != "learned-range":
            return {"loss": mse, "mse": mse}
        # The bound trains the variance alone: the prediction is detached (Nichol and Dhariwal, section 3.1).
        x0, v = process.split(output, x, t)
        vb = process.bound(images, x, t, process.reverse(x0.detach(), v, x, t))
        if config.loss == "rescaled-mse":
            vb = vb * (len(self.schedule) / 1000)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def denoiser(self, network: nn.Module, shape: Shape | None = None) -> VPDenoiser:
        config = self.config
        return VPDenoiser(
            network,
            self.schedule,
            config.prediction,
            config.variance,
            shape=shape,
            between=config.between,
            rescale_time=config.rescale_time,
        )

    def network_outputs(self, channels: int) -> int:
        return 2 * channels if self.config.variance == "learned-range" else channels


class EDMObjective(Objective):
    """Weighted squared error of the denoised image; `draw` gives "sigma", "noise" unit normal and "coin" uniform.

    The loss is the mean over an image's values; EDM's code has their sum. Adam does not depend on that factor.
    """

    def __init__(self, config: EDMObjectiveConfig) -> None:
        self.config, self.label_dropout = config, config.label_dropout

    def draw(self, generator: torch.Generator, count: int, shape: Shape) -> dict[str, Tensor]:
        sampler = torch.randn if self.config.precond == "edm" else torch.rand
        return {
            "sigma": self.sigmas(sampler(count, generator=generator)),
            "coin": torch.rand(count, generator=generator),
            "noise": torch.randn(count, *shape, generator=generator),
        }

    def sigmas(self, unit: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Returns training levels from unit normal ("edm") or uniform ("vp", "ve") numbers."""
        unit = unit.double()
        if self.config.precond == "edm":
            sigma = (unit * self.config.p_std + self.config.p_mean).exp()
        elif self.config.precond == "vp":
            time = 1 + unit * (1e-5 - 1)  # down to the lowest level in training (Karras et al. 2022, Table 1)
            sigma = (0.5 * VP_BETA_D * time**2 + VP_BETA_MIN * time).expm1().sqrt()
        else:
            low, high = LEVEL_LIMITS["ve"]
            sigma = low * (high / low) ** unit
        return sigma.float()

    def weight(self, sigma: Tensor) -> Tensor:
        """Returns the loss weight lambda of each level."""
        if self.config.precond == "edm":
            data = self.config.sigma_data
            return (sigma**2 + data**2) / (sigma * data) ** 2
        return sigma**-2

    def losses(self, network: nn.Module, images: Images, label: Labels, draws: Draws) -> dict[str, Tensor]:
        """Returns "loss" (weighted) and "mse" (of the clean image)."""
        sigma = draws["sigma"].reshape(-1, 1, 1, 1)
        denoiser = self.denoiser(network, (images.shape[1], images.shape[2], images.shape[3]))
        label = self._drop_labels(network, label, draws["coin"])
        mse = flat_mean((denoiser.estimate(images + sigma * draws["noise"], sigma, label).x0 - images) ** 2)
        return {"loss": self.weight(draws["sigma"]) * mse, "mse": mse}

    def denoiser(self, network: nn.Module, shape: Shape | None = None) -> EDMDenoiser:
        return EDMDenoiser(network, self.config.precond, self.config.sigma_data, shape=shape)


class BlindObjective(Objective):
    """Summed squared error of the noise that a network without the noise level as input estimates.

    `draw` gives "sigma", in the network's units, and "noise", unit normal.
    """

    def __init__(self, config: BlindObjectiveConfig) -> None:
        self.config = config
        self.unit = (config.high - config.low) / 2

    def draw(self, generator: torch.Generator, count: int, shape: Shape) -> dict[str, Tensor]:
        # The square root of a level is uniform, so low levels are drawn more often than high ones.
        sigma = self.config.max_level * torch.rand(count, generator=generator).square()
        return {"sigma": sigma, "noise": torch.randn(count, *shape, generator=generator)}

    def losses(self, network: nn.Module, images: Images, label: Labels, draws: Draws) -> dict[str, Tensor]:
        """Returns "loss": the squared error of the noise, in the network's units, summed over the image."""
        noise = draws["sigma"].reshape(-1, 1, 1, 1) * draws["noise"]
        output = network(self.config.low + self.unit * (images + 1) + noise, None, None).float()
        if output.shape != images.shape:
            raise DitlabError(
                f"objective: expected {images.shape[1]} channels from the network, found {output.shape[1]}"
            )
        return {"loss": (output - noise).square().flatten(1).sum(1)}

    def denoiser(self, network: nn.Module, shape: Shape | None = None) -> BlindDenoiser:
        config = self.config
        levels = LevelRange(0.0, config.max_level / self.unit)
        return BlindDenoiser(network, levels, low=config.low, high=config.high, shape=shape)


OBJECTIVES: dict[type, Callable[[Any], Objective]] = {
    VPObjectiveConfig: VPObjective,
    EDMObjectiveConfig: EDMObjective,
    BlindObjectiveConfig: BlindObjective,
}
"""The objective of each config."""
