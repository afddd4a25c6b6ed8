"""Denoising networks: `(x, t, label=None) -> raw output`, with no knowledge of any noise schedule."""

from ditlab.networks.bias_free import BFCNN, BFCNNConfig
from ditlab.networks.bias_free_unet import BFUNet, BFUNetConfig
from ditlab.networks.dit import DiT, DiTConfig
from ditlab.networks.unet import UNet, UNetConfig

__all__ = ["BFCNN", "BFCNNConfig", "BFUNet", "BFUNetConfig", "DiT", "DiTConfig", "UNet", "UNetConfig"]
