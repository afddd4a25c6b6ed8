"""Presets: whole recipes by name, each a network, how it is trained and how it is sampled.

`PRESETS` is put together here from the families of networks; every number says whose it is.
"""

from __future__ import annotations

from dataclasses import replace

from ditlab.config import RunConfig
from ditlab.diffusion.blind_objective import BlindObjectiveConfig
from ditlab.diffusion.objectives import EDMObjectiveConfig, VPObjectiveConfig
from ditlab.diffusion.samplers import HeunConfig
from ditlab.errors import unknown_name
from ditlab.networks.bf_cnn import BFCNNConfig
from ditlab.networks.bf_unet import BFUNetConfig
from ditlab.networks.dit import DiTConfig
from ditlab.networks.unet import UNetConfig
from ditlab.training.config import TrainingConfig

_SIZES = {  # depth, width, heads
    "nano": (4, 64, 2),
    "micro": (6, 128, 4),
    "xs": (12, 252, 4),  # An et al., Fig. 6: DiT-XS
    "s": (12, 384, 6),  # from here on Peebles & Xie's sizes, Table 1
    "b": (12, 768, 12),
    "l": (24, 1024, 16),
    "xl": (28, 1152, 16),
}
_PATCHES = {size: (2, 4, 8) if size in ("b", "l", "xl") else (1, 2, 4, 8) for size in _SIZES}
_SHORT = TrainingConfig(batch_size=32, log_every=50, eval_every=250, save_every=500)
_LONG = TrainingConfig(steps=400_000, lr=1e-4, ema=0.9999, log_every=100, eval_every=5_000, save_every=5_000)
_TRAINING = {
    "nano": replace(_SHORT, steps=5_000, lr=1e-3),
    "micro": replace(_SHORT, steps=20_000, lr=5e-4),
    "an2024": replace(_LONG, batch_size=64),
    "dit": replace(_LONG, batch_size=256, flip=True),  # Peebles & Xie, Sec. 4
}
"""How each family of presets is trained."""


def _family(size: str, patch: int) -> str:
    if size in ("nano", "micro"):
        return size
    return "an2024" if size == "xs" or (size, patch) == ("s", 1) else "dit"


def _preset(name: str, size: str, patch: int) -> RunConfig:
    depth, width, heads = _SIZES[size]
    vp = RunConfig(
        preset=name,
        network=DiTConfig(patch=patch, depth=depth, width=width, heads=heads),
        training=_TRAINING[_family(size, patch)],
    )
    return _in_edm(vp) if name.endswith("-edm") else vp


def _in_edm(recipe: RunConfig) -> RunConfig:
    """The recipe with the same network in EDM's framework."""
    network, vp = recipe.network, recipe.objective
    assert isinstance(network, DiTConfig | UNetConfig)
    assert isinstance(vp, VPObjectiveConfig)
    edm = EDMObjectiveConfig(label_dropout=vp.label_dropout)
    return replace(recipe, network=replace(network, learn_sigma=False), objective=edm, sampler=HeunConfig())


