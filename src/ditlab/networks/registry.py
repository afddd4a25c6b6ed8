"""The one list of ditlab's networks: a line for each, with its config and where its class is."""

from __future__ import annotations

from ditlab.networks.base import NETWORKS, NetworkConfig, build_network, network_class, register
from ditlab.networks.bf_cnn_config import BFCNNConfig
from ditlab.networks.bf_unet_config import BFUNetConfig
from ditlab.networks.dit_config import DiTConfig
from ditlab.networks.unet_config import UNetConfig

register(BFCNNConfig)("ditlab.networks.bf_cnn:BFCNN")
register(BFUNetConfig)("ditlab.networks.bf_unet:BFUNet")
register(DiTConfig)("ditlab.networks.dit:DiT")
register(UNetConfig)("ditlab.networks.unet:UNet")

__all__ = ["NETWORKS", "NetworkConfig", "build_network", "network_class", "register"]
