from __future__ import annotations

import pydantic
import pytest
import torch

from ditlab.config import ObjectiveSettings
from ditlab.diffusion.network_denoisers import BlindDenoiser
from ditlab.diffusion.objective_configs import BlindObjectiveConfig, EDMObjectiveConfig, VPObjectiveConfig
from ditlab.errors import DitlabError
from ditlab.networks.bf_cnn import BFCNN
from ditlab.networks.bf_cnn_config import BFCNNConfig
from ditlab.networks.bf_unet import BFUNet
from ditlab.networks.bf_unet_config import BFUNetConfig
from ditlab.rng import torch_generator

IMAGES = torch.rand(6, 3, 8, 8, generator=torch_generator(0, "images")) * 2 - 1


class Seen(torch.nn.Module):
    """Answers with a multiple of what it sees, and remembers that."""

    def __init__(self, factor: float = 0.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x, t, label=None):
        assert t is None
        assert label is None
        self.x = x
        return self.factor * x


def test_levels_are_squares_of_uniform_numbers():
    draws = BlindObjectiveConfig(max_level=0.5).build().draw(torch_generator(0, "draw"), 50_000, (1, 1, 1))
    root = (draws["sigma"] / 0.5).sqrt().sort().values
    torch.testing.assert_close(root, torch.linspace(0, 1, 50_000), rtol=0, atol=0.01)
    assert draws["noise"].shape == (50_000, 1, 1, 1)


def test_the_loss_is_the_summed_squared_error_of_the_noise_in_units_of_zero_to_one():
    objective = BlindObjectiveConfig().build()
    draws = objective.draw(torch_generator(0, "draw"), 6, (3, 8, 8))
    noise = draws["sigma"].reshape(-1, 1, 1, 1) * draws["noise"]
    network = Seen()
    result = objective.losses(network, IMAGES, None, draws)["loss"]
    torch.testing.assert_close(network.x, (IMAGES + 1) / 2 + noise)
    torch.testing.assert_close(result, noise.square().sum((1, 2, 3)))
    result = objective.losses(Seen(0.3), IMAGES, torch.zeros(6, dtype=torch.int64), draws)["loss"]
    torch.testing.assert_close(result, (0.3 * ((IMAGES + 1) / 2 + noise) - noise).square().sum((1, 2, 3)))


def test_its_denoiser_sees_what_the_network_saw_in_training():
    config = BlindObjectiveConfig(max_level=0.4)
    objective, network = config.build(), Seen(0.3)
    draws = objective.draw(torch_generator(0, "draw"), 6, (3, 8, 8))
    loss = objective.losses(network, IMAGES, None, draws)["loss"]
    seen = network.x
    denoiser = objective.denoiser(network, (3, 8, 8))
    assert isinstance(denoiser, BlindDenoiser)
    assert denoiser.blind
    assert denoiser.levels.max == pytest.approx(0.8)  # twice as much in units of [-1, 1]
    sigma = 2 * draws["sigma"]
    estimate = denoiser(IMAGES + sigma.reshape(-1, 1, 1, 1) * draws["noise"], sigma)
    torch.testing.assert_close(network.x, seen)
    torch.testing.assert_close((estimate - IMAGES).square().sum((1, 2, 3)), 4 * loss, rtol=1e-4, atol=1e-5)
    assert objective.network_outputs(3) == 3
    assert objective.state_dict() == {}


@pytest.mark.parametrize(
    "network", [BFCNN(BFCNNConfig(width=4, depth=3)), BFUNet(BFUNetConfig(width=4, blocks=1))], ids=["cnn", "unet"]
)
@pytest.mark.parametrize(
    "config",
    [
        BlindObjectiveConfig(),
        VPObjectiveConfig(variance="fixed-large"),
        VPObjectiveConfig(variance="fixed-small", prediction="x0"),
        EDMObjectiveConfig(),
    ],
    ids=["blind", "vp", "vp x0", "edm"],
)
def test_blind_networks_can_be_trained_with_any_objective(network, config):
    objective = config.build()
    draws = objective.draw(torch_generator(0, "draw"), 6, (3, 8, 8))
    network.train().zero_grad()
    loss = objective.losses(network, IMAGES, None, draws)["loss"]
    assert loss.shape == (6,)
    loss.mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
    denoiser = objective.denoiser(network.eval(), (3, 8, 8))
    # Only the blind objective's denoiser makes nothing of the level: the others scale by it what the network sees.
    assert denoiser.blind == isinstance(config, BlindObjectiveConfig)
    a, b = (denoiser(IMAGES, level) for level in (0.2, 0.7))
    assert torch.equal(a, b) == denoiser.blind


def test_what_cannot_be_trained_is_refused():
    for change, says in (
        ({"low": 1.0}, "low < high, found 1.0 and 1.0"),
        ({"max_level": 0.0}, "max_level > 0, found 0.0"),
        ({"max_level": float("nan")}, "max_level > 0"),
        ({"max_level": float("inf")}, "finite max_level > 0, found inf"),
        ({"high": float("inf")}, "finite low < high"),
    ):
        with pytest.raises(DitlabError, match=says):
            BlindObjectiveConfig(**change)
    draws = {"sigma": torch.ones(6), "noise": torch.zeros_like(IMAGES)}

    class Double(torch.nn.Module):
        def forward(self, x, t, label=None):
            return torch.cat([x, x], 1)

    with pytest.raises(DitlabError, match="expected 3 channels from the network, found 6"):
        BlindObjectiveConfig().build().losses(Double(), IMAGES, None, draws)


def test_its_config_goes_through_json():
    adapter = pydantic.TypeAdapter(ObjectiveSettings)
    config = BlindObjectiveConfig(low=-1.0, max_level=0.3)
    assert adapter.validate_json(adapter.dump_json(config)) == config
