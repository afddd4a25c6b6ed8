"""BF-CNN, a bias-free network: a denoiser without any additive constant, so that scaling the input scales the output.

Source: Mohan et al., "Robust and Interpretable Blind Image Denoising via Bias-Free Convolutional Neural Networks"
(2020). The network is a plain stack of convolutions: conv and ReLU first; then conv, bias-free batch norm and ReLU; a
bare conv last. It is blind (its only input is the noisy image) and predicts the noise. Its parameters have the names of
the published weights, so `load_state_dict` reads them unchanged.

The bias-free UNet is in `ditlab.networks.bf_unet`, the normalization of both in `ditlab.networks.bf_norm`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from ditlab.networks.bf_cnn_config import BFCNNConfig
from ditlab.networks.bf_norm import bias_free_norm, initial_gamma
from ditlab.networks.module import BlindNetwork


class BFCNN(BlindNetwork[BFCNNConfig]):
    """The bias-free CNN: noisy image -> noise, in the units of the image.

    Example:
        >>> network = BFCNN(BFCNNConfig(channels=1, width=8, depth=4)).eval()
        >>> y = torch.ones(1, 1, 5, 5)
        >>> torch.allclose(network(3 * y), 3 * network(y), atol=1e-5)
        True
    """

    title = "BF-CNN"

    def __init__(self, config: BFCNNConfig) -> None:
        super().__init__(config)
        widths = [config.channels, *[config.width] * (config.depth - 1), config.channels]
        self.conv_layers = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=False) for before, after in pairwise(widths)
        )
        normed = range(config.depth - 2)
        self.gammas = nn.ParameterList(initial_gamma(config.width) for _ in normed)
        # A module, so that the buffers get the published names running_sd.0, running_sd.1, ...
        self.running_sd = nn.Module()
        for layer in normed:
            self.running_sd.register_buffer(str(layer), torch.ones(1, config.width, 1, 1))
        for conv in self.conv_layers:
            assert isinstance(conv, nn.Conv2d)
            nn.init.kaiming_normal_(conv.weight)

    def _noise(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv_layers[0](x))
        for layer, conv in enumerate(self.conv_layers[1:-1]):
            running = self.running_sd.get_buffer(str(layer))
            x = torch.relu(bias_free_norm(conv(x), self.gammas[layer], running, self.training))
        return self.conv_layers[-1](x)


__all__ = ["BFCNN"]
