"""Denoising networks: `(x, t, label=None) -> raw output`, with no knowledge of any noise schedule."""

from ditlab.networks.bf_cnn import BFCNN, BFCNNConfig
from ditlab.networks.bf_unet import BFUNet, BFUNetConfig
from ditlab.networks.dit import DiT, DiTConfig
from ditlab.networks.unet import UNet, UNetConfig

__all__ = ["BFCNN", "BFCNNConfig", "BFUNet", "BFUNetConfig", "DiT", "DiTConfig", "UNet", "UNetConfig"]
