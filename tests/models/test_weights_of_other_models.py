"""Results of models that ditlab did not train are told apart by the weights that were read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ditlab
from ditlab.diffusion.objective_configs import VPObjectiveConfig
from ditlab.diffusion.samplers import DDPMConfig
from ditlab.interop.imported import ImportedModel, freeze
from ditlab.models.external import ExternalModel
from ditlab.networks.base import build_network
from ditlab.networks.dit_config import DiTConfig


def weights(model: ditlab.Model, *, ema: bool = True) -> str:
    return model.denoiser_and_provenance(ema=ema)[1].weights


def test_averaged_and_raw_weights_of_one_file(tmp_path):
    config = DiTConfig(image_size=(4, 4), width=16, depth=1, heads=2)

    def read(ema: bool) -> ImportedModel:
        network = freeze(build_network(config))
        for value in network.parameters():
            value.fill_(0.5 if ema else 0.25)
        return ImportedModel("both", VPObjectiveConfig().build().denoiser(network), DDPMConfig(), {}, "0" * 64)

    model = ExternalModel(read(True), Path(tmp_path), read_raw=lambda: read(False))
    assert weights(model) == weights(model, ema=True) != ""
    assert weights(model, ema=False) != weights(model)


def test_a_diffusers_model_that_is_changed_in_memory(diffusers_folder):
    diffusers = pytest.importorskip("diffusers")
    folder = diffusers_folder("unet")
    module = diffusers.UNet2DModel.from_pretrained(folder / "unet").requires_grad_(False)
    scheduler = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
    model = ditlab.Model.from_diffusers(module, scheduler)
    before = weights(model)
    assert before == weights(model)
    with torch.no_grad():
        next(module.parameters()).mul_(1.5)
    assert weights(model) != before