_DDPM = VPObjectiveConfig(variance="fixed-large", label_dropout=0.0)
_IDDPM = VPObjectiveConfig(
    schedule="cosine", steps=4000, variance="learned-range", loss="rescaled-mse", rescale_time=True, label_dropout=0.0
)
_IDDPM_TRAINING = replace(_LONG, steps=1_500_000, batch_size=128)
_IMAGENET64 = UNetConfig(image_size=(64, 64), res_blocks=3, multipliers=(1, 2, 3, 4), learn_sigma=True)
_UNETS = {
    # Sizes for a CPU, ditlab's own: as many operations as dit-nano/2 and dit-micro/2, four channels a group as at full
    # size.
    "unet-nano": (
        UNetConfig(width=16, groups=4, res_blocks=1, multipliers=(1, 2, 4), attention_at=(), heads=2),
        _DDPM,
        _TRAINING["nano"],
    ),
    "unet-micro": (
        UNetConfig(width=32, groups=8, res_blocks=2, multipliers=(1, 2, 3), attention_at=()),
        _DDPM,
        _TRAINING["micro"],
    ),
    # An et al., Fig. 3: the one network of improved-diffusion's flags with its 109.55 M parameters and operations.
    "unet-an2024": (
        UNetConfig(res_blocks=3, multipliers=(1, 2, 3, 4), attention_at=()),
        _DDPM,
        _TRAINING["an2024"],
    ),
    # From here on Nichol & Dhariwal's flags.
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
# Their L_vlb models: the same networks, trained on the bound alone, t drawn by importance.
_VLB = replace(_IDDPM, loss="kl", time_sampling="loss-second-moment")
_BOUNDS = {
    f"{base}-vlb": (network, _VLB, training)
    for base, (network, _, training) in _UNETS.items()
    if base in ("unet-cifar10", "unet-imagenet64")
}


def _unet(name: str) -> RunConfig:
    network, objective, training = (_UNETS | _BOUNDS)[name.removesuffix("-edm")]
    recipe = RunConfig(preset=name, network=network, objective=objective, training=training)
    return _in_edm(recipe) if name.endswith("-edm") else recipe


# Kadkhodaie et al.: 1,000 epochs of 250,000 images (the training images again and again) in batches of 512, the rate
# halved every 100 epochs, no average of the weights.
_KADKHODAIE = replace(_LONG, steps=488_281, batch_size=512, lr=1e-3, lr_halve_every=48_828, ema=0.0)
_BIAS_FREE = {  # network, highest level in units of [0, 1], training
    "bf-unet": (BFUNetConfig(), 1.0, _KADKHODAIE),  # the paper's, of three blocks
    # Mohan et al.'s network and levels; their other settings are not known here, so it is trained as the UNet is.
    "bf-cnn": (BFCNNConfig(), 100 / 255, _KADKHODAIE),
    "bf-unet-nano": (BFUNetConfig(width=32), 1.0, replace(_TRAINING["nano"], lr_halve_every=1_000, ema=0.0)),
    "bf-unet-micro": (
        BFUNetConfig(width=48),
        1.0,
        replace(_TRAINING["micro"], lr=1e-3, lr_halve_every=4_000, ema=0.0),
    ),
    "bf-cnn-nano": (
        BFCNNConfig(width=32, depth=14),
        1.0,
        replace(_TRAINING["nano"], lr_halve_every=1_000, ema=0.0),
    ),
}


def _bias_free(name: str) -> RunConfig:
    network, highest, training = _BIAS_FREE[name.removesuffix("-vp").removesuffix("-edm")]
    if name.endswith("-vp"):
        return RunConfig(preset=name, network=network, objective=_DDPM, training=training)
    if name.endswith("-edm"):
        edm = EDMObjectiveConfig(label_dropout=0.0)
        return RunConfig(preset=name, network=network, objective=edm, training=training, sampler=HeunConfig())
    blind = BlindObjectiveConfig(max_level=highest)
    return RunConfig(preset=name, network=network, objective=blind, training=training, sampler=HeunConfig())


PRESETS: dict[str, RunConfig] = {
    (name := f"dit-{size}/{patch}{twin}"): _preset(name, size, patch)
    for size in _SIZES
    for patch in _PATCHES[size]
    for twin in ("", "-edm")
}
PRESETS |= {(name := f"{base}{twin}"): _unet(name) for base in _UNETS for twin in ("", "-edm")}
PRESETS |= {name: _unet(name) for name in _BOUNDS}
PRESETS |= {(name := f"{base}{twin}"): _bias_free(name) for base in _BIAS_FREE for twin in ("", "-vp", "-edm")}
"""Whole recipes by name. `dit-s/2` to `dit-xl/8` are the twelve networks of Peebles & Xie, trained as they were;
`dit-xs/1` and `dit-s/1` are An et al.'s (pixel space, patch 1, DDPM with learned variance), and `dit-xs` with other
patches follows them; `dit-nano` and `dit-micro` are sizes for a CPU, ditlab's own. `-edm` trains the same network in
EDM's framework. `unet-an2024` is the UNet that An et al. compare their DiTs with, trained as they are; `unet-cifar10`
and `unet-imagenet64` are Nichol & Dhariwal's hybrid models, those ending in `-vlb` the ones that they trained on the
bound alone. `bf-unet` is Kadkhodaie et al.'s bias-free UNet and `bf-cnn` Mohan et al.'s network, both blind and trained
by Kadkhodaie et al.'s recipe, with sizes for a CPU again; `-vp` trains the same network on DDPM's steps."""


def preset(name: str) -> RunConfig:
    """The recipe of a name.

    Raises:
        DitlabError: for an unknown name, with the nearest ones.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]
