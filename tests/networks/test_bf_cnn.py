from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ditlab.errors import DitlabError
from ditlab.networks.bf_cnn import BFCNN
from ditlab.networks.bf_cnn_config import BFCNNConfig
from ditlab.rng import torch_generator


def scenes(shared, count: int) -> torch.Tensor:
    """Natural images [N, 3, 32, 32] in [0, 1]."""
    from PIL import Image

    path = shared / "data" / "scenes32_test_00.webp"
    if not path.is_file():
        pytest.skip("no ../shared/data/scenes32_test_00.webp beside the checkout")
    mosaic = np.asarray(Image.open(path))
    tiles = mosaic.reshape(32, 32, 32, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    return torch.from_numpy(tiles[:count].astype(np.float32) / 255)


@pytest.mark.parametrize(("name", "channels", "expected"), [("BSD300_color", 3, 27.3), ("BSD400_gray", 1, 25.5)])
def test_published_weights_denoise_natural_images(shared, name, channels, expected):
    weights = shared / "weights" / f"bf_cnn_{name}.safetensors"
    if not weights.is_file():
        pytest.skip(f"no {weights.name} in ../shared/weights beside the checkout")
    network = BFCNN(BFCNNConfig(channels=channels))
    network.load_state_dict(load_file(weights))
    network.eval()
    clean = scenes(shared, 16)
    clean = clean if channels == 3 else clean.mean(1, keepdim=True)
    noise = 25 / 255 * torch.randn(clean.shape, generator=torch_generator(0, "noise"))
    with torch.no_grad():
        denoised = clean + noise - network(clean + noise)
    before, after = (-10 * e.square().mean().log10().item() for e in (noise, denoised - clean))
    assert before == pytest.approx(20.2, abs=0.1)
    assert after > expected


def test_it_is_homogeneous_at_any_size():
    network = BFCNN(BFCNNConfig(channels=1, width=8, depth=5)).eval()
    with torch.no_grad():
        for gamma in network.gammas:
            gamma.normal_(generator=torch_generator(0, "gamma"))
    y = torch.randn(2, 1, 7, 9, generator=torch_generator(0, "y"))
    torch.testing.assert_close(network(5 * y), 5 * network(y))
    assert network(y).abs().max() > 0
    assert network.in_shape == (1, 32, 32)


def test_training_divides_by_the_batch_and_remembers_it():
    network = BFCNN(BFCNNConfig(channels=1, width=4, depth=3))
    y = torch.randn(8, 1, 6, 6, generator=torch_generator(0, "y"))
    network(y).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    inside = network.conv_layers[1](torch.relu(network.conv_layers[0](y)))
    deviation = inside.var(dim=(0, 2, 3), unbiased=False).add(1e-5).sqrt()
    remembered = network.state_dict()["running_sd.0"].flatten()
    torch.testing.assert_close(remembered, (0.9 + 0.1 * deviation).detach())


def test_bad_input_is_one_sentence():
    with pytest.raises(DitlabError, match="BF-CNN config"):
        BFCNNConfig(depth=1)
    with pytest.raises(DitlabError, match="no `augment`"):
        BFCNN(BFCNNConfig(width=4, depth=2))(torch.zeros(1, 3, 4, 4), augment=torch.zeros(1))
