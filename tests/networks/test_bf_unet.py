"""The bias-free UNet against the original's numbers, and what makes a bias-free network one."""

from __future__ import annotations

import pytest
import torch

from ditlab.diffusion.objective_configs import BlindObjectiveConfig
from ditlab.errors import DitlabError
from ditlab.networks.bf_cnn import BFCNN
from ditlab.networks.bf_cnn_config import BFCNNConfig
from ditlab.networks.bf_norm import initial_gamma
from ditlab.networks.bf_unet import BFUNet
from ditlab.networks.bf_unet_config import BFUNetConfig
from ditlab.rng import torch_generator


@pytest.fixture
def kad(golden):
    return golden("04_kad_unet_a")


def stirred(network: torch.nn.Module) -> torch.nn.Module:
    """In float64 and evaluation mode, with factors and deviations that are not small or one."""
    generator = torch_generator(0, "stirred")
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if "gamma" in name or "running_sd" in name:
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
    return network.double().eval()


BOTH = pytest.mark.parametrize(
    "network",
    [
        BFCNN(BFCNNConfig(channels=2, width=6, depth=5)),
        BFUNet(BFUNetConfig(channels=2, width=4, blocks=2)),
        BFUNet(BFUNetConfig(channels=2, width=4, blocks=1, encoder_convs=1, middle_convs=3, decoder_convs=1, kernel=5)),
        BFUNet(BFUNetConfig(channels=2, width=4, blocks=1, pool_window=3)),
    ],
    ids=["bf-cnn", "bf-unet", "bf-unet of other counts", "bf-unet of window 3"],
)


def test_evaluation_equals_the_original(kad, bf_unet_of):
    network = bf_unet_of(kad)
    atol, rtol = kad.tolerance("out.y"), kad.tolerance("out.y", 1)
    torch.testing.assert_close(network(kad["in.x"]), kad["out.y"], rtol=rtol, atol=atol)
    wide = network.double()(kad["in.x"].double())
    torch.testing.assert_close(wide, kad["out64.y"], rtol=0, atol=kad.tolerance("out64"))


def test_training_mode_equals_the_original(kad, bf_unet_of):
    network, tolerance = bf_unet_of(kad).double().train(), kad.tolerance("out64")
    torch.testing.assert_close(network(kad["in.x"].double()), kad["out64.y_train"], rtol=0, atol=tolerance)
    after = network.state_dict()
    recorded = {match[1]: kad[match[0]] for match in kad.matches(r"out64\.after_train\.(.+)")}
    assert sorted(recorded) == sorted(key for key in after if "running_sd" in key)
    for key, expected in recorded.items():
        torch.testing.assert_close(after[key], expected, rtol=0, atol=tolerance)


def test_the_jacobian_equals_the_originals(kad, bf_unet_of):
    network = bf_unet_of(kad).double()
    x, expected = kad["in.x_jac"].double(), kad["out.J"].double()
    jacobian = torch.func.jacrev(network)(x).reshape(expected.shape)
    torch.testing.assert_close(jacobian, expected, rtol=0, atol=kad.tolerance("out.J"))
    product = jacobian @ x.flatten()
    torch.testing.assert_close(product, network(x).flatten(), rtol=0, atol=kad.tolerance("out64"))


def test_counts_equal_the_originals(golden, bf_unet_config):
    counts = golden("04_kad_counts").values
    for case in counts:
        with torch.device("meta"):
            network = BFUNet(bf_unet_config(case["args"]))
        assert sum(p.numel() for p in network.parameters()) == case["params"]
        assert sum(b.numel() for b in network.buffers()) == case["buffers"]
    assert counts


@BOTH
def test_it_equals_its_jacobian_times_the_image(network):
    network = stirred(network)
    y = torch.randn(1, 2, 8, 8, generator=torch_generator(0, "y"), dtype=torch.float64)
    out = network(y)
    assert out.abs().max() > 0.01
    scale = out.abs().max().item()
    jacobian = torch.func.jacrev(network)(y).reshape(128, 128)
    torch.testing.assert_close(jacobian @ y.flatten(), out.flatten(), rtol=0, atol=1e-12 * max(scale, 1))
    torch.testing.assert_close(network(3.7 * y), 3.7 * out, rtol=0, atol=1e-12 * max(scale, 1))
    assert not network(torch.zeros_like(y)).any()
    # No parameter is additive: each layer's output on zeros is zero in training too.
    assert not network.train()(torch.zeros_like(y)).any()


@BOTH
@pytest.mark.parametrize(("low", "high", "origin"), [(0.0, 1.0, -1.0), (-1.0, 1.0, 0.0)])
def test_the_denoiser_is_homogeneous_about_its_origin(network, low, high, origin):
    objective = BlindObjectiveConfig(low=low, high=high).build()
    denoiser = objective.denoiser(stirred(network), (2, 8, 8))
    assert denoiser.origin == origin
    assert denoiser.levels.max == 2 / (high - low)
    y = torch.randn(1, 2, 8, 8, generator=torch_generator(0, "y"), dtype=torch.float64)
    out = denoiser(y, 0.5) - origin
    torch.testing.assert_close(denoiser(origin + 2.5 * (y - origin), 0.7) - origin, 2.5 * out, rtol=0, atol=1e-12)
    jacobian = torch.func.jacrev(lambda z: denoiser.estimate(z, 0.5).x0)(y).reshape(128, 128)
    torch.testing.assert_close(jacobian @ (y - origin).flatten(), out.flatten(), rtol=0, atol=1e-12)


def test_a_new_network_has_the_published_factors():
    gamma = initial_gamma(20_000)
    assert gamma.shape == (1, 20_000, 1, 1)
    assert gamma.std().item() == pytest.approx(2 / 576, rel=0.03)
    network = BFUNet(BFUNetConfig(width=8, blocks=1))
    assert network(torch.rand(4, 3, 8, 8)).std() < 0.02  # next to nothing, so a new denoiser leaves the image alone


def test_any_size_that_can_be_halved():
    network = BFUNet(BFUNetConfig(width=2, blocks=2, image_size=(8, 8))).eval()
    assert network(torch.zeros(1, 3, 12, 4)).shape == (1, 3, 12, 4)
    assert network.in_shape == (3, 8, 8)
    with pytest.raises(DitlabError, match="multiples of 4 for 2 blocks, found 12x6"):
        network(torch.zeros(1, 3, 12, 6))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"blocks": 0}, "blocks must be at least 1, found 0"),
        ({"width": 0}, "width must be at least 1"),
        ({"kernel": 4}, "kernel must be odd, found 4"),
        ({"image_size": (12, 8)}, "multiples of 8 for 3 blocks, found 12x8"),
        ({"image_size": (0, 8)}, "image sides of at least 1"),
    ],
)
def test_what_cannot_be_built_is_refused(change, says):
    with pytest.raises(DitlabError, match=says):
        BFUNetConfig(**change)
    BFUNetConfig(image_size=(0, 0))  # not known yet


def test_augmentation_is_refused():
    with pytest.raises(DitlabError, match="no `augment`"):
        BFUNet(BFUNetConfig(width=2, blocks=1))(torch.zeros(1, 3, 4, 4), augment=torch.zeros(1))
