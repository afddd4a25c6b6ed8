"""Weights of the original DiT implementation, renamed into `ditlab.networks.DiT`.

The original's names were read from its published checkpoints' keys; every tensor has the same layout there and here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ditlab.errors import DitlabError
from ditlab.networks.dit import DiT, DiTConfig

_NAMES = {
    "x_embedder.proj": "embed",
    "t_embedder.mlp.0": "time.hidden",
    "t_embedder.mlp.2": "time.out",
    "y_embedder.embedding_table": "label.table",
    "final_layer.linear": "final.out",
    "final_layer.adaLN_modulation.1": "final.modulation",
}
_BLOCK_NAMES = {
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.proj",
    "mlp.fc1": "mlp.hidden",
    "mlp.fc2": "mlp.out",
    "adaLN_modulation.1": "modulation",
}


def renamed(key: str) -> str | None:
    """ditlab's name of one of the original's parameters; None for what ditlab recomputes or does not know."""
    stem, _, leaf = key.rpartition(".")
    if stem in _NAMES:
        return f"{_NAMES[stem]}.{leaf}"
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
    if block and block[2] in _BLOCK_NAMES:
        return f"blocks.{block[1]}.{_BLOCK_NAMES[block[2]]}.{leaf}"
    return None


def from_original(state: Mapping[str, Tensor], config: DiTConfig) -> DiT:
    """A DiT with the original's weights.

    Args:
        state: the original's state dict. Its `pos_embed` is recomputed here, not read.
        config: the network's shape; the original's label table has `num_classes + 1` rows where labels were dropped.

    Raises:
        DitlabError: for a key without a counterpart, a missing one, or another shape.
    """
    network = DiT(config)
    wanted = network.state_dict()
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if key == "pos_embed":
            continue
        name = renamed(key)
        if name is None or name not in wanted:
            raise DitlabError(f"original DiT weights: '{key}' has no counterpart in this network")
        if wanted[name].shape != value.shape:
            raise DitlabError(
                f"original DiT weights: '{key}' has shape {tuple(value.shape)}, expected {tuple(wanted[name].shape)}"
            )
        found[name] = value
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise DitlabError(f"original DiT weights: {len(missing)} parameters are missing, the first '{missing[0]}'")
    network.load_state_dict(found)
    return network
