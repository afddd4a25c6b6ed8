"""Presets of bias-free networks."""

from __future__ import annotations

from dataclasses import replace

from ditlab.config import RunConfig
from ditlab.diffusion.objective_configs import BlindObjectiveConfig
from ditlab.diffusion.sampler_configs import HeunConfig
from ditlab.networks.base import NetworkConfig
from ditlab.networks.bf_cnn_config import BFCNNConfig
from ditlab.networks.bf_unet_config import BFUNetConfig
from ditlab.presets.recipes import DDPM, LONG, TRAINING, with_edm
from ditlab.training.config import TrainingConfig

# Kadkhodaie et al.: 1,000 epochs of 250,000 images (the training images repeated) in batches of 512; learning rate
# halved every 100 epochs; no weight average.
_KADKHODAIE = replace(LONG, steps=488_281, batch_size=512, lr=1e-3, lr_halve_every=48_828, ema=0.0)
_NANO = replace(TRAINING["nano"], lr_halve_every=1_000, ema=0.0)
_MICRO = replace(TRAINING["micro"], lr=1e-3, lr_halve_every=4_000, ema=0.0)

_NETWORKS: dict[str, tuple[NetworkConfig, float, TrainingConfig]] = {
    # network, highest noise level for images in [0, 1], training
    "bf-unet": (BFUNetConfig(), 1.0, _KADKHODAIE),  # the paper's, with three blocks
    # Mohan et al.'s network and noise levels. Their other settings are not known here; it is trained like the UNet.
    "bf-cnn": (BFCNNConfig(), 100 / 255, _KADKHODAIE),
    "bf-unet-nano": (BFUNetConfig(width=32), 1.0, _NANO),
    "bf-unet-micro": (BFUNetConfig(width=48), 1.0, _MICRO),
    "bf-cnn-nano": (BFCNNConfig(width=32, depth=14), 1.0, _NANO),
}


def _presets() -> dict[str, RunConfig]:
    presets = {}
    for name, (network, highest, training) in _NETWORKS.items():
        blind = BlindObjectiveConfig(max_level=highest)
        vp = RunConfig(preset=f"{name}-vp", network=network, objective=DDPM, training=training)
        presets[name] = replace(vp, preset=name, objective=blind, sampler=HeunConfig())
        presets |= with_edm(vp, name)
    return presets


PRESETS = _presets()
"""`bf-unet` is Kadkhodaie et al.'s bias-free UNet and `bf-cnn` Mohan et al.'s network, both blind and trained with
Kadkhodaie et al.'s recipe; `nano` and `micro` are ditlab's own sizes for a CPU. `-vp` trains the same network on DDPM's
process, `-edm` in EDM's framework."""

__all__ = ["PRESETS"]
