"""The one list of ditlab's networks. Importing a network's file registers it; a line here makes it part of ditlab."""

# ruff: noqa: F401
from ditlab.networks.base import NETWORKS, NetworkConfig, build_network, register
from ditlab.networks.bf_cnn import BFCNN, BFCNNConfig
from ditlab.networks.bf_unet import BFUNet, BFUNetConfig
from ditlab.networks.dit import DiT, DiTConfig
from ditlab.networks.unet import UNet, UNetConfig
