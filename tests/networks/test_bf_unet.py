"""The bias-free UNet against the original's numbers, and what makes a bias-free network one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ditlab.diffusion.blind_objective import BlindObjectiveConfig
from ditlab.errors import DitlabError
from ditlab.networks.bf_cnn import BFCNN, BFCNNConfig
from ditlab.networks.bf_norm import initial_gamma
from ditlab.networks.bf_unet import BFUNet, BFUNetConfig
from ditlab.rng import torch_generator


@pytest.fixture
def kad(golden):
    return golden("04_kad_unet_a")


def of_the_golden(kad) -> BFUNet:
    network = BFUNet(BFUNetConfig(image_size=(16, 16), channels=1, width=8, blocks=2))
    network.load_state_dict(kad.weights())  # every name is the published one
    return network


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


def test_evaluation_equals_the_original(kad):
    network = of_the_golden(kad).eval()
    torch.testing.assert_close(network(kad["in.x"]), kad["out.y"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network.double()(kad["in.x"].double()), kad["out64.y"], rtol=0, atol=1e-9)


def test_training_mode_equals_the_original(kad):
    network = of_the_golden(kad).double().train()
    torch.testing.assert_close(network(kad["in.x"].double()), kad["out64.y_train"], rtol=0, atol=1e-9)
    after = network.state_dict()
    remembered = [key.removeprefix("out64.after_train.") for key in kad.tensors if "after_train" in key]
    assert sorted(remembered) == sorted(key for key in after if "running_sd" in key)
    for key in remembered:
        torch.testing.assert_close(after[key], kad[f"out64.after_train.{key}"], rtol=0, atol=1e-9)


def test_the_jacobian_equals_the_originals(kad):
    network = of_the_golden(kad).double().eval()
    x = kad["in.x_jac"].double()
    found = torch.func.jacrev(network)(x).reshape(256, 256)
    torch.testing.assert_close(found, kad["out.J"].double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found @ x.flatten(), network(x).flatten(), rtol=0, atol=1e-9)


def test_counts_equal_the_originals():
    counts = json.loads((Path(__file__).parents[1] / "data" / "goldens" / "04_kad_counts.json").read_text())["values"]
    for case in counts:
        args = case["args"]
        config = BFUNetConfig(
            channels=args["num_channels"],
            width=args["num_kernels"],
            blocks=args["num_blocks"],
            encoder_convs=args["num_enc_conv"],
            middle_convs=args["num_mid_conv"],
            decoder_convs=args["num_dec_conv"],
            kernel=args["kernel_size"],
            pool_window=args["pool_window"],
        )
        with torch.device("meta"):
            network = BFUNet(config)
        assert sum(p.numel() for p in network.parameters()) == case["params"]
        assert sum(b.numel() for b in network.buffers()) == case["buffers"]
    assert len(counts) == 4


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
    with pytest.raises(DitlabError, match="no augmentation"):
        BFUNet(BFUNetConfig(width=2, blocks=1))(torch.zeros(1, 3, 4, 4), augment=torch.zeros(1))
