"""Denoising networks: `(x, t, label=None) -> raw output`, with no knowledge of any noise schedule.

`from ditlab.networks import DiT, DiTConfig` works for every network of the registry. A network's module, and torch with
it, is imported when its class is first used.
"""

from __future__ import annotations

from typing import Any

from ditlab.networks.registry import NETWORKS, NetworkConfig, build_network, network_class, register

__all__ = ["NETWORKS", "NetworkConfig", "build_network", "network_class", "register"]


def __getattr__(name: str) -> Any:
    for config, network in NETWORKS.items():
        if name == config.__name__:
            return config
        if isinstance(network, str) and name == network.partition(":")[2]:
            return network_class(config)
    raise AttributeError(f"module 'ditlab.networks' has no attribute '{name}'")
