"""Published weights of bias-free networks as references."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ditlab.analyses.psnr_gap.config import PSNRConfig
from ditlab.analyses.psnr_gap.measure import measure_gap as psnr_gap
from ditlab.data import prepare
from ditlab.diffusion.network_denoisers import BlindDenoiser
from ditlab.errors import DitlabError
from ditlab.interop.bias_free import infer_config, is_bias_free
from ditlab.interop.checkpoints import open_checkpoint
from ditlab.models.opening import load, open_model
from ditlab.models.split_config import SplitConfig
from ditlab.networks.bf_cnn import BFCNN
from ditlab.networks.bf_cnn_config import BFCNNConfig
from ditlab.networks.bf_unet import BFUNet
from ditlab.networks.bf_unet_config import BFUNetConfig

UNETS = [
    BFUNetConfig(channels=1, width=4, blocks=3),
    BFUNetConfig(width=6, blocks=1, encoder_convs=3, middle_convs=1, decoder_convs=1, kernel=5),
]


def saved(network: torch.nn.Module, path: Path, prefix: str = "") -> Path:
    state = {prefix + key: value.clone() for key, value in network.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.fixture
def digits(tmp_path):
    return prepare("digits", tmp_path / "digits", size=16, color="grey", upscale=True, near_duplicates=None)


@pytest.mark.parametrize("name", ["unet.pt", "unet.safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("config", UNETS)
def test_a_unets_shape_is_told_by_its_weights(tmp_path, config, prefix, name):
    network = BFUNet(config).eval()
    path = saved(network, tmp_path / name, prefix)
    model = open_checkpoint(path)
    assert model.denoiser.network.config == config
    assert isinstance(model.denoiser, BlindDenoiser)
    assert (model.denoiser.levels.min, model.denoiser.levels.max, model.denoiser.origin) == (0, 2, -1)
    assert model.source["format"] == "published bias-free UNet"
    assert "images in [0, 1], the noise as output and noise levels up to 1 of" in model.notes[0]
    assert "Average pooling over 2 pixels was assumed" in model.notes[1]
    y = torch.randn(2, config.channels, 32, 32)
    torch.testing.assert_close(model.denoiser(y, 0.5), y - 2 * network((y + 1) / 2))


def test_a_cnns_shape_is_told_by_its_weights(tmp_path):
    config = BFCNNConfig(channels=1, width=5, depth=4)
    path = saved(BFCNN(config), tmp_path / "cnn.pt")
    model = open_checkpoint(path)
    assert model.denoiser.network.config == config
    assert model.denoiser.levels.max == pytest.approx(200 / 255)
    assert len(model.notes) == 1
    assert isinstance(load(path), BlindDenoiser)


def test_it_takes_the_size_of_the_images_it_is_given(tmp_path, digits):
    path = saved(BFUNet(UNETS[0]), tmp_path / "unet.pt")
    opened = open_model(path, digits.path, split=SplitConfig(n=20, test=10))
    denoiser, about = opened.denoiser_and_provenance()
    assert denoiser.shape == (1, 16, 16) == opened.images.shape
    images, _ = opened.batch("test", 4)
    assert denoiser(images, 0.2).shape == (4, 1, 16, 16)
    assert about.settings["model"]["format"] == "published bias-free UNet"
    assert opened.settings["network.image_size"] == (16, 16)
    deep = saved(BFUNet(BFUNetConfig(channels=1, width=2, blocks=5)), tmp_path / "deep.pt")
    with pytest.raises(DitlabError, match="multiples of 32 for 5 blocks, found 16x16"):
        open_model(deep, digits.path).denoiser_and_provenance()
    colour = saved(BFUNet(UNETS[1]), tmp_path / "colour.pt")
    with pytest.raises(DitlabError, match=r"expected images 3x32x32, found 1x16x16"):
        open_model(colour, digits.path).denoiser_and_provenance()
    with pytest.raises(DitlabError, match="one set of weights only"):
        opened.denoiser_and_provenance(ema=False)


def test_weights_that_are_not_whole_are_refused(tmp_path):
    def refused(state: dict[str, torch.Tensor], says: str) -> None:
        torch.save(state, tmp_path / "broken.pt")
        with pytest.raises(DitlabError, match=says):
            open_checkpoint(tmp_path / "broken.pt")

    unet, cnn = BFUNet(UNETS[0]).state_dict(), BFCNN(BFCNNConfig(width=4, depth=4)).state_dict()
    assert is_bias_free(unet)
    assert is_bias_free(cnn)
    refused({k: v for k, v in unet.items() if k != "decoder.1.4.gammas"}, "missing, the first 'decoder.1.4.gammas'")
    refused({k: v for k, v in unet.items() if not k.startswith("encoder.1")}, r"numbered from 0, found \[0, 2\]")
    refused({k: v for k, v in cnn.items() if k != "conv_layers.2.weight"}, r"found \[0, 1, 3\]")
    refused(cnn | {"conv_layers.0.weight": torch.zeros(4, 3, 5, 5)}, "kernels of side 3 in a BF-CNN, found 5")
    refused(unet | {"encoder.0.0.weight": torch.zeros(4, 1, 2, 2)}, r"broken.pt: expected kernels of an odd side .* 2$")
    refused(cnn | {"conv_layers.0.weight": torch.zeros(4)}, r"found the shape \(4,\)")
    refused(cnn | {"conv_layers.0.bias": torch.zeros(4)}, "'conv_layers.0.bias' has no counterpart")
    refused({"weight": torch.zeros(3)}, "a bias-free CNN or UNet, found another network's")
    refused(cnn | {"conv_layers.0.weight": torch.zeros(4, 3, 3, 2)}, r"square kernels in .* \(4, 3, 3, 2\)")
    with pytest.raises(DitlabError, match=r"here: expected 'encoder.0.0.weight' with 4 dimensions .* found none"):
        infer_config({"x": torch.zeros(3)}, "here")


def test_published_weights_gain_seven_decibels(shared, tmp_path):
    weights = shared / "weights" / "bf_cnn_BSD300_color.safetensors"
    if not weights.is_file():
        pytest.skip(f"no {weights.name} in ../shared/weights beside the checkout")
    images = prepare("photos", tmp_path / "photos", size=32, near_duplicates=None)
    opened = open_model(weights, images.path, split=SplitConfig(test=16))
    denoiser, about = opened.denoiser_and_provenance()
    assert denoiser.network.config == BFCNNConfig()
    pictures, _ = opened.batch("test", 16)
    result = psnr_gap(denoiser, pictures, pictures, PSNRConfig(images=16, sigmas=(50 / 255,)), about=about)
    before = -20 * torch.tensor(25 / 255).log10().item()
    assert before == pytest.approx(20.17, abs=0.01)
    assert result.curve("test")[0] > before + 7
