"""Presets of improved-diffusion's UNet."""

from __future__ import annotations

from dataclasses import replace

from ditlab.config import RunConfig
from ditlab.diffusion.objective_configs import VPObjectiveConfig
from ditlab.networks.unet_config import UNetConfig
from ditlab.presets.recipes import DDPM, LONG, TRAINING, with_edm
from ditlab.training.config import TrainingConfig

_IDDPM = VPObjectiveConfig(
    schedule="cosine", steps=4000, variance="learned-range", loss="rescaled-mse", rescale_time=True, label_dropout=0.0
)
_IDDPM_TRAINING = replace(LONG, steps=1_500_000, batch_size=128)
_IMAGENET64 = UNetConfig(image_size=(64, 64), res_blocks=3, multipliers=(1, 2, 3, 4), learn_sigma=True)
_UNETS: dict[str, tuple[UNetConfig, VPObjectiveConfig, TrainingConfig]] = {
    # ditlab's own sizes for a CPU: as many operations as dit-nano/2 and dit-micro/2; four channels in each group, as at
    # full size.
    "unet-nano": (
        UNetConfig(width=16, groups=4, res_blocks=1, multipliers=(1, 2, 4), attention_at=(), heads=2),
        DDPM,
        TRAINING["nano"],
    ),
    "unet-micro": (
        UNetConfig(width=32, groups=8, res_blocks=2, multipliers=(1, 2, 3), attention_at=()),
        DDPM,
        TRAINING["micro"],
    ),
    # An et al., Fig. 3: the only network of improved-diffusion's flags with its 109.55 M parameters and operations.
    "unet-an2024": (UNetConfig(res_blocks=3, multipliers=(1, 2, 3, 4), attention_at=()), DDPM, TRAINING["an2024"]),
    # The following: Nichol & Dhariwal's flags.
    "unet-cifar10": (
        UNetConfig(res_blocks=3, dropout=0.3, learn_sigma=True),
        _IDDPM,
        replace(_IDDPM_TRAINING, steps=500_000),
    ),
    "unet-imagenet64": (_IMAGENET64, _IDDPM, _IDDPM_TRAINING),
    "unet-imagenet64-cond": (
        replace(_IMAGENET64, width=192, num_classes=1000),
        replace(_IDDPM, loss="mse", rescale_time=False),
        replace(_IDDPM_TRAINING, steps=250_000, batch_size=2048, lr=3e-4),
    ),
}
# Their L_vlb models: the same networks, trained on the variational bound only, with importance sampling of t.
_VLB = replace(_IDDPM, loss="kl", time_sampling="loss-second-moment")


def _presets() -> dict[str, RunConfig]:
    presets = {}
    for name, (network, objective, training) in _UNETS.items():
        recipe = RunConfig(preset=name, network=network, objective=objective, training=training)
        presets |= with_edm(recipe, name)
    for name in ("unet-cifar10", "unet-imagenet64"):
        presets[f"{name}-vlb"] = replace(presets[name], preset=f"{name}-vlb", objective=_VLB)
    return presets


PRESETS = _presets()
"""`unet-an2024` is the UNet that An et al. compare their DiTs with, with the same training. `unet-cifar10` and
`unet-imagenet64` are Nichol & Dhariwal's hybrid models, those with `-vlb` the ones trained on the bound only.
`unet-nano` and `unet-micro` are ditlab's own sizes for a CPU. `-edm` trains the same network in EDM's framework."""

__all__ = ["PRESETS"]
