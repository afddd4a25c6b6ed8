"""Presets: whole recipes by name, each a network, how it is trained and how it is sampled.

`PRESETS` is put together here from the families of networks; every number says whose it is.
"""

from __future__ import annotations

from dataclasses import replace

from ditlab.config import RunConfig
from ditlab.diffusion.objectives import EDMObjectiveConfig
from ditlab.diffusion.samplers import HeunConfig
from ditlab.errors import unknown_name
from ditlab.networks.dit import DiTConfig
from ditlab.training.loop import TrainingConfig

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
    if not name.endswith("-edm"):
        return vp
    network = replace(vp.network, learn_sigma=False)
    return replace(vp, network=network, objective=EDMObjectiveConfig(), sampler=HeunConfig())


PRESETS: dict[str, RunConfig] = {
    (name := f"dit-{size}/{patch}{twin}"): _preset(name, size, patch)
    for size in _SIZES
    for patch in _PATCHES[size]
    for twin in ("", "-edm")
}
"""Whole recipes by name. `dit-s/2` to `dit-xl/8` are the twelve networks of Peebles & Xie, trained as they were;
`dit-xs/1` and `dit-s/1` are An et al.'s (pixel space, patch 1, DDPM with learned variance), and `dit-xs` with other
patches follows them; `dit-nano` and `dit-micro` are sizes for a CPU, ditlab's own. `-edm` trains the same network in
EDM's framework."""


def preset(name: str) -> RunConfig:
    """The recipe of a name.

    Raises:
        DitlabError: for an unknown name, with the nearest ones.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]
