"""Every network by the `kind` of its config: how ditlab builds a network from a config.json."""

from __future__ import annotations

import torch
from torch import nn

from ditlab.networks.bf_cnn import BFCNN, BFCNNConfig
from ditlab.networks.bf_unet import BFUNet, BFUNetConfig
from ditlab.networks.dit import DiT, DiTConfig
from ditlab.networks.unet import UNet, UNetConfig
from ditlab.rng import key

NetworkConfig = DiTConfig | UNetConfig | BFCNNConfig | BFUNetConfig
"""The configs that a run can hold, told apart by `kind`."""

NETWORKS: dict[type, type[nn.Module]] = {DiTConfig: DiT, UNetConfig: UNet, BFCNNConfig: BFCNN, BFUNetConfig: BFUNet}
"""Which module a config builds."""


def build_network(config: NetworkConfig, seed: int = 0) -> nn.Module:
    """A network on the CPU with the initial weights of a seed; torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "weights"))
        return NETWORKS[type(config)](config)
