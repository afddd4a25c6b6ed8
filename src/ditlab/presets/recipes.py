"""Parts of recipes that several families of presets share; a comment gives the source of each number."""

from __future__ import annotations

from dataclasses import replace

from ditlab.config import RunConfig
from ditlab.diffusion.objective_configs import EDMObjectiveConfig, VPObjectiveConfig
from ditlab.diffusion.sampler_configs import HeunConfig
from ditlab.training.config import TrainingConfig

_SHORT = TrainingConfig(batch_size=32, log_every=50, eval_every=250, save_every=500)
LONG = TrainingConfig(steps=400_000, lr=1e-4, ema=0.9999, log_every=100, eval_every=5_000, save_every=5_000)
"""Training of the published networks; each family replaces what its paper does otherwise."""

TRAINING = {
    "nano": replace(_SHORT, steps=5_000, lr=1e-3),  # sizes for a CPU, ditlab's own
    "micro": replace(_SHORT, steps=20_000, lr=5e-4),
    "an2024": replace(LONG, batch_size=64),  # An et al.
    "dit": replace(LONG, batch_size=256, flip=True),  # Peebles & Xie, Sec. 4
}
"""Training by name of the recipe."""

DDPM = VPObjectiveConfig(variance="fixed-large", label_dropout=0.0)
"""DDPM's objective, of unconditional networks without a learned variance."""


def with_edm(recipe: RunConfig, name: str) -> dict[str, RunConfig]:
    """Returns by name the recipe, and as NAME-edm the same network in EDM's framework, sampled by Heun's method."""
    network = recipe.network
    if network.can_learn_variance:
        network = replace(network, learn_sigma=False)
    objective = EDMObjectiveConfig(label_dropout=getattr(recipe.objective, "label_dropout", 0.0))
    edm = replace(recipe, preset=f"{name}-edm", network=network, objective=objective, sampler=HeunConfig())
    return {recipe.preset: recipe, edm.preset: edm}


__all__ = ["DDPM", "LONG", "TRAINING", "with_edm"]
